"""The kit lets healthy regularizers pass; a planted fault is caught by the law it breaks."""

from __future__ import annotations

import random
from typing import Annotated, ClassVar

import numpy as np
import pytest
import torch
from pydantic import Field
from torch import nn

from oodcore import Memory, Regularizer
from oodcore.errors import ConfigurationError
from oodcore.testing import check_regularizer, regularizer_checks
from oodcore.testing.regularizers import LAWS


class Confident(Regularizer):
    """``-H(softmax(z))``, averaged over the batch.

    Args:
        weight: of the term.
    """

    kind = "confident"

    def loss(self, step, state):
        p = step.features.logits.log_softmax(dim=1)
        return (p.exp() * p).sum(dim=1).mean()


class Smoothed(Regularizer):
    """``(1 - s) loss(z, y) + s H(u; softmax(z))``.

    Args:
        smoothing: s.
    """

    kind = "smoothed"
    smoothing: float = 0.1

    def criterion(self, rows, labels, inner, step, state):
        uniform = -rows.logits.log_softmax(dim=1).mean(dim=1)
        return (1 - self.smoothing) * inner(rows, labels) + self.smoothing * uniform


class Noised(Regularizer):
    """``CE`` of noisy inputs, joined to the forward."""

    kind = "noised"

    def before(self, step, state):
        noise = torch.randn(step.inputs.shape, generator=step.generator)
        return step.inputs + 0.1 * noise.to(step.inputs)

    def loss(self, step, state):
        again = step.forward(step.inputs.flip(3))
        return (step.criterion(step.extra, step.labels) + step.criterion(again, step.labels)).mean()


class Centred(Regularizer):
    """``mean |h - c_y|^2`` with centres of its own optimizer, from the second epoch on."""

    kind = "centred"

    def build(self, run):
        state = Memory()
        state.centres = nn.Parameter(torch.randn(run.classes, run.width))
        state.own["centres"] = torch.optim.SGD(state.parameters(), lr=0.1, momentum=0.5)
        state.register_buffer("seen", torch.zeros(run.rows, dtype=torch.int64))
        return state

    def weight_at(self, epoch):
        return self.weight * min(epoch, 1)

    def loss(self, step, state):
        centres = state.centres.detach()[step.labels]
        return (step.features.embeddings - centres).square().sum(dim=1).mean()

    def after(self, step, state):
        state.own["centres"].zero_grad()
        apart = step.features.embeddings - state.centres[step.labels]
        apart.square().mean().backward()
        state.own["centres"].step()
        state.seen[step.ids] += 1


class Branched(Regularizer):
    """``mean (v - 1)^2`` of a branch v, and a rate that is halved in the end."""

    kind = "branched"

    def prepare_model(self, model, run):
        model.branches["confidence"] = nn.Linear(run.width, 1)
        return model

    def wrap_schedule(self, schedule, run):
        return lambda epoch: schedule(epoch) * (0.5 if epoch >= 2 else 1.0)

    def loss(self, step, state):
        return (step.features.layers["confidence"] - 1.0).square().mean()


class Sharp(Regularizer):
    """``max |e| <= rho`` of the loss: two passes a step, and averaged weights at the end."""

    kind = "sharp"

    def build(self, run):
        state = nn.Module()
        for name, value in run.model.named_parameters():
            state.register_buffer(name.replace(".", "_"), torch.zeros_like(value))
        state.register_buffer("count", torch.zeros(()))
        return state

    def wrap_closure(self, closure, optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def twice():
            closure()
            kept = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p in parameters:
                    p.add_(0.01 * p.grad.sign())
            loss = closure()
            with torch.no_grad():
                for p, value in zip(parameters, kept, strict=True):
                    p.copy_(value)
            return loss

        return twice

    def after(self, step, state):
        state.count += 1
        for name, value in step.run.model.named_parameters():
            mean = getattr(state, name.replace(".", "_"))
            mean += (value.detach() - mean) / state.count

    def finish(self, run, state):
        with torch.no_grad():
            for name, value in run.model.named_parameters():
                value.copy_(getattr(state, name.replace(".", "_")))


class Exposed(Regularizer):
    """``H(u; softmax(z))`` of outliers."""

    kind = "exposed"
    needs_outliers = True

    def before(self, step, state):
        return step.outliers

    def loss(self, step, state):
        return -step.extra.logits.log_softmax(dim=1).mean()


class Mirrored(Regularizer):
    """``x[:, :, :, ::-1]`` of a random half of the rows."""

    kind = "mirrored"

    def augment(self, inputs, step):
        chosen = torch.rand(len(inputs), generator=step.generator) < 0.5
        return torch.where(chosen[:, None, None, None], inputs.flip(3), inputs)


HEALTHY = [
    Confident(weight=0.1),
    Smoothed(),
    Noised(),
    Centred(weight=0.01),
    Branched(),
    Sharp(),
    Exposed(),
    Mirrored(),
]


@pytest.mark.parametrize("check", regularizer_checks(*HEALTHY))
def test_healthy_regularizers_pass(check):
    check()


class GlobalTorch(Confident):
    kind = "global_torch_regularizer"

    def loss(self, step, state):
        return super().loss(step, state) + torch.rand(()) * step.features.logits.mean()


class GlobalBefore(Noised):
    kind = "global_before"

    def before(self, step, state):
        return step.inputs + 0.1 * torch.randn(step.inputs.shape)


class GlobalNumpy(Confident):
    kind = "global_numpy_regularizer"

    def loss(self, step, state):
        return super().loss(step, state) * np.random.rand()


class GlobalPython(Confident):
    kind = "global_python_regularizer"

    def after(self, step, state):
        random.random()


class CountsInLoss(Centred):
    kind = "counts_in_loss"

    def weight_at(self, epoch):
        return self.weight

    def loss(self, step, state):
        state.seen[step.ids] += 1
        return super().loss(step, state)


class WritesModelInLoss(Confident):
    kind = "writes_model_in_loss"

    def loss(self, step, state):
        step.run.model.network.norm.num_batches_tracked.add_(1)
        return super().loss(step, state)


class MovesStatistics(Confident):
    kind = "moves_statistics"

    def loss(self, step, state):
        step.run.model(step.inputs + 1)
        return super().loss(step, state)


class DrawsAnew(Confident):
    kind = "draws_anew"
    own: ClassVar[torch.Generator] = torch.Generator().manual_seed(0)

    def loss(self, step, state):
        return super().loss(step, state) * torch.rand((), generator=self.own)


class CriterionMean(Smoothed):
    kind = "criterion_mean"

    def criterion(self, rows, labels, inner, step, state):
        return inner(rows, labels).mean()


class CriterionDetached(Smoothed):
    kind = "criterion_detached"

    def criterion(self, rows, labels, inner, step, state):
        return inner(rows, labels).detach()


class LossDetached(Confident):
    kind = "loss_detached"

    def loss(self, step, state):
        return torch.tensor(float(super().loss(step, state)))


class LossRows(Confident):
    kind = "loss_rows"

    def loss(self, step, state):
        return step.features.logits.square().mean(dim=1)


class LossNan(Confident):
    kind = "loss_nan"

    def loss(self, step, state):
        return step.features.logits.sum() * torch.nan


class GradientNan(Confident):
    kind = "gradient_nan"

    def loss(self, step, state):
        return (step.features.logits * 0).abs().sum().sqrt()


class NeverOff(Confident):
    """``-H(softmax(z))``.

    Args:
        weight: of the term.
    """

    kind = "never_off"
    weight: Annotated[float, Field(gt=0)] = 1.0


class OnInstance(Confident):
    kind = "on_instance_regularizer"

    def after(self, step, state):
        object.__setattr__(self, "steps", getattr(self, "steps", 0) + 1)

    def loss(self, step, state):
        return super().loss(step, state) / (1 + getattr(self, "steps", 0))


class Unsaved(Confident):
    kind = "unsaved"

    def build(self, run):
        state = nn.Module()
        state.steps = 0
        return state

    def after(self, step, state):
        state.steps += 1

    def loss(self, step, state):
        return super().loss(step, state) / (1 + state.steps)


class UnsavedOptimizer(Centred):
    kind = "unsaved_optimizer"

    def build(self, run):
        state = super().build(run)
        state.aside = state.own["centres"]
        state.own.clear()
        return state

    def after(self, step, state):
        state.own["centres"] = state.aside
        super().after(step, state)
        state.own.clear()


class Unpicklable(Confident):
    kind = "unpicklable"

    def build(self, run):
        class State(nn.Module):
            def get_extra_state(self):
                return {"run": run}

            def set_extra_state(self, state):
                pass

        return State()


class WritesInputs(Noised):
    kind = "writes_inputs"

    def before(self, step, state):
        return step.inputs.add_(0.1)


class OtherShape(Noised):
    kind = "other_shape"

    def before(self, step, state):
        return step.inputs.flatten(1)


class LeavesGradients(Confident):
    kind = "leaves_gradients_regularizer"

    def before(self, step, state):
        step.forward(step.inputs).logits.sum().backward()


class WritesWeights(Confident):
    kind = "writes_weights"

    def after(self, step, state):
        with torch.no_grad():
            step.run.model.head.weight.mul_(0.99)


class LeavesEval(Confident):
    kind = "leaves_eval"

    def before(self, step, state):
        step.run.model.eval()


class NegativeWeight(Confident):
    kind = "negative_weight"

    def weight_at(self, epoch):
        return 1.0 - epoch


class RandomRate(Confident):
    kind = "random_rate"

    def wrap_schedule(self, schedule, run):
        return lambda epoch: schedule(epoch) * random.random()


class OtherBranch(Branched):
    kind = "other_branch"
    made: ClassVar[list] = []

    def prepare_model(self, model, run):
        self.made.append(1)
        model.branches[f"confidence{len(self.made)}"] = nn.Linear(run.width, 1)
        return model

    def loss(self, step, state):
        [value] = step.features.layers.values()
        return value.square().mean()


class Pairs(Confident):
    kind = "pairs"

    def loss(self, step, state):
        one = step.features.logits[step.labels == 2]
        return super().loss(step, state) + one.amax()


class ViewsGlobal(Mirrored):
    kind = "views_global"

    def augment(self, inputs, step):
        return inputs + 0.1 * torch.rand(inputs.shape)


class ViewsInPlace(Mirrored):
    kind = "views_in_place"

    def augment(self, inputs, step):
        return inputs.clamp_(max=0.5)


class ViewsFewer(Mirrored):
    kind = "views_fewer"

    def augment(self, inputs, step):
        return inputs[:, :, 1:]


class ViewsAsList(Mirrored):
    kind = "views_as_list"

    def augment(self, inputs, step):
        return list(inputs)


class ViewsWide(Mirrored):
    kind = "views_wide"

    def augment(self, inputs, step):
        return inputs.double()


class ViewsAnew(Mirrored):
    kind = "views_anew"
    own: ClassVar[torch.Generator] = torch.Generator().manual_seed(0)

    def augment(self, inputs, step):
        return inputs * torch.rand((), generator=self.own)


class ViewsNan(Mirrored):
    kind = "views_nan"

    def augment(self, inputs, step):
        return inputs / 0


class ViewsWithGraph(Mirrored):
    kind = "views_with_graph"

    def augment(self, inputs, step):
        return inputs * step.run.model.head.bias.mean()


class Undeclared(Exposed):
    kind = "undeclared"
    needs_outliers = False


class Unused(Confident):
    kind = "unused"
    needs_outliers = True


FAULTS = [
    (GlobalTorch, "repeated passes", "generator of torch.*step.generator"),
    (GlobalBefore, "before and after", "before: .* generator of torch"),
    (GlobalNumpy, "chance", "draw from step.generator alone"),
    (GlobalNumpy, "repeated passes", "another total loss"),
    (GlobalPython, "before and after", "after: .* generator of Python"),
    (CountsInLoss, "repeated passes", "loss changes the state.seen"),
    (WritesModelInLoss, "repeated passes", "loss changes the network"),
    (MovesStatistics, "repeated passes", "loss changes the network.*running"),
    (DrawsAnew, "repeated passes", "another total loss"),
    (DrawsAnew, "chance", "ends with other numbers"),
    (DrawsAnew, "resuming", "resumed after step"),
    (CriterionMean, "terms", r"one loss a row|give \[N\]"),
    (CriterionDetached, "terms", "criterion has no gradient|does not require grad"),
    (LossDetached, "terms", "it teaches nothing"),
    (LossRows, "terms", "scalar tensor"),
    (LossNan, "terms", "not finite"),
    (GradientNan, "terms", "gradient of .* is not finite"),
    (NeverOff, "weight 0", "cannot be switched off"),
    (OnInstance, "chance", "in the state that build returns"),
    (OnInstance, "resuming", "resumed after step 2"),
    (OnInstance, "order of the list", "depends on the order"),
    (Unsaved, "resuming", "must be buffers, parameters and own optimizers"),
    (UnsavedOptimizer, "resuming", "must be buffers, parameters and own optimizers"),
    (Unpicklable, "resuming", "Unpickling|weights_only|pickle"),
    (WritesInputs, "before and after", "in place: inputs"),
    (OtherShape, "before and after", "cannot join the forward"),
    (LeavesGradients, "before and after", "before leaves gradients"),
    (WritesWeights, "before and after", "changes the network's network.head.weight"),
    (LeavesEval, "before and after", "another mode"),
    (ViewsGlobal, "views", "augment: .* generator of torch"),
    (ViewsInPlace, "views", "augment changes the batch.inputs, in place"),
    (ViewsFewer, "views", r"\[8, 3, 7, 8\], and the rows are torch.float32 \[8, 3, 8, 8\]"),
    (ViewsAsList, "views", "augment gives .*tensor"),
    (ViewsWide, "views", "float64 .*, and the rows are torch.float32"),
    (ViewsNan, "views", "not finite"),
    (ViewsAnew, "views", "other views when it is called again"),
    (ViewsWithGraph, "views", "rows with a graph"),
    (Undeclared, "outliers", "says needs_outliers = True is kept from one"),
    (Unused, "outliers", "other outliers change nothing"),
    (NegativeWeight, "schedules", "weight_at of epoch 2 gives -1.0"),
    (RandomRate, "schedules", "wrap_schedule of epoch 0"),
    (OtherBranch, "reloading", "does not make the trained model again"),
    (Pairs, "few rows", "IndexError|amax"),
]


@pytest.mark.parametrize(
    ("fault", "law", "message"), FAULTS, ids=lambda v: getattr(v, "kind", None) or ""
)
def test_faulty_regularizers_are_caught(fault, law, message):
    [check] = [check for check in regularizer_checks(fault) if check.name == law]
    with pytest.raises(AssertionError, match=message):
        check()


def test_every_law_has_a_fault_that_breaks_it():
    shared = {"documentation", "configuration"}
    assert {law for _, law, _ in FAULTS} | shared == set(LAWS)


def test_a_term_that_begins_late_is_not_asked_for_before():
    class Late(Noised):
        """``CE`` of noisy inputs, from an epoch on.

        Args:
            begin: the epoch.
        """

        kind = "late"
        begin: int = 2

        def weight_at(self, epoch):
            return self.weight if epoch >= self.begin else 0.0

    check_regularizer(Late)


def test_everything_at_once():
    check_regularizer(Smoothed)
    with pytest.raises(AssertionError, match="checks failed:\n- regularizer 'never_off', weight 0"):
        check_regularizer(NeverOff())


def test_a_weight_of_0_is_not_examined():
    [check] = [c for c in regularizer_checks(Confident(weight=0)) if c.name == "terms"]
    with pytest.raises(AssertionError, match="examine it with a weight above 0"):
        check()


def test_what_is_no_regularizer_is_refused():
    with pytest.raises(ConfigurationError, match="the kit examines a Regularizer"):
        regularizer_checks("confident")


def test_global_generators_stay():
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    check_regularizer(Noised)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
