"""Differential privacy over methods of sums: clipping and noise by hand, what is refused, and what a record says."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import save_tiny_bert, smoke_request

from fedbench.api.messages import Message
from fedbench.errors import FedbenchError
from fedbench.methods.fedavg_lora import FedAvgLora
from fedbench.methods.fedex_lora import FedExLora
from fedbench.rng import Streams
from fedbench.run import privacy
from fedbench.run.prepare import prepare
from fedbench.run.privacy import check_private, clipped, noised, spent
from fedbench.run.run import run
from fedbench.scenario.tables import PrivacySettings

SETTINGS = PrivacySettings(clip=1.0, noise=2.0, delta=1e-3)


def upload(*values: float, rows: int = 7) -> list[Message]:
    return [Message("adapter", {"a": torch.tensor(values[:1]), "b": torch.tensor(values[1:])}, {"num_examples": rows})]


def test_an_update_is_clipped_over_all_tensors_from_where_training_started() -> None:
    start = {"a": torch.tensor([10.0]), "b": torch.tensor([20.0, 0.0])}
    [far] = clipped("m", upload(13.0, 24.0, 0.0), start, SETTINGS)  # moved by 3, 4, 0
    assert far.tensors["a"].tolist() == pytest.approx([10.6])
    assert far.tensors["b"].tolist() == pytest.approx([20.8, 0.0])
    [near] = clipped("m", upload(10.3, 20.4, 0.0), start, SETTINGS)
    assert near.tensors["a"].tolist() == pytest.approx([10.3])
    assert far.meta["num_examples"] == near.meta["num_examples"] == 1, "how many rows a client has is not told"
    [whole] = clipped("m", upload(3.0, 4.0, 0.0), {}, SETTINGS)
    assert whole.tensors["b"].tolist() == pytest.approx([0.8, 0.0]), "what was not sent before counts whole"


def test_the_server_sees_one_mean_with_noise_for_its_number_of_clients() -> None:
    uploads = {3: upload(1.0, 2.0, rows=1), 5: upload(3.0, 6.0, rows=1)}
    quiet = SETTINGS.model_copy(update={"noise": 0.0})
    found = noised(uploads, Streams(0, "unit"), 0, quiet)
    assert list(found) == [3]
    [mean] = found[3]
    assert [t.tolist() for t in mean.tensors.values()] == [[2.0], [4.0]]
    assert mean.meta["num_examples"] == 2

    wide = {c: [Message("adapter", {"w": torch.zeros(40_000)}, {"num_examples": 1})] for c in range(4)}
    [noisy] = noised(wide, Streams(0, "unit"), 0, SETTINGS)[0]
    [again] = noised(wide, Streams(0, "unit"), 0, SETTINGS)[0]
    [later] = noised(wide, Streams(0, "unit"), 1, SETTINGS)[0]
    assert float(noisy.tensors["w"].std()) == pytest.approx(2.0 * 1.0 / 4, rel=0.02)
    assert torch.equal(noisy.tensors["w"], again.tensors["w"])
    assert not torch.equal(noisy.tensors["w"], later.tensors["w"])


def test_what_cannot_be_private_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "spent", lambda *_, **__: {})
    check_private(FedAvgLora(), SETTINGS)
    with pytest.raises(FedbenchError, match="fedex-lora: its server needs each client's upload"):
        check_private(FedExLora(), SETTINGS)
    with pytest.raises(FedbenchError, match="scaffold: clients also send control, which is neither clipped nor noised"):
        clipped("scaffold", [*upload(1.0), Message("control", {})], {}, SETTINGS)


def test_without_the_accountant_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(FedbenchError, match=r"needs the package dp-accounting: pip install 'fedbench\[privacy\]'"):
        spent(SETTINGS, 10, 2, 5)


def test_epsilon_lies_between_what_is_exact_and_the_classical_bound() -> None:
    """Without sampling: n Gaussian mechanisms whose noise is noise / 2 sensitivities."""
    pytest.importorskip("dp_accounting")
    settings, rounds = PrivacySettings(clip=3.0, noise=20.0, delta=1e-3), 10
    found = spent(settings, clients=50, cohort=50, rounds=rounds)["epsilon"]
    mu = math.sqrt(rounds) / (20.0 / 2)

    def delta(epsilon: float) -> float:  # of a mu-Gaussian mechanism (Dong, Roth & Su 2022)
        below = [0.5 * math.erfc(-(mu / 2 * sign - epsilon / mu) / math.sqrt(2)) for sign in (1, -1)]
        return below[0] - math.exp(epsilon) * below[1]

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > 1e-3 else (low, middle)
    classical = min(a * mu**2 / 2 + math.log(1e3) / (a - 1) for a in (1 + i / 10 for i in range(1, 1000)))
    assert low <= found <= classical
    assert found == pytest.approx(low, rel=0.25)


def test_epsilon_falls_with_noise_and_grows_with_rounds_and_cohort() -> None:
    pytest.importorskip("dp_accounting")

    def epsilon(noise: float = 4.0, cohort: int = 5, rounds: int = 10) -> float:
        return float(spent(PrivacySettings(clip=1.0, noise=noise, delta=1e-3), 50, cohort, rounds)["epsilon"])

    assert epsilon(noise=8.0) < epsilon() < epsilon(rounds=20)
    assert epsilon() < epsilon(cohort=10)
    assert spent(PrivacySettings(clip=1.0, noise=0.0), 50, 5, 10)["epsilon"] is None


def test_a_private_run_says_what_it_gives_and_has_a_key_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = {
        "unit": "client", "neighbours": "one client replaced", "clip": 0.1, "noise": 1.0, "sampling": "fixed size",
        "clients": 4, "cohort": 2, "rounds": 3, "delta": 1e-3, "epsilon": 9.5, "accountant": "by hand",
    }  # fmt: skip
    for module in ("fedbench.run.privacy", "fedbench.run.record"):
        monkeypatch.setattr(f"{module}.spent", lambda *_, **__: block)
    fm = save_tiny_bert(tmp_path / "bert")
    plain = smoke_request(tmp_path, "ffa-lora", "tweets-noniid", fm)
    settings = {"privacy.clip": "0.1", "privacy.noise": "1.0", "privacy.delta": "1e-3"}
    private = prepare(replace(plain, settings=settings))
    assert private.key != prepare(plain).key
    assert "privacy" not in prepare(plain).identity["scenario"]
    record = run(private)
    assert record.privacy is not None
    assert record.privacy.to_json() == block
    assert record.scenario.to_json()["privacy"] == {"clip": 0.1, "noise": 1.0, "delta": 1e-3}
    assert run(prepare(plain)).privacy is None
    with pytest.raises(FedbenchError, match="clients also send control"):
        run(prepare(replace(plain, method="scaffold", settings=settings)))
