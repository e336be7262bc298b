"""Features and heads: shapes, logits that follow embeddings, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from oodcore import Features, Head
from oodcore.errors import DataError
from oodcore.features import check_finite, required, unit


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(count: int = 6, seed: int = 0) -> Features:
    return Features(
        embeddings=random(count, 4, seed=seed),
        labels=torch.arange(count) % 3,
        ids=torch.arange(count) + 10 * seed,
        layers={"map": random(count, 2, 3, 5, seed=seed + 1)},
        head=Head(random(3, 4), random(3)),
    )


# Head


@pytest.mark.parametrize("normalize_weight", [False, True])
@pytest.mark.parametrize("normalize_features", [False, True])
@pytest.mark.parametrize("scale", [1.0, 40.0])
@pytest.mark.parametrize("bias", [None, random(3)])
def test_a_head_is_its_formula(
    normalize_weight: bool, normalize_features: bool, scale: float, bias: Tensor | None
) -> None:
    weight, rows = random(3, 4), random(5, 4, seed=1)
    rows[2] = 0.0
    head = Head(weight, bias, normalize_weight, normalize_features, scale)
    expected = np.zeros((5, 3))
    for n, h in enumerate(rows.numpy()):
        for k, w in enumerate(weight.numpy()):
            value = sum(float(a) * float(b) for a, b in zip(h, w, strict=True))
            if normalize_weight:
                value /= float(np.sqrt((w**2).sum()))
            if normalize_features:
                value /= max(float(np.sqrt((h**2).sum())), 1e-12)
            expected[n, k] = scale * value + (0.0 if bias is None else float(bias[k]))
    np.testing.assert_allclose(head(rows), expected, rtol=1e-12, atol=1e-12)


def test_a_head_takes_the_wider_type() -> None:
    head = Head(random(3, 4).float(), random(3).float())
    assert head(random(5, 4)).dtype == torch.float64
    assert head.to(torch.float64).weight.dtype == torch.float64
    assert head.weight.dtype == torch.float32


def test_heads_that_cannot_be() -> None:
    with pytest.raises(DataError, match=r"weight is \[K, D\], not \[4\]"):
        Head(random(4))
    with pytest.raises(DataError, match=r"bias is \[K\] = \[3\], not \[4\]"):
        Head(random(3, 4), random(4))


def test_unit_rows() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1e-13]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.0, 0.1]], dtype=torch.float64)
    assert torch.allclose(unit(rows), expected, rtol=1e-12)


# Features


def test_logits_come_from_the_head_unless_they_are_given() -> None:
    features = made()
    assert features.head is not None
    assert features.embeddings is not None
    assert torch.equal(features.logits, features.head(features.embeddings))
    given = random(6, 3, seed=5)
    kept = Features(embeddings=features.embeddings, logits=given, head=features.head)
    assert kept.logits is given
    assert Features(embeddings=features.embeddings).logits is None


def test_other_embeddings_logits_and_heads() -> None:
    features, rows = made(), random(6, 4, seed=7)
    assert features.head is not None
    moved = features.with_embeddings(rows)
    assert moved.embeddings is rows
    assert torch.equal(moved.logits, features.head(rows))
    assert torch.equal(moved.labels, features.labels)
    tempered = features.with_logits(features.logits / 2)
    assert tempered.embeddings is features.embeddings
    assert torch.equal(tempered.logits, features.logits / 2)
    other = Head(random(5, 4, seed=8))
    assert torch.equal(features.with_head(other).logits, other(features.embeddings))


def test_the_predicted_class_is_the_first_of_the_largest() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [0.0, 1.0, 5.0]])
    assert Features(logits=logits).predicted.tolist() == [1, 0, 2]


@pytest.mark.parametrize("rows", [slice(1, 4), torch.tensor([5, 0, 0]), slice(0, 0)])
def test_some_of_the_rows(rows: slice | Tensor) -> None:
    features = made()
    part = features[rows]
    assert len(part) == len(torch.arange(6)[rows])
    for name in ("embeddings", "logits", "labels", "ids"):
        assert torch.equal(getattr(part, name), getattr(features, name)[rows])
    assert torch.equal(part.layers["map"], features.layers["map"][rows])
    assert part.head is features.head


def test_batches_put_together() -> None:
    whole = Features.cat([made(4, 1), made(3, 2)])
    assert whole.ids.tolist() == [10, 11, 12, 13, 20, 21, 22]
    assert torch.equal(whole.embeddings, torch.cat([made(4, 1).embeddings, made(3, 2).embeddings]))
    assert whole.layers["map"].shape == (7, 2, 3, 5)
    assert whole.head is not None
    bare = Features(embeddings=random(2, 4))
    mixed = Features.cat([made(4), bare])
    assert mixed.labels is None
    assert mixed.layers == {}
    with pytest.raises(DataError, match="no batches"):
        Features.cat([])


@pytest.mark.parametrize(
    ("pool", "width"), [("mean", 2), ("max", 2), ("flatten", 30)], ids=["mean", "max", "flatten"]
)
def test_a_layer_as_embeddings(pool: Any, width: int) -> None:
    features = made()
    pooled = features.at("map", pool)
    map_ = features.layers["map"].numpy()
    expected = {
        "mean": map_.mean((2, 3)),
        "max": map_.max((2, 3)),
        "flatten": map_.reshape(len(map_), -1),
    }[pool]
    assert pooled.embeddings.shape == (6, width)
    np.testing.assert_allclose(pooled.embeddings, expected, rtol=1e-12)
    assert torch.equal(pooled.logits, features.logits)
    assert pooled.head is None


def test_layers_of_any_shape_and_type() -> None:
    layers = {
        "half": torch.full((2, 1, 50, 50), 100.0, dtype=torch.float16),
        "plain": random(2, 3),
        "number": random(2),
        "tokens": random(2, 3, 4),
    }
    features = Features(layers=layers)
    assert features.at("half").embeddings.tolist() == [[100.0], [100.0]]
    assert features.at("plain", "max").embeddings.tolist() == layers["plain"].tolist()
    assert features.at("number").embeddings.shape == (2, 1)
    assert torch.allclose(features.at("tokens").embeddings, layers["tokens"].mean(2))
    assert all(features.at(name).embeddings.dtype == torch.float64 for name in layers)
    with pytest.raises(DataError, match="no layer 'deep'; there are: half, plain"):
        features.at("deep")
    with pytest.raises(DataError, match="mean, max or flatten, not 'average'"):
        features.at("tokens", "average")


def test_unit_embeddings() -> None:
    features = made()
    normalized = features.normalized()
    assert torch.allclose(normalized.embeddings.norm(dim=1), torch.ones(6, dtype=torch.float64))
    assert torch.equal(normalized.logits, features.logits)
    assert normalized.head is None
    with pytest.raises(DataError, match="embeddings are needed"):
        Features(logits=random(2, 3)).normalized()


def test_double_is_wide_and_changes_nothing_else() -> None:
    half = Features(
        embeddings=random(4, 4).to(torch.bfloat16),
        labels=torch.tensor([0, 1, 2, 0], dtype=torch.uint8),
        layers={"map": random(4, 2).half()},
        head=Head(random(3, 4).half()),
    )
    wide = half.double()
    assert wide.embeddings.dtype == wide.logits.dtype == wide.head.weight.dtype == torch.float64
    assert wide.layers["map"].dtype == torch.float16
    assert wide.labels.dtype == torch.int64
    assert torch.equal(wide.logits.to(half.logits.dtype), half.logits), "logits are kept as given"
    assert half.embeddings.dtype == torch.bfloat16


def test_what_is_wide_already_is_not_copied() -> None:
    features = Features(embeddings=random(4, 4), head=Head(random(3, 4), random(3)))
    assert features.double() is features
    assert features.double().head is features.head
    narrow = Features(embeddings=random(4, 4).float(), head=features.head)
    assert narrow.double().embeddings.dtype == torch.float64


def test_a_head_that_is_owned_does_not_follow_the_model() -> None:
    head = Head(random(3, 4), random(3), scale=2.0)
    owned = head.owned()
    weight, bias = head.weight.clone(), head.bias.clone()
    head.weight.zero_()
    head.bias.zero_()
    assert torch.equal(owned.weight, weight)
    assert torch.equal(owned.bias, bias)
    assert owned.scale == 2.0


def test_detached() -> None:
    rows = random(3, 4).requires_grad_()
    features = Features(embeddings=rows, head=Head(random(2, 4)))
    assert features.logits.requires_grad
    assert not features.detach().logits.requires_grad
    assert not features.detach().embeddings.requires_grad


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "need embeddings, logits or layers"),
        ({"labels": torch.arange(2)}, "need embeddings, logits or layers"),
        ({"embeddings": random(3)}, r"embeddings must be \[3, ...\], not \[3\]"),
        ({"embeddings": random(3, 4), "logits": random(2, 4)}, r"logits must be \[3, ...\]"),
        ({"embeddings": random(3, 4), "labels": torch.arange(2)}, r"labels must be \[3\]"),
        ({"embeddings": random(3, 4), "ids": torch.zeros(3, 1)}, r"ids must be \[3\]"),
        ({"embeddings": random(3, 4), "labels": torch.zeros(3)}, "labels must be integers"),
        ({"embeddings": random(3, 4), "ids": torch.zeros(3).bool()}, "ids must be integers"),
        ({"embeddings": np.zeros((3, 4))}, "must be a torch.Tensor, not ndarray"),
        ({"embeddings": random(3, 4), "labels": [0, 1, 2]}, "must be a torch.Tensor, not list"),
        ({"embeddings": random(3, 5), "head": Head(random(2, 4))}, "5 columns, the head takes 4"),
        ({"embeddings": random(3, 4), "layers": {"a": random(2, 1)}}, "'a' has 2 rows, not 3"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Features(**fields)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("field", ["embeddings", "logits", "layer 'map'"])
def test_numbers_that_are_not_finite_are_named(bad: float, field: str) -> None:
    features = made()
    values = features.layers["map"] if "map" in field else getattr(features, field)
    values[4:, 1] = bad
    with pytest.raises(DataError, match=f"scoring: {field} of row 4 .id 4. are not finite"):
        features.check_finite("scoring")
    assert features[:4].check_finite("scoring") is not None


def test_checks_of_single_values() -> None:
    check_finite(torch.zeros(0, 3), "here")
    with pytest.raises(DataError, match="scores of row 1 are not finite"):
        check_finite(torch.tensor([0.0, float("nan")]), "scores")
    with pytest.raises(DataError, match="logits are needed here"):
        required(None, "logits")
    assert Features(layers={"a": torch.tensor([1, 2])}).check_finite("fitting") is not None
