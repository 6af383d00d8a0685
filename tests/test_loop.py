"""The training loop: bit-exact resumption through its real interrupt, accumulation, the rate, and safe checkpoints."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from train import checkpoint
from train.loop import Plan, card, generator, run, stream

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PLAN = Plan("tiny", steps=12, batch=4, lr=1e-2, warmup=3, ema=0.9, save_every=100, validate_every=4)
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does, pytest's own Ctrl-C comes back."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


class Net(nn.Module):
    """With a normalisation that counts, so that state has integers too, and a weight that doesn't train."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 2))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.frozen


def make(step: int, n: int = 4) -> Batch:
    g = torch.Generator().manual_seed(1000 + step)
    return torch.randn(n, 3, generator=g), torch.randn(n, 2, generator=g)


def noisy_loss(net: nn.Module) -> Callable[[Batch, torch.Generator], dict[str, Tensor]]:
    def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        x, y = batch
        error = net(x + 0.1 * torch.randn(x.shape, generator=g)) - y
        return {"loss": error.square().mean(), "largest": error.detach().abs().max()}

    return loss


def weight_sum(module: nn.Module) -> dict[str, float]:
    return {"sum": float(sum(p.detach().double().sum() for p in module.parameters()))}


def train(
    folder: Path, plan: Plan = PLAN, seed: int = 0, make: Callable[[int], Batch] = make, workers: int = 0
) -> tuple[Net, nn.Module, list[dict[str, Any]]]:
    """(the module, what `run` says to keep, the log)."""
    net = Net(seed)
    kept, log = run(plan, net, make, noisy_loss(net), weight_sum, folder, workers)
    return net, kept, log


def stop_at(step: int, number: int = signal.SIGINT) -> Callable[[int], Batch]:
    """Data whose step `step` is when the user presses Ctrl-C."""

    def made(at: int) -> Batch:
        if at == step:
            os.kill(os.getpid(), number)
        return make(at)

    return made


def numbers(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without its clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# going on


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_a_stopped_run_goes_on_to_the_last_bit(tmp_path: Path, ema: float, number: int) -> None:
    plan = replace(PLAN, ema=ema)
    whole, kept, log = train(tmp_path / "whole", plan)
    with pytest.raises(SystemExit, match="stopped after step 5"):
        train(tmp_path / "parts", plan, make=stop_at(4, number))
    resumed, kept_too, log_too = train(tmp_path / "parts", plan, seed=7)
    assert numbers(log_too) == numbers(log) and len(log) == 12
    assert same(whole, resumed) and same(kept, kept_too)
    assert (kept is whole) == (ema == 0)


def test_a_run_stopped_three_times(tmp_path: Path) -> None:
    _, kept, log = train(tmp_path / "whole")
    for step in (0, 1, 8):
        with pytest.raises(SystemExit, match=f"stopped after step {step + 1}"):
            train(tmp_path / "parts", make=stop_at(step))
    _, kept_too, log_too = train(tmp_path / "parts")
    assert numbers(log_too) == numbers(log) and same(kept, kept_too)


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    def dies(step: int) -> Batch:
        if step == 8:
            raise OSError("the disk is gone")
        return make(step)

    plan = replace(PLAN, save_every=3)
    _, kept, log = train(tmp_path / "whole", plan)
    with pytest.raises(OSError, match="the disk is gone"):
        train(tmp_path / "parts", plan, make=dies)
    state = checkpoint.load(tmp_path / "parts" / "tiny.pt")
    assert state is not None and state["step"] == 6
    _, kept_too, log_too = train(tmp_path / "parts", plan, seed=3)
    assert numbers(log_too) == numbers(log) and same(kept, kept_too)


def test_a_stopped_run_with_accumulation_sees_the_same_data(tmp_path: Path) -> None:
    plan = replace(PLAN, accumulate=2)
    _, kept, log = train(tmp_path / "whole", plan)
    with pytest.raises(SystemExit, match="stopped after step 5"):
        train(tmp_path / "parts", plan, make=stop_at(9))
    _, kept_too, log_too = train(tmp_path / "parts", plan)
    assert numbers(log_too) == numbers(log) and same(kept, kept_too)


def test_a_run_in_parts_is_the_whole_run(tmp_path: Path) -> None:
    """`until` neither changes the rate nor adds a validation that the whole run keeps out of its numbers."""
    _, kept, log = train(tmp_path / "whole")
    net = Net()
    for until in (4, 8, None):
        part, rows = run(PLAN, net, make, noisy_loss(net), weight_sum, tmp_path / "parts", 0, until)
        assert len(rows) == (until or PLAN.steps)
    assert numbers(rows) == numbers(log) and same(kept, part)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    _, kept, log = train(tmp_path)
    _, kept_too, log_too = train(tmp_path, seed=5, make=lambda _: pytest.fail("data was made"))
    assert same(kept, kept_too) and log_too == log


@dataclass(frozen=True)
class More(Plan):
    extra: float = 0.5


def test_the_state_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """Nor lost: it stays where it is."""
    train(tmp_path)
    before = (tmp_path / "tiny.pt").read_bytes()
    with pytest.raises(ValueError, match="another steps, lr: name another folder"):
        train(tmp_path, replace(PLAN, steps=13, lr=2e-2))
    with pytest.raises(ValueError, match="another extra: name another folder"):  # a setting that older plans lack
        train(tmp_path, More(**asdict(PLAN)))
    assert (tmp_path / "tiny.pt").read_bytes() == before


def test_an_interrupt_in_the_last_step_finishes(tmp_path: Path) -> None:
    _, kept, _ = train(tmp_path / "a")
    _, kept_too, log = train(tmp_path / "b", make=stop_at(11))
    assert same(kept, kept_too) and len(log) == 12


@pytest.mark.parametrize("end", ["finished", "stopped", "failed"])
def test_ctrl_c_works_again_after_a_run(tmp_path: Path, end: str) -> None:
    """Or nothing could stop what comes next, such as encoding the data of the next stage."""
    before = [signal.getsignal(number) for number in SIGNALS]
    data = {
        "finished": make,
        "stopped": stop_at(2),
        "failed": lambda _: (torch.full((4, 3), float("nan")), torch.zeros(4, 2)),
    }[end]
    if end == "finished":
        train(tmp_path, make=data)
    else:
        with pytest.raises((SystemExit, FloatingPointError)):
            train(tmp_path, make=data)
    assert [signal.getsignal(number) for number in SIGNALS] == before


# one step


def quiet_loss(
    net: nn.Module, seen: list[Tensor] | None = None
) -> Callable[[Batch, torch.Generator], dict[str, Tensor]]:
    def loss(batch: Batch, g: torch.Generator) -> dict[str, Tensor]:
        if seen is not None:
            seen.append(torch.randn(3, generator=g))
        return {"loss": (net(batch[0].double()) - batch[1].double()).square().mean()}

    return loss


def test_accumulation_is_the_larger_batch(tmp_path: Path) -> None:
    """Without batch normalisation, in float64: equal to rounding, and so is the logged loss."""
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    two, plan = copy.deepcopy(one), replace(PLAN, ema=0.0)

    def double(step: int) -> Batch:
        return tuple(torch.cat(parts) for parts in zip(make(2 * step), make(2 * step + 1), strict=True))  # type: ignore[return-value]

    _, log = run(plan, one, double, quiet_loss(one), weight_sum, tmp_path / "one", 0)
    _, log_too = run(replace(plan, accumulate=2), two, make, quiet_loss(two), weight_sum, tmp_path / "two", 0)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert [row["grad_norm"] for row in log] == pytest.approx([row["grad_norm"] for row in log_too], rel=1e-6)
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in log_too], rel=1e-9)


def test_parts_of_an_accumulated_batch_have_noise_of_their_own(tmp_path: Path) -> None:
    net, seen = nn.Linear(3, 2).double(), []
    run(replace(PLAN, ema=0.0, accumulate=2), net, make, quiet_loss(net, seen), weight_sum, tmp_path, 0)
    assert len({tuple(noise.tolist()) for noise in seen}) == 24


def test_ema_and_optimizer_are_what_they_say(tmp_path: Path) -> None:
    """Against a loop written out by hand: AdamW on what trains, clipped, an EMA that warms up."""
    net, hand, plan = Net(), Net(), replace(PLAN, ema=0.6)
    kept, _ = run(plan, net, make, noisy_loss(net), weight_sum, tmp_path, 0)
    trained = [p for p in hand.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=plan.betas, weight_decay=plan.weight_decay)
    slow = {name: value.clone() for name, value in hand.state_dict().items()}
    for step in range(12):
        optimizer.param_groups[0]["lr"] = plan.lr * plan.rate(step)
        optimizer.zero_grad()
        noisy_loss(hand)(make(step), generator(plan.seed, step))["loss"].backward()
        nn.utils.clip_grad_norm_(trained, plan.clip)
        optimizer.step()
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in hand.state_dict().items():
            slow[name] = decay * slow[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
    for name, value in kept.state_dict().items():
        torch.testing.assert_close(value, slow[name], atol=1e-6, rtol=1e-5)
    assert torch.equal(net.frozen, torch.ones(2))


def test_validation_reads_what_is_kept(tmp_path: Path) -> None:
    _, kept, log = train(tmp_path)
    assert log[-1]["sum"] == weight_sum(kept)["sum"]
    assert [row["step"] for row in log if "sum" in row] == [4, 8, 12]


def test_log_on_disk_is_the_log(tmp_path: Path) -> None:
    _, _, log = train(tmp_path)
    assert [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()] == log
    assert set(log[0]) == {"step", "lr", "grad_norm", "loss", "largest"}
    written = card((PLAN,), log, "python -m train tiny")
    assert (
        written["results"] == log[-1] and written["settings"][0]["lr"] == PLAN.lr and "OpenMoji" in written["licence"]
    )
    json.dumps(written)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, value: float) -> None:
    def bad(step: int) -> Batch:
        x, y = make(step)
        return (x, y + value) if step == 7 else (x, y)

    with pytest.raises(FloatingPointError, match=r"tiny: .* at step 8"):
        train(tmp_path, replace(PLAN, save_every=4), make=bad)
    state = checkpoint.load(tmp_path / "tiny.pt")
    assert state is not None and state["step"] == 4
    assert all(tensor.isfinite().all() for tensor in state["module"].values())


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path: Path) -> None:
    """sqrt at 0: the loss is 0, its gradient infinite; no checkpoint may hold what the step makes of the weights."""
    net = nn.Linear(3, 2)

    def loss(batch: Batch, _: torch.Generator) -> dict[str, Tensor]:
        return {"loss": net(batch[0]).square().sum().mul(0).sqrt()}

    with pytest.raises(FloatingPointError):
        run(replace(PLAN, ema=0.0, save_every=1), net, make, loss, weight_sum, tmp_path, 0)
    assert not (tmp_path / "tiny.pt").exists()


# the rate, the data, the random numbers


def test_rate() -> None:
    """A share of the full rate: up over `warmup` steps, flat, down to nothing over the last `decay` of them."""
    plan = Plan("p", steps=1000, batch=1, lr=0.5, warmup=100, decay=0.4)
    rates = [plan.rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01) and rates[99:600] == [1.0] * 501
    assert all(a < b for a, b in pairwise(rates[:100]))
    assert all(a > b for a, b in pairwise(rates[600:]))
    assert rates[800] == pytest.approx(0.5) and 0 < rates[999] == pytest.approx(1 / 400)


@pytest.mark.parametrize(("warmup", "decay"), [(0, 0.4), (1, 0.0), (0, 0.0)])
def test_rate_without_warmup_or_decay(warmup: int, decay: float) -> None:
    plan = Plan("p", steps=10, batch=1, lr=0.5, warmup=warmup, decay=decay)
    assert plan.rate(0) == 1.0 and (plan.rate(9) == 1.0) == (decay == 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_comes_in_order(workers: int) -> None:
    assert list(stream(lambda step: step * step, 3, 9, workers)) == [9, 16, 25, 36, 49, 64]


def test_workers_change_no_number(tmp_path: Path) -> None:
    _, kept, log = train(tmp_path / "a")
    _, kept_too, log_too = train(tmp_path / "b", workers=1)
    assert numbers(log) == numbers(log_too) and same(kept, kept_too)


def test_random_numbers_of_a_step_are_its_own() -> None:
    """For every seed: a CPU generator reads only 32 bits of what it is seeded with."""
    drawn = {tuple(torch.randn(4, generator=generator(seed, step)).tolist()) for seed in range(3) for step in range(50)}
    assert len(drawn) == 150
    assert torch.equal(torch.randn(4, generator=generator(2, 7)), torch.randn(4, generator=generator(2, 7)))


# checkpoints


def test_checkpoint_round_trip_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.pt"
    assert checkpoint.load(path) is None
    checkpoint.save(path, {"x": torch.arange(3), "log": [{"loss": 0.1, "step": 1}]})
    state = checkpoint.load(path)
    assert state is not None and torch.equal(state["x"], torch.arange(3)) and state["log"] == [{"loss": 0.1, "step": 1}]
    assert [file.name for file in path.parent.iterdir()] == ["a.pt"]


def test_an_interrupted_save_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"step": 1})

    def full(_: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"step": 1}


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("plain", [False, True])
def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path, plain: bool) -> None:
    state = {"step": 1, "module": Malicious(tmp_path / "owned")}
    if plain:
        (tmp_path / "tiny.pt").write_bytes(pickle.dumps(state))
    else:
        torch.save(state, tmp_path / "tiny.pt")
    with pytest.raises(pickle.UnpicklingError):
        train(tmp_path)
    assert not (tmp_path / "owned").exists()
