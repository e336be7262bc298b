"""The demonstration's networks learn: both, by the same settings."""

from __future__ import annotations

import csv

import pytest
import torch

from oodcore import demo
from oodcore.config import BenchmarkConfig, validate
from oodcore.training import train

TRAININGS = validate(BenchmarkConfig, demo._shipped("digits")).trainings or {}


def test_the_networks_differ_in_their_regularizers_alone():
    first, *others = (config.dump() for config in TRAININGS.values())
    assert others
    for other in others:
        assert {name for name in first if first[name] != other[name]} == {"regularizers"}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_network_learns(name, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        folder = train(TRAININGS[name], tmp_path / "run")
    finally:
        torch.set_num_threads(before)
    with (folder / "metrics.csv").open(newline="") as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["accuracy"]) > 0.98
    assert float(last["validation/accuracy"]) > 0.96
