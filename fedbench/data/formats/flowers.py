"""Flowers-102 as its authors publish it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedbench.data.formats.archive import archived
from fedbench.data.image_files import EncodedImage, ImageFiles
from fedbench.data.labels import class_numbers
from fedbench.data.rows import Part
from fedbench.data.sets.dataset import Rows
from fedbench.errors import FedbenchError


def flowers(folder: Path, classes: Sequence[str]) -> Rows | None:
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
    labels = class_numbers(f"{folder / 'imagelabels.mat'}", given, classes, first=1)
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
        contents = archived(archive, lambda name: name.endswith(".jpg"), "jpg")
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
