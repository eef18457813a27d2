"""The explorer in a real browser: every control, by pointer and by keyboard, large and small, and no network."""

import json
import os
import shutil

import pytest

from tinymoe import Mixtral, MixtralConfig, cli
from tinymoe.corpora import synthetic

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'tinymoe[browser]'")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="needs a browser: apt-get install chromium, or CHROMIUM=path"),
]
E, LAYERS = 8, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An analysis of a model whose gates are far apart, so that layers differ."""
    root = tmp_path_factory.mktemp("explorer")
    config = MixtralConfig(
        dim=32, n_layers=LAYERS, hidden_dim=8, n_heads=2, n_kv_heads=1, vocab_size=256, num_experts=E, top_k_experts=2
    )
    model = Mixtral.init(config, seed=3)
    for name, p in model.params.items():
        if name.endswith("gate"):
            p *= 10
    model.save_pretrained(root)
    texts = []
    for domain, documents in synthetic(0, 3000).train.items():
        texts.append(root / f"{domain}.txt")
        texts[-1].write_bytes(b"".join(document.text for document in documents)[:700])
    texts[0].write_text('<b id="x">&amp;</script><script>document.title = "broken"</script>\t"é\n' * 9)
    assert cli.main(["analyze", str(root), *map(str, texts), "--seq-len", "64"]) == 0
    return root / "analysis"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as session:
        browser = session.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, 860, "light"), (360, 740, "dark")], ids=["desktop", "phone"])
def page(request, browser, folder):
    """The page, open; at the end nothing may have gone wrong or gone out."""
    width, height, scheme = request.param
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    wrong = []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    address = (folder / "explorer.html").as_uri()
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


def test_text_is_shown_as_it_is_and_never_run(page, folder):
    numbers = json.loads((folder / "routing.json").read_text())
    assert page.title() == f"Routing of {numbers['model']}"
    assert page.locator(".token").count() == numbers["domains"]["arithmetic.txt"]["tokens"]
    line = '<b id="x">&amp;</script><script>document.title = "broken"</script>⇥\t"\\xc3é↵\n'
    assert shown_text(page) == line * 9
    assert len(set(colours(page))) > 2


def test_another_domain_has_another_text_and_another_load(page):
    text, load = shown_text(page), page.locator("#load").inner_text()
    page.locator("#domain").select_option(label="brackets.txt")
    assert shown_text(page) != text
    assert "(" in shown_text(page)
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


def test_the_load_is_what_the_analysis_found(page, folder):
    numbers = json.loads((folder / "routing.json").read_text())
    layer = numbers["domains"]["arithmetic.txt"]["layers"][1]  # the middle one, which is shown first
    assert page.locator(".bar .number").all_inner_texts() == [f"{100 * s:.1f} %" for s in layer["first"]["share"]]
    assert f"{100 * layer['repeat_first']['share']:.1f} %" in page.locator("#facts").inner_text()


def test_everything_can_be_reached_with_the_tab_key(page):
    reached = []
    for _ in range(3 + E):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached[:2] == ["domain", "layer"]
    assert sorted(reached[2:]) == ["bar"] * E + ["token shown"]
