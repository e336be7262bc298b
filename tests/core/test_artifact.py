"""An artifact is whole or refused; nothing in it is run, and nothing it holds crashes anything."""

from __future__ import annotations

import hashlib
import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

import oodcore
from oodcore import Detector, Features, Head
from oodcore.artifact import MANIFEST, STATE
from oodcore.errors import ArtifactError, ConfigurationError, NotFittedError, PluginError

K, D = 3, 5


def rows(count: int, seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % K
    embeddings = torch.rand(count, D, generator=generator) + labels[:, None]
    head = Head(torch.randn(K, D, generator=torch.Generator().manual_seed(1)))
    return Features(embeddings=embeddings, labels=labels, head=head)


@pytest.fixture(scope="module")
def detector() -> Detector:
    scorer = {
        "kind": "sum",
        "scorers": ["mahalanobis", {"kind": "knn", "k": 3}, "dml"],
        "normalize": "zscore",
    }
    fitted = Detector(scorer=scorer, shapers=["react"]).fit(rows(90))
    return fitted.calibrate(rows(60, seed=1), false_alarm_rate=0.1)


@pytest.fixture
def folder(detector: Detector, tmp_path: Path) -> Path:
    return detector.save(tmp_path / "artifact")


def renew_manifest(folder: Path) -> None:
    """What an attacker can do: hashes of whatever is there."""
    files = {}
    for path in folder.iterdir():
        if path.name != MANIFEST:
            content = path.read_bytes()
            files[path.name] = {
                "sha256": hashlib.sha256(content).hexdigest(),
                "size": len(content),
            }
    (folder / MANIFEST).write_text(json.dumps({"format": "oodcore", "schema": 1, "files": files}))


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    document = json.loads((folder / "detector.json").read_text())
    change(document)
    (folder / "detector.json").write_text(json.dumps(document))
    renew_manifest(folder)


def test_round_trip(detector: Detector, folder: Path) -> None:
    loaded = oodcore.load(folder)
    probe = rows(40, seed=2)
    np.testing.assert_array_equal(loaded.score(probe), detector.score(probe))
    np.testing.assert_array_equal(loaded.p_value(probe), detector.p_value(probe))
    np.testing.assert_array_equal(loaded.predict(probe), detector.predict(probe))
    assert loaded.recipe == detector.recipe
    assert loaded.false_alarm_rate == 0.1


def test_the_state_is_ordinary_safetensors(folder: Path) -> None:
    with safe_open(folder / STATE, framework="pt") as file:
        names = list(file.keys())
        assert all(torch.isfinite(file.get_tensor(name).double()).all() for name in names)
    assert any("whitening" in name for name in names)


def test_rows_that_two_parts_share_are_saved_once(tmp_path: Path) -> None:
    scorer = {"kind": "sum", "scorers": [{"kind": "knn", "k": 1}, {"kind": "knn", "k": 2}]}
    fitted = Detector(scorer=scorer).fit(rows(50))
    with safe_open(fitted.save(tmp_path / "a", store=True) / STATE, framework="pt") as file:
        banks = [n for n in file.keys() if file.get_tensor(n).shape == (50, D)]  # noqa: SIM118
    assert len(banks) == 1


def test_partial_fit_goes_on_after_loading_with_the_store(
    detector: Detector, tmp_path: Path
) -> None:
    again = Detector(scorer=detector.scorer, shapers=detector.shapers).fit(rows(90))
    loaded = oodcore.load(again.save(tmp_path / "a", store=True))
    more, probe = rows(30, seed=5), rows(20, seed=6)
    np.testing.assert_array_equal(
        loaded.partial_fit(more).score(probe), again.partial_fit(more).score(probe)
    )
    bare = oodcore.load(again.save(tmp_path / "b"))
    with pytest.raises(NotFittedError, match="store=True"):
        bare.partial_fit(more)


def test_overwriting(detector: Detector, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="overwrite=True"):
        detector.save(folder)
    detector.save(folder, overwrite=True)
    oodcore.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="thesis.tex"):
        detector.save(precious, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "years of work"


def test_a_failed_save_leaves_the_old_one(
    detector: Detector, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("oodcore.artifact.os.fsync", broken)
    with pytest.raises(OSError, match="disk"):
        detector.save(folder, overwrite=True)
    monkeypatch.undo()
    oodcore.load(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_known_hash_of_the_manifest(folder: Path) -> None:
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    oodcore.load(folder, sha256=digest)
    with pytest.raises(ArtifactError, match="SHA-256"):
        oodcore.load(folder, sha256="0" * 64)


def test_any_damage_is_noticed(folder: Path) -> None:
    draw = random.Random(0)
    for name in (MANIFEST, "detector.json", STATE):
        original = (folder / name).read_bytes()
        for _ in range(150):
            damaged = bytearray(original)
            if draw.random() < 0.3:
                del damaged[draw.randrange(len(damaged)) :]
            else:
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(damaged)
            if name == MANIFEST and json_equal(damaged, original):
                continue
            with pytest.raises(ArtifactError):
                oodcore.load(folder)
        (folder / name).write_bytes(original)
    oodcore.load(folder)


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_damage_with_renewed_hashes_never_crashes(folder: Path) -> None:
    """Either refused as an artifact, or still a detector that scores."""
    draw = random.Random(1)
    probe = rows(5, seed=3)
    outcomes = {"refused": 0, "loaded": 0}
    for name in ("detector.json", STATE):
        original = (folder / name).read_bytes()
        for _ in range(200):
            damaged = bytearray(original)
            for _ in range(draw.choice((1, 1, 4))):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            (folder / name).write_bytes(damaged)
            renew_manifest(folder)
            try:
                loaded = oodcore.load(folder)
            except ArtifactError:
                outcomes["refused"] += 1
                continue
            outcomes["loaded"] += 1
            try:
                assert loaded.score(probe).shape == (5,)
            except oodcore.errors.OodcoreError as error:
                assert "finite" in str(error) or "columns" in str(error)
        (folder / name).write_bytes(original)
    assert outcomes["refused"] > 50
    assert outcomes["loaded"] > 5


@pytest.mark.parametrize("target", ["/etc/passwd", "detector.json"])
def test_links_are_refused(folder: Path, target: str) -> None:
    (folder / STATE).unlink()
    (folder / STATE).symlink_to(target)
    with pytest.raises(ArtifactError, match="regular"):
        oodcore.load(folder)


def test_a_folder_and_a_pipe_are_refused(folder: Path) -> None:
    (folder / "extra").mkdir()
    with pytest.raises(ArtifactError, match="regular"):
        oodcore.load(folder)
    (folder / "extra").rmdir()
    os.mkfifo(folder / "extra")
    with pytest.raises(ArtifactError, match="regular"):
        oodcore.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", "..", "extra.json"])
def test_names_of_other_files_are_refused(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "size": 3}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError):
        oodcore.load(folder)


def test_an_unknown_file_is_refused(folder: Path) -> None:
    (folder / "payload.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ArtifactError, match="names"):
        oodcore.load(folder)
    renew_manifest(folder)
    with pytest.raises(ArtifactError, match="do not belong"):
        oodcore.load(folder)


def header(length: int, text: bytes = b"", body: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + text + body


def entry(dtype: str, shape: list[int], offsets: list[int]) -> bytes:
    return json.dumps({"x": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


BAD_STATES = {
    "empty": b"",
    "short": b"\x01",
    "a header of 80 MB": header(80 * 2**20) + b" " * (80 * 2**20),
    "an absurd header": header(2**63),
    "no JSON": header(4, b"\xff\xfe{}"),
    "a list": header(2, b"[]"),
    "a JSON bomb": header(200_000, b"[" * 100_000 + b"]" * 100_000),
    "a key twice": header(14, b'{"a":1,"a":2}\n'),
    "NaN in the header": header(9, b'{"a":NaN}'),
    "an unknown dtype": header(len(e := entry("C64", [1], [0, 8])), e, bytes(8)),
    "a negative shape": header(len(e := entry("F32", [-1], [0, 4])), e, bytes(4)),
    "a huge shape": header(len(e := entry("F32", [2**40, 2**40], [0, 4])), e, bytes(4)),
    "a float shape": header(len(e := entry("F32", [1.0], [0, 4])), e, bytes(4)),
    "past the end": header(len(e := entry("F32", [4], [0, 16])), e, bytes(8)),
    "a gap": header(len(e := entry("F32", [1], [4, 8])), e, bytes(8)),
    "bytes left over": header(len(e := entry("F32", [1], [0, 4])), e, bytes(12)),
    "many axes": header(len(e := entry("F32", [1] * 100, [0, 4])), e, bytes(4)),
    "other tensors": save({"x": torch.zeros(3)}),
}


@pytest.mark.parametrize("content", BAD_STATES.values(), ids=BAD_STATES)
def test_hostile_states_are_refused(folder: Path, content: bytes) -> None:
    (folder / STATE).write_bytes(content)
    renew_manifest(folder)
    with pytest.raises(ArtifactError):
        oodcore.load(folder)


def test_overlapping_tensors_are_refused(folder: Path) -> None:
    text = json.dumps(
        {
            "x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        }
    ).encode()
    text += b" " * (-len(text) % 8)
    (folder / STATE).write_bytes(header(len(text), text, bytes(12)))
    renew_manifest(folder)
    with pytest.raises(ArtifactError, match="place"):
        oodcore.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        next(t for t in tensors.values() if t.is_floating_point() and t.numel()).flatten()[0] = (
            value
        )

    change_state(folder, change)
    with pytest.raises(ArtifactError, match="finite"):
        oodcore.load(folder)


def change_state(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    with safe_open(folder / STATE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    # Ours are aligned because wide types come first; safetensors' own writer does the same.
    (folder / STATE).write_bytes(save(tensors))
    renew_manifest(folder)


def test_wrong_shapes_are_refused(folder: Path) -> None:
    with safe_open(folder / STATE, framework="pt") as file:
        names = [n for n in file.keys() if n.startswith("learnt")]  # noqa: SIM118
    content = (folder / STATE).read_bytes()
    for name in names:
        (folder / STATE).write_bytes(content)

        def change(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            tensors[name] = torch.ones(7, 11, 2, dtype=tensors[name].dtype)

        change_state(folder, change)
        with pytest.raises(ArtifactError):
            oodcore.load(folder)


def test_a_missing_tensor_is_refused(folder: Path) -> None:
    change_state(folder, lambda tensors: tensors.__delitem__(min(tensors)))
    with pytest.raises(ArtifactError, match="leads nowhere"):
        oodcore.load(folder)


HOSTILE_DOCUMENTS: dict[str, Callable[[dict], object]] = {
    "an unknown scorer": lambda d: d["configuration"].update(scorer={"kind": "nonesuch"}),
    "a field out of range": lambda d: d["configuration"]["scorer"]["scorers"][1].update(k=-3),
    "an unknown field": lambda d: d.update(surprise=1),
    "a missing field": lambda d: d.pop("learnt"),
    "text for a number": lambda d: d["configuration"].update(batch_size="256"),
    "no state": lambda d: d["learnt"].update(scorer={}),
    "another type": lambda d: d.update(type="store"),
    "another schema": lambda d: d.update(schema="1"),
    "huge features": lambda d: d["shape"].update(K=2**40, D=2**40),
    "more shapers": lambda d: d["learnt"]["shapers"].append({}),
    "an odd index": lambda d: d["learnt"]["scorer"]["scorers"]["1"]["bank"].update(metric="evil"),
    "an unknown factory": lambda d: d["learnt"]["scorer"]["scorers"]["1"]["bank"].update(
        factory="rm -rf"
    ),
    "an unknown reference": lambda d: d["learnt"]["scorer"].update(mean={"$pickle": "x"}),
    "an impossible rate": lambda d: d["calibration"].update(false_alarm_rate=7.0),
    "a component of no slot": lambda d: d["components"].append(["os", "system", "x", "1"]),
}


@pytest.mark.parametrize("change", HOSTILE_DOCUMENTS.values(), ids=HOSTILE_DOCUMENTS)
def test_hostile_documents_are_refused(folder: Path, change: Callable[[dict], object]) -> None:
    edit(folder, change)
    with pytest.raises(ArtifactError):
        oodcore.load(folder)


def test_a_newer_schema_says_what_to_do(folder: Path) -> None:
    edit(folder, lambda d: d.update(schema=99))
    with pytest.raises(ArtifactError, match="upgrade"):
        oodcore.load(folder)


def test_a_missing_plugin_is_named_with_the_command(folder: Path) -> None:
    edit(folder, lambda d: d["components"].append(["scorer", "gone", "oodcore-gone", "2.0"]))
    with pytest.raises(ArtifactError, match="pip install 'oodcore-gone==2.0'"):
        oodcore.load(folder)


def test_a_deep_document_is_refused(folder: Path) -> None:
    (folder / "detector.json").write_text("[" * 100_000 + "]" * 100_000)
    renew_manifest(folder)
    with pytest.raises(ArtifactError, match="nested"):
        oodcore.load(folder)


def test_an_extractor_runs_only_what_is_allowed(tmp_path: Path) -> None:
    name = "oodcore_plugins.networks:mlp"
    model = {"kind": "torch", "factory": name, "arguments": {"inputs": 4, "classes": 3}}
    fitted = Detector(model, scorer="energy")
    folder = fitted.save(tmp_path / "a")
    with pytest.raises(ArtifactError, match=name):
        oodcore.load(folder)
    with pytest.raises(ArtifactError, match="networks:mlp"):
        oodcore.load(folder, allow=["os:system"])
    probe = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    loaded = oodcore.load(folder, allow=[name])
    np.testing.assert_array_equal(loaded.score(probe), fitted.score(probe))
    edit(folder, lambda d: d["configuration"]["extractor"].update(factory="os:getcwd"))
    with pytest.raises(ArtifactError, match="os:getcwd"):
        oodcore.load(folder, allow=[name])


def test_a_model_from_memory_is_recognised(tmp_path: Path) -> None:
    model, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    fitted = Detector(model, scorer={"kind": "knn", "k": 2}).fit(inputs)
    folder = fitted.save(tmp_path / "a")
    np.testing.assert_array_equal(
        oodcore.load(folder, model=model).score(inputs), fitted.score(inputs)
    )
    with pytest.raises(ArtifactError, match="other weights"):
        oodcore.load(folder, model=other)
    features = oodcore.FeatureModel.wrap(model)(inputs)
    np.testing.assert_array_equal(oodcore.load(folder).score(features), fitted.score(inputs))


def test_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    class Local(oodcore.Scorer):
        kind = "local"

        def needs(self) -> frozenset[str]:
            return frozenset({"logits"})

        def score(self, features: Features, state: object) -> torch.Tensor:
            return features.logits[:, 0]

    with pytest.raises(PluginError, match="not registered"):
        Detector(scorer=Local()).save(tmp_path / "a")
    with pytest.raises(NotFittedError, match="fit"):
        Detector(scorer="knn").save(tmp_path / "b")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match="list"):
        oodcore.load(tmp_path, allow="a:b")


def test_things_that_are_no_artifacts(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a folder"):
        oodcore.load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="not an artifact"):
        oodcore.load(tmp_path)
    store = oodcore.FeatureStore(statistics=[oodcore.statistics.ClassMoments()])
    store.update(rows(10)).save(tmp_path / "store")
    with pytest.raises(ArtifactError, match="not a detector"):
        oodcore.load(tmp_path / "store")


class Layered(oodcore.Scorer):
    """Reads a layer with a weight of the layer's own type, and keeps a statistic of its own."""

    kind = "layered"

    def needs(self) -> frozenset[str]:
        return frozenset({"layers.narrow"})

    def statistics(self) -> tuple[oodcore.Statistic, ...]:
        return (Counted(),)

    def fit(self, store: oodcore.FeatureStore) -> dict[str, torch.Tensor]:
        return {"weight": torch.ones(2, dtype=torch.float16), "count": store[Counted()]["count"]}

    def score(self, features: Features, state: dict[str, torch.Tensor]) -> torch.Tensor:
        return (features.layers["narrow"] @ state["weight"]).double()


class Counted(oodcore.Statistic):
    """How many rows there were."""

    kind = "counted"

    def needs(self) -> frozenset[str]:
        return frozenset({"layers.narrow"})

    def init(self, shape: oodcore.Shape) -> dict[str, torch.Tensor]:
        return {"count": torch.zeros((), dtype=torch.float64)}

    def update(self, state: dict[str, torch.Tensor], features: Features) -> dict[str, torch.Tensor]:
        return {"count": state["count"] + len(features)}

    def merge(
        self, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        return {"count": a["count"] + b["count"]}


class LayeredPlugin:
    @oodcore.hookimpl
    def register_scorers(self, register: Callable[[type], None]) -> None:
        register(Layered)


class CountedPlugin:
    @oodcore.hookimpl
    def register_statistics(self, register: Callable[[type], None]) -> None:
        register(Counted)


def test_a_layer_is_tried_in_its_own_type_and_a_stores_statistics_are_plugins_too(
    tmp_path: Path,
) -> None:
    train = Features(layers={"narrow": torch.ones(9, 2).half()})
    with oodcore.registry.using(LayeredPlugin()):
        fitted = Detector(scorer="layered").fit(train)
        loaded = oodcore.load(fitted.save(tmp_path / "a"))
        np.testing.assert_array_equal(loaded.score(train), fitted.score(train))
        with pytest.raises(PluginError, match="the statistic 'counted' is not registered"):
            fitted.save(tmp_path / "b", store=True)
        with oodcore.registry.using(CountedPlugin()):
            fitted.save(tmp_path / "b", store=True)
        with pytest.raises(ArtifactError, match="the statistic 'counted' was registered by hand"):
            oodcore.load(tmp_path / "b")


def test_a_state_inside_what_passes_through_the_model_is_tried(tmp_path: Path) -> None:
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    scorer = {"kind": "perturbed", "scorer": "mahalanobis"}
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    folder = Detector(model, scorer=scorer).fit(inputs).save(tmp_path / "a")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["learnt.scorer.scorer.means"] = torch.ones(7, 2, dtype=torch.float64)

    change_state(folder, change)
    with pytest.raises(ArtifactError, match="the state does not fit"):
        oodcore.load(folder)


HOSTILE_STORES: dict[str, Callable[[dict], object]] = {
    "no example": lambda s: s["example"].update(columns={}, types={}),
    "fewer places": lambda s: s["places"].clear(),
    "no states": lambda s: s["stores"]["0"].update(states={}),
    "other statistics": lambda s: s["stores"]["0"].update(statistics=[{"kind": "bank"}]),
    "text for a number": lambda s: s["stores"]["0"].update(rows="90"),
    "no spool": lambda s: s.update(spool=None),
    "a spool too many": lambda s: s.update(held_spool=s["spool"]),
    "other rows": lambda s: s.update(rows=91),
    "no columns": lambda s: s["spool"].update(columns={}),
    "columns changed": lambda s: s["spool"]["columns"].update(ids=s["spool"]["columns"]["logits"]),
    "a type of none": lambda s: s["spool"]["types"].update(embeddings="Tensor"),
    "a head of text": lambda s: s["spool"]["head"].update(scale="1"),
    "no weight": lambda s: s["spool"]["head"].update(tensors={}),
    "absurd classes": lambda s: s.update(classes=2**70),
    "other labelling": lambda s: s["stores"]["0"].update(labelling="tea leaves"),
}


@pytest.mark.parametrize("change", HOSTILE_STORES.values(), ids=HOSTILE_STORES)
def test_hostile_stores_are_refused(
    change: Callable[[dict], object], detector: Detector, tmp_path: Path
) -> None:
    folder = detector.save(tmp_path / "a", store=True)
    oodcore.load(folder).partial_fit(rows(9))
    edit(folder, lambda d: change(d["store"]))
    with pytest.raises(ArtifactError):
        oodcore.load(folder)


def test_labels_set_aside_are_those_of_classes(detector: Detector, tmp_path: Path) -> None:
    folder = detector.save(tmp_path / "a", store=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["store.spool.columns.labels"][50] = 2**40

    change_state(folder, change)
    with pytest.raises(ArtifactError, match="row 50 has the label"):
        oodcore.load(folder)


@pytest.mark.parametrize(
    "origin",
    [
        ["scorer", "gone", "x'; rm -rf ~ #", "1.0"],
        ["scorer", "gone", "oodcore-gone", "1.0' evil 'x"],
        ["scorer", "gone", "--index-url=http://x", "1"],
    ],
)
def test_a_command_to_paste_is_no_more_than_a_name_and_a_version(
    origin: list[str], folder: Path
) -> None:
    edit(folder, lambda d: d["components"].append(origin))
    with pytest.raises(ArtifactError, match="no distribution") as error:
        oodcore.load(folder)
    assert "pip" not in str(error.value)


def test_many_references_do_not_fill_the_memory(detector: Detector, tmp_path: Path) -> None:
    folder = detector.save(tmp_path / "a", store=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["store.stores.0.states.0.big"] = torch.zeros(2**20)

    change_state(folder, change)
    again = {f"a{n}": {"$tensor": "store.stores.0.states.0.big"} for n in range(20_000)}
    edit(folder, lambda d: d["store"]["stores"]["0"]["states"]["0"].update(again))
    with pytest.raises(ArtifactError, match="too many references"):
        oodcore.load(folder)


def test_a_device_of_another_machine(tmp_path: Path) -> None:
    name = "oodcore_plugins.networks:mlp"
    model = {"kind": "torch", "factory": name, "arguments": {"inputs": 4, "classes": 3}}
    fitted = Detector(model, scorer="energy")
    folder = fitted.save(tmp_path / "a")
    inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    expected = fitted.score(inputs)
    for device in ("cuda:99", "meta", "warp"):
        edit(folder, lambda d, device=device: d["configuration"].update(device=device))
        loaded = oodcore.load(folder, allow=[name])
        np.testing.assert_array_equal(loaded.score(inputs), expected)


@pytest.mark.parametrize("workers", [-1, 10**6])
def test_absurd_workers_are_refused(workers: int, folder: Path) -> None:
    edit(folder, lambda d: d["configuration"].update(num_workers=workers))
    with pytest.raises(ArtifactError, match="num_workers"):
        oodcore.load(folder)


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    fitted = Detector(scorer="mahalanobis").fit(rows(30))
    folder = oodcore.Ensemble({"a": fitted, "b": fitted}).save(tmp_path / "a")
    edit(folder, lambda d: d["members"][1].update(name="a"))
    with pytest.raises(ArtifactError, match="one name"):
        oodcore.load(folder)
