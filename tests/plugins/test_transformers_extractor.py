"""The extractor kind "transformers": classifiers of images and texts, from tiny configurations."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

import oodcore
from oodcore.component import faults
from oodcore.errors import ArtifactError, ConfigurationError, DataError, ExtraError
from oodcore.extractor import Extractor
from oodcore.preprocess import Preprocess
from oodcore_plugins.transformers_extractor import TransformersExtractor
from oodcore_plugins.transformers_extractor.processor import preprocessing

transformers = pytest.importorskip("transformers", reason="needs the extra 'text'")

SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
}
VIT = {**SMALL, "model_type": "vit", "image_size": 32, "patch_size": 8, "num_labels": 5}
BERT = {
    **SMALL,
    "model_type": "bert",
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "num_labels": 4,
}
SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": 4,
    "num_labels": 5,
}
RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "num_labels": 5,
}
DISTILBERT = {
    "model_type": "distilbert",
    "dim": 16,
    "n_layers": 1,
    "n_heads": 2,
    "hidden_dim": 32,
    "vocab_size": 32,
    "max_position_embeddings": 16,
    "num_labels": 4,
}
WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *["a", "cat", "dog", "sat", "on", "the", "mat", "bird", "sky", "##s"],
]
TEXTS = ["the cat sat on the mat", "a dog", "birds", ""]
PROCESSOR = {
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 3,
    "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a test asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def images(rows: int = 4, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, 3, side, side, generator=torch.Generator().manual_seed(seed))


def written(folder: Path, configuration: dict[str, Any], **files: Any) -> Path:
    """A folder as ``save_pretrained`` writes it, and further files."""
    TransformersExtractor(configuration=configuration).load().module.save_pretrained(folder)
    for name, content in files.items():
        suffix = "txt" if isinstance(content, list) else "json"
        text = "\n".join(content) if suffix == "txt" else json.dumps(content)
        (folder / f"{name}.{suffix}").write_text(text)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    vocabulary = {
        "vocab": WORDS,
        "tokenizer_config": {"tokenizer_class": "BertTokenizer", "model_max_length": 8},
    }
    return {
        "vit": written(root / "vit", VIT, preprocessor_config=PROCESSOR),
        "bert": written(root / "bert", BERT, **vocabulary),
    }


@pytest.fixture
def vit(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made["vit"], tmp_path / "vit"))


@pytest.fixture
def bert(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["bert"], tmp_path / "bert"))


def changed(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_image_classifier_gives_what_transformers_gives(vit: Path) -> None:
    extractor = oodcore.registry.build("extractor", {"kind": "transformers", "path": str(vit)})
    assert isinstance(extractor, TransformersExtractor)
    model = extractor.load()
    features = model(images())
    peer = transformers.AutoModelForImageClassification.from_pretrained(vit)
    pixels = Preprocess(
        size=32, crop=32, interpolation="bicubic", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4)
    )(images())
    with torch.no_grad():
        output = peer.eval()(pixels, output_hidden_states=True)
        token = peer.base_model(pixels).last_hidden_state[:, 0]
    torch.testing.assert_close(features.logits, output.logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.embeddings, token, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.inputs, pixels)
    assert model.head_name(images()) == "classifier"


def test_a_text_classifier_gives_what_transformers_gives(bert: Path) -> None:
    model = TransformersExtractor(path=bert).load()
    features = model(TEXTS)
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    for row, text in enumerate(TEXTS):
        tokens = tokenizer(text, truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            logits = peer(**tokens).logits[0]
            pooled = peer.base_model(**tokens).pooler_output[0]
        torch.testing.assert_close(features.logits[row], logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(features.embeddings[row], pooled, rtol=1e-5, atol=1e-6)


CONFIGURATIONS = [
    VIT,
    SWIN,
    RESNET,
    {**VIT, "model_type": "deit"},
    {**VIT, "model_type": "beit"},
    BERT,
    DISTILBERT,
    {**BERT, "model_type": "roberta"},
    {**BERT, "model_type": "electra"},
]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c["model_type"])
def test_the_head_makes_the_logits_of_the_embeddings(configuration: dict[str, Any]) -> None:
    model = TransformersExtractor(configuration=configuration).load()
    inputs: Any = images()
    if "vocab_size" in configuration:
        ids = torch.randint(5, 32, (4, 6), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    features = model(inputs)
    assert features.embeddings.shape == (4, 16)
    assert features.logits.shape == (4, configuration["num_labels"])
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    alone = [
        {name: part[:1] for name, part in inputs.items()}
        if isinstance(inputs, dict)
        else inputs[:1]
    ]
    torch.testing.assert_close(model(alone[0]).logits, features.logits[:1], rtol=1e-5, atol=1e-6)


def test_random_weights_come_from_the_seed_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    prints = [
        TransformersExtractor(configuration=VIT, seed=seed).load().fingerprint()
        for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_reading_a_folder_draws_nothing_and_says_nothing(
    vit: Path, bert: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    before = torch.get_rng_state()
    for path in (vit, bert):
        TransformersExtractor(path=path).load()
    assert torch.equal(torch.get_rng_state(), before)
    assert (logs.get_verbosity(), logs.is_progress_bar_enabled()) == (level, bars)
    assert capfd.readouterr() == ("", "")


def test_a_model_does_not_change_with_its_file(vit: Path) -> None:
    model = TransformersExtractor(path=vit).load()
    before = model(images()).logits
    with open(vit / "model.safetensors", "r+b") as file:
        file.seek(-2000, 2)
        file.write(bytes(2000))
    assert torch.equal(model(images()).logits, before)


def test_layers_and_the_head_may_be_named(vit: Path) -> None:
    names = [name for name, _ in TransformersExtractor(path=vit).load().module.named_modules()]
    block = next(name for name in names if name.endswith(".0"))
    model = TransformersExtractor(path=vit, head="classifier", layers=(block,)).load()
    assert model(images()).layers[block].shape == (4, 17, 16)
    with pytest.raises(ConfigurationError, match="no layer 'fc'"):
        TransformersExtractor(path=vit, head="fc").load()


def test_weights_become_float32(vit: Path) -> None:
    full = TransformersExtractor(path=vit).load()(images()).logits
    weights = {name: value.half() for name, value in load_file(vit / "model.safetensors").items()}
    save_file(weights, vit / "model.safetensors")
    changed(vit / "config.json", dtype="float16")
    model = TransformersExtractor(path=vit).load()
    assert {value.dtype for value in model.module.parameters()} == {torch.float32}
    torch.testing.assert_close(model(images()).logits, full, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "beit"])
def test_the_last_norm_is_taken_away(kind: str) -> None:
    configuration = SWIN if kind == "swin" else {**VIT, "model_type": kind}
    whole = TransformersExtractor(configuration=configuration).load()
    bare = TransformersExtractor(configuration=configuration, drop_last_norm=True).load()
    with torch.no_grad():
        states = whole.module(images(), output_hidden_states=True).hidden_states[-1]
    before = {"swin": states.mean(1), "beit": states[:, 1:].mean(1)}.get(kind, states[:, 0])
    features = bare(images())
    torch.testing.assert_close(features.embeddings, before, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(features.head(features.embeddings), features.logits)
    assert not torch.allclose(features.embeddings, whole(images()).embeddings, rtol=1e-2)
    assert bare.fingerprint() != whole.fingerprint()


def test_a_model_without_a_last_norm_keeps_what_it_has() -> None:
    with pytest.raises(ConfigurationError, match=r"ResNet.* no single layer norm .*; it has none"):
        TransformersExtractor(configuration=RESNET, drop_last_norm=True).load()


@pytest.mark.parametrize("side", [24, 48])
def test_position_embeddings_are_interpolated_to_another_size(vit: Path, side: int) -> None:
    plain = Preprocess()
    model = TransformersExtractor(path=vit, image_size=side, preprocess=plain).load()
    peer = transformers.AutoModelForImageClassification.from_pretrained(vit).eval()
    with torch.no_grad():
        wanted = peer(images(side=side), interpolate_pos_encoding=True).logits
    features = model(images(side=side))
    torch.testing.assert_close(features.logits, wanted, rtol=1e-5, atol=1e-6)
    again = features.rerun({"pixel_values": features.inputs})
    torch.testing.assert_close(again.logits, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match=rf"image_size is {side}, and the images are .*32, 32"):
        model(images())
    prints = {
        TransformersExtractor(path=vit, image_size=size, preprocess=plain).load().fingerprint()
        for size in (None, 24, 48)
    }
    assert len(prints) == 3


def test_an_image_size_that_the_model_cannot_take(vit: Path) -> None:
    with pytest.raises(ConfigurationError, match="image_size is 50, which is no multiple .* of 8"):
        TransformersExtractor(path=vit, image_size=50).load()
    levit = {"model_type": "levit", "image_size": 64, "hidden_sizes": [16, 16, 16]}
    with pytest.raises(ConfigurationError, match="Levit.* does not take images of 128 pixels"):
        TransformersExtractor(configuration=levit, image_size=128).load()


def test_a_convolutional_model_takes_any_size() -> None:
    model = TransformersExtractor(configuration=RESNET, image_size=40).load()
    plain = TransformersExtractor(configuration=RESNET).load()
    torch.testing.assert_close(model(images(side=40)).logits, plain(images(side=40)).logits)


@pytest.mark.parametrize(
    ("said", "size", "wanted"),
    [
        ({}, None, Preprocess()),
        ({}, 48, Preprocess(size=48, crop=48)),
        (
            PROCESSOR,
            None,
            Preprocess(
                size=32,
                crop=32,
                interpolation="bicubic",
                mean=(0.5, 0.4, 0.3),
                std=(0.2, 0.3, 0.4),
            ),
        ),
        (
            {"size": {"shortest_edge": 438}, "resample": 3, "crop_size": 384},
            480,
            Preprocess(size=548, crop=480, interpolation="bicubic"),
        ),
        (
            {"do_resize": True, "size": 256, "resample": 2, "crop_size": 224},
            None,
            Preprocess(size=256, crop=224),
        ),
        (
            {"size": 256, "resample": 0, "do_center_crop": False, "crop_size": 224},
            None,
            Preprocess(size=256, crop=256, interpolation="nearest"),
        ),
        ({"size": {"shortest_edge": 64}, "resample": 2}, None, Preprocess(size=64)),
        (
            {"size": {"shortest_edge": 224}, "resample": 3, "crop_pct": 0.875},
            None,
            Preprocess(size=256, crop=224, interpolation="bicubic"),
        ),
        (
            {"size": {"shortest_edge": 384}, "resample": 3, "crop_pct": 0.875},
            None,
            Preprocess(size=384, crop=384, interpolation="bicubic"),
        ),
        ({"do_resize": False, "size": 7, "do_normalize": False}, None, Preprocess()),
    ],
)
def test_preprocessing_is_read_from_the_folder(
    tmp_path: Path, said: dict[str, Any], size: int | None, wanted: Preprocess
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    assert preprocessing(tmp_path, size) == wanted


@pytest.mark.parametrize(
    "said",
    [
        {"size": 32},
        {"size": 32, "resample": 1},
        {"size": {"height": 32, "width": 16}, "resample": 2},
        {"size": {"longest_edge": 32}, "resample": 2},
        {"size": "32", "resample": 2},
        {"do_resize": True},
        {"do_normalize": True},
        {"image_mean": [0.5, 0.5], "image_std": [0.5]},
        {"image_mean": [0.5], "image_std": [0.0]},
    ],
)
def test_preprocessing_that_oodcore_does_not_do_is_an_error(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(ConfigurationError, match="give the extractor a preprocess"):
        preprocessing(tmp_path)


def test_preprocessing_of_ones_own_goes_first(vit: Path) -> None:
    own = Preprocess(size=32)
    assert TransformersExtractor(path=vit, preprocess=own).load().preprocess == own
    sized = TransformersExtractor(path=vit, image_size=48).load()
    assert sized(images(side=64)).inputs.shape == (4, 3, 48, 48)
    (vit / "preprocessor_config.json").unlink()
    assert TransformersExtractor(path=vit).load().preprocess is None


def test_the_processor_that_transformers_saves_is_understood(tmp_path: Path) -> None:
    saved = transformers.ViTImageProcessor(size={"height": 16, "width": 16})
    saved.save_pretrained(tmp_path)
    assert preprocessing(tmp_path) == Preprocess(size=16, crop=16, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_a_text_does_not_depend_on_its_batch(bert: Path) -> None:
    model = TransformersExtractor(path=bert).load()
    together = model(TEXTS).embeddings
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(model([text]).embeddings[0], together[row], rtol=1e-5, atol=1e-6)


def test_long_texts_are_cut(bert: Path) -> None:
    model = TransformersExtractor(path=bert).load()
    cut = model(["cat " * 6, "cat " * 60, "cat " * 5])
    torch.testing.assert_close(cut.logits[0], cut.logits[1])
    assert not torch.allclose(cut.logits[0], cut.logits[2], rtol=1e-3, atol=1e-5)
    shorter = TransformersExtractor(path=bert, max_length=4).load()
    assert torch.equal(*shorter(["cat cat", "cat cat dog dog"]).logits)


@pytest.mark.parametrize("configuration", [BERT, DISTILBERT], ids=["bert", "distilbert"])
def test_tokens_pass_as_they_are(bert: Path, configuration: dict[str, Any]) -> None:
    extractor = TransformersExtractor(configuration=configuration, tokenizer=bert)
    model = extractor.load()
    tokens = transformers.AutoTokenizer.from_pretrained(bert)(
        TEXTS, padding=True, return_tensors="pt"
    )
    given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(model(given).logits, model(TEXTS).logits)
    bare = TransformersExtractor(configuration=configuration).load()
    torch.testing.assert_close(bare(given).logits, model(TEXTS).logits)
    with pytest.raises(DataError, match="no tokenizer, so it takes no texts; set .* tokenizer"):
        bare(TEXTS)


def test_a_model_without_a_mask_is_padded_to_the_full_length(bert: Path) -> None:
    fnet = {
        **{key: SMALL[key] for key in ("hidden_size", "num_hidden_layers", "intermediate_size")},
        "model_type": "fnet",
        "vocab_size": 32,
        "max_position_embeddings": 16,
        "num_labels": 4,
    }
    model = TransformersExtractor(configuration=fnet, tokenizer=bert).load()
    together = model(TEXTS).logits
    torch.testing.assert_close(model(TEXTS[1:2]).logits, together[1:2], rtol=1e-5, atol=1e-6)


def test_the_fingerprint_covers_the_tokens(bert: Path) -> None:
    first = TransformersExtractor(path=bert).load().fingerprint()
    assert TransformersExtractor(path=bert).load().fingerprint() == first
    assert TransformersExtractor(path=bert, max_length=8).load().fingerprint() == first
    assert TransformersExtractor(path=bert, max_length=7).load().fingerprint() != first
    swapped = [*WORDS[:5], *reversed(WORDS[5:])]
    (bert / "vocab.txt").write_text("\n".join(swapped))
    assert TransformersExtractor(path=bert).load().fingerprint() != first


def test_lengths_that_do_not_go(bert: Path) -> None:
    with pytest.raises(ConfigurationError, match="takes 16 tokens, and max_length is 17"):
        TransformersExtractor(path=bert, max_length=17).load()
    with pytest.raises(ConfigurationError, match="2 tokens are taken by marks"):
        TransformersExtractor(path=bert, max_length=2).load()
    (bert / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(ConfigurationError, match="does not say how long .* set max_length"):
        TransformersExtractor(path=bert).load()
    assert TransformersExtractor(path=bert, max_length=5).load()(TEXTS).logits.shape == (4, 4)


def test_a_tokenizer_that_is_not_there(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no tokenizer"):
        TransformersExtractor(configuration=BERT, tokenizer=tmp_path / "none").load()
    with pytest.raises(ConfigurationError, match="max_length is the tokenizer's"):
        TransformersExtractor(configuration=BERT, max_length=5).load()
    (bert / "vocab.txt").unlink()
    (bert / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no tokenizer, so it takes no texts"):
        TransformersExtractor(path=bert).load()(TEXTS)


class _Bomb:
    def __reduce__(self) -> Any:
        return (sys.exit, ("a pickle was read",))


def test_pickled_weights_are_not_read(vit: Path) -> None:
    (vit / "model.safetensors").unlink()
    (vit / "pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    with pytest.raises(ConfigurationError, match=r"no model.safetensors; .* not read: save"):
        TransformersExtractor(path=vit).load()


def test_code_in_a_folder_is_not_run(vit: Path) -> None:
    (vit / "mine.py").write_text("raise SystemExit('code was run')")
    names = {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Model"}
    changed(vit / "config.json", auto_map=names)
    TransformersExtractor(path=vit).load()
    changed(vit / "config.json", model_type="mine")
    with pytest.raises(ConfigurationError, match=r"vit: transformers cannot use it"):
        TransformersExtractor(path=vit).load()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_attn_implementation": "someone/kernels"}, "how attention is computed"),
        ({"text_config": [{"attn_implementation": "a/b"}]}, "how attention is computed"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised"),
        ({"architectures": ["ViTModel"], "model_type": "whisper"}, "no classifier of images"),
        ({"hidden_size": 18}, "do not fit its config.json: .* is .* and ViT.* has"),
        ({"num_labels": 7, "id2label": None, "label2id": None}, r"do not fit .* classifier"),
        ({"num_hidden_layers": 3}, "lack .* and .* more of ViTForImageClassification"),
    ],
)
def test_a_configuration_that_does_not_do(vit: Path, values: dict[str, Any], message: str) -> None:
    changed(vit / "config.json", **values)
    with pytest.raises(ConfigurationError, match=message):
        TransformersExtractor(path=vit).load()


def test_an_adapter_is_no_model(vit: Path) -> None:
    (vit / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigurationError, match="adapter; merge it"):
        TransformersExtractor(path=vit).load()


def test_a_model_without_a_trained_head_is_refused(vit: Path) -> None:
    weights = load_file(vit / "model.safetensors")
    rest = {name: value for name, value in weights.items() if "classifier" not in name}
    save_file(rest, vit / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"lack classifier.bias, classifier.weight of ViT"):
        TransformersExtractor(path=vit).load()


def test_weights_that_are_not_used_are_told(vit: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = load_file(vit / "model.safetensors")
    save_file({**weights, "teacher.weight": torch.zeros(3)}, vit / "model.safetensors")
    with caplog.at_level(logging.WARNING, "oodcore"):
        TransformersExtractor(path=vit).load()
    assert "ViTForImageClassification does not use: teacher.weight" in caplog.text


def test_damaged_files_are_named(vit: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no .*config.json; .* nothing is downloaded"):
        TransformersExtractor(path=Path("google/vit-base-patch16-224")).load()
    whole = (vit / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-100], b"\xff" * 8 + whole[8:]):
        (vit / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=r"model.safetensors cannot be read"):
            TransformersExtractor(path=vit).load()
    for damaged in (b"", b"[]", b"{", b"\xff", b"[" * 100_000):
        (vit / "config.json").write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=r"config.json (cannot be read as|is no) JSON"):
            TransformersExtractor(path=vit).load()


def test_weights_in_parts(vit: Path) -> None:
    wanted = TransformersExtractor(path=vit).load().fingerprint()
    weights = load_file(vit / "model.safetensors")
    (vit / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"part-{row % 2}.safetensors" for row, name in enumerate(names)}
    for part in set(places.values()):
        save_file({name: weights[name] for name in names if places[name] == part}, vit / part)
    index = vit / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert TransformersExtractor(path=vit).load().fingerprint() == wanted
    for map_ in ({}, {"a": "../vit/part-0.safetensors"}, {"a": "weights.bin"}, ["part-0"]):
        index.write_text(json.dumps({"weight_map": map_}))
        with pytest.raises(ConfigurationError, match="of its own folder"):
            TransformersExtractor(path=vit).load()
    index.write_text(json.dumps({"weight_map": places}))
    (vit / "part-1.safetensors").unlink()
    with pytest.raises(ConfigurationError, match=r"part-1.safetensors cannot be read"):
        TransformersExtractor(path=vit).load()


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"hidden_size": 16}, "needs a model_type, such as vit"),
        ({"model_type": "vits_"}, "no model_type 'vits_'; did you mean"),
        ({**VIT, "hiden_size": 3}, "a vit has no 'hiden_size'; did you mean 'hidden_size'"),
        ({"model_type": "whisper"}, "no classifier of images or texts of the type 'whisper'"),
        ({"model_type": "perceiver"}, "may classify images or texts; name its class"),
        ({**VIT, "_attn_implementation": "a/b"}, "a vit has no '_attn_implementation'"),
        ({**VIT, "attn_implementation": "a/b"}, "a vit has no 'attn_implementation'"),
        ({**VIT, "num_hidden_layers": "two"}, "configuration: transformers cannot use it"),
    ],
)
def test_a_configuration_of_no_classifier(configuration: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        TransformersExtractor(configuration=configuration).load()


def test_fields_that_are_not_for_such_a_model(bert: Path) -> None:
    for fields in ({"drop_last_norm": True}, {"image_size": 32}, {"preprocess": {"size": 32}}):
        (name,) = fields
        with pytest.raises(ConfigurationError, match=f"classifier of texts.* without {name}"):
            TransformersExtractor(configuration=BERT, **fields).load()
    for fields in ({"max_length": 4}, {"tokenizer": bert}):
        (name,) = fields
        with pytest.raises(ConfigurationError, match=f"classifier of images.* without {name}"):
            TransformersExtractor(configuration=VIT, **fields).load()


def test_a_decoder_has_no_embeddings() -> None:
    gpt = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32}
    model = TransformersExtractor(configuration={**gpt, "pad_token_id": 0}).load()
    ids = torch.ones(3, 4, dtype=torch.int64)
    with pytest.raises(ConfigurationError, match="cannot find the head of GPT2"):
        model({"input_ids": ids, "attention_mask": ids})


def test_it_is_written_as_it_is_read(vit: Path) -> None:
    assert faults(TransformersExtractor, Extractor) is None
    for fields in ({"path": str(vit)}, {"configuration": SWIN, "seed": 3, "image_size": 48}):
        extractor = TransformersExtractor.model_validate(fields)
        dumped = json.loads(json.dumps(extractor.dump()))
        again = oodcore.registry.build("extractor", dumped)
        assert again == extractor
        assert hash(again) == hash(extractor)
        assert extractor.code() == ()
    for fields in ({}, {"path": "a", "configuration": VIT}, {"path": "a", "seed": -1}):
        with pytest.raises(ValidationError):
            TransformersExtractor.model_validate(fields)


def test_without_transformers_the_error_says_how_to_get_it(
    vit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for extractor in (TransformersExtractor(path=vit), TransformersExtractor(configuration=VIT)):
        with pytest.raises(ExtraError, match=r"pip install 'oodcore\[text\]'"):
            extractor.load()


@pytest.mark.parametrize(
    "scorer", [{"kind": "knn", "k": 3}, "odin", {"kind": "perturbed", "scorer": "energy"}]
)
def test_a_detector_of_images_is_saved_and_loaded(vit: Path, tmp_path: Path, scorer: Any) -> None:
    extractor = {"kind": "transformers", "path": str(vit), "image_size": 48, "drop_last_norm": True}
    detector = oodcore.Detector(extractor, scorer=scorer, device="cpu", batch_size=8)
    train, other = images(40, 48), images(30, 48, seed=1)
    labels = torch.arange(40) % 5
    detector.fit((train, labels)).calibrate(other, false_alarm_rate=0.2)
    detector.save(tmp_path / "artifact")
    loaded = oodcore.load(tmp_path / "artifact")
    assert loaded.score(other) == pytest.approx(detector.score(other), rel=1e-6)
    assert (loaded.predict(train) == detector.predict(train)).all()
    weights = load_file(vit / "model.safetensors")
    weights["classifier.bias"] = weights["classifier.bias"] + 1
    save_file(weights, vit / "model.safetensors")
    with pytest.raises(ArtifactError, match="other weights"):
        oodcore.load(tmp_path / "artifact")


def test_odin_moves_images_along_the_gradient(vit: Path) -> None:
    model = TransformersExtractor(path=vit).load()
    scores = {
        epsilon: oodcore.Detector(
            model, scorer={"kind": "odin", "temperature": 10, "epsilon": epsilon}
        ).score(images(8))
        for epsilon in (0, 1e-3)
    }
    assert (scores[1e-3] > scores[0]).all()


def test_a_detector_of_texts_is_saved_and_loaded(bert: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = [f"{'ab'[row % 2]}\tthe {word} sat" for row, word in enumerate(WORDS[5:] * 4)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(rows))
    source = {"kind": "text", "path": str(tmp_path / "train.tsv"), "text": 1, "label": 0}
    detector = oodcore.Detector(
        {"kind": "transformers", "path": str(bert)}, scorer="mahalanobis", device="cpu"
    ).fit(source)
    detector.calibrate({**source, "path": str(tmp_path / "test.tsv")}, false_alarm_rate=0.1)
    detector.save(tmp_path / "artifact")
    loaded = oodcore.load(tmp_path / "artifact")
    assert loaded.score(TEXTS) == pytest.approx(detector.score(TEXTS), rel=1e-6)
    (bert / "vocab.txt").write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]))
    with pytest.raises(ArtifactError, match="other weights"):
        oodcore.load(tmp_path / "artifact")
