"""Conversations of a user's own: layouts of files, rows that cannot be used, and what a model is asked of them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import save_tiny

from fedbench.data.load import load_data
from fedbench.data.own.chats import chat_of
from fedbench.data.own.choices import right_of
from fedbench.data.own.propose import propose
from fedbench.data.own.source import own_data_set
from fedbench.data.own.table import BadRow
from fedbench.data.rows import NaturalClients, Part, RawData
from fedbench.errors import FedbenchError
from fedbench.models.conversation import pieces
from fedbench.models.foundation import FoundationModel
from fedbench.models.reading import encode
from fedbench.models.zoo.load import load_fm
from fedbench.objectives.base import IGNORED
from fedbench.run.prepare import prepare
from fedbench.run.request import RunRequest
from fedbench.run.run import run
from fedbench.scenario.load import load_scenario
from fedbench.scenario.tables import DatasetSettings, SplitSettings
from fedbench.scenario.toml import split_names

IID = SplitSettings(kind="iid", clients=2)
LONG = (("system", "be brief"), ("user", "is it good"), ("assistant", "yes"), ("user", "and"), ("assistant", "bad"))
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def read(folder: Path, **settings: Any) -> RawData:
    """What a run under the objective of language reads for these settings of a scenario in `folder`."""
    asked = DatasetSettings(**{"kind": "chat", "train": "train.*", "validation": 1, **settings})
    return load_data(own_data_set(asked, IID, folder, language=True), None, asked, None, None)


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def chats(data: RawData) -> list[Any]:
    """All conversations that were read, sorted."""
    return sorted(chat for part in (data.train, data.validation, data.test) for chat in part.chats or ())


def openai(count: int = 10) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}"},
                {"role": "assistant", "content": f"a number, {i}"},
            ],
            "who": f"w{i % 2}",
        }
        for i in range(count)
    ]


def test_every_layout_of_conversations_gives_the_same_rows(tmp_path: Path) -> None:
    turns = [[turn["content"] for turn in row["messages"]] for row in openai()]
    layouts: dict[str, list[dict[str, Any]]] = {
        "openai": openai(),
        "parts": [
            {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in row["messages"]]}
            for row in openai()
        ],
        "sharegpt": [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in turns],
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a in turns],
        "prompts": [{"prompt": q, "completion": a} for q, a in turns],
        "answers": [{"question": q, "answer": a} for q, a in turns],
    }
    hashes = {}
    for name, rows in layouts.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", rows)
        data = read(tmp_path / name)
        assert chats(data) == sorted((("user", q), ("assistant", a)) for q, a in turns), name
        hashes[name] = data.content_hash
    assert len({*hashes.values()}) == 1
    pd.DataFrame(openai()).to_parquet(tmp_path / "train.parquet")
    data = read(tmp_path, client="who")
    assert len(chats(data)) == 10
    assert "turns in the column 'messages', 10 rows" in "\n".join(data.notes)
    assert (data.class_names, data.train.labels.any()) == (("any",), False)
    assert data.train.texts is not None and data.train.texts[0].count("\n") == 1


def test_a_prompt_of_several_columns_is_joined_by_an_empty_line(tmp_path: Path) -> None:
    rows = [{"instruction": f"sum up {i}", "context": "a text" * (i % 2), "response": f"r{i}"} for i in range(6)]
    write(tmp_path / "train.jsonl", rows)
    found = {chat[1][1]: chat[0][1] for chat in chats(read(tmp_path))}
    assert (found["r0"], found["r1"]) == ("sum up 0", "sum up 1\n\na text")
    named = chats(read(tmp_path, text=["instruction", "context"], answer="response"))
    assert named == chats(read(tmp_path))
    with pytest.raises(FedbenchError, match="several columns of a prompt need dataset.answer"):
        read(tmp_path, text=["instruction", "context"])
    with pytest.raises(FedbenchError, match=r"train.jsonl: has no column 'reply', which dataset.answer names"):
        read(tmp_path, text="instruction", answer="reply")
    write(tmp_path / "train.jsonl", [{"a": "b"}] * 3)
    with pytest.raises(FedbenchError, match="no conversations were recognised in the columns a; name the column"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        ([], "has no conversation"),
        ("hello", "has no conversation"),
        ([{"role": "user", "content": "a"}], "has no answer at its end"),
        ([{"role": "assistant", "content": "a"}], "has turns that do not alternate"),
        ([{"role": "user", "content": "a"}] * 2, "has turns that do not alternate"),
        ([{"role": "user", "content": None}], "has a turn without text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "has a turn without text"),
        ([{"role": "tool", "content": "a"}], "has a turn of an unknown role"),
    ],
)
def test_a_conversation_that_nobody_could_learn_from_is_named(turns: Any, fault: str) -> None:
    with pytest.raises(BadRow, match=fault):
        chat_of(turns)


def test_bad_conversations_are_counted_and_named_or_left_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [*openai(), {"messages": openai()[0]["messages"][:1]}, {"messages": []}])
    with pytest.raises(FedbenchError) as error:
        read(tmp_path)
    assert re.search(
        r"1 row that has no answer at its end, 1 row that has no conversation: .*train.jsonl: line 11 has no answer at "
        r"its end; .*line 12 has no conversation.*; mend them, or leave them out with bad_rows",
        str(error.value),
    )
    data = read(tmp_path, bad_rows="drop")
    assert len(chats(data)) == 10
    assert any("left out: 1 row that has no answer at its end" in note for note in data.notes)


def test_a_text_without_labels_is_read_for_the_next_token_alone(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [{"text": f"row {i}"} for i in range(10)])
    data = read(tmp_path, kind="text")
    assert (len(data.train), data.class_names) == (7, ("any",))
    asked = DatasetSettings(kind="text", train="train.jsonl", validation=1)
    with pytest.raises(FedbenchError, match="has no column 'label'"):
        own_data_set(asked, IID, tmp_path)
    write(tmp_path / "train.jsonl", [{"text": f"row {i}", "label": i % 2} for i in range(10)])
    assert read(tmp_path, kind="text").class_names == ("0", "1"), "labels that are there divide rows over clients"


# ---------------------------------------------------------------- what a model is asked


@pytest.fixture(scope="module")
def fm(tmp_path_factory: pytest.TempPathFactory) -> FoundationModel:
    folder = tmp_path_factory.mktemp("llama")
    return load_fm(str(save_tiny("llama", folder / "fm")), 1, folder, head="vocabulary")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_of_a_conversation_every_answer_is_asked_for_and_nothing_else(
    fm: FoundationModel, template: str | None
) -> None:
    part = Part(np.zeros(1, dtype=np.int64), ["words"], chats=[LONG])
    fm.processor.chat_template = template
    try:
        answers, everything = encode(part, fm, 64, "language"), encode(part, fm, 64, "language", answers_only=False)
    finally:
        fm.processor.chat_template = None
    assert answers.tokens is not None
    end = "<|endoftext|>" if template is None else "~"
    whole = (
        f"be brief\nis it good\nyes{end}and\nbad{end}"
        if template is None
        else "<s>be brief~<u>is it good~<a>yes~<u>and~<a>bad~"
    )
    assert fm.processor.decode(answers.tokens[0]) == whole
    targets = answers.labels[0]
    assert fm.processor.decode(targets[targets != IGNORED]) == f"yes{end}bad{end}"
    assert int((everything.labels != IGNORED).sum()) == len(answers.tokens[0]) - 1


def test_a_template_that_takes_no_such_turns_is_said(fm: FoundationModel) -> None:
    fm.processor.chat_template = "{{ raise_exception('no system here') }}"
    try:
        with pytest.raises(FedbenchError, match="chat template takes no turns of system, user: no system here"):
            pieces(fm.processor, LONG)
    finally:
        fm.processor.chat_template = None


def test_rows_that_leave_take_their_clients_along() -> None:
    part = Part(np.zeros(4, dtype=np.int64), [*"abcd"])
    clients = NaturalClients(("x", "y", "z"), np.array([0, 1, 1, 2]), np.array([2, 0, -1, 1]), "who", "hash")
    data = RawData(part, part, part, None, ("any",), (), "content", extra_tests={"unseen_clients": part})
    data = replace(data, clients=clients)
    found = data.without("train", [0], "why").without("test", [1], "why").without("test unseen_clients", [3], "why")
    assert found.train.texts == ["b", "c", "d"] and found.test.texts == ["a", "c", "d"]
    assert found.extra_tests["unseen_clients"].texts == ["a", "b", "c"]
    assert found.clients is not None
    assert found.clients.names == ("y", "z")
    assert (found.clients.train.tolist(), found.clients.test.tolist()) == ([0, 0, 1], [1, -1, 0])
    assert found.notes == tuple(f"{role}: 1 rows left out, why" for role in ("train", "test", "test unseen_clients"))
    with pytest.raises(FedbenchError, match="validation: no rows are left: why"):
        data.without("validation", range(4), "why")


# ---------------------------------------------------------------- multiple choice


@pytest.mark.parametrize(
    ("cell", "choices", "called", "right"),
    [
        (1, ["x", "y"], None, 1),
        ("1", ["x", "y"], None, 1),
        (1.0, ["x", "y"], None, 1),
        ("B", ["x", "y"], None, 1),
        ("y", ["x", "y"], None, 1),
        ("C", ["x", "y"], ["C", "D"], 0),
        ("1", ["x", "y"], ["1", "2"], 0),
        ("A", ["B", "A"], None, 1),
        ("1", ["0", "1"], None, 1),
        ("1", ["1", "0"], None, "could name several choices"),
        ("z", ["z", "z"], None, "could name several choices"),
        (2, ["x", "y"], None, "names no choice"),
        (-1, ["x", "y"], None, "names no choice"),
        ("E", ["x", "y"], ["A", "B"], "names no choice"),
        (True, ["x", "y"], None, "names no choice"),
        (0.5, ["x", "y"], None, "names no choice"),
        ("", ["x", "y"], None, "has no label"),
    ],
)
def test_the_right_choice_is_said_by_number_letter_name_or_text(
    cell: Any, choices: list[str], called: list[str] | None, right: int | str
) -> None:
    if isinstance(right, int):
        assert right_of(cell, choices, called) == right
    else:
        with pytest.raises(BadRow, match=right):
            right_of(cell, choices, called)


def test_layouts_of_multiple_choice_give_the_same_rows(tmp_path: Path) -> None:
    layouts: dict[str, list[dict[str, Any]]] = {
        "harness": [{"query": f"q{i}", "choices": ["a", "b"], "gold": i % 2} for i in range(8)],
        "hellaswag": [{"ctx": f"q{i}", "endings": ["a", "b"], "label": str(i % 2)} for i in range(8)],
        "mmlu": [{"question": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(8)],
        "arc": [
            {"question": f"q{i}", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "AB"[i % 2]}
            for i in range(8)
        ],
    }
    hashes = set()
    for name, rows in layouts.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.jsonl", rows)
        data = read(tmp_path / name, kind="choices")
        hashes.add(data.content_hash)
        assert data.train.choices is not None and data.train.choices[0] == ("a", "b")
        assert data.class_names == ("0", "1")
        assert data.train.labels.tolist() == [int((text or "")[1:]) % 2 for text in data.train.texts or ()]
    pd.DataFrame([{"goal": f"q{i}", "sol1": "a", "sol2": "b", "label": i % 2} for i in range(8)]).to_csv(
        tmp_path / "train.csv"
    )
    hashes.add(read(tmp_path, kind="choices", choices=["sol1", "sol2"]).content_hash)
    assert len(hashes) == 1
    write(tmp_path / "arc" / "train.jsonl", [{"question": "q", "choices": ["a"], "answer": 0}] * 2)
    with pytest.raises(FedbenchError, match="2 rows that have fewer than two choices: .*line 1"):
        read(tmp_path / "arc", kind="choices")


# ---------------------------------------------------------------- scenarios


@pytest.mark.parametrize("rows", ["chats", "texts", "choices"])
def test_files_without_labels_become_scenarios_that_run(rows: str, tmp_path: Path) -> None:
    found = {
        "chats": [*openai(40), {"messages": []}],
        "texts": [{"text": f"the film number {i} is good", "author": f"a{i % 2}"} for i in range(40)],
        "choices": [
            {"question": f"is {i} odd", "choices": ["it is", "no"], "answer": 1 - i % 2, "group": f"g{i % 2}"}
            for i in range(40)
        ],
    }[rows]
    write(tmp_path / "mine.jsonl", found)
    target = tmp_path / "mine.toml"
    target.write_text(propose(tmp_path / "mine.jsonl", target).text)
    scenario = load_scenario(target, split_names(target)[0], "smoke")
    assert scenario.fm == "tiny-llama"
    assert scenario.objective is not None
    assert scenario.dataset.kind == {"chats": "chat", "texts": "text", "choices": "choices"}[rows]
    target.write_text(re.sub(r"\[public\]\n.*\n.*\n", "", target.read_text()))
    request = RunRequest(
        method="fedavg-lora",
        scenario=str(target),
        fm=str(save_tiny("llama", tmp_path / "fm")),
        settings={"dataset.max_length": "40"},
        profile="smoke",
        device="cpu",
        results=tmp_path / "runs",
        cache=tmp_path / "cache",
        workers=1,
    )
    prepared = prepare(request)
    record = run(prepared)
    assert record.status == "complete"
    assert record.accuracy.plug_in is not None
    assert record.accuracy.plug_in.perplexity is not None
    assert record.scenario.split is not None and record.scenario.split.clients == 2
    assert prepared.scenario.objective is not None and prepared.scenario.objective.normalised == "row"


def test_rows_whose_answer_does_not_fit_are_left_out_or_an_error(tmp_path: Path) -> None:
    rows = openai(20)
    rows[3]["messages"][0]["content"] = "the film is good and " * 9
    write(tmp_path / "mine.jsonl", rows)
    target = tmp_path / "mine.toml"
    target.write_text(re.sub(r"\[public\]\n.*\n.*\n", "", propose(tmp_path / "mine.jsonl", target).text))
    folder = save_tiny("llama", tmp_path / "fm")

    def loaded(bad_rows: str) -> Any:
        settings = {"dataset.max_length": "40", "dataset.bad_rows": bad_rows}
        return prepare(
            RunRequest("fedavg-lora", str(target), fm=str(folder), settings=settings, results=tmp_path / "runs",
                       cache=tmp_path / "cache", device="cpu")
        )  # fmt: skip

    with pytest.raises(FedbenchError, match=r"1 of \d+ rows have no token to predict, .*within 40 tokens; raise"):
        loaded("error")
    prepared = loaded("drop")
    data = prepared.loaded.data
    assert any("1 rows left out, no answer is left within 40 tokens" in note for note in data.notes)
    assert len(data.train) == len(prepared.loaded.train)
