"""Check the report in a browser, Debian's Chromium, without a network."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from studies.outcome.report.page import write

pytestmark = pytest.mark.xdist_group("browser")

CHARTS = {
    "pareto",
    "importance-val_accuracy",
    "importance-cam_ssim",
    "parallel",
    "curve-accuracy",
    "curve-ssim",
    "errors",
    "throughput",
}
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        started = playwright.chromium.launch(executable_path=chromium, args=options)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(make_study: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("studies.outcome.report.importance._ROUNDS", 1)
        return write(make_study(16))


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """Return a function that opens a page; a console message, dialog or request fails the test."""
    complaints: list[str] = []
    pages: list[Page] = []

    def open_(path: Path, **options: Any) -> Page:
        page = browser.new_page(**options)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("data:", "file:"))
                else complaints.append(request.url)
            ),
        )
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-drawn]")
        pages.append(page)
        return page

    yield open_
    for page in pages:
        page.close()
    assert complaints == []


def marks(page: Page, chart: str, kind: str = "symbol") -> Locator:
    return page.locator(f"[data-chart={chart}] .role-mark.mark-{kind} path")


def test_every_chart_is_drawn_and_nothing_is_asked_of_a_network(
    open_page: Open, report: Path
) -> None:
    page = open_page(report)
    drawn = page.locator("[data-chart]").evaluate_all("all => all.map(each => each.dataset.chart)")
    assert set(drawn) == CHARTS
    for chart in CHARTS:
        box = page.locator(f"[data-chart={chart}] svg.marks").bounding_box()
        assert box is not None
        assert box["width"] > 200
        assert box["height"] > 50
    front = page.locator("#rows [title='on the Pareto front']").count()
    assert marks(page, "pareto").count() == 15 + front
    assert marks(page, "parallel", "line").count() == 15
    assert page.locator("[data-chart=errors] .mark-rect path").count() >= 3 * 3


def test_filters_show_some_of_the_trials_in_charts_and_table(open_page: Open, report: Path) -> None:
    page = open_page(report)
    assert page.locator("#count").inner_text() == "15 of 15 trials"
    # Uses the keyboard alone.
    page.locator("select[name=filter_loss]").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("select[name=filter_loss]").input_value() == "BCPL"
    page.wait_for_function("document.getElementById('count').value === '4 of 15 trials'")
    assert page.locator("#rows tbody tr:visible").count() == 4
    expect(marks(page, "curve-accuracy")).to_have_count(4)  # Charts follow in a later frame.
    page.select_option("select[name=filter_state]", "stopped")
    page.wait_for_function("document.getElementById('count').value === '0 of 15 trials'")
    page.get_by_role("button", name="Show all").click()
    page.wait_for_function("document.getElementById('count').value === '15 of 15 trials'")
    expect(marks(page, "curve-accuracy")).to_have_count(15)


def test_hovering_shows_a_trial_and_its_class_cams(open_page: Open, report: Path) -> None:
    page = open_page(report)
    points = page.locator("[data-chart=throughput] .role-mark path")
    points.first.scroll_into_view_if_needed()
    box = points.first.bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tooltip = page.locator("#vg-tooltip-element")
    tooltip.locator("img").wait_for()
    assert tooltip.locator("img").evaluate("image => image.naturalWidth") == 3 * 28
    assert "accuracy" in tooltip.inner_text()


def test_names_are_text_whatever_they_hold(open_page: Open, report: Path) -> None:
    page = open_page(report)
    assert page.locator(".gallery thead th").last.inner_text() == "<b>bird</b>"
    assert "<script>alert(1)</script>" in page.locator("#trials li").inner_text()
    # Four rows of three classes: prototypes, baseline, accuracy, and ssim with knee.
    assert page.locator(".gallery img").count() == 4 * 3


def test_it_is_dark_where_the_reader_is_and_light_on_paper(open_page: Open, report: Path) -> None:
    def brightness(page: Page, selector: str, what: str) -> int:
        script = "(element, what) => getComputedStyle(element)[what].match(/\\d+/g).map(Number)"
        return sum(page.locator(selector).first.evaluate(script, what)[:3])

    page = open_page(report, color_scheme="dark")
    label = "[data-chart=pareto] .role-axis-label text"
    assert brightness(page, "body", "backgroundColor") < 150
    assert brightness(page, label, "fill") > 600
    page.locator("#theme").click()
    assert brightness(page, "body", "backgroundColor") > 700
    assert brightness(page, label, "fill") < 200
    page.locator("#theme").click()
    page.emulate_media(media="print")
    assert brightness(page, "body", "backgroundColor") > 700
    assert brightness(page, label, "fill") < 200
    assert page.locator("nav").is_hidden()
    assert page.pdf().startswith(b"%PDF")


def test_it_fits_a_telephone(open_page: Open, report: Path) -> None:
    page = open_page(report, viewport={"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_a_study_of_few_trials_and_no_bundle_has_a_report(open_page: Open, make_study: Any) -> None:
    path = write(make_study(3, bundles=False))
    page = open_page(path)
    drawn = page.locator("[data-chart]").evaluate_all("all => all.map(each => each.dataset.chart)")
    assert set(drawn) == {"pareto", "parallel", "curve-accuracy", "curve-ssim", "throughput"}
    assert "exported no bundles" in page.locator("#best").inner_text()
    assert "Too few trials" in page.locator("#importance").inner_text()
