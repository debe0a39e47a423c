"""Records: round trips, keys, atomic writing, comparison."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _records import make_record
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbench import provenance, records
from fedbench.errors import FedbenchError
from fedbench.records import (
    Record,
    canonical_json,
    comparable,
    differences,
    dumps,
    load,
    load_all,
    pack_correct,
    path_of,
    plain,
    record_key,
    save,
    unpack_correct,
)

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
    record = make_record().model_copy(update={"provenance": plain(block)})
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


def test_a_failed_write_leaves_the_old_record_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(make_record(accuracy=0.5), tmp_path)
    before = path.read_bytes()

    def no_space(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        save(make_record(accuracy=0.9), tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_killed_between_write_and_rename(tmp_path: Path) -> None:
    """SIGKILL leaves at most a hidden temporary file, which nobody takes for a record."""
    path = save(make_record(accuracy=0.5), tmp_path)
    before = load(path)
    script = (
        "import os, sys, signal; from pathlib import Path; from fedbench import records\n"
        "record = records.load(Path(sys.argv[1]))\n"
        "changed = record.model_copy(update={'distillation': [{'layer': 0}]})\n"
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
    assert max(map(len, text.splitlines())) <= records.WIDTH


def test_comparable_leaves_out_times_memory_and_provenance() -> None:
    a = make_record()
    compute = {**a.compute, "seconds": {"local": 1.0}, "peak_memory_bytes": 1}
    b = a.model_copy(update={"compute": compute, "provenance": {"device": "cuda"}})
    assert differences(a, b) == []
    assert canonical_json(comparable(a)) == canonical_json(comparable(b))
    assert "peak_memory_bytes" in a.compute  # the record itself is left as it was


def test_differences_names_the_places() -> None:
    a = make_record(accuracy=0.8)
    b = make_record(accuracy=0.9).model_copy(update={"rounds": [{**a.rounds[0], "cohort": [1, 2, 3, 5]}]})
    assert differences(a, b) == [
        "accuracy.plug_in.accuracy",
        "accuracy.plug_in.correct",
        "accuracy.plug_in.macro_f1",
        "rounds.0.cohort.3",
    ]
    c = a.model_copy(update={"rounds": [], "exposure": None, "compute": {**a.compute, "local_steps": 750.0}})
    assert differences(a, c) == ["compute.local_steps", "exposure", "rounds"]


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s" / "m" / "s0-abc.json"
    path.parent.mkdir(parents=True)
    for text, complaint in (
        ("{", "JSON expected"),
        ("[]", "schema None"),
        ('{"schema": 99}', "schema 99, this fedbench reads schemas 1 and 2"),
        ('{"schema": true}', "schema True"),
        ('{"schema": 1, "status": "complete", "identity": {"key": "k"}}', "identity lacks method, scenario, seed"),
        ('{"schema": 1, "status": "maybe", "identity": {}}', "status"),
    ):
        path.write_text(text)
        with pytest.raises(FedbenchError, match=complaint) as caught:
            load_all(tmp_path)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(FedbenchError, match="cannot be read"):
        load(tmp_path / "none.json")


def test_records_of_the_first_schema_stay_readable(tmp_path: Path) -> None:
    old = make_record()
    assert old.schema_version == 1
    assert "inputs_hash" not in old.identity
    new = Record.model_validate({**old.to_json(), "schema": records.SCHEMA})
    assert records.SCHEMA == 2
    for record in (old, new):
        assert load(save(record, tmp_path)) == record


def test_the_name_of_an_fm_is_nothing_that_two_runs_of_one_key_have_to_share() -> None:
    a = make_record()
    b = a.model_copy(update={"identity": {**a.identity, "fm": "renamed"}, "scenario": {**a.scenario, "fm": "renamed"}})
    assert differences(a, b) == []
    c = a.model_copy(update={"identity": {**a.identity, "fm_hash": "another"}})
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
