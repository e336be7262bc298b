"""RunFolder: what is not replaced, what is made again, and damage that is told."""

from __future__ import annotations

import json

import pytest
import torch
from toy_runs import ALL, STEPS, Clusters, config_of, net, registered, same, weights

from oodcore.errors import ArtifactError, ConfigurationError
from oodcore.run_folder import RunFolder
from oodcore.training import train

pytest.importorskip("lightning", reason="training needs the extra 'train'")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run with every hook in use."""
    return train(config_of(*ALL, epochs=1), tmp_path_factory.mktemp("whole") / "run")


def test_a_run_is_not_replaced_unasked(tmp_path):
    config = config_of(epochs=1)
    out = train(config, tmp_path / "run")
    before = weights(out)
    with pytest.raises(ArtifactError, match="a finished run; give overwrite=True"):
        train(config, out)
    train(config_of(epochs=1, seed=1), out, overwrite=True)
    assert not same(weights(out), before)
    unfinished = train(config, tmp_path / "other", stop_after=1)
    with pytest.raises(ArtifactError, match="can go on with resume=True"):
        train(config, unfinished)
    with pytest.raises(ConfigurationError, match="give one"):
        train(config, out, resume=True, overwrite=True)


@pytest.mark.parametrize("way", [{}, {"overwrite": True}, {"resume": True}], ids=str)
def test_a_folder_of_something_else_is_left_alone(tmp_path, way):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ArtifactError, match=r"no training run, and holds thesis\.tex"):
        train(config_of(), tmp_path, **way)
    with pytest.raises(ArtifactError, match="holds a file"):
        train(config_of(), tmp_path / "thesis.tex", **way)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_model_is_made_again_without_its_data(tmp_path, whole):
    torch.manual_seed(3)
    generator = torch.get_rng_state()
    with registered():
        model, _ = RunFolder(whole).load()
    assert torch.equal(torch.get_rng_state(), generator)
    assert same(model.state_dict(), weights(whole))
    assert not model.training
    assert "beside" in model.branches
    document = json.loads((whole / "config.json").read_text())
    document["train"] = {"kind": "gone"}
    folder = tmp_path / "moved"
    folder.mkdir()
    for name in ("run.json", "model.safetensors"):
        (folder / name).write_bytes((whole / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(document))
    with registered():
        again, _ = RunFolder(folder).load()
    inputs = Clusters().open().inputs
    assert torch.equal(again(inputs).logits, model(inputs).logits)


def test_a_missing_plugin_is_named(whole):
    with pytest.raises(ArtifactError, match="unknown regularizer 'everything'"):
        RunFolder(whole).load()


def test_weights_that_two_names_share_are_saved(tmp_path):
    out = train(config_of(network={"factory": "toy_runs:tied"}, epochs=1), tmp_path / "run")
    model, _ = RunFolder(out).load()
    assert model.network.again is model.network.body[0]
    assert same(model.state_dict(), weights(out))


def test_a_checkpoint_that_cannot_be_read_is_told(tmp_path):
    out = train(config_of(), tmp_path / "run", stop_after=STEPS)
    (checkpoint,) = (out / "checkpoints").iterdir()
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"step-000000000004.*overwrite=True"):
        train(config_of(), out, resume=True)


def test_where_and_how_may_change_but_not_what(tmp_path):
    config = config_of(*ALL)
    out = train(config, tmp_path / "run", stop_after=5)
    with pytest.raises(ArtifactError, match=r"seed was 0 and is 1"):
        train(config_of(*ALL, seed=1), out, resume=True)
    with pytest.raises(ArtifactError, match=r"another configuration: regularizers was"):
        train(config_of(*ALL[:2]), out, resume=True)
    train(config_of(*ALL, checkpoint_every=2), out, resume=True)


def damaged_json(folder, name, **changes):
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**document, **changes}))


DAMAGE = {
    "no run.json": (lambda folder: (folder / "run.json").unlink(), "did not finish"),
    "nothing at all": (
        lambda folder: [path.unlink() for path in folder.iterdir()],
        "no training run",
    ),
    "a flipped bit": (
        lambda folder: (folder / "model.safetensors").write_bytes(
            (folder / "model.safetensors").read_bytes()[:-1] + b"\x01"
        ),
        "it is damaged",
    ),
    "no JSON": (lambda folder: (folder / "run.json").write_text("{"), "cannot be read"),
    "no object": (lambda folder: (folder / "run.json").write_text("[]"), "no JSON object"),
    "a field less": (
        lambda folder: (folder / "run.json").write_text('{"schema": 1, "classes": 3}'),
        "run.json.*fingerprint",
    ),
    "a field that is no number": (
        lambda folder: damaged_json(folder, "run.json", width="5"),
        "width",
    ),
    "another schema": (lambda folder: damaged_json(folder, "run.json", schema=2), "has schema 2"),
    "another network": (
        lambda folder: damaged_json(
            folder, "config.json", network={"factory": "toy_runs:net", "arguments": {"classes": 4}}
        ),
        "does not fit the network",
    ),
    "a field that nobody knows": (
        lambda folder: damaged_json(folder, "config.json", network={"factory": "a:b", "fctry": 1}),
        "fctry",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_folder_is_refused(tmp_path, damage, message):
    out = train(config_of(epochs=1), tmp_path / "run")
    damage(out)
    with pytest.raises(ArtifactError, match=message):
        RunFolder(out).load()


def test_a_network_that_lost_its_head_is_told(tmp_path):
    out = train(config_of(epochs=1), tmp_path / "run")
    damaged_json(out, "run.json", head="classifier")
    with pytest.raises(ConfigurationError, match="no layer 'classifier'"):
        RunFolder(out).load()


def test_metrics_that_an_epoch_lacks_are_empty_cells(tmp_path):
    RunFolder(tmp_path).write_metrics([{"epoch": 0, "a": 0.5}, {"epoch": 1, "b": 0.25}])
    assert (tmp_path / "metrics.csv").read_text() == "epoch,a,b\n0,0.5,\n1,,0.25\n"


def test_weights_may_go_into_another_network(tmp_path):
    out = train(config_of(epochs=1), tmp_path / "run")
    network = net(dropout=0.0)
    model, _ = RunFolder(out).load(network)
    assert model.network is network
    for name, value in network.state_dict().items():
        assert torch.equal(value, weights(out)[f"network.{name}"])
    with pytest.raises(ArtifactError, match="does not fit the network that starts from it"):
        RunFolder(out).load(net(classes=4))
