"""Scenarios: data set, split and federation, as TOML. One file per data set, with its named splits."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from datetime import date, time
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from fedbench.errors import FedbenchError, printable
from fedbench.registry import bad_name, nearest, plugin_name


class Settings(BaseModel):
    """A table of a scenario file: immutable, unknown fields forbidden, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
    alpha: float = Field(0.5, gt=0, le=1e9)  # shares are equal long before; draws overflow at 1e308
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
    fm: str = Field(min_length=1)
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
    if why := bad_name(plugin_name(path.stem)):
        raise FedbenchError(f"{printable(str(path))}: a scenario is called as its file, and {why}")
    splits = _tables(path, read_toml(path), "splits")
    if not splits:
        raise FedbenchError(f"{path}: no [splits.NAME] table; a scenario needs at least one")
    return list(splits)


def load_scenario(
    path: Path, split: str, profile: str | None = None, overrides: Mapping[str, str] | None = None
) -> Scenario:
    """The scenario of one split of the file at `path`.

    `profile` names a [profiles.NAME] table laid over the file's own; `overrides` maps dotted keys to values as in
    `--set federation.rounds=3`. Raises FedbenchError naming file, field and fix.
    """
    known_splits = split_names(path)
    raw = read_toml(path)
    if extra := sorted(set(raw) - set(_TABLES)):
        raise FedbenchError(f"{path}: unknown field {extra[0]!r}; {nearest(extra[0], _TABLES)}")
    if split not in known_splits:
        raise FedbenchError(f"{path}: no split {split!r}; it has {', '.join(known_splits)}")
    _tables(path, raw, "methods")
    profiles = _tables(path, raw, "profiles")
    splits = _tables(path, raw, "splits")
    # A split may carry tables of its own (federation, evaluation, methods), which win over the file's.
    own = dict(splits[split])
    tables = ("federation", "evaluation", "methods", "public")
    nested = {table: own.pop(table) for table in tables if isinstance(own.get(table), dict)}
    layers: list[tuple[str, dict[str, Any]]] = [
        (path.name, {k: v for k, v in raw.items() if k not in ("splits", "profiles")}),
        (f"{path.name} [splits.{split}]", {"split": own, **nested}),
    ]
    if profile is not None:
        if profile not in profiles:
            raise FedbenchError(f"{path}: no profile {profile!r}; it has {', '.join(profiles) or 'none'}")
        layers.append((f"{path.name} [profiles.{profile}]", profiles[profile]))
    merged: dict[str, Any] = {"name": f"{plugin_name(path.stem)}-{split}"}
    sources: dict[str, str] = {}
    for label, layer in layers:
        _merge(merged, layer)
        sources |= dict.fromkeys(_flatten(layer), label)
    known = [*KEYS, *_flatten({"methods": merged.get("methods", {})})]
    for key, text in (overrides or {}).items():
        # Hyper-parameters are checked by their method; here only that the scenario has such a method's table.
        if key not in known and not key.startswith(tuple(f"methods.{m}." for m in merged.get("methods", {}))):
            raise FedbenchError(f"--set {key}: no such setting; {nearest(key, known)}")
        layer = _nest(key.split("."), parse_value(key, text))
        _merge(merged, layer)
        sources |= dict.fromkeys(_flatten(layer), "--set")
    try:
        scenario = Scenario.model_validate(merged)
    except ValidationError as error:
        wrong = mistake(error)
        where = ".".join(wrong.place)
        message = f"unknown field; {nearest(where, known)}" if wrong.unknown else wrong.message
        place = f"--set {where}" if sources.get(where) == "--set" else f"{path}: {where}"
        raise FedbenchError(f"{place}: {message}") from None
    scenario._sources.update(sources)
    return scenario


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file holds, without dates, which no setting is, and without what a terminal would act on.

    Raises FedbenchError, with file and place, for one that cannot be read or holds such a thing.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows begin with a mark
    except OSError as error:
        raise FedbenchError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FedbenchError(f"{path}: not TOML: it is not in UTF-8; save it as that") from None
    except (ValueError, RecursionError) as error:
        raise FedbenchError(f"{path}: not TOML: {error}") from None
    for place, value in _leaves(content):
        name = printable(".".join(place))
        if any(printable(part) != part for part in place):
            raise FedbenchError(f"{path}: {name}: a name may not hold control characters")
        if isinstance(value, str) and printable(value, but="\n\t") != value:
            raise FedbenchError(f"{path}: {name}: text may not hold control characters; {printable(value)[:60]!r} does")
        if isinstance(value, (date, time)):
            raise FedbenchError(
                f"{path}: {name}: {value} is a date or a time, which no setting is; write text in quotes"
            )
    return content


def _leaves(value: Any, place: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Every value in nested tables and lists, with its place; empty ones themselves."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not inside:
        yield place, value
    for key, inner in inside:
        yield from _leaves(inner, (*place, str(key)))


@dataclass(frozen=True)
class Mistake:
    """The mistake to name of those that pydantic found: a field it does not know before one that is missing."""

    place: tuple[str, ...]
    message: str
    unknown: bool


def mistake(error: ValidationError) -> Mistake:
    """What to say of values that were refused."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    message = first["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    message = message[0].lower() + message[1:]
    value = first["input"]
    if message.startswith("input should") and (value is None or isinstance(value, (bool, int, float, str))):
        message += f", not {printable(str(value))[:60]!r}" if isinstance(value, str) else f", not {str(value)[:60]}"
    return Mistake(tuple(map(str, first["loc"])), message, first["type"] == "extra_forbidden")


def _tables(path: Path, raw: Mapping[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """The [name.*] tables of a file; FedbenchError where something else stands in their place."""
    tables = raw.get(name, {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise FedbenchError(f"{path}: {name} has to hold tables, written as [{name}.NAME]")
    for key in tables:
        if why := bad_name(key):
            raise FedbenchError(f"{path}: {name}: {why}")
    return tables


def parse_value(key: str, text: str) -> Any:
    """A value of `--set`, of scenario and method alike: TOML where it parses as TOML, "none" as null, else text.

    Raises FedbenchError, naming the key, for a date or a time.
    """
    if text.lower() in ("none", "null"):
        return None
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):
        return text
    if any(isinstance(leaf, (date, time)) for _, leaf in _leaves(value)):
        raise FedbenchError(f"--set {key}: {text} is a date or a time, which no setting is; quote text")
    return value


def _nest(parts: list[str], value: Any) -> dict[str, Any]:
    return {parts[0]: _nest(parts[1:], value) if len(parts) > 1 else value}


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = deepcopy(value)


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


KEYS: tuple[str, ...] = (
    "title",
    "fm",
    *(
        f"{table}.{name}"
        for table, kind in (
            ("dataset", DatasetSettings),
            ("split", SplitSettings),
            ("federation", Federation),
            ("evaluation", EvaluationSettings),
            ("public", PublicSettings),
        )
        for name in kind.model_fields
    ),
)
"""Every dotted key a scenario can have, but for the hyper-parameters of methods."""
