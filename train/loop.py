"""The training loop: seeded and resumable.

All random numbers of step s come from (seed, s). A run that is stopped and resumed gives bit-identical results on the same machine with
the same number of threads.
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
SAVE_SECONDS = 300.0  # save the state at least this often


@dataclass(frozen=True)
class Plan:
    """The settings of one run.

    The learning rate rises linearly for `warmup` steps, stays at `lr`, and falls to zero over the last fraction `decay` of the steps.
    """

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
        """Return the factor of the learning rate at this step."""
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / max(1.0, self.decay * self.steps))


def has_bfloat16(device: str) -> bool:
    """Return whether bfloat16 is fast: on a processor without bfloat16 instructions it is several times slower than float32."""
    return not device.startswith("cpu") or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(plan: Plan) -> torch.autocast:
    """Autocast to bfloat16 if the plan asks for it and the device supports it."""
    enabled = plan.bf16 and has_bfloat16(plan.device)
    return torch.autocast(plan.device.split(":")[0], torch.bfloat16, enabled=enabled)


class _Interrupt:
    """Inside `with`, Ctrl-C and SIGTERM only set `signal_number`, which the loop reads between steps."""

    signal_number = 0

    def __enter__(self) -> _Interrupt:
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.signal_number = number


@torch.no_grad()
def _ema_update(ema: nn.Module, module: nn.Module, decay: float) -> None:
    for slow, fast in zip(ema.state_dict().values(), module.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)


class _Training:
    """The state of a run: the module, its optimizer and EMA, and the log. Loads and saves itself."""

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
        progress = {"made_from": self.made_from, "step": self.step, "seconds": self.elapsed(), "log": self.log}
        checkpoint.save(self.state_file, {**progress, **states, "optimizer": self.optimizer.state_dict()})
        with replacing(self.log_file) as part:
            part.write_text("".join(json.dumps(row) + "\n" for row in self.log))

    def elapsed(self) -> float:
        """Return the seconds of training so far, including those before a restart."""
        return self.seconds + time.monotonic() - self.began

    def _gradients(self, batches: Iterator[T], loss: Loss[T]) -> dict[str, float]:
        """Accumulate the gradients of a step; return the mean of each named scalar."""
        plan, means = self.plan, dict[str, float]()
        for part in range(self.step * plan.accumulate, (self.step + 1) * plan.accumulate):
            with autocast(plan):
                values = loss(next(batches), generator(plan.seed, part))
            (values["loss"] / plan.accumulate).backward()
            for name, value in values.items():
                means[name] = means.get(name, 0.0) + float(value.detach()) / plan.accumulate
        return means

    def advance(self, batches: Iterator[T], loss: Loss[T]) -> dict[str, Any]:
        """Run one step and return its row of the log. Raises `Diverged` before the weights change."""
        plan, step = self.plan, self.step
        row = {"step": step + 1, "lr": plan.lr * plan.rate(step), **self._gradients(batches, loss)}
        row["grad_norm"] = float(nn.utils.clip_grad_norm_(self.parameters, plan.clip))
        if not math.isfinite(row["loss"] + row["grad_norm"]):
            raise Diverged(f"{plan.name}: the loss or gradient is not finite at step {step + 1}; restart with a lower --lr")
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
    """Train the parameters of `module` that require gradients. Return the module to keep (the EMA, if there is one) and the log.

    `loss(batch, generator)` returns named scalars and minimises "loss"; `validate(module)` returns named numbers. State and log
    are kept in `folder`. If a state exists there, the run resumes from it, provided that the plan, the initial weights of `module`
    and the inputs named in `made_from` are the same. With `until`, stop after that many steps of the plan.

    Raises `Interrupted` after saving the state, `Diverged` before the weights change, `OtherRun` if the state belongs to another
    run, and `Damaged` if it cannot be read.
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
            if last or interrupt.signal_number or done % plan.save_every == 0 or time.monotonic() - training.saved > SAVE_SECONDS:
                training.save()
            if interrupt.signal_number and not last:
                message = f"{plan.name}: stopped after step {done}; the same command resumes the run"
                raise Interrupted(message, interrupt.signal_number)
    return training.kept, training.log
