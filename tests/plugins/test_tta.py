"""tta: features of crops and mirror images, averaged."""

from __future__ import annotations

import pytest
import torch
from extractor_models import Network, images, spec
from pydantic import ValidationError

import oodcore
from oodcore import Detector, FeatureModel
from oodcore.errors import ArtifactError, ConfigurationError, DataError
from oodcore.preprocess import Preprocess
from oodcore_plugins.tta import TTA, AveragedViews


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def naive_views(x, views, size):
    """The views of images, cut out one after another."""
    height, width = x.shape[2:]
    if views == "flips":
        return [x, torch.flip(x, [3])]
    corners = [(0, 0), (0, width - size), (height - size, 0), (height - size, width - size)]
    corners.append((round((height - size) / 2), round((width - size) / 2)))
    crops = [x[:, :, i : i + size, j : j + size] for i, j in corners]
    mirrored = [torch.flip(crop, [3]) for crop in crops]
    return crops if views == "five_crop" else crops + mirrored


@pytest.mark.parametrize(("views", "size"), [("flips", None), ("five_crop", 5), ("ten_crop", 6)])
def test_it_is_the_mean_over_views(views, size):
    module, x = Network().eval(), images(4)
    model = AveragedViews(FeatureModel.wrap(module, layers=["hidden", "bn"]), views, size)
    features = model(x)
    seen = naive_views(x, views, size)
    plain = [FeatureModel.wrap(module, layers=["hidden", "bn"])(view) for view in seen]
    for name in ("embeddings", "logits"):
        mean = torch.stack([getattr(one, name) for one in plain]).mean(0)
        torch.testing.assert_close(getattr(features, name), mean)
    assert set(features.layers) == {"hidden", "bn"}
    for name, value in features.layers.items():
        torch.testing.assert_close(value, torch.stack([o.layers[name] for o in plain]).mean(0))
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    assert model.rows_seen == 4 * len(seen)
    assert torch.equal(features.inputs, x)


def test_a_cosine_head_makes_other_logits_of_the_mean_embeddings():
    model = AveragedViews(FeatureModel.wrap(Network(cosine=True)), "flips")
    x = images(4)
    features = model(x)
    expected = (model.model(x).logits + model.model(x.flip(3)).logits) / 2
    torch.testing.assert_close(features.logits, expected)
    assert not torch.allclose(features.head(features.embeddings), features.logits, atol=1e-3)


def test_views_are_cut_out_of_what_the_inner_preprocessing_made():
    prepared = Preprocess(size=12, mean=(0.5,) * 3)
    inner = spec() | {"preprocess": {"size": 12, "mean": [0.5, 0.5, 0.5]}}
    extractor = oodcore.registry.build(
        "extractor", {"kind": "tta", "extractor": inner, "views": "five_crop", "size": 7}
    )
    features = extractor.load()(images(3))
    network = FeatureModel.wrap(Network())
    seen = naive_views(prepared(images(3)), "five_crop", 7)
    expected = torch.stack([network(view).logits for view in seen]).mean(0)
    torch.testing.assert_close(features.logits, expected)
    torch.testing.assert_close(features.inputs, prepared(images(3)))


def test_rerun_is_the_same_road_and_differentiable():
    model = AveragedViews(FeatureModel.wrap(Network()), "ten_crop", 5)
    features = model(images(2))
    leaf = features.inputs.clone().requires_grad_()
    again = features.rerun(leaf)
    torch.testing.assert_close(again.logits, features.logits)
    (gradient,) = torch.autograd.grad(again.logits.sum(), leaf)
    assert bool((gradient != 0).any())
    step = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    moved = features.rerun(features.inputs + step).logits.sum() - again.logits.sum()
    torch.testing.assert_close(moved.detach(), (gradient * step).sum(), rtol=0.05, atol=1e-4)
    edited = features.rerun(features.inputs, edit={"hidden": torch.zeros_like})
    torch.testing.assert_close(edited.logits, model.model.module.fc.bias.detach().expand(2, -1))


@pytest.mark.parametrize("scorer", ["msp", "odin", {"kind": "knn", "k": 2}, "vim"])
def test_it_composes_and_lives_in_an_artifact(tmp_path, scorer):
    extractor = {"kind": "tta", "extractor": spec(), "views": "five_crop", "size": 6}
    detector = Detector(extractor, scorer=scorer, shapers=["react"])
    x, labels = images(30), torch.arange(30) % 3
    detector.fit((x, labels)).calibrate(images(40, seed=1), 0.1)
    scores = detector.score(images(9, seed=2))
    detector.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match="runs extractor_models:network"):
        oodcore.load(tmp_path / "a")
    again = oodcore.load(tmp_path / "a", allow=["extractor_models:network"])
    assert again.extractor == detector.extractor
    torch.testing.assert_close(
        torch.tensor(again.score(images(9, seed=2))), torch.tensor(scores), rtol=1e-6, atol=1e-9
    )
    alone = [float(again.score(images(9, seed=2)[i : i + 1])[0]) for i in range(9)]
    torch.testing.assert_close(torch.tensor(alone, dtype=torch.float64), torch.tensor(scores),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


def test_fingerprints_cover_views_and_weights():
    network = Network()
    prints = {
        AveragedViews(FeatureModel.wrap(module), *views).fingerprint()
        for module in (network, Network(seed=1))
        for views in (("flips",), ("five_crop", 5), ("five_crop", 6), ("ten_crop", 5))
    }
    prints.add(FeatureModel.wrap(network).fingerprint())
    assert len(prints) == 9
    model = AveragedViews(FeatureModel.wrap(network), "flips")
    assert model.with_layers(["conv"]).fingerprint() == model.fingerprint()
    assert model.with_layers(["conv"]).identity() == model.identity()
    assert model.with_layers(["conv"]).layers == ("conv",)
    assert model.layers == ()


def test_detectors_on_one_model_share_its_passes():
    model = AveragedViews(FeatureModel.wrap(Network()), "flips")
    pair = {"a": Detector(model, scorer="msp"), "b": Detector(model, scorer="energy")}
    pair["c"] = Detector(model.with_layers(["conv"]), scorer="max_logit")
    oodcore.fit(pair, images(10))
    from oodcore.passes import score

    before = model.rows_seen
    score(pair, images(6))
    assert model.rows_seen - before == 12


def test_code_is_that_of_the_extractor_inside():
    extractor = TTA.model_validate({"extractor": spec()})
    assert extractor.code() == ("extractor_models:network",)
    assert TTA.model_validate(extractor.dump()) == extractor


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"views": "five_crop"}, "'five_crop' needs a size, in pixels"),
        ({"size": 5}, "'flips' takes no size"),
        ({"preprocess": {"size": 8}}, "leave it out here"),
        ({"views": "six_crop"}, "five_crop"),
        ({"extractor": "tensorflow"}, "unknown extractor 'tensorflow'"),
        ({"size": 0, "views": "ten_crop"}, "greater than 0"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_said(fields, message):
    with pytest.raises(ValidationError, match=message):
        TTA.model_validate({"extractor": spec()} | fields)


def test_a_yaml_file_says_where_it_is_wrong(tmp_path):
    (tmp_path / "detector.yaml").write_text(
        "scorer: msp\nextractor:\n  kind: tta\n  extractor:\n    kind: torch\n"
        "    factory: extractor_models:network\n    wieghts: x\n"
    )
    with pytest.raises(ConfigurationError, match=r"detector.yaml:7: extractor.extractor.wieghts"):
        Detector.from_config(tmp_path / "detector.yaml")


def test_what_is_wrong_with_inputs_is_said():
    model = AveragedViews(FeatureModel.wrap(Network()), "five_crop", 9)
    with pytest.raises(DataError, match="crop of 9 pixels does not fit into images of 8 x 10"):
        model(images(2))
    with pytest.raises(DataError, match=r"views are of images \[N, C, H, W\], not \[2, 3\]"):
        model(torch.zeros(2, 3))
    with pytest.raises(DataError, match="not list"):
        model(["text"])
    with pytest.raises(DataError, match=r"Network fails on inputs \[2, 1, 9, 9\]") as error:
        model(torch.zeros(2, 1, 12, 12))
    assert isinstance(error.value.__cause__, RuntimeError)
    with pytest.raises(ConfigurationError, match="needs a size"):
        AveragedViews(FeatureModel.wrap(Network()), "ten_crop")
    with pytest.raises(ConfigurationError, match="no layer 'cnv'"):
        model.with_layers(["cnv"])
