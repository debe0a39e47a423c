"""Rows of language as a decoder reads them: texts and conversations, and which of their tokens are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fedbench.data.examples import Examples
from fedbench.data.rows import Chat, Part
from fedbench.errors import FedbenchError
from fedbench.models.foundation import FoundationModel
from fedbench.objectives.base import IGNORED, Objective
from fedbench.objectives.language import without_given

CHUNK = 8192
"""Texts tokenised at once: a tokenizer's answer takes many times the memory of the arrays made of it."""


class NothingAsked(FedbenchError):
    """Rows of which no token is asked for within their length; `rows`: their numbers."""

    def __init__(self, message: str, rows: list[int]) -> None:
        super().__init__(message)
        self.rows = rows


def encode_language(
    part: Part, fm: FoundationModel, max_length: int, objective: Objective, answers_only: bool
) -> Examples:
    """Tokens and targets of texts, or of conversations, for this decoder.

    A conversation is the row's own; or a prompt (`texts`) with its answer, which is `text_pairs` or the right one of
    `choices`. A text begins as the tokenizer begins it and ends with the token that ends texts. A conversation is
    written as the tokenizer's chat template says; where it has none, a turn a line, and each answer ends with the token
    that ends texts. answers_only: whether of conversations the tokens of answers alone are asked for. A row keeps its
    first `max_length` tokens. Raises NothingAsked for rows that then have nothing left to ask for, and FedbenchError
    for data without texts.
    """
    if part.texts is None:
        raise FedbenchError(f"FM {fm.name} predicts the next token of a text, the data set holds images")
    tokens: list[np.ndarray] = []
    asked: list[np.ndarray] = []
    if (chats := chats_of(part)) is None:
        tokens = [np.array([*ids, fm.processor.eos_token_id]) for ids in tokens_of(fm.processor, part.texts, True)]
        asked = [np.ones(len(row), dtype=bool) for row in tokens]
    else:
        for row in written_as_tokens(fm.processor, chats):
            tokens.append(np.array([token for ids, _ in row for token in ids]))
            asked.append(np.repeat([answer or not answers_only for _, answer in row], [len(ids) for ids, _ in row]))
    tokens = [row[:max_length].astype(np.int32) for row in tokens]
    targets = without_given(objective.targets(part.labels, tokens), [row[:max_length] for row in asked])
    if empty := np.flatnonzero((targets == IGNORED).all(1).numpy()).tolist():
        raise NothingAsked(
            f"{len(empty)} of {len(tokens)} rows have no token to predict, row {empty[0] + 1} first: no answer is left "
            f"within {max_length} tokens; raise dataset.max_length, or leave such rows of your own out with "
            'bad_rows = "drop"',
            empty,
        )
    pad_token = int(fm.processor.pad_token_id)
    return Examples(targets, tokens, None, pad_token, objective=objective.name)


def chats_of(part: Part) -> Sequence[Chat] | None:
    """The rows as conversations; None for plain texts."""
    if part.chats is not None:
        return part.chats
    answers = part.text_pairs
    if part.choices is not None:
        answers = [choices[right] for choices, right in zip(part.choices, part.labels.tolist(), strict=True)]
    if answers is None:
        return None
    assert part.texts is not None
    return [(("user", prompt), ("assistant", answer)) for prompt, answer in zip(part.texts, answers, strict=True)]


def tokens_of(tokenizer: Any, texts: Sequence[str], special: bool) -> Iterator[list[int]]:
    """The tokens of each text. special: whether it begins as the tokenizer begins a row."""
    for start in range(0, len(texts), CHUNK):
        yield from tokenizer(list(texts[start : start + CHUNK]), add_special_tokens=special)["input_ids"]


def written_as_tokens(tokenizer: Any, chats: Sequence[Chat]) -> Iterator[list[tuple[list[int], bool]]]:
    """The tokens of each conversation in pieces, and of each piece whether it is an answer."""
    end = [] if has_template(tokenizer) else [int(tokenizer.eos_token_id)]
    rows = [pieces(tokenizer, chat) for chat in chats]
    found = tokens_of(tokenizer, [text for row in rows for text, _ in row], False)
    for row in rows:
        yield [(next(found) + (end if answer else []), answer) for _, answer in row]


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer says how conversations are written."""
    return bool(getattr(tokenizer, "chat_template", None))


def pieces(tokenizer: Any, chat: Chat) -> list[tuple[str, bool]]:
    """A conversation as text in pieces, and of each whether it is an answer.

    Raises FedbenchError for a template that refuses it, or that writes its beginning in another way once more follows.
    """
    if not has_template(tokenizer):
        return [(words, True) if role == "assistant" else (f"{words}\n", False) for role, words in chat]
    turns = [{"role": role, "content": words} for role, words in chat]
    out: list[tuple[str, bool]] = []
    done = ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, whole = _written(tokenizer, turns[:i], True), _written(tokenizer, turns[: i + 1], False)
        if not (before.startswith(done) and whole.startswith(before)):
            raise FedbenchError(
                "the tokenizer's chat template writes a prompt in another way once it is answered; give the model "
                "another template, or rows of text"
            )
        out += [(before[len(done) :], False), (whole[len(before) :], True)]
        done = whole
    return out


def _written(tokenizer: Any, turns: Sequence[dict[str, str]], answer_follows: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_follows)
    except Exception as error:  # templates are programs, which raise what they like
        why = " ".join(str(error).split())[:160]
        roles = ", ".join(turn["role"] for turn in turns[:6])
        raise FedbenchError(f"the tokenizer's chat template takes no turns of {roles}: {why}") from None
    return text
