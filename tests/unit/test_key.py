"""A run's key: everything that decides the result changes it, and nothing else does. The same for what is cached."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import WORDS, context, public_rows, save_tiny, save_tiny_bert

from fedbench.data.examples import Examples
from fedbench.data.sets import embedded
from fedbench.methods.fedavg_lora import FedAvgLora
from fedbench.methods.fedot import FedOT
from fedbench.methods.fedpft import FedPFT
from fedbench.models.foundation import FoundationModel
from fedbench.models.reading import CHUNK, inputs_hash
from fedbench.models.zoo.load import load_fm
from fedbench.run import prepare as engine
from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest


@dataclasses.dataclass
class Asked:
    """A run as a user asks for it, and the folders it reads: `fm` the checkpoint, `data` the data sets."""

    folder: Path
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    request: dict[str, Any] = dataclasses.field(default_factory=dict)
    scenario: str = "sst2-noniid"

    @property
    def fm(self) -> Path:
        return self.folder / "fm"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def edit(self, file: str, change: Callable[[str], str]) -> None:
        path = self.folder / file
        before = path.read_text()
        path.write_text(change(before))
        assert path.read_text() != before

    def key(self) -> str:
        engine._load.cache_clear()  # it is by path: a process takes a folder for what it was when first read
        fields = {"method": "fedavg-lora", "fm": str(self.fm), "data_dir": self.data, "profile": "smoke"}
        fields |= {"results": self.folder / "runs", "cache": self.folder / "cache", "device": "cpu", "workers": 1}
        return prepare(
            RunRequest(**(fields | {"scenario": self.scenario, "settings": self.settings} | self.request))
        ).key


def rows(count: int, start: int = 0) -> str:
    lines = [f"the film is {('good', 'bad')[i % 2]} {WORDS[(start + i) % 20]}\t{i % 2}" for i in range(count)]
    return "sentence\tlabel\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    save_tiny_bert(folder / "fm")
    (folder / "fm" / "tokenizer.json").unlink()  # so that vocab.txt is the vocabulary
    (folder / "data" / "sst2").mkdir(parents=True)
    (folder / "data" / "sst2" / "train.tsv").write_text(rows(500))
    (folder / "data" / "sst2" / "dev.tsv").write_text(rows(80, 3))
    return folder


@pytest.fixture(scope="module")
def key(made: Path) -> str:
    return Asked(made).key()


@pytest.fixture
def asked(made: Path, tmp_path: Path) -> Asked:
    shutil.copytree(made / "fm", tmp_path / "fm")
    shutil.copytree(made / "data", tmp_path / "data")
    return Asked(tmp_path)


def flip(folder: Path, tensor: str) -> None:
    """Flip the lowest bit of the first number of a tensor, in the file."""
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start = json.loads(content[8 : 8 + length])[tensor]["data_offsets"][0]
    content[8 + length + start] ^= 1
    path.write_bytes(content)


def swap(text: str) -> str:
    return text.replace("\ngood\n", "\n#\n").replace("\nbad\n", "\ngood\n").replace("\n#\n", "\nbad\n")


def turn(text: str) -> str:
    first, *rest = text.splitlines(keepends=True)
    return "".join([first, *rest[1:], rest[0]])


CHANGES: dict[str, Callable[[Asked], Any]] = {
    "one bit of a weight": lambda a: flip(a.fm, "bert.encoder.layer.1.attention.self.query.weight"),
    "one bit of an embedding": lambda a: flip(a.fm, "bert.embeddings.position_embeddings.weight"),
    "configuration of the FM": lambda a: a.edit("fm/config.json", lambda t: t.replace('"gelu"', '"relu"')),
    "vocabulary": lambda a: a.edit("fm/vocab.txt", swap),
    "settings of the tokenizer": lambda a: a.edit(
        "fm/tokenizer_config.json", lambda t: json.dumps(json.loads(t) | {"truncation_side": "left"})
    ),
    "a training row": lambda a: a.edit("data/sst2/train.tsv", lambda t: t.replace("good", "great", 1)),
    "how a row is spelt": lambda a: a.edit("data/sst2/train.tsv", lambda t: t.replace("good", "Good", 1)),
    "order of the rows": lambda a: a.edit("data/sst2/train.tsv", turn),
    "a label": lambda a: a.edit("data/sst2/train.tsv", lambda t: t.replace("\t0", "\t1", 1)),
    "a test row": lambda a: a.edit("data/sst2/dev.tsv", lambda t: t.replace("good", "fine", 1)),
    "a test label": lambda a: a.edit("data/sst2/dev.tsv", lambda t: t.replace("\t0", "\t1", 1)),
    "rows of public data": lambda a: a.settings.update({"public.rows": "50"}),
    "whether public data is in-domain": lambda a: a.settings.update({"public.in_domain": "true"}),
    "rows held out": lambda a: a.settings.update({"dataset.validation": "50"}),
    "token limit": lambda a: a.settings.update({"dataset.max_length": "7"}),
    "token limit that cuts nothing": lambda a: a.settings.update({"dataset.max_length": "40"}),
    "a hyper-parameter": lambda a: a.settings.update({"lr": "0.0123"}),
    "split": lambda a: a.settings.update({"split.alpha": "0.3"}),
    "another split": lambda a: setattr(a, "scenario", "sst2-iid"),
    "federation": lambda a: a.settings.update({"federation.batch_size": "3"}),
    "rounds": lambda a: a.settings.update({"rounds": "1"}),
    "evaluation": lambda a: a.settings.update({"evaluation.every": "7"}),
    "precision": lambda a: a.request.update({"precision": "bf16"}),
    "seed": lambda a: a.request.update({"seed": 1}),
    "method": lambda a: a.request.update({"method": "head-only"}),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_a_result_is_in_its_key(change: str, asked: Asked, key: str) -> None:
    CHANGES[change](asked)
    assert asked.key() != key


def test_the_methods_version_is_in_its_key(asked: Asked, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FedAvgLora, "version", 99)
    assert asked.key() != key


SAME: dict[str, Callable[[Asked], Any]] = {
    "nothing": lambda a: None,
    "another name of the FM's folder": lambda a: a.request.update({"fm": str(a.fm.rename(a.folder / "renamed"))}),
    "a slash behind the FM's folder": lambda a: a.request.update({"fm": f"{a.fm}/"}),
    "a link to the FM's folder": lambda a: (
        (a.folder / "link").symlink_to(a.fm), a.request.update({"fm": str(a.folder / "link")})
    ),
    "another place of the data": lambda a: a.request.update({"data_dir": a.data.rename(a.folder / "elsewhere")}),
    "results": lambda a: a.request.update({"results": a.folder / "others"}),
    "cache": lambda a: a.request.update({"cache": a.folder / "another"}),
    "workers": lambda a: a.request.update({"workers": 2}),
    "executor": lambda a: a.request.update({"executor": "reference"}),
    "precision as it is anyway": lambda a: a.request.update({"precision": "fp32"}),
    "the checkpoint's own labels": lambda a: a.edit(
        "fm/config.json", lambda t: json.dumps(json.loads(t) | {"id2label": {"0": "x", "1": "y"}})
    ),
    "a setting that is no part of the model": lambda a: a.edit(
        "fm/config.json", lambda t: json.dumps(json.loads(t) | {"return_dict": False, "transformers_version": "4.0"})
    ),
    "the format of the vocabulary": lambda a: (save_tiny_bert(a.folder / "again") / "tokenizer.json").rename(
        a.fm / "tokenizer.json"
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", SAME)
def test_what_decides_nothing_is_not_in_the_key(change: str, asked: Asked, key: str) -> None:
    SAME[change](asked)
    assert asked.key() == key


def test_where_a_plugin_lies_is_not_in_the_key(asked: Asked) -> None:
    text = (
        "from fedbench.methods.fedavg_lora import FedAvgLora\n\n\n"
        "class Mine(FedAvgLora):\n    '''FedAvg by another name.'''\n\n    name = 'mine'\n    version = 1\n"
    )
    keys = set()
    for place in ("here", "there"):
        path = asked.folder / place / "mine.py"
        path.parent.mkdir()
        path.write_text(text)
        asked.request |= {"method": "mine", "plugins": (str(path),)}
        keys.add(asked.key())
    assert len(keys) == 1


def test_a_relative_path_gives_the_same_key(asked: Asked, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(asked.fm)
    asked.request |= {"fm": "."}
    assert asked.key() == key


def test_the_image_processor_and_every_pixel_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("vit", tmp_path / "fm")
    asked = Asked(tmp_path, scenario="digits-noniid", request={"data_dir": None})
    keys = [asked.key()]
    processor = tmp_path / "fm" / "preprocessor_config.json"
    settings = json.loads(processor.read_text())
    for change in ({"image_mean": [0.5, 0.5, 0.4]}, {"image_std": [0.5, 0.5, 0.4]}, {"resample": 3}):
        processor.write_text(json.dumps(settings | change))
        keys.append(asked.key())
    processor.write_text(json.dumps(settings))
    assert asked.key() == keys[0]
    parts, notes = embedded.DIGITS.read(None, None)
    images = parts["train"].images
    assert isinstance(images, np.ndarray)
    images = images.copy()
    images[:, 3, 3] = 1 - images[:, 3, 3]
    changed = {**parts, "train": dataclasses.replace(parts["train"], images=images)}
    other = dataclasses.replace(embedded.DIGITS, source=lambda *_: (changed, notes))
    monkeypatch.setattr(embedded, "DIGITS", other)
    keys.append(asked.key())
    assert len(set(keys)) == len(keys)


def test_what_stands_for_the_inputs_tells_roles_tokens_types_labels_and_padding_apart(tmp_path: Path) -> None:
    fm = load_fm(str(save_tiny_bert(tmp_path / "fm")), 3, tmp_path)
    some, others = public_rows(4), public_rows(5)
    assert some.tokens is not None
    types = [np.zeros(len(row), dtype=np.int8) for row in some.tokens]
    pad = CHUNK  # any number above 255, which once counted modulo 256
    every = [
        {"train": some},
        {"test": some},
        {"train": some, "test": others},
        {"train": others, "test": some},
        {"train": dataclasses.replace(some, segments=types)},
        {"train": dataclasses.replace(some, labels=(some.labels + 1) % 3)},
        {"train": dataclasses.replace(some, pad_token=pad)},
    ]
    assert len({inputs_hash(parts, fm) for parts in every}) == len(every)
    assert inputs_hash(every[2], fm) == inputs_hash(dict(reversed(every[2].items())), fm)


# ---------------------------------------------------------------- the cache of distilled proxies


Distil = Callable[..., int]


@pytest.fixture(params=["fedpft", "fedot"])
def distil(request: pytest.FixtureRequest, tmp_path: Path) -> Distil:
    """Distils a proxy of an FM and says how many distilled proxies the cache then holds."""

    def call(fm: FoundationModel, public: Examples, **changes: Any) -> int:
        settings: dict[str, Any] = {"distil_steps": 2, "distil_batch": 4, "lora_r": 2} | changes
        if request.param == "fedpft":
            FedPFT(r=6, t=1, **settings).server(fm, public, context(tmp_path))
        else:
            FedOT(emulator=1, **settings).server(fm, public, context(tmp_path))
        return len(list((tmp_path / "proxies").glob("*.safetensors")))

    return call


@pytest.fixture(scope="module")
def fms(tmp_path_factory: pytest.TempPathFactory) -> tuple[FoundationModel, FoundationModel]:
    """Two FMs that differ in one bit."""
    folder = save_tiny_bert(tmp_path_factory.mktemp("fms") / "fm")
    first = load_fm(str(folder), 3, folder)
    flip(folder, "bert.encoder.layer.1.output.dense.weight")
    return first, load_fm(str(folder), 3, folder)


def test_a_distilled_proxy_is_taken_from_the_cache(distil: Distil, fms: tuple[FoundationModel, ...]) -> None:
    assert distil(fms[0], public_rows(16)) == 1
    assert distil(fms[0], public_rows(16)) == 1


def test_a_distilled_proxy_is_of_its_public_rows(distil: Distil, fms: tuple[FoundationModel, ...]) -> None:
    rows = public_rows(16)
    assert rows.tokens is not None
    distil(fms[0], rows)
    assert distil(fms[0], public_rows(15)) == 2
    tokens = [row.copy() for row in rows.tokens]
    tokens[-1][1] += 1
    assert distil(fms[0], dataclasses.replace(rows, tokens=tokens)) == 3


def test_a_distilled_proxy_is_of_its_schedule(distil: Distil, fms: tuple[FoundationModel, ...]) -> None:
    changes: list[dict[str, Any]] = [{}, {"distil_steps": 3}, {"distil_batch": 8}, {"distil_lr": 1e-5}]
    assert [distil(fms[0], public_rows(16), **change) for change in changes] == [1, 2, 3, 4]


def test_a_distilled_proxy_is_of_its_fm(distil: Distil, fms: tuple[FoundationModel, ...]) -> None:
    assert [distil(fm, public_rows(16)) for fm in fms] == [1, 2]
