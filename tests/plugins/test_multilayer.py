"""at_layer and multilayer: the same as a score fitted on the activations by themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from oodcore import Detector, Features, load, registry
from oodcore.errors import ConfigurationError, DataError

GENERATOR = np.random.default_rng(0)
LABELS = torch.tensor(GENERATOR.integers(0, 3, 80))


def features(count: int, seed: int, labels: Tensor | None = None, shift: float = 0.0) -> Features:
    generator = np.random.default_rng(seed)
    means = np.zeros(count) if labels is None else labels.numpy()
    one = generator.normal(size=(count, 4, 2, 3)) + means[:, None, None, None] + shift
    two = generator.normal(size=(count, 5)) - means[:, None]
    return Features(
        embeddings=torch.tensor(generator.normal(size=(count, 3))),
        logits=torch.tensor(generator.normal(size=(count, 3))),
        labels=labels,
        layers={"one": torch.tensor(one), "two": torch.tensor(two)},
    )


TRAIN, HELD, ASKED = features(80, 1, LABELS), features(30, 2), features(12, 3, shift=1.0)
POOLS = {"mean": lambda a: a.mean(axis=(2, 3)), "flatten": lambda a: a.reshape(len(a), -1)}
POOLS["max"] = lambda a: a.max(axis=(2, 3))


def alone(given: Features, layer: str, pool: str) -> Features:
    rows = given.layers[layer].numpy()
    rows = POOLS[pool](rows) if rows.ndim > 2 else rows
    return Features(embeddings=torch.tensor(rows), logits=given.logits, labels=given.labels)


def scores(scorer, layer, pool, asked=ASKED) -> np.ndarray:
    detector = Detector(scorer=scorer).fit(alone(TRAIN, layer, pool))
    return detector.score(alone(asked, layer, pool))


INNER = [
    "mahalanobis",
    "max_norm",
    {"kind": "knn", "k": 3},
    {"kind": "knn", "k": 2, "normalize": False},
    {"kind": "relative_mahalanobis", "normalize": True},
    {"kind": "ssd", "clusters": 2},
    "relation",
    {"kind": "sum", "scorers": ["mahalanobis", {"kind": "knn", "k": 3}]},
]


@pytest.mark.parametrize("scorer", INNER, ids=str)
@pytest.mark.parametrize(("layer", "pool"), [("one", "mean"), ("one", "flatten"), ("two", "max")])
def test_a_score_at_a_layer_is_that_of_the_activations_alone(scorer, layer, pool):
    at_layer = {"kind": "at_layer", "layer": layer, "scorer": scorer, "pool": pool}
    given = Detector(scorer=at_layer).fit(TRAIN).score(ASKED)
    np.testing.assert_allclose(given, scores(scorer, layer, pool), rtol=1e-9)


@pytest.mark.parametrize("pool", ["mean", "max"])
@pytest.mark.parametrize("scorer", ["mahalanobis", {"kind": "knn", "k": 3}])
def test_several_layers_are_normalised_on_held_out_rows(scorer, pool):
    wanted = np.zeros(len(ASKED))
    for layer, weight in (("one", 1.0), ("two", 2.0)):
        held = scores(scorer, layer, pool, HELD)
        wanted += weight * (scores(scorer, layer, pool) - held.mean()) / held.std()
    multilayer = {
        "kind": "multilayer",
        "layers": ["one", "two"],
        "scorer": scorer,
        "pool": pool,
        "combination": {"kind": "sum", "normalize": "zscore", "weights": [1, 2]},
    }
    given = Detector(scorer=multilayer).fit(TRAIN, HELD).score(ASKED)
    np.testing.assert_allclose(given, wanted, rtol=1e-9)


@pytest.mark.parametrize("kind", ["sum", "product", "minimum", "maximum", "fisher", "simes"])
@pytest.mark.parametrize("normalize", [None, "none", "mean", "ecdf"])
def test_is_short_for_a_combination_of_layers(kind, normalize):
    if normalize != "ecdf" and normalize is not None and kind in ("fisher", "simes"):
        return
    combination = {"kind": kind} if normalize is None else {"kind": kind, "normalize": normalize}
    parts = [
        {"kind": "at_layer", "layer": name, "scorer": "mahalanobis"} for name in ("two", "one")
    ]
    long = Detector(scorer={**combination, "scorers": parts}).fit(TRAIN, HELD)
    multilayer = {"kind": "multilayer", "layers": ["two", "one"], "combination": combination}
    short = Detector(scorer=multilayer).fit(TRAIN, HELD)
    np.testing.assert_array_equal(short.score(ASKED), long.score(ASKED))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.fc = nn.Conv2d(1, 4, 2), nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.fc(self.conv(inputs).relu().mean(dim=(2, 3))).relu()
        logits: Tensor = self.head(hidden)
        return logits


IMAGES = torch.randn(90, 1, 3, 3, generator=torch.Generator().manual_seed(1))


def test_of_a_model_fitted_in_parts_saved_and_loaded(tmp_path):
    scorer = {"kind": "multilayer", "layers": ["conv", "fc"]}
    labels = torch.arange(90) % 3
    model = Deep()
    whole = Detector(model, scorer=scorer).fit((IMAGES, labels))
    parts = Detector(model, scorer=scorer).partial_fit((IMAGES[:50], labels[:50]))
    parts.save(tmp_path / "detector", store=True)
    parts = load(tmp_path / "detector", model=model).partial_fit((IMAGES[50:], labels[50:]))
    np.testing.assert_allclose(parts.score(IMAGES), whole.score(IMAGES), rtol=1e-6)
    assert parts.scorer == registry.build("scorer", scorer)


def test_the_input_can_be_moved_along_it():
    scorer = {"kind": "multilayer", "layers": ["conv", "fc"]}
    model = Deep().double()
    images, labels = IMAGES.double(), torch.arange(90) % 3
    plain = Detector(model, scorer=scorer).fit((images, labels)).score(images)
    moved = {"kind": "perturbed", "scorer": scorer, "epsilon": 1e-5}
    raised = Detector(model, scorer=moved).fit((images, labels)).score(images)
    assert (raised > plain).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": []}, "layers"),
        ({"layers": ["a", "a"]}, "twice"),
        ({"layers": ["a"], "scorer": "vim"}, "measured once it is fitted"),
        ({"layers": ["a"], "scorer": "fdbd"}, "needs head"),
        ({"layers": ["a"], "scorer": {"kind": "reweighted", "scorer": "odin"}}, "needs inputs"),
        ({"layers": ["a"], "combination": "msp"}, "'msp' is not a combination"),
        ({"layers": ["a"], "combination": {"kind": "sum", "scorers": ["msp"]}}, "without scorers"),
        ({"layers": ["a"], "combination": {"kind": "sum", "weights": [1, 2]}}, "2 weights for 1"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        Detector(scorer={"kind": "multilayer", **fields})


def test_a_layer_that_is_not_there():
    with pytest.raises(ConfigurationError, match="no layer 'conv2'; did you mean 'conv'"):
        Detector(Deep(), scorer={"kind": "at_layer", "layer": "conv2"}).fit((IMAGES, LABELS[:90]))
    with pytest.raises(DataError, match=r"layers\.three"):
        Detector(scorer={"kind": "at_layer", "layer": "three"}).fit(TRAIN)
