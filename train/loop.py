"""The training loop: flat, resumable, seeded. Everything random in step s comes from (seed, s), so a run that is stopped
anywhere and started again computes the same numbers to the last digit (same machine, same number of threads)."""

from __future__ import annotations

import copy
import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from train import checkpoint

T = TypeVar("T")


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


class _Batches(Dataset[T]):
    def __init__(self, make: Callable[[int], T], steps: int) -> None:
        self.make, self.steps = make, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> T:
        return self.make(step)


def stream(make: Callable[[int], T], start: int, steps: int, workers: int) -> Iterator[T]:
    """make(start), ..., make(steps - 1), in order, made ahead of time in worker processes."""

    def ignore_interrupt(_: int) -> None:  # Ctrl-C reaches the workers too, but the loop decides when to stop
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    loader = DataLoader(
        _Batches(make, steps),
        batch_size=None,
        sampler=range(start, steps),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_interrupt,
    )
    return iter(loader)


def generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step. (torch's CPU generator reads 32 bits of a seed, so the two are hashed into them.)"""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))


def autocast(plan: Plan) -> torch.autocast:
    """bfloat16 where the plan asks for it and the device has it: a processor without it is several times slower."""
    kind = plan.device.split(":")[0]
    supported = kind != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.autocast(kind, torch.bfloat16, enabled=plan.bf16 and supported)


class _Interrupt:
    """Inside `with`, Ctrl-C and SIGTERM become a flag that is read between two steps."""

    asked = False

    def __enter__(self) -> _Interrupt:
        self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True


@torch.no_grad()
def _ema_update(ema: nn.Module, module: nn.Module, decay: float) -> None:
    for slow, fast in zip(ema.state_dict().values(), module.state_dict().values(), strict=True):
        if slow.is_floating_point():
            slow.lerp_(fast, 1 - decay)
        else:
            slow.copy_(fast)


def _gradients(
    plan: Plan, step: int, batches: Iterator[T], loss: Callable[[T, torch.Generator], dict[str, Tensor]]
) -> dict[str, float]:
    """Adds up the gradients of a step's parts; returns the mean of the named scalars."""
    means: dict[str, float] = {}
    for part in range(step * plan.accumulate, (step + 1) * plan.accumulate):
        with autocast(plan):
            values = loss(next(batches), generator(plan.seed, part))
        (values["loss"] / plan.accumulate).backward()
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + float(value.detach()) / plan.accumulate
    return means


def run(
    plan: Plan,
    module: nn.Module,
    make: Callable[[int], T],
    loss: Callable[[T, torch.Generator], dict[str, Tensor]],
    validate: Callable[[nn.Module], dict[str, float]],
    folder: Path,
    workers: int = 1,
    until: int | None = None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """Trains `module` (its parameters that require gradients); returns what to keep (the EMA, if any) and the log.

    `make(i)` builds batch i (one a step, or `plan.accumulate`), `loss(batch, generator)` returns named scalars, of which
    "loss" is minimised, `validate(module)` returns named numbers. State and log live in `folder`; a run that finds its
    state goes on from it. With `until` it stops early, after that many of the plan's steps. Raises SystemExit when it was
    interrupted, after saving, ValueError when the state is of another plan, and FloatingPointError, before the weights are
    changed, when the loss or its gradient is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state_file, log_file = folder / f"{plan.name}.pt", folder / f"{plan.name}.jsonl"
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.lr, betas=plan.betas, weight_decay=plan.weight_decay, fused=True)
    ema = copy.deepcopy(module) if plan.ema else None
    kept = module if ema is None else ema
    start, log, end = 0, [], plan.steps if until is None else until
    if state := checkpoint.load(state_file):
        settings = asdict(plan)
        if other := [key for key, value in settings.items() if state.get("plan", settings).get(key) != value]:
            raise ValueError(
                f"{state_file} is the state of a run with another {', '.join(other)}: name another folder, or remove it"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        kept.load_state_dict(state["kept"])
        start, log = state["step"], state["log"]

    def save(step: int) -> None:
        states = {"module": module.state_dict(), "kept": kept.state_dict(), "optimizer": optimizer.state_dict()}
        checkpoint.save(state_file, {"step": step, "log": log, "plan": asdict(plan), **states})
        log_file.write_text("".join(json.dumps(row) + "\n" for row in log))

    began = time.time()
    batches = stream(make, start * plan.accumulate, end * plan.accumulate, workers)
    with _Interrupt() as interrupt, tqdm(total=plan.steps, initial=start, desc=plan.name, dynamic_ncols=True) as bar:
        for step in range(start, end):
            row: dict[str, Any] = {
                "step": step + 1,
                "lr": plan.lr * plan.rate(step),
                **_gradients(plan, step, batches, loss),
            }
            row["grad_norm"] = float(nn.utils.clip_grad_norm_(parameters, plan.clip))
            if not math.isfinite(row["loss"] + row["grad_norm"]):
                raise FloatingPointError(
                    f"{plan.name}: loss or gradient is not finite at step {step + 1}; start again with a lower rate"
                )
            optimizer.param_groups[0]["lr"] = row["lr"]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                _ema_update(ema, module, min(plan.ema, (1 + step) / (10 + step)))
            last = step + 1 == end
            if last or (step + 1) % plan.validate_every == 0:
                row |= {"seconds": time.time() - began, **validate(kept)}
            log.append(row)
            bar.set_postfix({k: f"{row[k]:.4g}" for k in row if k not in ("step", "lr", "seconds")}, refresh=False)
            bar.update()
            if last or interrupt.asked or (step + 1) % plan.save_every == 0:
                save(step + 1)
            if interrupt.asked and not last:
                raise SystemExit(f"{plan.name}: stopped after step {step + 1}; the same command goes on from there")
    return kept, log


def card(phases: tuple[Plan, ...], log: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """What is written beside the weights: how they were made, phase by phase, and the last validation."""
    results = next((row for row in reversed(log) if "seconds" in row), {})
    return {
        "command": command,
        "settings": [asdict(plan) for plan in phases],
        "results": results,
        "licence": "CC BY-SA 4.0, trained on drawings by OpenMoji (https://openmoji.org)",
    }
