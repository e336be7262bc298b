"""JSON and safetensors from strangers: refused at once, whatever they are made of."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from oodcore import Rows
from oodcore.encoding import PARTS_LIMIT, Decoder, encoded, strict_json
from oodcore.errors import ArtifactError

MANY = 500_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'"' + b'\\"' * MANY, "Unterminated"),
        (b'"' + b"a" * MANY, "Unterminated"),
        (b"[" * MANY, "deeper"),
        (b'{"a":' * MANY, "deeper"),
        (b"[" + b"[]," * (PARTS_LIMIT + 1) + b"[]]", "lists and mappings"),
        (b'"\\"' + b"[" * 100, "deeper|Unterminated"),
        ('{"a": 1}'.encode("utf-16"), "UTF-8"),
        (b"\xef\xbb\xbf{}", "valid JSON"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": -Infinity}', "not JSON"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"\\udfff": 1}', "surrogates"),
        (b'{"a": 1, "a": 1}', "twice"),
        (b"9" * 5000, "limit"),
        (b"{} {}", "Extra data"),
        (b"", "valid JSON"),
    ],
)
def test_what_is_refused_is_refused_at_once(content: bytes, message: str) -> None:
    began = time.process_time()
    with pytest.raises(ArtifactError, match=message) as error:
        strict_json(content, "x.json")
    assert time.process_time() - began < 2
    str(error.value).encode()


def test_text_in_any_alphabet() -> None:
    content = '{"a": ["ü", "\\u00fc\\ud83d\\ude00", "[{\\"]}", "\\\\"], "b": [[], {}]}'
    assert strict_json(content.encode(), "x") == {"a": ["ü", "ü😀", '[{"]}', "\\"], "b": [[], {}]}


def test_references_and_back() -> None:
    tensors: dict[str, Any] = {}
    shared = torch.arange(3.0)
    tree = encoded({"a": shared, "b": [shared, {"c": torch.ones(2)}]}, "", tensors, {})
    decoder = Decoder(tensors)
    given = decoder.tree(tree)
    assert given["a"] is given["b"][0]
    assert torch.equal(given["a"], shared)
    assert given["a"].data_ptr() != shared.data_ptr()
    assert decoder.used == set(tensors)


def test_many_references_to_one_tensor_are_refused_before_they_are_copied() -> None:
    decoder = Decoder({"x": torch.zeros(2**18)})
    with pytest.raises(ArtifactError, match="too many references"):
        decoder.tree([{"$tensor": "x"}] * 1000)


def test_equal_indexes_are_one() -> None:
    decoder = Decoder({"x": torch.rand(5, 2)})
    form = {"$index": "x", "metric": "l2", "factory": "Flat", "normalized": False}
    one, two, other = decoder.tree([form, dict(form), {**form, "normalized": True}])
    assert one is two
    assert one is not other


@pytest.mark.parametrize("name", [["x"], {}, 3, None, "y"])
@pytest.mark.parametrize("form", ["$tensor", "$rows", "$index"])
def test_references_that_lead_nowhere(form: str, name: object) -> None:
    value = {form: name, "metric": "l2", "factory": "Flat", "normalized": False}
    if form != "$index":
        value = {form: name}
    with pytest.raises(ArtifactError, match="nowhere"):
        Decoder({"x": torch.ones(2, 2)}).tree(value)


def test_two_tensors_never_have_one_name() -> None:
    with pytest.raises(ArtifactError, match=r"two tensors are called 'a\.b'"):
        encoded({"a.b": torch.ones(1), "a": {"b": Rows.of(torch.ones(2, 1))}}, "", {}, {})
