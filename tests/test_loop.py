"""The training loop: bit-exact resumption through its real interrupt, accumulation, the rate, and safe checkpoints."""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import PLAN, Batch, Net, make, noisy_loss, numbers, same, train, weight_sum
from torch import Tensor, nn

from train import checkpoint, loop
from train.data import OnTheFly
from train.errors import DamagedState, Diverged, Interrupted, OtherRun
from train.loop import run
from train.plan import Plan
from train.randomness import generator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Whatever a test does, pytest's own Ctrl-C comes back."""
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


def stop_at(step: int, number: int = signal.SIGINT) -> Callable[[int], Batch]:
    """Data whose step `step` is when the user presses Ctrl-C."""

    def made(at: int) -> Batch:
        if at == step:
            os.kill(os.getpid(), number)
        return make(at)

    return made


# going on


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_a_stopped_run_goes_on_to_the_last_bit(tmp_path: Path, ema: float, number: int) -> None:
    plan = replace(PLAN, ema=ema)
    whole, kept, log = train(tmp_path / "whole", plan)
    with pytest.raises(Interrupted, match="stopped after step 5"):
        train(tmp_path / "parts", plan, make=stop_at(4, number))
    resumed, kept_too, log_too = train(tmp_path / "parts", plan)
    assert numbers(log_too) == numbers(log) and len(log) == 12
    assert same(whole, resumed) and same(kept, kept_too)
    assert (kept is whole) == (ema == 0)


def test_the_seed_draws_the_noise(tmp_path: Path) -> None:
    first = []
    for seed in (0, 1):
        net = Net()
        _, log = run(replace(PLAN, seed=seed), net, OnTheFly(make), noisy_loss(net), weight_sum, tmp_path / str(seed), 0)
        first.append(log[0]["loss"])
    assert first[0] != first[1]


def test_a_run_stopped_three_times(tmp_path: Path) -> None:
    _, kept, log = train(tmp_path / "whole")
    for step in (0, 1, 8):
        with pytest.raises(Interrupted, match=f"stopped after step {step + 1}"):
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
    _, kept_too, log_too = train(tmp_path / "parts", plan)
    assert numbers(log_too) == numbers(log) and same(kept, kept_too)


def test_a_stopped_run_with_accumulation_sees_the_same_data(tmp_path: Path) -> None:
    plan = replace(PLAN, accumulate=2)
    _, kept, log = train(tmp_path / "whole", plan)
    with pytest.raises(Interrupted, match="stopped after step 5"):
        train(tmp_path / "parts", plan, make=stop_at(9))
    _, kept_too, log_too = train(tmp_path / "parts", plan)
    assert numbers(log_too) == numbers(log) and same(kept, kept_too)


def test_a_run_in_parts_is_the_whole_run(tmp_path: Path) -> None:
    """`until` neither changes the rate nor adds a validation that the whole run keeps out of its numbers."""
    _, kept, log = train(tmp_path / "whole")
    for until in (4, 8, None):
        _, part, rows = train(tmp_path / "parts", until=until)
        assert len(rows) == (until or PLAN.steps)
    assert numbers(rows) == numbers(log) and same(kept, part)


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    _, kept, log = train(tmp_path)
    _, kept_too, log_too = train(tmp_path, make=lambda _: pytest.fail("data was made"))
    assert same(kept, kept_too) and log_too == log


FACTS = {"pictures": "1a", "captions": "2b", "base": "3c"}


@pytest.mark.parametrize("steps", [5, None])
@pytest.mark.parametrize("other", [{"pictures": "x"}, {"captions": "x", "base": "x"}, {"side": 512}])
def test_the_state_of_other_data_is_not_taken(tmp_path: Path, other: dict[str, Any], steps: int | None) -> None:
    """Of a run that is finished, or half done: neither returned nor continued, and the sentence names what differs."""
    train(tmp_path, until=steps, made_from=FACTS)
    before = (tmp_path / "tiny.pt").read_bytes()
    names = ", ".join(other)
    with pytest.raises(OtherRun, match=rf"tiny\.pt is the state of a run with different {names}: choose another folder"):
        train(tmp_path, made_from={**FACTS, **other})
    with pytest.raises(OtherRun, match="with different first weights:"):  # the first weights
        train(tmp_path, seed=1, made_from=FACTS)
    assert (tmp_path / "tiny.pt").read_bytes() == before
    assert len(train(tmp_path, made_from=FACTS)[2]) == 12
    with pytest.raises(OtherRun, match=f"with different {names}:"):  # what is known early is asked early
        checkpoint.refuse_other(tmp_path / "tiny.pt", other, complete=False)


@pytest.mark.parametrize("steps", [3, None])
def test_a_setting_that_is_left_out_is_another_setting(tmp_path: Path, steps: int | None) -> None:
    train(tmp_path, until=steps, made_from={**FACTS, "noise offset": 0.1})
    with pytest.raises(OtherRun, match="with different noise offset: choose another folder"):
        train(tmp_path, made_from=FACTS)


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def flipped(path: Path) -> None:
    """One bit of a weight."""
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path, weights_only=True)["kept"]["layers.0.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a bit": flipped,
    "text": lambda path: path.write_text("<html>"),
    "a list": lambda path: torch.save([1, 2], path),
    "no step": lambda path: edited(path, lambda s: s.pop("step")),
    "no optimizer": lambda path: edited(path, lambda s: s.pop("optimizer")),
    "another optimizer": lambda path: edited(path, lambda s: s["optimizer"].pop("state")),
    "a tensor less": lambda path: edited(path, lambda s: s["module"].pop("layers.0.weight")),
    "a tensor more": lambda path: edited(path, lambda s: s["kept"].update(x=torch.ones(1))),
    "another shape": lambda path: edited(path, lambda s: s["kept"].update({"layers.0.weight": torch.ones(1)})),
    "no tensor": lambda path: edited(path, lambda s: s["module"].update({"layers.0.weight": None})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_named_with_what_to_do(tmp_path: Path, damage: str) -> None:
    train(tmp_path, until=4)
    DAMAGES[damage](tmp_path / "tiny.pt")
    before = (tmp_path / "tiny.pt").read_bytes()
    with pytest.raises(DamagedState, match=r"tiny\.pt is damaged \(.+\): remove it to restart this part of the training"):
        train(tmp_path)
    assert (tmp_path / "tiny.pt").read_bytes() == before


def test_seconds_are_of_the_whole_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(loop.time, "monotonic", lambda: float(next(clock)))
    train(tmp_path, until=4)
    first = train(tmp_path, until=4)[2][-1]["seconds"]
    assert train(tmp_path)[2][-1]["seconds"] > first + 70


def test_a_state_is_saved_every_five_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where `save_every` steps take longer: each step takes 2 minutes here, as long as nothing else reads the clock."""
    times, saved = [0.0], []
    monkeypatch.setattr(loop.time, "monotonic", lambda: times[0])
    monkeypatch.setattr(checkpoint, "save", lambda _, state: saved.append(state["step"]))

    def slow(step: int) -> Batch:
        times[0] += 120
        return make(step)

    train(tmp_path, make=slow)
    assert saved == [3, 6, 9, 12]


def test_a_state_holds_only_what_changes(tmp_path: Path) -> None:
    """Frozen weights are those that the module starts with, which the state knows by their hash."""
    train(tmp_path, until=4)
    state = checkpoint.load(tmp_path / "tiny.pt")
    assert state is not None and state["module"].keys() == state["kept"].keys() == Net().state_dict().keys() - {"frozen"}


@dataclass(frozen=True)
class More(Plan):
    extra: float = 0.5


def test_the_state_of_another_run_is_not_taken(tmp_path: Path) -> None:
    """Nor lost: it stays where it is."""
    train(tmp_path)
    before = (tmp_path / "tiny.pt").read_bytes()
    with pytest.raises(ValueError, match="with different steps, lr: choose another folder"):
        train(tmp_path, replace(PLAN, steps=13, lr=2e-2))
    with pytest.raises(ValueError, match="with different extra: choose another folder"):  # a setting that older plans lack
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
        with pytest.raises((Interrupted, Diverged)):
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

    _, log = run(plan, one, OnTheFly(double), quiet_loss(one), weight_sum, tmp_path / "one", 0)
    _, log_too = run(replace(plan, accumulate=2), two, OnTheFly(make), quiet_loss(two), weight_sum, tmp_path / "two", 0)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)
    assert [row["grad_norm"] for row in log] == pytest.approx([row["grad_norm"] for row in log_too], rel=1e-6)
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in log_too], rel=1e-9)


def test_parts_of_an_accumulated_batch_have_noise_of_their_own(tmp_path: Path) -> None:
    net, seen = nn.Linear(3, 2).double(), []
    run(replace(PLAN, ema=0.0, accumulate=2), net, OnTheFly(make), quiet_loss(net, seen), weight_sum, tmp_path, 0)
    assert len({tuple(noise.tolist()) for noise in seen}) == 24


def test_ema_and_optimizer_are_what_they_say(tmp_path: Path) -> None:
    """Against a loop written out by hand: AdamW on what trains, clipped, an EMA that warms up."""
    net, hand, plan = Net(), Net(), replace(PLAN, ema=0.6)
    kept, _ = run(plan, net, OnTheFly(make), noisy_loss(net), weight_sum, tmp_path, 0)
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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, value: float) -> None:
    def bad(step: int) -> Batch:
        x, y = make(step)
        return (x, y + value) if step == 7 else (x, y)

    with pytest.raises(FloatingPointError, match=r"tiny, step 8: "):
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
        run(replace(PLAN, ema=0.0, save_every=1), net, OnTheFly(make), loss, weight_sum, tmp_path, 0)
    assert not (tmp_path / "tiny.pt").exists()


# the rate


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


def test_workers_change_no_number(tmp_path: Path) -> None:
    _, kept, log = train(tmp_path / "a")
    _, kept_too, log_too = train(tmp_path / "b", workers=1)
    assert numbers(log) == numbers(log_too) and same(kept, kept_too)


@pytest.mark.parametrize("factor", [1, 2, 8])
def test_a_scaled_plan_sees_as_many_pictures(factor: int) -> None:
    plan = Plan("tiny", steps=800, batch=4, lr=1e-2, warmup=80, ema=0.99, validate_every=400)
    scaled = plan.scale_batch(factor)
    assert scaled.steps * scaled.batch == plan.steps * plan.batch and scaled.lr == plan.lr
    assert scaled.ema**scaled.steps == pytest.approx(plan.ema**plan.steps)
    assert [scaled.rate(i // factor) for i in (799, 400)] == pytest.approx([plan.rate(i) for i in (799, 400)], abs=0.03)
    assert plan.scale_batch(10_000).steps == 1
