"""The report is one safe, small, self-contained page that says everything."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from oodcore import report
from oodcore.calibration import Calibration
from oodcore.metrics import METRICS, SEPARATION
from oodcore.results import Entry, Results

EVIL = "</script><script>alert('x')</script>"
VOID = {"meta", "input", "br", "img", "link", "hr"}


def benchmark(names=("msp", "energy"), sets=4, rows=300, models=None, calibrated=True):
    rng = np.random.default_rng(0)
    ood = [("svhn", "far"), ("cifar100", "near"), ("lsun", "far"), ("x", ""), ("y", ""), ("z", "")]
    scores = {}
    for number, name in enumerate(names):
        own = {"id_test": rng.normal(2 + number * 0.1, 1, rows)}
        own |= {data: rng.normal(k * 0.3, 1 + k, rows) for k, (data, _) in enumerate(ood[:sets])}
        scores[name] = own
    url = "https://arxiv.org/abs/1610.02136"
    entries = [
        Entry(
            name,
            (models or {}).get(name, ""),
            {"shapers": [{"kind": "react"}], "scorer": {"kind": "knn", "k": 10}},
            f"Somebody. A paper on {name}. ICLR 2017. {url}",
            0.25,
        )
        for name in names
    ]
    return Results.from_scores(
        entries,
        scores,
        groups={data: group for data, group in ood[:sets] if group},
        accuracy={entries[0].model: 0.912},
        calibrations={names[0]: Calibration(rng.normal(2, 1, 200))} if calibrated else None,
        false_alarm_rate=0.05,
        configuration={"train": {"kind": "digits"}, "seed": 17},
        provenance={"plugins": {"oodcore": "0.1.0", "oodcore-margin": "0.3.1"}, "device": "cpu"},
    )


class Page(HTMLParser):
    """Tags, attributes and texts of a page; fails where tags are not nested."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.stack, self.texts, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.stack and self.stack[-1] == "script" else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def test_the_page_says_everything():
    results = benchmark()
    page = Page(report.render(results))
    for detector in ("msp", "energy"):
        for metric in SEPARATION:
            for column in ("svhn", "cifar100", "lsun", "x"):
                assert f"{100 * results.value(detector, metric, column):.2f}" in page.text
            for group in ("all", "near", "far"):
                assert f"{100 * results.mean(detector, metric, group):.2f}" in page.text
        assert f"A paper on {detector}." in page.text
    for metric in (METRICS[name] for name in (*results.metrics, *results.id_metrics)):
        assert metric.title in page.text
        assert metric.meaning[1:] in page.text
    for said in (
        "oodcore-margin 0.3.1",
        f"torch {results.provenance['versions']['torch']}",
        f"python {results.provenance['versions']['python']}",
        "seed: 17",
        "device: cpu",
        "shapers: - {kind: react}",
        "scorer: {kind: knn, k: 10}",
        "Its scorer took 0.25 s for all rows",
        "2 detectors",
        "300 in-distribution",
        "91.20",
        "5 %",
    ):
        assert said in page.text, said


def test_the_page_asks_no_network_for_anything():
    text = report.render(benchmark())
    page = Page(text)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base", "form"}
    for tag, attributes in page.tags:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        target = attributes.get("href", "#")
        assert target.startswith("#") or (tag == "a" and target.startswith("https://arxiv.org/"))
    assert "url(" not in text
    assert "@import" not in text


def test_references_within_the_page_lead_somewhere():
    page = Page(report.render(benchmark()))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        for name in ("href", "aria-labelledby"):
            target = attributes.get(name, "").removeprefix("#")
            assert target.startswith("https://") or not target or target in ids


@pytest.mark.parametrize(
    "evil",
    [EVIL, "<img src=x onerror=alert(1)>", "\" onclick='alert(1)'", "{{ 7*7 }}", "&lt;b&gt;"],
)
def test_names_are_text_wherever_they_stand(evil):
    results = benchmark((evil, "msp"), models={evil: evil, "msp": "other"})
    first, second = results.entries
    citation = f'{evil} https://example.org/"{evil}'
    results = replace(
        results,
        entries=(replace(first, configuration={evil: [evil]}, citation=citation), second),
        provenance={"versions": {evil: evil}, "plugins": {evil: evil}, evil: [evil]},
        configuration={evil: {evil: evil}},
    )
    text = report.render(results)
    page, plain = Page(text), Page(report.render(benchmark(models={"msp": "a", "energy": "b"})))
    assert page.text.count(evil) >= 8
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    numbers = json.loads(page.scripts[0])
    assert [evil, evil] in numbers["detectors"]
    assert page.scripts[1] == plain.scripts[1]


def test_a_data_set_may_be_called_anything_too():
    scores = {"msp": {EVIL: np.arange(5.0), f"{EVIL}2": np.arange(3.0)}}
    results = Results.from_scores([Entry("msp")], scores, id_name=EVIL, groups={f"{EVIL}2": EVIL})
    page = Page(report.render(results))
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert f"OOD benchmark on {EVIL}" in page.text


@pytest.mark.parametrize("citation", ["javascript:alert(1)", "see data:text/html,x", "no address"])
def test_only_web_addresses_become_links(citation):
    scores = {"msp": {"id_test": [1.0, 2.0], "ood": [0.0]}}
    page = Page(report.render(Results.from_scores([Entry("msp", citation=citation)], scores)))
    assert citation in page.text
    assert all(a["href"].startswith("#") for t, a in page.tags if t == "a")


def test_thirty_detectors_on_six_sets_stay_below_half_a_megabyte():
    names = [f"mahalanobis of react number {n}" for n in range(30)]
    text = report.render(benchmark(names, sets=6, rows=2000))
    assert len(text.encode()) < 500_000
    Page(text)


def test_the_embedded_numbers_are_those_of_the_results():
    results = benchmark()
    numbers = json.loads(Page(report.render(results)).scripts[0])
    assert list(numbers["metrics"]) == list(SEPARATION)
    for line, (detector, _) in enumerate(numbers["detectors"]):
        for at, (own, data, group) in enumerate(numbers["columns"]):
            for metric in SEPARATION:
                wanted = (
                    results.value(detector, own, data)
                    if own
                    else results.mean(detector, metric, group)
                    if data == "mean"
                    else results.value(detector, metric, data)
                )
                assert numbers["metrics"][metric]["values"][line][at] == wanted
                assert 0 <= numbers["metrics"][metric]["tints"][line][at] <= 1
    assert [name for name, _ in numbers["detectors"]] == list(results.ranked())


def test_drawings_stay_within_their_frames():
    text = report.render(benchmark())
    drawn = re.findall(r'<path class="(inside|outside|line)[^"]*"[^>]* d="([^"]*)"', text)
    assert {kind for kind, _ in drawn} == {"inside", "outside", "line"}
    for kind, path in drawn:
        if kind == "line":
            steps = [tuple(map(int, step)) for step in re.findall(r"l(-?\d+) (-?\d+)", path)]
            assert path.startswith("M0 500l")
            assert (sum(x for x, _ in steps), sum(y for _, y in steps)) == (500, -500)
            assert all(x >= 0 >= y for x, y in steps)
        else:
            tops = list(map(int, re.findall(r"V(\d+)h10", path)))
            assert len(tops) == 48
            assert min(tops) == 0
            assert max(tops) <= 100


def test_a_simplified_line_stays_near_every_point():
    rng = np.random.default_rng(0)
    points = list(zip(*np.sort(rng.random((2, 150)), axis=1).tolist(), strict=True))
    kept = report._simplified(points, 0.01)
    assert len(kept) < len(points)
    x, y = np.array(points).T
    line = np.interp(x, *np.array(kept).T)
    across = np.interp(y, *np.array(kept)[:, ::-1].T)
    assert np.minimum(abs(line - y), abs(across - x)).max() <= 0.01 * 2**0.5
    assert report._simplified(points[:1] * 2, 0.1) == points[:1] * 2


def test_plain_results_make_a_plain_page():
    scores = {"only": {"id_test": [1.0, 1.0], "ood": [1.0]}}
    page = Page(report.render(Results.from_scores([Entry("only")], scores)))
    assert "1 detector tells 2 in-distribution" in page.text
    assert "mean AUROC" not in page.text
    assert "calibrated threshold" not in page.text
    assert "None" not in page.text


def test_scores_near_the_limits_of_float64_can_be_drawn():
    big = np.finfo(np.float64).max
    scores = {"only": {"id_test": [-big, 0.0, big], "ood": [-big, big]}}
    calibration = {"only": Calibration([-big / 2, 0.0, big])}
    results = Results.from_scores(
        [Entry("only")], scores, calibrations=calibration, false_alarm_rate=0.3
    )
    page = Page(report.render(results))
    limits = [attributes for _, attributes in page.tags if attributes.get("class") == "limit"]
    assert [limit["x1"] for limit in limits] == ["120.0"]  # a quarter of the way from -big to big


def test_writing_gives_what_rendering_gives_every_time(tmp_path):
    results = benchmark()
    path = report.write(results, tmp_path / "made" / "report.html")
    assert path.read_text(encoding="utf-8") == report.render(results)
    results.save(tmp_path / "run")
    assert report.render(Results.load(tmp_path / "run")) == report.render(results)


PROBE = """<script>
const out = {};
const names = () => [...document.querySelectorAll("#scores tbody tr")]
  .filter(row => !row.hidden).map(row => row.cells[0].textContent);
const heads = document.querySelectorAll("#scores thead button");
heads[1].click(); out.worst_first = names();
heads[0].click(); out.by_name = names();
document.querySelector("input[value=fpr95_id]").click(); heads[1].click(); out.by_fpr = names();
out.cell = document.querySelector("#scores tbody tr").cells[1].textContent;
const filter = document.getElementById("filter");
filter.value = "SP"; filter.dispatchEvent(new Event("input")); out.filtered = names();
document.getElementById("open").click();
out.open = document.querySelectorAll("details[open]").length;
document.title = "probe:" + JSON.stringify(out);
</script></body>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium to run the page's script")
def test_the_table_sorts_switches_and_filters_in_a_browser(tmp_path):
    results = benchmark(("msp", "energy", "knn"))
    page = tmp_path / "page.html"
    page.write_text(report.render(results).replace("</body>", PROBE), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    found = re.search(r"<title>probe:(.*?)</title>", done.stdout)
    assert found, done.stderr
    out = json.loads(html.unescape(found[1]))
    assert out["worst_first"] == list(results.ranked())[::-1]
    assert out["by_name"] == ["energy", "knn", "msp"]
    assert out["by_fpr"] == list(results.ranked("fpr95_id"))
    assert out["cell"] == f"{100 * results.mean(out['by_fpr'][0], 'fpr95_id'):.2f}"
    assert out["filtered"] == ["msp"]
    assert out["open"] == 3
