"""What rows of language are scored by beside their next tokens, for a decoder: choices, or answers it is to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
from torch import nn

from fedbench.data.answers import Choices, References
from fedbench.data.rows import Chat, Part
from fedbench.errors import FedbenchError
from fedbench.models.conversation import NothingAsked, chats_of, has_template, pieces, tokens_of, written_as_tokens
from fedbench.models.decoder import VOCABULARY, NextToken
from fedbench.models.foundation import FoundationModel
from fedbench.scenario.tables import ObjectiveSettings

QUESTION = "is it?"


def answers_for(
    part: Part, fm: FoundationModel, max_length: int, objective: ObjectiveSettings
) -> Choices | References | None:
    """What these rows are scored by, where they have choices or the objective asks for scores of written answers.

    Raises NothingAsked for rows too long for `max_length`, and FedbenchError for rows without answers.
    """
    if part.choices is not None:
        return _choices(part, fm, max_length)
    return _references(part, fm, max_length, objective) if objective.scores else None


def _choices(part: Part, fm: FoundationModel, max_length: int) -> Choices:
    """Question and choice are written as a conversation; what the template puts behind a choice is not scored."""
    assert part.texts is not None and part.choices is not None
    given, texts = [], []
    for question, choices in zip(part.texts, part.choices, strict=True):
        split = [_question_and_answer(fm.processor, question, choice) for choice in choices]
        given.append(split[0][0])
        texts.append([answer for _, answer in split])
    questions = [np.array(ids, dtype=np.int32) for ids in tokens_of(fm.processor, given, False)]
    every = tokens_of(fm.processor, [text for row in texts for text in row], False)
    tokens = [
        [np.concatenate([question, np.array(next(every), dtype=np.int32)]) for _ in row]
        for question, row in zip(questions, texts, strict=True)
    ]
    _fit([max(map(len, row)) for row in tokens], max_length, "question and choice have")
    letters = [[len(choice) for choice in choices] for choices in part.choices]
    return Choices(tokens, [len(question) for question in questions], letters, part.labels)


def _question_and_answer(tokenizer: Any, question: str, answer: str) -> tuple[str, str]:
    """A question as it is written up to the first letter of the answer, and the answer."""
    (before, _), (after, _) = pieces(tokenizer, (("user", question), ("assistant", answer)))
    words = answer.strip()
    start = after.find(words)
    if start < 0:
        raise FedbenchError("the tokenizer's chat template rewrites answers; give the model another template")
    return before + after[:start], words


def _fit(lengths: Sequence[int], max_length: int, what: str) -> None:
    """Raise NothingAsked for rows longer than `max_length` tokens."""
    if long := [i for i, length in enumerate(lengths) if length > max_length]:
        raise NothingAsked(
            f"{len(long)} of {len(lengths)} rows are too long, row {long[0] + 1} first: {what} {lengths[long[0]]} "
            f"tokens; raise dataset.max_length ({max_length}), or leave such rows of your own out with "
            'bad_rows = "drop"',
            long,
        )


def _references(part: Part, fm: FoundationModel, max_length: int, objective: ObjectiveSettings) -> References:
    """Of each conversation all that comes before its last answer, and that answer."""
    chats = chats_of(part)
    if chats is None:
        raise FedbenchError("objective.scores: compare answers, and these rows are texts without; leave scores out")
    answers = [chat[-1][1] for chat in chats]
    written = written_as_tokens(fm.processor, chats)
    prompts = [np.array([token for ids, _ in row[:-1] for token in ids], dtype=np.int32) for row in written]
    _fit([len(prompt) for prompt in prompts], max_length, "what comes before the answer has")
    longest = max(map(len, prompts)) + objective.new_tokens
    if longest > (room := fm.positions()):
        raise FedbenchError(
            f"objective.new_tokens: the longest prompt with {objective.new_tokens} new tokens has {longest}, but FM "
            f"{fm.name} has positions for {room}; lower it, or dataset.max_length"
        )
    stops, ends = _ends(fm.processor, answers)
    return References(prompts, answers, objective.scores, objective.match, objective.new_tokens, stops, ends)


def _ends(tokenizer: Any, answers: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The tokens and the texts that end an answer: the one that ends texts, and what the template puts behind answers.

    A template may put nothing but a line end there. Where answers of the data have line ends themselves, an answer then
    ends where the next turn begins.
    """
    stops = [int(tokenizer.eos_token_id)]
    if not has_template(tokenizer):
        return tuple(stops), ()
    chat: Chat = (("user", QUESTION), ("assistant", QUESTION))
    _, (after, _) = pieces(tokenizer, chat)
    tail = after[after.rfind(QUESTION) + len(QUESTION) :]
    if mark := tail.strip():
        ids = tokenizer(mark, add_special_tokens=False)["input_ids"]
        return tuple(dict.fromkeys([*stops, *(ids if len(ids) == 1 else [])])), (mark,)
    if tail and any(tail in answer.strip() for answer in answers):
        turn = pieces(tokenizer, (*chat, *chat))[2][0]
        tail += turn[: turn.find(QUESTION)]
    return tuple(stops), (tail,) if tail else ()


@contextmanager
def writing(model: nn.Module) -> Iterator[Any]:
    """Inside the block a `NextToken` is the language model of transformers that it was made of, which can write.

    Tied embeddings are its vocabulary's matrix again, the very tensor.
    """
    own = type(model)
    if not issubclass(own, NextToken):
        raise FedbenchError("a model without a head for its vocabulary writes no answers")
    lent = not hasattr(model, VOCABULARY)
    if lent:
        embeddings = cast(Any, model.get_submodule(str(model.base_model_prefix))).get_input_embeddings().weight
        vocabulary, width = embeddings.shape
        head = nn.Linear(width, vocabulary, bias=False, device="meta")
        head.weight = embeddings
        setattr(model, VOCABULARY, head)
    model.__class__ = own.__bases__[1]
    try:
        yield model
    finally:
        model.__class__ = own
        if lent:
            delattr(model, VOCABULARY)
