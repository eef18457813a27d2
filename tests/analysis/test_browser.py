"""The explorer in a real browser: every control, by pointer and by keyboard, large and small, and no network."""

import os
import shutil

import pytest

from tinymoe import Mixtral, MixtralConfig, analysis
from tinymoe.analysis import explorer
from tinymoe.corpora import synthetic
from tinymoe.data import Document
from tinymoe.tokenizer import ByteTokenizer

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tinymoe[browser]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium, or CHROMIUM=path"),
]
E, LAYERS = 8, 3
LONG_WORD = "w" * 150


@pytest.fixture(scope="module")
def analysed():
    """The numbers and passages of a model whose gates are far apart, so that layers differ."""
    config = MixtralConfig(
        dim=32, n_layers=LAYERS, hidden_dim=8, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=E, top_k_experts=2
    )
    model = Mixtral.init(config, seed=3)
    for name, p in model.params.items():
        if name.endswith("gate"):
            p *= 10
    texts = {
        domain: [document._replace(text=document.text[:400]) for document in documents[:2]]
        for domain, documents in synthetic(0, 20_000).train.items()
    }
    odd = '<b id="x">&amp;</script><script>document.title = "broken"</script>\t"é\n' * 9 + LONG_WORD
    texts = {"odd": [Document("odd", "odd", odd.encode())], **texts}
    return analysis.analyse(model, ByteTokenizer(), texts, 64, "a model")


@pytest.fixture(scope="module")
def address(analysed, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    path.write_text(explorer.page(*analysed), "utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 860, "light"), (360, 740, "dark")], ids=["desktop", "phone"])
def page(request, browser, address):
    """The page, open; at the end nothing may have gone wrong or gone out."""
    width, height, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda sent: sent.url == address or wrong.append(sent.url))
    page.goto(address)
    yield page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    assert wrong == []
    page.close()


def colours(page):
    return page.eval_on_selector_all(".token", "all => all.map(token => token.style.background)")


def experts(page):
    return page.eval_on_selector_all(".token", "all => all.map(token => +token.dataset.expert)")


def shown_text(page):
    return page.evaluate("document.getElementById('text').textContent")


def probabilities(page):
    return page.eval_on_selector_all("#rows .row", "all => all.map(row => +row.dataset.probability)")


def current(page):
    return page.evaluate("+document.activeElement.dataset.index")


def test_text_is_shown_as_it_is_and_never_run(page, analysed):
    assert page.title() == "Routing of a model"
    assert page.locator(".token").count() == analysed[0]["domains"]["odd"]["tokens"]
    line = '<b id="x">&amp;</script><script>document.title = "broken"</script>⇥\t"\\xc3é↵\n'
    assert shown_text(page) == line * 9 + LONG_WORD
    assert len(set(colours(page))) > 2


def test_another_domain_has_another_text_and_another_load(page):
    text, load = shown_text(page), page.locator("#load").inner_text()
    page.locator("#domain").select_option(label="arithmetic")
    assert shown_text(page).startswith("arithmetic-")  # the name of a document
    assert page.locator(".document").count() == 2
    assert page.locator("#load").inner_text() != load
    page.locator("#domain").focus()
    page.keyboard.press("ArrowUp")
    assert shown_text(page) == text


def test_the_slider_goes_from_layer_to_layer_by_keyboard(page):
    slider = page.locator("#layer")
    slider.focus()
    page.keyboard.press("Home")
    seen = []
    for layer in range(LAYERS):
        assert slider.input_value() == str(layer)
        assert page.locator("#layer-out").inner_text() == f"{layer} / {LAYERS - 1}"
        seen.append((tuple(colours(page)), page.locator("#load").inner_text(), page.locator("#facts").inner_text()))
        page.keyboard.press("ArrowRight")
    assert len(set(seen)) == LAYERS
    assert len({colouring for colouring, _, _ in seen}) == LAYERS


def test_a_token_tells_its_probabilities_when_pointed_at(page):
    before = page.locator("#detail").inner_text()
    page.locator(".token").nth(7).hover()
    found = probabilities(page)
    assert len(found) == E
    assert abs(sum(found) - 1) < 1e-9
    assert page.locator("#rows .row").nth(experts(page)[7]).inner_text().endswith("1st")
    assert max(found) == found[experts(page)[7]]
    second = found.index(sorted(found)[-2])
    assert page.locator("#rows .row em").all_inner_texts()[second] == "2nd"
    assert page.locator("#detail").inner_text() != before
    page.mouse.move(1, 1)
    assert page.locator("#detail").inner_text() == before


def test_arrows_move_from_token_to_token(page):
    page.locator(".token").first.focus()
    for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0), ("ArrowLeft", 0)):
        page.keyboard.press(key)
        assert current(page) == expected
        assert page.locator(".token[tabindex='0']").count() == 1
        assert abs(sum(probabilities(page)) - 1) < 1e-9
    label = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith(f"<: expert {experts(page)[0]} with ")
    top = "document.activeElement.getBoundingClientRect().top + scrollY"
    first = page.evaluate(top)
    page.keyboard.press("ArrowDown")
    second = page.evaluate(top)
    assert second > first
    page.keyboard.press("ArrowUp")
    assert page.evaluate(top) == first
    page.keyboard.press("End")
    assert current(page) == page.locator(".token").count() - 1
    page.keyboard.press("Home")
    before = colours(page)
    page.keyboard.press("]")
    assert colours(page) != before
    assert current(page) == 0


def test_a_bar_lights_its_expert_s_tokens(page):
    bar = page.locator(".bar").nth(experts(page)[0])
    bar.focus()
    page.keyboard.press("Enter")
    expert = experts(page)[0]
    lit = page.eval_on_selector_all(".token.on", "all => all.map(token => +token.dataset.expert)")
    assert lit == [expert] * experts(page).count(expert)
    assert page.locator(".bar[aria-pressed=true]").count() == 1
    assert page.evaluate("+document.activeElement.dataset.load") == expert  # the focus stays
    assert f"Expert {expert} is first choice of {len(lit)} of" in page.locator("#text-title").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".token.on").count() == 0
    bar.click()
    bar.click()
    assert page.locator(".token.on").count() == 0


def test_the_load_is_what_the_analysis_found(page, analysed):
    layer = analysed[0]["domains"]["odd"]["layers"][1]  # the middle one, which is shown first
    shown = [float(text.removesuffix(" %")) for text in page.locator(".bar .number").all_inner_texts()]
    assert shown == pytest.approx([100 * share for share in layer["first"]["share"]], abs=0.051)
    repeated = page.locator("#facts dd").first.inner_text()
    assert float(repeated.partition(" %")[0]) == pytest.approx(100 * layer["repeat_first"]["share"], abs=0.051)


def test_everything_can_be_reached_with_the_tab_key(page):
    reached = []
    for _ in range(3 + E):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached[:2] == ["domain", "layer"]
    assert sorted(reached[2:]) == ["bar"] * E + ["token shown"]
