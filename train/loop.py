"""The training loop: seeded and resumable.

All random numbers of step s come from (seed, s). Several processes (train/processes.py) share the batches of a step; the first one
validates and writes. A run that is stopped and resumed gives bit-identical results on the same machine with as many threads (a GPU: close).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from checkpoints.files import check_output, replacing
from train import checkpoint, processes
from train.clock import Clock
from train.data import Data, ProcessBatches, stream
from train.display import Display, bar, last_numbers
from train.errors import DamagedState, Interrupted
from train.fingerprint import fingerprint
from train.interrupt import Interrupt
from train.plan import Plan, autocast
from train.randomness import hash_step
from train.shared import step_of
from train.step import Loss, Values, check_finite, move_towards, numbers

T = TypeVar("T")
SAVE_SECONDS = 300.0  # save the state at least this often


class _Training(Generic[T]):
    """The state of a run: the module, its optimizer and EMA, and the log. Loads and saves itself."""

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        data: Data[T],
        loss: Loss[T],
        folder: Path,
        made_from: Mapping[str, Any],
        display: Display,
    ) -> None:
        self.data = data
        self.plan, self.module, self.display, self.team = plan, module, display, processes.team()
        parts = {"parts": self.team.parts} if self.team.parts else {}
        self.made_from = {**asdict(plan), **made_from, **parts, "first weights": fingerprint(module)}
        self.state_file, self.log_file = folder / f"{plan.name}.pt", folder / f"{plan.name}.jsonl"
        settings = plan.betas, plan.weight_decay, plan.clip, lambda: autocast(plan), plan.fp16
        self.run_step = step_of(self.team, plan.device, getattr(data, "one_shape", True), module, loss, *settings)
        self.result = copy.deepcopy(module) if plan.ema else module
        self.step, self.log, self.unread, self.clock = 0, list[dict[str, Any]](), list[Values](), Clock()
        self._load()
        processes.check_same({**self.made_from, "states": self.step})
        self.saved = time.monotonic()
        display.start(folder, plan.name, self.step)

    def _load(self) -> None:
        checkpoint.refuse_other(self.state_file, self.made_from)
        if (state := checkpoint.load(self.state_file)) is None:
            return
        try:
            checkpoint.restore(self.module, state["module"])
            checkpoint.restore(self.result, state["kept"])
            self.run_step.restore(state["optimizer"], state["scaler"])
            self.step, self.clock, self.log = state["step"], Clock(state["seconds"]), state["log"]
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise DamagedState(self.state_file, str(error).partition("\n")[0]) from None

    def batches(self, end: int, workers: int) -> Iterator[T]:
        """Yield this process's batches of all steps up to `end`."""
        shared = ProcessBatches(self.data, self.team.shares, self.plan.accumulate)
        return stream(shared, range(self.step * shared.each, end * shared.each), workers)

    def save(self) -> None:
        """Write the state and the log, in the first process. All processes must call this together."""
        self.read()
        self.run_step.gather()
        self.saved = time.monotonic()
        if self.team.rank:
            return
        state = {"made_from": self.made_from, "step": self.step, "seconds": self.clock.elapsed(), "log": self.log}
        state |= {"module": checkpoint.changing(self.module), "kept": checkpoint.changing(self.result)}
        state |= {"optimizer": self.run_step.optimizer.state_dict(), "scaler": self.run_step.scaler.state_dict()}
        checkpoint.save(self.state_file, state)
        with replacing(self.log_file) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.log))

    def advance(self, batches: Iterator[T]) -> None:
        """Run one step. On a CPU, raises `Diverged` before the weights change."""
        plan, parts = self.plan, range(self.step * self.plan.accumulate, (self.step + 1) * self.plan.accumulate)
        seeds, lr = [hash_step(plan.seed, part) for part in parts], plan.lr * plan.rate(self.step)
        with self.clock.step(plan.batch * plan.accumulate):
            with self.clock.waiting(self.run_step.idle):
                own = [next(batches) for _ in self.team.shares for _ in parts]
            values = self.run_step(own, seeds, lr, f"{plan.name}, step {self.step + 1}")
        if self.result is not self.module:
            move_towards(self.result, self.module, 1 - min(plan.ema, (1 + self.step) / (10 + self.step)))
        self.step += 1
        self.unread.append(values)
        if len(self.unread) == self.run_step.lag:
            self.read()

    def read(self) -> dict[str, Any]:
        """Append the rows of the last steps to the log, and return the last. Raises `Diverged` if a number is not finite."""
        for step, values in enumerate(numbers(self.unread), start=self.step - len(self.unread)):
            check_finite(values, f"{self.plan.name}, step {step + 1}")
            self.log.append({"step": step + 1, "lr": self.plan.lr * self.plan.rate(step), **values})
            self.display.row(self.log[-1])
        self.unread.clear()
        return self.log[-1]

    def measure(self, losses: dict[str, float]) -> None:
        """Add the clock and what validation measured to the last row."""
        more = self.clock.row() | losses
        self.read().update(more)
        self.display.row({"step": self.step, **more})


def run(
    plan: Plan,
    module: nn.Module,
    data: Data[T],
    loss: Loss[T],
    validate: Callable[[nn.Module], dict[str, float]],
    folder: Path,
    workers: int = 1,
    until: int | None = None,
    made_from: Mapping[str, Any] | None = None,
    display: Display | None = None,
    validate_together: bool = False,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Train the parameters of `module` that require gradients. Return the module to keep (the EMA, if there is one) and the log.

    `loss(batch, generator)` returns named scalars and minimises "loss"; `validate(module)` returns named numbers. The first process
    calls it; with `validate_together`, all do. State and log are kept in `folder`. If a state exists there, the run resumes from it,
    provided that the plan, the initial weights of `module` and the inputs named in `made_from` are the same. With `until`, stop after
    that many steps of the plan. Raises `Interrupted` after saving the state, `Diverged` before the weights change (on a GPU: before
    they are saved), `OtherRun` if the state belongs to another run, and `DamagedState` if it cannot be read.
    """
    check_output(folder / f"{plan.name}.pt")
    first, end = processes.team().rank == 0, until or plan.steps
    training = _Training(plan, module, data, loss, folder, made_from or {}, display if display and first else Display())
    batches = training.batches(end, workers)
    with Interrupt() as interrupt, bar(plan.name, plan.steps, training.step, not first) as progress:
        while training.step < end:
            training.advance(batches)
            step, last = training.step, training.step == end
            if last or step % plan.validate_every == 0:
                training.measure(validate(training.result) if first or validate_together else {})
            training.display.step(training.result, step)
            progress.set_postfix(last_numbers(training.log), refresh=False)
            progress.update()
            signal_number, late = processes.largest_of_all(interrupt.signal_number, time.monotonic() - training.saved > SAVE_SECONDS)
            if last or signal_number or late or step % plan.save_every == 0:
                training.save()
            if signal_number and not last:
                raise Interrupted(f"{plan.name}: stopped after step {step}; the same command resumes the run", signal_number)
    return training.result, training.log
