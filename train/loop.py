"""The training loop: flat, resumable, seeded.

Everything random in step s comes from (seed, s). A run that is stopped anywhere and started again computes the same numbers
to the last digit, on the same machine with the same number of threads.
"""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints.files import check_output, replacing
from train import checkpoint
from train.data import Data, stream
from train.errors import Damaged, Diverged, Interrupted
from train.fingerprint import fingerprint
from train.randomness import generator

T = TypeVar("T")
Loss = Callable[[T, torch.Generator], dict[str, Tensor]]
SAVE_SECONDS = 300.0  # a state is never older than this


@dataclass(frozen=True)
class Plan:
    """The settings of one run. The rate rises for `warmup` steps, stays, and falls to zero over the last `decay` of them."""

    name: str
    steps: int
    batch: int
    lr: float
    warmup: int = 100
    decay: float = 0.4
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.0
    bf16: bool = False
    device: str = "cpu"
    seed: int = 0
    accumulate: int = 1
    save_every: int = 100
    validate_every: int = 250

    def rate(self, step: int) -> float:
        """The share of the full rate at this step."""
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / max(1.0, self.decay * self.steps))


def has_bfloat16(device: str) -> bool:
    """Whether bfloat16 is worth using: a processor without instructions for it is several times slower."""
    return not device.startswith("cpu") or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(plan: Plan) -> torch.autocast:
    """bfloat16 where the plan asks for it and the device has it."""
    enabled = plan.bf16 and has_bfloat16(plan.device)
    return torch.autocast(plan.device.split(":")[0], torch.bfloat16, enabled=enabled)


class _Interrupt:
    """Inside `with`, Ctrl-C and SIGTERM become a number that is read between two steps."""

    asked = 0

    def __enter__(self) -> _Interrupt:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self.asked = number


@torch.no_grad()
def _ema_update(ema: nn.Module, module: nn.Module, decay: float) -> None:
    for slow, fast in zip(ema.state_dict().values(), module.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)


class _Training:
    """What changes from step to step: the module, its optimizer and EMA, the log; and how they are saved."""

    def __init__(self, plan: Plan, module: nn.Module, folder: Path, made_from: Mapping[str, Any]) -> None:
        self.plan, self.module = plan, module
        self.made_from = {**asdict(plan), **made_from, "first weights": fingerprint(module)}
        self.state_file, self.log_file = folder / f"{plan.name}.pt", folder / f"{plan.name}.jsonl"
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True
        )
        self.ema = copy.deepcopy(module) if plan.ema else None
        self.kept = module if self.ema is None else self.ema
        self.step, self.seconds, self.log = 0, 0.0, list[dict[str, Any]]()
        self._load()
        self.began = self.saved = time.monotonic()

    def _load(self) -> None:
        checkpoint.refuse_other(self.state_file, self.made_from)
        if (state := checkpoint.load(self.state_file)) is None:
            return
        try:
            checkpoint.restore(self.module, state["module"])
            checkpoint.restore(self.kept, state["kept"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds, self.log = state["step"], state["seconds"], state["log"]
        except (KeyError, ValueError, RuntimeError, AttributeError, TypeError) as error:
            raise Damaged(self.state_file, str(error).partition("\n")[0]) from None

    def save(self) -> None:
        self.saved = time.monotonic()
        states = {"module": checkpoint.changing(self.module), "kept": checkpoint.changing(self.kept)}
        about = {"made_from": self.made_from, "step": self.step, "seconds": self.elapsed(), "log": self.log}
        checkpoint.save(self.state_file, {**about, **states, "optimizer": self.optimizer.state_dict()})
        with replacing(self.log_file) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.log))

    def elapsed(self) -> float:
        """Seconds of training so far, those of stopped runs included."""
        return self.seconds + time.monotonic() - self.began

    def _gradients(self, batches: Iterator[T], loss: Loss[T]) -> dict[str, float]:
        """Adds up the gradients of a step's parts; returns the mean of the named scalars."""
        plan, means = self.plan, dict[str, float]()
        for part in range(self.step * plan.accumulate, (self.step + 1) * plan.accumulate):
            with autocast(plan):
                values = loss(next(batches), generator(plan.seed, part))
            (values["loss"] / plan.accumulate).backward()
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + float(value.detach()) / plan.accumulate
        return means

    def advance(self, batches: Iterator[T], loss: Loss[T]) -> dict[str, Any]:
        """One step; returns its row of the log. Raises `Diverged` before the weights change."""
        plan, step = self.plan, self.step
        row = {"step": step + 1, "lr": plan.lr * plan.rate(step), **self._gradients(batches, loss)}
        row["grad_norm"] = float(nn.utils.clip_grad_norm_(self.parameters, plan.clip))
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise Diverged(f"{plan.name}: loss or gradient is not finite at step {step + 1}; start again with a lower rate")
        self.optimizer.param_groups[0]["lr"] = row["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            _ema_update(self.ema, self.module, min(plan.ema, (1 + step) / (10 + step)))
        self.step += 1
        self.log.append(row)
        return row


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
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains the parameters of `module` that require gradients. Returns what to keep (the EMA, if any) and the log.

    `loss(batch, generator)` returns named scalars, of which "loss" is minimised; `validate(module)` returns named numbers.
    State and log live in `folder`. A run that finds its state there goes on from it, if that was made from the same: the
    plan, the weights that `module` starts with, and what else `made_from` names. With `until` the run stops early, after
    that many of the plan's steps.

    Raises `Interrupted` after saving, `Diverged` before the weights change, and `OtherRun` or `Damaged`.
    """
    check_output(folder / f"{plan.name}.pt")
    training, end = _Training(plan, module, folder, made_from or {}), plan.steps if until is None else until
    batches = stream(data, range(training.step * plan.accumulate, end * plan.accumulate), workers)
    with (
        _Interrupt() as interrupt,
        tqdm(total=plan.steps, initial=training.step, desc=plan.name, dynamic_ncols=True) as bar,
    ):
        while training.step < end:
            row = training.advance(batches, loss)
            done, last = training.step, training.step == end
            if last or done % plan.validate_every == 0:
                row |= {"seconds": training.elapsed(), **validate(training.kept)}
            bar.set_postfix({k: f"{row[k]:.4g}" for k in row if k not in ("step", "lr", "seconds")}, refresh=False)
            bar.update()
            if last or interrupt.asked or done % plan.save_every == 0 or time.monotonic() - training.saved > SAVE_SECONDS:
                training.save()
            if interrupt.asked and not last:
                message = f"{plan.name}: stopped after step {done}; the same command goes on from there"
                raise Interrupted(message, interrupt.asked)
    return training.kept, training.log
