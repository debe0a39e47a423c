"""What the blocks of a record have to hold: types and ranges of everything that tables and panels read.

These classes only check; a record keeps its blocks as the plain mappings they are. Fields that are not named here are
let through, so that a record made by a later version is not refused for what it says in addition.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

ROWS = 10_000_000
"""The most test rows a record can have: an interval over more of them would take hours."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(ge=1, lt=2**63)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Key = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_NOT_IN_NAMES = r"/\\\x00-\x1f\x7f"
Name = Annotated[
    str, StringConstraints(max_length=200, pattern=rf"^[^{_NOT_IN_NAMES}]*[^.{_NOT_IN_NAMES}][^{_NOT_IN_NAMES}]*$")
]
"""The name of a method or scenario, which is also the name of a folder."""


class Block(BaseModel):
    """A table of a record: numbers are numbers, not texts or truth values."""

    model_config = ConfigDict(strict=True, extra="ignore")


class Identity(Block):
    key: Key
    method: Name
    scenario: Name
    seed: Annotated[int, Field(ge=0)]
    method_version: int | str | None = None
    fm: Annotated[str, StringConstraints(max_length=4096)] | None = None
    data_hash: str | None = None
    fm_hash: str | None = None
    precision: str | None = None


class Split(Block):
    clients: Positive


class Federation(Block):
    rounds: Count
    fraction: Share = 1.0
    local_epochs: Positive | None = None
    max_steps: Positive | None = None


class Public(Block):
    in_domain: bool = False


class Scenario(Block):
    name: Name | None = None
    title: str = ""
    split: Split = Split(clients=1)
    federation: Federation = Federation(rounds=0)
    public: Public | None = None


class Method(Block):
    name: Name
    version: int | str | None = None
    settings: dict[str, Any] = {}
    planned: list[str] | None = None


class Error(Block):
    type: str
    message: str


class Score(Block):
    """A model's answers to a test set. A loss of null is one that is not finite: the model diverged."""

    accuracy: Share | None
    macro_f1: Share | None = None
    loss: Finite | None = None
    rows: Annotated[int, Field(ge=1, le=ROWS)]
    correct: str | None = None

    @model_validator(mode="after")
    def _scored(self) -> Score:
        if self.accuracy is None and self.loss is not None:
            raise ValueError("accuracy is null, but the loss is a number")
        return self


class ExtraTest(Block):
    plug_in: Score
    proxy: Score | None = None


class Selection(Block):
    rule: str
    round: Annotated[int, Field(ge=-1)]


class PerClient(Block):
    mean: Share
    std: Share
    worst_tenth: Share
    values: list[Share] = []


class Accuracy(Block):
    plug_in: Score | None = None
    proxy: Score | None = None
    untouched: Score | None = None
    gap: Annotated[float, Field(ge=-1, le=1)] | None = None
    selection: Selection | None = None
    validation: dict[str, Share | None] = {}
    per_client: PerClient | None = None
    unavailable: str | None = None
    test_name: str | None = None
    extra_tests: dict[str, ExtraTest] | None = None

    @model_validator(mode="after")
    def _named(self) -> Accuracy:
        if self.plug_in is None and not self.unavailable:
            raise ValueError("neither plug_in has a score nor unavailable a reason why there is none")
        if self.plug_in is not None and self.selection is None:
            raise ValueError("selection is missing, so nobody knows which round was scored")
        if self.extra_tests and not self.test_name:
            raise ValueError("test_name is missing beside extra_tests")
        return self


class Kind(Block):
    bytes: Count


class Direction(Block):
    bytes: Count
    by_kind: dict[str, Kind]


class RoundBytes(Block):
    round: Count
    up: Count
    down: Count


class Communication(Block):
    up: Direction
    down: Direction
    setup_bytes: Count
    refused: list[Any] = []
    per_round: list[RoundBytes]


class Errors(Block):
    error: Size | None


class Point(Block):
    zero_filled: Errors


class GradientError(Block):
    points: list[Point]
    start: Size | None
    mean: Size | None
    final: Size | None


class Shares(Block):
    all: Share
    without_embeddings: Share


class Exposure(Block):
    verbatim: Shares
    within_1_percent: Shares


class Compute(Block):
    trainable_parameters: Count | None = None
    resident_parameters: Count | None = None
    local_steps: Count | None = None
    step_flops: Count | None = None
    peak_memory_bytes: Count | None = None
    seconds: dict[str, Size] = {}


class Refused(Block):
    client: int
    reason: str


class Round(Block):
    round: Count
    cohort: list[Count]
    arrived: list[Count]
    refused: list[Refused]
    loss: Finite | None = None
    bytes_up: Count | None = None
    bytes_down: Count | None = None
    plug_in_validation: Share | None = None
    proxy_validation: Share | None = None


class Rounds(Block):
    rounds: list[Round]


class Skew(Block):
    mean_total_variation: Share
    gini: Size


class Partition(Block):
    sizes: Annotated[list[Count], Field(min_length=1)]
    label_counts: list[list[Count]] = []
    skew: Skew | None = None


class Git(Block):
    commit: str
    dirty: bool


class Provenance(Block):
    fedbench: str | None = None
    git: Git | None = None
    notes: list[str] = []
    fm: dict[str, Any] = {}


BLOCKS: dict[str, type[Block]] = {
    "error": Error,
    "identity": Identity,
    "scenario": Scenario,
    "method": Method,
    "accuracy": Accuracy,
    "communication": Communication,
    "gradient_error": GradientError,
    "exposure": Exposure,
    "compute": Compute,
    "partition": Partition,
    "provenance": Provenance,
}
"""By name of the field of a record; its rounds are `Round`s."""
