"""The page in a real browser with the default model: search, compare, upload, cancel, map.

Screenshots are saved in build/screenshots; `make screenshots` copies some of them to docs/images.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from c2v_rag import Document, VectorIndex, shared_model
from c2v_rag.app.page import SearchApp
from c2v_rag.app.search import DEFAULT_METHODS
from c2v_rag.index import check_mode
from c2v_rag.sources import python_docs
from tests.app.test_ask import openai_server
from tests.conftest import NO_CHROMIUM

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
HOSTILE = "Evil <script>document.title='pwned'</script> ${document.title='pwned'} {{value}}"
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]  # no sandbox: root in containers

expect.set_options(timeout=60_000)
pytestmark = [pytest.mark.timeout(600), pytest.mark.xdist_group("browser")]


@pytest.fixture(scope="module")
def chromium() -> str:
    """The path of a system Chromium, else of Playwright's own; the tests are skipped if there is neither."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    if not Path(own).exists():
        pytest.skip(NO_CHROMIUM)  # tests/conftest.py counts these skips
    return own


@pytest.fixture(scope="module")
def address(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    store = tmp_path_factory.mktemp("app") / "store"
    model = shared_model()
    wanted = ("shutil", "heapq", "functools")
    documents = [document for document in python_docs() if document.source.split(".")[0] in wanted]
    VectorIndex(store, model).add([*documents, Document(HOSTILE, "hostile.txt")])
    with openai_server(["Use copytree [1], not ", "<b>copy</b> [9]. See also [2]."]) as (writer, _):
        page, address = SearchApp(store, model, writer=writer).launch(port=None, wait=False)
        yield address
        page.close()


@pytest.fixture(scope="module")
def browser_page(chromium: str, address: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 860})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@pytest.fixture
def page(browser_page: Page, address: str) -> Page:
    browser_page.goto(address)
    expect(browser_page.get_by_label("Collection")).to_have_value("documents")
    return browser_page


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label).click()
    page.get_by_role("option", name=option, exact=True).click()


def search_for(page: Page, query: str) -> None:
    page.get_by_label("Query").fill(query)
    page.get_by_label("Query").press("Enter")


def save_screenshot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def test_enter_searches_and_two_methods_can_be_compared(page: Page, address: str) -> None:
    requested: list[str] = []
    page.on("request", lambda request: requested.append(request.url))
    page.reload()
    expect(page.get_by_label("Collection")).to_have_value("documents")
    search_for(page, "How do I copy a whole folder tree?")
    first = page.locator("article.c2v-hit").first
    expect(first).to_contain_text("shutil.copytree")
    expect(first.locator("mark").first).not_to_be_empty()
    choose(page, "Compare with", "BM25")
    expect(page.locator("section h3")).to_have_text([DEFAULT_METHODS[check_mode(None)], "BM25"])
    expect(page.locator(".c2v-only").first).to_be_visible()
    save_screenshot(page, "search")
    choose(page, "Method", "Encoder alone")  # built at first use
    expect(page.locator("section h3")).to_have_text(["Encoder alone", "BM25"])
    choose(page, "Method", "Hybrid (Causal2Vec + BM25)")
    expect(page.locator("section h3")).to_have_text(["Hybrid (Causal2Vec + BM25)", "BM25"])
    assert {urlsplit(url).netloc for url in requested if url.startswith("http")} == {urlsplit(address).netloc}


def test_a_click_on_an_example_question_searches_it(page: Page) -> None:
    page.get_by_role("button", name="How can I keep only the most recent results").click()
    expect(page.locator("article.c2v-hit").first).to_contain_text("lru_cache")


def test_a_citation_in_an_answer_jumps_to_its_passage(page: Page) -> None:
    page.get_by_role("tab", name="Ask").click()
    page.get_by_label("Question").fill("How do I copy a whole folder tree?")
    page.get_by_label("Question").press("Enter")
    expect(page.locator(".c2v-by")).to_contain_text("Written by small at")
    expect(page.locator(".c2v-answer")).to_contain_text("<b>copy</b> [9]")
    cites = page.locator("a.c2v-cite")
    expect(cites).to_have_text(["1", "2"])
    cites.nth(1).click()
    expect(page.locator("#c2v-passage-2")).to_be_in_viewport()
    expect(page.locator(".c2v-hit:target .c2v-rank")).to_have_text("2")
    save_screenshot(page, "ask")


def test_html_in_texts_is_shown_and_not_run(page: Page) -> None:
    search_for(page, "evil script")
    expect(page.locator("article.c2v-hit").first).to_contain_text(HOSTILE)
    assert page.title() == "Causal2Vec search"


def test_empty_and_enormous_queries_get_an_answer(page: Page) -> None:
    search_for(page, "")
    expect(page.locator("#results")).to_contain_text("Type a question")
    search_for(page, "copy a folder " * 3572)
    expect(page.locator("#results")).to_contain_text("reads its first")
    expect(page.locator("article.c2v-hit")).to_have_count(5)


def test_an_uploaded_file_is_found(page: Page, tmp_path: Path) -> None:
    (tmp_path / "walrus.txt").write_text("A walrus uses its tusks to haul itself out of the water onto the ice.")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and then nothing")
    page.get_by_role("tab", name="Add documents").click()
    page.locator("input[type=file]").set_input_files([tmp_path / "walrus.txt", tmp_path / "broken.pdf"])
    expect(page.get_by_role("row", name="broken.pdf")).to_be_visible()
    page.get_by_role("button", name="Add", exact=True).click()
    progress = page.locator("#progress")
    expect(progress).to_contain_text("1 passages added")
    expect(progress).to_contain_text("Left out")
    save_screenshot(page, "add")
    page.get_by_role("tab", name="Search").click()
    search_for(page, "Which animal climbs on the ice with its teeth?")
    expect(page.locator("article.c2v-hit").first).to_contain_text("walrus.txt")


def test_the_page_works_after_a_run_was_cancelled(page: Page) -> None:
    page.get_by_role("tab", name="Add documents").click()
    page.get_by_label("Also add the documentation of Python's standard library").check()
    page.get_by_label("Add to this collection").fill("everything")
    page.get_by_role("button", name="Add", exact=True).click()
    progress = page.locator("#progress")
    expect(progress).to_contain_text("passages embedded", timeout=120_000)
    expect(progress.locator("progress")).to_have_attribute("value", re.compile(r"0\.\d+"))
    save_screenshot(page, "adding")
    page.get_by_role("button", name="Cancel").click()
    expect(progress).to_contain_text("Cancelled", timeout=120_000)
    save_screenshot(page, "cancelled")
    page.reload()
    expect(page.get_by_label("Collection")).to_have_value("documents")
    search_for(page, "How do I copy a whole folder tree?")
    expect(page.locator("article.c2v-hit").first).to_contain_text("shutil.copytree")


def test_a_click_on_the_map_shows_the_passage(page: Page) -> None:
    page.get_by_role("tab", name="Map").click()
    circles: Any = page.locator("svg.c2v-map circle")
    expect(circles.first).to_be_visible()
    source = circles.nth(5).locator("title").text_content()
    circles.nth(5).dispatch_event("click")
    expect(page.locator("#chosen .c2v-source")).to_have_text(source)
    save_screenshot(page, "map")
    page.get_by_role("tab", name="About").click()
    expect(page.locator("#about")).to_contain_text("tokens/s")
