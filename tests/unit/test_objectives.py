"""Objectives: a language-model objective of somebody else is evaluated, trained and measured as classification is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from helpers import tiny_fm, train_rows
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

from fedbench.api.local import AdamW, LocalTask
from fedbench.check.suite import tensors_close
from fedbench.compat import set_attention
from fedbench.data.examples import Examples
from fedbench.data.rows import Part, RawData
from fedbench.errors import DivergedError, FedbenchError
from fedbench.machine.device import Execution
from fedbench.measures.accuracy import evaluate
from fedbench.measures.gradient import gradients
from fedbench.models.cache import Frozen
from fedbench.models.reading import encode
from fedbench.models.weights import get_tensors
from fedbench.objectives.base import IGNORED, Objective
from fedbench.objectives.classification import macro_f1
from fedbench.objectives.named import CLASSIFICATION, OBJECTIVES, objective_of
from fedbench.training import fused
from fedbench.training.alone import execute
from fedbench.training.cohort import execute_all
from fedbench.training.fused import execute_cohort

classes = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30)


@given(classes)
def test_macro_f1_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    predicted, targets = np.array(pairs).T
    expected = f1_score(targets, predicted, average="macro", zero_division=0.0)
    assert macro_f1(predicted, targets) == pytest.approx(expected)


EXECUTORS = ("packed", "fused", "reference")
SIZES = {
    "vocab_size": 100,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
SETTINGS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.3}


class NextToken(Objective):
    """Outputs are logits [B, T, V]; asked of each token but a row's last is which one follows."""

    name: ClassVar[str] = "next-token"
    every_token: ClassVar[bool] = True
    padded: ClassVar[bool] = True

    def targets(self, labels: np.ndarray, tokens: Sequence[np.ndarray] | None) -> Tensor:
        assert tokens is not None
        out = np.full((len(tokens), max(map(len, tokens))), IGNORED, dtype=np.int64)
        for row, own in zip(out, tokens, strict=True):
            row[: len(own) - 1] = own[1:]
        return torch.from_numpy(out)

    def each(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.each(outputs, targets).sum(1) / (targets != IGNORED).sum(1)

    def total(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self.each(outputs, targets).sum()

    def count(self, targets: Tensor) -> int:
        return int((targets != IGNORED).sum())

    def predict(self, outputs: Tensor) -> Tensor:
        return outputs.argmax(-1)

    def correct(self, predicted: np.ndarray, targets: np.ndarray) -> np.ndarray:
        return np.asarray(((predicted == targets) | (targets == IGNORED)).all(1))

    def accuracy(self, predicted: np.ndarray, targets: np.ndarray) -> float:
        return float((predicted == targets)[targets != IGNORED].mean())

    def more_scores(self, predicted: np.ndarray, targets: np.ndarray, loss: float) -> Mapping[str, float]:
        return {"perplexity": float(np.exp(loss))}


@pytest.fixture(autouse=True)
def next_token(monkeypatch: pytest.MonkeyPatch) -> Objective:
    """The objective of this file among those of the package, as its file in the folder would put it there."""
    objective = NextToken()
    monkeypatch.setitem(OBJECTIVES, objective.name, objective)
    return objective


@cache
def language_model() -> nn.Module:
    config = BertConfig(**SIZES, **SETTINGS, max_position_embeddings=40)
    set_attention(config, "sdpa")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = BertForMaskedLM(config).eval().requires_grad_(False)
    model.get_parameter("cls.predictions.bias")[3] = 4.7  # every row ends with it: now and then the model is right
    return model


def sentences(n: int) -> Examples:
    rows = train_rows(n)
    return replace(rows, labels=NextToken().targets(rows.labels.numpy(), rows.tokens), objective="next-token")


def one_by_one(rows: Examples) -> list[tuple[Tensor, Tensor]]:
    """Logits [T - 1, V] and the tokens that follow [T - 1] of each row, without any padding."""
    found = []
    for own in rows.tokens or ():
        ids = torch.from_numpy(own.astype(np.int64))
        found.append((language_model()(input_ids=ids[None]).logits[0, :-1], ids[1:]))
    return found


def task(rows: Examples, seed: int = 0, steps: int = 3, **changes: Any) -> LocalTask:
    names = ["bert.encoder.layer.0.output.dense.weight", "cls.predictions.transform.dense.bias"]
    rng = np.random.default_rng(seed)
    batches = [rng.choice(len(rows), 4, replace=False) for _ in range(steps)]
    tunables = get_tensors(language_model(), names)
    start = {n: t.clone() for n, t in tunables.items()}
    return LocalTask(Frozen("lm", language_model()), start, rows, batches, AdamW(5e-3), **changes)


# ---------------------------------------------------------------- an objective of every token


@pytest.mark.parametrize("execution", [Execution(), Execution(workers=2), Execution(executor="reference")])
def test_a_language_objective_scores_tokens_and_perplexity(execution: Execution) -> None:
    rows = sentences(11)
    found = evaluate(language_model(), rows, 4, execution)
    answers = one_by_one(rows)
    logits, following = (torch.cat(each) for each in zip(*answers, strict=True))
    right = logits.argmax(-1) == following
    assert 0 < right.sum() < len(right), "or this says little"
    assert found.accuracy == pytest.approx(right.double().mean().item())
    perplexity = F.cross_entropy(logits, following).exp().item()
    block = found.block()
    assert list(block) == ["accuracy", "perplexity", "loss", "rows"]
    assert (block["perplexity"], block["rows"]) == (pytest.approx(perplexity, rel=1e-5), 11)
    whole = [bool((own.argmax(-1) == then).all()) for own, then in answers]
    assert found.correct.tolist() == whole


def test_rows_whose_tokens_have_no_numbers_are_never_scored() -> None:
    rows = sentences(6)
    model = language_model()
    bias = model.get_parameter("cls.predictions.transform.dense.bias")
    with torch.no_grad():
        before = bias.clone()
        bias[0] = float("nan")
    try:
        with pytest.raises(DivergedError, match="6 of 6 rows"):
            evaluate(model, rows, 4, Execution())
    finally:
        with torch.no_grad():
            bias.copy_(before)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_step_minimises_the_mean_over_rows_of_the_mean_over_their_tokens(executor: str) -> None:
    rows = sentences(9)
    one = replace(task(rows), batches=[np.arange(9)])
    expected = torch.stack([F.cross_entropy(logits, then) for logits, then in one_by_one(rows)]).mean()
    for _, result in execute_all([one, one], Execution(executor=executor)):
        assert result.loss == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("segments", [False, True])
def test_clients_with_a_language_objective_learn_alike_on_every_executor(
    segments: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sentences(10)
    tasks = [task(rows, seed, steps=12 - 4 * seed) for seed in range(3)]
    references = [execute(one, Execution(executor="reference")) for one in tasks]
    packed = [execute(one, Execution()) for one in tasks]
    with monkeypatch.context() as patch:
        patch.setattr(fused, "execute", None)  # nobody is trained alone
        together = execute_cohort(tasks, Execution(executor="fused"), segments=segments)
    for i, one in enumerate(tasks):
        for results in (packed, together):
            moved = [{n: r.tunables[n] - v for n, v in one.tunables.items()} for r in (references[i], results[i])]
            assert tensors_close(*moved, 1e-3)
    whole = replace(tasks[0], batches=[np.arange(10)])
    learnt = replace(whole, tunables=packed[0].tunables)
    assert execute(learnt, Execution()).loss < 0.97 * execute(whole, Execution()).loss


def test_gradients_are_of_the_mean_over_all_tokens() -> None:
    rows = sentences(7)
    names = list(task(rows).tunables)
    found = gradients(language_model(), names, rows, Execution(), size=3)
    parameters = [language_model().get_parameter(n).requires_grad_() for n in names]
    try:
        logits, following = (torch.cat(each) for each in zip(*one_by_one(rows), strict=True))
        expected = torch.autograd.grad(F.cross_entropy(logits, following), parameters)
    finally:
        for p in parameters:
            p.requires_grad_(False)
    for name, value in zip(names, expected, strict=True):
        assert torch.allclose(found[name], value.double(), atol=1e-6)


# ---------------------------------------------------------------- which objective it is


def test_a_loss_of_the_task_stands_in_for_its_objectives() -> None:
    rows = sentences(8)
    own = NextToken()
    doubled = task(rows, loss=lambda outputs, targets: 2 * own.losses(outputs, targets))
    assert execute(doubled, Execution()).loss > 1.5 * execute(task(rows), Execution()).loss
    assert task(rows).row_losses == objective_of("next-token").losses
    assert task(train_rows(8)).row_losses == CLASSIFICATION.losses


def test_targets_are_encoded_as_the_objective_says(next_token: Objective) -> None:
    part = Part(np.array([2, 0]), ["a good film", "the market rises and falls"])
    rows = encode(part, tiny_fm(), 16, "next-token")
    assert rows.tokens is not None
    assert rows.labels.shape == (2, max(map(len, rows.tokens)))
    short, n = rows.tokens[0], len(rows.tokens[0])
    assert rows.labels[0].tolist() == [*short[1:], *[IGNORED] * (rows.labels.shape[1] - n + 1)]
    plain = encode(part, tiny_fm(), 16)
    assert (plain.labels.tolist(), plain.objective) == ([2, 0], "classification")
    assert plain.content_hash() != rows.content_hash()


def test_rows_keep_their_objective_and_a_batch_is_as_wide_as_its_longest_row() -> None:
    rows = sentences(12)
    some = rows.select([3, 1])
    joined = Examples.joined([some, rows.select([0])])
    assert (some.objective, joined.objective) == ("next-token", "next-token")
    assert torch.equal(joined.labels, rows.labels[[3, 1, 0]])
    batch = rows.batch([int(rows.lengths.argmin())])
    assert batch.labels.shape == batch.inputs["input_ids"].shape
    assert torch.equal(batch.labels[0, :-1], batch.inputs["input_ids"][0, 1:])


def test_clients_of_unlike_objectives_are_not_trained_together(next_token: Objective) -> None:
    class Halved(NextToken):
        name: ClassVar[str] = "halved"

        def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().losses(outputs, targets) / 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(OBJECTIVES, "halved", Halved())
        tasks = [task(sentences(8)), task(replace(sentences(8), objective="halved"))]
        whole, half = execute_cohort(tasks, Execution())
    assert half.loss == pytest.approx(whole.loss / 2, rel=0.1)


def test_an_objective_that_is_not_there_is_named() -> None:
    rows = replace(train_rows(4), objective="clasification")
    with pytest.raises(FedbenchError, match="'clasification': there is no such .* did you mean classification"):
        evaluate(tiny_fm().build(None, torch.device("cpu")), rows, 4, Execution())


def test_rows_that_say_nothing_are_for_classification() -> None:
    defaults = {kind: next(f.default for f in fields(kind) if f.name == "objective") for kind in (Examples, RawData)}
    assert set(defaults.values()) == {CLASSIFICATION.name}
    assert objective_of(CLASSIFICATION.name) is CLASSIFICATION
