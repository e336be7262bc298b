"""The report in a browser: everything that its script does, seen as a reader sees it."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
from chromium import PROGRAM, Chromium
from PIL import Image
from reports import URL, benchmark

from oodcore import report
from oodcore.protocols import OutlierExposure, Selective
from oodcore.results import Entry, Results

pytestmark = pytest.mark.skipif(
    PROGRAM is None, reason="needs Chromium (Debian's package chromium) to run the page's script"
)

NAMES = ("a/msp", "a/energy", "b/msp", "b/knn of react")
EVIL = "<img src=x onerror=alert(1)>"
ROWS = """[...document.querySelectorAll("#scores tbody tr")].filter(row => !row.hidden)"""
SHOWN = f"{ROWS}.map(row => row.cells[0].textContent + ' ' + row.cells[1].textContent)"
HEADS = """[...document.querySelectorAll("#scores thead tr:last-child th")]
  .filter(head => !head.hidden).map(head => head.textContent)"""


@pytest.fixture(scope="module", name="browser")
def _browser(tmp_path_factory):
    with Chromium(tmp_path_factory.mktemp("browser") / "profile") as browser:
        browser.size(1280, 900)
        yield browser


@pytest.fixture(scope="module", name="results")
def _results():
    return benchmark(NAMES, models={name: name[0] for name in NAMES})


@pytest.fixture(name="page")
def _page(browser, results, tmp_path):
    """The report of four detectors on two models, open; checked for complaints at the end."""
    with_file(browser, report.write(results, tmp_path / "report.html"))
    yield browser
    assert browser.complaints == []
    assert set(browser.requests) == {(tmp_path / "report.html").as_uri()}


def with_file(browser, path):
    browser.requests.clear()
    browser.complaints.clear()
    browser.open(path.as_uri())


def named(names):
    """How the table calls detectors: without their model, then the model."""
    return [f"{name[2:]} {name[0]}" for name in names]


def choose(page, selector, value):
    """Take a value in a list, as a reader does with the keyboard."""
    page.look(
        f"""(() => {{ const list = document.querySelector("{selector}"); list.value = "{value}";
        list.dispatchEvent(new Event("change", {{bubbles: true}})); }})()"""
    )


def test_the_table_is_sorted_by_any_column_of_any_metric(page, results):
    assert page.look(SHOWN) == named(results.ranked())
    head = "#scores thead tr:last-child th:nth-child({}) button"
    page.click(head.format(3))
    assert page.look(SHOWN) == named(results.ranked())[::-1]
    page.click(head.format(1))
    assert page.look(SHOWN)[0].startswith("energy")
    sorts = """[...document.querySelectorAll("[aria-sort]")].map(head => head.textContent)"""
    assert page.look(sorts) == ["detector"]
    page.click("#choice label:nth-of-type(2)")
    page.click(head.format(3))
    assert page.look(SHOWN) == named(results.ranked("fpr95_id"))
    first = results.ranked("fpr95_id")[0]
    cell = page.look(f"{ROWS}[0].cells[2].textContent")
    assert cell == f"{100 * results.mean(first, 'fpr95_id'):.2f}"
    assert page.look("document.getElementById('better').textContent") == "lower"
    svhn = page.look(f"{HEADS}.indexOf('svhn')")
    page.click(head.format(svhn + 1))
    ranked = sorted(NAMES, key=lambda name: results.value(name, "fpr95_id", "svhn"))
    assert page.look(SHOWN) == named(ranked)


def test_the_best_of_a_column_is_marked_as_the_server_marked_it(page, results):
    marked = """[...document.querySelectorAll("#scores td.best")]
      .map(cell => [cell.parentElement.rowIndex, cell.cellIndex])"""
    drawn = page.look(marked)
    assert drawn
    page.click("#choice label:nth-of-type(2)")
    assert page.look(marked) != drawn
    page.click("#choice label:nth-of-type(1)")
    assert page.look(marked) == drawn


def test_the_table_is_filtered_by_words_kind_and_model(page):
    page.click("#words")
    page.tell("Input.insertText", text="SP")
    assert sorted(page.look(SHOWN)) == ["msp a", "msp b"]
    assert page.look("document.getElementById('count').textContent") == "2 of 4"
    choose(page, "#model", "b")
    assert page.look(SHOWN) == ["msp b"]
    choose(page, "#kind", "react")
    assert page.look(SHOWN) == ["msp b"]
    page.look("""{const box = document.getElementById("words"); box.value = "b KNN";
      box.dispatchEvent(new Event("input"))}""")
    assert page.look(SHOWN) == ["knn of react b"]
    kinds = "[...document.querySelectorAll('#kind option')].map(option => option.textContent)"
    assert page.look(kinds) == ["every kind", "knn", "react"]


def test_groups_of_sets_are_switched_off_and_on(page, results):
    before = page.look(HEADS)
    assert {"svhn", "cifar100", "lsun", "x", "near mean", "far mean"} <= set(before)
    svhn = before.index("svhn")
    page.click(f"#scores thead tr:last-child th:nth-child({svhn + 1}) button")
    page.click("#groups input[value=far]")
    without = [head for head in before if head not in ("svhn", "lsun", "far mean")]
    assert page.look(HEADS) == without
    shown = f"{ROWS}[0].querySelectorAll('td:not([hidden])').length"
    assert page.look(shown) == len(without) - 1
    spans = """[...document.querySelectorAll(".span th:not([hidden])")]
      .map(head => [head.textContent, head.colSpan])"""
    assert ["means over OOD sets", 2] in page.look(spans)
    assert "far OOD" not in [text for text, _ in page.look(spans)]
    # What was sorted by is gone, so the mean is sorted by again.
    assert page.look(SHOWN) == named(results.ranked())
    page.click("#groups input[value=far]")
    assert page.look(HEADS) == before


def test_a_detector_has_a_view_of_its_own_with_an_address(page, results):
    page.look("scrollTo(0, 150)")
    name = results.ranked()[1]
    page.click("#scores tbody tr:nth-child(2) a")
    page.until("!document.getElementById('view').hidden")
    view = page.look("document.getElementById('view').innerText")
    assert page.look("location.hash").startswith(f"#detector-{name[0]}-")
    assert page.look("document.title").startswith(f"{name} ·")
    assert page.look("document.activeElement.tagName") == "H1"
    assert page.look("document.getElementById('overview').hidden")
    for metric in results.metrics:
        for data in ("svhn", "cifar100", "lsun", "x"):
            assert f"{100 * results.value(name, metric, data):.2f}" in view
    for said in (
        "2 of 4",
        "log sum_k exp(z_k)",
        "scorer: {kind: knn, k: 10}",
        f"A paper on {name}.",
        "0.25 s",
        "Precision and recall, OOD positive",
    ):
        assert said in view, said
    assert page.look("document.querySelector('#view .cite a').href") == URL
    count = "document.querySelectorAll('#view {}').length"
    assert page.look(count.format(".bars")) == 4
    assert page.look(count.format(".chart path.line")) == 12
    assert page.look("document.querySelector('details').open") is False
    page.click("#view summary")
    bibtex = page.look("document.querySelector('#view details pre').textContent")
    assert bibtex.startswith("@misc{doe2017")
    page.click("#view .way span a:last-of-type")
    page.until(f"document.title.startsWith({results.ranked()[2]!r})")
    page.look("history.back()")
    page.until(f"document.title.startsWith({name!r})")
    page.look("history.back()")
    page.until("document.getElementById('view').hidden")
    page.until("scrollY > 0")
    assert page.look("document.title") == "OOD benchmark on id_test"
    # The keyboard goes on where it was.
    assert page.look("document.activeElement.textContent") == name[2:]


def test_the_address_of_a_detector_can_be_linked(page, results):
    name, address = "b/msp", page.look("location.href")
    page.open("about:blank")
    page.requests.clear()
    page.open(f"{address}#detector-b-msp")
    assert page.look("document.querySelector('#view h1').textContent") == "msp"
    assert page.look("document.title").startswith(name)
    page.click("#view .way a")
    page.until("document.getElementById('view').hidden")
    page.look("location.hash = '#detector-nobody'")
    page.look("location.hash = '#%E0%A4%A'")
    page.until("document.getElementById('view').hidden")
    page.look("location.hash = '#detector-a-energy'")
    page.until("!document.getElementById('view').hidden")
    page.look("location.hash = '#embeddings'")
    page.until("document.getElementById('view').hidden && scrollY > 300")
    page.requests[:] = [request.partition("#")[0] for request in page.requests]


def test_the_configuration_is_copied_as_it_stands(page):
    page.tell(
        "Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"]
    )
    page.look("location.hash = '#detector-b-msp'")
    page.until("!document.getElementById('view').hidden")
    page.click("#view .halves > section:nth-child(2) .copied button")
    page.until(
        "document.querySelector('#view .halves > section:nth-child(2) [role=status]').textContent"
    )
    said = page.look(
        "document.querySelector('#view .halves > section:nth-child(2) [role=status]').textContent"
    )
    if said == "copied":
        found = page.look("navigator.clipboard.readText()")
    else:
        found = page.look("getSelection().toString()")
    assert found.strip() == "shapers:\n- {kind: react}\nscorer: {kind: knn, k: 10}"


def test_the_keyboard_reaches_everything(page):
    focused = "[document.activeElement.tagName, document.activeElement.textContent.trim()]"
    reached = []
    for _ in range(40):
        page.press("Tab")
        reached.append(tuple(page.look(focused)))
    tags = {tag for tag, _ in reached}
    assert {"INPUT", "SELECT", "BUTTON", "A", "DIV"} <= tags
    assert ("A", "msp") in reached
    page.look("document.querySelector('#scores tbody a').focus()")
    page.press("Enter")
    page.until("!document.getElementById('view').hidden")
    page.press("Tab")
    assert page.look("document.getElementById('view').contains(document.activeElement)")


def test_sets_are_taken_out_of_the_pictures_of_embeddings(page):
    visible = (
        "[...document.querySelectorAll('.cloud')].filter(c => c.getClientRects().length).length"
    )
    assert page.look(visible) == 2 * 6
    page.click("#layers input[value='1']")
    assert page.look(visible) == 2 * 5
    page.click("#layers input[value=train]")
    assert page.look(visible) == 2 * 4
    page.click("#layers input[value='1']")
    assert page.look(visible) == 2 * 5


def test_every_number_can_be_saved(page, results):
    found = list(csv.DictReader(io.StringIO(page.look("table.everything()"))))
    rows = {
        (r["detector"], r["model"], r["data"], r["group"], r["metric"], float(r["value"]))
        for r in found
    }
    assert len(rows) == len(found)
    assert rows == {(r.detector, r.model, r.data, r.group, r.metric, r.value) for r in results.rows}


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("address", ["", "#detector-b-knn-of-react"])
def test_every_view_fits_its_window(page, tmp_path, width, scheme, address):
    page.prefer(scheme)
    page.size(width, 900)
    try:
        page.look(f"location.hash = '{address}'")
        page.until(f"document.getElementById('view').hidden === {'false' if address else 'true'}")
        assert page.look("document.documentElement.scrollWidth") <= width
        image = Image.open(page.picture(tmp_path / "view.png")).convert("RGB")
        assert image.size == (width, 900)
        colours = image.getcolors(2**24)
        most = max(colours)[1]
        assert (min(most) > 200) if scheme == "light" else (max(most) < 60)
        assert len(colours) > 50
        assert page.look(CONTRAST) == []
        assert page.look(UNREACHED) == []
    finally:
        page.prefer("light")
        page.size(1280, 900)


UNREACHED = """[...document.querySelectorAll("main:not([hidden]) .scroll, main:not([hidden]) pre")]
  .filter(box => {
    box.scrollLeft = 1e6;
    const unreached = box.scrollLeft + box.clientWidth < box.scrollWidth - 1;
    box.scrollLeft = 0;
    return unreached;
  }).map(box => box.outerHTML.slice(0, 80))"""
CONTRAST = """(() => {
  const parts = text => (text.match(/[0-9.]+/g) || []).map(Number);
  const light = rgb => rgb.slice(0, 3).map(c => c / 255)
    .map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [.2126, .7152, .0722][at], 0);
  const over = (top, below) => {
    const share = top.length > 3 ? top[3] : 1;
    return below.map((c, at) => share * top[at] + (1 - share) * c);
  };
  const ground = element => {
    const chain = [];
    for (let one = element; one; one = one.parentElement) {
      chain.unshift(parts(getComputedStyle(one).backgroundColor));
    }
    return chain.filter(c => c.length).reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const weak = [];
  for (const element of document.querySelectorAll("main:not([hidden]) *")) {
    const own = [...element.childNodes].some(one => one.nodeType === 3 && one.data.trim());
    if (!own || !element.getClientRects().length || element.closest("svg")) continue;
    const below = ground(element), text = over(parts(getComputedStyle(element).color), below);
    const [dim, bright] = [light(below), light(text)].sort((a, b) => a - b);
    const ratio = (bright + .05) / (dim + .05);
    if (ratio < 4.5) weak.push(`${element.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(weak)];
})()"""


def test_names_stay_text_when_the_script_writes_them(browser, tmp_path):
    results = benchmark((EVIL, "msp"), models={EVIL: EVIL, "msp": "other"})
    with_file(browser, report.write(results, tmp_path / "report.html"))
    anchor = re.search(r'href="(#detector-img[^"]*)"', report.render(results))[1]
    browser.look(f"location.hash = '{anchor}'")
    browser.until("!document.getElementById('view').hidden")
    assert browser.look("document.querySelector('#view h1').textContent") == EVIL
    assert browser.look("document.images.length") == 0
    # A list must not take a name for a selector, or a number.
    browser.look("history.back()")
    browser.until("document.getElementById('view').hidden")
    assert browser.complaints == []
    assert set(map(without_fragment, browser.requests)) == {(tmp_path / "report.html").as_uri()}


def without_fragment(address):
    return address.partition("#")[0]


def test_only_the_page_s_own_script_may_run(browser, tmp_path):
    path = report.write(benchmark(), tmp_path / "report.html")
    path.write_text(
        path.read_text("utf-8").replace("</main>", "<script>window.own = 1</script></main>")
    )
    with_file(browser, path)
    assert browser.look("window.own === undefined")
    assert any("Content Security Policy" in text for text in browser.complaints)


def drawn(results, browser, tmp_path):
    with_file(browser, report.write(results, tmp_path / "report.html"))
    browser.click("#scores tbody a")
    browser.until("!document.getElementById('view').hidden")
    assert browser.complaints == []
    return browser.look("document.getElementById('view').innerText")


def test_selective_prediction_has_its_curve(browser, tmp_path):
    rng = np.random.default_rng(0)
    own = {"only": {"id_test": rng.normal(size=100)}, "other": {"id_test": rng.normal(size=100)}}
    results = Results.from_scores(
        [Entry("only"), Entry("other")],
        own,
        correct={"": rng.random(100) < 0.8},
        protocol=Selective(),
    )
    view = drawn(results, browser, tmp_path)
    assert "Accuracy over coverage" in view
    assert "ROC" not in view.split("Curves")[1]
    assert browser.look("document.querySelectorAll('#view .chart').length") == 1
    assert browser.look("document.querySelectorAll('#view .bars').length") == 1
    browser.look("location.hash = ''")
    browser.until("document.getElementById('view').hidden")
    # Lower is better of the first column, and higher of the last.
    heads = browser.look(HEADS)
    assert (
        browser.look("document.querySelector('[aria-sort]').getAttribute('aria-sort')")
        == "ascending"
    )
    browser.click(f"#scores thead tr:last-child th:nth-child({len(heads)}) button")
    assert (
        browser.look("document.querySelector('[aria-sort]').getAttribute('aria-sort')")
        == "descending"
    )


def test_what_is_repeated_is_shown_with_its_spread(browser, tmp_path):
    rng = np.random.default_rng(0)
    own = {"only": {"id_test": rng.normal(1, 1, 100), "ood": rng.normal(0, 1, 90)}}
    view = drawn(
        Results.from_scores([Entry("only")], own, protocol=OutlierExposure()), browser, tmp_path
    )
    assert len(re.findall(r"\d+\.\d\d ± \d+\.\d\d", view)) >= 3
