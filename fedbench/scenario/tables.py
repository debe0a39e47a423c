"""The tables of a scenario, with what each setting may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError


class Settings(BaseModel):
    """A table of a scenario file: immutable, unknown fields forbidden, numbers finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    later: ClassVar[frozenset[str]] = frozenset()
    """Fields that say nothing at their defaults, so that keys of runs from before there were any stay as they are."""

    @model_serializer(mode="wrap")
    def _said(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        said: dict[str, Any] = handler(self)
        unsaid = {name for name in self.later if getattr(self, name) == type(self).model_fields[name].default}
        return {name: value for name, value in said.items() if name not in unsaid}


Texts = str | tuple[str, ...]
"""One name or several of them."""


class DatasetSettings(Settings):
    """The data set: `name` of a loader, `revision` pinned on the hub, token limit, and how many rows to use.

    validation: rows held out of train for selection and probes, or files with them. train_rows, test_rows: caps, drawn
    by a fixed stream that does not depend on the seed; None takes all.

    A data set of the user's own has a `kind` instead of the name of a loader, and says where its rows are. train, test:
    files, as glob patterns relative to the scenario's file; of a `hub` data set (with its `configuration`) the names of
    splits. test_share: share of the training rows that is held out where there is no test. text: the column, or
    columns: of pairs the two segments, else what is joined with a space. text2: the second segment of pairs. image: the
    column of images in tables. label: the column of labels. client: the column, or columns, that say whose a row is.
    header: whether tables in CSV and TSV begin with the names of columns, which are numbers from 1 otherwise.
    encoding: of text files; None for UTF-8, or what is recognised. classes: names of the classes in the order of their
    numbers; none takes what the training rows hold. bad_rows: what becomes of rows that cannot be used.

    Of chats, text is the column of their turns, or with an answer, the column of that, those of the prompt; left out,
    what is recognised. choices: the column of the lists of answers to choose from, or the columns of one each.

    folders: names of the data set's folder below --data-dir, from which on files are then named; where there is none,
    `hub` has the rows, in splits called train and test. origin: where the files are to be had, for a message. windows:
    rows are LEAF's windows that slide over a text (x, and the character after it, y), of which the text is put together
    again, in pieces of so many characters.
    """

    later: ClassVar[frozenset[str]] = frozenset(
        [
            "kind",
            "train",
            "test",
            "hub",
            "configuration",
            "test_share",
            "text",
            "text2",
            "image",
            "label",
            "client",
            "header",
            "encoding",
            "classes",
            "bad_rows",
            "answer",
            "choices",
            "folders",
            "origin",
            "windows",
        ]
    )

    kind: Literal["text", "pairs", "images", "chat", "choices"] | None = None
    name: str = Field("", validate_default=True)
    revision: str | None = None
    max_length: int = Field(64, ge=4)
    validation: int | str = 400
    train_rows: int | None = Field(None, ge=1)
    test_rows: int | None = Field(None, ge=1)
    train: Texts = ()
    test: Texts = ()
    hub: str | None = None
    configuration: str | None = None
    test_share: float = Field(0.2, gt=0, lt=1)
    text: Texts = "text"
    text2: str | None = None
    image: str = "image"
    label: str = "label"
    client: Texts = ()
    header: bool = True
    encoding: str | None = None
    classes: tuple[str, ...] = ()
    bad_rows: Literal["error", "drop"] = "error"
    answer: str | None = None
    choices: Texts = "choices"
    folders: tuple[str, ...] = ()
    origin: str | None = None
    windows: int | None = Field(None, ge=8)

    @field_validator("name")
    @classmethod
    def _named(cls, name: str, info: ValidationInfo) -> str:
        if not name and info.data.get("kind") is None:
            raise PydanticCustomError("missing", "Field required")
        return name or "own"

    @field_validator("validation", mode="before")
    @classmethod
    def _rows_or_files(cls, validation: Any) -> Any:
        if isinstance(validation, int) and not isinstance(validation, bool) and validation < 1:
            raise ValueError("input should be greater than or equal to 1")
        if isinstance(validation, bool) or not isinstance(validation, (int, str)) or validation == "":
            raise ValueError("input should be a valid integer, or the files of a data set of your own")
        return validation

    @model_validator(mode="after")
    def _whole(self) -> DatasetSettings:
        own = self.later - {"kind"}
        if self.kind is None:
            given = sorted(own & self.model_fields_set)
            given += ["validation"] if isinstance(self.validation, str) else []
            if given:
                raise ValueError(f"{given[0]} is for data sets of your own, which have a kind")
        elif not self.train:
            raise ValueError("a data set of your own needs train, its files")
        elif self.kind == "pairs" and len(self.segments) != 2:
            raise ValueError('pairs need two columns: text = ["first", "second"]')
        elif self.kind != "pairs" and self.text2 is not None:
            raise ValueError('text2 is for kind = "pairs"')
        elif self.kind != "chat" and self.answer is not None:
            raise ValueError('answer is for kind = "chat"')
        elif self.windows is not None and (self.kind != "text" or not self.client):
            raise ValueError('windows is for kind = "text" with a client')
        elif self.kind != "choices" and "choices" in self.model_fields_set:
            raise ValueError('choices is for kind = "choices"')
        elif self.hub is None and (self.revision or self.configuration):
            raise ValueError("revision and configuration are for a data set of the hub; name it in hub")
        return self

    @property
    def segments(self) -> tuple[str, ...]:
        """The columns of text, in order."""
        return (*listed(self.text), *([self.text2] if self.text2 else []))


def listed(names: Texts) -> tuple[str, ...]:
    """One name, or several, as several."""
    return (names,) if isinstance(names, str) else names


class PublicSettings(Settings):
    """The public corpus: `name` of a corpus, at most `rows` of it. in_domain: whether it is the clients' own domain."""

    name: str
    rows: int | None = Field(None, ge=1)
    in_domain: bool = False


class SplitSettings(Settings):
    """How training rows are divided over `clients`; alpha belongs to the Dirichlet kinds, shards to "shards".

    dirichlet: per class over clients. dirichlet-clients: per client over classes, equal sizes, prior-weighted.
    quantity: label-blind, Dirichlet over sizes. min_size: fewest rows a client may have.

    natural: clients are those of the data. by: the column, or columns, that say whose a row is; none takes what the
    data set names as its clients. Clients with fewer than min_size rows are left out, or, with group_small, put
    together until they have as many. max_clients: at most so many, a fixed draw. unseen_clients: how many more never
    train, but are a further test set. `clients` is not set; it becomes how many there are.
    """

    later: ClassVar[frozenset[str]] = frozenset({"by", "max_clients", "group_small", "unseen_clients"})

    kind: Literal["iid", "dirichlet", "dirichlet-clients", "shards", "quantity", "natural"]
    clients: int = Field(-1, ge=0, validate_default=True)
    alpha: float = Field(0.5, gt=0, le=1e9)  # shares are equal long before; draws overflow at 1e308
    shards_per_client: int = Field(2, ge=1)
    min_size: int = Field(1, ge=1)
    by: Texts = ()
    max_clients: int | None = Field(None, ge=1)
    group_small: bool = False
    unseen_clients: int = Field(0, ge=0)

    @field_validator("clients", mode="before")
    @classmethod
    def _counted(cls, clients: Any, info: ValidationInfo) -> Any:
        missing = type(clients) is int and clients == -1
        if info.data.get("kind") == "natural":
            if not missing:
                raise ValueError("a natural split has the clients of its data; split.max_clients limits them")
            return 0
        if missing:
            raise PydanticCustomError("missing", "Field required")
        if type(clients) is int and clients < 1:
            raise ValueError("input should be greater than or equal to 1")
        return clients

    @model_validator(mode="after")
    def _natural(self) -> SplitSettings:
        if self.kind != "natural" and (given := sorted(self.later & self.model_fields_set)):
            raise ValueError(f'{given[0]} is for kind = "natural"')
        return self


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

    scores: of answers that the model writes to the prompts of test rows, at most new_tokens each. match: how an exact
    match is told, by words or by the number behind `####`.
    """

    later: ClassVar[frozenset[str]] = frozenset({"scores", "new_tokens", "match"})

    kind: Literal["language"]
    loss_on: Literal["answers", "all"] = "answers"
    normalised: Literal["row", "batch"] = "row"
    scores: tuple[Literal["exact_match", "rouge_l"], ...] = ()
    new_tokens: int = Field(64, ge=1)
    match: Literal["words", "number"] = "words"


class PrivacySettings(Settings):
    """Differential privacy of a client's rows as a whole (DP-FedAvg, McMahan et al. 2018), over any method of sums.

    clip: largest L2 norm of what a client's update changes; a larger one is scaled down. noise: standard deviation of
    the Gaussian noise that the server adds to the sum of the updates, as a multiple of `clip`. delta: at which epsilon
    is given.
    """

    clip: float = Field(gt=0)
    noise: float = Field(ge=0)
    delta: float = Field(1e-5, gt=0, lt=1)


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
    objective: ObjectiveSettings | None = Field(None, validate_default=True)
    privacy: PrivacySettings | None = None
    methods: dict[str, dict[str, Any]] = Field(default_factory=dict)
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)
    _folder: Path = PrivateAttr(default_factory=Path)

    @field_validator("objective")
    @classmethod
    def _asked(cls, objective: ObjectiveSettings | None, info: ValidationInfo) -> ObjectiveSettings | None:
        kind = info.data["dataset"].kind if "dataset" in info.data else None
        if objective is None and kind in ("chat", "choices"):
            raise ValueError(f'rows of kind = "{kind}" need a table [objective] with kind = "language"')
        return objective

    @property
    def folder(self) -> Path:
        """Where the scenario's file lies; the files of a data set of the user's own are named from there."""
        return self._folder

    def identity(self) -> dict[str, Any]:
        """What enters a run's key: everything but the title and the settings of methods, which the method holds.

        Of rows of the user's own their content enters the key by its hash, and not where they lie.
        """
        # What older keys know nothing of stays out where it is not set.
        unset = {name for name in ("privacy", "objective") if getattr(self, name) is None}
        out = self.model_dump(mode="json", exclude={"title", "methods", *unset})
        if self.dataset.kind is not None:
            places = (
                "train",
                "test",
                "folders",
                "origin",
                *(["validation"] if isinstance(self.dataset.validation, str) else []),
            )
            out["dataset"] = {name: value for name, value in out["dataset"].items() if name not in places}
        return out

    def provenance(self) -> dict[str, tuple[Any, str]]:
        """Dotted key -> (value, where it came from), for every setting."""
        unset = {"privacy"} if self.privacy is None else set()
        flat = flatten(self.model_dump(mode="json", exclude=unset))
        hidden = {"name"}
        if self.split.kind == "natural":
            hidden |= {"split.clients", "split.alpha", "split.shards_per_client"}  # of drawn clients
        return {key: (value, self._sources.get(key, "default")) for key, value in flat.items() if key not in hidden}


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
            ("privacy", PrivacySettings),
        )
        for name in kind.model_fields
    ),
)
"""Every dotted key a scenario can have, but for the hyper-parameters of methods."""
