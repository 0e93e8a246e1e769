"""report.html in a real, headless Chromium: it asks for nothing else, complains of nothing, and
shows what report.json says, on wide and narrow screens, light, dark and printed.

Skipped where there is no Chromium. Not covered: other browsers, screen readers.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pipeline.commit import Example
from pipeline.report import RunStatus, write_report
from tests import report_cases as cases

pytestmark = pytest.mark.timeout(900)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
PATIENCE_MS = 120_000  # a machine at work may take long over a page that takes a second
WHITE = "rgb(255, 255, 255)"
LEAST_CONTRAST = 4.5  # WCAG 2.2, level AA, for text
STOPPED = "stopped by SIGTERM; the same command resumes"
HOSTILE = '<script>console.error("run")</script>"\'&\u202etxt.exe\x07' + "x" * 300
UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3, "d": 86400, "h": 3600, "min": 60, "%": 0.01}

HOSTILE_TOTALS = replace(
    cases.result(cases.ALL_FAILED).totals,
    examples={"image_not_found": [Example(HOSTILE, HOSTILE, 7, HOSTILE * 3)]},
)
HOSTILE_MANIFEST = {
    **cases.MANIFEST,
    "config": {**cases.MANIFEST["config"], "name": HOSTILE, "sampling": {"stop": [HOSTILE]}},
    "engine": {"engine_args": {"chat_template": HOSTILE}},
}
EXPERTS = replace(cases.result(cases.ONE_NIGHT).totals, experts=cases.skewed_load())
EIGHT_RANKS = {
    **cases.MANIFEST,
    "engine": {"engine_args": {"enable_expert_parallel": True, "tensor_parallel_size": 8}},
}
RUNS = {
    "one-night": cases.result(cases.ONE_NIGHT),
    "no-rows": cases.result(cases.Night(0)),
    "one-row": cases.result(cases.Night(1, rows=1, replicas=1)),
    "one-long-shard": cases.result(cases.Night(1, rows=5_000, replicas=1, open_s=70)),
    "all-failed": cases.result(cases.ALL_FAILED, status=RunStatus.OVER_ERROR_RATE),
    "every-code": cases.result(cases.EVERY_CODE, status=RunStatus.OVER_ERROR_RATE),
    "interrupted": cases.result(
        cases.SEVERAL_STARTS, status=RunStatus.INTERRUPTED, rows_total=98_304, error=STOPPED
    ),
    "nothing-done": cases.result(
        cases.Night(0), status=RunStatus.FAILED, rows_total=10**7, error=HOSTILE
    ),
    "many-replicas": cases.result(cases.MANY_REPLICAS),
    "hostile": replace(cases.result(cases.ALL_FAILED), totals=HOSTILE_TOTALS),
    "experts": replace(cases.result(cases.ONE_NIGHT), totals=EXPERTS),
}
MANIFESTS = {"hostile": HOSTILE_MANIFEST, "experts": EIGHT_RANKS}


@dataclass
class Seen:
    """What a page did beside being there."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)} is on PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS, timeout=PATIENCE_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run folder per kind of run, with its report."""
    folders = {name: tmp_path_factory.mktemp(name) for name in RUNS}
    for name, folder in folders.items():
        manifest = MANIFESTS.get(name, cases.MANIFEST)
        money = None if name == "one-row" else cases.MONEY
        write_report(replace(RUNS[name], run=f"file://{folder}"), manifest, money)
    return folders


@contextmanager
def opened(
    browser: Browser, folder: Path, *, scheme: str = "light"
) -> Iterator[tuple[Page, dict[str, Any]]]:
    """The page, and report.json; in the end it must have asked for nothing and complained of
    nothing."""
    context = browser.new_context(
        viewport={"width": 1180, "height": 900}, color_scheme=scheme, offline=True
    )
    seen = Seen()
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("console", lambda message: seen.complaints.append(message.text))
    page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    try:
        page.goto((folder / "report.html").as_uri())
        yield page, json.loads((folder / "report.json").read_text())
        assert [url for url in seen.requests if not url.startswith("data:")] == [
            (folder / "report.html").as_uri()
        ]
        assert seen.complaints == []
    finally:
        context.close()


def value_at(document: Any, path: str) -> Any:
    for key in path.split("."):
        document = document[int(key) if isinstance(document, list) else key]
    return document


def read_by_people(text: str) -> float:
    """The number that a text like ``19.4 M``, ``20 min 36 s`` or ``0.59 %`` stands for."""
    numbers = re.findall(r"([\d.,]+(?:e-?\d+)?)(?: (T|B|M|k|d|h|min|%)(?= |$))?", text)
    return sum(float(digits.replace(",", "")) * UNITS.get(unit, 1) for digits, unit in numbers)


def background(page: Page) -> str:
    found: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return found


def shown_values(page: Page) -> list[list[str]]:
    """Path, exact value and visible text of every value on the page, closed tables included."""
    found: list[list[str]] = page.eval_on_selector_all(
        "data[data-path]", "all => all.map(e => [e.dataset.path, e.value, e.textContent])"
    )
    return found


@pytest.mark.parametrize("name", RUNS)
def test_every_value_on_the_page_is_that_of_report_json(
    browser: Browser, pages: Mapping[str, Path], name: str
) -> None:
    with opened(browser, pages[name]) as (page, report):
        shown = shown_values(page)
        assert {"rows.total", "rows.errored", "tokens.completion"} <= {path for path, _, _ in shown}
        for path, value, text in shown:
            stored = value_at(report, path)
            assert value == str(stored), path
            if not text.startswith(("<", ">")):  # "< 0.01 %"
                assert read_by_people(text) == pytest.approx(stored, rel=0.006, abs=5e-5), path
        assert page.get_attribute("#status", "data-status") == report["status"]
        assert page.locator("#replicas svg").count() == min(64, len(report["replicas"]))
        assert page.locator("#bins tbody tr").count() == sum(
            len(stretch["rows"]) for stretch in report["throughput"]["stretches"]
        )
        codes = page.locator("#errors code.code").all_text_contents()
        assert codes == [detail["code"] for detail in report["error_details"]]


@pytest.mark.parametrize(
    ("name", "word", "lead"),
    [
        (
            "one-night",
            "Complete, with errors",
            "97,728 of 98,304 rows succeeded, 576 failed. The run",
        ),
        ("one-row", "Complete", "1 of 1 rows succeeded. The run"),
        ("all-failed", "Too many errors", "0 of 200 rows succeeded, 200 failed. The run"),
        ("interrupted", "Interrupted", "192 failed, 49,152 are not done yet. The run"),
        ("nothing-done", "Failed", "0 of 10,000,000 rows succeeded, 10,000,000 are not done yet."),
    ],
)
def test_the_first_lines_say_what_came_of_the_run(
    browser: Browser, pages: Mapping[str, Path], name: str, word: str, lead: str
) -> None:
    with opened(browser, pages[name]) as (page, report):
        assert page.inner_text("#status") == word
        assert lead in page.inner_text("#lead")
        for card, value in {
            "rows": report["rows"]["total"],
            "failed": report["rows"]["errored"],
            "time": report["time"]["active_s"],
            "tokens": report["tokens"]["completion"],
        }.items():
            assert page.get_attribute(f"#card-{card} b data", "value") == str(value)
        if "money" in report:
            cost = page.get_attribute("#card-cost b data", "value")
            assert cost == str(report["money"]["cluster"]["cost"])
        if "error" in report:
            assert report["error"][:20] in page.inner_text("#error")


@pytest.mark.parametrize("name", RUNS)
def test_pages_fit_the_screen_and_can_be_read(
    browser: Browser, pages: Mapping[str, Path], name: str
) -> None:
    with opened(browser, pages[name]) as (page, _):
        for width, scheme in ((1180, "light"), (1180, "dark"), (390, "light"), (390, "dark")):
            page.set_viewport_size({"width": width, "height": 900})
            page.emulate_media(color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert (background(page) == WHITE) == (scheme == "light")
            contrasts = page.evaluate(CONTRASTS)
            assert [found for found in contrasts if found[0] < LEAST_CONTRAST] == []
            assert len(contrasts) > 30
            assert page.evaluate(OVERLAPS) == []


def test_the_bars_are_as_high_as_their_values(browser: Browser, pages: Mapping[str, Path]) -> None:
    with opened(browser, pages["interrupted"]) as (page, report):
        bars = page.eval_on_selector_all(
            "#plot-throughput .bar",
            "all => all.map(e => [Number(e.dataset.value), e.getBoundingClientRect().height])",
        )
        throughput = report["throughput"]
        rates = [
            tokens / throughput["bin_s"]
            for stretch in throughput["stretches"]
            for tokens in stretch["completion_tokens"]
        ]
        assert [value for value, _ in bars] == pytest.approx([rate for rate in rates if rate])
        scale = max(height for _, height in bars) / max(value for value, _ in bars)
        for value, height in bars:
            assert height == pytest.approx(value * scale, abs=0.1)


def test_the_experts_of_each_layer_are_as_dark_as_they_are_busy(
    browser: Browser, pages: Mapping[str, Path]
) -> None:
    with opened(browser, pages["experts"]) as (page, report):
        layers = report["experts"]["layers"]
        assert page.locator("#experts tbody tr").count() == len(layers) == 24
        for layer in (layers[0], layers[-1]):
            cells = page.eval_on_selector_all(
                f"#layer-{layer['layer']} path",
                "all => all.map(e => [Number(e.getAttribute('fill-opacity')), "
                "(e.getAttribute('d').match(/M\\d+/g)).map(m => Number(m.slice(1)))])",
            )
            drawn = {expert: opacity for opacity, experts in cells for expert in experts}
            assert set(drawn) == {e for e, count in enumerate(layer["tokens"]) if count}
            assert drawn[layer["busiest"]] == max(drawn.values()) == 1
            by_load = sorted(drawn, key=lambda expert: layer["tokens"][expert])
            assert [drawn[expert] for expert in by_load] == sorted(drawn.values())
    with opened(browser, pages["one-night"]) as (page, _):
        assert page.locator("#experts").count() == 0


def test_a_pause_between_starts_is_a_gap_in_the_charts(
    browser: Browser, pages: Mapping[str, Path]
) -> None:
    with opened(browser, pages["interrupted"]) as (page, report):
        assert len(report["throughput"]["stretches"]) == 3
        pauses = page.locator("#plot-throughput .pause").all()
        boxes = [box for pause in pauses if (box := pause.bounding_box())]
        assert len(boxes) == 2
        for bar in page.locator("#plot-throughput .bar").all()[::10]:
            box = bar.bounding_box()
            assert box is not None
            middle = box["x"] + box["width"] / 2
            assert not any(pause["x"] < middle < pause["x"] + pause["width"] for pause in boxes)
        assert "Nothing ran for" in page.inner_text("#throughput")


def test_hostile_texts_are_shown_and_nothing_else(
    browser: Browser, pages: Mapping[str, Path]
) -> None:
    with opened(browser, pages["hostile"]) as (page, _):
        assert page.locator("script").count() == 0
        shown = page.inner_text("#errors")
        assert '<script>console.error("run")</script>' in shown
        assert "\\u202etxt.exe\\u0007" in shown
        assert "\u202e" not in page.content()
        assert page.title().startswith("<script>")


def test_a_printed_page_is_light_and_has_all_but_the_tables_of_charts(
    browser: Browser, pages: Mapping[str, Path]
) -> None:
    with opened(browser, pages["one-night"], scheme="dark") as (page, _):
        page.emulate_media(media="print")
        assert background(page) == WHITE
        assert page.locator("details.figures").first.is_hidden()
        assert page.locator("#plot-throughput .bar").first.is_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_pages_are_small(pages: Mapping[str, Path]) -> None:
    sizes = {name: (folder / "report.html").stat().st_size for name, folder in pages.items()}
    assert max(sizes.values()) < 200_000, sizes


CONTRASTS = """() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = color => {
    const [r, g, b] = channels(color).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const found = getComputedStyle(e).backgroundColor;
      if (channels(found)[3] !== 0) return found;
    }
    return "rgb(255, 255, 255)";
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (texts.nextNode()) {
    const element = texts.currentNode.parentElement;
    if (!texts.currentNode.data.trim() || element.closest("svg") || !element.checkVisibility())
      continue;
    const [a, b] = [light(getComputedStyle(element).color), light(behind(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), texts.currentNode.data]);
  }
  return found;
}"""
"""[contrast, text] of every visible text, by WCAG's formula."""

OVERLAPS = """() => {
  const found = [];
  for (const plot of document.querySelectorAll(".plot")) {
    const boxes = [...plot.querySelectorAll(".x")].map(e => e.getBoundingClientRect());
    boxes.slice(1).forEach((box, i) => {
      if (box.left < boxes[i].right) found.push([plot.id, i]);
    });
  }
  return found;
}"""
"""Labels of charts' axes that touch the one before."""
