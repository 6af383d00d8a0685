"""Several processes train one adapter: the same numbers on 1, 2 and 4, exact resumption, and how a run ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from own_pictures import ENVIRONMENT, IMAGE, UNET, base, command, write_pictures
from safetensors.torch import load_file
from teams import together
from torch import Tensor
from torch.distributed.tensor import DTensor

from checkpoints.files import NotWritten
from model.features import Features
from sampling.loading import load
from train import adapter, checkpoint, processes
from train.__main__ import main, status
from train.clock import ROW
from train.data import OnTheFly, ProcessBatches, ShuffledBatches
from train.errors import Interrupted
from train.loss import drops, noise_for, sample_inputs
from train.pairs import Pairs
from train.processes import Team
from train.randomness import Share, seeded, share_generator
from train.setting import Setting
from train.sharding import shard, sharded_adamw
from train.shared import tree_sum

__all__ = ["base"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:these words are not")
PLAN = replace(adapter.PLAN, name="team", steps=6, batch=8, accumulate=2, bf16=False, lr=1e-2, warmup=2, ema=0.9, clip=0.05, save_every=2)


def pairs(n: int = 21) -> Pairs:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    features = Features(normal(n, 1, 1, IMAGE.output_dim), torch.zeros(1, 1, 1, IMAGE.output_dim))
    mean, std = normal(n, 4, 4, 4), normal(n, 4, 4, 4).abs()
    return Pairs(mean, std, torch.arange(n) % 5, normal(5, 77, UNET.context_dim), features)


@pytest.fixture(scope="module")
def setting(base: Path) -> Setting:
    return Setting(load(base, ()), pairs(), None)


def fitted(setting: Setting, folder: Path, until: int | None = None) -> None:
    with seeded(0):
        adapter.fit(setting, setting.adapter(), PLAN, folder, until=until)


def on(
    size: int, setting: Setting, folder: Path, until: int | None = None, parts: int = 0, shard_optimizer: bool = False
) -> dict[str, Any]:
    """The state after training in `size` processes."""
    together(size, lambda _: fitted(setting, folder, until), parts, shard_optimizer)
    state = checkpoint.load(folder / "team.pt")
    assert state is not None and state["step"] == (until or PLAN.steps)
    return state


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    inner = state.values() if isinstance(state, dict) else state if isinstance(state, list) else ()
    return [tensor for part in inner for tensor in tensors(part)]


def plain(state: dict[str, Any]) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in ROW} for row in state["log"]]


# the numbers


def test_any_number_of_processes_trains_the_same_bits(setting: Setting, tmp_path: Path) -> None:
    """With --deterministic: weights, moments and EMA after changes of the number of processes, and every number of the log."""
    whole = on(1, setting, tmp_path / "1", parts=4)
    assert len(tensors(whole)) > 20
    for sizes in ((2, 4), (4, 1), (1, 2)):
        folder = tmp_path / str(sizes)
        on(sizes[0], setting, folder, 3, parts=4)
        state = on(sizes[1], setting, folder, parts=4)
        assert plain(state) == plain(whole)
        for part in ("module", "kept", "optimizer"):
            assert all(torch.equal(a, b) for a, b in zip(tensors(state[part]), tensors(whole[part]), strict=True)), (sizes, part)


def agree(state: dict[str, Any], whole: dict[str, Any]) -> None:
    """The weights agree to 1e-6, and the log to 1e-4 of each number."""
    for part in ("module", "kept"):
        for a, b in zip(tensors(state[part]), tensors(whole[part]), strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    for row, expected in zip(plain(state), plain(whole), strict=True):
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_ddp_equals_one_process(setting: Setting, tmp_path: Path) -> None:
    """To 1e-6; the noise, timesteps and drops of a picture are those that one process draws."""
    fitted(setting, tmp_path / "1")
    whole = checkpoint.load(tmp_path / "1" / "team.pt")
    assert whole is not None
    on(2, setting, tmp_path, 3)
    agree(on(4, setting, tmp_path), whole)


def test_a_sharded_base_trains_the_same(setting: Setting, tmp_path: Path) -> None:
    """Each of two processes has half of the base, and both validate. The run is resumed on one process with the whole base."""
    setting = replace(setting, held_out=pairs(10))
    whole = on(1, setting, tmp_path / "1")

    def work(_: int) -> None:
        with seeded(0):
            own = setting.adapter()
        unet = setting.pipeline.unet
        size = sum(p.numel() for p in unet.parameters())
        shard(unet)
        assert sum(p.to_local().numel() for p in unet.parameters() if isinstance(p, DTensor)) < 0.6 * size
        adapter.fit(replace(setting, sharded=True), own, PLAN, tmp_path / "2", until=4)

    together(2, work)
    agree(on(1, setting, tmp_path / "2"), whole)


def test_sharded_moments_train_the_same_bits(setting: Setting, tmp_path: Path) -> None:
    """The saved state has all moments, so that a run goes on with other processes, and without --shard-optimizer."""
    whole = on(1, setting, tmp_path / "1", parts=4)
    on(2, setting, tmp_path, 2, parts=4, shard_optimizer=True)
    on(4, setting, tmp_path, 4, parts=4, shard_optimizer=True)
    state = on(1, setting, tmp_path, parts=4)
    for part in ("module", "kept", "optimizer"):
        assert all(torch.equal(a, b) for a, b in zip(tensors(state[part]), tensors(whole[part]), strict=True)), part
    on(2, setting, tmp_path / "ddp", 3, shard_optimizer=True)
    agree(on(2, setting, tmp_path / "ddp", shard_optimizer=True), whole)


def test_a_process_keeps_a_part_of_the_moments() -> None:
    """Half of them, within the largest tensor; its steps are those of torch's AdamW."""

    def work(_: int) -> None:
        weights = [torch.nn.Parameter(torch.randn(5, n, generator=torch.Generator().manual_seed(n))) for n in range(1, 20)]
        copies = [torch.nn.Parameter(p.detach().clone()) for p in weights]
        ours = sharded_adamw(weights, lr=0.1, weight_decay=0.01)
        theirs = torch.optim.AdamW(copies, lr=0.1, weight_decay=0.01)
        for step in range(3):
            for p, copy in zip(weights, copies, strict=True):
                p.grad = (p + step).detach()
                copy.grad = p.grad.clone()
            ours.step()
            theirs.step()
        assert all(torch.equal(p, copy) for p, copy in zip(weights, copies, strict=True))
        own = sum(state["exp_avg"].numel() for state in ours.optim.state.values())  # type: ignore[attr-defined]
        assert abs(own - sum(p.numel() for p in weights) / 2) <= 5 * 19

    together(2, work)


def test_random_numbers_of_a_picture_depend_on_its_position() -> None:
    """The shares of a batch draw what the whole batch draws, row by row."""
    rows = torch.arange(12)
    batch = pairs().at(rows)
    whole = sample_inputs(batch, torch.Generator().manual_seed(5), dropping=True)
    for of in (1, 2, 3, 4, 12):
        shares = [Share(i, of) for i in range(of)]
        generators = [share_generator(5, share, torch.device("cpu")) for share in shares]
        parts = [sample_inputs(pairs().at(rows[share.rows(12)]), g, dropping=True) for share, g in zip(shares, generators, strict=True)]
        for name in ("x0", "t", "eps", "text", "image"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), (of, name)


def test_one_process_draws_what_it_always_drew() -> None:
    """Shipped weights depend on these numbers: a generator's own, in the order latents, timesteps, noise, drops."""
    batch, g = pairs().at(torch.arange(7)), torch.Generator().manual_seed(3)
    x0 = batch.mean + batch.std * torch.randn(batch.mean.shape, generator=g)
    t = torch.randint(1000, (7,), generator=g)
    eps, r = torch.randn(x0.shape, generator=g), torch.rand(7, generator=g)
    drawn = sample_inputs(batch, torch.Generator().manual_seed(3), dropping=True)
    assert torch.equal(drawn.x0, x0) and torch.equal(drawn.t, t) and torch.equal(drawn.eps, eps)
    g = torch.Generator().manual_seed(3)
    batch.latents(g), noise_for(x0, g)
    assert torch.equal(drops(7, g)[0], (r >= 0.05) & (r < 0.15))


def test_shares_of_a_step_are_its_batches() -> None:
    data = ShuffledBatches(pairs(), 8, seed=1)
    for size, parts in ((1, 0), (1, 4), (2, 0), (2, 4), (4, 4), (4, 0)):
        teams = [Team(rank, size, parts) for rank in range(size)]
        shared = [ProcessBatches(data, team.shares, 2) for team in teams]
        read = [each.batch(3 * each.each + i) for each in shared for i in range(each.each)]
        actual = sorted(tuple(row.flatten().tolist()) for batch in read for row in batch.mean)
        assert actual == sorted(tuple(row.flatten().tolist()) for i in (6, 7) for row in data.batch(i).mean)


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="a batch of 10 cannot be split into 4 equal parts"):
        OnTheFly(lambda _: torch.zeros(10)).batch(0, 1, 4)


def test_sums_are_a_binary_tree() -> None:
    order: list[str] = []

    class Named(str):
        def __add__(self, other: str) -> Named:  # type: ignore[override]
            order.append(f"{self}+{other}")
            return Named(f"({self}{other})")

    assert tree_sum(lambda i: Named(i), 4) == "((01)(23))" and order == ["0+1", "2+3", "(01)+(23)"]  # type: ignore[comparison-overlap]


# how a run ends


@pytest.mark.parametrize("size", [2, 4])
def test_sigterm_to_one_process_saves_and_stops_all(setting: Setting, tmp_path: Path, size: int) -> None:
    """After the same step; the run then goes on to the same bits."""

    def work(rank: int) -> None:
        real = ShuffledBatches.batch

        def batch(self: Any, step: int, *share: int) -> Any:
            if rank == 1 and step == 6:  # in the fourth step
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, step, *share)

        ShuffledBatches.batch = batch  # type: ignore[method-assign]
        with pytest.raises(Interrupted, match="stopped after step 4;"):
            fitted(setting, tmp_path)

    together(size, work, parts=4)
    state = checkpoint.load(tmp_path / "team.pt")
    assert state is not None and state["step"] == 4
    whole = on(1, setting, tmp_path / "whole", parts=4)
    resumed = on(2, setting, tmp_path, parts=4)
    assert all(torch.equal(a, b) for a, b in zip(tensors(resumed["module"]), tensors(whole["module"]), strict=True))


def test_a_full_disk_ends_all_processes(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process, which writes, ends with its sentence, and the other sees that it ended. The last save stays."""
    on(2, setting, tmp_path, 2)
    before = (tmp_path / "team.pt").read_bytes()

    def full(*_: Any) -> None:
        raise NotWritten("team.pt can't be written: No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)

    def work(rank: int) -> None:
        try:
            fitted(setting, tmp_path)
        except NotWritten:
            (tmp_path / f"{rank} full").touch()
        except RuntimeError as error:
            assert processes.lost_another(error)
            (tmp_path / f"{rank} lost").touch()
        os._exit(0)

    together(2, work)
    assert {"0 full", "1 lost"} < {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "team.pt").read_bytes() == before


def test_processes_with_different_data_are_refused(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        processes.check_same({"pictures": "1a", "base": 3.5})
        with pytest.raises(ValueError, match="the processes read different pictures, captions: give all of them the same files"):
            processes.check_same({"pictures": f"{rank}", "captions": rank, "base": 3.5})

    together(2, work)


def test_one_sentence_is_said(tmp_path: Path) -> None:
    together(4, lambda rank: (tmp_path / f"{rank} {processes.speaks()}").touch())
    assert sorted(path.name.split()[1] for path in tmp_path.iterdir()) == ["False"] * 3 + ["True"]


@pytest.mark.parametrize(
    ("team", "batch", "sentence"),
    [
        (Team(0, 3), 32, "--batch 32 cannot be shared equally by 3 processes: choose a multiple of 3"),
        (Team(0, 2, 8), 12, "--batch 12 cannot be shared equally by 8 parts of --deterministic: choose a multiple of 8"),
        (Team(0, 3, 8), 24, "3 processes cannot share the 8 parts of --deterministic: use 1, 2, 4"),
        (Team(0, 16, 8), 32, "16 processes cannot share the 8 parts of --deterministic: use 1, 2, 4, ... processes, at most 8"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(team: Team, batch: int, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_team", team)
    with pytest.raises(ValueError, match=sentence):
        processes.check_shares(batch)


def test_sharding_from_the_command_line(base: Path, tmp_path: Path) -> None:
    """The first process writes the adapter, and says whether it learned. --checkpointing gathers the base again."""
    write_pictures(tmp_path / "data", 24)
    line = command(tmp_path, base, "--shard", "--shard-optimizer", "--checkpointing")
    run = torchrun(2, line)
    said, errors = run.communicate(timeout=600)
    assert run.returncode == 0, errors[-3000:]
    assert re.search(r"ip_adapter.safetensors: it (has not )?learned", said)


@pytest.mark.parametrize(("size", "options", "sentence"), [(1, [], "with torchrun"), (2, ["--preview-every", "5"], "only a part")])
def test_sharding_that_cannot_be_is_refused(
    size: int, options: list[str], sentence: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train import __main__ as command_line

    write_pictures(tmp_path / "data", 4)
    monkeypatch.setattr(processes, "_team", Team(0, size))
    arguments = command_line.parser("").parse_args(command(tmp_path, base, "--shard", *options))
    with pytest.raises(ValueError, match=sentence):
        command_line.source_of(arguments, "adapter", tmp_path).pipeline("cpu")


def test_sharding_the_moments_takes_several_processes(base: Path, tmp_path: Path) -> None:
    from train import __main__ as command_line

    arguments = command_line.parser("").parse_args(command(tmp_path, base, "--shard-optimizer"))
    with pytest.raises(ValueError, match="--shard-optimizer shares the moments of several processes: start"):
        command_line.train_stages(arguments, "", Team())


def test_other_stages_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from train import __main__ as command_line

    with pytest.raises(ValueError, match="several processes can train adapter or plus: start `python -m train vae` without torchrun"):
        command_line.train_stages(command_line.parser("").parse_args(["vae"]), "", Team(0, 2))


# torchrun


def torchrun(size: int, arguments: list[str]) -> subprocess.Popen[str]:
    """Start the command in processes that torchrun starts again once if one of them fails."""
    options = ["--standalone", "--nproc-per-node", str(size), "--max-restarts", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "train", *arguments]
    return subprocess.Popen(launch, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def workers_of(launcher: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launcher)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_torchrun_restarts_a_run_that_lost_a_process(base: Path, tmp_path: Path) -> None:
    """SIGKILL of one of two: the other says so and ends within a minute. The restart ends in what one process alone trains, bit by bit."""
    write_pictures(tmp_path / "data", 24)
    line = command(tmp_path, base, "--steps", "100", "--save-every", "5", "--deterministic", "2", "--batch", "2")
    run, state = torchrun(2, line), tmp_path / "state" / "ip_adapter.pt"
    try:
        wait_for(lambda: state.exists() or run.poll() is not None)
        assert run.poll() is None, run.communicate()[1][-3000:]
        first, second = workers_of(run.pid)
        os.kill(second, signal.SIGKILL)
        wait_for(lambda: first not in workers_of(run.pid), 60)
        said = run.communicate(timeout=900)[1]
        assert run.returncode == 0, said[-3000:]
    finally:
        run.terminate()
        run.wait()
    sentences = [each for each in said.replace("\r", "\n").splitlines() if each.startswith("error: ")]
    assert sentences == ["error: another process of this run ended; the same command resumes the run from its last save"]
    assert json.loads((tmp_path / "out" / "ip_adapter.json").read_text())["results"]["step"] == 100
    shutil.move(tmp_path / "out", tmp_path / "restarted")
    shutil.rmtree(tmp_path / "state")
    main(line)
    restarted, whole = (load_file(tmp_path / name / "ip_adapter.safetensors") for name in ("restarted", "out"))
    assert all(torch.equal(restarted[name], whole[name]) for name in whole)


def test_each_process_takes_its_gpu() -> None:
    assert processes.own_gpu("cuda", 3, 4) == 3
    with pytest.raises(ValueError, match="this machine has 2 GPUs: start at most 2 processes on it"):
        processes.own_gpu("cuda", 2, 2)
    with pytest.raises(ValueError, match="--device cuda:1 is a single GPU: give --device cuda"):
        processes.own_gpu("cuda:1", 0, 2)


def test_deterministic_needs_a_power_of_two(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for parts in ("3", "0", "x"):
        with pytest.raises(SystemExit):
            main(["adapter", "--deterministic", parts])
        assert "argument --deterministic" in capsys.readouterr().err
    write_pictures(tmp_path / "data", 4)
    said = status(command(tmp_path, base, "--deterministic", "8"))
    assert said == "error: --batch 4 cannot be shared equally by 8 parts of --deterministic: choose a multiple of 8"
    assert processes.team() == Team()
