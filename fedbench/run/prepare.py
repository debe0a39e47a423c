"""Makes a run ready to start: settings checked, data and FM loaded, its key known."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from inspect import get_annotations
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from fedbench.api.messages import ClientId
from fedbench.api.sides import Method
from fedbench.data.clients import ClientRows
from fedbench.data.examples import Examples
from fedbench.data.load import load_data
from fedbench.data.natural import words_skew
from fedbench.data.own.source import own_data_set
from fedbench.data.partition import Partition, natural_partition, partition
from fedbench.data.rows import RawData
from fedbench.data.sets.dataset import DataSet
from fedbench.data.sources import data_folder
from fedbench.errors import FedbenchError
from fedbench.files import try_folder
from fedbench.forward.agreement import check_family
from fedbench.machine.device import Execution, choose_execution
from fedbench.machine.paths import cache_folder
from fedbench.measures.personal import drawn_rows
from fedbench.measures.scores import HeldOut
from fedbench.measures.written import check_scores
from fedbench.models.answering import answers_for
from fedbench.models.conversation import NothingAsked
from fedbench.models.families.known import is_built_in
from fedbench.models.foundation import FoundationModel
from fedbench.models.reading import encode, inputs_hash, unknown_tokens
from fedbench.models.spec import Head
from fedbench.models.zoo.load import load_fm, load_reader
from fedbench.names import nearest
from fedbench.objectives.named import LANGUAGE
from fedbench.records import provenance
from fedbench.records.schema import SCHEMA
from fedbench.records.store import record_key
from fedbench.registry import Registry
from fedbench.run.brief import Brief
from fedbench.run.hosts.side import Host
from fedbench.run.privacy import check_private
from fedbench.run.request import RunRequest
from fedbench.scenario.load import load_scenario
from fedbench.scenario.settings import mistake, parse_value
from fedbench.scenario.tables import (
    KEYS,
    DatasetSettings,
    ObjectiveSettings,
    PublicSettings,
    Scenario,
    SplitSettings,
)


@dataclass(frozen=True)
class Prepared:
    """A run ready to start: everything loaded, and its key known.

    host: makes the host that holds the two sides. unavailable: why the method cannot run here, if so. planned: dotted
    settings that the method itself changed (`Method.plan`). divided: the division, where the training rows it was made
    of are not here.
    """

    request: RunRequest
    method: Method
    scenario: Scenario
    loaded: Loaded
    execution: Execution
    host: Callable[..., Host]
    identity: Mapping[str, Any]
    key: str
    unavailable: str | None
    planned: tuple[str, ...]
    divided: Division | None = None

    @cached_property
    def division(self) -> Division:
        """Which client holds which training rows. Raises FedbenchError where the split cannot be."""
        if self.divided is not None:
            return self.divided
        data, split = self.loaded.data, self.scenario.split
        labels, classes = data.train.labels, len(data.class_names)
        if split.kind == "natural":
            assert data.clients is not None, "loaded for this split"
            found = natural_partition(data.clients.train)
        else:
            found = partition(labels, split, self.brief.streams.numpy("partition"))
        skew = found.skew(labels, classes) | (words_skew(data) if split.kind == "natural" else {})
        return Division(found, found.label_counts(labels, classes), skew)

    def rows(self) -> ClientRows:
        """The training rows of each client; none where they are not here."""
        if self.divided is not None:
            return ClientRows.of(self.loaded.train, [])
        return ClientRows.of(self.loaded.train, self.division.partition.clients)

    def without_rows(self) -> Prepared:
        """The same without any client's rows, as a server has it."""
        nothing = np.array([], dtype=np.int64)
        data = replace(self.loaded.data, train=self.loaded.data.train.select(nothing))
        if data.clients is not None:
            data = replace(data, clients=replace(data.clients, train=nothing))
        loaded = replace(self.loaded, data=data, train=self.loaded.train.select(nothing))
        return replace(self, loaded=loaded, divided=self.division)

    @property
    def brief(self) -> Brief:
        """What both sides of the run are told."""
        return Brief(self.scenario, self.request.seed, self.execution, cache_folder(self.request.cache))

    @cached_property
    def held_out(self) -> HeldOut:
        """The rows that no client trains on.

        The probe is drawn from the validation rows by a stream of its own: the same for every method.
        """
        loaded, rows = self.loaded, self.loaded.validation
        size = min(self.scenario.evaluation.probe_size, len(rows))
        probe = rows.select(self.brief.streams.numpy("probe").permutation(len(rows))[:size])
        data = loaded.data
        return HeldOut(
            rows, probe, loaded.test, data.test.labels, data.test_name, loaded.extra_tests,
            None if data.clients is None else data.clients.test,
        )  # fmt: skip

    def own_tests(self, clients: Sequence[ClientId]) -> dict[ClientId, Examples]:
        """The test rows of each of these clients that has some: its own or, of a drawn split, drawn for it."""
        held = self.held_out
        whose = held.of_clients
        if whose is not None:
            own = {cid: np.flatnonzero(whose == cid) for cid in clients}
        else:
            counts = self.division.label_counts
            streams = {cid: self.brief.streams.numpy("personal-test", cid) for cid in clients}
            own = {cid: drawn_rows(held.test_classes, counts[cid], streams[cid]) for cid in clients}
        return {cid: held.test.select(rows) for cid, rows in own.items() if len(rows)}

    @property
    def fm_name(self) -> str:
        """What records call the FM."""
        return self.loaded.fm.name

    @property
    def notes(self) -> tuple[str, ...]:
        """What was loaded, in lines for the user."""
        fm = f"FM: {self.fm_name} ({self.loaded.fm.provenance['source']})"
        return (*self.loaded.data.notes, fm, *self.loaded.notes)


@dataclass(frozen=True)
class Division:
    """Which client holds which training rows, their labels by client and class, and how unlike that makes them."""

    partition: Partition
    label_counts: list[list[int]]
    skew: Mapping[str, float]


@dataclass(frozen=True)
class Loaded:
    """Data and FM, loaded and encoded; `extra_tests` by name, in order.

    inputs_hash: `models.reading.inputs_hash` of all of them. notes: what the FM makes of the data, for the user.
    """

    data: RawData
    fm: FoundationModel
    train: Examples
    validation: Examples
    test: Examples
    public: Examples | None
    extra_tests: Mapping[str, Examples]
    inputs_hash: str
    notes: tuple[str, ...]


@lru_cache(maxsize=2)
def _load(
    data_set: DataSet,
    corpus: DataSet | None,
    dataset: DatasetSettings,
    public: PublicSettings | None,
    fm: str,
    cache: Path,
    data_dir: Path | None,
    weights: bool,
    split: SplitSettings | None,
    objective: ObjectiveSettings | None,
) -> Loaded:
    """Load and encode once for all runs of a process that share data and FM; the cells of a grid mostly do.

    `split`: a natural one, else None.
    """
    data = load_data(data_set, corpus, dataset, public, data_dir, split)
    if objective is not None:
        check_scores(objective.scores)
        data = replace(data, objective=LANGUAGE[objective.normalised].name)
    load = load_fm if weights else load_reader
    model = load(fm, len(data.class_names), cache, data.class_names, head_for(objective))
    if weights and not is_built_in(model.spec.model_type):
        check_family(model)
    answers = objective is None or objective.loss_on == "answers"
    parts: dict[str, Examples] = {}
    for role in data.roles():
        while role not in parts:
            part = data.roles()[role]
            try:
                rows = encode(part, model, dataset.max_length, data.objective, answers)
                if objective is not None and role not in ("train", "public"):
                    rows = replace(rows, answers=answers_for(part, model, dataset.max_length, objective))
                parts[role] = rows
            except NothingAsked as error:
                if dataset.bad_rows == "error":
                    raise
                data = data.without(role, error.rows, f"no answer is left within {dataset.max_length} tokens")
    extra = {name: parts[f"test {name}"] for name in data.extra_tests}
    notes = model.notes
    if (tokens := parts["train"].tokens) and (unknown := unknown_tokens(model.processor, tokens[:1000])):
        notes += (f"FM {model.name}: {unknown}",)
    main = parts["train"], parts["validation"], parts["test"], parts.get("public")
    return Loaded(data, model, *main, extra, inputs_hash(parts, model), notes)


def head_for(objective: ObjectiveSettings | None) -> Head:
    """What the FM of a scenario with this objective answers with."""
    return "classes" if objective is None else "vocabulary"


def split_settings(
    settings: Mapping[str, str], fields: Sequence[str], method: str
) -> tuple[dict[str, str], dict[str, str]]:
    """Sort `--set` pairs into the scenario's and the method's.

    A hyper-parameter's name, bare or behind `method.`, is the method's; `rounds` is short for federation.rounds;
    what is left has to be a dotted key of the scenario. Raises FedbenchError for a name that is neither, and for
    two names of one setting.
    """
    mine: dict[str, str] = {}
    scenario: dict[str, str] = {}
    for key, value in settings.items():
        bare = key.removeprefix("method.").removeprefix(f"methods.{method}.").replace("-", "_")
        whole = "federation.rounds" if key == "rounds" else key
        if bare in fields:
            name, side = bare, mine
        elif whole in KEYS or whole.startswith("methods."):
            name, side = whole, scenario
        elif key.startswith("method."):
            raise FedbenchError(f"--set {key}: {method} has no such hyper-parameter; {nearest(bare, fields)}")
        else:
            raise FedbenchError(
                f"--set {key}: {method} has no such hyper-parameter, and scenarios have no such setting; "
                f"{nearest(key, [*fields, *KEYS])}"
            )
        if name in side:
            raise FedbenchError(f"--set {key}: {name} is set twice; set it once")
        side[name] = value
    return mine, scenario


def prepare(request: RunRequest, weights: bool = True) -> Prepared:
    """Load data and FM, validate all settings, and compute the run's key. Raises FedbenchError for bad input.

    weights: whether the FM's are needed; without them nothing but rows can be read for it, and the key is not a run's.
    """
    try_folder(request.results, "--results")
    try_folder(cache_folder(request.cache), "--cache")
    provenance.source_state()  # now, before anybody can commit while the run is under way
    registry = Registry(request.plugins)
    registry.add_families()
    kind = registry.load_method(request.method)
    host = registry.load_host(request.host)
    host.ready(request)
    path, split = registry.find_scenario(request.scenario)
    mine, overrides = split_settings(request.settings, list(kind.model_fields), request.method)
    scenario = load_scenario(path, split, request.profile, overrides)
    given = {name: value for name, (value, _) in scenario_settings(kind, scenario).items()}
    method = make_method(kind, {**given, **parse_values(mine)}, request)
    if method.personal and not getattr(host, "scores_clients", False):
        raise FedbenchError(
            f"--host {request.host}: does not score clients' own models, which {method.name} makes; use --host here"
        )
    if scenario.privacy is not None:
        check_private(method, scenario.privacy)
    execution = choose_execution(request.device, request.precision, request.executor, request.workers)
    fm_name = scenario.fm if request.fm is None else request.fm
    folder = data_folder(request.data_dir)
    data_set, corpus, natural = sets_of(registry, scenario, request.data_dir)
    cache = cache_folder(request.cache)
    common = data_set, corpus, scenario.dataset, scenario.public, fm_name, cache, folder
    loaded = _load(*common, weights, natural, scenario.objective)
    data, fm = loaded.data, loaded.fm
    if data.clients is not None:
        split_found = scenario.split.model_copy(update={"clients": len(data.clients.names)})
        scenario = scenario.model_copy(update={"split": split_found})
    split_used, federation = method.plan(scenario.split, scenario.federation, len(loaded.train))
    planned = [
        f"{table}.{name}"
        for table, before, after in (
            ("split", scenario.split, split_used),
            ("federation", scenario.federation, federation),
        )
        for name in type(before).model_fields
        if getattr(before, name) != getattr(after, name)
    ]
    scenario = scenario.model_copy(update={"split": split_used, "federation": federation, "fm": fm_name})
    identity = {
        "schema": SCHEMA,
        # Which FM it is its hash says: names and places of folders are not what decides a result.
        "scenario": {name: value for name, value in scenario.identity().items() if name != "fm"},
        "data_hash": data.content_hash,
        "fm_hash": fm.content_hash,
        "inputs_hash": loaded.inputs_hash,
        "precision": execution.precision,
        "method": {"name": method.name, "version": method.version, "settings": method.model_dump(mode="json")},
        "seed": request.seed,
    }
    if method.dropout > 0:
        # Executors draw dropout in different orders, so with dropout their results differ.
        identity["executor"] = execution.executor
    return Prepared(
        request=request,
        method=method,
        scenario=scenario,
        loaded=loaded,
        execution=execution,
        host=host,
        identity=identity,
        key=record_key(identity),
        unavailable=method.unavailable(fm),
        planned=tuple(planned),
    )


def sets_of(
    registry: Registry, scenario: Scenario, data_dir: Path | None = None
) -> tuple[DataSet, DataSet | None, SplitSettings | None]:
    """A scenario's data set, its public corpus, and its split where that is natural."""
    if scenario.dataset.kind is None:
        data_set = registry.load_dataset(scenario.dataset.name)
    else:
        language = scenario.objective is not None
        root = data_folder(data_dir)
        data_set = own_data_set(scenario.dataset, scenario.split, scenario.folder, language, root)
    corpus = registry.load_dataset(scenario.public.name) if scenario.public else None
    return data_set, corpus, scenario.split if scenario.split.kind == "natural" else None


def scenario_settings(kind: type[Method], scenario: Scenario) -> dict[str, tuple[Any, str]]:
    """Hyper-parameters the scenario sets for a method: name -> (value, the method whose table holds it).

    A method takes the settings of one it extends as well, but for fields it declares anew: an ablation runs under the
    settings of what it is an ablation of.
    """
    out: dict[str, tuple[Any, str]] = {}
    anew: set[str] = set()
    for owner in kind.__mro__:
        if "name" in vars(owner) and issubclass(owner, Method):
            table = scenario.methods.get(owner.name, {})
            out = {n: (v, owner.name) for n, v in table.items() if n not in anew} | out
        anew |= set(get_annotations(owner))
    return out


def parse_values(settings: Mapping[str, str]) -> dict[str, Any]:
    """Values of `--set` by key."""
    return {key: parse_value(key, text) for key, text in settings.items()}


def make_method(kind: type[Method], settings: Mapping[str, Any], request: RunRequest) -> Method:
    """The method with its hyper-parameters checked; a bad one is a FedbenchError that names it."""
    try:
        return kind(**settings)
    except ValidationError as error:
        wrong = mistake(error)
        name = wrong.place[0] if wrong.place else ""
        if wrong.unknown:
            message = f"no such hyper-parameter; {nearest(name, kind.model_fields)}"
        else:
            message = f"{wrong.message}; it takes {', '.join(kind.model_fields)}"
        raise FedbenchError(f"{request.scenario}: hyper-parameter {name!r} of {request.method}: {message}") from None
