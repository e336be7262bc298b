"""Each protocol measures what its paper measured, on the rows that it says."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from oodcore import metrics
from oodcore.calibration import Calibration
from oodcore.config import BenchmarkConfig, validate
from oodcore.errors import ConfigurationError, DataError
from oodcore.metrics import METRICS, SEPARATION, curve
from oodcore.protocol import Pair
from oodcore.protocols import KINDS, OutlierExposure, Separation, protocol_of
from oodcore.results import Entry, Results, Scored

SPLITS = {"a": {"known": [0, 1], "unknown": [2]}, "b": {"known": [2, 0], "unknown": [1]}}
OPEN_SET = {"kind": "open_set", "splits": SPLITS}
EVERY = [OPEN_SET if kind == "open_set" else kind for kind in KINDS]


def drawn(seed=0, sets=(("near", 120), ("far", 200)), rows=300):
    rng = np.random.default_rng(seed)
    scores = {"id_test": rng.normal(1, 1, rows).round(2)}
    scores |= {name: rng.normal(-k, 1, n).round(2) for k, (name, n) in enumerate(sets)}
    return scores, rng.random(rows) < 0.4 + 0.5 * (scores["id_test"] > 0.5)


def measured(protocol, scores=None, correct=None, groups=None, **options):
    own, right = drawn()
    entries = [Entry("one"), Entry("two")]
    scores = own if scores is None else scores
    flat = {name: np.round(values) for name, values in scores.items()}
    return Results.from_scores(
        entries,
        {"one": scores, "two": flat},
        groups={"near": "near", "far": "far"} if groups is None else groups,
        correct={"": right if correct is None else correct},
        protocol=protocol_of(protocol),
        **options,
    )


def nearest(inside, outside, level):
    """OE's FPR: OOD positive, read at the recall nearest to a level, the higher of two alike."""
    truth = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
    false, true, _ = roc_curve(truth, -np.r_[inside, outside], drop_intermediate=False)
    end = int(np.argmax(true == 1))
    order = sorted(range(1, end + 1), key=lambda i: (abs(true[i] - level), -true[i], -i))
    return false[order[0]]


def test_the_plain_protocol_is_what_there_is_without_one():
    own, right = drawn()
    plain = Results.from_scores([Entry("one")], {"one": own}, correct={"": right})
    assert plain.protocol["kind"] == "separation"
    assert plain.metrics == SEPARATION
    assert plain.id_metrics == ("accuracy",)
    assert plain.value("one", "accuracy", "id_test") == right.mean()
    assert all(row.values == () and row.sd is None for row in plain.rows)


def test_openood_has_near_and_far_means():
    results = measured("openood")
    for metric in SEPARATION:
        for group in ("near", "far"):
            assert results.mean("one", metric, group) == results.value("one", metric, group)
    own, _ = drawn()
    assert results.value("one", "fpr95_ood", "near") == metrics.fpr_at_tpr(
        own["id_test"], own["near"], positive="ood"
    )


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({}, "needs every OOD set in 'near' or 'far', and near is in neither"),
        ({"near": "near"}, "far is in neither"),
        ({"near": "near", "far": "near"}, "'far' has none"),
        ({"near": "far", "far": "far"}, "'near' has none"),
        ({"near": "near", "far": "other"}, "far is in neither"),
    ],
)
def test_openood_needs_both_groups(groups, message):
    sets = {name: groups.get(name, "") for name in ("near", "far")}
    [(route, text)] = protocol_of("openood").faults(sets)
    assert route == ("groups",)
    assert message in text
    named = {g: [n for n, own in groups.items() if own == g] for g in set(groups.values())}
    with pytest.raises(ConfigurationError, match=f"groups: .*{message}"):
        config({"protocol": "openood", "ood": {"near": "noise", "far": "noise"}, "groups": named})


@pytest.mark.parametrize("level", [90, 95, 99])
def test_outlier_exposure_is_measured_on_draws(level):
    protocol = {"kind": "outlier_exposure", "level": level, "draws": 4, "seed": 3}
    results = measured(protocol)
    name = f"fpr{level}_ood_nearest"
    assert results.metrics == ("auroc", name, "aupr_ood")
    assert results.repeats == ("draw 1", "draw 2", "draw 3", "draw 4")
    own, _ = drawn()
    inside = own["id_test"]
    for data in ("near", "far"):
        draws = chosen(protocol_of(protocol), inside, own[data], data)
        assert [len(rows) for rows in draws] == [60] * 4
        truth = np.r_[np.zeros(300), np.ones(60)]
        scores = [-np.r_[inside, rows] for rows in draws]
        expected = {
            "auroc": [roc_auc_score(truth, s) for s in scores],
            "aupr_ood": [average_precision_score(truth, s) for s in scores],
            name: [nearest(inside, rows, level / 100) for rows in draws],
        }
        for metric, values in expected.items():
            row = results.row("one", metric, data)
            assert row.values == pytest.approx(values, abs=1e-12)
            assert row.value == pytest.approx(np.mean(values), abs=1e-12)
            assert row.sd == pytest.approx(np.std(values), abs=1e-12)
    mean = results.row("one", "auroc", "mean")
    both = [results.row("one", "auroc", data).values for data in ("near", "far")]
    assert mean.values == pytest.approx(np.mean(both, axis=0))
    assert results.row("one", "accuracy", "id_test").values == ()


def chosen(protocol, inside, outside, name):
    """The rows of each draw, found by marking every row with a score of its own."""
    marks = np.arange(len(outside)) * 1e6 + 1e9
    seen = []

    def spying(one, other):
        seen.append(other)
        return curve(one, other)

    with mock.patch("oodcore.protocols.curve", spying):
        protocol.numbers(Pair(inside, marks, None, name))
    rows = [((drawn_ - 1e9) / 1e6).astype(int) for drawn_ in seen]
    assert all(len(set(one)) == len(one) for one in rows), "a row is drawn twice"
    return [outside[one] for one in rows]


def test_draws_depend_on_seed_number_and_set_alone():
    own, _ = drawn()
    protocol = OutlierExposure(draws=3)

    def draws(protocol=protocol, name="far"):
        return [sorted(rows) for rows in chosen(protocol, own["id_test"], own["far"], name)]

    first = draws()
    assert first == draws()
    assert first[0] != first[1] != first[2]
    assert first != draws(protocol.model_copy(update={"seed": 1}))
    assert first != draws(name="near")
    assert first == draws(protocol.model_copy(update={"draws": 5}))[:3]
    state = np.random.get_state()[1].copy()
    draws()
    assert (np.random.get_state()[1] == state).all()


def test_every_row_is_drawn_about_as_often():
    protocol = OutlierExposure(draws=400)
    rows = np.arange(60.0)
    drawn_rows = chosen(protocol, np.arange(150.0), rows, "x")
    counts = np.bincount(np.concatenate(drawn_rows).astype(int), minlength=60)
    assert counts.sum() == 400 * 30
    assert abs(counts - 200).max() < 6 * np.sqrt(400 * 0.5 * 0.5)


def test_the_chance_of_a_draw_is_one_sixth_in_aupr():
    rng = np.random.default_rng(1)
    scores = {"id_test": rng.random(20_000), "x": rng.random(9_000)}
    results = measured("outlier_exposure", scores, np.ones(20_000, bool), {})
    assert results.value("one", "aupr_ood", "x") == pytest.approx(1 / 6, abs=0.01)


@pytest.mark.parametrize(
    ("rows", "per", "wanted", "cure"), [(300, 5, 60, 7), (300, 4, 75, 7), (299, 5, 59, 7)]
)
def test_too_few_rows_for_a_draw_are_refused_with_a_cure(rows, per, wanted, cure):
    own, right = drawn(sets=(("x", 45),), rows=rows)
    protocol = {"kind": "outlier_exposure", "id_per_ood": per, "draws": 2}
    message = f"a draw takes {wanted} rows of x.*there are 45.*id_per_ood to {cure}"
    with pytest.raises(DataError, match=message):
        measured(protocol, own, right, {})
    measured({**protocol, "id_per_ood": cure}, own, right, {})
    with pytest.raises(DataError):
        measured({**protocol, "id_per_ood": cure - 1}, own, right, {})


def test_a_set_of_just_one_draw_gives_the_same_every_time():
    own, right = drawn(sets=(("x", 60),))
    results = measured("outlier_exposure", own, right, {})
    row = results.row("one", "auroc", "x")
    assert row.value == pytest.approx(metrics.auroc(own["id_test"], own["x"]), abs=1e-15)
    assert row.sd == pytest.approx(0, abs=1e-15)
    with pytest.raises(DataError, match="4 in-distribution test rows are too few"):
        measured("outlier_exposure", {"id_test": [1.0] * 4, "x": [0.0]}, [True] * 4, {})


def test_selective_prediction_looks_at_the_test_rows_alone():
    own, right = drawn()
    inside = own["id_test"]
    results = measured("selective", {"id_test": inside}, right, {})
    assert results.metrics == ()
    assert results.main == "aurc"
    assert [data.name for data in results.data] == ["id_test"]
    expected = {
        "aurc": metrics.aurc(inside, right),
        "eaurc": metrics.eaurc(inside, right),
        "error_auroc": roc_auc_score(right, inside),
        "error_aupr": average_precision_score(~right, -inside),
        "accuracy_at_80": metrics.accuracy_at(0.8, inside, right),
        "accuracy_at_90": metrics.accuracy_at(0.9, inside, right),
        "accuracy": right.mean(),
    }
    assert results.id_metrics == tuple(expected)
    for metric, value in expected.items():
        assert results.value("one", metric, "id_test") == pytest.approx(value, abs=1e-12)
    assert results.ranked() == results.ranked("aurc")
    points = results.figures["one"].coverage
    assert points[-1] == (1.0, pytest.approx(right.mean(), abs=1e-5))
    for share, accuracy in points[::20]:
        assert metrics.accuracy_at(share, inside, right) == pytest.approx(accuracy, abs=1e-2)


@pytest.mark.parametrize("right", [True, False])
def test_errors_cannot_be_found_where_there_are_none_or_nothing_else(right):
    results = measured("selective", {"id_test": np.arange(9.0)}, np.full(9, right), {})
    assert results.value("one", "error_auroc", "id_test") is None
    assert results.value("one", "aurc", "id_test") == 1 - right
    assert results.value("one", "eaurc", "id_test") == 0


def test_ssb_osr_has_each_set_the_mean_and_all_of_them_pooled():
    own, right = drawn()
    results = measured("ssb_osr")
    inside, pooled = own["id_test"], np.r_[own["near"], own["far"]]
    for data, outside in {"near": own["near"], "far": own["far"], "pooled": pooled}.items():
        expected = {
            "auroc": metrics.auroc(inside, outside),
            "fpr95_id": metrics.fpr_at_tpr(inside, outside),
            "auin": metrics.auin(inside, outside),
            "auout": metrics.auout(inside, outside),
            "dterr": metrics.detection_error(inside, outside, "counts"),
            "oscr": metrics.oscr(inside, right, outside),
        }
        assert results.metrics == tuple(expected)
        for metric, value in expected.items():
            assert results.value("one", metric, data) == value
    both = [results.value("one", "oscr", data) for data in ("near", "far")]
    assert results.mean("one", "oscr") == pytest.approx(np.mean(both))
    assert results.value("one", "accuracy", "id_test") == right.mean()
    assert results.table_rows()[0][:3] == ["detector", "pooled", "mean"]


def test_sorting_does_not_part_scores_from_predictions():
    # By an in-place sort the scores would be 1, 2, 3 and only the right one of them at the bottom.
    inside, right = np.array([3.0, 1.0, 2.0]), np.array([True, False, False])
    scores = {"id_test": inside, "x": np.array([2.5])}
    inside.flags.writeable = False
    results = measured("ssb_osr", scores, right, {})
    assert results.value("one", "oscr", "x") == pytest.approx(1 / 3)
    assert inside.tolist() == [3, 1, 2]


def scored(seed):
    own, right = drawn(seed, sets=(("unknown", 80),), rows=100 + seed)
    calibrations = {"one": Calibration(np.arange(40.0) / 10)}
    return Scored({"one": own}, correct={"": right}, calibrations=calibrations)


def test_open_set_is_the_mean_over_splits():
    splits = {"a": scored(1), "b": scored(2)}
    said = [one.scores["one"] for one in splits.values()]
    results = Results.from_splits(
        [Entry("one")], splits, protocol=protocol_of(OPEN_SET), false_alarm_rate=0.1
    )
    assert results.repeats == ("a", "b")
    assert results.metrics == ("auroc", "oscr", "fpr95_id")
    for metric, read in {"auroc": metrics.auroc, "fpr95_id": metrics.fpr_at_tpr}.items():
        values = [
            read(one.scores["one"]["id_test"], one.scores["one"]["unknown"])
            for one in splits.values()
        ]
        row = results.row("one", metric, "unknown")
        assert row.values == tuple(values)
        assert (row.value, row.sd) == (
            pytest.approx(np.mean(values)),
            pytest.approx(np.std(values)),
        )
    right = [one.correct[""] for one in splits.values()]
    oscr = [
        metrics.oscr(own["id_test"], correct, own["unknown"])
        for own, correct in zip(said, right, strict=True)
    ]
    assert results.row("one", "oscr", "unknown").values == tuple(oscr)
    accuracy = [correct.mean() for correct in right]
    assert results.row("one", "accuracy", "id_test").values == pytest.approx(accuracy)
    assert len(results.row("one", "false_alarm_rate", "id_test").values) == 2
    assert results.calibration_rows == 80
    assert results.provenance["calibration_rows"] == {"a": 40, "b": 40}
    assert [(data.name, data.rows) for data in results.data] == [("id_test", 203), ("unknown", 160)]


@pytest.mark.parametrize("protocol", ["ssb_osr", "selective", OPEN_SET])
def test_protocols_that_need_labels_say_so(protocol):
    own, _ = drawn(sets=(("x", 30),))
    own = {"id_test": own["id_test"]} if protocol == "selective" else own
    with pytest.raises(DataError, match="which predictions are right: give id_test with a label"):
        Results.from_scores([Entry("one")], {"one": own}, protocol=protocol_of(protocol))


@pytest.mark.parametrize("protocol", EVERY, ids=KINDS)
def test_results_of_every_protocol_read_back_and_can_be_shown(protocol, tmp_path):
    from oodcore.report import render

    own, right = drawn()
    if protocol == "selective":
        own = {"id_test": own["id_test"]}
    if protocol == OPEN_SET:
        splits = {"a": scored(1), "b": scored(2)}
        results = Results.from_splits(
            [Entry("one")], splits, protocol=protocol_of(protocol), false_alarm_rate=0.1
        )
    else:
        groups = {name: name for name in own if name != "id_test"}
        results = measured(protocol, own, right, groups)
    results.save(tmp_path)
    again = Results.load(tmp_path)
    assert again == results
    kind = protocol if isinstance(protocol, str) else protocol["kind"]
    assert again.protocol["kind"] == kind
    assert again.protocol["meaning"]
    line = f"Protocol {kind}: {again.protocol['meaning']}."
    assert (line in again.markdown()) == (kind != "separation")
    page = render(again)
    assert (str(escape(line)) in page) == (kind != "separation")
    for metric in again.metrics:
        assert METRICS[metric].title in page
        assert len(again.table_rows(metric)) == 1 + len(again.entries)
    if again.repeats:
        assert " ± " in again.markdown()
        assert " ± " in page
        text = (tmp_path / "results.csv").read_text()
        sd = again.row("one", "auroc", again.ood_data[0].name).sd
        assert text.splitlines()[0].endswith(",sd")
        assert str(sd) in text


def test_results_whose_repeats_do_not_fit_are_refused():
    results = measured({"kind": "outlier_exposure", "draws": 2})
    index = next(i for i, row in enumerate(results.rows) if row.values)

    def spoilt(**change):
        rows = list(results.rows)
        rows[index] = replace(rows[index], **change)
        return replace(results, rows=tuple(rows))

    spoilt()
    with pytest.raises(ConfigurationError, match="a value for each of the repeats"):
        spoilt(values=(0.5,))
    with pytest.raises(ConfigurationError, match="not the mean of its repeats"):
        spoilt(values=(0.0, 0.0))
    with pytest.raises(ConfigurationError, match="no share in"):
        spoilt(values=(-1.0, 2.0))


def config(fields, **rest):
    whole = {"scorers": ["msp"], "id_test": "digits", "train": "digits", **fields, **rest}
    return validate(BenchmarkConfig, whole)


OOD = {"ood": {"x": "noise"}}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "opnood", **OOD}, "'opnood'; did you mean 'openood'\\? there are: "),
        ({"protocol": "zzz", **OOD}, "unknown protocol 'zzz'; there are: separation"),
        ({"protocol": 3, **OOD}, "write a protocol as its kind"),
        ({"protocol": {"draws": 3}, **OOD}, "write a protocol as its kind"),
        ({"protocol": {"kind": "outlier_exposure", "level": 97}, **OOD}, "level: must be 90, 95"),
        ({"protocol": {"kind": "outlier_exposure", "draw": 9}, **OOD}, "draw: unknown field; did"),
        ({"protocol": {"kind": "outlier_exposure", "draws": 0}, **OOD}, "draws: must be greater"),
        ({"protocol": "selective", **OOD}, "ood: .* looks at id_test alone; leave out ood"),
        ({"protocol": "ssb_osr"}, "ood: is needed"),
        ({}, "ood: is needed"),
        ({"protocol": "open_set"}, "splits: is needed"),
        ({"protocol": {"kind": "open_set", "splits": {}}}, "at least 1 item"),
        ({"protocol": {"kind": "open_set", "splits": {"a": {"known": []}}}}, "at least 1 item"),
        (
            {"protocol": {"kind": "open_set", "splits": {"a": {"known": [1]}}}},
            "a: name its unknown classes, or how many",
        ),
        (
            {"protocol": {"kind": "open_set", "classes": 2, "splits": {"a": {"known": [1, 0]}}}},
            "a: all is known",
        ),
        (
            {"protocol": {"kind": "open_set", "splits": {"a": {"known": [1], "unknown": [1]}}}},
            "the class 1 is named twice",
        ),
        ({"protocol": OPEN_SET, "ood": {"unknown": "noise"}}, "ood.unknown: .* rename yours"),
        (
            {"protocol": OPEN_SET, "train": {"kind": "digits", "classes": [0, 1]}},
            "train.classes: the protocol's splits say which classes",
        ),
    ],
)
def test_what_a_configuration_must_not_say(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        config(fields)


def test_a_configuration_names_its_protocol():
    assert config(OOD).protocol == Separation()
    fields = {"protocol": {"kind": "outlier_exposure", "level": 90}, **OOD}
    assert config(fields).protocol == OutlierExposure(level=90)
    assert config({"protocol": "selective"}).protocol.kind == "selective"
    split = config({"protocol": OPEN_SET}).protocol.splits["b"]
    assert split.known == (2, 0)
    for kind, cls in KINDS.items():
        assert cls.__doc__
        given_ = OPEN_SET if kind == "open_set" else kind
        assert protocol_of(protocol_of(given_).model_dump()) == protocol_of(given_)
        assert protocol_of(protocol_of(given_)) == protocol_of(given_)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 6), st.integers(0, 3))
def test_a_draw_is_possible_exactly_where_the_rows_suffice(inside, outside, per, seed):
    protocol = OutlierExposure(id_per_ood=per, draws=2, seed=seed)
    enough = 1 <= inside // per <= outside
    pair = Pair(np.arange(float(inside)), np.arange(float(outside)), None, "x")
    if enough:
        protocol.check_rows(inside, {"x": outside})
        assert all(0 <= v <= 1 for values in protocol.numbers(pair).values() for v in values)
    else:
        with pytest.raises(DataError):
            protocol.check_rows(inside, {"x": outside})


def test_a_pair_sorts_once():
    pair = Pair(np.array([1.0]), np.array([0.0]), None, "x")
    assert pair.curve is pair.curve
    assert pair.curve.auroc() == curve([1.0], [0.0]).auroc()
