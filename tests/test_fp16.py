"""Training in float16: small gradients survive, a step that overflows is skipped, and a run is resumed with its scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import PLAN, make, weight_sum
from torch import Tensor, nn

from train.__main__ import plans_of, source_of
from train.adapter import PHASES
from train.data import OnTheFly
from train.errors import Diverged
from train.loop import run
from train.options import parser
from train.plan import Plan, autocast

FP16 = replace(PLAN, fp16=True, steps=6, ema=0.0)


def scaled_loss(net: nn.Module, factor: float) -> Any:
    """The mean square error times `factor`. With 1, some gradients overflow float16 at the first scale, 65,536."""

    def loss(batch: tuple[Tensor, Tensor], _: torch.Generator) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": ((net(x) - y).square() * factor).mean()}

    return loss


def trained(folder: Path, plan: Plan, factor: float, *stops: int) -> tuple[Tensor, list[dict[str, Any]]]:
    """Train a linear layer, stopping and resuming after each of these steps. Return its weights and the log."""
    for until in (*stops, plan.steps):
        torch.manual_seed(0)
        net = nn.Linear(3, 2, bias=False)
        _, log = run(plan, net, OnTheFly(make), scaled_loss(net, factor), weight_sum, folder, until=until)
    return net.weight.detach(), log


def test_it_trains_as_in_float32(tmp_path: Path) -> None:
    """Within float16's rounding, the same losses and weights. A row of the log says at which scale."""
    half, log = trained(tmp_path / "half", FP16, 0.01)
    full, log_too = trained(tmp_path / "full", replace(FP16, fp16=False), 0.01)
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in log_too], rel=0.01)
    assert {row["loss_scale"] for row in log} == {65536.0} and "loss_scale" not in log_too[0]
    torch.testing.assert_close(half, full, atol=5e-3, rtol=0)
    assert half.dtype == torch.float32 and not torch.equal(half, full)


@pytest.mark.parametrize("factor", [1e-6, 0.1])
def test_gradients_equal_those_of_float64(factor: float, tmp_path: Path) -> None:
    """Without a scale, most gradients of 1e-6 times the loss would be 0 or a few bits in float16."""
    torch.manual_seed(0)
    exact, seen = nn.Linear(3, 2, bias=False).double(), list[Tensor]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", lambda p, _: seen.append(p[0].grad.clone()) or p[0].grad.norm())
        trained(tmp_path, replace(FP16, steps=1), factor)
    x, y = make(0)
    scaled_loss(exact, factor)((x.double(), y.double()), torch.Generator())["loss"].backward()
    assert exact.weight.grad is not None
    torch.testing.assert_close(seen[0].double() / factor, exact.weight.grad / factor, atol=2e-3, rtol=5e-3)


def test_a_step_that_overflows_is_skipped_and_halves_the_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = nn.Linear(3, 2, bias=False).weight.detach().clone()
    after, log = trained(tmp_path / "two", replace(FP16, steps=2), 8.0)
    assert [row["loss_scale"] for row in log] == [65536, 32768] and torch.equal(after, before)
    after, log = trained(tmp_path / "more", FP16, 8.0)
    assert log[-1]["loss_scale"] < 16384 and not torch.equal(after, before) and bool(after.isfinite().all())


def test_endless_overflow_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="not finite; train with --bf16, or restart with a lower --lr"):
        trained(tmp_path, replace(FP16, steps=40), 1e9)


def test_a_resumed_run_keeps_its_scale(tmp_path: Path) -> None:
    """The scale halves in the first steps. A resumed run that began at 65,536 again would skip more steps."""
    whole, log = trained(tmp_path / "whole", FP16, 4.0)
    parts, log_too = trained(tmp_path / "parts", FP16, 4.0, 3)
    scales = [row["loss_scale"] for row in log]
    assert torch.equal(whole, parts) and scales == [row["loss_scale"] for row in log_too] and scales[-1] < 65536


def test_options(tmp_path: Path) -> None:
    def arguments(*line: str) -> Any:
        return parser("").parse_args(["adapter", *line])

    (plan,) = plans_of(arguments("--fp16"), PHASES)
    assert plan.fp16 and not plan.bf16 and autocast(plan).fast_dtype == torch.float16
    assert source_of(arguments("--fp16"), "adapter", tmp_path).base_dtype == torch.float16
    assert not plans_of(arguments(), PHASES)[0].fp16
    with pytest.raises(SystemExit):
        arguments("--fp16", "--bf16")
