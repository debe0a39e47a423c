"""Image data sets that live outside the project: CIFAR and Flowers-102, as files or from the hub."""

from __future__ import annotations

import os
import pickle
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.compat import array_of_pickle
from fedbench.data.image_files import SUFFIXES, EncodedImage, ImageFiles
from fedbench.data.labels import class_numbers, shown
from fedbench.data.rows import Part
from fedbench.data.sources import cure, find_files, listing, load_from_hub, read_bytes, read_parquet, set_folders
from fedbench.errors import FedbenchError

DECODED = 512 * 2**20
"""Images of one size are decoded at once where that takes at most this many bytes."""

Parts = tuple[dict[str, Part], list[str]]
Rows = tuple[Sequence[EncodedImage | Path], np.ndarray]
"""Encoded images, and the numbers of their classes [n]."""


@dataclass(frozen=True)
class ImageSet:
    """An image data set.

    folders: names its folder goes by. classes: in the order of their numbers. hub: id, commit, configuration. label:
    names of the labels' column. train: official parts that are the training rows here, by the names they go by; the
    test set is always the official one. official: reads the authors' own files from a folder; None where there are
    none of them. note: what a user should know.
    """

    folders: tuple[str, ...]
    classes: tuple[str, ...]
    hub: tuple[str, str, str | None]
    official: Callable[[Path, ImageSet], Parts | None]
    label: tuple[str, ...] = ("label",)
    train: tuple[tuple[str, ...], ...] = (("train",),)
    note: str | None = None

    @property
    def revision(self) -> str:
        """The commit on the hub that is loaded unless the scenario names another."""
        return self.hub[1]


def load_image_set(name: str, revision: str | None, root: Path | None) -> Parts:
    """Parts by role ("train", "test") and notes, from a folder or the hub."""
    kind = IMAGE_SETS[name]
    found = _from_folder(name, kind, root) if root is not None else None
    parts, notes = found or _from_hub(name, kind, revision or kind.revision)
    for role, part in parts.items():
        if len(part) == 0:
            raise FedbenchError(f"data set {name}: {role} holds no images; see docs/data.md for the known layouts")
    return parts, notes + ([f"{name}: {kind.note}"] if kind.note else [])


def _from_folder(name: str, kind: ImageSet, root: Path) -> Parts | None:
    """The parts in a user's folder; None where it does not hold this data set."""
    folders = list(set_folders(root, kind.folders))
    for folder in folders:
        if found := kind.official(folder, kind) or _parquet(folder, kind) or _image_folders(folder, kind):
            return found
    # Archives are often left where they were downloaded to, without a folder of the set's own.
    if found := kind.official(root, kind):
        return found
    if folders:
        raise FedbenchError(
            f"{folders[0]}: no layout of {name} recognised; expected its official files, train and test as parquet, or "
            f"train/CLASS/*.png and test/CLASS/*.png (docs/data.md), but {listing(folders[0])}"
        )
    return None


def _images(source: Sequence[EncodedImage | Path]) -> np.ndarray | ImageFiles:
    """Decoded, uint8 [n, H, W, 3], where all are of one size and that is little; else the files."""
    files = ImageFiles(source, np.arange(len(source)))
    if len(files) == 0:
        return files
    first = files.decode(0)
    if len(files) * first.size > DECODED:
        return files
    decoded = np.empty((len(files), *first.shape), dtype=np.uint8)
    for i in range(len(files)):
        # Decoded one by one, since the size in an image's header need not be the one that it is seen in.
        if (image := files.decode(i)).shape != first.shape:
            return files
        decoded[i] = image
    return decoded


def _part(read: Sequence[Rows]) -> Part:
    """The rows of several files or folders as one part."""
    source = [item for items, _ in read for item in items]
    return Part(np.concatenate([labels for _, labels in read]), images=_images(source))


# ---------------------------------------------------------------- parquet and image folders


def _columns(where: str, columns: Sequence[Any], kind: ImageSet) -> tuple[str, str]:
    """The columns of images and labels. Raises FedbenchError, which begins with `where`, for lack of one."""
    column = next((c for c in ("img", "image") if c in columns), None)
    label = next((c for c in kind.label if c in columns), None)
    if column is None or label is None:
        found = ", ".join(map(str, columns))
        raise FedbenchError(f"{where} columns {found}; needs img or image and {' or '.join(kind.label)}")
    return column, label


def _parquet(folder: Path, kind: ImageSet) -> Parts | None:
    """train and test as parquet, in the hub's columns: a struct with the file's bytes, and a label."""
    files = {names: find_files(folder, names) for names in (*kind.train, ("test",))}
    if not files[kind.train[0]] and not files["test",]:
        return None
    read = {}
    for names, paths in files.items():
        if not paths:
            raise FedbenchError(
                f"{folder}: no {names[0]} file; expected {names[0]}.parquet or its shards, but {listing(folder)}"
            )
        read[names] = [_parquet_rows(path, kind) for path in paths]
    train, test = _part([rows for names in kind.train for rows in read[names]]), _part(read["test",])
    return {"train": train, "test": test}, [f"{folder}: parquet, {len(train)} and {len(test)} images"]


def _parquet_rows(path: Path, kind: ImageSet) -> Rows:
    table = read_parquet(path)
    column, label = _columns(f"{path}: unknown layout,", list(table), kind)
    source = [_cell(f"{path}: row {row}", cell) for row, cell in enumerate(table[column], start=1)]
    return source, class_numbers(str(path), table[label], kind.classes)


def _cell(where: str, cell: Any) -> EncodedImage:
    """The image in a cell of parquet: a struct of the hub's with the file's bytes, or the bytes themselves."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        held = "a path, but no bytes," if isinstance(cell, dict) and cell.get("path") else shown(content)
        raise FedbenchError(f"{where} holds {held} where an encoded image is expected; fill or remove the row")
    return EncodedImage(where, content)


def _image_folders(folder: Path, kind: ImageSet) -> Parts | None:
    """train/CLASS/*.png and test/CLASS/*.png, or other formats; a further training part may be missing."""
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        return None
    places = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in kind.train]
    used = [place for place in places if place is not None]
    remarks: list[str] = []
    train = _part([_image_folder(place, kind, remarks) for place in used])
    test = _part([_image_folder(folder / "test", kind, remarks)])
    names = ", ".join(place.name for place in used)
    note = f"{folder}: image folders, {len(train)} images ({names}) and {len(test)} (test)"
    return {"train": train, "test": test}, ["; ".join([note, *remarks])]


def _image_folder(folder: Path, kind: ImageSet, remarks: list[str]) -> Rows:
    """CLASS/*.png and so on, folders in CLASS included; what is left out is added to `remarks`.

    Classes go by name, or by number from 0 or from 1.
    """
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    by_number = {int(name): name for name in names if name.isdecimal()}
    count = len(kind.classes)
    expected = next((span for span in (range(count), range(1, count + 1)) if {*span} == {*by_number}), None)
    classes = list(kind.classes) if expected is None else [by_number[number] for number in expected]
    if names != {*classes}:
        odd = min(names ^ {*classes})
        raise FedbenchError(
            f"{folder}: its {len(names)} folders are not the {count} classes, {odd!r} is missing or too many; name "
            "them as the classes are called, or by number"
        )
    left_out = Counter(_kind_of_file(path) for path in folder.iterdir() if path.name not in names)
    source: list[EncodedImage | Path] = []
    labels: list[int] = []
    empty = []
    for number, name in enumerate(classes):
        found, others = _image_paths(folder / name)
        left_out += others
        source += found
        labels += [number] * len(found)
        if not found:
            empty.append(name)
    left = ", ".join(f"{n} {what}" for what, n in sorted(left_out.items()))
    if not source:
        raise FedbenchError(
            f"{folder}: its class folders hold no {', '.join(SUFFIXES)} files{f', but {left}' if left else ''}"
        )
    if left:
        remarks.append(f"left out in {folder.name}: {left}")
    if empty:
        more = f" and {len(empty) - 3} more" if len(empty) > 3 else ""
        remarks.append(f"no images in {folder.name} of {', '.join(empty[:3])}{more}")
    return source, np.array(labels, dtype=np.int64)


def _image_paths(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a class's folder and the folders in it, in order, and how many files of what kind are none."""
    found, others = [], Counter[str]()
    for place, folders, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                found.append(path)
            else:
                others[_kind_of_file(path)] += 1
        for name in [name for name in folders if name.startswith(".") or Path(place, name).is_symlink()]:
            folders.remove(name)
            others[_kind_of_file(Path(place, name))] += 1
    return sorted(found), others


def _kind_of_file(path: Path) -> str:
    """What is left out of an image folder, as a note calls it."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "linked folder"
    return path.suffix.lower() or "without suffix"


# ---------------------------------------------------------------- the hub


class _HubImages(Sequence[Any]):
    """The encoded images of a split, read from the hub's files on disk one by one."""

    def __init__(self, where: str, split: Any, column: str) -> None:
        from datasets import Image

        try:
            self._split = split.select_columns([column]).cast_column(column, Image(decode=False))
        except Exception as error:  # arrow raises what it likes for a column that is none of images
            reason = " ".join(str(error).split())[:160]
            raise FedbenchError(f"{where}: column {column} holds no encoded images: {reason}") from None
        self._where, self._column = where, column

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, i: Any) -> Any:
        cell = self._split[int(i)][self._column]
        if isinstance(cell, dict) and cell["bytes"] is None and cell["path"] and Path(cell["path"]).is_file():
            return Path(cell["path"])
        return _cell(f"{self._where}: row {int(i) + 1}", cell)


def _from_hub(name: str, kind: ImageSet, revision: str) -> Parts:
    from datasets import concatenate_datasets

    repository, _, configuration = kind.hub
    loaded, note = load_from_hub(name, repository, configuration, revision, kind.folders)
    parts = {}
    for role, wanted in (("train", kind.train), ("test", (("test",),))):
        splits = [next((split for split in names if split in loaded), None) for names in wanted]
        if None in splits:
            raise FedbenchError(
                f"data set {name}: {repository} at revision {revision[:12]} has the splits {', '.join(loaded)}, "
                f"{' and '.join(names[0] for names in wanted)} are needed; leave dataset.revision out"
            )
        where = f"data set {name}: {repository} at revision {revision[:12]}"
        rows = concatenate_datasets([loaded[split] for split in splits])
        column, label = _columns(f"{where} has", rows.column_names, kind)
        where = f"{where}: {' and '.join(map(str, splits))}"
        labels = class_numbers(where, rows[label], kind.classes)
        parts[role] = Part(labels, images=_images(_HubImages(where, rows, column)))
    return parts, [note]


# ---------------------------------------------------------------- official files


@dataclass(frozen=True)
class Cifar:
    """CIFAR's python version, unpacked or as the archive: pickled batches of [n, 3072] bytes, channels first."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    label: bytes

    def __call__(self, folder: Path, kind: ImageSet) -> Parts | None:
        batches = (*self.train, self.test)
        for place in (folder, folder / self.folder):
            if any((place / name).is_file() for name in batches) and (place / self.train[0]).is_file():
                if lacking := [name for name in batches if not (place / name).is_file()]:
                    raise FedbenchError(f"{place}: {lacking[0]} is missing; unpack {self.archive} again")
                return self._parts(place, kind, {name: read_bytes(place / name) for name in batches})
        if not (path := folder / self.archive).is_file():
            return None
        wanted = _archived(path, lambda n: n.removeprefix(f"{self.folder}/") in batches, self.folder)
        return self._parts(path, kind, wanted)

    def _parts(self, place: Path, kind: ImageSet, contents: Mapping[str, bytes]) -> Parts:
        if lacking := [name for name in (*self.train, self.test) if name not in contents]:
            raise FedbenchError(f"{place}: {lacking[0]} is missing; fetch it again")
        read = {name: self._batch(f"{place}: {name}", content, kind) for name, content in contents.items()}
        train = [read[name] for name in self.train]
        parts = {
            "train": Part(np.concatenate([n for _, n in train]), images=np.concatenate([i for i, _ in train])),
            "test": Part(read[self.test][1], images=read[self.test][0]),
        }
        return parts, [f"{place}: python version, {len(parts['train'])} and {len(parts['test'])} images"]

    def _batch(self, where: str, content: bytes, kind: ImageSet) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, 32, 32, 3] and labels [n]."""
        batch = _unpickled(where, content)
        if not isinstance(batch, dict) or b"data" not in batch or self.label not in batch:
            raise FedbenchError(f"{where}: holds no data and {self.label.decode()}; fetch it again")
        data, labels = batch[b"data"], batch[self.label]
        if not isinstance(data, np.ndarray) or not isinstance(labels, list | np.ndarray):
            raise FedbenchError(f"{where}: data and {self.label.decode()} are no lists of rows; fetch it again")
        if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
            raise FedbenchError(
                f"{where}: images are {data.dtype} {data.shape}, expected uint8 [n, 3072]; fetch it again"
            )
        images = np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        return images, class_numbers(where, labels, kind.classes)


class _Unpickler(pickle.Unpickler):
    """Reads numpy arrays and plain values, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return array_of_pickle()
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import codecs

            return codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(where: str, content: bytes) -> Any:
    try:
        return _Unpickler(BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle can raise almost anything
        reason = " ".join(str(error).split())[:160]
        raise FedbenchError(f"{where}: is not a batch of CIFAR's python version ({reason}); {cure(content)}") from None


def _archived(path: Path, wanted: Callable[[str], bool], folder: str) -> dict[str, bytes]:
    """Contents of an archive's wanted files by name, without the leading folder."""
    try:
        with tarfile.open(path) as archive:
            contents = {
                member.name.removeprefix("./").removeprefix(f"{folder}/"): file.read()
                for member in archive
                if wanted(member.name.removeprefix("./")) and (file := archive.extractfile(member)) is not None
            }
            # The checksum of the whole stands at the end, which a reader of members does not come to.
            while archive.fileobj is not None and archive.fileobj.read(2**20):
                pass
            return contents
    except Exception as error:  # a damaged archive raises almost anything, zlib's own errors among them
        reason = " ".join(str(error).split())[:160]
        raise FedbenchError(f"{path}: cannot be read as an archive: {reason}; fetch it again") from None


def flowers(folder: Path, kind: ImageSet) -> Parts | None:
    """Flowers-102 as its authors publish it: imagelabels.mat, setid.mat, and 102flowers.tgz or the folder jpg.

    Image i (from 1) is jpg/image_0000i.jpg; labels count from 1; setid lists the images of each official part.
    """
    from scipy.io import loadmat

    if not (folder / "imagelabels.mat").is_file() or not (folder / "setid.mat").is_file():
        return None
    try:
        given = loadmat(folder / "imagelabels.mat")["labels"].ravel()
        setid = loadmat(folder / "setid.mat")
        ids = {part: setid[part].ravel() for part in ("trnid", "valid", "tstid")}
    except Exception as error:  # a damaged file raises almost anything
        reason = " ".join(str(error).split())[:160]
        raise FedbenchError(f"{folder}: imagelabels.mat or setid.mat cannot be read: {reason}; fetch them") from None
    labels = class_numbers(f"{folder / 'imagelabels.mat'}", given, kind.classes, first=1)
    listed = np.concatenate([*ids.values()])
    if not np.isin(listed, np.arange(1, len(labels) + 1)).all():
        raise FedbenchError(f"{folder}: setid.mat names images beyond the {len(labels)} of imagelabels.mat")
    if len(np.unique(listed)) < len(listed):
        raise FedbenchError(f"{folder}: setid.mat names an image twice, in one part or in two; fetch it again")
    names = [f"image_{i + 1:05}.jpg" for i in range(len(labels))]
    place = next(
        (p for p in (folder / "jpg", folder / "102flowers" / "jpg", folder / "102flowers") if p.is_dir()), None
    )
    source: list[EncodedImage | Path]
    if place is not None:
        missing = [name for name in names if not (place / name).is_file()]
        source = [place / name for name in names]
    elif (archive := folder / "102flowers.tgz").is_file():
        contents = _archived(archive, lambda name: name.endswith(".jpg"), "jpg")
        place, missing = archive, [name for name in names if name not in contents]
        source = [EncodedImage(f"{archive}: {name}", contents.get(name, b"")) for name in names]
    else:
        raise FedbenchError(f"{folder}: no images; expected 102flowers.tgz or the folder jpg beside imagelabels.mat")
    if missing:
        raise FedbenchError(f"{place}: {missing[0]} is missing ({len(missing)} in all); unpack 102flowers.tgz again")
    parts = {}
    for role, official in (("train", ("trnid", "valid")), ("test", ("tstid",))):
        rows = np.concatenate([ids[part] for part in official]).astype(np.int64) - 1
        parts[role] = Part(labels[rows], images=ImageFiles(source, rows))
    note = f"{place}: official files, {len(parts['train'])} (trnid, valid) and {len(parts['test'])} (tstid) images"
    return parts, [note]


CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = (
    "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can "
    "castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin "
    "elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
    "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
    "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk "
    "skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger "
    "tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
)

IMAGE_SETS = {
    "cifar10": ImageSet(
        folders=("cifar10", "cifar-10", "CIFAR10", "CIFAR-10", "cifar-10-batches-py"),
        classes=tuple(CIFAR10.split()),
        hub=("uoft-cs/cifar10", "0b2714987fa478483af9968de7c934580d0bb9a2", None),
        official=Cifar(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            b"labels",
        ),
    ),
    "cifar100": ImageSet(
        folders=("cifar100", "cifar-100", "CIFAR100", "CIFAR-100", "cifar-100-python"),
        classes=tuple(CIFAR100.split()),
        hub=("uoft-cs/cifar100", "aadb3af77e9048adbea6b47c21a81e47dd092ae5", None),
        official=Cifar("cifar-100-python", "cifar-100-python.tar.gz", ("train",), "test", b"fine_labels"),
        label=("fine_label", "label"),
    ),
    "flowers102": ImageSet(
        folders=("flowers-102", "flowers102", "102flowers", "oxford_flowers102", "oxford-flowers-102"),
        # The authors number their classes and publish no names with them.
        classes=tuple(map(str, range(1, 103))),
        hub=("dpdl-benchmark/oxford_flowers102", "544b55c9af69a05742ead7571cd7ae23cfcd758b", None),
        official=flowers,
        train=(("train",), ("validation", "valid", "val")),
        note="training rows are the official parts train and validation (1,020 images each), test rows the official "
        "test part (6,149)",
    ),
}
