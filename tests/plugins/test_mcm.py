"""mcm: the softmax over cosines to texts, against a naive computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from embedding_rows import HEAD, TESTED, features
from linear_network import WEIGHT, Linear, X
from safetensors.torch import save_file

from oodcore import Detector, Features, Head, load
from oodcore.errors import ConfigurationError, DataError
from oodcore.plugins import registry
from oodcore_plugins.mcm import MCM
from oodcore_plugins.msp import MSP

TEXTS = HEAD.weight.numpy()


def naive(rows, texts, temperature):
    scores = []
    for row in np.asarray(rows, dtype=np.float64):
        cosines = []
        for text in np.asarray(texts, dtype=np.float64):
            norms = np.linalg.norm(row) * np.linalg.norm(text)
            cosines.append(row @ text / norms if norms else 0.0)
        powers = np.exp(np.array(cosines) / temperature)
        scores.append(powers.max() / powers.sum())
    return np.array(scores)


def with_texts(folder, texts, name="text"):
    path = folder / "texts.safetensors"
    save_file({name: torch.as_tensor(texts).contiguous()}, path)
    return path


@pytest.mark.parametrize("temperature", [1.0, 0.01, 30.0])
@pytest.mark.parametrize("size", [1.0, 1e-9, 1e9])
def test_it_is_its_definition(temperature, size):
    scores = MCM(temperature=temperature).score(features(TESTED * size), {})
    np.testing.assert_allclose(scores, naive(TESTED, TEXTS, temperature), rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_it_is_msp_of_a_head_of_directions(temperature):
    head = Head(HEAD.weight, None, normalize_weight=True, normalize_features=True)
    given = Features(embeddings=torch.as_tensor(TESTED), head=head)
    one = MCM(temperature=temperature).score(given, {})
    np.testing.assert_allclose(one, MSP(temperature=temperature).score(given, {}), rtol=1e-12)


def test_neither_bias_nor_lengths_count():
    lengths = torch.tensor([1.0, 7.0, 0.01, 3.0]).double()
    other = Head(HEAD.weight * lengths[:, None], torch.tensor([5.0, -3.0, 0.0, 9.0]).double())
    given = Features(embeddings=torch.as_tensor(TESTED), head=other)
    np.testing.assert_allclose(
        MCM().score(given, {}), MCM().score(features(TESTED), {}), rtol=1e-12
    )


def test_a_zero_embedding_and_equal_texts_say_nothing():
    np.testing.assert_allclose(MCM().score(features(np.zeros((1, 5))), {}), 1 / 4)
    same = Head(torch.ones(2, 5).double())
    given = Features(embeddings=torch.as_tensor(TESTED), head=same)
    np.testing.assert_allclose(MCM().score(given, {}), 1 / 2)


def test_two_texts_and_one_dimension():
    head = Head(torch.tensor([[2.0], [-3.0]]).double())
    given = Features(embeddings=torch.tensor([[4.0], [-1e-3], [0.0]]).double(), head=head)
    far = np.e / (np.e + 1 / np.e)
    np.testing.assert_allclose(MCM().score(given, {}), [far, far, 0.5], rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_texts_from_a_file(tmp_path, dtype):
    texts = torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    path = with_texts(tmp_path, texts, "any_name")
    scorer = {"kind": "mcm", "text": str(path), "temperature": 0.5}
    detector = Detector(scorer=scorer).fit(X)
    np.testing.assert_allclose(detector.score(X), naive(X, texts.double(), 0.5), rtol=1e-9)
    assert detector.scorer.dump()["text"] == str(path)


def test_a_saved_detector_never_looks_for_the_file_again(tmp_path):
    path = with_texts(tmp_path, WEIGHT)
    network = Linear(WEIGHT)
    detector = Detector(network, scorer={"kind": "mcm", "text": str(path)}).fit(X)
    expected = detector.score(X)
    detector.save(tmp_path / "saved")
    path.unlink()
    np.testing.assert_array_equal(detector.score(X), expected)
    np.testing.assert_array_equal(load(tmp_path / "saved", model=network).score(X), expected)
    with pytest.raises(ConfigurationError, match="no file of text embeddings"):
        detector.fit(X)


def test_with_a_head_there_is_nothing_to_fit():
    assert Detector(Linear(WEIGHT), scorer="mcm").score(X).shape == (20,)


def test_files_that_hold_no_texts_are_refused(tmp_path):
    zero = WEIGHT.clone()
    zero[1] = 0
    for texts, told in (
        (zero, "row 1 of .* is zero or not finite"),
        (WEIGHT / 0.0, "row 0 of .* is zero or not finite"),
        (WEIGHT[0], r"must hold one tensor \[K, D\].*\[4\]"),
        (WEIGHT[:0], r"must hold one tensor \[K, D\]"),
    ):
        path = with_texts(tmp_path, texts)
        with pytest.raises(ConfigurationError, match=told):
            Detector(scorer={"kind": "mcm", "text": str(path)}).fit(X)
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "two.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"not safetensors at all")
    for name, told in (("two", "must hold one tensor"), ("junk", "cannot be read as safetensors")):
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(ConfigurationError, match=told):
            Detector(scorer={"kind": "mcm", "text": str(path)}).fit(X)


def test_what_is_refused(tmp_path):
    path = with_texts(tmp_path, torch.ones(3, 7))
    detector = Detector(scorer={"kind": "mcm", "text": str(path)}).fit(X)
    with pytest.raises(DataError, match="texts have 7 columns and the embeddings 4"):
        detector.score(X)
    with pytest.raises(DataError, match="needs head"):
        Detector(scorer="mcm").score(X)
    with pytest.raises(ConfigurationError, match="temperature"):
        registry.build("scorer", {"kind": "mcm", "temperature": 0})
