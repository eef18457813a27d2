"""Every page of the built site in a browser, as a reader without a network sees it: on a desk, on a phone, in the dark.

TINYMOE_SITE names the folder: `make docs`, then `TINYMOE_SITE=docs/_build/html pytest tests/docs`.
"""

import functools
import http.server
import os
import re
import shutil
import threading
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

pytestmark = pytest.mark.site
if not os.environ.get("TINYMOE_SITE"):
    pytest.skip("needs a built site: make docs, and TINYMOE_SITE=docs/_build/html", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tinymoe[browser]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if not CHROMIUM:
    pytest.skip("needs a browser: apt-get install chromium, or CHROMIUM=path", allow_module_level=True)

SITE = Path(os.environ["TINYMOE_SITE"]).resolve()
PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if "_static" not in path.parts)
EXPLORER = "routing_explorer.html"  # no page of the theme's: tests/analysis/test_browser.py drives it
OURS = [page for page in PAGES if page != EXPLORER]
PHONE = {"width": 380, "height": 740}
READABLE = 4.5  # WCAG AA, the contrast of text with what lies behind it
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
every_page = pytest.mark.parametrize("page", OURS)


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def base():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def desk(browser):
    context = browser.new_context(color_scheme="light", viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture(scope="module")
def phone(browser):
    context = browser.new_context(color_scheme="dark", viewport=PHONE)
    yield context
    context.close()


class Visit:
    """An open page, and whatever went wrong while it was."""

    def __init__(self, context, base, page):
        self.wrong, self.page = [], context.new_page()

        def said(message):
            if message.type in ("error", "warning"):
                self.wrong.append(message.text)

        def answered(answer):
            if answer.status >= 400:
                self.wrong.append(f"{answer.status} {answer.url}")

        def guard(route):
            if route.request.url.startswith((base, "data:", "blob:")):
                route.continue_()
            else:
                self.wrong.append(f"asks {route.request.url}")
                route.abort()

        self.page.on("console", said)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("response", answered)
        self.page.route("**/*", guard)
        self.page.goto(base + page, wait_until="load")

    def __enter__(self):
        return self.page

    def __exit__(self, kind, *_):
        self.page.close()
        if kind is None:
            assert self.wrong == []


def typeset(page):
    """Wait until MathJax has done its work, if there are formulas."""
    if page.locator(".math").count():
        page.wait_for_function("window.MathJax?.startup?.promise")
        page.evaluate("MathJax.startup.promise.then(() => document.fonts.ready).then(() => 1)")


def images(page, selector, condition):
    return page.eval_on_selector_all(selector, f"all => all.filter(image => {condition}).map(image => image.src)")


@every_page
def test_page_is_whole_without_a_network(page, base, desk):
    with Visit(desk, base, page) as opened:
        typeset(opened)
        formulas = opened.locator(".math").count()
        assert opened.locator(".math mjx-container").count() >= formulas
        assert opened.locator("mjx-merror").count() == 0
        if formulas:
            loaded = "[...document.fonts].some(font => font.family.startsWith('MJX') && font.status == 'loaded')"
            assert opened.evaluate(loaded)
        assert opened.locator("h1").count() >= 1 or page == "search.html"
        assert images(opened, "main img", "!image.hasAttribute('alt')") == [], "without alt text"
        # A thumbnail stands beside the title of its lesson, and says nothing more.
        figures = "main img:not(.sphx-glr-thumbnails img)"
        assert images(opened, figures, "image.alt.trim().length < 8") == [], "figures whose alt text says nothing"
        assert images(opened, "img", "image.complete && !image.naturalWidth") == [], "broken"


@every_page
def test_page_fits_a_phone_and_is_readable_in_the_dark(page, base, phone):
    with Visit(phone, base, page) as opened:
        typeset(opened)
        assert opened.evaluate("document.documentElement.dataset.theme") == "dark"
        if opened.evaluate("document.documentElement.scrollWidth > innerWidth"):
            pytest.fail(f"it scrolls sideways: {opened.evaluate(WIDE)}")
        faint = [found for found in opened.evaluate(CONTRAST) if found["ratio"] < READABLE]
        assert faint == []


# What reaches beyond the right edge.
WIDE = """() => [...document.querySelectorAll('body *')]
  .filter(element => element.getBoundingClientRect().right > innerWidth + 1)
  .map(element => element.outerHTML.slice(0, 150)).slice(-5)"""

# The least contrast of each pair of colours of text and of what lies behind it, by WCAG's formula.
CONTRAST = """() => {
  const unread = 'script, style, noscript, mjx-container, svg, .headerlink, .copybtn, .visually-hidden';
  const channels = colour => (colour.match(/[\\d.]+/g) || []).map(Number);
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = channels(getComputedStyle(e).backgroundColor);
      if (c.length >= 3 && (c[3] ?? 1) > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const found = {};
  const texts = document.createTreeWalker(document.querySelector('main') || document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim(), element = texts.currentNode.parentElement;
    if (!text || element.closest(unread) || !element.checkVisibility()) continue;
    const colour = getComputedStyle(element).color, back = behind(element);
    const [more, less] = [light(channels(colour)), light(back)].sort((x, y) => y - x);
    const ratio = (more + 0.05) / (less + 0.05);
    found[colour + back] ??= {ratio, colour, back: back.join(), text: text.slice(0, 40), class: element.className};
  }
  return Object.values(found);
}"""


def addresses(html):
    """Return what a page links to or loads, as written."""
    return {found.replace("&amp;", "&") for found in re.findall(r'(?:href|src)="([^"]*)"', html)}


def target(page, address):
    """Return the file of the site that an address on a page leads to."""
    return unquote(urlsplit(urljoin(f"/{page}", address)).path).lstrip("/")


def anchors(html):
    """Return what a page can be entered at."""
    return set(re.findall(r'\bid="([^"]*)"', html)) | set(re.findall(r'<a name="([^"]*)"', html))


@pytest.fixture(scope="module")
def html():
    return {page: (SITE / page).read_text("utf-8") for page in PAGES}


@every_page
def test_links_and_anchors_of_the_site_lead_somewhere(page, html):
    missing = []
    for address in addresses(html[page]):
        parts = urlsplit(address)
        if parts.scheme or address.startswith("//") or not address:
            continue
        path = target(page, address)
        known = not parts.fragment or path not in html or unquote(parts.fragment) in anchors(html[path])
        if not (SITE / path).is_file() or not known:
            missing.append(address)
    assert missing == []


def test_every_page_can_be_reached_from_the_start(html):
    seen, waiting = set(), ["index.html"]
    while waiting:
        page = waiting.pop()
        if page not in seen:
            seen.add(page)
            waiting += [to for to in (target(page, address) for address in addresses(html[page])) if to in html]
    made_by_sphinx = {"search.html", "genindex.html"}
    assert set(PAGES) - seen <= made_by_sphinx


@pytest.mark.parametrize("word", ["softmax", "dispatch", "route_backward"])
def test_search_finds_a_word_without_a_network(word, base, desk):
    with Visit(desk, base, f"search.html?q={word}") as opened:
        opened.wait_for_function("/\\d/.test(document.querySelector('.search-summary')?.textContent)")
        opened.wait_for_selector("#search-results ul.search a")
        opened.locator("#search-results ul.search a").first.click()
        opened.wait_for_load_state()
        assert word in opened.locator("body").inner_text().lower()


def test_a_reader_can_choose_the_dark(base, desk):
    with Visit(desk, base, "index.html") as opened:
        before = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        opened.locator(".theme-switch-button:visible").first.click()
        opened.locator(".theme-change-button[data-mode=dark]:visible").first.click()
        assert opened.evaluate("document.documentElement.dataset.theme") == "dark"
        assert opened.evaluate("getComputedStyle(document.body).backgroundColor") != before


def test_the_explorer_works_inside_its_page(base, desk):
    with Visit(desk, base, EXPLORER) as opened:
        check_explorer(opened.main_frame)
    with Visit(desk, base, "explorer.html") as opened:
        check_explorer(next(frame for frame in opened.frames if frame.url.endswith(EXPLORER)))


def check_explorer(frame):
    frame.wait_for_selector(".token")
    before = frame.eval_on_selector_all(".token", "all => all.map(token => token.style.background)")
    assert len(set(before)) > 1
    slider = frame.locator("#layer")
    slider.focus()
    slider.press("Home" if slider.input_value() != "0" else "End")
    after = frame.eval_on_selector_all(".token", "all => all.map(token => token.style.background)")
    assert after != before
    frame.locator(".token").nth(7).hover()
    found = frame.eval_on_selector_all("#rows .row", "all => all.map(row => +row.dataset.probability)")
    assert abs(sum(found) - 1) < 1e-9


@pytest.mark.parametrize("page", [page for page in OURS if re.search(r"lessons/lesson_", page)])
def test_lesson_has_its_script_and_its_notebook(page, html):
    name = Path(page).stem
    for ending in ("py", "ipynb"):
        assert re.search(rf'href="[^"]*_downloads/[^"]*{name}\.{ending}"', html[page])
    if '<details class="answers">' in html[page]:
        assert html[page].count('<details class="answers">') == html[page].count("</details>")


def test_nothing_of_the_site_names_an_address_to_load_from(html):
    """The browser asked for none; neither do pages that are loaded in other ways."""
    loads = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//', re.IGNORECASE)
    found = {page: loads.findall(text) for page, text in html.items()}
    assert {page: of for page, of in found.items() if of} == {}
