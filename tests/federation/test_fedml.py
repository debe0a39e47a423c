"""Whole small runs over FedML, in an environment that has it: `tox -e fedml`."""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import clients_of, save_tiny_bert, server_of, smoke_request
from safetensors.torch import load_file

from fedbench.api.context import ClientContext
from fedbench.errors import FedbenchError
from fedbench.records.differences import comparable, differences
from fedbench.run.export import adapter_path
from fedbench.run.hosts.addresses import loopback, write_addresses
from fedbench.run.hosts.fedml import FedML
from fedbench.run.hosts.silo import silo_of
from fedbench.run.loop import Run
from fedbench.run.prepare import Prepared, prepare
from fedbench.run.progress import Silent
from fedbench.run.run import run

pytestmark = pytest.mark.fedml
ALIGNED = {"t": "1", "r": "6", "distil_steps": "2", "align_steps": "2"}


def prepared(folder: Path, method: str, host: str = "here", timeout: float = 120, **settings: str) -> Prepared:
    bert = save_tiny_bert(folder / "bert")
    chosen = {"lr": "1e-2", "rounds": "3", "evaluation.every": "2", "federation.fraction": "0.5", **settings}
    request = smoke_request(folder, method, "tweets-noniid", bert, **chosen)
    silos = {"silos": 2, "silo_timeout": timeout} if host == "fedml" else {}
    return prepare(replace(request, host=host, results=folder / host, **silos))


def tuned(p: Prepared) -> dict[str, torch.Tensor]:
    return load_file(adapter_path(p.request.results, p.key))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("fedpft", {**ALIGNED, "federation.dropout": "0.3"}),
        ("fedot", {"distil_steps": "2"}),
        ("fedavg-lora", {"federation.max_update_norm": "0.05"}),
    ],
)
def test_the_record_over_fedml_is_the_one_of_one_process(tmp_path: Path, method: str, settings: dict[str, str]) -> None:
    here, over = prepared(tmp_path, method, **settings), prepared(tmp_path, method, "fedml", **settings)
    a, b = run(here), run(over)
    assert comparable(a) == comparable(b), differences(a, b)
    for name, value in tuned(here).items():
        torch.testing.assert_close(tuned(over)[name], value, rtol=1e-5, atol=1e-5)
    runtime = b.provenance.runtime
    assert (b.provenance.host, runtime["silos"], runtime["lost"]) == ("fedml", 2, [])
    for way in ("down", "up"):
        assert runtime[way]["bytes"] > runtime[way]["payload_bytes"] > 0
    assert runtime["up"]["payload_bytes"] == b.communication.up.bytes
    assert not list((tmp_path / "fedml" / "checkpoints").glob("*"))


def test_a_killed_silo_is_left_out_and_joins_again(tmp_path: Path) -> None:
    everybody = {"federation.fraction": "1.0", "rounds": "4"}
    asked = prepared(tmp_path, "fedpft", "fedml", timeout=15, **everybody, **ALIGNED)
    this = Run(asked, Silent())
    host = this.host
    assert isinstance(host, FedML)
    with host:
        this.loop(None, until=1)
        os.kill(host.silos[2].pid, signal.SIGSTOP)  # as if it were killed with the round's letter already on its way
        this.loop(None, until=2)
        host.silos[2].kill()
        host.silos[2].join()
        lost = [cid for cid in this.rounds[1]["cohort"] if silo_of(cid, 2) == 2]
        assert this.rounds[1]["lost"] == lost != []
        assert this.rounds[1]["arrived"]
        host.start_silo(2)
        end = time.monotonic() + 600
        while host._ask("clients", "gather", 1.0) and time.monotonic() < end:
            pass
        this.loop(None)
        assert [entry["arrived"] for entry in this.rounds[2:]] == [this.rounds[2]["cohort"]] * 2
        assert host.account()["lost"] == [[1, 2, "no answer within 15 s"]]


def test_a_run_without_silos_stops_in_a_line_and_goes_on_later(tmp_path: Path) -> None:
    whole = run(prepared(tmp_path, "fedavg-lora"))
    asked = prepared(tmp_path, "fedavg-lora", "fedml", timeout=10)
    kept = tmp_path / "fedml" / "checkpoints" / asked.key[:12]
    this = Run(asked, Silent())
    assert isinstance(this.host, FedML)
    with this.host:
        this.loop(kept, until=2)
        for silo in this.host.silos.values():
            os.kill(silo.pid, signal.SIGKILL)
        with pytest.raises(FedbenchError, match="no silo is left in round 3: silo 1: .*the same command again"):
            this.loop(kept)
    again = run(asked)
    assert comparable(again) == comparable(whole), differences(again, whole)


def fedbench(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from fedbench.cli.app import main; main()", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_both_sides_are_started_by_hand_and_a_silo_needs_no_weights(tmp_path: Path) -> None:
    bert = save_tiny_bert(tmp_path / "bert")
    reader = save_tiny_bert(tmp_path / "reader" / "bert")
    for weights in reader.glob("*.safetensors"):
        weights.unlink()
    write_addresses(tmp_path / "addresses.csv", loopback(2))

    def side(results: str, fm: Path) -> Sequence[object]:
        return [
            *("--method", "fedpft", "--scenario", "tweets-noniid", "--profile", "smoke", "--rounds", 3, "--fm", fm),
            *("--set", "r=6", "--set", "t=1", "--set", "distil_steps=2", "--set", "align_steps=2", "--device", "cpu"),
            *("--results", tmp_path / results, "--cache", tmp_path / "cache"),
        ]

    addresses = ("--addresses", tmp_path / "addresses.csv")
    here = fedbench("run", *side("server", bert))
    assert here.wait(600) == 0, here.stdout and here.stdout.read()
    stray = fedbench("silo", 1, *side("stray", reader), "--seed", 1, *addresses)
    server = fedbench("server", *side("server", bert), *addresses)
    try:
        said, _ = stray.communicate(timeout=600)
        assert "silo 1 is refused: the server's run differs from the silo's in seed; give both sides" in said
        assert stray.returncode == 2
        silos = [fedbench("silo", number, *side(f"silo-{number}", reader), *addresses) for number in (1, 2)]
        said, _ = server.communicate(timeout=900)
        assert server.returncode == 0, said
        assert "waiting for silo 1, 2" in said
        assert "identical to the record that was there before" in said
        for silo in silos:
            said, _ = silo.communicate(timeout=600)
            assert silo.returncode == 0, said
            assert said.splitlines()[-1].endswith("the run is complete")
    finally:
        for process in (stray, server, *(silos if "silos" in locals() else ())):
            process.kill()


def test_nothing_but_plain_values_is_taken_out_of_fedml_s_pickles() -> None:
    from fedml.core.distributed.communication.message import Message

    from fedbench.run.hosts._fedml import LETTER, _PlainUnpickler

    message = Message(3, 1, 0)
    message.add_params(LETTER, b"bytes")
    read = _PlainUnpickler(io.BytesIO(pickle.dumps(message))).load()
    assert (read.get_type(), read.get_sender_id(), read.get(LETTER)) == (3, 1, b"bytes")
    message.add_params("code", print)
    with pytest.raises(pickle.UnpicklingError, match="a message holds a builtins.print"):
        _PlainUnpickler(io.BytesIO(pickle.dumps(message))).load()


def test_fedml_s_own_fedavg_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FedML's single-process simulation over stock transformers and peft, a plain loop of its own over padded batches.

    Partition, schedule, row order and start values are fedbench's; training and aggregation are not.
    """
    import fedml.simulation.sp.fedavg.fedavg_api as simulation
    from fedml.core import ClientTrainer
    from fedml.core.mlops import MLOpsStore
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForSequenceClassification

    asked = prepared(tmp_path, "fedavg-lora")
    run(asked)
    expected = tuned(asked)
    this = Run(asked, Silent())
    streams, federation = asked.brief.streams, asked.scenario.federation
    clients = {cid: ClientContext(cid, streams, federation, clients_of(this).modules) for cid in range(len(this.rows))}
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "bert",
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        ignore_mismatched_sizes=True,
    )
    targets = r".*attention\.(self\.(query|key|value)|output\.dense)"
    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=48, target_modules=targets), model)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in expected)

    class Trainer(ClientTrainer):  # type: ignore[misc]
        round = 0

        def get_model_params(self) -> dict[str, torch.Tensor]:
            return {name: parameters[name].detach().clone() for name in expected}

        def set_model_params(self, values: Mapping[str, torch.Tensor]) -> None:
            with torch.no_grad():
                for name, value in values.items():
                    parameters[name].copy_(value)

        def train(self, train_data: int, device: object, args: object) -> None:
            rows, tuned = this.rows[train_data], [parameters[name] for name in expected]
            optimiser = torch.optim.AdamW(tuned, lr=1e-2 * (1 - self.round / federation.rounds), weight_decay=0.0)
            model.train()
            for chosen in clients[train_data].batches(self.round, len(rows)):
                tokens = [torch.from_numpy(rows.tokens[i]).long() for i in chosen]
                ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
                mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
                optimiser.zero_grad()
                model(input_ids=ids, attention_mask=mask, labels=rows.labels[torch.from_numpy(chosen)]).loss.backward()
                torch.nn.utils.clip_grad_norm_(tuned, 1.0)
                optimiser.step()

        def test(self, test_data: object, device: object, args: object) -> dict[str, float]:
            return {"test_correct": 1, "test_total": 1, "test_loss": 0.0}

    size = federation.cohort_size(len(this.rows))
    args = SimpleNamespace(
        **{"training_type": "simulation", "dataset": "tweets", "comm_round": federation.rounds},
        **{"client_num_in_total": len(this.rows), "client_num_per_round": size, "frequency_of_the_test": 1000},
        **{"enable_wandb": False, "enable_tracking": False, "using_mlops": False},
    )
    trainer = Trainer(model, args)
    trainer.set_model_params(server_of(this).initial)

    def sampled(self: object, round: int, total: int, count: int) -> list[int]:
        trainer.round = round
        return this.cohort(round)[0]

    monkeypatch.setattr(MLOpsStore, "mlops_args", args)
    monkeypatch.setattr(simulation, "create_model_trainer", lambda *_: trainer)
    monkeypatch.setattr(simulation.FedAvgAPI, "_client_sampling", sampled)
    data = {cid: cid for cid in clients}
    sizes = {cid: len(rows) for cid, rows in this.rows.items()}
    dataset = [sum(sizes.values()), 0, None, None, sizes, data, data, 3]
    with torch.random.fork_rng():
        simulation.FedAvgAPI(args, torch.device("cpu"), dataset, model).train()
    found = trainer.get_model_params()
    start = server_of(this).initial
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(value, start[name], rtol=1e-2, atol=1e-3), f"{name} has been trained"
