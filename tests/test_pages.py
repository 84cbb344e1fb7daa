"""The pages, in a browser: nothing is cut off or in the way, on telephones and on wide screens.

It needs Chromium, which is not on PyPI, and the pages: ``make check-docs`` builds them first.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser

BUILT = Path(__file__).parent.parent / "docs" / "_build"
SOURCES = Path(__file__).parent.parent / "docs"
PAGES = sorted(
    str(page.relative_to(SOURCES).with_suffix(".html"))
    for page in SOURCES.rglob("*.md")
    if "_build" not in page.parts
)
PAGES += ["genindex.html", "search.html", "_modules/whitepool/_session.html"]
WIDTHS = (360, 768, 1280, 1920)
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")

PAPER = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
"""The colour behind the page, in three numbers of at most 255."""

LOOK = """() => {
    const found = [];
    const tell = (what, element) => found.push(
        `${what}: <${element.tagName.toLowerCase()} class="${element.className}"> `
        + (element.textContent || "").trim().slice(0, 60));
    const width = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth > width)
        found.push(`the page is ${document.documentElement.scrollWidth} wide`);
    // What is in a box that scrolls may be wider than the box; the box may not be wider than the page.
    const isInBox = (element) => {
        for (let box = element.parentElement; box && !box.matches(".content"); box = box.parentElement)
            if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return true;
        return false;
    };
    const content = document.querySelector(".content");
    if (content.scrollWidth > content.clientWidth + 1) tell("wider than its place", content);
    for (const element of document.querySelectorAll(".main *")) {
        const style = getComputedStyle(element);
        const place = element.getBoundingClientRect();
        if (!place.width || !place.height || style.visibility === "hidden") continue;
        if (element.closest(".toc-drawer, .visually-hidden, svg")) continue;
        const isOutside = place.right > width + 1 || place.left < -1;
        if (isOutside && !isInBox(element)) tell("wider than the page", element);
        const isLonger = element.scrollWidth > element.clientWidth + 1;
        if (isLonger && ["hidden", "clip"].includes(style.overflowX)) tell("cut off", element);
        if (isLonger && element.tagName === "PRE" && width >= 1200) tell("has to be scrolled", element);
        if (element.tagName === "IMG" && !element.naturalWidth) tell("no picture", element);
    }
    return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    assert program, "install Chromium with the system's package manager"
    with sync_playwright() as playwright:
        # The sandbox does not work for root, and these pages are ours.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_cut_off(browser: Browser, page: str) -> None:
    """No element is wider than the page, in light and dark colours, and the console has no error.

    Tables may scroll in a box of their own, and so may code, but not where there is room for it.
    """
    tab = browser.new_page(viewport={"width": WIDTHS[0], "height": 900})
    try:
        errors: list[str] = []
        tab.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("requestfailed", lambda request: errors.append(f"not found: {request.url}"))
        tab.goto((BUILT / page).as_uri())
        for scheme in SCHEMES:
            tab.emulate_media(color_scheme=scheme)
            assert (sum(tab.evaluate(PAPER)) < 3 * 128) == (scheme == "dark")
            for width in WIDTHS:
                tab.set_viewport_size({"width": width, "height": 900})
                errors += [f"{scheme}, at {width}: {what}" for what in tab.evaluate(LOOK)]
    finally:
        tab.close()
    assert not errors, "\n".join(errors)
