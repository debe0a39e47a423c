"""What `fedbench check` finds: methods that train nothing, learn nothing, or take what is not theirs."""

from __future__ import annotations

import multiprocessing
import textwrap
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from helpers import save_tiny_bert

from fedbench.check.guards import CLIENTS_DATA, THE_FM, Violation, forbid
from fedbench.check.suite import (
    CheckResult,
    Subject,
    check_method,
    learns,
    needs_what_it_says,
    separate_processes,
    tunables_are_trained,
)
from fedbench.data.load import load_data
from fedbench.run import prepare as running
from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest

START = """
from typing import ClassVar
from fedbench.methods.fedavg_lora import AdapterClient, AdapterServer, LoraMethod
from fedbench.objectives.classification import cross_entropy
from dataclasses import replace

SHARED = {{}}

class Suspect(LoraMethod):
    name: ClassVar[str] = "suspect"
    def server(self, fm, public, ctx):
        return SuspectServer(self, fm, ctx)
    def client(self, ctx):
        return SuspectClient(self, ctx)

class SuspectServer(AdapterServer):
    {server}

class SuspectClient(AdapterClient):
    {client}
"""
WITHOUT_A = """
def __init__(self, method, fm, ctx):
    super().__init__(method, fm, ctx)
    self.values = {n: t for n, t in self.values.items() if "lora_A" not in n}
"""
FORGETS = """
def aggregate(self, round, uploads):
    pass
"""
KEEPS_THE_HEAD = """
def aggregate(self, round, uploads):
    before = self.values
    super().aggregate(round, uploads)
    self.values |= {n: t for n, t in before.items() if "classifier.weight" in n}
"""
TAKES_THE_LAST = """
def aggregate(self, round, uploads):
    self.values = dict(list(uploads.values())[-1][0].tensors)
"""
UPHILL = """
def task(self, round, inbox, data):
    return replace(super().task(round, inbox, data), loss=lambda logits, labels: -cross_entropy(logits, labels))
"""
SHARES_SERVER = """
def aggregate(self, round, uploads):
    super().aggregate(round, uploads)
    self.values = {n: t * (1 + len(SHARED)) for n, t in self.values.items()}
"""
SHARES_CLIENT = """
def upload(self, round, result):
    SHARED[self.ctx.client] = self.rows
    return super().upload(round, result)
"""
READS_ROWS = """
def broadcast(self, round, cohort):
    from fedbench.data.load import load_data
    from fedbench.data.sets.embedded import TWEETS
    from fedbench.scenario.tables import DatasetSettings
    load_data(TWEETS, None, DatasetSettings(name="tweets"), None, None)
    return super().broadcast(round, cohort)
"""
READS_ROWS_IN_SECRET = """
def broadcast(self, round, cohort):
    from fedbench.data.sets.embedded import TWEETS
    try:
        TWEETS.read(None, None)
    except Exception:
        pass
    return super().broadcast(round, cohort)
"""
LOADS_THE_FM = """
def task(self, round, inbox, data):
    from pathlib import Path
    from fedbench.models.zoo.load import load_fm
    load_fm("minilm-l6", 3, Path("."))
    return super().task(round, inbox, data)
"""


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_bert(tmp_path_factory.mktemp("fm") / "bert"))


def plugin(folder: Path, server: str = "pass", client: str = "pass") -> str:
    path = folder / "suspect_file.py"
    parts = {"server": server.strip(), "client": client.strip()}
    path.write_text(START.format(**{side: textwrap.indent(code, "    ").strip() for side, code in parts.items()}))
    return str(path)


def subject(folder: Path, fm: str, **sides: str) -> Subject:
    asked = RunRequest(
        method="suspect",
        scenario="tweets-noniid",
        fm=fm,
        profile="smoke",
        device="cpu",
        results=folder / "runs",
        plugins=(plugin(folder, **sides),),
    )
    return Subject(prepare(asked))


def test_an_honest_method_trains_every_tunable_and_learns(tmp_path: Path, fm: str) -> None:
    honest = subject(tmp_path, fm)
    assert tunables_are_trained(honest) is None
    assert learns(honest) is None
    assert needs_what_it_says(honest) == "their sum"


def test_a_server_that_says_sum_and_looks_at_each_is_found(tmp_path: Path, fm: str) -> None:
    with pytest.raises(Violation, match="needs is 'sum', but from the sum of each round's uploads"):
        needs_what_it_says(subject(tmp_path, fm, server=TAKES_THE_LAST))


def test_lora_whose_a_is_neither_tuned_nor_sent_is_found(tmp_path: Path, fm: str) -> None:
    suspect = subject(tmp_path, fm, server=WITHOUT_A)
    with pytest.raises(Violation, match=r"the gradient of '.*lora_B.*' and of \d+ more tunables is 0 in every step"):
        tunables_are_trained(suspect)


@pytest.mark.parametrize(
    ("server", "says"),
    [
        (FORGETS, "the tuned FM is after all rounds what it was before the first"),
        (KEEPS_THE_HEAD, r"'classifier\.weight' is trained and sent, but is in the tuned FM as it was before"),
    ],
    ids=["all", "head"],
)
def test_a_server_that_drops_what_it_was_sent_is_found(tmp_path: Path, fm: str, server: str, says: str) -> None:
    with pytest.raises(Violation, match=says):
        tunables_are_trained(subject(tmp_path, fm, server=server))


@pytest.mark.parametrize("sides", [{"client": UPHILL}, {"server": FORGETS}], ids=["client", "server"])
def test_a_method_that_does_not_learn_is_found(tmp_path: Path, fm: str, sides: dict[str, str]) -> None:
    with pytest.raises(Violation, match=r"on 3 rows that every client trains on in 3 rounds, the loss goes from"):
        learns(subject(tmp_path, fm, **sides))


@pytest.mark.parametrize(
    ("sides", "says"),
    [
        ({"server": READS_ROWS}, "the server of suspect tried to load the clients' data"),
        ({"server": READS_ROWS_IN_SECRET}, "the server of suspect tried to load the clients' data"),
        ({"client": LOADS_THE_FM}, "a client of suspect tried to load the FM"),
    ],
    ids=["rows", "rows-in-secret", "fm"],
)
def test_a_side_that_loads_what_is_the_others_is_found(
    tmp_path: Path, fm: str, sides: dict[str, str], says: str
) -> None:
    with pytest.raises(Violation) as caught:
        separate_processes(subject(tmp_path, fm, **sides))
    assert str(caught.value) == says


def test_sides_that_meet_in_a_global_of_their_module_are_found(tmp_path: Path, fm: str) -> None:
    suspect = subject(tmp_path, fm, server=SHARES_SERVER, client=SHARES_CLIENT)
    with pytest.raises(Violation, match="differs when server and clients are in separate processes"):
        separate_processes(suspect)


def test_the_check_reports_each_clause_as_it_goes_and_fails(tmp_path: Path, fm: str) -> None:
    seen: list[CheckResult] = []
    results = check_method("suspect", [plugin(tmp_path, WITHOUT_A, LOADS_THE_FM)], fm=fm, report=seen.append)
    assert seen == results
    failed = {result.name: result.detail for result in results if not result.ok}
    assert set(failed) == {"every tunable is trained", "server and clients in separate processes"}
    assert "lora_B" in failed["every tunable is trained"]
    assert failed["server and clients in separate processes"] == "a client of suspect tried to load the FM"


def calls_that_are_kept_from(answer: Connection) -> None:
    """Which doors are shut once those of both sides are."""
    import safetensors.torch
    import transformers

    forbid([*CLIENTS_DATA, *THE_FM], "no")
    doors: list[Callable[..., object]] = [
        load_data,
        running.load_data,
        running._load,
        running.load_fm,
        safetensors.torch.load_file,
        transformers.AutoModel.from_pretrained,
        transformers.BertModel.from_pretrained,
    ]
    kept = 0
    for door in doors:
        try:
            door("x")
        except Violation:
            kept += 1
        except Exception:
            continue
    answer.send(kept)


def test_guards_exist_and_one_of_nothing_is_an_error() -> None:
    """In a process of their own: what is forbidden stays so."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    context.Process(target=calls_that_are_kept_from, args=(theirs,)).start()
    assert ours.recv() >= 6
    for door in ("fedbench.data.rows:load_data", "fedbench.models.foundation:no_such"):
        with pytest.raises(LookupError, match="which does not exist"):
            forbid([door], "no")
    assert "fedbench.data.load:load_data" in CLIENTS_DATA
    assert "fedbench.models.zoo.load:load_fm" in THE_FM
