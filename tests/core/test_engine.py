"""Engine: where generators stand, how criteria are folded, and graphs that outlive a pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_runs import ALL, Clusters, Mix, Net, Replacing

from oodcore import Memory, Regularizer, Run
from oodcore.data import Batch
from oodcore.engine import Engine
from oodcore.errors import ConfigurationError, DataError
from oodcore.regularizer import TrainModel


class Draws(Regularizer):
    """Notes what it draws in every hook, from its generator and from the global one."""

    kind = "draws"

    def build(self, run):
        self._note("build", torch.rand(2))

    def before(self, step, state):
        self._draw("before", step)

    def criterion(self, rows, labels, inner, step, state):
        self._draw("criterion", step)
        return inner(rows, labels)

    def loss(self, step, state):
        self._draw("loss", step)

    def after(self, step, state):
        self._draw("after", step)

    def finish(self, run, state):
        self._note("finish", torch.rand(2))

    def _draw(self, hook, step):
        self._note(hook, torch.rand(2, generator=step.generator))
        self._note(hook + " (global)", torch.rand(2))

    def _note(self, hook, drawn):
        NOTES.append((hook, tuple(drawn.tolist())))


class DrawsToo(Draws):
    kind = "draws_too"


class Generated(Regularizer):
    """Appends rows that its own module makes."""

    kind = "generated"

    def build(self, run):
        state = Memory()
        state.net = nn.Linear(6, 6)
        return state

    def before(self, step, state):
        return state.net(step.inputs)

    def loss(self, step, state):
        return step.extra.logits.square().mean()


NOTES: list[tuple[str, tuple[float, ...]]] = []


@pytest.fixture(autouse=True)
def forked():
    NOTES.clear()
    with torch.random.fork_rng(devices=[]):
        yield


def engine_of(*regularizers, rank=0, seed=0, rows=4):
    torch.manual_seed(5)
    run = Run(
        model=TrainModel(Net(3, 0.0), "head"),
        classes=3,
        width=5,
        input_shape=(6,),
        rows=rows,
        epochs=2,
        steps_per_epoch=2,
        seed=seed,
        rank=rank,
    )
    return Engine(run, regularizers, lambda epoch: 0.1)


def begin(engine, rows=4):
    inputs = torch.randn(rows, 6, generator=torch.Generator().manual_seed(engine.index))
    engine.begin(inputs, torch.arange(rows) % 3, torch.arange(rows), inputs[:2])


def steps(engine, count, passes=1):
    for _ in range(count):
        begin(engine)
        for _ in range(passes):
            engine.total().backward()
        engine.end()
    return engine


def noted():
    taken = list(NOTES)
    NOTES.clear()
    return taken


def test_every_draw_has_a_place_of_its_own():
    steps(engine_of(Draws(), DrawsToo()), 2).finish()
    drawn = [values for _, values in noted()]
    assert len(drawn) == 2 * (1 + 2 * 8 + 1)
    assert len(set(drawn)) == len(drawn)


def test_another_pass_draws_the_same():
    engine = engine_of(Draws())
    begin(engine)
    engine.total()
    first = noted()[-4:]
    engine.total()
    assert noted() == first
    assert {hook.split()[0] for hook, _ in first} == {"criterion", "loss"}


def test_draws_depend_on_seed_and_rank_and_not_on_who_else_draws():
    def run(*parts, **fields):
        steps(engine_of(*parts, **fields), 1).finish()
        return noted()

    alone = run(Draws())
    assert run(Draws()) == alone
    both = run(Draws(), DrawsToo())
    # All criteria are one function, in which they share the global generator.
    assert {note for note in alone if note[0] != "criterion (global)"} < set(both)
    assert set(alone) <= set(run(Draws(), Mix()))
    assert run(Draws(), seed=1) != alone
    elsewhere = dict(run(Draws(), rank=1))
    for hook, drawn in dict(alone).items():
        alike = hook in ("build", "finish")  # what is not saved for each process is alike in all
        assert (elsewhere[hook] == drawn) == alike, hook


def test_rows_with_a_graph_of_their_own_join_every_pass():
    engine = steps(engine_of(Generated()), 1, passes=2)
    assert engine.states["generated"].net.weight.grad is None


def test_what_replaces_the_loss_is_innermost():
    engine = steps(engine_of(Mix(), Replacing()), 2)
    engine.close(None)
    model, (row,) = engine.run.model, engine.history
    wanted = []
    for index in range(2):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(index))
        logits = model(inputs).logits
        wanted.append((0.9 * 2 + 0.1) * logits.square().mean().item())
    assert row["loss/classification"] == pytest.approx(sum(wanted) / 2, rel=1e-4)


def test_extra_rows_come_back_to_who_brought_them():
    class Marks(Regularizer):
        kind = "a_marks"

        def before(self, step, state):
            return step.inputs[:1] * 2

        def loss(self, step, state):
            assert len(step.extra) == 1
            return step.extra.logits.sum()

    class Others(Regularizer):
        kind = "b_others"

        def before(self, step, state):
            return step.outliers

        def loss(self, step, state):
            assert len(step.extra) == 2
            assert len(step.features) == 4
            return step.extra.logits.mean()

    engine = engine_of(Marks(), Others())
    engine.run.model.network.body[1].eval()
    begin(engine)
    total = engine.total()
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    model = engine.run.model.eval()
    logits = model(inputs).logits
    loss = nn.functional.cross_entropy(logits, torch.arange(4) % 3)
    loss = loss + model(inputs[:1] * 2).logits.sum() + model(inputs[:2]).logits.mean()
    torch.testing.assert_close(total, loss)


def test_a_mapping_of_inputs_may_have_rows_joined():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 3)

        def forward(self, pixels, mask):
            return self.head(pixels * mask)

    class More(Regularizer):
        kind = "more"

        def before(self, step, state):
            return {name: value[:2] for name, value in step.inputs.items()}

        def loss(self, step, state):
            torch.testing.assert_close(step.extra.logits, step.features.logits[:2])
            return step.extra.logits.mean()

    engine = engine_of(More())
    engine.run.model = TrainModel(Named(), "head")
    inputs = {"pixels": torch.randn(4, 6), "mask": torch.ones(4, 6)}
    engine.begin(inputs, torch.arange(4) % 3, torch.arange(4), None)
    engine.total()


def test_rows_of_another_kind_cannot_join():
    class Odd(Regularizer):
        kind = "odd"

        def before(self, step, state):
            return {"pixels": step.inputs}

    engine = engine_of(Odd())
    begin(engine)
    with pytest.raises(DataError, match="Tensor, dict"):
        engine.total()


class Doubled(Regularizer):
    """Views of the rows, from what came before, the rows of the data and a draw."""

    kind = "b_doubled"

    def augment(self, inputs, step):
        VIEWS.append((inputs.clone(), step.inputs.clone()))
        return 2 * inputs + torch.rand((), generator=step.generator)


class Shifted(Doubled):
    kind = "a_shifted"

    def augment(self, inputs, step):
        VIEWS.append((inputs.clone(), step.inputs.clone()))
        return inputs + 1


class Seeing(Regularizer):
    """Notes the rows that the other hooks are told of."""

    kind = "c_seeing"

    def before(self, step, state):
        VIEWS.append(step.inputs)

    def loss(self, step, state):
        VIEWS.append(step.inputs)


VIEWS: list = []


def test_views_are_made_of_views_and_are_the_batch_of_everyone():
    VIEWS.clear()
    engine = engine_of(Doubled(), Shifted(), Seeing())
    begin(engine)
    engine.total()
    engine.total()
    clean = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    (shifted, of_data), (doubled, of_data_too), *seen = VIEWS
    for rows in (shifted, of_data, of_data_too):
        assert torch.equal(rows, clean)
    assert torch.equal(doubled, clean + 1)
    assert len(seen) == 3
    assert all(rows is seen[0] for rows in seen)
    drawn = seen[0] - 2 * (clean + 1)
    assert 0 < float(drawn[0, 0]) < 1
    torch.testing.assert_close(drawn, drawn[:1, :1].expand(4, 6))
    wanted = engine.run.model(seen[0]).logits
    torch.testing.assert_close(engine._steps["c_seeing"].features.logits, wanted)


def test_views_of_what_is_switched_off_are_not_made():
    VIEWS.clear()
    begin(engine_of(Doubled(weight=0), Seeing()))
    clean = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(VIEWS[0], clean)


class Instead(Regularizer):
    """Other rows in place of the batch, with a graph of its own module."""

    kind = "instead"
    replaces_batch = True
    rows: int = 4

    def build(self, run):
        state = Memory()
        state.net = nn.Linear(6, 6)
        return state

    def before(self, step, state):
        return state.net(step.inputs)[: self.rows] if self.rows else None


def test_the_batch_may_be_replaced_and_is_told_of_as_it_was():
    VIEWS.clear()
    engine = engine_of(Instead(), Seeing(), Generated())
    begin(engine)
    engine.total().backward()
    engine.total().backward()
    clean = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(rows, clean) for rows in VIEWS)
    state = engine.states["instead"]
    wanted = engine.run.model(torch.cat([state.net(clean), engine._extra["generated"]])).logits
    features = engine._steps["instead"].features
    torch.testing.assert_close(features.logits, wanted[:4])
    assert features.ids.tolist() == [0, 1, 2, 3]
    assert len(engine._steps["generated"].extra) == 4
    assert engine._steps["instead"].extra is None
    assert state.net.weight.grad is None


def test_a_batch_that_is_not_replaced_is_the_one_of_the_data():
    engine, plain = engine_of(Instead(rows=0)), engine_of()
    for each in (engine, plain):
        begin(each)
    assert torch.equal(engine.total(), plain.total())


class Cut(Regularizer):
    kind = "cut"

    def augment(self, inputs, step):
        return inputs[:3]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Cut(), "cut: augment gives 3 rows in place of the 4 of the batch"),
        (Instead(rows=2), "instead: before gives 2 rows in place of the 4 of the batch"),
    ],
)
def test_rows_in_place_of_the_batch_are_as_many(part, message):
    with pytest.raises(ConfigurationError, match=message):
        begin(engine_of(part))


def test_collapse_is_measured_where_rows_are_given():
    engine = steps(engine_of(), 2)
    rows = Clusters(rows=9).open()
    engine.close(None, [Batch(rows.inputs, rows.labels, None)])
    steps(engine, 2).close(None)
    first, second = engine.history
    assert first["collapse/wfc"] > 0
    assert first["collapse/cfc"] > 0
    assert not any(name.startswith("collapse") for name in second)


def test_a_state_goes_to_a_run_of_the_same_size_alone():
    saved = steps(engine_of(*ALL[1:]), 1).state_dict()
    engine_of(*ALL[1:]).load_state_dict(saved)
    with pytest.raises(DataError, match="4 training rows and cannot be resumed on 5"):
        engine_of(*ALL[1:], rows=5).load_state_dict(saved)
    with pytest.raises(ConfigurationError, match=r"on 2 process\(es\) and cannot be resumed on 1"):
        engine_of(*ALL[1:]).load_state_dict({**saved, "world": 2})


@settings(deadline=None, max_examples=20)
@given(order=st.permutations([Mix(), *ALL[2:], Generated(), Replacing()]))
def test_the_order_of_the_list_never_matters(order):
    engine = engine_of(*order)
    begin(engine)
    assert float(engine.total().detach()) == TOTAL


def _total() -> float:
    with torch.random.fork_rng(devices=[]):
        engine = engine_of(Mix(), *ALL[2:], Generated(), Replacing())
        begin(engine)
        return float(engine.total().detach())


TOTAL = _total()
