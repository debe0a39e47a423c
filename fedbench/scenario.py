"""Scenarios: data set, split and federation, as TOML. One file per data set, with its named splits."""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from fedbench.errors import FedbenchError


class Settings(BaseModel):
    """A table of a scenario file: immutable, unknown fields forbidden."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class DatasetSettings(Settings):
    """The data set: `name` of a loader, `revision` pinned on the hub, token limit, and how many rows to use.

    validation: rows held out of train for selection and probes. train_rows, test_rows: caps, drawn by a fixed stream
    that does not depend on the seed; None takes all.
    """

    name: str
    revision: str | None = None
    max_length: int = Field(64, ge=4)
    validation: int = Field(400, ge=1)
    train_rows: int | None = Field(None, ge=1)
    test_rows: int | None = Field(None, ge=1)


class PublicSettings(Settings):
    """The public corpus: `name` of a corpus, at most `rows` of it. in_domain: whether it is the clients' own domain."""

    name: str
    rows: int | None = Field(None, ge=1)
    in_domain: bool = False


class SplitSettings(Settings):
    """How training rows are divided over `clients`; alpha belongs to the Dirichlet kinds, shards to "shards".

    dirichlet: per class over clients. dirichlet-clients: per client over classes, equal sizes, prior-weighted.
    quantity: label-blind, Dirichlet over sizes. min_size: fewest rows a client may have.
    """

    kind: Literal["iid", "dirichlet", "dirichlet-clients", "shards", "quantity"]
    clients: int = Field(ge=1)
    alpha: float = Field(0.5, gt=0, allow_inf_nan=False)
    shards_per_client: int = Field(2, ge=1)
    min_size: int = Field(1, ge=1)


class Federation(Settings):
    """The schedule: share of clients sampled a round, rounds, local work, and how often a sampled client drops out.

    max_steps caps a client's local steps in a round; None trains all of its local epochs. max_update_norm: uploads
    whose adapter differs from the one sent by more than this L2 norm are refused; None lets in any that is finite.
    """

    fraction: float = Field(0.1, gt=0, le=1)
    rounds: int = Field(10, ge=0)
    local_epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1)
    max_steps: int | None = Field(None, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    max_update_norm: float | None = Field(None, gt=0, allow_inf_nan=False)

    def cohort_size(self, clients: int) -> int:
        """Clients sampled a round, at least one."""
        return max(1, round(self.fraction * clients))


class EvaluationSettings(Settings):
    """When and on what to evaluate; `selection` says which round the test set scores, never by looking at it.

    every: rounds between two evaluations of gradient error and plug-in. selection: the last round; or the best, by the
    proxy's score on the validation rows after every round (the FM's own where clients train that), of equals the first.
    """

    every: int = Field(5, ge=1)
    probe_size: int = Field(64, ge=0)
    selection: Literal["last", "best"] = "last"
    batch_size: int = Field(64, ge=1)


class Scenario(Settings):
    """A resolved scenario. `methods` holds hyper-parameters by method, validated by the method itself."""

    name: str
    title: str
    dataset: DatasetSettings
    split: SplitSettings
    federation: Federation
    evaluation: EvaluationSettings
    fm: str
    public: PublicSettings | None = None
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def identity(self, method: str) -> dict[str, Any]:
        """What enters a run's key: everything but the title and the settings of methods, which the method holds."""
        return self.model_dump(mode="json", exclude={"title", "methods"})

    def provenance(self) -> dict[str, tuple[Any, str]]:
        """Dotted key -> (value, where it came from), for every setting."""
        flat = _flatten(self.model_dump(mode="json"))
        return {key: (value, self._sources.get(key, "default")) for key, value in flat.items() if key != "name"}


_TABLES = ("title", "fm", "dataset", "public", "federation", "evaluation", "methods", "splits", "profiles")


def split_names(path: Path) -> list[str]:
    """The names of a scenario file's splits, in the file's order. Raises FedbenchError for an unreadable file."""
    splits = _read(path).get("splits")
    if not isinstance(splits, dict) or not splits:
        raise FedbenchError(f"{path}: no [splits.NAME] table; a scenario needs at least one")
    return list(splits)


def load_scenario(
    path: Path, split: str, profile: str | None = None, overrides: Mapping[str, str] | None = None
) -> Scenario:
    """The scenario of one split of the file at `path`.

    `profile` names a [profiles.NAME] table laid over the file's own; `overrides` maps dotted keys to values as in
    `--set federation.rounds=3`. Raises FedbenchError naming file, field and fix.
    """
    raw = _read(path)
    if extra := sorted(set(raw) - set(_TABLES)):
        raise FedbenchError(f"{path}: unknown field {extra[0]!r}; {_nearest(extra[0], _TABLES)}")
    splits = _tables(path, raw, "splits")
    if split not in splits:
        raise FedbenchError(f"{path}: no split {split!r}; it has {', '.join(splits)}")
    # A split may carry tables of its own (federation, evaluation, methods), which win over the file's.
    own = dict(splits[split])
    tables = ("federation", "evaluation", "methods", "public")
    nested = {table: own.pop(table) for table in tables if isinstance(own.get(table), dict)}
    layers: list[tuple[str, dict[str, Any]]] = [
        (path.name, {k: v for k, v in raw.items() if k not in ("splits", "profiles")}),
        (f"{path.name} [splits.{split}]", {"split": own, **nested}),
    ]
    if profile is not None:
        profiles = _tables(path, raw, "profiles")
        if profile not in profiles:
            raise FedbenchError(f"{path}: no profile {profile!r}; it has {', '.join(profiles) or 'none'}")
        layers.append((f"{path.name} [profiles.{profile}]", profiles[profile]))
    merged: dict[str, Any] = {"name": f"{path.stem.replace('_', '-')}-{split}"}
    sources: dict[str, str] = {}
    for label, layer in layers:
        _merge(merged, layer)
        sources |= dict.fromkeys(_flatten(layer), label)
    known = _known(merged)
    for key, text in (overrides or {}).items():
        # Hyper-parameters are checked by their method; here only that the scenario has such a method's table.
        if key not in known and not key.startswith(tuple(f"methods.{m}." for m in merged.get("methods", {}))):
            raise FedbenchError(f"--set {key}: no such setting; {_nearest(key, known)}")
        layer = _nest(key.split("."), _value(text))
        _merge(merged, layer)
        sources |= dict.fromkeys(_flatten(layer), "--set")
    try:
        scenario = Scenario.model_validate(merged)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].lower()
        if first["type"] == "extra_forbidden":
            message = f"unknown field; {_nearest(where, _known(merged))}"
        place = f"--set {where}" if sources.get(where) == "--set" else f"{path}: {where}"
        raise FedbenchError(f"{place}: {message}") from None
    scenario._sources.update(sources)
    return scenario


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FedbenchError(f"{path}: cannot be read as TOML: {error}") from None


def _tables(path: Path, raw: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The [name.*] tables of a file; FedbenchError where something else stands in their place."""
    tables = raw.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise FedbenchError(f"{path}: {name} has to hold tables, written as [{name}.NAME]")
    return tables


def _value(text: str) -> Any:
    """A `--set` value: TOML where it parses as TOML, "none" as null, else text."""
    if text.lower() in ("none", "null"):
        return None
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _nest(parts: list[str], value: Any) -> dict[str, Any]:
    return {parts[0]: _nest(parts[1:], value) if len(parts) > 1 else value}


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = json.loads(json.dumps(value)) if isinstance(value, dict) else value


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _known(merged: Mapping[str, Any]) -> list[str]:
    """Every dotted key a scenario can have, given the methods it names."""
    keys = ["title", "fm"]
    tables: dict[str, type[Settings]] = {
        "dataset": DatasetSettings,
        "split": SplitSettings,
        "federation": Federation,
        "evaluation": EvaluationSettings,
        "public": PublicSettings,
    }
    keys += [f"{table}.{name}" for table, kind in tables.items() for name in kind.model_fields]
    return keys + list(_flatten({"methods": merged.get("methods", {})}))


def _nearest(name: str, known: list[str] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
