"""CIFAR's python version: pickled batches, read without running code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from fedbench.compat import array_of_pickle
from fedbench.data.formats.archive import archived
from fedbench.data.labels import class_numbers
from fedbench.data.rows import Part
from fedbench.data.sets.dataset import Rows
from fedbench.data.sources import cure, read_bytes
from fedbench.errors import FedbenchError


@dataclass(frozen=True)
class Cifar:
    """CIFAR's python version, unpacked or as the archive: pickled batches of [n, 3072] bytes, channels first."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    label: bytes

    def __call__(self, folder: Path, classes: Sequence[str]) -> Rows | None:
        batches = (*self.train, self.test)
        for place in (folder, folder / self.folder):
            if any((place / name).is_file() for name in batches) and (place / self.train[0]).is_file():
                if lacking := [name for name in batches if not (place / name).is_file()]:
                    raise FedbenchError(f"{place}: {lacking[0]} is missing; unpack {self.archive} again")
                return self._parts(place, classes, {name: read_bytes(place / name) for name in batches})
        if not (path := folder / self.archive).is_file():
            return None
        wanted = archived(path, lambda n: n.removeprefix(f"{self.folder}/") in batches, self.folder)
        return self._parts(path, classes, wanted)

    def _parts(self, place: Path, classes: Sequence[str], contents: Mapping[str, bytes]) -> Rows:
        if lacking := [name for name in (*self.train, self.test) if name not in contents]:
            raise FedbenchError(f"{place}: {lacking[0]} is missing; fetch it again")
        read = {name: self._batch(f"{place}: {name}", content, classes) for name, content in contents.items()}
        train = [read[name] for name in self.train]
        parts = {
            "train": Part(np.concatenate([n for _, n in train]), images=np.concatenate([i for i, _ in train])),
            "test": Part(read[self.test][1], images=read[self.test][0]),
        }
        return parts, [f"{place}: python version, {len(parts['train'])} and {len(parts['test'])} images"]

    def _batch(self, where: str, content: bytes, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
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
        return images, class_numbers(where, labels, classes)


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
