"""Rows of language as a decoder reads them: a text, or a prompt and its answer, and which tokens are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbench.data.examples import Examples
from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.models.foundation import FoundationModel
from fedbench.objectives.base import IGNORED, Objective
from fedbench.objectives.language import without_given


def encode_language(
    part: Part, fm: FoundationModel, max_length: int, objective: Objective, answers_only: bool
) -> Examples:
    """Tokens and targets of texts, or of prompts (`texts`) with their answers (`text_pairs`), for this decoder.

    A text begins as the tokenizer begins it and ends with the token that ends texts. Prompt and answer are written as
    the tokenizer's chat template says, one turn of a user and one of the assistant; where it has none, on two lines. A
    row keeps its first `max_length` tokens. Raises FedbenchError for rows that then have nothing left to ask for, and
    for data without texts.
    """
    if part.texts is None:
        raise FedbenchError(f"FM {fm.name} predicts the next token of a text, the data set holds images")
    if part.text_pairs is None:
        written = [("", text) for text in part.texts]
    else:
        written = [conversation(fm.processor, *row) for row in zip(part.texts, part.text_pairs, strict=True)]
    tokens, given = [], []
    for before, after in written:
        prompt = fm.processor(before, add_special_tokens=False)["input_ids"] if before else []
        ids = prompt + fm.processor(after, add_special_tokens=not before)["input_ids"]
        if not before or not _has_template(fm.processor):
            ids = [*ids, fm.processor.eos_token_id]
        tokens.append(np.asarray(ids[:max_length], dtype=np.int32))
        given.append(len(prompt) if answers_only else 0)
    targets = without_given(objective.targets(part.labels, tokens), given)
    if empty := np.flatnonzero((targets == IGNORED).all(1).numpy()).tolist():
        raise FedbenchError(
            f"{len(empty)} of {len(tokens)} rows have no token to predict, row {empty[0] + 1} first: no answer is left "
            f"within {max_length} tokens; raise dataset.max_length, or drop such rows"
        )
    pad_token = int(fm.processor.pad_token_id)
    return Examples(targets, tokens, None, pad_token, objective=objective.name)


def _has_template(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def conversation(tokenizer: Any, prompt: str, answer: str) -> tuple[str, str]:
    """Prompt and answer as text: what is given, up to where the answer begins, and what is to be predicted.

    Raises FedbenchError for a template that does not write the prompt first.
    """
    if not _has_template(tokenizer):
        return f"{prompt}\n", answer
    turns = [{"role": "user", "content": prompt}]
    before: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    whole: str = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    if not whole.startswith(before):
        raise FedbenchError(
            "the tokenizer's chat template writes a prompt in another way once it is answered; give the model another "
            "template, or rows of text"
        )
    return before, whole[len(before) :]
