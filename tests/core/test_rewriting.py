"""Rewriting changes the values that it is given, and not a character of anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oodcore.document import parse
from oodcore.errors import ConfigurationError
from oodcore.rewriting import rewritten

FILE = """\
# A detector.
extractor: {kind: torch, factory: "a:b"}   # the model
shapers:
  - react   # first
  - kind: ash # second
    variant: s

scorer:
    kind: sum  # all of them
    # inside
    scorers:
    - {kind: knn, k: 0x10, metric: l2}
    - msp
    - kind: temperature_scaled
seed: 3  # no reason
"""


def test_what_is_changed_and_what_stays() -> None:
    text = rewritten(
        FILE,
        "a.yaml",
        {
            ("shapers", 0, "kind"): "react",
            ("shapers", 0, "percentile"): 85.0,
            ("shapers", 1, "kind"): "ash",
            ("shapers", 1, "percentile"): 65,
            ("scorer", "kind"): "sum",
            ("scorer", "scorers", 0, "kind"): "knn",
            ("scorer", "scorers", 0, "k"): 16,
            ("scorer", "scorers", 0, "reduce"): "mean",
            ("scorer", "scorers", 2, "kind"): "temperature_scaled",
            ("scorer", "scorers", 2, "scorer", "kind"): "gen",
            ("scorer", "scorers", 2, "scorer", "gamma"): 1e-5,
        },
    )
    assert (
        text
        == """\
# A detector.
extractor: {kind: torch, factory: "a:b"}   # the model
shapers:
  - {kind: react, percentile: 85.0}   # first
  - kind: ash # second
    percentile: 65
    variant: s

scorer:
    kind: sum  # all of them
    # inside
    scorers:
    - {kind: knn, reduce: mean, k: 0x10, metric: l2}
    - msp
    - kind: temperature_scaled
      scorer: {kind: gen, gamma: 1e-05}
seed: 3  # no reason
"""
    )


def test_values_as_they_are_change_nothing() -> None:
    values = {("scorer", "kind"): "sum", ("scorer", "scorers", 0, "k"): 16, ("seed",): 3}
    assert rewritten(FILE, "a.yaml", values) == FILE


def test_json_stays_json() -> None:
    text = '{"scorer": "vim",\n "shapers": [{"kind": "react"}, {"kind": "ash", "variant": "s"}]}'
    values = {
        ("scorer", "kind"): "vim",
        ("scorer", "dim"): None,
        ("shapers", 0, "kind"): "react",
        ("shapers", 0, "percentile"): 85.5,
        ("shapers", 1, "variant"): "p",
    }
    assert json.loads(rewritten(text, "a.json", values)) == {
        "scorer": {"kind": "vim", "dim": None},
        "shapers": [{"kind": "react", "percentile": 85.5}, {"kind": "ash", "variant": "p"}],
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_ends_of_lines(end: str) -> None:
    text = f"scorer:{end or chr(10)}  kind: vim{end}"
    wanted = f"{text}{'' if end else chr(10)}  dim: 3{end}"
    assert rewritten(text, "a.yaml", {("scorer", "kind"): "vim", ("scorer", "dim"): 3}) == wanted


@pytest.mark.parametrize(
    ("text", "values", "message"),
    [
        ("scorer: {k: 3}", {("scorer", "metric"): "l2"}, "metric has no place"),
        ("scorer: {kind: sum}", {("scorer", "scorers", 0, "k"): 1}, "item 0 of a list"),
        ("- scorer", {("scorer", "k"): 1}, "a configuration is a mapping"),
        ("scorer: *x", {("scorer", "k"): 1}, "aliases are not read"),
    ],
)
def test_places_that_cannot_be_made(text: str, values: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rewritten(text, "a.yaml", values)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"))),
    st.sampled_from(["true", "Null", "no", "1e3", "~", "a-b", "", " x", "#", "kind: x"]),
)


@given(value=scalars, form=st.sampled_from(["kind", "flow", "block", "set", "json"]))
def test_every_value_is_read_back(value: Any, form: str) -> None:
    text = {
        "kind": "scorer: knn # é\nseed: 1\n",
        "flow": "scorer: {kind: knn} # é\nseed: 1\n",
        "block": "scorer: # é\n  kind: knn # é\n  b: 2\nseed: 1\n",
        "set": "scorer:\n  x: 'old é'\n  kind: knn\nseed: 1\n",
        "json": '{"scorer": {"kind": "knn"}, "seed": 1}',
    }[form]
    given = rewritten(text, "a.yaml", {("scorer", "kind"): "knn", ("scorer", "x"): value})
    data = parse(given, "a.yaml").data
    assert data["seed"] == 1
    assert data["scorer"]["kind"] == "knn"
    assert data["scorer"]["x"] == value
    assert type(data["scorer"]["x"]) is type(value)
    if form == "json":
        assert json.loads(given) == data
