"""The blocks of a record: what each field holds, its type and its range.

Shares are from 0 to 1, sizes in bytes, losses in nats, times in seconds. A number that does not exist, or was not
finite, is null.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, StringConstraints, model_validator

from fedbench.records.fields import ROWS, Block, Count, Finite, Gap, Key, Name, Positive, Share, Size

SCHEMA = 2
"""The schema of records that are made now."""

READABLE = (1, 2)
"""Schemas that are read: of the first, keys hold the FM as it was given, a path perhaps, and no `inputs_hash`."""


class Failure(Block):
    """Why a run failed."""

    type: str  # of the exception
    message: str
    traceback: str | None = None  # files from their import folder on


class Identity(Block):
    """What was run, by names and hashes."""

    key: Key  # SHA-256 of everything that decides the result
    method: Name
    scenario: Name
    seed: Annotated[int, Field(ge=0)]
    method_version: int | str | None = None
    fm: Annotated[str, StringConstraints(max_length=4096)] | None = None  # what it is called
    data_hash: str | None = None
    fm_hash: str | None = None
    inputs_hash: str | None = None  # of what the FM's tokenizer or image settings made of the data; since schema 2
    precision: str | None = None


class Split(Block):
    """How rows were divided over clients; holds all settings of the scenario's split."""

    clients: Positive


class Federation(Block):
    """The schedule; holds all settings of the scenario's federation."""

    rounds: Count
    fraction: Share | None = None
    local_epochs: Positive | None = None
    max_steps: Positive | None = None


class Public(Block):
    """The public corpus; holds all settings of the scenario's public rows."""

    in_domain: bool = False


class Scenario(Block):
    """The settings of the scenario as they were resolved. Further tables of settings are kept as they are."""

    name: Name | None = None
    title: str = ""
    fm: str | None = None
    dataset: dict[str, Any] | None = None
    split: Split | None = None
    federation: Federation | None = None
    evaluation: dict[str, Any] | None = None
    public: Public | None = None


class Method(Block):
    """The method and its settings."""

    needed: ClassVar[tuple[str, ...]] = ("name",)

    name: Name | None = None
    version: int | str | None = None
    settings: dict[str, Any] = {}
    planned: list[str] | None = None  # dotted settings of the scenario that the method changes by its nature


class Score(Block):
    """A model's answers to a test set."""

    accuracy: Share | None
    macro_f1: Share | None = None
    perplexity: Annotated[float, Field(ge=1)] | None = None  # e to the mean loss of a token, of a language objective
    tokens: Positive | None = None  # that were asked for, of which accuracy is the share that is right
    acc_norm: Share | None = None  # of multiple choice: accuracy of the choice that is likeliest a character
    exact_match: Share | None = None  # of answers that the model wrote: share that is the data's
    rouge_l: Share | None = None  # of such answers: mean F1 of the longest common subsequence of words
    loss: Finite | None = None  # null where it was not finite
    rows: Annotated[int, Field(ge=1, le=ROWS)]
    correct: str | None = None  # which rows were answered rightly: packed bits in base64
    correct_norm: str | None = None  # the same by the choice that is likeliest a character
    exact: str | None = None  # the same of answers that the model wrote
    rouge_l_rows: list[Share] | None = None  # by row, to six digits

    @model_validator(mode="after")
    def _scored(self) -> Score:
        if self.accuracy is None and self.loss is not None:
            raise ValueError("accuracy is null, but the loss is a number")
        return self

    @property
    def diverged(self) -> bool:
        """Whether the model's loss was not a finite number: its answers are then no answers."""
        return "loss" in self.model_fields_set and self.loss is None


class ExtraTest(Block):
    """Scores on a further test set."""

    plug_in: Score
    proxy: Score | None = None


class Selection(Block):
    """Which round was scored on the test set."""

    rule: str  # "last" or "best"
    round: Annotated[int, Field(ge=-1)]  # -1: the model as it started


class Validation(Block):
    """Accuracy on the validation rows after the round that was scored."""

    plug_in: Share | None = None
    proxy: Share | None = None


class PerClient(Block):
    """Accuracy by client: on its own test rows, or the test accuracy as a client of its label shares would see it."""

    mean: Share
    std: Share
    worst_tenth: Share  # mean of the lowest tenth of the clients
    values: list[Share] = []  # by client, to six digits
    rows: list[Positive] | None = None  # own test rows of each of these clients; null where values are by label shares


class Personal(PerClient):
    """Accuracy of clients' own models, each on test rows of its own: not to be compared with that of one model for all.

    `rows` and `values` are by client that has a model.
    """

    drawn: bool  # whether the rows were drawn from the test set in the clients' label shares; else they are their own
    without: Count  # clients without a model, for want of training


class Accuracy(Block):
    """What came out."""

    selection: Selection | None = None
    plug_in: Score | None = None  # the FM with the tuned parameters plugged in
    proxy: Score | None = None  # the model that clients train, where that is not the FM
    untouched: Score | None = None  # the FM as it came, where it has a head for the task
    gap: Gap | None = None  # plug_in minus proxy
    validation: Validation = Validation()
    per_client: PerClient | None = None
    personal: Personal | None = None  # of clients' own models, where a method makes some
    unavailable: str | None = None  # why there is nothing to score
    test_name: str | None = None  # of the first test set, where there are several
    extra_tests: dict[str, ExtraTest] | None = None  # by name of the test set

    @model_validator(mode="after")
    def _named(self) -> Accuracy:
        if self.empty:
            return self
        if self.plug_in is None and not self.unavailable and self.personal is None:
            raise ValueError("neither plug_in has a score nor unavailable a reason why there is none")
        if (self.plug_in or self.personal) is not None and self.selection is None:
            raise ValueError("selection is missing, so nobody knows which round was scored")
        if self.extra_tests and not self.test_name:
            raise ValueError("test_name is missing beside extra_tests")
        return self

    @property
    def diverged(self) -> bool:
        """Whether the FM with the tuned parameters plugged in diverged."""
        return self.plug_in is not None and self.plug_in.diverged


class Kind(Block):
    """Messages of one kind in one direction."""

    bytes: Count
    elements: Count | None = None
    messages: Count | None = None


class Direction(Block):
    """What crossed in one direction, over all clients and rounds."""

    bytes: Count
    by_kind: dict[str, Kind]


class RoundBytes(Block):
    """Bytes of one round."""

    round: Count
    up: Count
    down: Count


class Communication(Block):
    """What crossed between server and clients, in bytes of payload."""

    needed: ClassVar[tuple[str, ...]] = ("up", "down", "setup_bytes", "per_round")

    up: Direction | None = None
    down: Direction | None = None  # set-up included
    setup_bytes: Count | None = None  # first download of a model by each client
    refused: list[Any] = []  # uploads the server did not take: round, client, reason
    per_round: list[RoundBytes] | None = None


class Gradient(Block):
    """A gradient on the proxy against the FM's: relative norm of the difference, and cosine."""

    error: Size | None
    cosine: Finite | None = None


class LayerGradient(Gradient):
    """Of one layer of the FM."""

    layer: Count


class Point(Block):
    """Gradient error at one moment of a run."""

    round: Annotated[int, Field(ge=-1)] | None = None  # -1: before the first
    phase: str | None = None  # "start", "round", "before_alignment", "after_alignment"
    zero_filled: Gradient  # over all of the FM's tunables; those the proxy lacks count as zero
    restricted: Gradient | None = None  # over the proxy's tunables
    lora: Gradient | None = None
    head: Gradient | None = None
    layers: list[LayerGradient] = []


class GradientError(Block):
    """How far the gradient that clients compute on the proxy is from the FM's; the three numbers are zero-filled."""

    points: list[Point]
    start: Size | None
    mean: Size | None
    final: Size | None


class AggregationPoint(Block):
    """After one round, against the mean of the products B A that its clients trained: relative Frobenius norms."""

    round: Count
    factors: Size | None  # of the product of the means of B and of A
    model: Size | None  # of what the FM with the tuned parameters has gained


class AggregationError(Block):
    """How far the aggregated model is from the mean of what clients trained; the two numbers are of the model."""

    points: list[AggregationPoint]
    mean: Size
    final: Size


class Privacy(Block):
    """Differential privacy that a run gives: of what, how it was made, and what it comes to."""

    unit: str  # "client": all rows of one
    neighbours: str
    clip: Size  # L2 norm of a client's update
    noise: Size  # standard deviation on the sum of updates, as a multiple of clip
    sampling: str
    clients: Positive
    cohort: Positive
    rounds: Count
    delta: Share
    epsilon: Size | None  # null without noise
    accountant: str


class Residual(Block):
    """What distillation left between a layer of the FM and the proxy's, and what was there before it."""

    layer: Count | None = None
    hidden: Finite | None = None  # of hidden states
    weight: Finite | None = None  # of weights
    hidden_before: Finite | None = None
    weight_before: Finite | None = None
    curve: list[Finite] = []  # hidden, as means of up to ten stretches of the distillation, in order


class Shares(Block):
    """Of the FM's frozen weights."""

    all: Share
    without_embeddings: Share


class Exposure(Block):
    """What share of the FM's weights a client ends up with."""

    verbatim: Shares
    within_1_percent: Shares


class Compute(Block):
    """What the run cost."""

    trainable_parameters: Count | None = None  # at a client, head included
    resident_parameters: Count | None = None  # held at a client, frozen ones included
    local_steps: Count | None = None  # of all clients and rounds
    step_flops: Count | None = None
    peak_memory_bytes: Count | None = None
    seconds: dict[str, Size] = {}  # by phase


class Refused(Block):
    """A client of a cohort whose upload was not taken."""

    client: int
    reason: str


class Round(Block):
    """One round: who took part, and what was measured after it."""

    round: Count
    cohort: list[Count]  # clients sampled
    arrived: list[Count]  # those whose upload was taken
    refused: list[Refused]
    lost: list[Count] = []  # those whose upload never came, as their silo gave no answer
    loss: Finite | None = None  # mean training loss of those that arrived
    bytes_up: Count | None = None
    bytes_down: Count | None = None
    bytes_up_by_client: list[Count] | None = None  # of each of the cohort, in its order
    bytes_down_by_client: list[Count] | None = None
    flops_by_client: list[Count | None] | None = None  # of its local training, padded; null where none or not known
    plug_in_validation: Share | None = None
    proxy_validation: Share | None = None


class Skew(Block):
    """How unlike the clients are."""

    mean_total_variation: Share  # of a client's label shares from those of all
    gini: Size  # of the clients' sizes
    mean_jensen_shannon: Share | None = None  # of a client's unigrams from those of all, in bits; of natural splits


class Partition(Block):
    """Which clients hold how many rows."""

    needed: ClassVar[tuple[str, ...]] = ("sizes",)

    hash: str | None = None
    sizes: Annotated[list[Count], Field(min_length=1)] | None = None  # rows by client
    label_counts: list[list[Count]] = []  # by client, then by class
    skew: Skew | None = None
    attempts: Count | None = None  # draws until every client had enough rows
    by: str | None = None  # the column whose cells are the clients, of natural splits
    clients_hash: str | None = None  # SHA-256 of that column


class Git(Block):
    """The commit that fedbench's source was at."""

    commit: str
    dirty: bool  # whether it was changed since


class Provenance(Block):
    """The environment the record was made in. Nothing of it enters the key."""

    fedbench: str | None = None  # version
    git: Git | None = None
    packages: dict[str, Any] = {}  # versions
    python: str | None = None
    platform: str | None = None
    device: str | None = None
    hardware: dict[str, Any] = {}
    threads: int | None = None
    deterministic_algorithms: bool | None = None
    executor: str | None = None
    host: str | None = None  # that held the two sides
    workers: int | None = None
    finished: str | None = None  # time in ISO 8601
    notes: list[str] = []  # on data, FM and what the server chose
    fm: dict[str, Any] = {}  # where it came from
    runtime: dict[str, Any] = {}  # what the host itself sent, and which silos it lost
