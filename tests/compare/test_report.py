"""report.html in a real browser: nothing complains, nothing is fetched, everything is drawn."""

import re
import xml.etree.ElementTree as ElementTree

import browser
import pytest

from foveate.cli import main

needs_browser = pytest.mark.skipif(browser.find() is None, reason="no Chromium here")
METHODS = (
    "full,sink-window(window=64),vertical-slash(verticals=30, slashes=50),block-sparse(blocks=2)"  # noqa: E501
)


@pytest.fixture(scope="module")
def report(tiny, prose, tmp_path_factory):
    """A report of two lengths with hidden keys."""
    out = tmp_path_factory.mktemp("report")
    args = ["compare", str(tiny), "--text", str(prose), "--lengths", "256,512", "--methods",
            METHODS, "--repeats", "2", "--needle-depths", "0.2,0.8", "--out", str(out),
            "--decode-tokens", "8", "--json"]  # fmt: skip
    assert main(args) == 0
    return out / "report.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    opened = browser.Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


FIGURES = """[...document.querySelectorAll('figure.drawn')].map(figure => {
  const svg = figure.querySelector('svg'), image = figure.querySelector('img');
  const box = (svg || image).getBoundingClientRect();
  return {svg: !!svg, width: box.width, height: box.height,
    shapes: svg ? svg.querySelectorAll('path, use').length : 0,
    words: svg ? svg.querySelectorAll('text').length : 0,
    pixels: image ? image.naturalWidth : 0, complete: image ? image.complete : true};
})"""


@needs_browser
@pytest.mark.parametrize(("width", "mobile"), [(1280, False), (390, True)])
def test_in_a_browser(report, page, width, mobile):
    page.open(report.as_uri(), width, 900, mobile)
    told = [e for e in page.events if e.get("method") in
            ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")]  # fmt: skip
    assert told == []
    asked = [
        e["params"]["request"]["url"]
        for e in page.events
        if e.get("method") == "Network.requestWillBeSent"
    ]
    assert report.as_uri() in asked
    assert [url for url in asked if not url.startswith("data:")] == [report.as_uri()]
    assert not [e for e in page.events if e.get("method") == "Network.loadingFailed"]

    figures = page.evaluate(FIGURES)
    # two lengths of Pareto fronts and times, five curves, four patterns
    assert sum(f["svg"] for f in figures) == 2 + 5 + 2
    assert sum(not f["svg"] for f in figures) == 4
    for figure in figures:
        assert figure["complete"]
        assert figure["width"] > (280 if figure["svg"] else 130)
        assert figure["height"] > 100
        assert (figure["shapes"] > 20 and figure["words"] > 5) or figure["pixels"] > 200

    # nothing but the tables and the code may be wider than the window, and those scroll
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.querySelectorAll('table').length") == 3
    assert page.evaluate("document.querySelectorAll('.scroll tr').length") > 20
    small = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg.plot text')]"
        ".map(t => t.getBoundingClientRect().height))"
    )
    assert small >= 7


@needs_browser
def test_on_paper_everything_fits(report, page):
    page.open(report.as_uri(), 720, 1000)
    page.call("Emulation.setEmulatedMedia", media="print")
    assert page.evaluate("document.documentElement.scrollWidth") <= 720
    made = page.call("Page.printToPDF", preferCSSPageSize=True)
    assert len(made["data"]) > 20_000
    page.call("Emulation.setEmulatedMedia", media="")


def test_the_page_is_whole_and_says_what_it_should(report):
    text = report.read_text()
    assert "default-src 'none'" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for used in re.findall(r'(?:url\(#|href="#)([^")]+)', text):
        assert used in ids
    for heading in ("What was measured", "Speed against quality", "Over the length",
                    "Where the time goes", "What they attended to", "What each method always keeps",
                    "How each number was taken", "Environment", "Raw figures"):  # fmt: skip
        assert f">{heading}</h2>" in text
    for words in ("transformers&#x27; own sdpa", "pass key", "float64", "first 30 tokens",
                  "VmHWM", "sha256"):  # fmt: skip
        assert words in text
    for svg in re.findall(r"<svg class=\"plot\".*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert len(text) < 1_500_000


def test_names_are_escaped(report, tiny, prose, tmp_path):
    import shutil

    folder = tmp_path / "a<b>&c"
    shutil.copytree(tiny, folder)
    args = ["compare", str(folder), "--text", str(prose), "--lengths", "128", "--methods", "full",
            "--repeats", "1", "--needle-depths", "none", "--out", str(tmp_path / "out"),
            "--json"]  # fmt: skip
    assert main(args) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "a&lt;b&gt;&amp;c" in text
    assert "<b>&c" not in text
