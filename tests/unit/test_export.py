"""What a run exports gives the record's results in plain transformers and peft, which know nothing of fedbench."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import save_tiny, save_tiny_bert, smoke_request
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from fedbench.cli import app as cli
from fedbench.data.examples import Examples
from fedbench.errors import FedbenchError
from fedbench.files import save_tensors
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import set_tensors
from fedbench.records.record import Record
from fedbench.records.store import path_of
from fedbench.records.text import unpack_correct
from fedbench.run.export import adapter_path, export_adapter
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.run import run


@dataclass(frozen=True)
class Done:
    """A finished run: its record, where that lies, and what it was made from."""

    record: Record
    path: Path
    prepared: Prepared
    checkpoint: Path


def train(family: str, folder: Path, method: str = "fedpft", **settings: str) -> Done:
    """A tiny run on a random checkpoint of the family, trained hard enough that the adapter matters."""
    checkpoint = save_tiny(family, folder / "fm")
    scenario = "digits-noniid" if family == "vit" else "tweets-noniid"
    prepared = prepare(smoke_request(folder, method, scenario, checkpoint, **{"lr": "2e-2", **settings}))
    record = run(prepared)
    return Done(record, path_of(record, folder / "runs" / "records"), prepared, checkpoint)


def logits(model: torch.nn.Module, rows: Examples) -> torch.Tensor:
    with torch.no_grad():
        chunks = np.array_split(np.arange(len(rows)), 4)
        return torch.cat([model(**rows.batch(chunk).inputs).logits for chunk in chunks])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "vit", "modernbert", "gpt2", "llama"])
def test_plain_transformers_and_peft_give_the_runs_logits_and_accuracy(family: str, tmp_path: Path) -> None:
    import transformers
    from peft import PeftModel

    done = train(family, tmp_path)
    made = export_adapter(done.path, tmp_path / "adapter", tmp_path / "cache", str(done.checkpoint))
    assert made.base == str(done.checkpoint.resolve())
    auto = getattr(transformers, made.architecture)
    given = {} if made.pad_token is None else {"pad_token_id": made.pad_token}
    base = auto.from_pretrained(made.base, num_labels=made.num_labels, ignore_mismatched_sizes=True, **given)
    rows = done.prepared.loaded.test
    untuned = logits(base.eval(), rows)
    found = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), rows)

    fm, kept = done.prepared.loaded.fm, load_file(adapter_path(tmp_path / "runs", done.record.key))
    tuned = fm.build(LoraSpec(8, 48), torch.device("cpu"))
    set_tensors(tuned, kept)
    assert torch.allclose(found, logits(tuned, rows), atol=1e-5)
    assert not torch.allclose(found, untuned, atol=1e-2)
    scores = done.record.accuracy.plug_in
    assert np.array_equal((found.argmax(-1) == rows.labels).numpy(), unpack_correct(scores.correct, scores.rows))
    assert F.cross_entropy(found, rows.labels).item() == pytest.approx(scores.loss, rel=1e-4)

    # Both parts are needed: LoRA is not zero, and the head is the run's.
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in saved.items() if ".lora_B." in name)
    heads = {name.removeprefix("base_model.model.").partition(".")[0] for name in saved if ".lora_" not in name}
    assert heads == set(fm.family.head)


def test_an_fm_without_a_checkpoint_is_exported_with_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    done = train("vit", tmp_path)
    # As if it was the FM that has no checkpoint but what fedbench pre-trained.
    done.path.write_text(done.path.read_text().replace('"fm": "fm"', '"fm": "vit-digits"'))
    fm = done.prepared.loaded.fm
    monkeypatch.setattr("fedbench.run.export.load_fm", lambda *_: replace(fm, content_hash="another"))
    with pytest.raises(FedbenchError, match="is another than that of this run"):
        export_adapter(done.path, tmp_path / "adapter", tmp_path / "cache")
    monkeypatch.setattr("fedbench.run.export.load_fm", lambda *_: fm)
    made = export_adapter(done.path, tmp_path / "adapter", tmp_path / "cache")
    base = AutoModelForImageClassification.from_pretrained(made.base)
    rows = done.prepared.loaded.test
    found = logits(PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), rows)
    assert F.cross_entropy(found, rows.labels).item() == pytest.approx(done.record.accuracy.plug_in.loss, rel=1e-4)


def test_the_command_line_prints_code_that_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done = train("bert", tmp_path, "fedot", emulator="1")
    asked = ["fedbench", "export", str(done.path), str(tmp_path / "out"), "--fm", str(done.checkpoint)]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    _, code = capsys.readouterr().out.split("\n\n", 1)
    scope: dict[str, torch.nn.Module] = {}
    exec(code, scope)
    rows = done.prepared.loaded.test
    share = (logits(scope["model"].eval(), rows).argmax(-1) == rows.labels).double().mean().item()
    assert share == pytest.approx(done.record.accuracy.plug_in.accuracy)


def test_an_fm_given_as_a_folder_is_asked_for_and_checked(tmp_path: Path) -> None:
    done = train("bert", tmp_path, "fedavg-lora")
    out, cache = tmp_path / "adapter", tmp_path / "cache"
    assert str(tmp_path) not in done.path.read_text(), "a record holds no folder names"
    for fm, says in (
        (None, "the FM fm was given as a folder, .*; give --fm PATH"),
        (str(tmp_path / "none"), "no such folder; give the folder of the checkpoint of fm"),
        (str(save_tiny_bert(tmp_path / "other", seed=1)), "not the checkpoint of this run, by its hash"),
    ):
        with pytest.raises(FedbenchError, match=says):
            export_adapter(done.path, out, cache, fm)
    assert not out.exists()
    moved = done.checkpoint.rename(tmp_path / "moved")
    assert export_adapter(done.path, out, cache, str(moved)).base == str(moved.resolve())


def test_a_checkpoint_with_a_trained_head_is_known_again(tmp_path: Path) -> None:
    checkpoint = save_tiny("bert", tmp_path / "fm")
    config = json.loads((checkpoint / "config.json").read_text())
    names = ["Negative", "Neutral", "Positive"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (checkpoint / "config.json").write_text(json.dumps(config | labels))
    weights = load_file(checkpoint / "model.safetensors")
    weights |= {"classifier.weight": torch.ones(3, 16), "classifier.bias": torch.zeros(3)}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    prepared = prepare(smoke_request(tmp_path, "fedavg-lora", "tweets-noniid", checkpoint, rounds="1"))
    assert prepared.loaded.fm.trained_head is not None
    record = run(prepared)
    made = export_adapter(path_of(record, tmp_path / "runs" / "records"), tmp_path / "out", tmp_path, str(checkpoint))
    assert made.base == str(checkpoint.resolve())


def test_what_cannot_be_exported_says_why(tmp_path: Path) -> None:
    done = train("bert", tmp_path, "head-only")
    with pytest.raises(FedbenchError, match="head-only tunes no LoRA"):
        export_adapter(done.path, tmp_path / "out", tmp_path)
    kept = adapter_path(tmp_path / "runs", done.record.key)
    save_tensors(kept, {"x": torch.zeros(1)}, {"fedbench": json.dumps({"key": "another"})})
    with pytest.raises(FedbenchError, match="belongs to another run"):
        export_adapter(done.path, tmp_path / "out", tmp_path)
    kept.unlink()
    with pytest.raises(FedbenchError, match="make the run again"):
        export_adapter(done.path, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "why"), [("flora", "changes 12 of the FM's own weights"), ("adapter", "no LoRA")])
def test_what_an_adapter_of_lora_cannot_hold_is_refused(method: str, why: str, tmp_path: Path) -> None:
    done = train("bert", tmp_path, method)
    with pytest.raises(FedbenchError, match=f"{method} .*{why}"):
        export_adapter(done.path, tmp_path / "adapter", tmp_path / "cache", str(done.checkpoint))
