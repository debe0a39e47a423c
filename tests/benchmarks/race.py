"""One fixed federated workload, run by fedbench, by a bare PyTorch loop and by other frameworks, side by side.

    python tests/benchmarks/race.py --data-dir DIR [--runners fedbench,bare,flower,fedml,pfl] [--rounds 5] [--cycles 3]

Local training and aggregation of some rounds of FedAvg on LoRA: MiniLM-L6, r 8 on query, key, value and attention
output, and head; fp32; 4,000 rows of SST-2 over 100 clients (Dirichlet 1.0), 10 a round, one epoch in batches of 8,
AdamW 5e-4. Partition, cohorts, order of rows and initial values are the same for every runner, so all have to end in
the same weights, which is checked. Not in the times: imports, loading, tokenising, evaluation.

`--workload decoder` is the same of a language model, against the bare loop alone: `tiny-llama` (or another decoder,
`--fm`), r 8, the next token of tweets of up to 128 tokens, 20 clients, 4 a round, ten batches of 4 at each.

Every runner is a process of its own. They take turns, since the speed of a machine drifts. A runner whose framework is
not installed is left out, with a note.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from fedbench.machine.paths import cache_folder
from fedbench.models.zoo.load import minilm_folder
from fedbench.models.zoo.names import fetched_folder, fm_folder
from fedbench.models.zoo.tiny_llama import tiny_llama_folder
from fedbench.objectives.base import IGNORED
from fedbench.run.loop import Run
from fedbench.run.prepare import prepare
from fedbench.run.progress import Silent
from fedbench.run.request import RunRequest

HERE = Path(__file__).parent
LR = 5e-4
THREADS = 2
Values = dict[str, torch.Tensor]


class Workload:
    """What every runner has to do, drawn by fedbench's own streams. Values go by the names of fedbench's model."""

    def __init__(self, data_dir: Path | None, rounds: int, workers: int | None, decoder: str | None) -> None:
        """decoder: the FM of the decoder's workload; None for the encoder's."""
        name = "race" if decoder is None else "race-decoder"
        request = RunRequest(
            method="fedavg-lora",
            scenario=f"{name}-fixed",
            fm=decoder,
            # One round more than is run, so that no round is the last one, which is evaluated.
            settings={"federation.rounds": str(rounds + 1)},
            data_dir=data_dir,
            device="cpu",
            plugins=(str(HERE / f"{name}.toml"),),
            workers=workers,
        )
        self.rounds, self.decoder = rounds, decoder
        self.run = Run(prepare(request), Silent())
        self.init: Values = {n: v.clone() for n, v in self.run.host.server.server.values.items()}  # type: ignore[attr-defined]

    def cohort(self, round: int) -> list[int]:
        return self.run.cohort(round)[0]

    def batches(self, client: int, round: int) -> Iterator[dict[str, torch.Tensor]]:
        """The client's padded batches of this round, as a plain loader would make them."""
        rows = self.run.rows[client]
        context = self.run.host.clients.client(client).ctx  # type: ignore[attr-defined]
        for indices in context.batches(round, len(rows)):
            batch = rows.batch(indices)
            labels = batch.labels
            if self.decoder:  # transformers itself compares each token with what follows it
                labels = torch.cat([torch.full((len(labels), 1), IGNORED), labels[:, :-1]], 1)
            yield {**batch.inputs, "labels": labels}

    def size(self, client: int) -> int:
        return len(self.run.rows[client])


def stock_model(init: Values, decoder: str | None) -> tuple[torch.nn.Module, dict[str, torch.nn.Parameter]]:
    """The model as a user of transformers and peft builds it, and its trainable parameters by fedbench's names."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if decoder is None:
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        base = AutoModelForSequenceClassification.from_pretrained(
            minilm_folder(), num_labels=2, dtype=torch.float32, **dropout
        )
        targets = ["query", "key", "value", "attention.output.dense"]
    else:
        base = AutoModelForCausalLM.from_pretrained(decoder_folder(decoder), dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    task = "SEQ_CLS" if decoder is None else "CAUSAL_LM"
    model = get_peft_model(base, LoraConfig(task_type=task, r=8, lora_alpha=16, target_modules=targets))
    named = {
        name.removeprefix("base_model.model.").replace("modules_to_save.default.", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    assert named.keys() == init.keys(), named.keys() ^ init.keys()
    set_values(named, init)
    return model, named


def decoder_folder(name: str) -> Path:
    """Where a decoder's checkpoint lies."""
    if name == "tiny-llama":
        return tiny_llama_folder(cache_folder())[0]
    return fm_folder(name) or fetched_folder(cache_folder(), name)


@torch.no_grad()
def set_values(parameters: Mapping[str, torch.nn.Parameter], values: Values) -> None:
    for name, p in parameters.items():
        p.copy_(values[name])


def train_plainly(
    model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], work: Workload, client: int, round: int
) -> Values:
    """One client's epoch, in the loop anybody would write."""
    model.train()
    optimiser = torch.optim.AdamW(parameters.values(), lr=LR, weight_decay=0.0)
    for batch in work.batches(client, round):
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return {n: p.detach().clone() for n, p in parameters.items()}


def run_fedbench(work: Workload) -> tuple[float, Values]:
    start = time.perf_counter()
    for round in range(work.rounds):
        work.run.round(round)
    return time.perf_counter() - start, dict(work.run.host.server.server.values)  # type: ignore[attr-defined]


def run_fedbench_bf16(work: Workload) -> tuple[float, Values]:
    """With `--precision bf16`: other arithmetic, so its weights are held to less, and RATIO is not about it."""
    work.run.p = dataclasses.replace(work.run.p, precision="bf16")
    return run_fedbench(work)


def run_bare(work: Workload) -> tuple[float, Values]:
    torch.set_num_threads(THREADS)
    model, parameters = stock_model(work.init, work.decoder)
    values = dict(work.init)
    start = time.perf_counter()
    for round in range(work.rounds):
        cohort = work.cohort(round)
        total = sum(map(work.size, cohort))
        mean = {n: torch.zeros_like(v) for n, v in values.items()}
        for client in cohort:
            set_values(parameters, values)
            for name, value in train_plainly(model, parameters, work, client, round).items():
                mean[name].add_(value, alpha=work.size(client) / total)
        values = mean
    return time.perf_counter() - start, values


def run_flower(work: Workload) -> tuple[float, Values]:
    """Flower's simulation engine on Ray: two actors of one thread, each keeping its model between calls."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = str(HERE)
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    arguments, out = sys.argv[1:], {}

    def kept() -> Any:
        """Workload and model of an actor's process, made at its first call, which is not in the time."""
        import race

        if not hasattr(race, "_kept"):
            torch.set_num_threads(1)
            own = race.Workload(*race.parse(arguments))
            race._kept = (own, *race.stock_model(own.init, own.decoder))  # type: ignore[attr-defined]
        return race._kept  # type: ignore[attr-defined]

    client_app, server_app = ClientApp(), ServerApp()

    @client_app.query()
    def query(message: Message, context: Context) -> Message:
        kept()
        who = MetricRecord({"id": int(context.node_config["partition-id"])})
        return Message(RecordDict({"who": who}), reply_to=message)

    @client_app.train()
    def train(message: Message, context: Context) -> Message:
        import race

        own, model, parameters = kept()
        client, round = int(context.node_config["partition-id"]), int(message.content["config"]["round"])
        race.set_values(parameters, message.content["arrays"].to_torch_state_dict())
        tuned = race.train_plainly(model, parameters, own, client, round)
        metrics = MetricRecord({"num-examples": own.size(client)})
        return Message(RecordDict({"arrays": ArrayRecord(tuned), "metrics": metrics}), reply_to=message)

    class Fixed(FedAvg):
        """The workload's cohorts; Flower's node ids are random, so each node is asked which client it is."""

        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            if not hasattr(self, "nodes"):
                asked = [Message(RecordDict(), dst_node_id=n, message_type="query") for n in grid.get_node_ids()]
                self.nodes = {int(r.content["who"]["id"]): r.metadata.src_node_id for r in grid.send_and_receive(asked)}
                out["start"] = time.perf_counter()
            config["round"] = server_round - 1
            chosen = [self.nodes[c] for c in work.cohort(server_round - 1)]
            record = RecordDict({self.arrayrecord_key: arrays, self.configrecord_key: config})
            return self._construct_messages(record, chosen, "train")

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        strategy = Fixed(fraction_train=0.1, min_train_nodes=10, fraction_evaluate=0.0, min_available_nodes=100)
        found = strategy.start(
            grid=grid, initial_arrays=ArrayRecord(work.init), num_rounds=work.rounds, train_config=ConfigRecord()
        )
        out["end"], out["values"] = time.perf_counter(), found.arrays.to_torch_state_dict()

    run_simulation(
        server_app=server_app,
        client_app=client_app,
        num_supernodes=100,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "include_dashboard": False},
        },
    )
    return out["end"] - out["start"], dict(out["values"])


def run_pfl(work: Workload) -> tuple[float, Values]:
    """pfl's FederatedAveraging on its simulated backend: one process of two threads."""
    os.environ["PFL_PYTORCH_DEVICE"] = "cpu"
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(THREADS)
    model, parameters = stock_model(work.init, work.decoder)

    class Net(torch.nn.Module):
        """The model with the methods pfl calls."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def loss(self, **batch: torch.Tensor) -> torch.Tensor:
            self.train()
            return self.model(**batch).loss

        def metrics(self, **_: torch.Tensor) -> dict[str, Any]:
            return {}

    class Rows(Dataset):
        """A client's rows in one round; pfl's own `iter` would want arrays of equal length."""

        def iter(self, _: int) -> Iterator[dict[str, torch.Tensor]]:
            client, round = self.user_id.split("-")
            return work.batches(int(client), int(round))

    class Fixed(FederatedAveraging):
        """Without evaluation, which pfl makes of every client at the start."""

        def get_next_central_contexts(self, *arguments: Any, **named: Any) -> Any:
            contexts, *rest = super().get_next_central_contexts(*arguments, **named)
            if contexts is not None:
                contexts = tuple(dataclasses.replace(c, do_evaluation=False) for c in contexts)
            return contexts, *rest

    clients = iter([(c, round) for round in range(work.rounds + 1) for c in work.cohort(round)])
    data = FederatedDataset(
        lambda who: Rows(raw_data=[np.arange(work.size(who[0]))], user_id=f"{who[0]}-{who[1]}"), lambda: next(clients)
    )
    wrapped = PyTorchModel(
        Net(),
        local_optimizer_create=lambda ps, lr: torch.optim.AdamW(
            [p for p in ps if p.requires_grad], lr=lr, weight_decay=0.0
        ),
        central_optimizer=torch.optim.SGD(parameters.values(), lr=1.0),
    )
    start = time.perf_counter()
    Fixed().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=work.rounds,
            evaluation_frequency=10**9,
            train_cohort_size=len(work.cohort(0)),
            val_cohort_size=None,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]),
        model=wrapped,
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=LR, local_batch_size=8),
        model_eval_params=NNEvalHyperParams(local_batch_size=64),
        callbacks=[],
    )
    return time.perf_counter() - start, {n: p.detach().clone() for n, p in parameters.items()}


def run_fedml(work: Workload) -> tuple[float, Values]:
    """FedML's single-process simulation, which takes its trainer and its cohorts only by replacing parts of it."""
    import fedml
    import fedml.simulation.sp.fedavg.fedavg_api as api
    from fedml.core import ClientTrainer

    torch.set_num_threads(THREADS)
    model, parameters = stock_model(work.init, work.decoder)
    under_way = [0]

    class Trainer(ClientTrainer):
        def get_model_params(self) -> Values:
            return {n: p.detach().clone() for n, p in parameters.items()}

        def set_model_params(self, values: Values) -> None:
            set_values(parameters, values)

        def train(self, client: int, device: Any, args: Any) -> None:
            train_plainly(model, parameters, work, client, under_way[0])

        def test(self, *_: Any) -> dict[str, float]:
            return {"test_correct": 1, "test_total": 1, "test_loss": 0.0}

    def cohort(_: Any, round: int, *__: Any) -> list[int]:
        under_way[0] = round
        return work.cohort(round)

    api.create_model_trainer = lambda *_: Trainer(model, None)
    api.FedAvgAPI._client_sampling = cohort
    number = 100
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "fedml.yaml"
        settings.write_text(
            f"""
common_args: {{training_type: simulation, random_seed: 0, scenario: horizontal, using_mlops: false}}
data_args: {{dataset: sst2, data_cache_dir: {folder}, partition_method: hetero, partition_alpha: 1.0}}
model_args: {{model: bert}}
train_args: {{federated_optimizer: FedAvg, client_id_list: "[]", client_num_in_total: {number},
  client_num_per_round: 10, comm_round: {work.rounds}, epochs: 1, batch_size: 8, client_optimizer: adam,
  learning_rate: {LR}, weight_decay: 0.0}}
validation_args: {{frequency_of_the_test: 1000}}
device_args: {{worker_num: 1, using_gpu: false, gpu_id: 0}}
comm_args: {{backend: sp}}
tracking_args: {{enable_wandb: false, enable_tracking: false, log_file_dir: {folder}}}
"""
        )
        sys.argv = [sys.argv[0], "--cf", str(settings)]
        arguments = fedml.init()
        # What FedML takes for a client's data is the client's number; the trainer makes its batches.
        clients = {c: c for c in range(number)}
        sizes = {c: work.size(c) for c in clients}
        data = [sum(sizes.values()), 0, None, None, sizes, clients, clients, 2]
        runner = fedml.FedMLRunner(arguments, torch.device("cpu"), data, model)
        start = time.perf_counter()
        runner.run()
        return time.perf_counter() - start, {n: p.detach().clone() for n, p in parameters.items()}


RUNNERS: dict[str, tuple[Callable[[Workload], tuple[float, Values]], tuple[str, ...]]] = {
    "fedbench": (run_fedbench, ()),
    "fedbench-bf16": (run_fedbench_bf16, ()),
    "bare": (run_bare, ()),
    "flower": (run_flower, ("flwr", "ray")),
    "fedml": (run_fedml, ("fedml",)),
    "pfl": (run_pfl, ("pfl",)),
}


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    out.add_argument("--data-dir", type=Path, help="folder with SST-2 on disk, else the hub or its cache")
    out.add_argument("--runners", help="default: fedbench,bare,flower,fedml,pfl; of a decoder the first two")
    out.add_argument("--workload", choices=("encoder", "decoder"), default="encoder")
    out.add_argument("--fm", help="decoder of that workload, by name or folder; default: tiny-llama")
    out.add_argument("--rounds", type=int, help="federated rounds in each run; default: 5, of a decoder 2")
    out.add_argument("--cycles", type=int, default=3, help="how often the runners take turns")
    out.add_argument("--workers", type=int, help="worker processes of fedbench; default: one per core")
    out.add_argument("--only", help=argparse.SUPPRESS)
    out.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    return out


def parse(arguments: list[str]) -> tuple[Path | None, int, int | None, str | None]:
    a = parser().parse_args(arguments)
    decoder = (a.fm or "tiny-llama") if a.workload == "decoder" else None
    return a.data_dir, a.rounds or (2 if decoder else 5), a.workers, decoder


def one(name: str, out: Path) -> None:
    """Run one runner in this process; weights, first weights and seconds go to files called like `out`."""
    work = Workload(*parse(sys.argv[1:]))
    seconds, values = RUNNERS[name][0](work)
    save_file({n: v.contiguous() for n, v in values.items()}, out)
    save_file(work.init, out.with_suffix(".init"))
    out.with_suffix(".seconds").write_text(repr(seconds))  # not printed: FedML turns prints into log lines


def difference(values: Values, reference: Values, init: Values) -> float:
    """|| a - b || / || b - init || over all weights: how far two runs differ, in units of the update."""
    apart = sum((values[n].double() - reference[n].double()).square().sum() for n in reference)
    update = sum((reference[n].double() - init[n].double()).square().sum() for n in reference)
    return float((apart / update) ** 0.5)


def main() -> None:
    asked = parser().parse_args()
    if asked.only:
        one(asked.only, asked.out)
        return
    names = []
    given = asked.runners or ("fedbench,bare" if asked.workload == "decoder" else "fedbench,bare,flower,fedml,pfl")
    most = 1e-5 if asked.workload == "decoder" else 1e-4
    for name in given.split(","):
        if name not in RUNNERS:
            sys.exit(f"race: there is no runner {name!r}; known are {', '.join(RUNNERS)}")
        missing = [m for m in RUNNERS[name][1] if importlib.util.find_spec(m) is None]
        if missing:
            print(f"{name} left out: {', '.join(missing)} not installed")
        else:
            names.append(name)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    weights: dict[str, Values] = {}
    with tempfile.TemporaryDirectory() as folder:
        for cycle in range(asked.cycles):
            for name in names if cycle % 2 == 0 else reversed(names):
                out = Path(folder) / f"{name}.safetensors"
                command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--out", str(out)]
                out.with_suffix(".seconds").unlink(missing_ok=True)
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode or not out.with_suffix(".seconds").exists():
                    sys.exit(f"race: {name} failed\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
                seconds[name].append(float(out.with_suffix(".seconds").read_text()))
                weights[name] = load_file(out)
                print(f"cycle {cycle + 1}  {name:13} {seconds[name][-1]:7.2f} s", flush=True)
        init = load_file(Path(folder) / f"{names[0]}.init")
    reference = "bare" if "bare" in names else names[0]
    base = statistics.median(seconds[reference])
    print(f"\n{'runner':13} {'median s':>9} {'min':>7} {'max':>7} {'/ ' + reference:>11}   update differs by")
    for name in names:
        s = seconds[name]
        apart = difference(weights[name], weights[reference], init)
        middle = statistics.median(s)
        print(f"{name:13} {middle:9.2f} {min(s):7.2f} {max(s):7.2f} {middle / base:11.3f}   {apart:.1e}")
        if apart > (0.3 if name == "fedbench-bf16" else most):
            sys.exit(f"race: {name} and {reference} did not do the same work: their updates differ by {apart:.1e}")
    if {"fedbench", "bare"} <= seconds.keys():
        print(f"RATIO fedbench/bare {statistics.median(seconds['fedbench']) / base:.3f}")


if __name__ == "__main__":
    main()
