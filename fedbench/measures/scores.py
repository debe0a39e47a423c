"""Scores along a run: on the validation rows after rounds, and on the test rows at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from fedbench.api.messages import State
from fedbench.api.sides import Server, tuned_fm
from fedbench.data.answers import References
from fedbench.data.examples import Examples
from fedbench.errors import DivergedError
from fedbench.machine.device import Execution
from fedbench.machine.stopwatch import Stopwatch
from fedbench.measures.accuracy import Evaluation, evaluate, on_own_rows, per_client
from fedbench.measures.observer import Observer
from fedbench.measures.written import scores_of, write
from fedbench.models.foundation import FoundationModel
from fedbench.scenario.tables import EvaluationSettings


@dataclass(frozen=True)
class HeldOut:
    """Rows that no client trains on: of the validation set, of the probe, and of each test set by name.

    test_classes: of each row of the first test set, [n], whatever the objective makes of them. test_name: what the data
    set calls that test set. test_clients: the number of the client each of its rows belongs to, [n], -1 for nobody's;
    None where clients are not those of the data.
    """

    validation: Examples
    probe: Examples
    test: Examples
    test_classes: np.ndarray
    test_name: str = "test"
    extra_tests: Mapping[str, Examples] = field(default_factory=dict)
    test_clients: np.ndarray | None = None

    @property
    def of_clients(self) -> np.ndarray | None:
        """`test_clients` where some test row belongs to a client; None where none does."""
        whose = self.test_clients
        return whose if whose is not None and (whose >= 0).any() else None


@dataclass(frozen=True)
class Best:
    """The round with the best score on the validation rows so far, and the server as it was after it."""

    score: float
    round: int
    state: State


class Scores(Observer):
    """Accuracy of the plug-in and of the proxy.

    On validation rows: the proxy's, which is what a deployment could see and select on; the plug-in's in rounds of
    evaluation, and always where there is no proxy.
    """

    name = "accuracy"

    def __init__(
        self,
        rows: HeldOut,
        settings: EvaluationSettings,
        execution: Execution,
        who: str,
        fm: FoundationModel,
        label_counts: Sequence[Sequence[int]],
        time: Stopwatch,
    ) -> None:
        """who: the run, for an error. label_counts: rows of each client by class, for scores by client."""
        self.rows, self.settings, self.execution, self.who = rows, settings, execution, who
        self.fm, self.label_counts, self.time = fm, label_counts, time
        self.best: Best | None = None
        self.validation: dict[int, dict[str, float | None]] = {}
        self._noted = 0

    def evaluate(self, model: nn.Module, data: Examples, round: int) -> Evaluation:
        """Score a model as it is after `round`. Raises DivergedError, naming that, where its answers are not finite."""
        try:
            return evaluate(model, data, self.settings.batch_size, self.execution)
        except DivergedError as error:
            raise DivergedError(f"{self.who}, has diverged: {error} after round {round + 1}; lower lr") from None

    def ended(self, round: int, server: Server, due: bool) -> Mapping[str, Any]:
        if not due and self.settings.selection != "best":
            return {}
        rows = self.rows.validation
        found: dict[str, float | None] = {}
        with self.time("evaluate"):
            proxy, fm = server.put_in_proxy(), server.put_in_fm()
            if fm is None:
                return {}
            if due or proxy is None:
                found["plug_in_validation"] = self.evaluate(fm, rows, round).accuracy
            found["proxy_validation"] = None if proxy is None else self.evaluate(proxy, rows, round).accuracy
        seen = found["plug_in_validation"] if proxy is None else found["proxy_validation"]
        assert seen is not None
        if self.settings.selection == "best" and (self.best is None or seen > self.best.score):
            state = server.state()
            tensors = {n: t.detach().cpu().clone() for n, t in state.tensors.items()}
            self.best = Best(seen, round, State(tensors, deepcopy(dict(state.values))))
        self.validation[round] = found
        return found

    def selected(self, rounds: int) -> int:
        """The round whose model is scored on the test rows, of a run of so many."""
        return rounds - 1 if self.best is None else self.best.round

    def finish(self, server: Server, rounds: int) -> dict[str, Any]:
        """Score the selected round on the test rows; the server becomes what it was after it."""
        selected = self.selected(rounds)
        if self.best is not None:
            server.restore(self.best.state)
        if server.put_in_fm() is None:
            nothing = dict.fromkeys(("plug_in", "proxy", "untouched", "gap", "per_client", "unavailable"))
            return {"selection": {"rule": "last", "round": selected}, **nothing}
        with self.time("test"):
            plug_in, of_plug_in = self._test(tuned_fm(server), self.rows.test, selected)
            proxy_model = server.put_in_proxy()
            proxy, of_proxy = None, None
            if proxy_model is not None:
                proxy, of_proxy = self._test(proxy_model, self.rows.test, selected)
            untouched = None
            if self.fm.trained_head is not None:
                model = self.fm.build(None, self.execution.device)
                model.load_state_dict(self.fm.trained_head, strict=False)
                _, untouched = self._test(model, self.rows.test, selected, rows=False)
            models = {"plug_in": tuned_fm(server), "proxy": proxy_model}
            extra = {
                test: {
                    name: None if model is None else self._test(model, rows, selected)[1]
                    for name, model in models.items()
                }
                for test, rows in self.rows.extra_tests.items()
            }
        final = dict(self.validation.get(selected, {}))
        if final and "plug_in_validation" not in final:
            with self.time("evaluate"):
                final["plug_in_validation"] = self.evaluate(tuned_fm(server), self.rows.validation, selected).accuracy
        accuracy: dict[str, Any] = {
            "selection": {"rule": self.settings.selection, "round": selected},
            "plug_in": of_plug_in,
            "proxy": of_proxy,
            "untouched": untouched,
            "gap": plug_in.accuracy - proxy.accuracy if proxy else None,
            "validation": {"plug_in": final.get("plug_in_validation"), "proxy": final.get("proxy_validation")},
            "per_client": self._per_client(plug_in),
            "unavailable": None,
        }
        if extra:
            accuracy |= {"test_name": self.rows.test_name, "extra_tests": extra}
        return accuracy

    def _test(
        self, model: nn.Module, data: Examples, round: int, rows: bool = True
    ) -> tuple[Evaluation, dict[str, Any]]:
        """Score a model on test rows, and by the answers it writes where the scenario asks for these."""
        found = self.evaluate(model, data, round)
        block = found.block(rows=rows)
        if isinstance(data.answers, References):
            texts = write(model, data.answers, self.fm.processor, self.settings.batch_size, self.execution)
            block |= scores_of(texts, data.answers, rows)
        return found, block

    def _per_client(self, test: Evaluation) -> dict[str, Any]:
        """Accuracy by client: on the clients' own test rows where there are any."""
        whose = self.rows.of_clients
        if whose is not None:
            return on_own_rows(test, whose)
        return per_client(test, self.rows.test_classes, self.label_counts)

    def notes(self) -> list[Any]:
        new = list(self.validation.items())[self._noted :]
        self._noted = len(self.validation)
        return [[round, found] for round, found in new]

    def state(self) -> State | None:
        if self.best is None:
            return None
        score, round, state = self.best.score, self.best.round, self.best.state
        return State(state.tensors, {"score": score, "round": round, "server": dict(state.values)})

    def restore(self, state: State | None, notes: Sequence[Any]) -> None:
        self.validation = {round: dict(found) for round, found in notes}
        self._noted = len(self.validation)
        self.best = None
        if state is not None:
            of_server = State(state.tensors, state.values["server"])
            self.best = Best(state.values["score"], state.values["round"], of_server)
