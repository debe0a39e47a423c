"""The report in a real browser: filters, sorting, records, plots, and what axe-core says of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _records import altered, make_record

from fedbench.records.record import Record
from fedbench.records.store import load_all, save
from fedbench.report.page import link_to, page
from fedbench.report.serve import Report, server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

expect = pytest.importorskip("playwright.sync_api").expect
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

RESULTS = Path(__file__).parents[2] / "results"
WIDTHS = {"phone": (390, 844), "tablet": (820, 1180), "desktop": (1440, 900)}
EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("FEDBENCH_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    assert path, "no Chromium here: apt-get install chromium, or name one in FEDBENCH_CHROMIUM"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Root has no sandbox in containers; the pages are our own.
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the committed results."""
    out = tmp_path_factory.mktemp("committed") / "report.html"
    out.write_text(page(load_all(RESULTS / "records"), RESULTS, links=link_to(RESULTS, out)), encoding="utf-8")
    return out


def every_kind() -> list[Record]:
    """Records with what the committed ones have not: names that look like markup, a failure, curves, many clients."""
    counts = [[1, 3], [2, 2]] * 100
    curve = [{"layer": layer, "hidden": 0.1, "curve": [0.5, 0.3, 0.2]} for layer in range(3)]
    crowd = {"partition.label_counts": counts, "partition.sizes": [4] * 200, "distillation": curve}
    return [
        *(altered(make_record("fedpft", seed, proxy=0.7), crowd) for seed in range(3)),
        make_record(EVIL, proxy=0.6),
        altered(make_record("fedot", status="failed"), {"error.message": EVIL}),
    ]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mixed") / "report.html"
    out.write_text(page(every_kind(), Path(EVIL)), encoding="utf-8")
    return out


class Complaints(list[str]):
    """What the console of a page said, and what it asked the network for."""

    def watch(self, shown: Page) -> None:
        shown.on("console", lambda message: self.append(f"{message.type}: {message.text}"))
        shown.on("pageerror", lambda error: self.append(str(error)))
        shown.on("dialog", lambda dialog: (self.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        shown.on("request", lambda request: self.asked(request.url))

    def asked(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.append(url)


def opened(browser: Browser, file: Path, size: str = "desktop", scheme: str = "light") -> tuple[Page, Complaints]:
    width, height = WIDTHS[size]
    shown, complaints = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme), Complaints()
    complaints.watch(shown)
    shown.set_default_timeout(15_000)
    shown.goto(file.as_uri())
    shown.wait_for_selector("#board .dt-column-order")
    return shown, complaints


def draw_all(shown: Page) -> None:
    """Scroll past every plot, so that each is drawn."""
    for figure in shown.locator("figure[data-plot]").all():
        figure.scroll_into_view_if_needed()
        expect(figure.locator(".chart svg, .chart p").first).to_be_visible()
        expect(figure.get_by_role("img")).to_have_attribute("aria-label", re.compile("points of|nothing to show"))


def serious(shown: Page) -> list[str]:
    found = axe.Axe().run(shown).response["violations"]
    return [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found if v["impact"] in ("serious", "critical")]


@pytest.mark.parametrize("size", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["committed", "mixed"])
def test_the_page_is_whole_and_accessible(
    browser: Browser, request: pytest.FixtureRequest, tmp_path: Path, size: str, scheme: str, which: str
) -> None:
    shown, complaints = opened(browser, request.getfixturevalue(which), size, scheme)
    draw_all(shown)
    assert shown.locator("figure svg").count() >= 8
    for details in shown.locator("details").all()[:8]:
        details.locator("summary").click()
    assert shown.evaluate("document.documentElement.scrollWidth") <= WIDTHS[size][0], "nothing is wider than the window"
    assert serious(shown) == []
    shots = Path(os.environ.get("FEDBENCH_SHOTS") or tmp_path)
    shown.screenshot(path=shots / f"{which}-{size}-{scheme}.png", full_page=True)
    shown.locator("#board a").first.click()
    expect(shown.locator("dialog")).to_be_visible()
    assert serious(shown) == []
    shown.screenshot(path=shots / f"{which}-{size}-{scheme}-record.png")
    assert complaints == []


def test_filters_narrow_lines_and_plots(browser: Browser, committed: Path) -> None:
    shown, complaints = opened(browser, committed)
    lines = shown.locator("#board tbody tr")
    assert lines.count() == 30
    shown.get_by_label("Scenario", exact=True).select_option("sst2-iid")
    expect(shown.locator("#count")).to_have_text("7 of 30 lines")
    assert set(shown.locator("#board tbody tr td:nth-child(2)").all_inner_texts()) == {"sst2-iid"}
    assert shown.locator("#section").input_value() == "sst2-iid, minilm-l6"
    shown.get_by_label("Method", exact=True).select_option("fedot")
    expect(lines).to_have_count(1)
    figure = shown.locator("#plot-accuracy-rounds")
    figure.scroll_into_view_if_needed()
    expect(figure.locator(".chart")).to_have_attribute("aria-label", re.compile(r"points of fedot; accuracy from"))
    figure.locator("summary").click()
    rows = figure.locator("tbody tr")
    expect(rows.first).to_be_visible()
    assert set(figure.locator("tbody tr td:first-child").all_inner_texts()) == {"fedot"}
    shown.get_by_role("button", name="Show all").click()
    expect(lines).to_have_count(30)
    assert complaints == []


def test_columns_sort_by_number_with_pointer_and_keyboard(browser: Browser, committed: Path) -> None:
    shown, complaints = opened(browser, committed)

    def column(place: int) -> list[float]:
        cells = shown.locator(f"#board tbody tr td:nth-child({place})").all()
        return [float(value) for cell in cells if (value := cell.get_attribute("data-order"))]

    shown.locator("#board thead th").nth(4).click()
    expect(shown.locator("#board thead th").nth(4)).to_have_attribute("aria-sort", "ascending")
    assert column(5) == sorted(column(5))
    shown.locator("#board thead th").nth(9).locator(".dt-column-order").focus()
    shown.keyboard.press("Enter")
    expect(shown.locator("#board thead th").nth(9)).to_have_attribute("aria-sort", "ascending")
    shown.keyboard.press("Enter")
    expect(shown.locator("#board thead th").nth(9)).to_have_attribute("aria-sort", "descending")
    assert column(10) == sorted(column(10), reverse=True)
    assert len(column(10)) == 20, "the gap of five proxy methods in four scenarios"
    assert complaints == []


def test_a_number_leads_to_its_record_and_back(browser: Browser, committed: Path) -> None:
    shown, complaints = opened(browser, committed)
    link = shown.get_by_label("record of fedpft on sst2-iid, seed 1", exact=True)
    link.focus()
    shown.keyboard.press("Enter")
    dialog = shown.get_by_role("dialog", name="fedpft on sst2-iid, seed 1")
    expect(dialog).to_be_visible()
    [path] = RESULTS.glob("records/sst2-iid/fedpft/s1-*.json")
    record = json.loads(path.read_text())
    text = dialog.inner_text()
    assert record["identity"]["key"] in text
    assert record["provenance"]["git"]["commit"] in text
    assert "fedbench run --method fedpft --scenario sst2-iid --seed 1 --set" in text
    excerpt = json.loads(dialog.locator(".json").inner_text())
    assert excerpt["communication"]["up"]["bytes"] == record["communication"]["up"]["bytes"]
    file = dialog.get_by_role("link", name=re.compile("json")).evaluate("link => link.href")
    assert Path(file.removeprefix("file://")) == path
    shown.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert shown.evaluate("document.activeElement.textContent") == "s1", "the focus is back on the link"
    assert complaints == []


def test_a_mark_of_a_plot_opens_its_record(browser: Browser, committed: Path) -> None:
    shown, complaints = opened(browser, committed)
    figure = shown.locator("#plot-gap")
    figure.scroll_into_view_if_needed()
    figure.locator("svg .mark-symbol path").first.click()
    expect(shown.locator("dialog h2")).to_have_text(re.compile(r".+ on .+, seed \d"))
    shown.get_by_role("button", name="Close").click()
    expect(shown.locator("dialog")).to_be_hidden()
    assert complaints == []


def test_an_address_with_a_record_opens_it(browser: Browser, committed: Path) -> None:
    [path] = RESULTS.glob("records/sst2-iid/fedot/s2-*.json")
    shown = browser.new_page()
    shown.goto(f"{committed.as_uri()}#run-{path.stem.removeprefix('s2-')}")
    expect(shown.locator("dialog h2")).to_have_text("fedot on sst2-iid, seed 2")


def test_on_paper_there_are_tables_and_plots_and_no_controls(browser: Browser, committed: Path) -> None:
    shown, _ = opened(browser, committed, scheme="dark")
    shown.evaluate("dispatchEvent(new Event('beforeprint'))")
    shown.emulate_media(media="print")
    expect(shown.locator("figure svg")).to_have_count(shown.locator("figure").count())
    assert not shown.locator("#filters").is_visible()
    assert shown.locator("#board").is_visible()
    assert shown.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert shown.pdf(format="A4", landscape=True).startswith(b"%PDF")


def test_a_served_page_follows_its_folder_and_keeps_what_was_chosen(browser: Browser, tmp_path: Path) -> None:
    for record in (make_record("fedpft", proxy=0.7), make_record("fedpft", scenario="other", proxy=0.7)):
        save(record, tmp_path / "records")
    with server(Report(tmp_path), 0) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        shown = browser.new_page()
        shown.goto(f"http://127.0.0.1:{running.server_port}/")
        shown.get_by_label("Scenario", exact=True).select_option("agnews-noniid")
        expect(shown.locator("#count")).to_have_text("1 of 2 lines")
        shown.wait_for_timeout(3500)  # until the page has asked once
        save(make_record("fedot", proxy=0.7), tmp_path / "records")
        expect(shown.locator("#count")).to_have_text("2 of 3 lines", timeout=15_000)
        assert shown.get_by_label("Scenario", exact=True).input_value() == "agnews-noniid"
        shown.close()
        running.shutdown()
