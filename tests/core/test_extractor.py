"""FeatureModel: inputs, wrappers, threads, fingerprints."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from toy_models import (
    CLASSES,
    MLP,
    WIDTH,
    Convolutions,
    Mapped,
    Texts,
    assert_untouched,
    drawn,
    mixed_modes,
    seeded,
    state,
)

from oodcore import Extractor, Features, Head
from oodcore.capture import _LOCKS
from oodcore.errors import ConfigurationError, DataError
from oodcore.extractor import FeatureModel
from oodcore.preprocess import Preprocess


def test_mappings_are_keyword_arguments():
    module = seeded(Mapped())
    model = FeatureModel.wrap(module)
    batch = {
        "input_ids": torch.tensor([[1, 2, 3], [4, 5, 0]]),
        "attention_mask": torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64),
    }
    features = model(batch)
    torch.testing.assert_close(features.logits, module(**batch)["logits"])
    assert features.inputs["input_ids"].dtype == torch.int64
    assert features.inputs["attention_mask"].dtype == torch.float32
    assert batch["attention_mask"].dtype == torch.float64
    assert model.rows_seen == len(features) == 2
    assert torch.equal(features.rerun(features.inputs).logits, features.logits)


def test_texts_are_a_list():
    module = seeded(Texts())
    texts = ("banana", "x")
    features = FeatureModel.wrap(module)(texts)
    torch.testing.assert_close(features.logits, module(list(texts)))
    assert features.inputs == ["banana", "x"]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_arrays_are_tensors(dtype):
    module = seeded(nn.Sequential(nn.Flatten(), MLP())) if dtype != np.int64 else Mapless()
    array = np.arange(12).reshape(2, 6).astype(dtype)
    array.flags.writeable = False
    features = FeatureModel.wrap(module)(array[:, ::-1])
    expected = torch.tensor(array[:, ::-1].copy())
    expected = expected.float() if dtype != np.int64 else expected
    torch.testing.assert_close(features.inputs, expected)


class Mapless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(12, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.fc(self.embedding(x).mean(1))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (3, "not a int"),
        ({}, "not a mapping of nothing"),
        ({"x": "text"}, "not a mapping of x: str"),
        ([1, 2], "not a list of int"),
        (np.array(["a"]), "not an array of <U1"),
        (torch.tensor(1.0), "a single number"),
    ],
)
def test_other_inputs_are_refused(inputs, message):
    with pytest.raises(DataError, match=message):
        FeatureModel.wrap(MLP())(inputs)


@pytest.mark.parametrize(
    ("inputs", "told"),
    [
        (
            drawn(2, 1, 6, 6),
            r"Convolutions fails on inputs \[2, 1, 6, 6\] \(float32\): Given groups",
        ),
        (drawn(2, WIDTH), r"on inputs \[2, 6\] \(float32\).*'preprocess'"),
        ({"pixels": drawn(2, 3, 6, 6)}, r"on inputs pixels \[2, 3, 6, 6\].*'pixels'"),
        (["a", "b"], "on inputs 2 texts"),
    ],
)
def test_inputs_that_a_model_fails_on_are_named(inputs, told):
    module = mixed_modes(seeded(Convolutions()))
    before = state(module)
    with pytest.raises(DataError, match=told) as error:
        FeatureModel.wrap(module)(inputs)
    assert isinstance(error.value.__cause__, RuntimeError | TypeError)
    assert_untouched(module, before)


def test_what_a_model_inside_a_model_says_goes_through():
    inner = FeatureModel.wrap(seeded(MLP()))

    class Outer(nn.Module):
        def forward(self, x):
            return inner(x, edit={"nowhere": torch.neg}).logits

    with pytest.raises(ConfigurationError, match="no layer 'nowhere'"):
        FeatureModel.wrap(Outer(), head=None)(drawn(2, WIDTH))


def test_preprocessing_of_texts_is_refused():
    model = FeatureModel.wrap(Texts(), preprocess=Preprocess(size=3))
    with pytest.raises(DataError, match="not texts"):
        model(["a"])


def test_a_model_that_writes_to_its_inputs_gets_copies():
    class Writer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            return self.fc(x.mul_(2.0))

    module = seeded(Writer())
    x = drawn(5, WIDTH)
    given = x.clone()
    model = FeatureModel.wrap(module)
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            features = model(x)
            assert torch.equal(x, given)
            assert torch.equal(features.inputs, given)
            assert torch.equal(features.rerun(features.inputs).logits, features.logits)
    inputs = given.clone().requires_grad_()
    model(inputs).logits.sum().backward()
    assert torch.equal(inputs.grad, 2 * module.fc.weight.sum(0).expand(5, -1))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "both": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_are_taken_off(name):
    module = seeded(MLP()).eval()
    wrapped = WRAPPERS[name](module)
    x = drawn(5, WIDTH)
    model = FeatureModel.wrap(wrapped, layers=["first"])
    assert model.module is module
    torch.testing.assert_close(model(x).logits, module(x))
    assert model.fingerprint() == FeatureModel.wrap(module).fingerprint()


def test_distributed_data_parallel_is_taken_off():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        module = seeded(MLP()).eval()
        wrapped = nn.parallel.DistributedDataParallel(module)
        model = FeatureModel.wrap(wrapped)
        assert model.module is module
        torch.testing.assert_close(model(drawn(5, WIDTH)).logits, module(drawn(5, WIDTH)))
    finally:
        torch.distributed.destroy_process_group()


def test_threads_take_turns():
    module = mixed_modes(seeded(Convolutions()))
    before = state(module)
    quiet = copy.deepcopy(module).eval()
    models = [FeatureModel.wrap(module, layers=["conv"]), FeatureModel.wrap(module, layers=["bn"])]
    batches = [drawn(2 + number, 3, 6, 6, seed=number) for number in range(4)]
    expected = [quiet(x).detach() for x in batches]
    start = threading.Barrier(4)

    def work(number):
        model, x = models[number % 2], batches[number]
        start.wait()
        for _ in range(20):
            FeatureModel.wrap(module, head="fc")  # reads the head while others run
            with torch.no_grad():
                features = model(x)
                negated = features.rerun(x, edit={"fc": torch.neg})
            torch.testing.assert_close(features.logits, expected[number])
            torch.testing.assert_close(negated.logits, -expected[number])
            assert set(features.layers) == set(model.layers)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert_untouched(module, before)
    assert sum(model.rows_seen for model in models) == 20 * 2 * sum(map(len, batches))


def test_locks_do_not_keep_models_alive():
    gc.collect()
    count = len(_LOCKS)
    model = FeatureModel.wrap(MLP())
    model(drawn(2, WIDTH))
    assert len(_LOCKS) == count + 1
    del model
    gc.collect()
    assert len(_LOCKS) <= count


def test_fingerprints():
    module = seeded(Convolutions())
    model = FeatureModel.wrap(module)
    print_ = model.fingerprint()
    assert len(print_) == 64
    model(drawn(2, 3, 6, 6))
    module.eval()
    assert model.fingerprint() == print_
    assert FeatureModel.wrap(copy.deepcopy(module), layers=["bn"]).fingerprint() == print_
    others = {print_}
    step = Preprocess(size=8)
    others.add(FeatureModel.wrap(module, preprocess=step).fingerprint())
    others.add(FeatureModel.wrap(copy.deepcopy(module).double()).fingerprint())
    for change in ("fc.bias", "bn.running_mean", "bn.num_batches_tracked"):
        changed = copy.deepcopy(module)
        changed.state_dict()[change].view(-1)[0] += 1
        others.add(FeatureModel.wrap(changed).fingerprint())
    reshaped = copy.deepcopy(module)
    reshaped.fc.weight.data = reshaped.fc.weight.data.reshape(5, 4)
    others.add(FeatureModel.wrap(reshaped).fingerprint())
    assert len(others) == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.float16])
def test_fingerprints_of_any_type(dtype):
    module = nn.Module()
    module.register_buffer("none", torch.zeros(0, dtype=dtype))
    module.register_buffer("one", torch.ones((), dtype=dtype))
    module.register_buffer("turned", torch.ones(2, 3, dtype=dtype).T)
    assert FeatureModel.wrap(module).fingerprint() == FeatureModel.wrap(module).fingerprint()


def test_fingerprints_cover_a_head_that_was_given():
    module = nn.Flatten()
    heads = [
        Head(torch.ones(3, WIDTH)),
        Head(torch.zeros(3, WIDTH)),
        Head(torch.ones(3, WIDTH), torch.ones(3)),
        Head(torch.ones(3, WIDTH), scale=2.0),
        Head(torch.ones(3, WIDTH), normalize_features=True),
    ]
    models = [FeatureModel.wrap(module, head=head) for head in [*heads, None]]
    assert len({model.fingerprint() for model in models}) == 6
    again = FeatureModel.wrap(module, head=Head(torch.ones(3, WIDTH)))
    assert again.fingerprint() == models[0].fingerprint()


def test_identity_is_the_same_for_copies_that_capture_other_layers():
    module, head = nn.Flatten(), Head(torch.ones(3, WIDTH))
    models = [
        FeatureModel.wrap(module, head=head),
        FeatureModel.wrap(module, head=None),
        FeatureModel.wrap(module, head=Head(torch.ones(3, WIDTH))),
        FeatureModel.wrap(nn.Flatten(), head=head),
        FeatureModel.wrap(module, head=head, preprocess=Preprocess(size=3)),
    ]
    assert len({model.identity() for model in models}) == 5
    assert models[0].with_layers([""]).identity() == models[0].identity()
    assert FeatureModel.wrap(module, head=head).identity() == models[0].identity()


def test_what_a_model_gives():
    x = drawn(2, WIDTH)
    for head in ("auto", "fc", None):
        model = FeatureModel.wrap(MLP(), head=head)
        features = model(x)
        names = ("embeddings", "logits", "head", "inputs")
        given = {name for name in names if getattr(features, name) is not None}
        assert model.gives == given
        assert model.modules == (model.module,)
        assert model.title == "MLP"


def test_prepared_inputs_are_what_rerun_takes():
    step = Preprocess(size=4, mean=(0.5,) * 3)
    model = FeatureModel.wrap(seeded(Convolutions()), preprocess=step)
    x = np.random.default_rng(0).random((2, 3, 6, 6))
    prepared = model.prepared(x)
    assert prepared.dtype == torch.float32
    torch.testing.assert_close(prepared, step(torch.tensor(x)).float())
    assert torch.equal(model.rerun(prepared).logits, model(x).logits)


def test_devices():
    model = FeatureModel.wrap(seeded(MLP()))
    assert model.device == torch.device("cpu")
    assert FeatureModel.wrap(nn.Identity(), head=None).device == torch.device("cpu")
    before = model.fingerprint()
    assert model.to("cpu") is model
    assert model.fingerprint() == before
    moved = FeatureModel.wrap(MLP()).to("meta")
    assert moved.device == torch.device("meta")


def test_only_modules_are_wrapped():
    with pytest.raises(ConfigurationError, match=r"wraps a torch.nn.Module, not a function"):
        FeatureModel.wrap(lambda x: x)


def test_it_is_no_module():
    assert not isinstance(FeatureModel.wrap(MLP()), nn.Module)
    assert "MLP" in repr(FeatureModel.wrap(MLP()))


def test_an_extractor_is_a_component():
    class Memory(Extractor):
        kind: ClassVar[str] = "memory"

        def load(self) -> FeatureModel:
            return FeatureModel.wrap(MLP(), preprocess=self.preprocess)

    assert Memory().code() == ()
    assert Memory().preprocess is None
    given = Memory.model_validate({"kind": "memory", "preprocess": {"size": 3, "mean": [0]}})
    assert given == Memory.model_validate(given.dump())
    assert given.load().preprocess == Preprocess(size=3, mean=(0.0,))
    assert isinstance(Memory().load()(drawn(2, WIDTH)), Features)


def test_a_copy_and_a_pickle_are_the_same_model():
    model = FeatureModel.wrap(seeded(MLP()), layers=["first"])
    x = drawn(5, WIDTH)
    logits = model(x).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x).logits, logits)
        assert other.fingerprint() == model.fingerprint()
        assert other.rows_seen == 10
    assert model.rows_seen == 5


def test_a_scripted_module_is_an_encoder():
    module = seeded(MLP())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        scripted = torch.jit.script(module)
    x = drawn(5, WIDTH)
    features = FeatureModel.wrap(scripted, head=None)(x)
    torch.testing.assert_close(features.embeddings, module.eval()(x))
    assert scripted.training
    with pytest.raises(ConfigurationError, match="cannot find the head"):
        FeatureModel.wrap(scripted)(x)
