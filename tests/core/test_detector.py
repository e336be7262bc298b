"""Detectors: composition, fitting in stages and in parts, decisions, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import oodcore
from oodcore import Detector, FeatureModel, Features, Head
from oodcore.data import held_out
from oodcore.errors import ArtifactError, ConfigurationError, DataError, NotFittedError
from oodcore.passes import partial_fit

K, D = 4, 6


def drawn(count: int, seed: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(D, K)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = self.fc(self.body(inputs))
        return output


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


X, Y = drawn(200, 1), torch.arange(200) % K
PROBE = drawn(50, 2)
RECIPES: dict[str, dict[str, Any]] = {
    "energy": {"scorer": "energy"},
    "mahalanobis": {"scorer": "mahalanobis"},
    "knn": {"scorer": {"kind": "knn", "k": 5}},
    "dml": {"scorer": "dml"},
    "react knn": {"scorer": {"kind": "knn", "k": 5}, "shapers": ["react"]},
    "odin": {"scorer": "odin"},
    "zscore": {
        "scorer": {
            "kind": "sum",
            "scorers": ["mahalanobis", {"kind": "knn", "k": 5}],
            "normalize": "zscore",
        },
        "shapers": ["react"],
    },
    "nested": {
        "scorer": {
            "kind": "sum",
            "normalize": "ecdf",
            "weights": [2.0, 1.0],
            "scorers": [
                {"kind": "sum", "scorers": ["dml", "energy"], "normalize": "mean"},
                {"kind": "perturbed", "scorer": "mahalanobis", "epsilon": 0.01},
            ],
        },
    },
}
STREAMED = {name: recipe for name, recipe in RECIPES.items() if name != "nested"}


def naive(net: Net, inputs: Tensor) -> np.ndarray:
    with torch.no_grad():
        return net.body(inputs).double().numpy()


def test_zscore_of_two_behind_react_equals_a_naive_computation(net: Net) -> None:
    score = Detector(net, **RECIPES["zscore"]).fit((X, Y)).score(PROBE)

    train, probe = naive(net, X), naive(net, PROBE)
    apart = held_out(torch.arange(len(X)), 0).numpy()
    clip = np.percentile(train[~apart], 90)
    rest, normal, probe = (np.minimum(h, clip) for h in (train[~apart], train[apart], probe))
    labels = Y.numpy()[~apart]
    means = np.stack([rest[labels == k].mean(0) for k in range(K)])
    inside = rest - means[labels]
    precision = np.linalg.pinv(inside.T @ inside / len(rest), rcond=1e-10, hermitian=True)

    def mahalanobis(rows: np.ndarray) -> np.ndarray:
        gaps = rows[:, None] - means
        return -np.einsum("nkd,de,nke->nk", gaps, precision, gaps).min(1)

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def knn(rows: np.ndarray) -> np.ndarray:
        distances = np.linalg.norm(unit(rows)[:, None] - unit(rest), axis=2)
        return -np.sort(distances, axis=1)[:, 4]

    expected = sum(
        (scorer(probe) - scorer(normal).mean()) / scorer(normal).std()
        for scorer in (mahalanobis, knn)
    )
    np.testing.assert_allclose(score, expected, rtol=1e-9, atol=1e-9)


def test_held_out_rows_are_measured_and_not_fitted_on(net: Net) -> None:
    detector = Detector(net, **RECIPES["zscore"]).fit((X[:150], Y[:150]), X[150:])
    assert detector.learnt is not None
    assert detector.learnt.record["held_out"] == {"rows": 50}
    alone = Detector(net, scorer={"kind": "knn", "k": 5}, shapers=["react"]).fit((X[:150], Y[:150]))
    np.testing.assert_allclose(
        detector.learnt.scorer["mean"][1], alone.score(X[150:]).mean(), rtol=1e-12
    )


@pytest.mark.parametrize("name", RECIPES)
def test_batches_do_not_matter(net: Net, name: str) -> None:
    fitted = Detector(net, **RECIPES[name], batch_size=256).fit((X, Y))
    small = Detector(net, **RECIPES[name], batch_size=7).fit((X, Y))
    scale = np.abs(fitted.score(PROBE)).max()
    np.testing.assert_allclose(small.score(PROBE), fitted.score(PROBE), atol=1e-6 * scale)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(
        fitted.score(PROBE[order]), fitted.score(PROBE)[order.numpy()], atol=1e-6 * scale
    )


@pytest.mark.parametrize("name", STREAMED)
@pytest.mark.parametrize("first", ["fit", "partial_fit"])
def test_partial_fit_equals_fitting_at_once(net: Net, name: str, first: str) -> None:
    whole = Detector(net, **RECIPES[name]).fit((X, Y))
    parts = Detector(net, **RECIPES[name])
    getattr(parts, first)((X[:90], Y[:90])).partial_fit((X[90:130], Y[90:130]))
    parts.partial_fit((X[130:], Y[130:]))
    np.testing.assert_allclose(parts.score(PROBE), whole.score(PROBE), rtol=1e-9, atol=1e-12)


def test_partial_fit_refuses_what_needs_the_inputs_twice(net: Net) -> None:
    with pytest.raises(ConfigurationError, match="one call of fit"):
        Detector(net, **RECIPES["nested"]).partial_fit((X, Y))


def test_refitting_forgets(net: Net) -> None:
    for name, recipe in RECIPES.items():
        fresh = Detector(net, **recipe).fit((X[:100], Y[:100]))
        again = Detector(net, **recipe).fit((X[100:], Y[100:])).fit((X[:100], Y[:100]))
        np.testing.assert_array_equal(again.score(PROBE), fresh.score(PROBE), err_msg=name)


def test_fitting_together_equals_fitting_alone_in_one_pass(net: Net) -> None:
    model = FeatureModel.wrap(net)
    together = {name: Detector(model, **recipe) for name, recipe in STREAMED.items()}
    before = model.rows_seen
    oodcore.fit(together, (X, Y))
    assert model.rows_seen - before == len(X)
    for name, recipe in STREAMED.items():
        alone = Detector(net, **recipe).fit((X, Y))
        np.testing.assert_allclose(
            together[name].score(PROBE), alone.score(PROBE), rtol=1e-12, err_msg=name
        )


def test_going_on_with_one_does_not_touch_those_fitted_with_it(net: Net) -> None:
    together = {name: Detector(net, **recipe) for name, recipe in STREAMED.items()}
    oodcore.fit(together, (X[:150], Y[:150]))
    before = {name: detector.score(PROBE) for name, detector in together.items()}
    together["knn"].partial_fit((X[150:], Y[150:]))
    for name, detector in together.items():
        if name != "knn":
            np.testing.assert_array_equal(detector.score(PROBE), before[name])
    whole = Detector(net, **RECIPES["knn"]).fit((X, Y))
    np.testing.assert_array_equal(together["knn"].score(PROBE), whole.score(PROBE))


def test_nothing_of_the_callers_is_changed(net: Net) -> None:
    model = Net().train()
    state = copy.deepcopy(model.state_dict())
    inputs, labels = X.clone(), Y.clone()
    torch.manual_seed(5)
    random = torch.get_rng_state()
    for recipe in RECIPES.values():
        detector = Detector(model, **recipe).fit((inputs, labels)).calibrate(inputs, 0.1)
        detector.predict(inputs)
    assert torch.equal(inputs, X)
    assert torch.equal(labels, Y)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, row: int) -> tuple[Tensor, int, int]:
        return X[row], int(Y[row]), row


FORMS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "arrays": lambda: (X.numpy(), Y.numpy()),
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=33),
    "data set": Rows,
    "mappings": lambda: [
        {"input": X[a : a + 50], "label": Y[a : a + 50], "id": torch.arange(a, a + 50)}
        for a in range(0, 200, 50)
    ],
    "generator": lambda: ((X[a : a + 50], Y[a : a + 50]) for a in range(0, 200, 50)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_data_gives_the_same(net: Net, form: str) -> None:
    expected = Detector(net, **RECIPES["zscore"]).fit((X, Y)).score(PROBE)
    fitted = Detector(net, **RECIPES["zscore"]).fit(FORMS[form]())
    np.testing.assert_allclose(fitted.score(PROBE), expected, rtol=1e-9)


def test_features_and_arrays_of_embeddings(net: Net) -> None:
    features = FeatureModel.wrap(net)(X)
    labelled = Features(embeddings=features.embeddings, head=features.head, labels=Y)
    expected = Detector(net, scorer="mahalanobis").fit((X, Y)).score(X)
    np.testing.assert_allclose(
        Detector(scorer="mahalanobis").fit(labelled).score(labelled), expected, rtol=1e-9
    )
    arrays = (naive(net, X), Y.numpy())
    np.testing.assert_allclose(
        Detector(scorer="mahalanobis").fit(arrays).score(arrays[0]), expected, rtol=1e-9
    )
    with pytest.raises(DataError, match="logits"):
        Detector(scorer="energy").score(arrays[0])


def test_adapt(net: Net) -> None:
    rows = [{"image": X[a : a + 50], "digit": Y[a : a + 50]} for a in range(0, 200, 50)]
    detector = Detector(net, scorer="mahalanobis", adapt=lambda b: (b["image"], b["digit"]))
    expected = Detector(net, scorer="mahalanobis").fit((X, Y)).score(X)
    np.testing.assert_allclose(detector.fit(rows).score(rows), expected, rtol=1e-9)
    with pytest.raises(DataError, match="adapt"):
        Detector(net, scorer="mahalanobis").fit(rows)


def test_classes_come_from_labels_else_predictions_else_there_is_one(net: Net) -> None:
    def learnt(model: Any, data: Any) -> tuple[str, int]:
        detector = Detector(model, scorer="mahalanobis").fit(data)
        assert detector.learnt is not None
        return detector.learnt.record["labelling"], detector.learnt.record["classes"]

    assert learnt(net, (X, Y)) == ("labels", K)
    assert learnt(net, X) == ("predicted", K)
    assert learnt(None, X) == ("one class", 1)
    assert learnt(None, (X, Y)) == ("labels", K)


@pytest.mark.parametrize("label", [-1, K])
def test_a_label_out_of_range_names_the_row(net: Net, label: int) -> None:
    labels = Y.clone()
    labels[123] = label
    for model in (net, None) if label < 0 else (net,):
        with pytest.raises(DataError, match=rf"row 123 has the label {label}.*select"):
            Detector(model, scorer="mahalanobis", batch_size=50).fit((X, labels))


def test_a_failed_fit_changes_nothing(net: Net) -> None:
    detector = Detector(net, scorer="mahalanobis", batch_size=50).fit((X, Y)).calibrate(X, 0.1)
    before = detector.score(PROBE)
    wrong = Y.clone()
    wrong[150] = 99
    for method in (detector.fit, detector.partial_fit):
        with pytest.raises(DataError):
            method((X, wrong))
        np.testing.assert_array_equal(detector.score(PROBE), before)
        assert detector.calibration is not None
    whole = Detector(net, scorer="mahalanobis").fit((torch.cat([X, X]), torch.cat([Y, Y])))
    np.testing.assert_allclose(detector.partial_fit((X, Y)).score(PROBE), whole.score(PROBE))


def test_numbers_that_are_not_finite_name_stage_and_row(net: Net) -> None:
    bad = PROBE.clone()
    bad[17, 3] = float("nan")
    detector = Detector(net, scorer="energy")
    with pytest.raises(DataError, match=r"features.*row 17"):
        detector.score(bad)
    with pytest.raises(DataError, match="row 17"):
        Detector(net, scorer="mahalanobis").fit(bad)

    class Broken(oodcore.Scorer):
        kind = "broken"

        def needs(self) -> frozenset[str]:
            return frozenset({"logits"})

        def score(self, features: Features, state: Any) -> Tensor:
            scores = features.logits[:, 0].clone()
            scores[2] = float("inf")
            return scores

    with pytest.raises(DataError, match=r"scorer 'broken'.*row 2"):
        Detector(net, scorer=Broken()).score(PROBE)


def test_decisions_come_from_calibration(net: Net) -> None:
    detector = Detector(net, scorer="energy")
    with pytest.raises(NotFittedError, match="calibrate"):
        detector.predict(PROBE)
    normal = X[:99]
    detector.calibrate(normal, false_alarm_rate=0.1)
    scores, known = detector.score(PROBE), detector.score(normal)
    expected = (1 + (known[None] <= scores[:, None]).sum(1)) / 100
    np.testing.assert_array_equal(detector.p_value(PROBE), expected)
    np.testing.assert_array_equal(detector.predict(PROBE), np.where(expected <= 0.1, -1, 1))
    np.testing.assert_array_equal(
        detector.predict(PROBE, false_alarm_rate=0.3), np.where(expected <= 0.3, -1, 1)
    )
    assert detector.predict(PROBE).dtype == np.int64
    assert set(np.unique(detector.predict(PROBE, fdr=0.2))) <= {-1, 1}
    with pytest.raises(ConfigurationError, match="either"):
        detector.predict(PROBE, 0.1, fdr=0.1)
    with pytest.raises(ConfigurationError, match="19"):
        detector.calibrate(X[:18], 0.05)
    assert len(detector.calibration or ()) == 99
    detector.fit((X, Y))
    with pytest.raises(NotFittedError):
        detector.p_value(PROBE)


def test_unfitted(net: Net) -> None:
    for name in ("mahalanobis", "dml"):
        with pytest.raises(NotFittedError, match="fit first"):
            Detector(net, scorer=name).score(PROBE)
    assert len(Detector(net, scorer="msp").score(PROBE)) == 50


def test_no_rows(net: Net) -> None:
    assert Detector(net, scorer="msp").score(PROBE[:0]).shape == (0,)
    with pytest.raises(DataError, match="no row"):
        Detector(net, scorer="knn").fit(PROBE[:0])


def test_too_few_rows_to_hold_some_out(net: Net) -> None:
    scorer = {"kind": "sum", "scorers": ["energy"], "normalize": "zscore"}
    with pytest.raises(DataError, match="held_out="):
        Detector(net, scorer=scorer).fit(X[:2])


def test_features_of_another_kind_are_refused(net: Net) -> None:
    detector = Detector(scorer={"kind": "knn", "k": 2}).fit(X)
    with pytest.raises(DataError, match="7 columns.*8"):
        detector.score(X[:, :7])


def test_inputs_are_read_twice_only_for_what_passes_through_the_model_again(net: Net) -> None:
    def once() -> Iterator[Any]:
        yield X, Y

    with pytest.raises(DataError, match="twice"):
        Detector(net, **RECIPES["nested"]).fit(once())
    with pytest.raises(DataError, match="inputs"):
        Detector(scorer="odin").score(FeatureModel.wrap(net)(X))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scorer": "enrgy"}, "did you mean 'energy'"),
        ({"scorer": {"kind": "knn", "k": 0}}, r"scorer\.k"),
        ({"scorer": {"kind": "knn", "kk": 3}}, "unknown field"),
        ({"scorer": "energy", "shapers": "react"}, "list"),
        ({"scorer": "energy", "shapers": ["energy"]}, "unknown shaper"),
        ({"scorer": "sum"}, "combines nothing"),
        ({"scorer": {"kind": "perturbed", "scorer": "odin"}}, "no gradient"),
        ({"scorer": "energy", "batch_size": 0}, "batch_size"),
        ({"scorer": "energy", "device": "cuda"}, "move it there yourself"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    net: Net, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Detector(net, **arguments)


def test_from_config(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "detector.yaml"
    path.write_text(
        "extractor: {kind: torch, factory: 'oodcore_plugins.networks:mlp', "
        "arguments: {inputs: 8, classes: 4}}\nscorer: {kind: knn, k: 3}\nbatch_size: 16\n"
    )
    detector = Detector.from_config(path)
    assert detector.batch_size == 16
    assert detector.fit((X, Y)).score(PROBE).shape == (50,)
    path.write_text("scorer: {kind: knn,\n  kay: 3}\n")
    with pytest.raises(ConfigurationError, match=r"detector\.yaml:2: scorer\.kay"):
        Detector.from_config(path)


def test_odin_of_a_head_given_apart() -> None:
    body = nn.Sequential(nn.Linear(8, D), nn.ReLU())
    head = Head(torch.randn(K, D, generator=torch.Generator().manual_seed(0)))
    detector = Detector(FeatureModel.wrap(body, head=head), scorer="odin")
    assert detector.score(PROBE).shape == (50,)


def test_weights_that_changed_are_not_claimed(tmp_path: Path) -> None:
    for prepare in (
        lambda model: Detector(model, scorer="mahalanobis").fit((X, Y)),
        lambda model: Detector(model, scorer="mahalanobis").partial_fit((X, Y)),
        lambda model: Detector(model, scorer="energy").calibrate(X, 0.1),
    ):
        model = Net().eval()
        detector = prepare(model)
        before = detector.save(tmp_path / "a", overwrite=True)
        with torch.no_grad():
            model.fc.weight.add_(1)
        with pytest.raises(NotFittedError, match="weights are not those"):
            detector.save(tmp_path / "b")
        with pytest.raises(ArtifactError, match="other weights"):
            oodcore.load(before, model=model)
        detector.fit((X, Y)).save(tmp_path / "b", overwrite=True)
        oodcore.load(tmp_path / "b", model=model)


def test_an_artifact_stays_bound_to_its_model_when_it_is_saved_without_it(
    net: Net, tmp_path: Path
) -> None:
    Detector(net, scorer="mahalanobis").fit((X, Y)).save(tmp_path / "a")
    oodcore.load(tmp_path / "a").save(tmp_path / "b")
    other = Net()
    with torch.no_grad():
        other.fc.bias.add_(1)
    with pytest.raises(ArtifactError, match="other weights"):
        oodcore.load(tmp_path / "b", model=other)
    oodcore.load(tmp_path / "b", model=net)


def test_a_store_that_was_not_loaded_is_not_saved(net: Net, tmp_path: Path) -> None:
    Detector(net, scorer="mahalanobis").fit((X, Y)).save(tmp_path / "a")
    with pytest.raises(NotFittedError, match="loaded without its store"):
        oodcore.load(tmp_path / "a").save(tmp_path / "b", store=True)
    Detector(net, scorer="energy").save(tmp_path / "c", store=True)


def test_numbers_of_numpy_are_numbers(net: Net, tmp_path: Path) -> None:
    recipe = RECIPES["zscore"]
    given = Detector(net, **recipe, seed=np.int64(3), batch_size=np.int32(64)).fit((X, Y))
    plain = Detector(net, **recipe, seed=3, batch_size=64).fit((X, Y))
    np.testing.assert_array_equal(given.score(PROBE), plain.score(PROBE))
    oodcore.load(given.save(tmp_path / "a"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 2.5}, "batch_size must be a whole number"),
        ({"seed": "0"}, "seed must be a whole number"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"device": "warp"}, "device is 'auto' or as torch names it"),
    ],
)
def test_settings_are_checked(net: Net, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Detector(net, scorer="energy", **arguments)


def test_held_out_rows_pass_the_model_only_where_they_are_wanted(net: Net) -> None:
    model = FeatureModel.wrap(net)
    for name, extra in {"mahalanobis": 0, "dml": 0, "react knn": 0, "zscore": 40}.items():
        before = model.rows_seen
        Detector(model, **RECIPES[name]).fit((X, Y), X[:40])
        assert model.rows_seen - before == 200 + extra, name


class Reading(oodcore.Scorer):
    """Reads a layer, in the type that the model gives it."""

    kind = "reading"

    def needs(self) -> frozenset[str]:
        return frozenset({"layers.body.0"})

    def measure(self, features: Features, state: Any) -> Tensor:
        return features.layers["body.0"].mean(dim=1, keepdim=True)

    def finish(self, state: Any, rows: Tensor, labels: Tensor | None) -> Any:
        return {"weight": torch.ones(D, dtype=torch.float32), "mean": rows.mean(0)}

    def score(self, features: Features, state: Any) -> Tensor:
        product: Tensor = features.layers["body.0"] @ state["weight"] - state["mean"]
        return product.double()


class ReadingPlugin:
    @oodcore.hookimpl
    def register_scorers(self, register: Any) -> None:
        register(Reading)


def test_layers_keep_their_type_and_are_those_of_who_needs_them(net: Net, tmp_path: Path) -> None:
    with oodcore.registry.using(ReadingPlugin()):
        model = FeatureModel.wrap(net)
        together = {
            "knn": Detector(model, **RECIPES["react knn"]),
            "reading": Detector(model, scorer="reading"),
        }
        oodcore.fit(together, (X[:150], Y[:150]))
        assert together["knn"].model is model
        for name, detector in together.items():
            kept = oodcore.load(detector.save(tmp_path / name, store=True), model=net)
            for one in (kept, detector):
                one.partial_fit((X[150:], Y[150:]))
            np.testing.assert_array_equal(kept.score(PROBE), detector.score(PROBE))
        whole = Detector(net, scorer="reading").fit((X, Y))
        np.testing.assert_allclose(together["reading"].score(PROBE), whole.score(PROBE), rtol=1e-6)


def test_going_on_alone_leaves_behind_what_others_collect(net: Net) -> None:
    together = {name: Detector(net, **STREAMED[name]) for name in ("mahalanobis", "knn")}
    oodcore.fit(together, (X, Y))
    alone = together["mahalanobis"].partial_fit((X, Y)).fitting
    assert alone is not None
    kinds = {s.kind for store in alone.stores.values() for s in store.statistics}
    assert kinds == {"class_moments"}


def test_many_go_on_in_one_pass(net: Net) -> None:
    model = FeatureModel.wrap(net)
    together = {name: Detector(model, **recipe) for name, recipe in STREAMED.items()}
    oodcore.fit(together, (X[:90], Y[:90]))
    before = model.rows_seen
    partial_fit(together, (batch for batch in [(X[90:], Y[90:])]))
    assert model.rows_seen - before == 110
    for name, recipe in STREAMED.items():
        whole = Detector(net, **recipe).fit((X, Y))
        np.testing.assert_allclose(
            together[name].score(PROBE), whole.score(PROBE), rtol=1e-9, err_msg=name
        )


def test_an_encoder_learns_how_many_classes_there_are_from_whole_arrays(net: Net) -> None:
    encoder = FeatureModel.wrap(net.body, head=None)
    expected = Detector(net, scorer="mahalanobis").fit((X, Y)).score(PROBE)
    given = Detector(encoder, scorer="mahalanobis").fit((X, Y))
    np.testing.assert_allclose(given.score(PROBE), expected, rtol=1e-9)


def test_numbers_that_can_hardly_be_classes_are_refused() -> None:
    labels = Y.clone()
    labels[7] = 10**9
    with pytest.raises(ConfigurationError, match=r"largest label of 200 rows is 1000000000"):
        Detector(scorer="mahalanobis").fit((X, labels))
    labels[7] = 999
    Detector(scorer="mahalanobis").fit((X, labels))


@pytest.mark.parametrize("name", ["mahalanobis", "react knn", "zscore", "odin"])
def test_in_a_callers_inference_mode(net: Net, name: str) -> None:
    expected = Detector(net, **RECIPES[name]).fit((X, Y)).score(PROBE)
    with torch.inference_mode():
        detector = Detector(net, **RECIPES[name]).fit((X, Y))
        np.testing.assert_array_equal(detector.score(PROBE), expected)
    np.testing.assert_array_equal(detector.score(PROBE), expected)


def test_features_without_columns(net: Net) -> None:
    with pytest.raises(DataError, match="embeddings have no columns"):
        Detector(scorer="mahalanobis").fit(np.zeros((9, 0)))
    with pytest.raises(DataError, match="logits have no columns"):
        Detector(scorer="msp").score(Features(logits=torch.zeros(9, 0)))


def test_copies_and_pickles_go_on_apart(net: Net) -> None:
    detector = Detector(net, **RECIPES["zscore"]).fit((X[:150], Y[:150]))
    expected = detector.score(PROBE)
    for twin in (copy.deepcopy(detector), pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(twin.score(PROBE), expected)
        twin.partial_fit((X[150:], Y[150:]))
        np.testing.assert_array_equal(detector.score(PROBE), expected)


def test_nothing_to_fit_on_is_said_in_words() -> None:
    with pytest.raises(DataError, match="no rows to fit on: give in-distribution ones"):
        Detector(scorer="mahalanobis").fit(None)
    known = {"kind": "digits", "classes": [0, 1], "split": "test"}
    with pytest.raises(DataError, match="no rows to fit on.*'train'"):
        oodcore.benchmark(
            nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
            train=None,
            id_test=known,
            ood={"noise": {"kind": "noise", "shape": [1, 8, 8], "rows": 20}},
            scorers=["knn"],
        )
