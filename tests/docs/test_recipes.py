"""The recipes are what oodcore accepts, say what papers say, and run from beginning to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image

from oodcore.cli import run
from oodcore.config import BenchmarkConfig, read, validate
from oodcore.results import Results
from oodcore.schema import schema

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
FILES = sorted(RECIPES.glob("*.yaml"))
CLASSES = 3


def config(name: str) -> BenchmarkConfig:
    return validate(BenchmarkConfig, read(RECIPES / f"{name}.yaml"))


def plain(name: str) -> dict[str, Any]:
    return json.loads(json.dumps(read(RECIPES / f"{name}.yaml").data))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_check_needs_no_data(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["check", str(path)]) == 0
    assert "is a benchmark" in capsys.readouterr().out


def test_editors_accept_what_oodcore_accepts() -> None:
    benchmark = Draft202012Validator(schema("benchmark"))
    for path in FILES:
        assert not [error.message for error in benchmark.iter_errors(plain(path.stem))]
    wrong = plain("dml_plus")
    wrong["scorers"][0]["members"]["norm"]["modle"] = "mnc"
    assert list(benchmark.iter_errors(wrong))
    members = {"a": {"scorer": "msp", "shapers": []}, "b": {"scorer": "knn"}}
    ensemble = Draft202012Validator(schema("ensemble"))
    assert not list(ensemble.iter_errors({"members": members}))
    assert list(ensemble.iter_errors({"members": {}}))


def test_the_page_tells_of_every_recipe() -> None:
    page = (RECIPES / "index.md").read_text("utf-8")
    for path in FILES:
        assert f"]({path.name})" in page
        assert f"oodcore benchmark {path.name} --out runs/{path.stem}" in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("one", "other", "fields"),
    [
        ("dml_plus", "dml_plus_cifar100", {"classes", "path"}),
        ("sure_cifar10", "sure_cifar100", {"classes", "path", "weight"}),
    ],
)
def test_recipes_of_a_pair_differ_in_what_they_say(one: str, other: str, fields: set[str]) -> None:
    def differing(a: Any, b: Any, name: str = "") -> set[str]:
        if isinstance(a, dict):
            assert a.keys() == b.keys()
            return set().union(*(differing(a[key], b[key], key) for key in a))
        if isinstance(a, list):
            assert len(a) == len(b)
            return set().union(*(differing(x, y, name) for x, y in zip(a, b, strict=True)))
        return set() if a == b else {name}

    assert differing(plain(one), plain(other)) == fields


@pytest.mark.parametrize(
    ("name", "mixed", "ranked"), [("sure_cifar10", 0.5, 0.5), ("sure_cifar100", 1, 1)]
)
def test_settings_of_sure(name: str, mixed: float, ranked: float) -> None:
    training = (config(name).trainings or {})["sure"]
    parts = {part.kind: part.dump() for part in training.regularizers}
    assert parts["regmixup"]["weight"] == mixed
    assert parts["correctness_ranking"]["weight"] == ranked
    assert (parts["cosine_head"]["scale"], parts["cosine_head"]["normalize"]) == (8, "both")
    assert (parts["swa"]["start"], parts["swa"]["lr"], parts["sam"]["rho"]) == (120, 0.05, 0.05)
    assert (training.epochs, training.batch_size, training.optimizer.lr) == (200, 128, 0.1)
    assert training.optimizer.weight_decay == 5e-4


# Runs: the recipes as they are, but for the size of networks and the number of epochs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def npz(path: str, rows: int, seed: int) -> None:
    drawn = np.random.default_rng(seed)
    labels = np.arange(rows) % CLASSES
    images = drawn.integers(0, 100, (rows, 32, 32, 3)) + 50 * labels[:, None, None, None]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, x=images.astype(np.uint8), y=labels)


def images(folder: str, names: list[str], rows: int, size: tuple[int, int], seed: int) -> None:
    drawn = np.random.default_rng(seed)
    for label, name in enumerate(names):
        Path(folder, name).mkdir(parents=True, exist_ok=True)
        for row in range(rows):
            small = (drawn.integers(0, 100, (8, 8, 3)) + 50 * (label % CLASSES)).astype(np.uint8)
            Image.fromarray(small).resize(size).save(Path(folder, name, f"{row}.png"))


def shortened(name: str, epochs: int, changes: dict[str, Any]) -> Path:
    """The recipe with fewer epochs, each number of classes 3, and some fields replaced."""
    document = plain(name)

    def change(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            if key in changes:
                node[key] = changes[key]
            elif key == "classes":
                node[key] = CLASSES
            elif isinstance(value, dict | list):
                change(value)

    change(document)
    for training in document["trainings"].values():
        training["epochs"] = epochs
    path = Path(f"{name}.json")
    path.write_text(json.dumps(document))
    return path


def carried_out(name: str, path: Path) -> Results:
    assert run(["benchmark", str(path), "--out", f"runs/{name}"]) == 0
    return Results.load(Path("runs") / name)


def test_dml_plus_runs(place: Path) -> None:
    npz("data/cifar10/train.npz", 36, 0)
    npz("data/cifar10/test.npz", 24, 1)
    npz("data/ood/svhn/test.npz", 12, 2)
    for folder in ("dtd/images", "LSUN", "LSUN_resize", "iSUN", "places365"):
        images(f"data/ood/{folder}", ["all"], 3, (36, 40), 3)
    small = {"depth": 10, "widen": 1, "batch_size": 12, "starts": [0, 1]}
    results = carried_out("dml_plus", shortened("dml_plus", 2, small))
    assert {entry.name: entry.model for entry in results.entries}["dml+"] == "mcf + mnc"
    assert len(results.entries) == 1 + 2 * 5
    assert len(results.ood_data) == 6


@pytest.mark.parametrize("name", ["sure_cifar10", "sure_cifar100"])
def test_sure_runs(name: str, place: Path) -> None:
    data = name.removeprefix("sure_")
    npz(f"data/{data}/train.npz", 60, 0)
    npz(f"data/{data}/test.npz", 30, 1)
    path = shortened(name, 2, {"start": 1, "batch_size": 20, "anneal": 1})
    document = json.loads(path.read_text())
    document["trainings"]["sure"]["network"]["arguments"]["width"] = 2
    path.write_text(json.dumps(document))
    results = carried_out(name, path)
    assert results.entries[0].name == "sure/msp"
    assert "aurc" in results.id_metrics


def test_sure_ood_runs_on_random_weights_and_images(place: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'text'")
    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 384,
        "patch_size": 32,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": False,
        "num_labels": 1000,
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = transformers.BeitForImageClassification(transformers.BeitConfig(**shape))
    model.save_pretrained("models/deit3-base-384")
    names = ["n01", "n02", "n03"]
    images("data/imagenet/train", names, 100, (60, 50), 0)
    images("data/imagenet/val", names, 2, (50, 60), 1)
    images("data/imagenet21k_val", ["n11", "n12", "n13"], 2, (60, 60), 2)
    unknown = {"Easy": ["n11", "n12"], "Hard": ["n13"]}
    Path("data/imagenet_ssb_splits.json").write_text(json.dumps({"unknown_classes": unknown}))
    path = shortened("sure_ood_imagenet", 1, {"num_workers": 0})
    document = json.loads(path.read_text())
    for training in document["trainings"].values():
        training["train"]["part"] = [0, 0.05]
    path.write_text(json.dumps(document))
    results = carried_out("sure_ood_imagenet", path)
    assert [entry.name for entry in results.entries] == [
        *("SURE", "without norm", "480 pixels", "averaged", "five crops")
    ]
    assert [one.name for one in results.ood_data] == ["easy", "hard"]
    assert results.metrics == ("auroc", "fpr95_id", "auin", "auout", "dterr", "oscr")
    scores = {entry.name: results.figures[entry.name].edges for entry in results.entries}
    assert len({tuple(edges) for edges in scores.values()}) == 5, "every step changes the scores"
