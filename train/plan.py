"""The settings of a run, and the precision that they ask for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


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
    save_every: int = 1000
    validate_every: int = 250
    fp16: bool = False

    def scale_batch(self, factor: int) -> Plan:
        """Return the plan for batches `factor` times as large: as many pictures in fewer steps, at the same learning rates."""

        def fewer(steps: int) -> int:
            return max(1, round(steps / factor))

        settings = {"steps": fewer(self.steps), "warmup": fewer(self.warmup), "validate_every": fewer(self.validate_every)}
        return replace(self, **settings, batch=self.batch * factor, ema=self.ema**factor)  # type: ignore[arg-type]

    def rate(self, step: int) -> float:
        """Return the factor of the learning rate at this step."""
        return min(1.0, (step + 1) / max(1, self.warmup), (self.steps - step) / max(1.0, self.decay * self.steps))


def has_bfloat16(device: str) -> bool:
    """Return whether bfloat16 is fast: on a processor without bfloat16 instructions it is several times slower than float32."""
    return not device.startswith("cpu") or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def autocast(plan: Plan) -> torch.autocast:
    """Autocast to float16, or to bfloat16 where the device supports it, if the plan asks for it."""
    dtype, on = torch.float16 if plan.fp16 else torch.bfloat16, plan.fp16 or (plan.bf16 and has_bfloat16(plan.device))
    return torch.autocast(plan.device.split(":")[0], dtype, enabled=on)
