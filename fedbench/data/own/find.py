"""Which files a scenario means, and the tables in them."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fedbench.data.formats.images import image_paths, kind_of_file
from fedbench.data.own.table import Table, rows_from_1
from fedbench.data.own.tables import of_dataset, read_table, saved_splits
from fedbench.data.sources import listing, load_from_hub, set_folders
from fedbench.errors import FedbenchError
from fedbench.scenario.tables import DatasetSettings, Texts, listed

SAVED = ("dataset_info.json", "dataset_dict.json", "state.json")
"""What tells a folder of `datasets.save_to_disk` from others."""


def tables_of(role: str, settings: DatasetSettings, folder: Path) -> Iterator[Table]:
    """The tables of a role ("train", "test", "validation"), file by file in the order of their names.

    Raises FedbenchError where there are none, or where one cannot be read.
    """
    wanted: Texts | int = getattr(settings, role)
    if isinstance(wanted, int) or not wanted:
        return
    if settings.hub is not None:
        yield from _from_hub(settings, listed(wanted))
        return
    for path in files_of(f"dataset.{role}", wanted, folder):
        shown = _short(path)
        if shown.is_dir() and not is_saved(shown):
            if settings.kind != "images":
                raise FedbenchError(
                    f"dataset.{role}: {shown} is a folder; name its files, such as {shown.name}/*.csv; {listing(shown)}"
                )
            yield image_folder(shown)
        else:
            yield read_table(shown, settings.header, settings.encoding)


def located(settings: DatasetSettings, folder: Path, root: Path | None) -> tuple[DatasetSettings, Path]:
    """The settings of a data set that has a folder below `root`, or is on the hub, and where its files are named from.

    Raises FedbenchError, which says what is expected where, for one that is neither.
    """
    found = next(set_folders(root, settings.folders), None) if root is not None else None
    if found is not None:
        return settings.model_copy(update={"hub": None, "revision": None, "configuration": None}), found.absolute()
    if settings.hub is None:
        raise FedbenchError(f"data set {settings.name}: not found; {expected(settings)}")
    splits = {"train": "train", "test": "test" if settings.test else ()}
    return settings.model_copy(update=splits), folder


def expected(settings: DatasetSettings) -> str:
    """What folder and files a data set is expected in, and where they are to be had."""
    files = ", ".join((*listed(settings.train), *listed(settings.test)))
    origin = f" (from {settings.origin})" if settings.origin else ""
    names = " or ".join(settings.folders[:2])
    return f"give --data-dir DIR (or FEDBENCH_DATA) with DIR/{names} holding {files}{origin}"


def files_of(setting: str, wanted: Texts, folder: Path) -> list[Path]:
    """The files that the patterns of a setting mean, from `folder` on, each once, sorted.

    Raises FedbenchError for a pattern that means none.
    """
    found: list[Path] = []
    for pattern in listed(wanted):
        whole = folder / Path(pattern).expanduser()
        hits = [whole] if whole.exists() else [Path(hit) for hit in sorted(_glob(folder, pattern))]
        if not hits:
            place = whole.parent
            seen = listing(place) if place.is_dir() else f"there is no folder {_short(place)}"
            raise FedbenchError(f"{setting}: no file {pattern!r} beside the scenario's file in {folder}; {seen}")
        found += hits
    return list(dict.fromkeys(found))


def _glob(folder: Path, pattern: str) -> list[str]:
    expanded = str(Path(pattern).expanduser())
    whole = expanded if os.path.isabs(expanded) else os.path.join(glob.escape(str(folder)), expanded)
    return glob.glob(whole, recursive=True)


def _short(path: Path) -> Path:
    """A path as messages and notes show it: from the working folder on, where it lies there."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `datasets.save_to_disk`."""
    return any((folder / name).is_file() for name in SAVED)


def image_folder(folder: Path) -> Table:
    """CLASS/*.png and so on, folders in CLASS included: columns image, label, and folder, the place within CLASS."""
    places = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    left_out = Counter(kind_of_file(path) for path in folder.iterdir() if path not in places)
    columns: dict[str, list[object]] = {"image": [], "label": [], "folder": []}
    for place in places:
        found, others = image_paths(place)
        left_out += others
        columns["image"] += found
        columns["label"] += [place.name] * len(found)
        columns["folder"] += [path.parent.relative_to(place).as_posix() for path in found]
    if not columns["image"]:
        raise FedbenchError(f"{folder}: holds no folders of classes with images in them; {listing(folder)}")
    left = ", ".join(f"{count} {what}" for what, count in sorted(left_out.items()))
    about = f"folders of {len(places)} classes{f'; left out: {left}' if left else ''}"
    return Table(str(folder), columns, rows_from_1(len(columns["image"])), about)


def _from_hub(settings: DatasetSettings, splits: tuple[str, ...]) -> Iterator[Table]:
    repository = settings.hub or ""
    revision = settings.revision or "main"
    try:
        loaded, note = load_from_hub(settings.name, repository, settings.configuration, revision, (settings.name,))
    except FedbenchError as error:
        why = str(error).partition("(")[2].partition(")")[0]
        raise FedbenchError(
            f"dataset.hub {repository}: cannot be had ({why}); connect to the hub, fill its cache, or "
            + (expected(settings) if settings.folders else "download the files and name them in train")
        ) from None
    for split in splits:
        if split not in loaded:
            raise FedbenchError(
                f"data set {settings.name}: {repository} has the splits {', '.join(loaded)}, not {split}"
            )
        yield of_dataset(f"{repository}/{split}", loaded[split], note.partition(": ")[2])


__all__ = ["files_of", "image_folder", "is_saved", "saved_splits", "tables_of"]
