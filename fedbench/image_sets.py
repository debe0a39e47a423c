"""Image data sets that live outside the project: CIFAR and Flowers-102, as files or from the hub."""

from __future__ import annotations

import pickle
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.data import ImageFiles, Part
from fedbench.errors import FedbenchError
from fedbench.sources import find_files, load_from_hub, read_parquet, set_folders

SUFFIXES = (".png", ".jpg", ".jpeg")
DECODED = 512 * 2**20
"""Images of one size are decoded at once where that takes at most this many bytes."""

Parts = tuple[dict[str, Part], list[str]]


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
        if len(part) == 0 or part.labels.min() < 0 or part.labels.max() >= len(kind.classes):
            raise FedbenchError(
                f"data set {name}: {role} has {len(part)} images with labels other than 0 to {len(kind.classes) - 1}; "
                "see docs/data.md for the known layouts"
            )
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
            "train/CLASS/*.png and test/CLASS/*.png (docs/data.md)"
        )
    return None


def _images(source: Sequence[bytes | Path]) -> np.ndarray | ImageFiles:
    """Decoded, uint8 [n, H, W, 3], where all are of one size and that is little; else the files."""
    files = ImageFiles(source, np.arange(len(source)))
    if len(files) == 0:
        return files
    height, width = first = files.size(0)
    if len(files) * height * width * 3 > DECODED or any(files.size(i) != first for i in range(1, len(files))):
        return files
    return np.stack([files.decode(i) for i in range(len(files))])


def _joined(parts: Sequence[Part]) -> Part:
    """Several parts as one; arrays of one size stay an array."""
    if len(parts) == 1:
        return parts[0]
    labels = np.concatenate([part.labels for part in parts])
    arrays = [part.images for part in parts if isinstance(part.images, np.ndarray)]
    if len(arrays) == len(parts) and len({a.shape[1:] for a in arrays}) == 1:
        return Part(labels, images=np.concatenate(arrays))
    files = [part.images for part in parts if isinstance(part.images, ImageFiles)]
    if len(files) < len(parts):
        raise FedbenchError("official parts of one data set hold images of different kinds; convert them to one layout")
    source = [f.source[int(i)] for f in files for i in f.rows]
    return Part(labels, images=ImageFiles(source, np.arange(len(source))))


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
            raise FedbenchError(f"{folder}: no {names[0]} file; expected {names[0]}.parquet or its shards")
        contents: list[bytes | Path] = []
        labels: list[int] = []
        for path in paths:
            table = read_parquet(path)
            column, label = _columns(f"{path}: unknown layout,", list(table), kind)
            contents += [cell["bytes"] for cell in table[column]]
            labels += [int(value) for value in table[label]]
        read[names] = Part(np.array(labels, dtype=np.int64), images=_images(contents))
    train, test = _joined([read[names] for names in kind.train]), read["test",]
    return {"train": train, "test": test}, [f"{folder}: parquet, {len(train)} and {len(test)} images"]


def _image_folders(folder: Path, kind: ImageSet) -> Parts | None:
    """train/CLASS/*.png and test/CLASS/*.png, or .jpg; a further training part may be missing."""
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        return None
    places = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in kind.train]
    read = [_image_folder(place, kind) for place in places if place is not None]
    train, test = _joined(read), _image_folder(folder / "test", kind)
    used = ", ".join(place.name for place in places if place is not None)
    return {"train": train, "test": test}, [
        f"{folder}: image folders, {len(train)} images ({used}) and {len(test)} (test)"
    ]


def _image_folder(folder: Path, kind: ImageSet) -> Part:
    """CLASS/*.png: classes go by name, or by number from 0 or from 1."""
    names = {path.name for path in folder.iterdir() if path.is_dir()}
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
    source: list[bytes | Path] = []
    labels: list[int] = []
    for number, name in enumerate(classes):
        found = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
        source += found
        labels += [number] * len(found)
    if not source:
        raise FedbenchError(f"{folder}: its class folders hold no {', '.join(SUFFIXES)} files")
    return Part(np.array(labels, dtype=np.int64), images=_images(source))


# ---------------------------------------------------------------- the hub


class _HubImages(Sequence[Any]):
    """The encoded images of a split, read from the hub's files on disk one by one."""

    def __init__(self, split: Any, column: str) -> None:
        from datasets import Image

        self._split = split.select_columns([column]).cast_column(column, Image(decode=False))
        self._column = column

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, i: Any) -> Any:
        cell = self._split[int(i)][self._column]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])


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
        rows = concatenate_datasets([loaded[split] for split in splits])
        where = f"data set {name}: {repository} at revision {revision[:12]} has"
        column, label = _columns(where, rows.column_names, kind)
        parts[role] = Part(np.array(rows[label], dtype=np.int64), images=_images(_HubImages(rows, column)))
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
                return self._parts(place, {name: (place / name).read_bytes() for name in batches})
        if not (path := folder / self.archive).is_file():
            return None
        return self._parts(path, _archived(path, lambda n: n.removeprefix(f"{self.folder}/") in batches, self.folder))

    def _parts(self, place: Path, contents: Mapping[str, bytes]) -> Parts:
        if lacking := [name for name in (*self.train, self.test) if name not in contents]:
            raise FedbenchError(f"{place}: {lacking[0]} is missing; fetch it again")
        read = {name: self._batch(f"{place}: {name}", content) for name, content in contents.items()}
        train, test = _joined([read[name] for name in self.train]), read[self.test]
        return {"train": train, "test": test}, [f"{place}: python version, {len(train)} and {len(test)} images"]

    def _batch(self, where: str, content: bytes) -> Part:
        batch = _unpickled(where, content)
        if not isinstance(batch, dict) or b"data" not in batch or self.label not in batch:
            raise FedbenchError(f"{where}: holds no data and {self.label.decode()}; fetch it again")
        data, labels = np.asarray(batch[b"data"]), np.array(batch[self.label], dtype=np.int64)
        if data.dtype != np.uint8 or data.shape != (len(labels), 3072):
            raise FedbenchError(
                f"{where}: images are {data.dtype} {data.shape}, expected uint8 [n, 3072]; fetch it again"
            )
        return Part(labels, images=np.ascontiguousarray(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)))


class _Unpickler(pickle.Unpickler):
    """Reads numpy arrays and plain values, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            from numpy._core import multiarray

            return multiarray._reconstruct
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
        raise FedbenchError(f"{where}: is not a batch of CIFAR's python version ({error}); fetch it again") from None


def _archived(path: Path, wanted: Callable[[str], bool], folder: str) -> dict[str, bytes]:
    """Contents of an archive's wanted files by name, without the leading folder."""
    try:
        with tarfile.open(path) as archive:
            return {
                member.name.removeprefix("./").removeprefix(f"{folder}/"): file.read()
                for member in archive
                if wanted(member.name.removeprefix("./")) and (file := archive.extractfile(member)) is not None
            }
    except (tarfile.TarError, OSError, EOFError) as error:
        raise FedbenchError(f"{path}: cannot be read as an archive: {error}; fetch it again") from None


def flowers(folder: Path, kind: ImageSet) -> Parts | None:
    """Flowers-102 as its authors publish it: imagelabels.mat, setid.mat, and 102flowers.tgz or the folder jpg.

    Image i (from 1) is jpg/image_0000i.jpg; labels count from 1; setid lists the images of each official part.
    """
    from scipy.io import loadmat

    if not (folder / "imagelabels.mat").is_file() or not (folder / "setid.mat").is_file():
        return None
    try:
        labels = loadmat(folder / "imagelabels.mat")["labels"].ravel().astype(np.int64) - 1
        setid = loadmat(folder / "setid.mat")
        ids = {part: setid[part].ravel().astype(np.int64) for part in ("trnid", "valid", "tstid")}
    except Exception as error:  # a damaged file raises almost anything
        raise FedbenchError(f"{folder}: imagelabels.mat or setid.mat cannot be read: {error}; fetch them") from None
    names = [f"image_{i + 1:05}.jpg" for i in range(len(labels))]
    place = next(
        (p for p in (folder / "jpg", folder / "102flowers" / "jpg", folder / "102flowers") if p.is_dir()), None
    )
    source: list[bytes | Path]
    if place is not None:
        missing = [name for name in names if not (place / name).is_file()]
        source = [place / name for name in names]
    elif (archive := folder / "102flowers.tgz").is_file():
        contents = _archived(archive, lambda name: name.endswith(".jpg"), "jpg")
        place, missing = archive, [name for name in names if name not in contents]
        source = [contents.get(name, b"") for name in names]
    else:
        raise FedbenchError(f"{folder}: no images; expected 102flowers.tgz or the folder jpg beside imagelabels.mat")
    if missing:
        raise FedbenchError(f"{place}: {missing[0]} is missing ({len(missing)} in all); unpack 102flowers.tgz again")
    parts = {}
    for role, official in (("train", ("trnid", "valid")), ("test", ("tstid",))):
        rows = np.concatenate([ids[part] for part in official]) - 1
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= len(labels):
            raise FedbenchError(f"{folder}: setid.mat names images beyond the {len(labels)} of imagelabels.mat")
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
