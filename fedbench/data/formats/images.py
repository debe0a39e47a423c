"""Images as files: parquet of the hub's, folders of images, or the authors' own files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.data.image_files import SUFFIXES, EncodedImage, ImageFiles
from fedbench.data.labels import class_numbers, shown
from fedbench.data.rows import Part
from fedbench.data.sets.dataset import DataSet, Rows
from fedbench.data.sources import find_files, listing, load_from_hub, not_at_hand, read_parquet, set_folders
from fedbench.errors import FedbenchError

DECODED = 512 * 2**20
"""Images of one size are decoded at once where that takes at most this many bytes."""

Labelled = tuple[Sequence[EncodedImage | Path], np.ndarray]
"""Encoded images, and the numbers of their classes [n]."""

Official = Callable[[Path, Sequence[str]], Rows | None]
"""Reads the authors' own files from a folder, given the classes; None where there are none of them."""


@dataclass(frozen=True)
class ImageSource:
    """Where the images of a data set lie; `DataSet.source` of image data sets.

    folders: names its folder goes by. hub: id, commit, configuration; None for a set that is on no hub. official:
    reads the authors' own files. label: names of the labels' column. train: official parts that are the training rows
    here, by the names they go by; the test set is always the official one.
    """

    folders: tuple[str, ...]
    hub: tuple[str, str, str | None] | None = None
    official: Official | None = None
    label: tuple[str, ...] = ("label",)
    train: tuple[tuple[str, ...], ...] = (("train",),)

    def __call__(self, about: DataSet, revision: str | None, root: Path | None) -> Rows:
        """Parts by role ("train", "test") and notes, from a folder or the hub."""
        found = _from_folder(about, self, root) if root is not None else None
        parts, notes = found or _from_hub(about, self, revision)
        for role, part in parts.items():
            if len(part) == 0:
                raise FedbenchError(
                    f"data set {about.name}: {role} holds no images; see docs/data.md for the known layouts"
                )
        return parts, notes


def _from_folder(about: DataSet, kind: ImageSource, root: Path) -> Rows | None:
    """The parts in a user's folder; None where it does not hold this data set."""
    classes = about.classes
    folders = list(set_folders(root, kind.folders))
    for folder in folders:
        found = kind.official(folder, classes) if kind.official else None
        if found := found or _parquet(folder, kind, classes) or _image_folders(folder, kind, classes):
            return found
    # Archives are often left where they were downloaded to, without a folder of the set's own.
    if kind.official and (found := kind.official(root, classes)):
        return found
    if folders:
        raise FedbenchError(
            f"{folders[0]}: no layout of {about.name} recognised; expected its official files, train and test as "
            f"parquet, or train/CLASS/*.png and test/CLASS/*.png (docs/data.md), but {listing(folders[0])}"
        )
    return None


def images_of(source: Sequence[EncodedImage | Path]) -> np.ndarray | ImageFiles:
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


def _part(read: Sequence[Labelled]) -> Part:
    """The rows of several files or folders as one part."""
    source = [item for items, _ in read for item in items]
    return Part(np.concatenate([labels for _, labels in read]), images=images_of(source))


# ---------------------------------------------------------------- parquet and image folders


def _columns(where: str, columns: Sequence[Any], kind: ImageSource) -> tuple[str, str]:
    """The columns of images and labels. Raises FedbenchError, which begins with `where`, for lack of one."""
    column = next((c for c in ("img", "image") if c in columns), None)
    label = next((c for c in kind.label if c in columns), None)
    if column is None or label is None:
        found = ", ".join(map(str, columns))
        raise FedbenchError(f"{where} columns {found}; needs img or image and {' or '.join(kind.label)}")
    return column, label


def _parquet(folder: Path, kind: ImageSource, classes: Sequence[str]) -> Rows | None:
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
        read[names] = [_parquet_rows(path, kind, classes) for path in paths]
    train, test = _part([rows for names in kind.train for rows in read[names]]), _part(read["test",])
    return {"train": train, "test": test}, [f"{folder}: parquet, {len(train)} and {len(test)} images"]


def _parquet_rows(path: Path, kind: ImageSource, classes: Sequence[str]) -> Labelled:
    table = read_parquet(path)
    column, label = _columns(f"{path}: unknown layout,", list(table), kind)
    source = [image_cell(f"{path}: row {row}", cell) for row, cell in enumerate(table[column], start=1)]
    return source, class_numbers(str(path), table[label], classes)


def image_cell(where: str, cell: Any) -> EncodedImage:
    """The image in a cell of parquet: a struct of the hub's with the file's bytes, or the bytes themselves."""
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        held = "a path, but no bytes," if isinstance(cell, dict) and cell.get("path") else shown(content)
        raise FedbenchError(f"{where} holds {held} where an encoded image is expected; fill or remove the row")
    return EncodedImage(where, content)


def _image_folders(folder: Path, kind: ImageSource, classes: Sequence[str]) -> Rows | None:
    """train/CLASS/*.png and test/CLASS/*.png, or other formats; a further training part may be missing."""
    if not (folder / "train").is_dir() or not (folder / "test").is_dir():
        return None
    places = [next((folder / name for name in names if (folder / name).is_dir()), None) for names in kind.train]
    used = [place for place in places if place is not None]
    remarks: list[str] = []
    train = _part([_image_folder(place, classes, remarks) for place in used])
    test = _part([_image_folder(folder / "test", classes, remarks)])
    names = ", ".join(place.name for place in used)
    note = f"{folder}: image folders, {len(train)} images ({names}) and {len(test)} (test)"
    return {"train": train, "test": test}, ["; ".join([note, *remarks])]


def _image_folder(folder: Path, classes: Sequence[str], remarks: list[str]) -> Labelled:
    """CLASS/*.png and so on, folders in CLASS included; what is left out is added to `remarks`.

    Classes go by name, or by number from 0 or from 1.
    """
    names = {path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")}
    by_number = {int(name): name for name in names if name.isdecimal()}
    count = len(classes)
    expected = next((span for span in (range(count), range(1, count + 1)) if {*span} == {*by_number}), None)
    called = list(classes) if expected is None else [by_number[number] for number in expected]
    if names != {*called}:
        odd = min(names ^ {*called})
        raise FedbenchError(
            f"{folder}: its {len(names)} folders are not the {count} classes, {odd!r} is missing or too many; name "
            "them as the classes are called, or by number"
        )
    left_out = Counter(kind_of_file(path) for path in folder.iterdir() if path.name not in names)
    source: list[EncodedImage | Path] = []
    labels: list[int] = []
    empty = []
    for number, name in enumerate(called):
        found, others = image_paths(folder / name)
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


def image_paths(folder: Path) -> tuple[list[Path], Counter[str]]:
    """The images in a class's folder and the folders in it, in order, and how many files of what kind are none."""
    found, others = [], Counter[str]()
    for place, folders, files in os.walk(folder):
        for name in files:
            path = Path(place, name)
            if path.suffix.lower() in SUFFIXES and not name.startswith("."):
                found.append(path)
            else:
                others[kind_of_file(path)] += 1
        for name in [name for name in folders if name.startswith(".") or Path(place, name).is_symlink()]:
            folders.remove(name)
            others[kind_of_file(Path(place, name))] += 1
    return sorted(found), others


def kind_of_file(path: Path) -> str:
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
        return image_cell(f"{self._where}: row {int(i) + 1}", cell)


def _from_hub(about: DataSet, kind: ImageSource, revision: str | None) -> Rows:
    from datasets import concatenate_datasets

    if kind.hub is None:
        raise not_at_hand(about.name, kind.folders)
    repository, pinned, configuration = kind.hub
    revision = revision or pinned
    loaded, note = load_from_hub(about.name, repository, configuration, revision, kind.folders)
    parts = {}
    for role, wanted in (("train", kind.train), ("test", (("test",),))):
        splits = [next((split for split in names if split in loaded), None) for names in wanted]
        if None in splits:
            raise FedbenchError(
                f"data set {about.name}: {repository} at revision {revision[:12]} has the splits {', '.join(loaded)}, "
                f"{' and '.join(names[0] for names in wanted)} are needed; leave dataset.revision out"
            )
        where = f"data set {about.name}: {repository} at revision {revision[:12]}"
        rows = concatenate_datasets([loaded[split] for split in splits])
        column, label = _columns(f"{where} has", rows.column_names, kind)
        where = f"{where}: {' and '.join(map(str, splits))}"
        labels = class_numbers(where, rows[label], about.classes)
        parts[role] = Part(labels, images=images_of(_HubImages(where, rows, column)))
    return parts, [note]
