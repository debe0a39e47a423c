"""Answers beyond the next token: the likeliest of several choices, and what a model writes; against transformers."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import DECODERS, random_values, save_tiny
from torch.nn import functional as F

from fedbench.data.answers import Choices, References
from fedbench.data.rows import Part
from fedbench.errors import FedbenchError
from fedbench.machine.device import Execution
from fedbench.measures.accuracy import evaluate
from fedbench.measures.written import check_scores, matches, number_in, scores_of, write
from fedbench.models.answering import answers_for, writing
from fedbench.models.conversation import NothingAsked
from fedbench.models.foundation import FoundationModel
from fedbench.models.reading import encode
from fedbench.models.spec import LoraSpec
from fedbench.models.weights import set_tensors
from fedbench.models.zoo.load import load_fm
from fedbench.objectives.choice import chosen
from fedbench.objectives.named import CHOICE
from fedbench.records.text import unpack_correct
from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest
from fedbench.run.run import run
from fedbench.scenario.tables import ObjectiveSettings

CPU = torch.device("cpu")
PLAIN = ObjectiveSettings(kind="language")
WRITTEN = ObjectiveSettings(kind="language", scores=("exact_match",), new_tokens=9)
QUESTIONS = ["is the film good", "who wins", "what rises and falls", "a"]
CHOICES = [("it is", "no"), ("the team", "the minister", "war"), ("a", "the stock market of space"), ("b", "c")]
RIGHT = [0, 2, 1, 1]
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def loaded(family: str, folder: Path) -> tuple[FoundationModel, Any]:
    """A tiny decoder, and the same as transformers has it."""
    import transformers

    place = save_tiny(family, folder / family)
    fm = load_fm(str(place), 1, folder, head="vocabulary")
    return fm, transformers.AutoModelForCausalLM.from_pretrained(place).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[FoundationModel, Any]:
    return loaded("llama", tmp_path_factory.mktemp("fm"))


def quiz() -> Part:
    return Part(np.array(RIGHT), QUESTIONS, choices=CHOICES)


def talk() -> Part:
    """Conversations of unequal length."""
    return Part(np.zeros(4, dtype=np.int64), QUESTIONS, text_pairs=["it is", "war", "the market", "b"])


# ---------------------------------------------------------------- multiple choice


def test_the_likeliest_choice_and_the_likeliest_a_character_by_hand() -> None:
    likelihoods = [np.array([-4.0, -6.0]), np.array([-3.0, -3.0, -9.0])]
    found = chosen(likelihoods, [[2, 6], [1, 1, 9]])
    # -4 / 2 = -2 against -6 / 6 = -1; then -3, -3 and -1.
    assert found.tolist() == [[0, 1], [0, 2]]
    right = np.array([1, 0])
    assert CHOICE.correct(found, right).tolist() == [False, True]
    assert CHOICE.accuracy(found, right) == 0.5
    assert CHOICE.more_scores(found, right, 0.0) == {"acc_norm": 0.5, "perplexity": 1.0}
    assert CHOICE.more_outcomes(found, right)["correct_norm"].tolist() == [True, False]


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_choices_are_scored_as_transformers_scores_them_one_by_one(
    template: str | None, llama: tuple[FoundationModel, Any]
) -> None:
    fm, stock = llama
    fm.processor.chat_template = template
    try:
        rows = encode(quiz(), fm, 60, "language")
        object.__setattr__(rows, "answers", answers_for(quiz(), fm, 60, PLAIN))
    finally:
        fm.processor.chat_template = None
    best, best_norm, losses = [], [], []
    for question, choices, right in zip(QUESTIONS, CHOICES, RIGHT, strict=True):
        before = f"{question}\n" if template is None else f"<u>{question}~<a>"
        sums = []
        for i, choice in enumerate(choices):
            given, own = (fm.processor(text, add_special_tokens=False)["input_ids"] for text in (before, choice))
            with torch.no_grad():
                logits = stock(input_ids=torch.tensor([[*given, *own]])).logits[0, len(given) - 1 : -1]
            each = F.cross_entropy(logits, torch.tensor(own), reduction="none")
            sums.append(-each.sum().item())
            losses += each.tolist() if i == right else []
        best.append(int(np.argmax(sums)))
        best_norm.append(int(np.argmax([s / len(c) for s, c in zip(sums, choices, strict=True)])))
    found = evaluate(fm.build(LoraSpec(2, 4), CPU), rows, 3, Execution())
    assert found.predicted.tolist() == [[a, b] for a, b in zip(best, best_norm, strict=True)]
    assert found.accuracy == np.mean(np.array(best) == RIGHT)
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-5)
    block = found.block(rows=True)
    assert unpack_correct(block["correct"], 4).tolist() == [a == b for a, b in zip(best, RIGHT, strict=True)]
    assert unpack_correct(block["correct_norm"], 4).tolist() == [a == b for a, b in zip(best_norm, RIGHT, strict=True)]


def test_the_right_choice_is_what_is_trained_on(llama: tuple[FoundationModel, Any]) -> None:
    fm = llama[0]
    rows = encode(quiz(), fm, 60, "language")
    assert rows.tokens is not None
    assert fm.processor.decode(rows.tokens[1]) == "who wins\nwar<|endoftext|>"
    asked = rows.labels[1][rows.labels[1] >= 0]
    assert fm.processor.decode(asked) == "war<|endoftext|>"


def test_choices_that_do_not_fit_are_never_cut(llama: tuple[FoundationModel, Any]) -> None:
    with pytest.raises(NothingAsked, match=r"1 of 4 rows are too long, row 3 first: question and choice have \d+") as e:
        answers_for(quiz(), llama[0], 18, PLAIN)
    assert e.value.rows == [2]


def test_choices_and_references_go_with_their_rows(llama: tuple[FoundationModel, Any]) -> None:
    for part, objective in ((quiz(), PLAIN), (talk(), WRITTEN)):
        rows = encode(part, llama[0], 50, "language")
        plain = rows.content_hash()
        object.__setattr__(rows, "answers", answers_for(part, llama[0], 50, objective))
        assert rows.content_hash() != plain
        some = rows.select([2, 0])
        again = answers_for(part.select(np.array([2, 0])), llama[0], 50, objective)
        assert some.answers is not None and again is not None
        assert some.answers.digest() == again.digest() != rows.answers.digest()


# ---------------------------------------------------------------- answers that are written


def references(part: Part, fm: FoundationModel, **settings: Any) -> References:
    found = answers_for(part, fm, 50, WRITTEN.model_copy(update=settings))
    assert isinstance(found, References)
    return found


@pytest.mark.parametrize("family", DECODERS)
def test_greedy_answers_in_batches_are_those_of_transformers_one_by_one(family: str, tmp_path: Path) -> None:
    fm, stock = loaded(family, tmp_path)
    asked = references(talk(), fm)
    model = fm.build(LoraSpec(2, 4), CPU)
    before = type(model), sorted(model.state_dict())
    found = write(model, asked, fm.processor, 3, Execution(workers=1))
    assert (type(model), sorted(model.state_dict())) == before, "the model is as it was"
    for text, prompt in zip(found, asked.prompts, strict=True):
        ids = prompt.tolist()
        with torch.no_grad():
            while len(ids) < len(prompt) + 9 and ids[-1] != fm.processor.eos_token_id:
                ids.append(int(stock(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == fm.processor.decode(ids[len(prompt) :]).removesuffix("<|endoftext|>")


def test_adapters_write_what_they_hold_likeliest(llama: tuple[FoundationModel, Any]) -> None:
    fm = llama[0]
    model = fm.build(LoraSpec(2, 4), CPU)
    set_tensors(model, random_values(model))
    prompt = references(talk(), fm).prompts[0].tolist()
    with writing(model) as whole, torch.no_grad():
        ids = whole.generate(input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=-1)
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), -100)], 1)
    with torch.no_grad():
        likeliest = model(input_ids=ids, targets=targets).logits[0, len(prompt) - 1 : -1, 1]
    assert likeliest.long().tolist() == ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("template", "answers", "ends"),
    [
        (None, ["a"], ()),
        (TEMPLATE, ["a"], ("~",)),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", ["a", "b "], ("\n",)),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
         "{% if add_generation_prompt %}assistant: {% endif %}", ["a", "b\nc"], ("\nuser: ",)),
    ],
)  # fmt: skip
def test_where_an_answer_ends_the_template_says(
    template: str | None, answers: list[str], ends: tuple[str, ...], llama: tuple[FoundationModel, Any]
) -> None:
    fm = llama[0]
    part = Part(np.zeros(len(answers), dtype=np.int64), ["who"] * len(answers), text_pairs=answers)
    fm.processor.chat_template = template
    try:
        found = references(part, fm)
    finally:
        fm.processor.chat_template = None
    assert found.ends == ends
    assert found.stops[0] == fm.processor.eos_token_id


def test_of_a_conversation_the_last_answer_is_asked_for(llama: tuple[FoundationModel, Any]) -> None:
    fm = llama[0]
    chat = (("user", "who"), ("assistant", "me"), ("user", "why"), ("assistant", "so"))
    found = references(Part(np.zeros(1, dtype=np.int64), ["words"], chats=[chat]), fm)
    assert found.answers == ["so"]
    assert fm.processor.decode(found.prompts[0]) == "who\nme<|endoftext|>why\n"


@pytest.mark.parametrize(
    ("text", "answer", "match", "right"),
    [
        ("The  Film!", "film", "words", True),
        ("a film", "an actor", "words", False),
        ("another", "other", "words", False),
        ("2 + 2 = 4\n#### 1,234", "so\n#### 1234", "number", True),
        ("#### $12.00.", "#### 12", "number", True),
        ("#### -3", "#### 3", "number", False),
        ("12", "#### 12", "number", False),
        ("#### twelve", "#### 12", "number", False),
        ("#### 1.2.3", "#### 12", "number", False),
    ],
)
def test_an_exact_match_by_hand(text: str, answer: str, match: str, right: bool) -> None:
    assert matches(text, answer, match) is right
    assert number_in("no number") is None


def test_scores_of_rows_are_kept() -> None:
    asked = References([], ["good", "bad"], ("exact_match",), "words", 4, (0,), ())
    assert scores_of(["Good.", "fine"], asked, rows=False) == {"exact_match": 0.5}
    assert unpack_correct(scores_of(["Good.", "fine"], asked, rows=True)["exact"], 2).tolist() == [True, False]


def test_rouge_is_that_of_the_library() -> None:
    pytest.importorskip("rouge_score")
    asked = References([], ["the cat sat on the mat", "no"], ("rouge_l",), "words", 4, (0,), ())
    found = scores_of(["the cat lay on mat", "yes"], asked, rows=True)
    # Longest common subsequence: the cat on mat, 4 of 5 words written and of 6 in the answer.
    assert found["rouge_l_rows"] == [pytest.approx(2 * (4 / 5) * (4 / 6) / (4 / 5 + 4 / 6), abs=1e-6), 0.0]
    assert found["rouge_l"] == pytest.approx(np.mean(found["rouge_l_rows"]))


def test_what_cannot_be_written_is_one_line(
    llama: tuple[FoundationModel, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fm, words = llama[0], Part(np.zeros(1, dtype=np.int64), ["words"])
    with pytest.raises(FedbenchError, match="these rows are texts without; leave scores out"):
        answers_for(words, fm, 50, WRITTEN)
    with pytest.raises(FedbenchError, match=r"longest prompt with 99 new tokens has \d+, but FM llama has positions"):
        answers_for(talk(), fm, 50, WRITTEN.model_copy(update={"new_tokens": 99}))
    real = builtins.__import__

    def without(name: str, *arguments: Any, **more: Any) -> Any:
        if name.startswith("rouge_score"):
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FedbenchError, match=r'rouge_l needs the package rouge-score; pip install "fedbench\[gener'):
        check_scores(("exact_match", "rouge_l"))


# ---------------------------------------------------------------- whole runs

SCENARIO = """
title = "t"
fm = "f"
[dataset]
kind = "{kind}"
train = "rows.jsonl"
validation = 4
max_length = 40
[objective]
kind = "language"
{scores}
[splits.iid]
kind = "iid"
clients = 2
[federation]
rounds = 1
batch_size = 4
max_steps = 1
[evaluation]
every = 1
probe_size = 4
"""


@pytest.mark.parametrize("kind", ["chat", "choices"])
def test_a_whole_run_scores_answers(kind: str, tmp_path: Path) -> None:
    rows = [{"question": f"is {i} odd", "answer": "no"} for i in range(30)]
    if kind == "choices":
        rows = [{"question": f"is {i} odd", "choices": ["it is", "no"], "answer": 1 - i % 2} for i in range(30)]  # type: ignore[dict-item]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = 'scores = ["exact_match"]\nnew_tokens = 3' if kind == "chat" else ""
    (tmp_path / "rows.toml").write_text(SCENARIO.format(kind=kind, scores=scores))
    request = RunRequest("fedavg-lora", str(tmp_path / "rows.toml"), fm=str(save_tiny("llama", tmp_path / "fm")),
                         results=tmp_path / "runs", cache=tmp_path / "cache", device="cpu", workers=1)  # fmt: skip
    prepared = prepare(request)
    record = run(prepared)
    assert record.accuracy.plug_in is not None and record.accuracy.untouched is not None
    found = record.accuracy.plug_in
    if kind == "chat":
        assert found.exact_match == unpack_correct(found.exact or "", 6).mean()
        assert (found.correct, found.acc_norm) == (None, None)
        assert record.accuracy.untouched.exact_match is not None
    else:
        assert isinstance(prepared.held_out.test.answers, Choices)
        assert found.accuracy == unpack_correct(found.correct or "", 6).mean()
        assert found.acc_norm == unpack_correct(found.correct_norm or "", 6).mean()
        assert prepared.loaded.train.answers is None
    assert ("scores" in prepared.identity["scenario"]["objective"]) == (kind == "chat")
