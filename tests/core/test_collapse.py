"""Collapse: the two measures against naive ones, their corners, and those of a network."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_runs import Clusters, Net

from oodcore import Features, Head
from oodcore.collapse import cfc, measured, wfc
from oodcore.data import Batch
from oodcore.errors import DataError
from oodcore.moments import ClassMoments
from oodcore.regularizer import TrainModel
from oodcore.statistic import Shape


def drawn(*shape, seed=0, scale=1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def simplex(classes: int, width: int, scale: float = 1.0) -> torch.Tensor:
    """Class means of equal norms and angles, ``[K, D]``, around 0."""
    frame = torch.linalg.qr(drawn(width, classes, seed=4)).Q.T
    frame = frame - frame.mean(dim=0)
    return scale * frame / frame.norm(dim=1, keepdim=True)


def features(classes=3, each=20, width=5, seed=0, head=True) -> Features:
    labels = torch.arange(classes * each) % classes
    rows = drawn(classes, width, seed=seed + 1, scale=3)[labels] + drawn(len(labels), width)
    weight = Head(drawn(classes, width, seed=seed + 2)) if head else None
    return Features(embeddings=rows, labels=labels, head=weight)


def naive_wfc(rows: np.ndarray, labels: np.ndarray) -> float:
    classes = sorted(set(labels.tolist()))
    means = {k: rows[labels == k].mean(axis=0) for k in classes}
    middle = np.mean(list(means.values()), axis=0)
    within = sum(
        np.outer(row - means[int(k)], row - means[int(k)])
        for row, k in zip(rows, labels, strict=True)
    ) / len(rows)
    between = sum(np.outer(mean - middle, mean - middle) for mean in means.values()) / len(classes)
    inverse = np.linalg.pinv(between, rcond=1e-12, hermitian=True)
    return float(np.trace(within @ inverse)) / len(classes)


def naive_cfc(rows, labels, weight, norm, center) -> float:
    classes = range(len(weight))
    means = np.stack([rows[labels == k].mean(axis=0) for k in classes])
    middle = means.mean(axis=0) if center else 0.0
    means = means - middle
    size = np.linalg.norm(means) if norm == "class_means" else np.linalg.norm(rows - middle)
    parts = zip(means / size, weight / np.linalg.norm(weight), strict=True)
    return sum(math.dist(mean, direction) for mean, direction in parts)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 1000),
    classes=st.integers(2, 6),
    each=st.integers(1, 8),
    width=st.integers(1, 8),
    norm=st.sampled_from(["class_means", "all"]),
    center=st.booleans(),
)
def test_the_formulas(seed, classes, each, width, norm, center):
    given = features(classes, each, width, seed)
    rows, labels = given.embeddings.numpy(), given.labels.numpy()
    if width >= classes - 1:
        # Else the means span the whole space, where the cut-off of the naive one has its say too.
        assert wfc(given) == pytest.approx(naive_wfc(rows, labels), rel=1e-6, abs=1e-12)
    wanted = naive_cfc(rows, labels, given.head.weight.numpy(), norm, center)
    assert cfc(given, norm=norm, center=center) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_fewer_dimensions_than_classes(classes):
    given = features(classes, 20, 1)
    rows, labels = given.embeddings[:, 0].numpy(), given.labels.numpy()
    means = np.array([rows[labels == k].mean() for k in range(classes)])
    wanted = np.mean((rows - means[labels]) ** 2) / means.var() / classes
    assert wfc(given) == pytest.approx(wanted, rel=1e-9)


def test_perfect_collapse_with_a_head_that_fits():
    means, labels = simplex(10, 64, 5.0), torch.arange(500) % 10
    given = Features(embeddings=means[labels], labels=labels, head=Head(0.3 * means))
    assert wfc(given) == pytest.approx(0, abs=1e-12)
    assert cfc(given) == pytest.approx(0, abs=1e-12)
    assert cfc(given, center=True) == pytest.approx(0, abs=1e-9)
    wanted = (1 - 1 / math.sqrt(50)) * math.sqrt(10)
    assert cfc(given, norm="all") == pytest.approx(wanted, rel=1e-9)
    assert wanted == pytest.approx(2.7151, abs=1e-4)


def test_a_little_spread_around_a_simplex():
    means, labels = simplex(10, 64, 5.0), torch.arange(500) % 10
    rows = means[labels] + drawn(500, 64, scale=0.1)
    assert wfc(Features(embeddings=rows, labels=labels)) == pytest.approx(0.0035, rel=0.1)
    # Single precision is where a pseudo-inverse of the scatter itself goes wrong by orders.
    single = Features(embeddings=rows.float(), labels=labels)
    double = Features(embeddings=rows.float().double(), labels=labels)
    assert wfc(single) == pytest.approx(wfc(double), rel=1e-12)


def test_a_turn_a_shift_and_a_scale_change_nothing_that_they_should_not():
    given = features()
    turn = torch.linalg.qr(drawn(5, 5, seed=8)).Q
    moved = Features(embeddings=7 * given.embeddings @ turn + 3, labels=given.labels)
    assert wfc(moved) == pytest.approx(wfc(given), rel=1e-9)
    turned = Features(
        embeddings=7 * given.embeddings @ turn,
        labels=given.labels,
        head=Head(2 * given.head.weight @ turn),
    )
    for norm in ("class_means", "all"):
        assert cfc(turned, norm=norm) == pytest.approx(cfc(given, norm=norm), rel=1e-9)


def test_a_head_of_directions_counts_with_unit_weights():
    given = features()
    weight = given.head.weight
    unit = Head(weight / weight.norm(dim=1, keepdim=True))
    assert cfc(given, Head(weight, normalize_weight=True)) == pytest.approx(cfc(given, unit))
    assert cfc(given) != pytest.approx(cfc(given, unit))


def test_a_class_without_rows_is_left_out():
    given = features()
    fewer = given.labels != 1
    kept = Features(embeddings=given.embeddings[fewer], labels=given.labels[fewer], head=given.head)
    moments = ClassMoments()
    state = moments.update(moments.init(Shape(9, 5, {})), kept)
    alone = Features(
        embeddings=kept.embeddings,
        labels=(kept.labels > 0).long(),
        head=Head(given.head.weight[[0, 2]]),
    )
    assert wfc(kept) == pytest.approx(wfc(alone), rel=1e-12)
    assert wfc(moments.view(state)) == pytest.approx(wfc(alone), rel=1e-12)
    for norm in ("class_means", "all"):
        assert cfc(kept, norm=norm) == pytest.approx(cfc(alone, norm=norm), rel=1e-12)


def test_without_labels_the_predicted_class_counts():
    given = features()
    alone = Features(embeddings=given.embeddings, head=given.head)
    told = Features(embeddings=given.embeddings, head=given.head, labels=alone.predicted)
    assert wfc(alone) == wfc(told) != wfc(given)


NONE = {
    "one class": lambda rows: Features(embeddings=rows, labels=torch.zeros(len(rows)).long()),
    "the same means": lambda rows: Features(
        embeddings=torch.cat([rows, rows]), labels=torch.arange(2).repeat_interleave(len(rows))
    ),
    "the same means, far off": lambda rows: Features(
        embeddings=1e6 + torch.cat([rows, rows.flip(0)]),
        labels=torch.arange(2).repeat_interleave(len(rows)),
    ),
    "zeros": lambda rows: Features(embeddings=0 * rows, labels=torch.arange(len(rows)) % 3),
}


@pytest.mark.parametrize("case", NONE.values(), ids=NONE)
def test_class_means_that_do_not_differ_have_no_measure(case):
    with pytest.warns(UserWarning, match="wfc needs two class means that differ"):
        assert math.isnan(wfc(case(drawn(7, 4))))


@pytest.mark.parametrize(("rows", "weight"), [(0, 1), (1, 0)])
def test_nothing_to_compare_directions_of_has_no_measure(rows, weight):
    given = Features(
        embeddings=rows * drawn(6, 4),
        labels=torch.arange(6) % 3,
        head=Head(weight * drawn(3, 4, seed=1)),
    )
    with pytest.warns(UserWarning, match="cfc needs class means and weights that are not all 0"):
        assert math.isnan(cfc(given))


REFUSED = {
    "no rows": (Features(embeddings=drawn(0, 4), labels=torch.zeros(0).long()), "are no rows"),
    "no embeddings": (Features(logits=drawn(3, 4)), "embeddings are needed"),
    "not finite": (
        Features(embeddings=torch.tensor([[1.0], [math.nan]]), labels=torch.tensor([0, 1])),
        "collapse: embeddings of row 1 are not finite",
    ),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_measured_is_refused(given, message):
    with pytest.raises(DataError, match=message):
        wfc(given)
    with pytest.raises(DataError, match=message):
        cfc(given, Head(drawn(4, 4)))


def test_a_head_is_needed_that_fits():
    with pytest.raises(DataError, match="compares class means with a head, and there is none"):
        cfc(features(head=False))
    with pytest.raises(DataError, match=r"head is \[3, 4\] and the class means are \[3, 5\]"):
        cfc(features(), Head(drawn(3, 4)))
    with pytest.raises(DataError, match="weights of row 0 are not finite"):
        cfc(features(), Head(drawn(3, 5) / 0))


# Of a network


def network() -> TrainModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TrainModel(Net(3, 0.5), "head")


def batches(sizes=(20, 20, 2)):
    rows = Clusters().open()
    first = 0
    for size in sizes:
        yield Batch(rows.inputs[first : first + size], rows.labels[first : first + size], None)
        first += size


def test_a_network_is_measured_as_it_is_used():
    model = network().train()
    model.network.body[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    found = measured(model, batches(), 3)
    assert [part.training for part in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    rows = Clusters().open()
    whole = model.eval()(rows.inputs)
    told = Features(embeddings=whole.embeddings, labels=rows.labels, head=whole.head)
    assert told.head.weight.requires_grad
    assert found == pytest.approx({"wfc": wfc(told), "cfc": cfc(told)}, rel=1e-6)
    assert found == pytest.approx(measured(model, batches((7,) * 6), 3), rel=1e-6)


def test_a_measure_that_does_not_exist_is_left_out():
    model = network()
    nn.init.zeros_(model.network.body[4].weight)
    nn.init.zeros_(model.network.body[4].bias)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured(model, batches(), 3) == {}
        nn.init.ones_(model.network.body[4].bias)
        assert set(measured(model, batches(), 3)) == {"cfc"}


def test_a_network_that_is_out_of_hand_is_told():
    model = network()
    nn.init.constant_(model.network.body[4].bias, math.inf)
    with pytest.raises(DataError, match="collapse: embeddings of row 0 are not finite"):
        measured(model, batches(), 3)
    with pytest.raises(DataError, match="no rows to measure collapse on"):
        measured(network(), iter(()), 3)
