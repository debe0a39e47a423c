"""Simulated time: links and speeds from a file, and the rounds of a record by arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from _records import altered, make_record
from pydantic import ValidationError

import fedbench
from fedbench.errors import FedbenchError
from fedbench.records.record import Record
from fedbench.records.store import save
from fedbench.tables.asked import Asked
from fedbench.tables.folder import compare_folder
from fedbench.tables.frame import frame_of
from fedbench.tables.profiles import Profile, chosen_profiles, load_profiles
from fedbench.tables.render.forms import render
from fedbench.tables.simulated import round_seconds, simulated_seconds, time_measures, why_unknown

LINE = '{ value = %s, source = "assumption" }'


def profile(down: float = 8, up: float = 4, gflop_s: float = 2, name: str = "box") -> Profile:
    figures = {"down_mbit_s": down, "up_mbit_s": up, "gflop_s": gflop_s}
    return Profile.model_validate(
        {"name": name} | {k: {"value": v, "source": "assumption"} for k, v in figures.items()}
    )


def measured(
    down: list[list[int]], up: list[list[int]], flops: list[list[int | None]], method: str = "fedpft", **more: Any
) -> Record:
    """A record of rounds in which clients 1 to 4 are sampled and 1 to 3 arrive, with these costs of each."""
    record = make_record(method, federation={"rounds": len(down)}, **more)
    per_round = [{"round": r, "up": sum(up[r]), "down": sum(down[r])} for r in range(len(down))]
    changes: dict[str, Any] = {"communication.per_round": per_round, "communication.setup_bytes": 0}
    for way, each in (("up", up), ("down", down)):
        total = sum(map(sum, each))
        changes[f"communication.{way}"] = {"bytes": total, "by_kind": {"adapter": {"bytes": total}}}
    for r in range(len(down)):
        changes[f"rounds.{r}.refused"] = []
        for name, values in (("bytes_up", up), ("bytes_down", down), ("flops", flops)):
            changes[f"rounds.{r}.{name}_by_client"] = values[r]
    return altered(record, changes)


TWO = ([[10**6] * 4, [2 * 10**6, 0, 0, 0]], [[5 * 10**5, 10**6, 0, 0]] * 2, [[4 * 10**9, 0, 0, None], [0] * 4])


def test_the_slowest_client_rules_its_round_by_hand() -> None:
    # 10^6 bytes down at 8 Mbit/s: 1 s. Client 1 computes 2 s and sends 1 s; client 2 sends 2 s. 4 s, and 3 s; then
    # client 1 takes 2 + 1 s, client 2 takes 2 s.
    assert round_seconds(measured(*TWO), profile()) == pytest.approx([4.0, 3.0])
    assert simulated_seconds(measured(*TWO), profile()) == pytest.approx(7.0)


def test_who_drops_out_is_not_waited_for_and_who_is_refused_is() -> None:
    record = measured([[0] * 4], [[0] * 4], [[0, 0, 10**9, 9 * 10**9]])
    assert round_seconds(record, profile(gflop_s=1)) == [1.0]
    refused = altered(record, {"rounds.0.refused": [{"client": 4, "reason": "x"}]})
    assert round_seconds(refused, profile(gflop_s=1)) == [9.0]


def test_a_run_without_rounds_takes_no_time() -> None:
    assert simulated_seconds(make_record("zero-shot", accuracy=None, unavailable="no", arrived=[]), profile()) == 0


def test_what_a_record_does_not_say_is_not_guessed(tmp_path: Path) -> None:
    old = make_record("fedot", federation={"rounds": 2})
    unknown = measured([[1] * 4], [[1] * 4], [[1, None, 1, 1]], "fedprox")
    for record in (old, unknown):
        assert round_seconds(record, profile()) is None
    assert why_unknown(old) == "the record does not say what each client was sent and computed; run it again to know"
    assert "no formula holds" in why_unknown(unknown)
    assert why_unknown(measured(*TWO)) == ""
    for record in (old, measured(*TWO)):
        save(record, tmp_path / "records")
    comparison = compare_folder(tmp_path, asked=Asked(time_measures([profile()])))
    text = render(comparison, "markdown")
    cells = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in text.splitlines() if "|" in line}
    assert (cells["method"], cells["fedpft"], cells["fedot"]) == ("simulated time box", "7.00", "–")
    assert "- fedot: no simulated time box: the record does not say what each client was sent" in text
    assert "- simulated time in seconds, box: 8 Mbit/s down, 4 up, 2 GFLOP/s; the slowest client" in text
    assert "simulated" not in render(compare_folder(tmp_path), "markdown")


def test_the_data_frame_and_the_table_from_python_have_it(tmp_path: Path) -> None:
    save(measured(*TWO), tmp_path / "records")
    frame = frame_of([measured(*TWO), make_record("fedot")])
    assert frame["simulated_time_phone"].isna().tolist() == [False, True]
    own = tmp_path / "mine.toml"
    own.write_text(f"[kiosk]\ndown_mbit_s = {LINE % 8}\nup_mbit_s = {LINE % 4}\ngflop_s = {LINE % 2}\n")
    found = fedbench.read_records(tmp_path, profiles=own)
    assert found["simulated_time_kiosk"].tolist() == [pytest.approx(7.0)]
    assert "simulated_time_phone" not in found
    table = fedbench.make_table(tmp_path, measures="simulated_time", profiles=own, profile="kiosk", format="csv")
    assert "simulated_time_kiosk" in table.splitlines()[0]


def test_the_profiles_of_the_package_say_where_each_figure_comes_from() -> None:
    known = load_profiles()
    assert list(known) == ["phone", "laptop", "silo"]
    assert known["phone"].up_mbit_s.value == 10
    for each in known.values():
        for figure in (each.down_mbit_s, each.up_mbit_s, each.gflop_s):
            assert figure.source.startswith("assumption: ")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "there are no profiles in it"),
        ("a = 1", r"a: expected a table \[a\] with down_mbit_s"),
        ('["/"]', "'/' is no name"),
        (f"[a]\ndown_mbit_s = {LINE % 0}", r"a\.down_mbit_s\.value: input should be greater than 0"),
        ("[a]\ndown_mbit_s = 5", r"a\.down_mbit_s: input should be"),
        (f"[a]\ndown_mbits = {LINE % 1}", r"a\.down_mbits: unknown field; did you mean down_mbit_s"),
        ("[a]\nup_mbit_s = { value = 1 }", r"a\.\S+: field required"),
    ],
)
def test_a_file_of_profiles_that_is_none_is_refused_with_the_place(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "profiles.toml"
    path.write_text(text)
    with pytest.raises(FedbenchError, match=rf"profiles\.toml: {complaint}"):
        load_profiles(path)


def test_a_profile_that_there_is_none_of_is_refused_with_the_nearest() -> None:
    with pytest.raises(FedbenchError, match="--profile fone: no such client profile; did you mean phone"):
        chosen_profiles(["fone"])
    assert [each.name for each in chosen_profiles(["silo", "phone"])] == ["silo", "phone"]


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("rounds.0.flops_by_client", [1], r"rounds\.0\.flops_by_client: 1 of them, but the cohort has 4 clients"),
        ("rounds.0.bytes_up_by_client", [1, 1, 1, 1], r"bytes_up_by_client: sums to 4, but per_round has 1500000"),
    ],
)
def test_a_record_that_contradicts_itself_about_its_clients_is_refused(
    field: str, value: list[int], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        altered(measured(*TWO), {field: value})
