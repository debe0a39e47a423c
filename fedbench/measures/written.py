"""Answers that a model writes, word by word the likeliest next, against those of the data."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import torch
from torch import nn

from fedbench.data.answers import References
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.machine.workers import fork_map
from fedbench.models.answering import writing
from fedbench.records.text import pack_correct

NUMBER = re.compile(r"####\s*\$?(-?[0-9][0-9.,]*)")
"""GSM8K's (Cobbe et al. 2021): the answer stands behind four hashes."""


def check_scores(scores: Sequence[str]) -> None:
    """Raise FedbenchError where the library of a score is not installed."""
    if "rouge_l" in scores:
        _rouge()


def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise FedbenchError(
            'objective.scores: rouge_l needs the package rouge-score; pip install "fedbench[generation]"'
        ) from None
    return RougeScorer(["rougeL"], use_stemmer=False)


def write(model: nn.Module, asked: References, tokenizer: Any, size: int, execution: Execution) -> list[str]:
    """The model's answer to each prompt: greedy, with a cache of keys and values, in batches of `size` prompts.

    Batches are of prompts of like length, padded on the left. An answer ends before the first of the tokens and texts
    that end one, or after `new_tokens`.
    """
    from transformers import GenerationConfig

    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=asked.new_tokens,
        use_cache=True,
        pad_token_id=int(tokenizer.pad_token_id),
        eos_token_id=list(asked.stops),
    )
    order = np.argsort([len(prompt) for prompt in asked.prompts], kind="stable")
    batches = [order[start : start + size] for start in range(0, len(order), size)]

    def answer(rows: np.ndarray) -> list[list[int]]:
        prompts = [asked.prompts[i] for i in rows]
        width = max(map(len, prompts))
        ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
        mask = torch.zeros_like(ids)
        for row, own, prompt in zip(ids, mask, prompts, strict=True):
            row[width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            own[width - len(prompt) :] = 1
        ids, mask = ids.to(execution.device), mask.to(execution.device)
        with torch.inference_mode(), execution.autocast():
            found = whole.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
        out: list[list[int]] = found[:, width:].tolist()
        return out

    model.eval()
    texts = [""] * len(order)
    with writing(model) as whole:
        costs = [float(sum(len(asked.prompts[i]) for i in b) + asked.new_tokens * len(b)) for b in batches]
        for number, rows in fork_map(answer, batches, execution.workers, costs):
            for i, ids in zip(batches[number].tolist(), rows, strict=True):
                texts[i] = _text(ids, asked, tokenizer)
    return texts


def _text(ids: Sequence[int], asked: References, tokenizer: Any) -> str:
    end = next((place for place, token in enumerate(ids) if token in asked.stops), len(ids))
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=False)
    for mark in asked.ends:
        text = text.partition(mark)[0]
    return text


def scores_of(texts: Sequence[str], asked: References, rows: bool) -> dict[str, Any]:
    """The record's block of written answers: the mean of each score and, with `rows`, what it is of each row."""
    out: dict[str, Any] = {}
    if "exact_match" in asked.scores:
        hits = np.array([matches(text, answer, asked.match) for text, answer in zip(texts, asked.answers, strict=True)])
        out["exact_match"] = float(hits.mean())
        if rows:
            out["exact"] = pack_correct(hits)
    if "rouge_l" in asked.scores:
        scorer = _rouge()
        found = [
            scorer.score(answer, text)["rougeL"].fmeasure for text, answer in zip(texts, asked.answers, strict=True)
        ]
        found = [round(float(value), 6) for value in found]
        out["rouge_l"] = float(np.mean(found))
        if rows:
            out["rouge_l_rows"] = found
    return out


def matches(text: str, answer: str, match: str) -> bool:
    """Whether a written answer is the one of the data.

    words: in lower case, without punctuation and the articles a, an and the, and with single spaces (SQuAD's rule,
    Rajpurkar et al. 2016). number: the one behind `####`, as a number; without one the answer is wrong.
    """
    if match == "number":
        found, wanted = number_in(text), number_in(answer)
        return found is not None and found == wanted
    return _words(text) == _words(answer)


def _words(text: str) -> str:
    plain = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def number_in(text: str) -> Decimal | None:
    """The number behind the first `####`, commas between its digits left out; None where there is none."""
    found = NUMBER.search(text)
    if found is None:
        return None
    digits = found[1].replace(",", "").rstrip(".")
    return Decimal(digits) if re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", digits) else None
