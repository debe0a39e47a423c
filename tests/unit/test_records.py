"""Records: round trips, keys, atomic writing, comparison."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from _records import altered, make_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbench.errors import FedbenchError
from fedbench.records import provenance
from fedbench.records.differences import comparable, differences
from fedbench.records.fields import Block
from fedbench.records.record import Record
from fedbench.records.schema import READABLE, SCHEMA, Score
from fedbench.records.store import load, load_all, path_of, record_key, save
from fedbench.records.text import WIDTH, canonical_json, dumps, pack_correct, plain, unpack_correct

scalars = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


def test_record_in_memory_equals_the_record_read_back(tmp_path: Path) -> None:
    record = make_record(proxy=1 / 3)
    path = save(record, tmp_path)
    assert path == tmp_path / "agnews-noniid" / "fedpft" / f"s0-{record.key[:12]}.json" == path_of(record, tmp_path)
    assert load(path) == record
    assert load_all(tmp_path) == [record]
    assert load_all(tmp_path / "nothing here") == []


@given(block=st.dictionaries(st.text(max_size=5), values, max_size=4))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_block_survives_the_file(tmp_path: Path, block: dict[str, Any]) -> None:
    record = altered(make_record(), {"provenance": {"block": block}, "method.settings": block, "scenario.other": block})
    path = save(record, tmp_path)
    first = path.read_bytes()
    again = load(path)
    assert again == record
    save(again, tmp_path)
    assert path.read_bytes() == first


@given(values)
def test_file_text_is_json_of_the_same_content(value: Any) -> None:
    assert json.loads(dumps(plain(value))) == plain(value)


@given(st.floats())
def test_rounding_is_stable_and_null_stands_for_what_is_not_finite(value: float) -> None:
    once = plain(value)
    assert plain(once) == once
    if math.isfinite(value):
        assert once == pytest.approx(value, rel=1e-8, abs=1e-300)
    else:
        assert once is None


def test_numpy_values_and_tuples_become_plain() -> None:
    out = plain({"a": np.float32(0.5), "b": (np.int64(3), np.bool_(True)), 7: np.arange(2)})
    assert out == {"a": 0.5, "b": [3, True], "7": [0, 1]}
    assert type(out["b"][0]) is int
    assert type(out["b"][1]) is bool
    assert str(plain(-0.0)) == "0.0"
    with pytest.raises(TypeError, match="set"):
        plain({1, 2})


def test_canonical_json_and_key() -> None:
    assert canonical_json({"b": 1, "a": [1.5, None, "é"]}) == '{"a":[1.5,null,"é"],"b":1}'
    assert record_key({"a": 1, "b": 2}) == record_key({"b": 2, "a": 1})
    # sha256 of {"a":1}, as printf '{"a":1}' | sha256sum prints it
    assert record_key({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad8084273905ee33ec5cebeae62276a97f862"
    assert record_key({"lr": 0.1}) != record_key({"lr": 0.1 + 2**-55})
    with pytest.raises(FedbenchError, match="finite"):
        canonical_json({"lr": float("nan")})


@given(st.lists(st.booleans(), max_size=100))
def test_packed_bits_round_trip(bits: list[bool]) -> None:
    correct = np.array(bits, dtype=bool)
    assert (unpack_correct(pack_correct(correct), len(bits)) == correct).all()


def test_packed_bits_by_hand() -> None:
    assert pack_correct(np.array([1, 0, 0, 0, 0, 0, 0, 1, 1], dtype=bool)) == "gYA="  # 0x81 0x80
    with pytest.raises(FedbenchError, match="2 bytes cannot hold 17 rows"):
        unpack_correct("gYA=", 17)
    with pytest.raises(FedbenchError, match="base64"):
        unpack_correct("***", 1)


def test_a_model_without_a_finite_loss_has_diverged() -> None:
    assert Score(accuracy=None, loss=None, rows=1).diverged
    assert not Score(accuracy=0.5, loss=0.0, rows=1).diverged
    assert not Score(accuracy=0.5, rows=1).diverged, "a loss that was not measured says nothing"


def test_a_failed_write_leaves_the_old_record_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(make_record(accuracy=0.5), tmp_path)
    before = path.read_bytes()

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(FedbenchError, match="No space left"):
        save(make_record(accuracy=0.9), tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_killed_between_write_and_rename(tmp_path: Path) -> None:
    """SIGKILL leaves at most a hidden temporary file, which nobody takes for a record."""
    path = save(make_record(accuracy=0.5), tmp_path)
    before = load(path)
    script = (
        "import os, sys, signal; from pathlib import Path; from fedbench.records import store as records\n"
        "from fedbench.records.schema import Residual\n"
        "record = records.load(Path(sys.argv[1]))\n"
        "changed = record.model_copy(update={'distillation': [Residual(layer=0)]})\n"
        "os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)\n"
        "records.save(changed, Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path), str(tmp_path)], check=False)
    assert done.returncode == -9
    assert load_all(tmp_path) == [before]


def test_one_changed_number_changes_one_line() -> None:
    a, b = make_record(proxy=0.7).to_json(), make_record(proxy=0.7).to_json()
    b["partition"]["label_counts"][1][0] = 11
    one, other = dumps(a).splitlines(), dumps(b).splitlines()
    assert len(one) == len(other)
    assert [(x.strip(), y.strip()) for x, y in zip(one, other, strict=True) if x != y] == [("[10, 10]", "[11, 10]")]


def test_layout_of_the_file() -> None:
    text = dumps({"b": list(range(60)), "a": [{"layer": 0, "error": 0.5}, {"layer": 1, "error": None}], "c": {}})
    assert text.splitlines() == [
        "{",
        ' "a": [',
        '  {"error": 0.5, "layer": 0},',
        '  {"error": null, "layer": 1}',
        " ],",
        ' "b": [',
        "  " + ", ".join(map(str, range(32))) + ",",
        "  " + ", ".join(map(str, range(32, 60))),
        " ],",
        ' "c": {}',
        "}",
    ]
    assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("fits", [True, False])
def test_what_fits_into_120_characters_is_one_line(fits: bool) -> None:
    more = 0 if fits else 1
    # One blank, `"a": `, and a list of two; two blanks and an entry; a list without a name.
    word, entry, alone = "x" * (107 + more), "y" * (109 + more), "z" * (113 + more)
    listed = dumps({"a": [word, 1]})
    assert listed == ('{\n "a": ["%s", 1]\n}\n' if fits else '{\n "a": [\n  "%s", 1\n ]\n}\n') % word
    rows = dumps({"a": [{"k": entry}, {"k": 1}]})
    row = '{"k": "%s"}' if fits else '{\n   "k": "%s"\n  }'
    assert rows == '{\n "a": [\n  ' + row % entry + ',\n  {"k": 1}\n ]\n}\n'
    assert dumps([alone, 1]) == ('["%s", 1]\n' if fits else '[\n "%s", 1\n]\n') % alone
    assert dumps({"a": ["é" * 200]}) == '{\n "a": ["%s"]\n}\n' % ("é" * 200), "one value is not broken"


@pytest.mark.parametrize(("last", "fits"), [(56, True), (57, False)])
def test_a_line_of_a_list_is_120_characters_at_most(last: int, fits: bool) -> None:
    # Two blanks, 55 letters in quotes with comma and blank, and `last` letters in quotes with comma: 120 or 121.
    lines = dumps({"a": ["x" * 55, "y" * last, "z"]}).splitlines()
    both = [f'  "{"x" * 55}", "{"y" * last}",', '  "z"']
    each = [f'  "{"x" * 55}",', f'  "{"y" * last}", "z"']
    assert lines == ["{", ' "a": [', *(both if fits else each), " ]", "}"]


def test_comparable_leaves_out_times_memory_and_provenance() -> None:
    a = make_record()
    changes = {"compute.seconds": {"local": 1.0}, "compute.peak_memory_bytes": 1, "provenance": {"device": "cuda"}}
    b = altered(a, changes)
    assert differences(a, b) == []
    assert canonical_json(comparable(a)) == canonical_json(comparable(b))
    assert a.compute.peak_memory_bytes is not None  # the record itself is left as it was


def test_differences_names_the_places() -> None:
    a = make_record(accuracy=0.8)
    b = altered(make_record(accuracy=0.9), {"rounds.0.cohort": [1, 2, 3, 5], "rounds.0.refused": []})
    a = altered(a, {"rounds.0.refused": []})
    assert differences(a, b) == [
        "accuracy.plug_in.accuracy",
        "accuracy.plug_in.correct",
        "accuracy.plug_in.macro_f1",
        "rounds.0.cohort.3",
    ]
    c = altered(a, {"exposure": None, "partition.label_counts": []})
    assert differences(a, c) == ["exposure", "partition.label_counts"]
    fewer = a.compute.to_json()
    fewer["steps"] = fewer.pop("local_steps")
    d = altered(a, {"compute": fewer})
    assert differences(a, d) == differences(d, a) == ["compute.local_steps", "compute.steps"]
    # A whole float is other bytes than an int.
    e, f = (altered(a, {"compute.seconds": {}, "compute.rate": rate}) for rate in (1, 1.0))
    assert differences(e, f) == ["compute.rate"]
    # A failed run may have measured nothing.
    failed = altered(make_record(status="failed"), {"compute": {}})
    assert differences(failed, failed) == []


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s" / "m" / "s0-abc.json"
    path.parent.mkdir(parents=True)
    for text, complaint in (
        ("{", "JSON expected"),
        ("[]", "schema None"),
        ('{"schema": 99}', "schema 99, this fedbench reads schemas 1 and 2"),
        ('{"schema": 1, "status": "complete", "identity": {"key": "k"}}', "identity.key: string should match pattern"),
        ('{"schema": 1, "status": "complete", "identity": {}}', "identity.key: field required"),
        ('{"schema": true}', "schema True"),
        ('{"schema": 1, "status": "maybe", "identity": {}}', "status"),
    ):
        path.write_text(text)
        with pytest.raises(FedbenchError, match=complaint) as caught:
            load_all(tmp_path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(FedbenchError, match="cannot be read"):
        load(tmp_path / "none.json")


def edited(record: Record, field: str, value: Any) -> str:
    """The record's file with another value at the dotted `field`; DELETED takes it away."""
    content = record.to_json()
    *parents, last = field.split(".")
    block: Any = content
    for parent in parents:
        block = block[int(parent) if isinstance(block, list) else parent]
    if value is DELETED:
        del block[last]
    else:
        block[int(last) if isinstance(block, list) else last] = value
    return json.dumps(content)


DELETED = object()


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("accuracy.plug_in.accuracy", None, "accuracy.plug_in: accuracy is null, but the loss is a number"),
        ("accuracy.plug_in.accuracy", "0.9", "accuracy.plug_in.accuracy: input should be a valid number, found '0.9'"),
        ("accuracy.plug_in.accuracy", True, "accuracy.plug_in.accuracy: input should be a valid number, found True"),
        ("accuracy.plug_in.accuracy", -5, "accuracy.plug_in.accuracy: input should be greater than or equal to 0"),
        ("accuracy.plug_in.rows", 0, "accuracy.plug_in.rows: input should be greater than or equal to 1, found 0"),
        ("accuracy.plug_in.rows", 10**12, "accuracy.plug_in.rows: input should be less than or equal to 10000000"),
        ("accuracy.plug_in.rows", 10.0, "accuracy.plug_in.rows: input should be a valid integer, found 10.0"),
        ("accuracy.plug_in.correct", 7, "accuracy.plug_in.correct: input should be a valid string, found 7"),
        ("accuracy.plug_in.correct", "***", "accuracy.plug_in.correct: not base64"),
        ("accuracy.plug_in", [1], "accuracy.plug_in: input should be a valid dictionary"),
        ("accuracy", {}, "accuracy: empty, but status is complete"),
        ("accuracy.plug_in", None, "accuracy: neither plug_in has a score nor unavailable a reason"),
        ("accuracy.selection", DELETED, "accuracy: selection is missing"),
        ("communication.up.bytes", -1, "communication.up.bytes: input should be greater than or equal to 0, found -1"),
        ("communication.per_round.1.up", DELETED, "communication.per_round.1.up: field required"),
        ("compute.seconds.local", "1", "compute.seconds.local: input should be a valid number"),
        ("exposure.verbatim.all", 1.1, "exposure.verbatim.all: input should be less than or equal to 1, found 1.1"),
        ("rounds.0.arrived", DELETED, "rounds.0.arrived: field required"),
        ("identity.seed", {"a": 1}, "identity.seed: input should be a valid integer"),
        ("identity.seed", -1, "identity.seed: input should be greater than or equal to 0"),
        ("identity.scenario", None, "identity.scenario: input should be a valid string, found None"),
        ("identity.scenario", "../..", "identity.scenario: string should match pattern"),
        ("identity.key", "A" * 64, "identity.key: string should match pattern"),
        ("method.settings", [1], "method.settings: input should be a valid dictionary"),
        ("scenario.public", "x", "scenario.public: input should be a valid dictionary"),
        ("scenario.federation.rounds", "15", "scenario.federation.rounds: input should be a valid integer"),
        ("partition.sizes", [], "partition.sizes: list should have at least 1 item"),
        ("provenance.git", "abc", "provenance.git: input should be a valid dictionary"),
        ("identity.method", "\ud800", r"identity.method: '\ud800' is not a text"),
        ("method.settings.lr", float("nan"), "NaN is not a finite number"),
        ("method.settings.lr", 10**400, "10000000000000000000 is not a finite number"),
        ("error", {"type": "ValueError", "message": "no"}, "error: not null, but status is complete"),
        ("status", "failed", "error: empty, but status is failed"),
    ],
)
def test_a_malformed_field_is_named_with_what_was_expected(
    tmp_path: Path, field: str, value: Any, complaint: str
) -> None:
    record = make_record(proxy=0.7)
    path = save(record, tmp_path)
    path.write_text(edited(record, field, value))
    with pytest.raises(FedbenchError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert complaint in message
    assert message.endswith("run again")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("accuracy.plug_in.accuracy", 0.9, "accuracy.plug_in.accuracy: 0.9, but its per-row bits say 0.8"),
        ("accuracy.plug_in.correct", "gYA=", "per-row bits say 0.3"),
        ("accuracy.plug_in.rows", 17, "accuracy.plug_in.correct: 2 bytes cannot hold 17 rows"),
        ("accuracy.proxy.rows", 11, "accuracy.proxy.rows: 11, but plug_in has 10"),
        ("accuracy.gap", 0.2, "accuracy.gap: 0.2, but that is not plug_in minus proxy"),
        ("accuracy.selection.round", 15, "accuracy.selection.round: 15, but there are 15 rounds"),
        ("accuracy.per_client.mean", 0.9, "accuracy.per_client.mean: 0.9, but its values say 0.79"),
        ("accuracy.per_client.worst_tenth", 0.79, "per_client.worst_tenth: 0.79, but its values say 0.7"),
        ("communication.up.bytes", 5, "communication.up.bytes: 5, but up.by_kind sums to 2000000"),
        ("communication.down.by_kind.adapter.bytes", 0, "communication.down.bytes: 62500000, but down.by_kind sums to"),
        ("communication.per_round.1.up", 0, "communication.up.bytes: 2000000, but per_round sums to 1866667"),
        ("communication.setup_bytes", 62_500_001, "communication.setup_bytes: 62500001, more than went down"),
        ("rounds.3.round", 4, "not a record: rounds: not the rounds 0 to 14 in order"),
        ("communication.per_round.3.round", 4, "record: communication.per_round: not the rounds 0 to 14 in order"),
        ("rounds.3.arrived", [9], "rounds.3: arrived and refused are not separate parts of its cohort"),
        ("rounds.3.arrived", [4], "rounds.3: arrived and refused are not separate parts of its cohort"),
        ("rounds.3.bytes_up", 1, "communication.per_round.3.up: 133333, but rounds has 1"),
        ("scenario.federation.rounds", 14, "rounds: 15 of them, but scenario.federation.rounds is 14"),
        ("scenario.name", "sst2-iid", "scenario.name: 'sst2-iid', but identity.scenario is 'agnews-noniid'"),
        ("method.name", "fedot", "method.name: 'fedot', but identity.method is 'fedpft'"),
        ("method.version", 2, "method.version: 2, but identity.method_version is another"),
        ("gradient_error.start", 0.25, "gradient_error.start: 0.25, but its points say 0.5"),
        ("gradient_error.mean", 0.5, "gradient_error.mean: 0.5, but its points say 0.7"),
        ("partition.sizes.0", 11, "partition.sizes.0: 11, but its label_counts sum to 10"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(tmp_path: Path, field: str, value: Any, complaint: str) -> None:
    record = make_record(proxy=0.7)
    path = save(record, tmp_path)
    path.write_text(edited(record, field, value))
    with pytest.raises(FedbenchError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: not a record: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("identity.key", DELETED, "identity.key: field required"),
        ("identity.key", "A" * 58, f"identity.key: string should match pattern '^[0-9a-f]{{64}}$', found '{'A' * 58}'"),
        (
            "identity.key",
            "A" * 59,
            f"identity.key: string should match pattern '^[0-9a-f]{{64}}$', found '{'A' * 56}...",
        ),
        ("accuracy.selection", DELETED, "accuracy: selection is missing, so nobody knows which round was scored"),
        ("accuracy.gap", 0.2, "accuracy.gap: 0.2, but that is not plug_in minus proxy"),
        ("error", {"type": "a", "message": "b"}, "error: not null, but status is complete"),
        ("status", "failed", "error: empty, but status is failed"),
    ],
)
def test_a_complaint_is_one_line_with_place_and_cure(tmp_path: Path, field: str, value: Any, complaint: str) -> None:
    path = save(make_record(proxy=0.7), tmp_path)
    path.write_text(edited(load(path), field, value))
    with pytest.raises(FedbenchError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: not a record: {complaint}; delete the file and run again"


def test_every_score_is_held_to_its_bits() -> None:
    content = make_record(proxy=0.7).to_json()
    other = dict(content["accuracy"]["plug_in"])
    content["accuracy"] |= {"test_name": "matched", "extra_tests": {"mismatched": {"plug_in": other, "proxy": None}}}
    tests = Record.model_validate(content).accuracy.extra_tests
    assert tests is not None
    assert tests["mismatched"].plug_in.to_json() == other
    other["accuracy"] = 0.9
    with pytest.raises(
        ValueError, match=r"accuracy\.extra_tests\.mismatched\.plug_in\.accuracy: 0\.9, but its per-row"
    ):
        Record.model_validate(content)
    content = make_record(proxy=0.7).to_json()
    content["accuracy"]["proxy"]["correct"] = content["accuracy"]["plug_in"].pop("correct")
    with pytest.raises(ValueError, match=r"accuracy\.proxy\.accuracy: 0\.7, but its per-row bits say 0\.8"):
        Record.model_validate(content)


def test_accuracies_by_client_agree_with_their_values_to_six_digits() -> None:
    content = make_record().to_json()
    # A tenth of 20 clients are two.
    values = [0.0] * 2 + [0.333333] * 16 + [0.666667] * 2
    content["accuracy"]["per_client"] = {"mean": 1 / 3, "std": 0.2**0.5 / 3, "worst_tenth": 0.0, "values": values}
    Record.model_validate(content)
    content["accuracy"]["per_client"] |= {"worst_tenth": 1 / 3}
    with pytest.raises(ValueError, match="worst_tenth: 0.333333333, but its values say 0.000000"):
        Record.model_validate(content)


def test_every_round_has_its_bytes() -> None:
    content = make_record().to_json()
    last = content["communication"]["per_round"].pop()
    for way in ("up", "down"):
        content["communication"]["per_round"][0][way] += last[way]
    with pytest.raises(
        ValueError, match=r"communication\.per_round: 14 of them, but scenario\.federation\.rounds is 15"
    ):
        Record.model_validate(content)


def test_what_was_not_measured_contradicts_nothing() -> None:
    content = make_record(proxy=0.7).to_json()
    points = [{"round": -1, "zero_filled": {"error": None}}]
    content["gradient_error"] = {"points": points, "start": None, "mean": None, "final": None}
    del content["partition"]["label_counts"]
    assert Record.model_validate(content).to_json() == content


def test_numbers_that_agree_but_for_their_rounding_are_let_in() -> None:
    # 1/3 and 0.333 are kept to nine digits; so is their gap, which is a thousand times smaller.
    record = make_record(correct=np.arange(3000) < 1000, proxy=0.333)
    assert record.accuracy.gap == 0.000333333333
    assert Record.model_validate(record.to_json()) == record


def test_a_failed_run_may_know_neither_its_settings_nor_its_scores() -> None:
    content = make_record(status="failed").to_json() | {"method": {}, "scenario": {}}
    assert Record.model_validate(content).status == "failed"


@pytest.mark.parametrize(("depth", "refused"), [(30, False), (31, True)])
def test_tables_may_be_32_deep(tmp_path: Path, depth: int, refused: bool) -> None:
    inner: Any = 0
    for _ in range(depth):
        inner = [inner]
    path = save(make_record(), tmp_path)
    path.write_text(edited(load(path), "provenance.x", inner))
    if refused:
        with pytest.raises(FedbenchError, match=r"provenance\.x\.0.*: nested too deeply;"):
            load(path)
    else:
        assert load(path).provenance.to_json()["x"] == inner


def test_records_behind_a_link_are_found(tmp_path: Path) -> None:
    record = make_record()
    save(record, tmp_path / "elsewhere")
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "agnews-noniid").symlink_to(tmp_path / "elsewhere" / "agnews-noniid")
    assert load_all(tmp_path / "records") == [record]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 77}, "identity.seed is '77', but the file lies where '0' belongs"),
        ({"key": "0" * 64}, "identity.key is '000000000000', but the file lies where"),
        ({"method": "fedot"}, "identity.method is 'fedot', but the file lies where 'fedpft' belongs"),
        ({"scenario": "sst2-iid"}, "identity.scenario is 'sst2-iid', but the file lies where 'agnews-noniid' belongs"),
    ],
)
def test_a_record_says_what_its_path_says(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    root = tmp_path / "records"
    record = make_record()
    path = save(record, root)
    content = record.to_json()
    content["identity"] |= change
    content["method"]["name"] = content["identity"]["method"]
    content["scenario"]["name"] = content["identity"]["scenario"]
    path.write_text(dumps(content))
    for read in (lambda: load(path), lambda: load_all(root)):
        with pytest.raises(FedbenchError) as caught:
            read()
        assert complaint in str(caught.value)
    # Elsewhere and under another name there is nothing to compare with.
    copy = tmp_path / "copy.json"
    copy.write_text(dumps(content))
    assert load(copy).identity.to_json() == content["identity"]


def test_a_record_in_another_place_is_not_left_out_in_silence(tmp_path: Path) -> None:
    save(make_record("fedot"), tmp_path)
    path = save(make_record(), tmp_path)
    for name in ("s0-x.json", "copy.json", f"deeper/{path.name}", f"../../{path.name}"):
        place = path.parent / name
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
        with pytest.raises(FedbenchError, match="this record belongs at"):
            load_all(tmp_path)
        place.rename(path)
    hidden = path.with_name(f".{path.name}")
    path.rename(hidden)
    assert [record.identity.method for record in load_all(tmp_path)] == ["fedot"]


def test_the_first_bad_file_is_named_and_the_others_are_counted(tmp_path: Path) -> None:
    paths = [save(make_record(seed=seed), tmp_path) for seed in range(3)]
    paths[1].write_text("{")
    with pytest.raises(FedbenchError) as caught:
        load_all(tmp_path)
    assert str(caught.value).startswith(str(paths[1]))
    assert str(caught.value).endswith("; delete the file and run again"), "none are counted"
    paths[2].write_text("{")
    with pytest.raises(FedbenchError, match=r"\(2 of 3 files are refused; this is the first\)$"):
        load_all(tmp_path)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"schema": 1, "a": ' + "[" * 500 + "]" * 500 + "}", "nested too deeply"),
        ('{"schema": 1, "schema": 1}', "'schema' is there twice in one table"),
        ('{"schema": 1, "a": -Infinity}', "-Infinity is not a finite number"),
        ('{"schema": 1, "a": 1e999}', "1e999 is not a finite number"),
        ('{"schema": 1, "a": ' + "9" * 5000 + "}", "is not a finite number"),
        ('{"schema": 1, "a": {"\\ud800": 1}}', "is not a text"),
        ("\ufeff{}", "BOM"),
    ],
)
def test_json_that_no_record_holds_is_refused_at_once(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "s" / "m" / "s0-abc.json"
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FedbenchError, match=complaint) as caught:
        load_all(tmp_path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < len(str(path)) + 200


def test_a_pipe_in_the_place_of_a_record_does_not_block(tmp_path: Path) -> None:
    path = path_of(make_record(), tmp_path)
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    with pytest.raises(FedbenchError, match="not a file"):
        load_all(tmp_path)


def test_fields_of_a_later_version_are_let_through_and_kept(tmp_path: Path) -> None:
    record = make_record()
    path = save(record, tmp_path)
    content = record.to_json()
    content["identity"]["inputs_hash"] = "i" * 64
    content["accuracy"]["plug_in"]["calibration"] = 0.1
    path.write_text(dumps(content))
    assert load(path).to_json() == content


def test_a_run_without_uploads_is_as_it_started() -> None:
    said = "the model is as it started"
    assert make_record().no_upload == ""
    assert make_record(arrived=[[]] * 15).no_upload == f"no upload ever arrived: {said}"
    assert make_record(arrived=[[]] * 14 + [[1]]).no_upload == ""
    assert make_record(arrived=[[]] * 14 + [[1]]).rounds_without_upload == 14
    # The round that is scored decides, not one after it.
    late = make_record(arrived=[[]] * 14 + [[1]])
    late = altered(late, {"accuracy.selection": {"rule": "best", "round": 13}})
    assert late.no_upload == f"no upload had arrived by the round that is scored: {said}"
    late = altered(late, {"accuracy.selection.round": 14})
    assert late.no_upload == ""
    assert make_record(status="failed", arrived=[[], [1]]).no_upload == "", "without a score, all rounds"
    refused = altered(make_record(arrived=[[]] * 15), {"rounds.0.refused": [{"client": 1, "reason": "x"}]})
    assert refused.no_upload == f"every upload was refused: {said}"
    # A method without rounds waits for no upload.
    assert make_record("zero-shot", federation={"rounds": 0}).no_upload == ""


def test_records_of_the_first_schema_stay_readable(tmp_path: Path) -> None:
    old = make_record()
    assert old.schema_version == 1
    assert old.identity.inputs_hash is None
    new = Record.model_validate({**old.to_json(), "schema": SCHEMA})
    assert SCHEMA == 2
    for record in (old, new):
        assert load(save(record, tmp_path)) == record


def test_the_name_of_an_fm_is_nothing_that_two_runs_of_one_key_have_to_share() -> None:
    a = make_record()
    b = altered(a, {"identity.fm": "renamed", "scenario.fm": "renamed"})
    assert differences(a, b) == []
    c = altered(a, {"identity.fm_hash": "another"})
    assert differences(a, c) == ["identity.fm_hash"]


def test_unknown_blocks_are_refused() -> None:
    content = {**make_record().to_json(), "extra": 1}
    with pytest.raises(ValueError, match="extra"):
        Record.model_validate(content)


def test_the_commit_in_a_record_is_the_one_the_process_started_with(monkeypatch: pytest.MonkeyPatch) -> None:
    provenance.source_state.cache_clear()
    commits = iter([{"commit": "a", "dirty": False}, {"commit": "b", "dirty": False}])
    monkeypatch.setattr(provenance, "git_state", lambda package: next(commits))
    assert provenance.source_state() == provenance.source_state() == {"commit": "a", "dirty": False}
    monkeypatch.undo()
    provenance.source_state.cache_clear()


# ---------------------------------------------------------------- the schema


RESULTS = Path(__file__).parents[2] / "results" / "records"


def test_every_committed_record_is_written_again_byte_for_byte() -> None:
    paths = sorted(RESULTS.rglob("*.json"))
    assert len(paths) >= 90
    for path in paths:
        assert dumps(load(path).to_json()) == path.read_text(encoding="utf-8"), path


def test_what_a_file_leaves_out_stays_out_and_null_stays_null(tmp_path: Path) -> None:
    content = make_record().to_json()
    for block, field in (("identity", "precision"), ("compute", "step_flops"), ("accuracy", "validation")):
        content[block].pop(field, None)
    assert "distillation" not in content
    content["identity"]["data_hash"] = None
    record = Record.model_validate(content)
    assert record.to_json() == content
    assert load(save(record, tmp_path)).to_json() == content


def test_a_whole_number_stays_as_it_was_written() -> None:
    record = altered(make_record(), {"scenario.federation.fraction": 1, "compute.seconds.local": 61})
    assert '"fraction": 1,' in dumps(record.to_json())
    assert '"local": 61,' in dumps(record.to_json())


def test_a_block_may_be_given_as_a_model() -> None:
    record = make_record()
    rounded = record.compute.model_copy(update={"seconds": {"local": 1 / 3}})
    given = {name: getattr(record, name) for name in record.model_fields_set if name != "schema_version"}
    again = Record.model_validate({**given, "schema": 1, "compute": rounded})
    assert again.compute.seconds == {"local": 0.333333333}
    assert again.accuracy == record.accuracy


def test_nothing_in_a_record_can_be_set_anew() -> None:
    record = make_record()
    with pytest.raises(ValueError, match="frozen"):
        record.compute.local_steps = 1  # type: ignore[misc]


@pytest.mark.parametrize("block", ["communication", "partition", "method"])
def test_a_block_is_whole_or_empty(block: str) -> None:
    content = make_record(status="failed").to_json()
    assert Record.model_validate({**content, block: {}}).status == "failed"
    with pytest.raises(ValueError, match="is missing"):
        Record.model_validate({**content, block: {"more": 1}})


def blocks() -> dict[type[Block], list[str]]:
    """The blocks of a record, each with the fields that hold one."""
    found: dict[type[Block], list[str]] = {}

    def note(kind: Any, place: str) -> None:
        if isinstance(kind, type) and issubclass(kind, Block):
            found.setdefault(kind, []).append(place)
            if len(found[kind]) == 1:
                for name, field in kind.model_fields.items():
                    note(field.annotation, f"{place}.{name}")
        for inner in get_args(kind):
            note(inner, place)

    for name, field in Record.model_fields.items():
        note(field.annotation, name)
    return found


def test_the_documentation_names_every_field_of_the_schema() -> None:
    about = (Path(__file__).parents[2] / "docs" / "records.md").read_text(encoding="utf-8")
    wanted = [
        f"| {', '.join(f'`{place}`' for place in places)} | {', '.join(f'`{name}`' for name in kind.model_fields)} |"
        for kind, places in blocks().items()
    ]
    assert [line for line in about.splitlines() if line.startswith("| `")] == wanted
    for name in Record.model_fields:
        assert f"`{name.removesuffix('_version')}`" in about
    assert f"schema is {SCHEMA}" in about
    assert f"schemas {' and '.join(map(str, READABLE))}" in about
