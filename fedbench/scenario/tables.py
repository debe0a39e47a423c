"""The tables of a scenario, with what each setting may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr


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


class ObjectiveSettings(Settings):
    """What is asked of a row where that is not its class: `kind` language, which token comes next.

    loss_on: of a row with a second text, its answer alone, or all of it. normalised: whether in training rows count
    alike ("row") or the tokens of a batch do ("batch").
    """

    kind: Literal["language"]
    loss_on: Literal["answers", "all"] = "answers"
    normalised: Literal["row", "batch"] = "row"


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
    objective: ObjectiveSettings | None = None
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What enters a run's key: everything but the title and the settings of methods, which the method holds."""
        out = self.model_dump(mode="json", exclude={"title", "methods"})
        if self.objective is None:  # as in keys from before there was one
            del out["objective"]
        return out

    def provenance(self) -> dict[str, tuple[Any, str]]:
        """Dotted key -> (value, where it came from), for every setting."""
        flat = flatten(self.model_dump(mode="json"))
        return {key: (value, self._sources.get(key, "default")) for key, value in flat.items() if key != "name"}


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            out |= flatten(value, f"{prefix}{key}.")
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
            ("objective", ObjectiveSettings),
        )
        for name in kind.model_fields
    ),
)
"""Every dotted key a scenario can have, but for the hyper-parameters of methods."""
