"""Gradient error as a study: zero where the proxy is the FM, an ordinary run otherwise undisturbed, and its report."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from helpers import save_tiny_bert, smoke_request
from typer.testing import CliRunner

from fedbench.cli.app import app
from fedbench.errors import FedbenchError
from fedbench.methods.fedot import FedOT
from fedbench.methods.fedpft import FedPFT
from fedbench.records.text import plain
from fedbench.run.prepare import prepare
from fedbench.run.run import run
from fedbench.study.report import layers_frame, markdown, points_frame, save, terminal
from fedbench.study.study import Study, matched, mean_block, study


@cache
def folder() -> Path:
    return Path(mkdtemp(prefix="fedbench-study-"))


@cache
def checkpoint() -> Path:
    return save_tiny_bert(folder() / "bert", layers=4)


def request_for(method: str, **settings: str) -> Any:
    return smoke_request(folder(), method, "tweets-noniid", checkpoint(), **{"lr": "1e-2", "t": "1", **settings})


@cache
def studied() -> tuple[Study, Study]:
    """FedPFT and FedOT on one reference; FedPFT's `t` means nothing to FedOT."""
    fedpft = request_for("fedpft")
    fedot = smoke_request(folder(), "fedot", "tweets-noniid", checkpoint(), lr="1e-2", emulator="1")
    first, second = study([prepare(fedpft), prepare(fedot)])
    return first, second


def test_the_reference_has_the_methods_optimiser_and_adapters() -> None:
    method = FedPFT(lr=3e-3, lr_decay="none", clip_norm=0.5, lora_r=3, lora_alpha=5, t=7)
    reference = matched(method)
    assert (reference.lr, reference.lr_decay, reference.clip_norm) == (3e-3, "none", 0.5)
    assert (reference.lora_r, reference.lora_alpha) == (3, 5)
    assert matched(FedOT(lr=3e-3)) != reference


def test_a_proxy_that_is_the_fm_has_no_error_anywhere() -> None:
    whole = prepare(request_for("fedpft", r="24", distil_steps="0", t="0"))
    (found,) = study([whole])
    assert len(found.points) == 3
    assert len(found.updates) == len(found.drift) == 3
    for point in found.points:
        for block in (point, point["common"]):
            assert block["zero_filled"]["error"] == pytest.approx(0, abs=1e-5)
            assert block["restricted"]["cosine"] == pytest.approx(1)
    assert all(0 < block["aggregation"] < 1 for block in found.drift)
    for block in (*found.updates, *found.drift):
        assert block["zero_filled"]["error"] == pytest.approx(0, abs=1e-4)


def test_the_run_that_is_studied_is_an_ordinary_run() -> None:
    """Training and measuring at the reference's values leaves the method's own path as it is."""
    fedot = smoke_request(folder(), "fedot", "tweets-noniid", checkpoint(), lr="1e-2", emulator="1")
    # FedOT's plug-in leaves places of the FM as they were at the start, which a careless study would have changed.
    for request, found in zip((request_for("fedpft"), fedot), studied(), strict=True):
        own = [{name: value for name, value in point.items() if name != "common"} for point in found.points]
        ordinary = run(prepare(request)).gradient_error
        assert ordinary is not None
        assert plain(own) == [point.to_json() for point in ordinary.points]


def test_at_the_start_own_path_and_common_values_are_the_same() -> None:
    for found in studied():
        start = found.points[0]
        assert start["phase"] == "start"
        assert start["common"]["zero_filled"] == start["zero_filled"]


def test_an_alignment_is_measured_before_and_after_at_the_same_common_values() -> None:
    points = [p for p in studied()[0].points if p["round"] == 0]
    assert [p["phase"] for p in points] == ["before_alignment", "after_alignment"]
    before, after = (p["common"]["zero_filled"]["error"] for p in points)
    assert before != after


def test_what_the_proxy_lacks_counts_as_zero() -> None:
    fedot = studied()[1]
    for block in (fedot.points[-1]["common"], fedot.updates[-1], fedot.drift[-1]):
        errors = {entry["layer"]: entry["error"] for entry in block["layers"]}
        assert errors[1] == errors[2] == 1.0, "the emulated layers have no adapters at the clients"
        assert errors[0] != 1.0
        assert block["restricted"]["error"] < block["zero_filled"]["error"] or block["restricted"]["error"] > 1
    assert [entry["layer"] for entry in fedot.residuals] == [2]


def test_a_method_that_trains_the_fm_has_nothing_to_study() -> None:
    request = smoke_request(folder(), "fedavg-lora", "tweets-noniid", checkpoint())
    with pytest.raises(FedbenchError, match="fedavg-lora: its clients train the FM itself"):
        study([prepare(request)])


def test_the_mean_of_blocks_is_number_by_number() -> None:
    blocks = [
        {"restricted": {"error": 1.0, "cosine": None}, "layers": [{"layer": 2, "error": 1.0}]},
        {"restricted": {"error": 2.0, "cosine": 0.5}, "layers": [{"layer": 2, "error": None}]},
    ]
    assert mean_block(blocks) == {
        "restricted": {"error": 1.5, "cosine": 0.5},
        "layers": [{"layer": 2, "error": 1.0}],
    }
    assert mean_block([None, None]) is None


def test_tables_hold_every_point_and_layer() -> None:
    fedpft, fedot = studied()
    points = points_frame(fedpft)
    assert points["round"].tolist() == [0, 1, 1, 2, 2, 3]
    assert points["drift"].notna().tolist() == [False, False, True, False, True, True]
    assert points["own path"].tolist()[0] == fedpft.points[0]["zero_filled"]["error"]
    layers = layers_frame(fedot)
    assert layers["layer"].tolist() == [0, 1, 2, 3]
    assert layers["hidden"].notna().tolist() == [False, False, True, False]
    text = markdown([fedpft, fedot])
    assert text.count("| fedpft") == len(points) + 4
    assert "tweets-noniid" in text
    assert "nan" not in text
    assert terminal([fedpft, fedot]) is not None


def test_files_of_a_study(tmp_path: Path) -> None:
    path = save(studied(), tmp_path)
    assert path == tmp_path / "studies" / "tweets-noniid" / "fedpft-fedot-s0.md"
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    (stored,) = path.parent.glob("fedot-s0-*.json")
    assert json.loads(stored.read_text()) == json.loads(json.dumps(plain(studied()[1].to_json())))


def test_the_command(tmp_path: Path) -> None:
    arguments = ["gradient", "--method", "fedpft", "--scenario", "tweets-noniid", "--fm", str(checkpoint())]
    places = ["--results", str(tmp_path), "--cache", str(folder() / "cache"), "--profile", "smoke", "--workers", "1"]
    done = CliRunner().invoke(app, [*arguments, *places, "--set", "methods.fedpft.t=0"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "studies" / "tweets-noniid" / "fedpft-s0.md").exists()
    assert "By layer of the FM" in done.output
