"""Pictures show training rows' main directions, from few rows, the same however rows come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oodcore
from oodcore.features import Features
from oodcore.passes import fit, score
from oodcore.picture import GRID, ROWS, Album

NAMES = ("one", "two")
MODELS = {"one": "net", "two": "net"}


def gathered(train, sets, batch=64, order=None, seed=0):
    """The picture of these embeddings, given in batches; ``order`` changes that of each set."""
    album = Album(seed)

    def passing(look, rows):
        ids = torch.arange(len(rows))
        if order is not None:
            ids = ids[torch.from_numpy(order.permutation(len(rows)))]
        for some in ids.split(batch):
            look(NAMES, Features(embeddings=rows[some], ids=some))

    passing(album.training, train)
    for title, rows in sets.items():
        passing(album.of(title), rows)
    return album.pictures(MODELS, list(sets))["net"]


def random_rows(count, width, seed, shift=0.0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(shift, np.linspace(5, 0.5, width), (count, width)))


def places(picture, points):
    return np.asarray(picture.corner) + np.asarray(points) / GRID * picture.side


@pytest.mark.parametrize(("count", "width"), [(300, 6), (40, 90)])
def test_the_plane_is_that_of_principal_components(count, width):
    train, other = random_rows(count, width, 0), random_rows(50, width, 1, 2.0)
    picture = gathered(train, {"id_test": train, "ood": other})
    mean = train.mean(0)
    _, spread, directions = torch.linalg.svd(train - mean, full_matrices=False)
    for axis in (0, 1):
        wanted = ((other - mean) @ directions[axis] / (spread[0] / count**0.5)).numpy()
        found = np.sort(places(picture, picture.points["ood"])[:, axis])
        low, high = picture.corner[axis], picture.corner[axis] + picture.side
        either = (np.clip(np.sort(sign * wanted), low, high) for sign in (1, -1))
        assert min(np.abs(found - one).max() for one in either) <= picture.side / GRID
        share = float(spread[axis] ** 2 / (spread**2).sum())
        assert picture.variance[axis] == pytest.approx(share)
    np.testing.assert_allclose(places(picture, picture.train).mean(0), 0, atol=0.05)


def test_a_bounded_uniform_sample_is_drawn_the_same_in_any_order_and_batch():
    train, test = random_rows(5000, 3, 0), random_rows(3000, 3, 1)
    picture = gathered(train, {"id_test": test, "few": test[:7]}, batch=64)
    assert len(picture.train) == len(picture.points["id_test"]) == ROWS
    assert len(picture.points["few"]) == 7
    again = gathered(
        train, {"id_test": test, "few": test[:7]}, batch=1700, order=np.random.default_rng(0)
    )
    assert np.abs(np.subtract(picture.train, again.train)).max() <= 1
    assert np.abs(np.subtract(picture.points["id_test"], again.points["id_test"])).max() <= 1
    other = gathered(train, {"id_test": test}, seed=1)
    assert set(other.train) != set(picture.train)
    # A sample that leaned to some rows would have another mean: 1000 of 5000, standard error 0.03.
    assert abs(places(picture, picture.train).mean(0)).max() < 0.15


def test_no_more_rows_are_held_than_promised():
    album = Album()
    most = 0
    for start in range(0, 20_000, 500):
        rows = torch.ones(500, 4)
        album.training(NAMES, Features(embeddings=rows, ids=torch.arange(start, start + 500)))
        held = album._training[NAMES]._rows
        most = max(most, sum(map(len, held)))
    assert ROWS <= most <= 2 * ROWS


def test_rows_far_off_do_not_squash_the_others():
    train = random_rows(400, 4, 0)
    far = torch.full((20, 4), -1e9, dtype=torch.float64)
    picture = gathered(train, {"id_test": train, "far": far})
    assert picture.side < 40
    assert all(0 in point or GRID in point for point in picture.points["far"])
    assert np.ptp(np.asarray(picture.points["id_test"])[:, 0]) > GRID / 10


numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-2, 2).map(float)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_a_picture_of_any_finite_rows_is_sound(data, width, rows, others):
    def drawn(count):
        values = data.draw(st.lists(numbers, min_size=count * width, max_size=count * width))
        return torch.tensor(values, dtype=torch.float64).reshape(count, width)

    picture = gathered(drawn(rows), {"id_test": drawn(others), "ood": drawn(others)})
    assert picture.sound()
    assert len(picture.points["ood"]) == others


@pytest.mark.parametrize("value", [0.0, 3.5, -1e300])
def test_rows_that_are_all_alike_lie_in_the_middle(value):
    same = torch.full((5, 3), value, dtype=torch.float64)
    picture = gathered(same, {"id_test": same})
    assert picture.variance == (0.0, 0.0)
    assert set(picture.train) == {(GRID // 2, GRID // 2)}


def test_damage_is_noticed():
    rows = random_rows(20, 3, 0)
    picture = gathered(rows, {"id_test": rows})
    for harm in (
        {"variance": (1.5, 0.0)},
        {"side": 0.0},
        {"corner": (float("nan"), 0.0)},
        {"train": ((0, GRID + 1),)},
        {"points": {"id_test": ((-1, 0),)}},
        {"train": ((0, 0),) * (ROWS + 1)},
    ):
        assert not replace(picture, **harm).sound(), harm


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.rows = 0

    def forward(self, inputs):
        self.rows += len(inputs)
        return self.head(self.hidden(inputs).relu())


def data(count, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 5, generator=generator)
    return inputs, torch.arange(count) % 3


def test_a_benchmark_draws_without_a_further_pass():
    net = Counting()
    sets = {"far": data(30, 2)[0] * 4, "near": data(25, 3)[0]}
    results = oodcore.benchmark(
        net, train=data(60, 0), id_test=data(40, 1), ood=sets, scorers=["msp", "mahalanobis"]
    )
    # One row more finds the head of the network.
    assert net.rows <= 60 + 40 + 30 + 25 + 2
    picture = results.pictures[""]
    assert len(picture.train) == 60
    assert {name: len(points) for name, points in picture.points.items()} == {
        "id_test": 40,
        "far": 30,
        "near": 25,
    }
    with torch.no_grad():
        rows = net.hidden(data(60, 0)[0]).relu().double()
    spread = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
    expected = (spread / spread.sum())[:2].tolist()
    assert picture.variance == pytest.approx(expected, rel=1e-4)


def test_each_model_has_its_picture_and_logits_alone_have_none():
    models = {"a": Counting(), "b": Counting()}
    rows = {"train": data(30, 0), "id_test": data(20, 1), "ood": {"far": data(9, 2)[0]}}
    results = oodcore.benchmark(models, scorers=["msp"], **rows)
    assert list(results.pictures) == ["a", "b"]
    assert results.pictures["a"] != results.pictures["b"]

    def logits(count, seed):
        inputs, labels = data(count, seed)
        return Features(logits=inputs.double(), labels=labels)

    ood = {"far": Features(logits=data(9, 2)[0].double())}
    plain = oodcore.benchmark(train=logits(30, 0), id_test=logits(20, 1), ood=ood, scorers=["msp"])
    assert plain.pictures == {}
    some = replace(logits(30, 0), embeddings=data(30, 0)[0].double())
    sets = {"far": replace(ood["far"], embeddings=data(9, 2)[0].double())}
    mixed = oodcore.benchmark(train=some, id_test=logits(20, 1), ood=sets, scorers=["msp"])
    assert mixed.pictures == {}


def test_whoever_watches_sees_each_row_once_before_any_shaper():
    net = Counting()
    make = {"plain": (), "shaped": ({"kind": "react"},)}
    detectors = {n: oodcore.Detector(net, scorer="energy", shapers=s) for n, s in make.items()}
    seen = []

    def watch(names, features):
        seen.append((tuple(names), features.embeddings))

    fit(detectors, data(50, 0), watch=watch)
    assert {names for names, _ in seen} == {("plain", "shaped")}
    with torch.no_grad():
        expected = net.hidden(data(50, 0)[0]).relu().double()
    torch.testing.assert_close(torch.cat([rows for _, rows in seen]), expected)
    seen.clear()
    score(detectors, data(30, 1), watch=watch)
    assert sum(len(rows) for _, rows in seen) == 30
