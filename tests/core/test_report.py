"""The report is one safe, small, self-contained page that says everything."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from reports import URL, benchmark, paper

from oodcore import report
from oodcore.calibration import Calibration
from oodcore.component import Paper
from oodcore.metrics import METRICS, SEPARATION
from oodcore.protocols import OutlierExposure, Selective
from oodcore.report.citing import bibtex
from oodcore.report.detectors import paragraphs
from oodcore.report.drawing import precision_recall, simplified
from oodcore.results import Entry, Results

EVIL = "</script><script>alert('x')</script>"
VOID = {"meta", "input", "br", "img", "link", "hr"}


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
        within = self.stack[-1] if self.stack else ""
        if within != "style":
            (self.scripts if within == "script" else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def data(self):
        return json.loads(self.scripts[0])


def rendered(results):
    return Page(report.render(results))


def alone(protocol=None, **sets):
    """Results of one detector on ID scores and those of other sets."""
    return Results.from_scores([Entry("only")], {"only": sets}, protocol=protocol)


def test_the_page_says_everything():
    results = benchmark()
    page = rendered(results)
    for detector in ("msp", "energy"):
        for column in ("svhn", "cifar100", "lsun", "x"):
            assert f"{100 * results.value(detector, 'auroc', column):.2f}" in page.text
        for group in ("all", "near", "far"):
            assert f"{100 * results.mean(detector, 'auroc', group):.2f}" in page.text
    for metric in (METRICS[name] for name in (*results.metrics, *results.id_metrics)):
        assert metric.title in page.text
        assert metric.meaning[1:] in page.text
    for said in (
        "oodcore-margin 0.3.1",
        f"torch {results.provenance['versions']['torch']}",
        f"python {results.provenance['versions']['python']}",
        "seed: 17",
        "device: cpu",
        "2 detectors",
        "300 in-distribution",
        "91.20",
        "5 %",
        "50 % of the variance of training embeddings; up: 25 %",
    ):
        assert said in page.text, said


def test_each_detector_has_all_that_is_told_of_it():
    results = benchmark(models={"msp": "a", "energy": "a"})
    data = rendered(results).data
    assert [one["name"] for one in data["detectors"]] == list(results.ranked())
    for one in data["detectors"]:
        assert one["configuration"] == "shapers:\n- {kind: react}\nscorer: {kind: knn, k: 10}"
        assert one["kinds"] == ["knn", "react"]
        assert one["seconds"] == "0.25"
        assert len(one["histograms"]) == 5
        assert len(one["curves"]) == 4
        assert one["headline"][0] == [
            "mean AUROC",
            f"{100 * results.mean(one['name'], 'auroc'):.2f}",
        ]
        clips, method = (data["methods"][at] for at in one["methods"])
        assert clips == {"slot": "shaper", "kind": "react", "about": [[False, "Clips."]]}
        assert method["about"][0] == [
            False,
            f"The score of {one['name']}: ",
            "log sum_k exp(z_k)",
            ".",
        ]
        assert method["url"] == URL
        assert f"A paper on {one['name']}." in method["citation"]
        assert method["bibtex"] == bibtex(paper(one["name"]))
    assert len(data["methods"]) == 3  # what several detectors share is told once
    assert ["Accuracy", "91.20"] in data["detectors"][0]["alone"]


def test_the_page_asks_no_network_for_anything():
    text = report.render(benchmark())
    page = Page(text)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base", "form"}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in text
    assert "@import" not in text


def test_references_within_the_page_lead_somewhere():
    page = rendered(benchmark())
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    anchors = [one["anchor"] for one in page.data["detectors"]]
    links = [a["href"] for t, a in page.tags if t == "a"]
    assert links == [f"#{anchor}" for anchor in anchors]
    for _, attributes in page.tags:
        if target := attributes.get("aria-labelledby"):
            assert target in ids


def test_addresses_of_detectors_are_their_names_and_all_different():
    names = ["MSP on a", "msp-on-a", "msp/on a!", "???", "Überraschung"]
    anchors = {one["name"]: one["anchor"] for one in rendered(benchmark(names)).data["detectors"]}
    assert len(set(anchors.values())) == 5
    assert anchors["MSP on a"] == "detector-msp-on-a"
    assert anchors["???"] == "detector-unnamed"
    assert anchors["Überraschung"] == "detector-überraschung"
    assert not any(re.search(r"\s", anchor) for anchor in anchors.values())


@pytest.mark.parametrize(
    "evil",
    [EVIL, "<img src=x onerror=alert(1)>", "\" onclick='alert(1)'", "{{ 7*7 }}", "&lt;b&gt;"],
)
def test_names_are_text_wherever_they_stand(evil):
    results = benchmark((evil, "msp"), models={evil: evil, "msp": "other"})
    first, second = results.entries
    citation = f'{evil} https://example.org/"{evil}'
    method = replace(first.methods[1], about=evil, paper=Paper(evil, evil, evil, 1, evil))
    results = replace(
        results,
        entries=(
            replace(first, configuration={"kind": evil}, citation=citation, methods=(method,)),
            second,
        ),
        provenance={"versions": {evil: evil}, "plugins": {evil: evil}, evil: [evil]},
        configuration={evil: {evil: evil}},
    )
    page, plain = rendered(results), rendered(benchmark(models={"msp": "a", "energy": "b"}))
    assert page.text.count(evil) >= 8
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert evil in [one["name"] for one in page.data["detectors"]]
    assert evil in [one["model"] for one in page.data["detectors"]]
    assert page.data["methods"][0]["about"] == [[False, evil]]
    assert page.data["methods"][0]["url"] == ""
    assert page.scripts[1] == plain.scripts[1]


def test_a_data_set_may_be_called_anything_too():
    scores = {"msp": {EVIL: np.arange(5.0), f"{EVIL}2": np.arange(3.0)}}
    results = Results.from_scores([Entry("msp")], scores, id_name=EVIL, groups={f"{EVIL}2": EVIL})
    page = rendered(results)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert f"OOD benchmark on {EVIL}" in page.text


@pytest.mark.parametrize("address", ["javascript:alert(1)", "data:text/html,x", "none"])
def test_only_web_addresses_become_links(address):
    entry = Entry("msp", citation=f"see {address}")
    scores = {"msp": {"id_test": [1.0, 2.0], "ood": [0.0]}}
    detector = rendered(Results.from_scores([entry], scores)).data["detectors"][0]
    assert (detector["citation"], detector["url"]) == (f"see {address}", "")
    results = benchmark(("msp",))
    (first,) = results.entries
    method = replace(first.methods[1], paper=replace(paper("msp"), url=address))
    results = replace(results, entries=(replace(first, methods=(method,)),))
    assert rendered(results).data["methods"][0]["url"] == ""


def test_a_hundred_detectors_on_six_sets_stay_below_a_megabyte():
    names = [f"mahalanobis of react number {n}" for n in range(100)]
    models = {name: f"model {n % 3}" for n, name in enumerate(names)}
    text = report.render(benchmark(names, sets=6, rows=2000, models=models))
    assert len(text.encode()) < 1_000_000
    Page(text)


def test_the_embedded_numbers_are_those_of_the_results():
    results = benchmark()
    data = rendered(results).data
    assert list(data["metrics"]) == [*SEPARATION, "accuracy", "false_alarm_rate"]
    for line, detector in enumerate(data["detectors"]):
        name = detector["name"]
        for at, (_, own, place, group) in enumerate(data["columns"]):
            for metric in SEPARATION:
                wanted = (
                    results.value(name, own, place)
                    if own
                    else results.mean(name, metric, group)
                    if place == "mean"
                    else results.value(name, metric, place)
                )
                shown = data["metrics"][metric]
                assert shown["values"][line][at] == wanted
                text = "" if wanted is None else f"{100 * wanted:.2f}"
                assert shown["texts"][line][at] == text


def test_a_model_is_named_where_there_are_several():
    one = rendered(
        benchmark(("net/msp", "net/energy"), models=dict.fromkeys(("net/msp", "net/energy"), "net"))
    )
    assert "model" not in [a.get("id") for _, a in one.tags]
    assert re.search(r"energy \d\d\.\d\d", one.text)
    two = rendered(benchmark(("a/msp", "b/msp"), models={"a/msp": "a", "b/msp": "b"}))
    assert "model" in [a.get("id") for _, a in two.tags]
    assert re.search(r"msp b \d\d\.\d\d", two.text)
    assert not re.search(r"b/msp b", two.text)


def test_groups_can_be_switched_where_there_are_several():
    def values(page):
        return [a["value"] for t, a in page.tags if a.get("type") == "checkbox"]

    assert values(rendered(benchmark(sets=4)))[:3] == ["near", "far", ""]
    assert values(rendered(benchmark(sets=1)))[:1] == ["train"]


def test_drawings_stay_within_their_frames():
    data = rendered(benchmark()).data
    for detector in data["detectors"]:
        for heights in detector["histograms"]:
            assert len(heights) == 48
            assert (min(heights), max(heights)) == (0, 100)
        for roc, inside, outside in detector["curves"]:
            steps = [tuple(map(int, step)) for step in re.findall(r"l(-?\d+) (-?\d+)", roc)]
            assert roc.startswith("M0 500l")
            assert (sum(x for x, _ in steps), sum(y for _, y in steps)) == (500, -500)
            assert all(x >= 0 >= y for x, y in steps)
            for path in (inside, outside):
                numbers = [tuple(map(int, n)) for n in re.findall(r"[Ml](-?\d+) (-?\d+)", path)]
                walked = np.cumsum(numbers, axis=0)
                assert walked.min() >= 0
                assert walked.max() <= 500
                assert (walked[0][0], walked[-1][0]) == (0, 500)


@pytest.mark.parametrize("positive", ["id", "ood"])
def test_precision_and_recall_are_those_of_scikit_learn(positive):
    from sklearn.metrics import precision_recall_curve

    rng = np.random.default_rng(0)
    inside, outside = rng.normal(1, 1, 60), rng.normal(0, 1, 90)
    figure = alone(id_test=inside, ood=outside).figures["only"]
    found = np.array(precision_recall(figure.roc["ood"], 60, 90, positive))[1:]
    sign = 1 if positive == "id" else -1
    labels = np.r_[np.ones(60), np.zeros(90)] == (positive == "id")
    precision, recall, _ = precision_recall_curve(labels, sign * np.r_[inside, outside])
    wanted = np.c_[recall, precision][:-1][::-1]
    assert len(found) == len(wanted)
    np.testing.assert_allclose(found, wanted, atol=2e-4)


def test_a_simplified_line_stays_near_every_point():
    rng = np.random.default_rng(0)
    points = list(zip(*np.sort(rng.random((2, 150)), axis=1).tolist(), strict=True))
    kept = simplified(points, 0.01)
    assert len(kept) < len(points)
    x, y = np.array(points).T
    line = np.interp(x, *np.array(kept).T)
    across = np.interp(y, *np.array(kept)[:, ::-1].T)
    assert np.minimum(abs(line - y), abs(across - x)).max() <= 0.01 * 2**0.5
    assert simplified(points[:1] * 2, 0.1) == points[:1] * 2


def test_pictures_have_few_enough_points_for_a_page():
    names = [f"d{n}" for n in range(40)]
    results = benchmark(names, sets=6, rows=2000, models={name: name for name in names})
    text = report.render(results)
    clouds = re.findall(r'class="cloud[^>]* d="([^"]*)"', text)
    assert len(clouds) == 40 * 8
    assert {len(re.findall("M", cloud)) for cloud in clouds} == {report.FEWEST}
    few = re.findall(r'class="cloud[^>]* d="([^"]*)"', report.render(benchmark()))
    assert {len(re.findall("M", cloud)) for cloud in few} == {300, 500}


def test_plain_results_make_a_plain_page():
    page = rendered(alone(id_test=[1.0, 1.0], ood=[1.0]))
    assert "1 detector tells 2 in-distribution" in page.text
    assert "mean AUROC" not in page.text
    assert "Embeddings" not in page.text
    assert "None" not in page.text
    assert page.data["detectors"][0]["threshold"] is None


def test_selective_prediction_has_coverage_in_place_of_roc():
    rng = np.random.default_rng(0)
    results = Results.from_scores(
        [Entry("only")],
        {"only": {"id_test": rng.normal(size=100)}},
        correct={"": rng.random(100) < 0.8},
        protocol=Selective(),
    )
    page = rendered(results)
    assert "right predictions from wrong ones on 100" in page.text
    detector = page.data["detectors"][0]
    assert detector["curves"] == []
    assert re.fullmatch(r"M\d+ \d+(l-?\d+ -?\d+)+", detector["coverage"])
    assert (
        page.data["metrics"]["aurc"]["texts"][0][0]
        == f"{100 * results.value('only', 'aurc', 'id_test'):.2f}"
    )
    assert page.data["metrics"]["accuracy"]["better"] == "higher"


def test_what_is_repeated_has_its_spread():
    rng = np.random.default_rng(0)
    results = alone(OutlierExposure(), id_test=rng.normal(1, 1, 100), ood=rng.normal(0, 1, 90))
    page = rendered(results)
    assert "mean ± standard deviation over 10 repeats" in page.text
    assert " ± " in page.data["metrics"]["auroc"]["texts"][0][0]
    assert " ± " in page.data["detectors"][0]["headline"][0][1]
    assert "not the draws" in page.data["basis"]
    splits = replace(benchmark(), protocol={"kind": "open_set"}, repeats=("low", "high"))
    assert "the first split, low" in rendered(splits).text
    assert rendered(benchmark()).data["basis"] == ""


def test_scores_near_the_limits_of_float64_can_be_drawn():
    big = np.finfo(np.float64).max
    scores = {"only": {"id_test": [-big, 0.0, big], "ood": [-big, big]}}
    calibration = {"only": Calibration([-big / 2, 0.0, big])}
    results = Results.from_scores(
        [Entry("only")], scores, calibrations=calibration, false_alarm_rate=0.3
    )
    # A quarter of the way from -big to big, in 48 bins.
    assert rendered(results).data["detectors"][0]["threshold"] == 12.0


def test_writing_gives_what_rendering_gives_every_time(tmp_path):
    results = benchmark()
    path = report.write(results, tmp_path / "made" / "report.html")
    assert path.read_text(encoding="utf-8") == report.render(results)
    results.save(tmp_path / "run")
    assert report.render(Results.load(tmp_path / "run")) == report.render(results)


def test_docstrings_keep_what_has_lines_of_its_own():
    text = "One\nline ``a``.\n\n- a\n- b\n\n    code\n    more"
    assert paragraphs(text) == [
        [False, "One line ", "a", "."],
        [True, "- a\n- b"],
        [True, "    code\n    more"],
    ]
    assert paragraphs("") == []


def test_bibliographies_get_what_tex_takes():
    found = bibtex(Paper("On 50% & {more}_x", "Zoë Müller-Lüdenscheidt, A B", "ICML", 2020, URL))
    assert found == (
        "@misc{mullerludenscheidt2020morex,\n"
        "  author = {Zoë Müller-Lüdenscheidt and A B},\n"
        "  title = {{On 50\\% \\& \\{more\\}\\_x}},\n"
        "  howpublished = {ICML},\n"
        "  year = {2020},\n"
        f"  url = {{{URL}}},\n"
        "}"
    )
    assert bibtex(Paper("", "", "", 1, "")).startswith("@misc{1,")
