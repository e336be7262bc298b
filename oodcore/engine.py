"""Engine: the steps of a training run, whoever drives the loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from oodcore.batches import joined, length
from oodcore.collapse import measured
from oodcore.data import Batch
from oodcore.errors import ConfigurationError, DataError
from oodcore.features import Features, required
from oodcore.regularizer import (
    Closure,
    Diverged,
    Inner,
    Regularizer,
    Run,
    Schedule,
    Step,
    held_statistics,
    place,
)

LIMIT = 1e8
"""The absolute loss beyond which a run has diverged."""
CURE = "lower the learning rate or the weights, or clip the gradient"


class Engine:
    """Calls the regularizers of a run, puts its random generators, adds up its numbers.

    For each step a driver calls ``begin``, then the closure that ``closure`` gives, which calls
    ``total`` once a pass, then ``end``; after an epoch ``close``, and after the last ``finish``.

    The regularizers act in the order of their kinds, whatever their order in the configuration,
    for sums of floats and folds of functions depend on it. Every generator, the global ones
    included, is put where (seed, step, rank, kind) says before each hook: so there is no generator
    to save, a repeated pass draws the same numbers, and no regularizer disturbs another's draws.

    Args:
        run: the run; its model becomes what each ``prepare_model`` makes of it.
        regularizers: as configured; those of weight 0 take no part.
        schedule: the learning rate before any ``wrap_schedule``.
    """

    def __init__(self, run: Run, regularizers: Iterable[Regularizer], schedule: Schedule) -> None:
        self.run = run
        self.regularizers = taking_part(regularizers)
        self.schedule = schedule
        self.index = 0
        self.history: list[dict[str, float]] = []
        self.states: dict[str, nn.Module | None] = {}
        self._generators = {part.kind: torch.Generator(run.device) for part in self.regularizers}
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, Step] = {}
        self._extra: dict[str, Any] = {}
        self._first = Features(logits=torch.empty(0, 0))
        self._repeat = 0
        prepare_model(run, self.regularizers)
        run.model.to(run.device).train()
        for part in self.regularizers:
            # What is not saved for each process must begin alike in all of them.
            self._put("build", part.kind, rank=run.rank if part.per_rank else 0)
            state = part.build(run)
            self.states[part.kind] = None if state is None else state.to(run.device)
            self.schedule = part.wrap_schedule(self.schedule, run)

    @property
    def epoch(self) -> int:
        """The epoch of the step that comes next, from 0."""
        return self.index // self.run.steps_per_epoch

    @property
    def learning_rate(self) -> float:
        """Of the step that comes next."""
        return self.schedule(self.index / self.run.steps_per_epoch)

    def begin(self, inputs: Any, labels: Tensor, ids: Tensor, outliers: Any) -> None:
        """Take a batch that is on the run's device, and let each regularizer prepare for it.

        Raises:
            ConfigurationError: what comes in place of the batch has another number of rows.
        """
        self._inputs, self._labels, self._ids = inputs, labels, ids
        self._repeat, self._extra = 0, {}
        self._steps = {
            part.kind: Step(
                kind=part.kind,
                run=self.run,
                epoch=self.epoch,
                index=self.index,
                ends_epoch=(self.index + 1) % self.run.steps_per_epoch == 0,
                inputs=inputs,
                labels=labels,
                ids=ids,
                outliers=outliers,
                generator=self._generators[part.kind],
                loop=self,
            )
            for part in self.regularizers
        }
        for part in self.regularizers:
            self._put("augment", part.kind)
            views = part.augment(self._inputs, self._steps[part.kind])
            self._inputs = _as_many(views, len(labels), part.kind, "augment")
        for step in self._steps.values():
            step.inputs = self._inputs
        for part in self.regularizers:
            self._put("before", part.kind)
            rows = part.before(self._steps[part.kind], self.states[part.kind])
            if rows is None or not part.weight_at(self.epoch):
                continue
            # A graph into the regularizer's own modules would be gone in a second pass.
            if part.replaces_batch:
                self._inputs = _as_many(_detached(rows), len(labels), part.kind, "before")
            else:
                self._extra[part.kind] = _detached(rows)

    def total(self) -> Tensor:
        """One pass: the total loss of the batch, a scalar, differentiable.

        Raises:
            Diverged: the loss is not finite, or beyond 1e8.
            ConfigurationError: a regularizer gave a loss of the wrong shape.
        """
        self._put("forward")
        own = self._forward_all()
        for kind in self._steps:
            self._put("criterion", kind)
        self._put("criterion")
        terms = {"classification": self.criterion(own, self._labels).mean()}
        total = terms["classification"]
        for part in self.regularizers:
            weight = part.weight_at(self.epoch)
            if not weight:
                continue
            self._put("loss", part.kind)
            term = part.loss(self._steps[part.kind], self.states[part.kind])
            if term is not None:
                terms[part.kind] = _scalar(term, part.kind)
                total = total + weight * term
        self._check(total, terms)
        if self._repeat == 0:
            self._first = own.detach()
            for kind, term in {**terms, "total": total}.items():
                self.log(f"loss/{kind}", term)
            hits = (own.predicted == self._labels).double()
            self._add("accuracy", hits.sum(), len(hits))
        self._repeat += 1
        return total

    def forward(self, inputs: Any, stats: bool = False) -> Features:
        """Rows through the network; its running statistics move if ``stats``."""
        with nullcontext() if stats else held_statistics(self.run.model):
            features: Features = self.run.model(inputs)
        return features

    def criterion(self, rows: Features, labels: Tensor) -> Tensor:
        """The classification loss ``[N]``: cross-entropy, and every regularizer's part in it."""
        fold: Inner = _cross_entropy
        for part in sorted(self.regularizers, key=lambda part: not part.replaces_loss):
            fold = _folded(part, fold, self._steps[part.kind], self.states[part.kind])
        losses = fold(rows, labels)
        if losses.shape != labels.shape:
            raise ConfigurationError(
                f"a criterion gives one loss a row, {list(labels.shape)}, not "
                f"{list(losses.shape)}; it is made by cross-entropy and, from the inside out: "
                f"{', '.join(part.kind for part in self.regularizers) or 'nothing else'}"
            )
        return losses

    def log(self, name: str, value: Tensor | float) -> None:
        """A number whose mean over the epoch goes into the metrics."""
        self._add(name, value, 1)

    def closure(self, closure: Closure, optimizer: Optimizer) -> Closure:
        """A step's way to the gradient, wrapped by each regularizer."""
        for part in self.regularizers:
            closure = part.wrap_closure(closure, optimizer)

        def checked() -> Tensor:
            loss = closure()
            if self._repeat == 0:
                raise ConfigurationError(
                    f"step {self.index} made no pass: the wrap_closure of one of "
                    f"{', '.join(part.kind for part in self.regularizers)} never calls its closure"
                )
            return loss

        return checked

    def end(self) -> bool:
        """After the update: let each regularizer remember; whether an epoch is over."""
        for part in self.regularizers:
            step = self._steps[part.kind]
            step.repeat, step.features = 0, self._first
            step.extra = None if step.extra is None else step.extra.detach()
            self._put("after", part.kind)
            part.after(step, self.states[part.kind])
        self._steps, self._extra = {}, {}
        self.index += 1
        return self.index % self.run.steps_per_epoch == 0

    def close(
        self, validation: Iterable[Batch] | None, training: Iterable[Batch] | None = None
    ) -> None:
        """After an epoch: its means over all processes become a row of the history.

        Args:
            validation: this process's share of the rows to measure accuracy and loss on.
            training: all rows to measure neural collapse on; a measure that does not exist is
                left out.
        """
        epoch = self.index // self.run.steps_per_epoch - 1
        row: dict[str, float] = {"epoch": epoch, "learning_rate": self.schedule(epoch)}
        row.update(self._means())
        if validation is not None:
            row.update(self._validated(validation))
        if training is not None:
            found = measured(self.run.model, training, self.run.classes)
            row.update({f"collapse/{name}": value for name, value in found.items()})
        self.history.append(row)

    def finish(self) -> None:
        """After the last step: let each regularizer have the last word on the model.

        Raises:
            Diverged: a weight is not finite.
        """
        for part in self.regularizers:
            self._put("finish", part.kind, rank=0)
            part.finish(self.run, self.states[part.kind])
        for name, value in self.run.model.state_dict().items():
            if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
                raise Diverged(f"the run ended with numbers in {name} that are not finite; {CURE}")

    def state_dict(self) -> dict[str, Any]:
        """All that a run is, but for its model and its optimizer; every process must call it."""
        saved: dict[str, Any] = {}
        for part in self.regularizers:
            state = self.states[part.kind]
            if state is not None:
                own = state.state_dict()
                saved[part.kind] = _all_ranks(self.run, own) if part.per_rank else own
        return {
            "index": self.index,
            "rows": self.run.rows,
            "world": self.run.world,
            "history": self.history,
            "sums": _all_ranks(self.run, self._sums),
            "states": saved,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on where another engine stood.

        Raises:
            ConfigurationError: it had another number of processes.
            DataError: it had another number of training rows.
        """
        if saved["world"] != self.run.world:
            raise ConfigurationError(
                f"the run was interrupted on {saved['world']} process(es) and cannot be resumed on "
                f"{self.run.world}"
            )
        if saved["rows"] != self.run.rows:
            raise DataError(
                f"the run was interrupted on {saved['rows']} training rows and cannot be resumed "
                f"on {self.run.rows}; bring the data back, or start again with overwrite=True"
            )
        self.index, self.history = saved["index"], saved["history"]
        sums = saved["sums"][self.run.rank]
        self._sums = {name: value.to(self.run.device) for name, value in sums.items()}
        for part in self.regularizers:
            state = self.states[part.kind]
            if state is not None:
                own = saved["states"][part.kind]
                state.load_state_dict(own[self.run.rank] if part.per_rank else own)

    def _forward_all(self) -> Features:
        """The one forward; gives the batch's own features, and each step what is its."""
        every = self.forward(joined([self._inputs, *self._extra.values()]), stats=self._repeat == 0)
        rows = len(self._labels)
        own = replace(every[:rows], labels=self._labels, ids=self._ids)
        if len(every) != rows + sum(length(extra) for extra in self._extra.values()):
            raise DataError(f"the network made {len(every)} rows of a batch of another size")
        for kind, step in self._steps.items():
            step.repeat, step.features = self._repeat, own
            if kind in self._extra:
                first, rows = rows, rows + length(self._extra[kind])
                step.extra = every[first:rows]
        return own

    def _check(self, total: Tensor, terms: Mapping[str, Tensor]) -> None:
        if not abs(float(total.detach())) <= LIMIT:
            shown = ", ".join(f"{kind} {float(term.detach()):.4g}" for kind, term in terms.items())
            raise Diverged(
                f"the loss of step {self.index} (epoch {self.epoch}) is not finite or beyond "
                f"{LIMIT:.0e}: {shown}; {CURE}"
            )

    def _put(self, phase: str, kind: str = "", rank: int | None = None) -> None:
        where = phase, kind, self.index, self.run.rank if rank is None else rank
        put_global(self.run.device, place(self.run.seed, "global", *where))
        if kind:
            self._generators[kind].manual_seed(place(self.run.seed, *where))

    def _add(self, name: str, value: Tensor | float, count: int) -> None:
        number = torch.as_tensor(value, dtype=torch.float64, device=self.run.device).detach()
        pair = torch.stack([number, number.new_tensor(count)])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def _means(self) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        for part in _all_ranks(self.run, {name: pair.cpu() for name, pair in self._sums.items()}):
            for name, pair in part.items():
                sums[name] = sums[name] + pair if name in sums else pair
        self._sums = {}
        return {name: float(total / count) for name, (total, count) in sums.items()}

    @torch.no_grad()
    def _validated(self, batches: Iterable[Batch]) -> dict[str, float]:
        model = self.run.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            own = [0.0, 0.0, 0.0]
            for batch in batches:
                logits = required(model(batch.inputs).logits, "logits")
                labels = required(batch.labels, "labels")
                own[0] += float((logits.argmax(dim=1) == labels).sum())
                own[1] += float(cross_entropy(logits, labels, reduction="sum"))
                own[2] += len(labels)
        finally:
            for module, training in modes:
                module.training = training
        hits, losses, rows = map(sum, zip(*_all_ranks(self.run, own), strict=True))
        return {"validation/accuracy": hits / rows, "validation/loss": losses / rows}


def taking_part(regularizers: Iterable[Regularizer]) -> tuple[Regularizer, ...]:
    """The regularizers of a weight above 0, in the order in which they act."""
    return tuple(sorted((part for part in regularizers if part.weight), key=lambda part: part.kind))


def prepare_model(run: Run, regularizers: Sequence[Regularizer]) -> None:
    """Let each regularizer change the model of a run."""
    for part in regularizers:
        put_global(torch.device("cpu"), place(run.seed, "prepare_model", part.kind))
        run.model = part.prepare_model(run.model, run)


def put_global(device: torch.device, where: int) -> None:
    """Put torch's global generators, of the CPU and of a device; see ``torch.random.fork_rng``.

    ``torch.manual_seed`` does this too, and formats a stack trace inside Lightning: 1 ms a call.
    """
    torch.default_generator.manual_seed(where)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(where)


def _cross_entropy(rows: Features, labels: Tensor) -> Tensor:
    return cross_entropy(required(rows.logits, "logits"), labels, reduction="none")


def _folded(part: Regularizer, inner: Inner, step: Step, state: Any) -> Inner:
    return lambda rows, labels: part.criterion(rows, labels, inner, step, state)


def _scalar(term: Any, kind: str) -> Tensor:
    if not isinstance(term, Tensor) or term.ndim:
        given = list(term.shape) if isinstance(term, Tensor) else type(term).__name__
        raise ConfigurationError(f"{kind}: loss must be a scalar tensor or None, not {given}")
    return term


def _as_many(rows: Any, wanted: int, kind: str, hook: str) -> Any:
    if length(rows) != wanted:
        raise ConfigurationError(
            f"{kind}: {hook} gives {length(rows)} rows in place of the {wanted} of the batch; "
            "labels and ids are theirs, so give as many"
        )
    return rows


def _detached(rows: Any) -> Any:
    if isinstance(rows, Mapping):
        return {name: _detached(part) for name, part in rows.items()}
    return rows.detach() if isinstance(rows, Tensor) else rows


def _all_ranks(run: Run, value: Any) -> list[Any]:
    if run.world == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * run.world
    distributed.all_gather_object(values, value)
    return values
