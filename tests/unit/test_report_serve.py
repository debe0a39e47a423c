"""The report over HTTP: runs as they go on, and nothing for others than this machine's own pages."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from _records import make_record
from helpers import save_tiny_bert, smoke_request

from fedbench.errors import FedbenchError
from fedbench.records.store import path_of, save
from fedbench.report.libraries import Libraries
from fedbench.report.live import live_runs
from fedbench.report.serve import Report, server
from fedbench.run.loop import Run
from fedbench.run.prepare import prepare
from fedbench.run.progress import Silent
from fedbench.run.run import checkpoint_folder

BARE = Libraries("", "", ())


@pytest.fixture
def report(tmp_path: Path) -> Report:
    save(make_record(proxy=0.7), tmp_path / "records")
    return Report(tmp_path, BARE)


@pytest.fixture
def port(report: Report) -> Iterator[int]:
    with server(report, 0) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running.server_port
        running.shutdown()
        thread.join()


def get(port: int, path: str, host: str = "") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_the_state_and_the_records_are_served(report: Report, port: int) -> None:
    status, text = get(port, "/")
    assert status == 200
    assert "data-served" in text
    assert "connect-src 'self'" in text
    assert get(port, "/state") == (200, report.state())
    record = path_of(make_record(proxy=0.7), report.results / "records")
    assert get(port, "/" + record.relative_to(report.results).as_posix()) == (200, record.read_text())


@pytest.mark.parametrize("path", ["/../secret.txt", "/records/../secret.txt", "/secret.txt", "/%2e%2e/x", "/records/"])
def test_no_other_file_is_served(report: Report, port: int, path: str) -> None:
    (report.results / "secret.txt").write_text("secret")
    assert get(port, path)[0] == 404


def test_a_page_of_another_site_cannot_ask(port: int) -> None:
    assert get(port, "/", host="evil.example")[0] == 403
    assert get(port, "/state", host=f"localhost:{port}")[0] == 200


def test_the_page_changes_with_the_folder(report: Report) -> None:
    before, state = report.page(), report.state()
    assert report.page() is before, "it is not made twice of the same"
    save(make_record("fedot", proxy=0.7), report.results / "records")
    assert report.state() != state
    assert "fedot" in report.page()


def test_a_record_that_cannot_be_read_is_said_in_place_of_the_page(report: Report, port: int) -> None:
    path = next((report.results / "records").glob("*/*/*.json"))
    path.write_text("<b>{")
    status, text = get(port, "/")
    assert status == 500
    assert "not a record" in text
    assert "<b>" not in text


def test_a_port_that_is_taken_is_said(report: Report, port: int) -> None:
    with pytest.raises(FedbenchError, match=f"--port {port}: cannot be listened on"):
        server(report, port)


def test_a_run_is_seen_after_each_round_until_it_has_a_record(tmp_path: Path) -> None:
    bert = save_tiny_bert(tmp_path / "bert")
    prepared = prepare(smoke_request(tmp_path, "fedpft", "tweets-noniid", bert, lr="1e-2", rounds="4"))
    run = Run(prepared, Silent())
    results = prepared.request.results
    assert live_runs(results) == []
    run.loop(checkpoint_folder(prepared), until=2)
    [live] = live_runs(results)
    assert (live.method, live.scenario, live.seed) == ("fedpft", "tweets-noniid", 0)
    assert (live.done, live.rounds, live.key) == (2, 4, prepared.key)
    assert live.loss == pytest.approx(run.rounds[1]["loss"])
    scored = [entry for entry in run.rounds if entry.get("plug_in_validation") is not None]
    crossed = sum(entry["bytes_up"] + entry["bytes_down"] for entry in run.rounds) / 1e6
    assert scored
    last = next(point for point in reversed(live.points) if point[0] == "plug-in")
    assert last == ["plug-in", 2, pytest.approx(crossed), pytest.approx(100 * scored[-1]["plug_in_validation"])]
    (checkpoint_folder(prepared) / "checkpoint.json").write_text("{")
    assert live_runs(results) == [], "one that cannot be read is left out"
