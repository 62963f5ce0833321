"""The explorer as a person meets it: `caa-lens explore` on the demo model, in a headless chromium, from wide to phone.

The texts are those of the library, computed here again. The server is a process of its own, on the loopback address,
and ended by its process id.
"""

import os
import re
import signal
import subprocess
import sys
from urllib.parse import urlsplit

import pytest
from helpers.browser import CHROMIUM
from helpers.models import ROOT

import caa_lens as cl

pytest.importorskip("tornado", reason="needs tornado, of the extra explore")
from helpers.driven_browser import DrivenBrowser

pytestmark = [
    pytest.mark.one_kind,
    pytest.mark.cpu("the page's server loads the demo model by itself, on the CPU"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a chromium or chrome on the path"),
]
QUESTION = "How was your day?"
N_TOKENS = 24
STATUS = "document.getElementById('status').textContent"
DONE = f"{STATUS}.startsWith('done')"
PLAIN = (  # a text without the mark that says that it was cut
    "(() => {{ const e = document.getElementById('{}').cloneNode(true);"
    " e.querySelectorAll('.cut').forEach(c => c.remove()); return e.textContent; }})()"
)


@pytest.fixture(scope="module")
def vectors(demo_model):
    """Two layers' vectors of a few pairs: enough to change a text."""
    return cl.extract(demo_model, cl.ContrastSet.load("sentiment").sample(12, seed=0), layers=[13, 15], progress=False)


@pytest.fixture(scope="module")
def address(vectors, tmp_path_factory):
    """Where `caa-lens explore` serves its page."""
    folder = tmp_path_factory.mktemp("served")
    file = vectors.save(folder / "sentiment.safetensors")
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "caa_lens", "explore", str(file), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        # Whoever runs the tests in the background of a shell has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        said = server.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", said)
        assert found, said + (folder / "log").read_text()
        yield found[0]
        server.send_signal(signal.SIGINT)
        assert "the explorer has ended" in server.communicate(timeout=60)[0]
        assert server.returncode == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        server.stdout.close()
        log.close()


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    with DrivenBrowser(tmp_path_factory.mktemp("browser")) as page:
        yield page


@pytest.fixture
def page(browser, address):
    """The page anew, with short texts; afterwards it has said nothing and asked for nothing elsewhere."""
    browser.size(1280, 900)
    browser.open("about:blank")
    browser.said.clear()
    browser.requests.clear()
    browser.open(address + "/")
    browser.wait_for(f"{STATUS} === 'ready'")
    browser.value(f"document.getElementById('tokens').value = {N_TOKENS}")
    yield browser
    assert browser.said == []
    hosts = {urlsplit(one).netloc for one in browser.requests}
    assert hosts == {urlsplit(address).netloc}
    assert len(browser.requests) == 4  # page, style, script, websocket: nothing else


def written(model, **steering):
    return cl.generate(model, QUESTION, max_new_tokens=N_TOKENS, **steering)


def test_texts_stream_and_a_moved_slider_writes_another_text(page, demo_model, vectors):
    page.click("write")
    page.wait_for("document.getElementById('steered').children.length >= 3")
    assert not page.value(DONE), "it should have been seen growing"
    page.wait_for(DONE)
    assert page.value(PLAIN.format("unsteered")) == written(demo_model)
    first = page.value(PLAIN.format("steered"))
    layer = int(page.text("layer-said"))
    assert layer == 15
    assert first == written(demo_model, vectors=[(vectors[layer], 1.0)])
    assert page.text("steered-title") == "Steered: layer 15, times +1.0"

    page.press("multiplier", "Home")  # the least
    page.wait_for("document.getElementById('steered-title').textContent.endsWith('times −4.0')")
    page.wait_for(DONE)
    moved = page.value(PLAIN.format("steered"))
    assert moved != first
    assert moved == written(demo_model, vectors=[(vectors[15], -4.0)])

    page.press("layer", "ArrowLeft")
    page.wait_for("document.getElementById('steered-title').textContent.startsWith('Steered: layer 13')")
    page.wait_for(DONE)
    assert page.value(PLAIN.format("steered")) == written(demo_model, vectors=[(vectors[13], -4.0)])
    assert page.value(PLAIN.format("unsteered")) == written(demo_model)


def test_tokens_are_coloured_by_similarity_and_the_lens_stands_beside_them(page, demo_model, vectors):
    page.click("write")
    page.wait_for(DONE)
    rows = page.value(
        "[...document.querySelectorAll('#steered span[title]')]"
        ".map(s => [s.textContent, s.title, getComputedStyle(s).backgroundColor])"
    )
    similar = cl.token_similarity(
        demo_model, QUESTION, vectors[15], answer=written(demo_model, vectors=[(vectors[15], 1.0)])
    )
    cosines = similar.frame["cosine"].tolist()[similar.answer_start :]
    assert len(rows) == len(cosines)
    for (_, title, colour), cosine in zip(rows, cosines, strict=True):
        assert float(title.replace("−", "-")) == pytest.approx(cosine, abs=2e-3)
        assert colour.startswith("rgba(59, 125, 216" if float(title.replace("−", "-")) > 0 else "rgba(200, 69, 59")
    assert len({colour for *_, colour in rows}) > 5
    lens = cl.logit_lens(demo_model, vectors, layers=[15], k=10, reading="causal", progress=False)
    shown = page.value("[...document.querySelectorAll('#lens td.token')].map(cell => cell.textContent)")
    assert shown == lens.frame["token"].tolist()
    assert lens.by_layer()["verdict"][0] in page.text("lens")
    left, middle, right = (
        page.value(f"document.getElementById('{name}').getBoundingClientRect().x")
        for name in ("unsteered", "steered", "lens")
    )
    assert left < middle < right


def test_stop_ends_a_text_in_the_middle_and_writing_goes_on_afterwards(page, demo_model):
    page.value("document.getElementById('tokens').value = 200")
    page.click("write")
    page.wait_for("document.getElementById('steered').children.length >= 5")
    page.click("stop")
    page.wait_for(DONE)
    assert "(stopped)" in page.text("steered")
    n = page.value("document.querySelectorAll('#steered span[title]').length")
    assert 4 <= n < 150
    assert page.value("document.getElementById('stop').disabled")
    unsteered = page.value(PLAIN.format("unsteered"))
    assert cl.generate(demo_model, QUESTION, max_new_tokens=200).startswith(unsteered)
    page.value(f"document.getElementById('tokens').value = {N_TOKENS}")
    page.press("prompt", "Enter")
    page.wait_for(f"{STATUS} === 'writing …'")
    page.wait_for(DONE)
    assert page.value(PLAIN.format("unsteered")) == written(demo_model)


def test_what_cannot_be_written_is_said_in_the_page(page):
    for text, said in (("   ", "the prompt is empty"), ("a" * 2001, "has 2001 characters, at most 2000")):
        page.write("prompt", text)
        page.click("write")
        page.wait_for("!document.getElementById('error').hidden")
        assert said in page.text("error")
        page.wait_for("document.body.getAttribute('aria-busy') === 'false'")
    assert page.text("count") == "2001 of 2000 characters"


def test_marks_in_a_prompt_stay_text(page):
    page.write("prompt", "<img src=x onerror=alert(1)> Repeat this.")
    page.click("write")
    page.wait_for(DONE)
    assert page.value("document.querySelectorAll('main img, main script').length") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_at_a_phones_width_nothing_is_cut_off_and_text_can_be_read(page, dark):
    page.size(390, 844, phone=True)
    page.dark(dark)
    page.click("write")
    page.wait_for(DONE)
    page.value("document.querySelector('details').open = true")
    assert page.value("[document.documentElement.scrollWidth, window.innerWidth]") == [390, 390]
    outside = page.value(
        "[...document.querySelectorAll('body *')].filter(e => { const b = e.getBoundingClientRect();"
        " return b.width && (b.left < -0.5 || b.right > 390.5); }).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    tops = [
        page.value(f"document.getElementById('{name}').getBoundingClientRect().y")
        for name in ("unsteered", "steered", "lens")
    ]
    assert tops == sorted(tops)
    assert page.value("document.getElementById('write').getBoundingClientRect().height") >= 40  # a finger's
    contrasts = page.value(CONTRASTS)
    assert len(contrasts) > 30
    assert min(contrasts) >= 4.5, "WCAG AA"


# Of every element with text of its own, its contrast with what lies behind it, colours of tokens blended in.
CONTRASTS = """(() => {
  const parse = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return n.length > 3 ? n : [...n, 1]; };
  const light = (colour) => {
    const [r, g, b] = colour.map((c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const over = (top, below) => below.map((c, i) => top[i] * top[3] + c * (1 - top[3]));
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour.slice(0, 3) : over(colour, behind(element.parentElement));
  };
  return [...document.querySelectorAll("body *")]
    .filter((e) => !e.disabled && e.getBoundingClientRect().width
            && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => {
      const back = behind(e), ink = over(parse(getComputedStyle(e).color), back);
      const [a, b] = [light(ink), light(back)].sort((x, y) => y - x);
      return (a + 0.05) / (b + 0.05);
    });
})()"""
