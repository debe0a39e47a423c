"""The page of a report: one file, nothing loaded from elsewhere, nothing of a record taken for markup."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from _records import altered, make_record

from fedbench.errors import FedbenchError
from fedbench.records.record import Record
from fedbench.records.store import load_all, save
from fedbench.report.libraries import Libraries, libraries
from fedbench.report.live import Live
from fedbench.report.page import embedded, link_to, page
from fedbench.report.plots import plots

BARE = Libraries("", "", ("none",))
EVIL = "<script>alert(1)<.script><img src=x onerror=alert(2)>"
"""A method's name; records refuse a slash in one."""


class Parsed(HTMLParser):
    """A page's elements with their attributes, and the text of its scripts of data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.texts: list[str] = []
        self._open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._open = dict(attrs).get("id") or "code"

    def handle_endtag(self, tag: str) -> None:
        self._open = "" if tag == "script" else self._open

    def handle_data(self, data: str) -> None:
        if self._open:
            self.scripts[self._open] = self.scripts.get(self._open, "") + data
        else:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(*records: Record, **options: Any) -> Parsed:
    return Parsed(page(records, Path("runs"), sources=BARE, **options))


def made() -> list[Record]:
    return [make_record(method, seed, proxy=0.7) for method in ("fedpft", "fedot") for seed in (0, 1)]


def test_each_number_leads_to_its_records_and_these_to_file_and_command() -> None:
    found = parsed(*made(), links="../runs/")
    content = json.loads(found.scripts["content"])
    excerpts = json.loads(found.scripts["excerpts"])
    targets = {str(a["href"]).removeprefix("#run-") for a in found.all("a") if str(a.get("href")).startswith("#run-")}
    assert targets == {run["name"] for run in content["runs"]} == excerpts.keys()
    for run, record in zip(content["runs"], made(), strict=True):
        assert run["key"] == record.key
        assert run["file"] == f"records/agnews-noniid/{run['kind']}/s{run['seed']}-{record.key[:12]}.json"
        assert run["command"][:2] == ["fedbench run", f"--method {run['kind']}"]
        assert excerpts[run["name"]]["compute"]["local_steps"] == 750
    assert found.all("script")[-1]["data-links"] == "../runs/"


def test_what_a_record_says_is_never_markup() -> None:
    record = altered(make_record(EVIL, proxy=0.7), {"provenance.device": "</script><script>alert(3)</script>"})
    failed = altered(make_record("fedot", status="failed"), {"error.message": "<b onclick=alert(4)>"})
    live = Live("k" * 64, EVIL, "tweets-iid", EVIL, 0, 1, 2, 0.5, 50.0, EVIL, [["plug-in", 1, 1.0, 50.0]])
    text = page([record, failed], Path(EVIL), [live], sources=BARE)
    found = Parsed(text)
    assert [script.get("type") for script in found.all("script")] == ["application/json"] * 3 + [None, None]
    assert not found.all("img")
    assert not found.all("b")
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert EVIL in "".join(found.texts), "it is shown as it is"
    content, excerpts = json.loads(found.scripts["content"]), json.loads(found.scripts["excerpts"])
    assert content["runs"][0]["method"] == EVIL
    assert excerpts[record.key[:12]]["provenance"]["device"] == "</script><script>alert(3)</script>"


def test_data_in_a_script_cannot_end_it() -> None:
    text = "</script><!--<script>]]>&amp;\u2028"
    assert not set("<>&\u2028") & set(embedded({text: [text]}))
    assert json.loads(embedded({text: [text]})) == {text: [text]}


def test_nothing_is_loaded_from_elsewhere() -> None:
    pytest.importorskip("vl_convert")
    pytest.importorskip("itables")
    sources = libraries()
    text = page(made(), Path("runs"), sources=sources)
    found = Parsed(text)
    assert not [attributes for _, attributes in found.elements if "src" in attributes]
    assert [link["href"] for link in found.all("link")] == ["data:,"]
    assert not re.search(r"@import|url\(", "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL)))
    [policy] = [str(meta["content"]) for meta in found.all("meta") if meta.get("http-equiv")]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "http" not in policy
    assert not [a["href"] for a in found.all("a") if not str(a["href"]).startswith("#")]
    assert len(text) < 3_000_000
    assert found.scripts["code"].startswith(sources.plots[:100])


def test_the_committed_results_make_a_page_below_ten_megabytes() -> None:
    results = Path(__file__).parents[2] / "results"
    text = page(load_all(results / "records"), results, sources=BARE)
    assert len(text.encode()) < 5_000_000, "the libraries add less than 2"
    assert len(json.loads(Parsed(text).scripts["content"])["runs"]) == 90


def test_a_page_reads_as_a_document() -> None:
    found = parsed(*made())
    assert found.all("html")[0]["lang"] == "en"
    assert len(found.all("h1")) == 1
    assert len(found.all("caption")) == len(found.all("table")) == 3
    assert all(head.get("scope") in ("col", "row") for head in found.all("th"))
    charts = [div for div in found.all("div") if div.get("class") == "chart"]
    assert len(charts) == len(found.all("figcaption")) > 5
    assert all(chart["role"] == "img" and chart["aria-label"] for chart in charts)


def test_a_measure_that_no_run_has_has_no_plot_but_a_line() -> None:
    text = page([make_record("fedavg-lora")], Path("runs"), sources=BARE)
    assert 'id="plot-gap"' not in text
    assert "Of these nothing is recorded: " in text
    assert "Proxy gap against gradient error" in text


def test_runs_under_way_are_shown_where_there_is_no_record_yet() -> None:
    live = Live("k" * 64, "fedot", "tweets-iid", "minilm-l6", 3, 2, 10, None, 61.5, "now", [["proxy", 2, 4.5, 61.5]])
    found = parsed(live=[live], served=True)
    content = json.loads(found.scripts["content"])
    assert content["figures"]["accuracy"]["rows"] == [[0, "proxy", 2, 4.5, 61.5]]
    assert (content["runs"][0]["method"], content["runs"][0]["section"]) == ("fedot", "tweets-iid, minilm-l6")
    assert {"max": "10", "value": "2"}.items() <= found.all("progress")[0].items()


def test_the_files_of_records_are_linked_from_where_the_page_lies(tmp_path: Path) -> None:
    assert link_to(tmp_path / "runs", tmp_path / "out" / "report.html") == "../runs/"
    assert link_to(tmp_path, tmp_path / "report.html") == "./"


def test_every_plot_is_one_that_vega_lite_knows() -> None:
    vl_convert = pytest.importorskip("vl_convert")
    for plot in plots(["fedpft", "fedot"]):
        drawn = vl_convert.vegalite_to_vega(plot.spec | {"data": {"values": []}, "width": 300})
        assert drawn["marks"], plot.name


def test_missing_packages_are_one_line_that_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    libraries.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(FedbenchError, match=r"vl_convert is not installed; pip install 'fedbench\[report\]'"):
        libraries()


def test_a_report_is_made_without_torch(tmp_path: Path) -> None:
    save(make_record(proxy=0.7), tmp_path / "records")
    program = (
        "import sys\nfrom pathlib import Path\nfrom fedbench.records.store import load_all\n"
        "from fedbench.report.libraries import Libraries\nfrom fedbench.report.page import page\n"
        "from fedbench.report.serve import Report\n"
        f"root = Path({str(tmp_path)!r})\n"
        "assert Report(root, Libraries('', '', ())).page()\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"
