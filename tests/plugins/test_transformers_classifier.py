"""Transformers as networks to train: from folders and configurations, made again without either."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear

import oodcore
from oodcore.capture import submodule
from oodcore.errors import ConfigurationError
from oodcore.factory import network
from oodcore.plugins import registry
from oodcore.training import train
from oodcore_plugins.transformers_extractor import classifier
from oodcore_plugins.transformers_extractor.deit3 import convert

transformers = pytest.importorskip("transformers", reason="needs the extra 'text'")

FACTORY = "oodcore_plugins.transformers_extractor:classifier"
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
    "num_channels": 1,
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def folder(path: Path, classes: int = 6) -> Path:
    fields = {name: value for name, value in VIT.items() if name != "model_type"}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        config = transformers.ViTConfig(**fields, num_labels=classes)
        transformers.ViTForImageClassification(config).save_pretrained(path)
    return path


def drawn(rows: int, side: int = 16, channels: int = 1) -> Tensor:
    return torch.rand(rows, channels, side, side, generator=torch.Generator().manual_seed(rows))


def npz(path: Path) -> dict[str, Any]:
    draw = np.random.default_rng(0)
    labels = np.arange(48) % 6
    np.savez(path, x=(draw.random((48, 16, 16)) + labels[:, None, None]) / 7, y=labels)
    return {"kind": "npz", "path": str(path)}


def training(place: Path, **arguments: Any) -> dict[str, Any]:
    return {
        "network": {"factory": FACTORY, "arguments": arguments},
        "train": npz(place / "rows.npz"),
        "regularizers": ["cosine_head"],
        "epochs": 1,
        "batch_size": 16,
        "optimizer": {"kind": "sgd", "lr": 0.01},
        "device": "cpu",
    }


def logits(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images).logits


def test_a_folder_is_where_training_starts(tmp_path: Path) -> None:
    path = folder(tmp_path / "vit")
    model = network(FACTORY, {"path": str(path)}, 0)
    own = transformers.ViTForImageClassification.from_pretrained(path)
    torch.testing.assert_close(logits(model, drawn(4)), logits(own, drawn(4)))


def test_another_number_of_classes_has_a_head_of_the_runs_seed(tmp_path: Path) -> None:
    path = str(folder(tmp_path / "vit"))
    whole = network(FACTORY, {"path": path}, 0)
    one, same, two = (network(FACTORY, {"path": path, "classes": 4}, seed) for seed in (1, 1, 2))
    heads = [model.get_submodule("classifier").weight for model in (one, same, two)]
    assert heads[0].shape == (4, 16)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    kept = {n: v for n, v in one.state_dict().items() if not n.startswith("classifier")}
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in kept.items())


def test_weights_that_do_not_fit_are_still_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "vit")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 8}))
    with pytest.raises(ConfigurationError, match="do not fit"):
        network(FACTORY, {"path": str(path), "classes": 4}, 0)


def test_random_weights_are_of_the_runs_seed() -> None:
    before = torch.get_rng_state()
    one, same, two = (network(FACTORY, {**VIT, "classes": 6}, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    rows = drawn(3)
    assert torch.equal(logits(one, rows), logits(same, rows))
    assert not torch.equal(logits(one, rows), logits(two, rows))
    assert logits(one, rows).shape == (3, 6)


def test_images_of_any_size() -> None:
    model = network(FACTORY, {**VIT, "classes": 6}, 0)
    assert logits(model, drawn(2, 32)).shape == (2, 6)
    assert logits(model, drawn(2, 36)).shape == (2, 6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give one of the three"),
        ({"path": "x", "model_type": "vit"}, "give one of the three"),
        ({"path": "nowhere"}, "there is no nowhere"),
        ({"configuration": "{"}, "no JSON"),
        ({"configuration": "[]"}, "no JSON object"),
        ({"model_type": "vti"}, "did you mean 'vit'"),
        ({"model_type": "vit", "hiden_size": 3}, "did you mean 'hidden_size'"),
    ],
)
def test_what_it_cannot_be_made_of(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        network(FACTORY, arguments, 0)
    with pytest.raises(ConfigurationError):
        classifier(**arguments)


def test_a_run_is_read_without_the_folder_that_it_started_from(tmp_path: Path) -> None:
    path = folder(tmp_path / "vit", classes=1000)
    run = train(training(tmp_path, path=str(path), classes=6), tmp_path / "run")
    extractor = registry.build("extractor", {"kind": "run", "path": str(run)})
    with torch.no_grad():
        before = extractor.load().forward(drawn(5)).logits
    shutil.rmtree(path)
    model = extractor.load()
    with torch.no_grad():
        features = model.forward(drawn(5))
    assert torch.equal(features.logits, before)
    assert features.embeddings.shape == (5, 16)
    assert features.head.normalize_features
    weights = load_file(run / "model.safetensors")
    assert torch.equal(features.head.weight, weights["network.classifier.weight"])
    assert len(json.loads((run / "run.json").read_text())["arguments"]["configuration"]) < 2000


def test_a_run_of_random_weights(tmp_path: Path) -> None:
    run = train(training(tmp_path, **VIT, classes=6), tmp_path / "run")
    detector = oodcore.Detector({"kind": "run", "path": str(run)}, scorer="msp")
    assert detector.score(drawn(5)).shape == (5,)
    again = train({**training(tmp_path), "network": {"factory": FACTORY, "arguments": {**VIT,
                  "classes": 6}, "weights": str(run)}}, tmp_path / "again")  # fmt: skip
    assert (again / "model.safetensors").is_file()


def test_what_is_left_out_of_a_run(tmp_path: Path) -> None:
    run = train(training(tmp_path, **VIT, classes=6), tmp_path / "run")

    def loaded(*drop: str) -> Any:
        return registry.build("extractor", {"kind": "run", "path": str(run), "drop": drop}).load()

    whole, without = loaded(), loaded("vit.layernorm")
    norm = submodule(whole.module, "vit.layernorm")
    with torch.no_grad():
        bare = without.forward(drawn(5)).embeddings
        torch.testing.assert_close(norm(bare), whole.forward(drawn(5)).embeddings)
    assert whole.fingerprint() != without.fingerprint()
    for name, said in (("classifier", "holds the head"), ("vit.layernrom", "vit.layernrom")):
        with pytest.raises(ConfigurationError, match=said):
            loaded(name)


# DeiT-III


WIDTH, PATCHES, DEPTH, CLASSES = 128, 9, 2, 7


def published() -> dict[str, Tensor]:
    """A checkpoint with random numbers, under the names of the authors."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return 0.3 * torch.randn(*shape, generator=generator)

    state = {
        "cls_token": draw(1, 1, WIDTH),
        "pos_embed": draw(1, PATCHES, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, 8, 8),
        "patch_embed.proj.bias": draw(WIDTH),
        "norm.weight": 1 + draw(WIDTH),
        "norm.bias": draw(WIDTH),
        "head.weight": draw(CLASSES, WIDTH),
        "head.bias": draw(CLASSES),
    }
    for number in range(DEPTH):
        block = {
            "gamma_1": draw(WIDTH),
            "gamma_2": draw(WIDTH),
            "attn.qkv.weight": draw(3 * WIDTH, WIDTH),
            "attn.qkv.bias": draw(3 * WIDTH),
            "attn.proj.weight": draw(WIDTH, WIDTH),
            "attn.proj.bias": draw(WIDTH),
            "mlp.fc1.weight": draw(2 * WIDTH, WIDTH),
            "mlp.fc1.bias": draw(2 * WIDTH),
            "mlp.fc2.weight": draw(WIDTH, 2 * WIDTH),
            "mlp.fc2.bias": draw(WIDTH),
        }
        for norm in ("norm1", "norm2"):
            block |= {f"{norm}.weight": 1 + draw(WIDTH), f"{norm}.bias": draw(WIDTH)}
        state |= {f"blocks.{number}.{name}": value for name, value in block.items()}
    return state


def naive(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """DeiT-III as its paper has it: positions of patches alone, layer scale, keys with a bias."""

    def dense(name: str, rows: Tensor) -> Tensor:
        return linear(rows, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, rows: Tensor) -> Tensor:
        return layer_norm(rows, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-6)

    patches = conv2d(
        images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=8
    )
    rows = patches.flatten(2).transpose(1, 2) + state["pos_embed"]
    rows = torch.cat([state["cls_token"].expand(len(images), 1, WIDTH), rows], dim=1)
    for number in range(DEPTH):
        block = f"blocks.{number}"
        mixed = dense(f"{block}.attn.qkv", norm(f"{block}.norm1", rows))
        query, key, value = (
            part.reshape(len(images), -1, WIDTH // 64, 64).transpose(1, 2)
            for part in mixed.chunk(3, dim=2)
        )
        share = (query @ key.transpose(2, 3) / 8).softmax(dim=3)
        seen = (share @ value).transpose(1, 2).flatten(2)
        rows = rows + state[f"{block}.gamma_1"] * dense(f"{block}.attn.proj", seen)
        hidden = gelu(dense(f"{block}.mlp.fc1", norm(f"{block}.norm2", rows)))
        rows = rows + state[f"{block}.gamma_2"] * dense(f"{block}.mlp.fc2", hidden)
    return dense("head", norm("norm", rows)[:, 0])


@pytest.mark.parametrize("form", ["authors", "timm"])
def test_a_published_checkpoint_computes_the_same(form: str, tmp_path: Path) -> None:
    state, path = published(), tmp_path / "checkpoint.pth"
    if form == "authors":
        torch.save({"model": state}, path)
    else:
        path = path.with_suffix(".safetensors")
        names = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
        save_file({".".join(names.get(p, p) for p in n.split(".")): v for n, v in state.items()},
                  path)  # fmt: skip
    made = convert(path, tmp_path / "deit3")
    images = drawn(4, 24, 3)
    expected = naive(state, images)
    model = network(FACTORY, {"path": str(made)}, 0)
    torch.testing.assert_close(logits(model, images), expected, rtol=1e-4, atol=1e-4)
    extractor = registry.build("extractor", {"kind": "transformers", "path": str(made)})
    with torch.no_grad():
        given = extractor.load().forward(images).logits
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="there is no checkpoint"):
        convert(tmp_path / "none.pth", tmp_path / "out")
    state = published()
    for name, other in (("head.weight", None), ("pos_embed", torch.zeros(1, 8, WIDTH))):
        broken = {key: value for key, value in state.items() if key != name}
        broken |= {} if other is None else {name: other}
        torch.save(broken, tmp_path / "broken.pth")
        with pytest.raises(ConfigurationError, match="is no checkpoint of DeiT-III"):
            convert(tmp_path / "broken.pth", tmp_path / "out")
    torch.save({"model": state}, tmp_path / "whole.pth")
    convert(tmp_path / "whole.pth", tmp_path / "out")
    with pytest.raises(ConfigurationError, match="exists already"):
        convert(tmp_path / "whole.pth", tmp_path / "out")
