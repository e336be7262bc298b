"""arrays: stored features as a model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.utils.data import Dataset

import oodcore
from oodcore import Detector, Features, Head
from oodcore.errors import ConfigurationError, DataError
from oodcore_plugins.arrays import Arrays, StoredFeatures

ROWS, WIDTH, CLASSES = 40, 5, 3


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


HEAD = Head(drawn(CLASSES, WIDTH, seed=1), drawn(CLASSES, seed=2))
LABELS = torch.arange(ROWS) % CLASSES


@pytest.fixture
def head_file(tmp_path):
    path = tmp_path / "net.safetensors"
    save_file({"fc.weight": HEAD.weight, "fc.bias": HEAD.bias, "body.weight": torch.ones(2)}, path)
    return {"head": str(path), "weight": "fc.weight", "bias": "fc.bias"}


def test_one_array_is_embeddings_or_logits(head_file):
    h = drawn(ROWS, WIDTH)
    model = Arrays().load()
    features = model(h)
    assert features.embeddings is h
    assert features.logits is None
    assert model.gives == {"embeddings", "inputs"}
    model = Arrays.model_validate(head_file).load()
    features = model(h.numpy())
    torch.testing.assert_close(features.logits, h @ HEAD.weight.T + HEAD.bias)
    assert model.gives == {"embeddings", "logits", "head", "inputs"}
    assert model.rows_seen == ROWS
    logits = Arrays(embeddings=None, logits="logits").load()
    assert logits(h).logits is h
    assert logits(h).embeddings is None
    assert logits.gives == {"logits", "inputs"}


def test_stored_logits_are_kept_as_given(head_file):
    rows = {"h": drawn(ROWS, WIDTH), "z": drawn(ROWS, CLASSES, seed=3), "conv": drawn(ROWS, 2, 4)}
    extractor = Arrays.model_validate(
        head_file | {"embeddings": "h", "logits": "z", "layers": ["conv"]}
    )
    features = extractor.load()(rows)
    assert torch.equal(features.logits, rows["z"])
    assert torch.equal(features.layers["conv"], rows["conv"])
    shaped = features.with_embeddings(features.embeddings)
    torch.testing.assert_close(shaped.logits, HEAD(rows["h"]))


def test_a_cosine_head(head_file):
    fields = head_file | {"normalize_weight": True, "normalize_features": True, "scale": 4}
    h = drawn(ROWS, WIDTH)
    expected = Head(HEAD.weight, HEAD.bias, True, True, 4.0)(h)
    torch.testing.assert_close(Arrays.model_validate(fields).load()(h).logits, expected)
    bare = Arrays.model_validate(head_file | {"bias": None}).load()
    torch.testing.assert_close(bare(h).logits, h @ HEAD.weight.T)


@pytest.mark.parametrize(
    ("scorer", "shapers"),
    [("msp", ["react"]), ({"kind": "knn", "k": 2}, []), ("vim", []), ("odin", [])],
)
def test_a_detector_on_it_is_one_on_features(tmp_path, head_file, scorer, shapers):
    h, tested = drawn(ROWS, WIDTH).abs(), drawn(7, WIDTH, seed=5).abs()
    detector = Detector({"kind": "arrays", **head_file}, scorer=scorer, shapers=shapers)
    detector.fit((h, LABELS)).calibrate(drawn(30, WIDTH, seed=6).abs(), 0.1)
    scores = detector.score(tested)
    if scorer != "odin":
        plain = Detector(scorer=scorer, shapers=shapers)
        plain.fit(Features(embeddings=h, labels=LABELS, head=HEAD))
        expected = plain.score(Features(embeddings=tested, head=HEAD))
        np.testing.assert_allclose(scores, expected, rtol=1e-9)
    else:  # the step is taken in the stored numbers
        leaf = tested.clone().requires_grad_()
        (HEAD(leaf) / 1000).log_softmax(1).amax(1).sum().backward()
        moved = HEAD(tested + 0.0014 * leaf.grad.sign())
        np.testing.assert_allclose(scores, (moved / 1000).softmax(1).amax(1), rtol=1e-9)
    detector.save(tmp_path / "a")
    again = oodcore.load(tmp_path / "a")  # nothing is run, so nothing is to be allowed
    np.testing.assert_allclose(again.score(tested), scores, rtol=1e-9)


def test_a_configuration_works_on_stored_features(tmp_path, head_file):
    np.savez(tmp_path / "train.npz", x=drawn(ROWS, WIDTH).numpy(), y=LABELS.numpy())
    (tmp_path / "detector.yaml").write_text(
        f"extractor:\n  kind: arrays\n  head: {head_file['head']}\n  weight: fc.weight\n"
        "  bias: fc.bias\n"
        f"scorer: energy\ntrain: {{kind: npz, path: {tmp_path / 'train.npz'}, layout: plain}}\n"
    )
    detector = Detector.from_config(tmp_path / "detector.yaml")
    source = {"kind": "npz", "path": str(tmp_path / "train.npz"), "layout": "plain"}
    expected = HEAD(drawn(ROWS, WIDTH)).logsumexp(1)
    np.testing.assert_allclose(detector.fit(source).score(source), expected, rtol=1e-5)


def test_columns_of_an_archive(tmp_path):
    h, z = drawn(ROWS, WIDTH).numpy(), drawn(ROWS, CLASSES, seed=3).numpy()
    np.savez(tmp_path / "stored.npz", h=h, z=z, y=LABELS.numpy())
    source = {"kind": "npz", "path": str(tmp_path / "stored.npz"), "inputs": ["h", "z"]}
    model = {"kind": "arrays", "embeddings": "h", "logits": "z"}
    logits = Detector(model, scorer="max_logit").fit(source).score(source)
    np.testing.assert_allclose(logits, z.max(1), rtol=1e-6)
    near = Detector(model, scorer={"kind": "knn", "k": 1}).fit(source).score(source)
    expected = Detector(scorer={"kind": "knn", "k": 1}).fit(h).score(h)
    np.testing.assert_allclose(near, expected, atol=1e-6)


def test_the_labels_of_an_archive_tell_the_classes(tmp_path):
    # A configuration has no other place to say how many there are.
    rows, labels = np.random.default_rng(0).normal(size=(40, 5)), np.arange(40) % 3
    np.savez(tmp_path / "x.npz", x=rows, y=labels)
    config = {
        "extractor": {"kind": "arrays"},
        "scorer": "mahalanobis",
        "train": {"kind": "npz", "path": str(tmp_path / "x.npz")},
        "device": "cpu",
    }
    detector = Detector.from_config(config).fit(config["train"])
    wanted = Detector(scorer="mahalanobis").fit((rows.astype(np.float32), labels))
    asked = rows[:7].astype(np.float32)
    np.testing.assert_allclose(detector.score(asked), wanted.score(asked), rtol=1e-9)
    assert detector.model.rows_seen == 40 + 7


def test_rows_that_are_mappings_of_a_data_set():
    h, z = drawn(ROWS, WIDTH), drawn(ROWS, CLASSES, seed=3)

    class Rows(Dataset):
        def __len__(self):
            return ROWS

        def __getitem__(self, i):
            return {"embeddings": h[i], "logits": z[i]}, int(LABELS[i])

    rows = Rows()
    detector = Detector({"kind": "arrays", "logits": "logits"}, scorer="max_logit")
    np.testing.assert_allclose(detector.fit(rows).score(rows), z.amax(1))


def test_fingerprints(head_file):
    extractors = [
        Arrays(),
        Arrays(logits="logits"),
        Arrays.model_validate(head_file),
        Arrays.model_validate(head_file | {"bias": None}),
        Arrays.model_validate(head_file | {"scale": 2}),
        Arrays.model_validate(head_file | {"normalize_weight": True}),
    ]
    assert len({extractor.load().fingerprint() for extractor in extractors}) == 6
    model = extractors[2].load()
    assert extractors[2].load().fingerprint() == model.fingerprint()
    assert model.with_layers(["x"]).fingerprint() == model.fingerprint()
    assert copy.deepcopy(model).fingerprint() == model.fingerprint()
    assert extractors[2].code() == ()
    assert Arrays.model_validate(extractors[2].dump()) == extractors[2]


def test_it_may_move():
    model = StoredFeatures(head=HEAD)
    assert model.device == torch.device("cpu")
    assert model.to("meta").device == torch.device("meta")
    assert model.forward(torch.zeros(2, WIDTH)).logits.device == torch.device("meta")
    assert HEAD.weight.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("fields", "inputs", "message"),
    [
        ({"logits": "z"}, drawn(2, 3), r"one array \[2, 3\].* 'embeddings', 'z' are wanted"),
        ({"layers": ["conv"]}, drawn(2, 3), "'embeddings', 'conv' are wanted"),
        ({}, {"embedding": drawn(2, 3)}, "no 'embeddings'; did you mean 'embedding'"),
        ({}, drawn(2, 3, 4), r"'embeddings' must be \[N, D\], not \[2, 3, 4\]"),
        ({}, ["text"], "rows are numbers, not 1 texts"),
        ({"layers": ["x"]}, {"embeddings": drawn(2, 3)}, "a row has no 'x'"),
    ],
)
def test_what_is_wrong_with_rows_is_said(fields, inputs, message):
    with pytest.raises(DataError, match=message):
        Arrays.model_validate(fields).load()(inputs)


def test_a_head_that_does_not_fit_and_an_edit(head_file):
    model = Arrays.model_validate(head_file).load()
    with pytest.raises(DataError, match="embeddings have 4 columns, the head takes 5"):
        model(drawn(2, 4))
    with pytest.raises(ConfigurationError, match="no layer 'fc' to edit"):
        model(drawn(2, WIDTH), edit={"fc": torch.neg})
    with pytest.raises(ConfigurationError, match="name the embeddings, the logits or both"):
        StoredFeatures(None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "nowhere.safetensors"}, "no file of a head nowhere.safetensors"),
        ({"weight": "fc.wieght"}, "no tensor 'fc.wieght'; did you mean 'fc.weight'"),
        ({"bias": "b"}, r"no tensor 'b'; it has: .*where there is no bias, set bias: null"),
        ({"weight": "fc.bias"}, r"a head's weight is \[K, D\], not \[3\]"),
    ],
)
def test_a_file_without_the_head_is_refused(head_file, change, message):
    with pytest.raises(ConfigurationError, match=message):
        Arrays.model_validate(head_file | change).load()


def test_a_file_that_is_none_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"not at all" * 10)
    with pytest.raises(ConfigurationError, match="cannot be read as safetensors"):
        Arrays(head=tmp_path / "x.safetensors").load()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embeddings": None}, "name the embeddings, the logits or both"),
        ({"embeddings": "x", "logits": "x"}, "cannot both be 'x'"),
        ({"embeddings": None, "logits": "z", "head": "f"}, "name the embeddings"),
        ({"preprocess": {"size": 3}}, "leave it out here"),
        ({"scale": 0}, "greater than 0"),
    ],
)
def test_what_is_wrong_in_a_configuration_is_said(fields, message):
    with pytest.raises(ValidationError, match=message):
        Arrays.model_validate(fields)
