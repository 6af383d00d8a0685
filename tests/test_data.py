"""Batches as a function of the step, and random numbers that depend on seed and step alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_run import Labelled
from torch import Tensor, nn

from train.album import CaptionedPicture, ListAlbum
from train.data import Data, Files, OnTheFly, ShuffledBatches, map_tensors, stream, tensors
from train.pairs import Pairs
from train.randomness import generator, seeded


@pytest.mark.parametrize("workers", [0, 1])
def test_data_comes_in_order(workers: int) -> None:
    assert list(stream(OnTheFly(lambda step: step * step), range(3, 9), workers)) == [9, 16, 25, 36, 49, 64]


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_workers_start_however_python_starts_processes(method: str) -> None:
    """Python 3.14 starts processes by forkserver, and so do the processes of an ablation by spawn; neither can pickle a function."""
    code = (
        f"import multiprocessing; multiprocessing.set_start_method({method!r})\n"
        "from train.data import OnTheFly, stream\n"
        "print(list(stream(OnTheFly(lambda i: 10 * i), range(3), 1)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert (done.stdout, done.stderr) == ("[0, 10, 20]\n", "")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_is_its_sentence_alone(workers: int) -> None:
    def broken(step: int) -> int:
        if step == 4:
            raise ValueError("a.png: the picture is damaged")
        return step

    batches = stream(OnTheFly(broken), range(3, 9), workers)
    assert next(batches) == 3
    with pytest.raises(ValueError, match=r"^a\.png: the picture is damaged$"):
        next(batches)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("data", ["on the fly", "cached"])
def test_processes_share_each_batch(data: str, size: int) -> None:
    """The shares, one after the other, are the batch that a single process reads."""
    pairs = Pairs(torch.arange(25.0), torch.zeros(25), torch.zeros(25, dtype=torch.long), torch.zeros(1, 1), None)
    kinds: dict[str, Data[Any]] = {
        "on the fly": OnTheFly(lambda step: (torch.arange(6) + step, {"x": torch.arange(12) * step})),
        "cached": ShuffledBatches(pairs, 6, seed=3),
    }
    own = kinds[data]
    for step in range(8):
        whole, shares = tensors(own.batch(step)), [tensors(own.batch(step, rank, size)) for rank in range(size)]
        for i, tensor in enumerate(whole[:2]):
            assert torch.equal(torch.cat([share[i] for share in shares]), tensor)


def test_files_come_in_a_cycle(tmp_path: Path) -> None:
    for i in range(3):
        Image.new("L", (4, 4), 50 * i).save(tmp_path / f"{i}.png")
    album = ListAlbum([CaptionedPicture(path, ("",), 0) for path in sorted(tmp_path.iterdir())])
    files = Files(album, lambda image: torch.tensor(float(image.getpixel((0, 0))[0])))
    assert [float(files.batch(step)) for step in range(5)] == [0, 50, 100, 0, 50]


def test_seeded_modules_depend_on_the_seed_alone() -> None:
    def built(seed: int) -> Tensor:
        with seeded(seed):
            return nn.Linear(3, 3).weight

    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = built(1)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert torch.equal(built(1), first) and not torch.equal(built(2), first)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_leaves_the_global_random_numbers_alone(workers: int) -> None:
    before = torch.get_rng_state()
    list(stream(OnTheFly(float), range(3), workers))
    assert torch.equal(before, torch.get_rng_state())


def test_random_numbers_of_a_step_are_its_own() -> None:
    """For every seed: a CPU generator reads only 32 bits of what it is seeded with."""
    drawn = {tuple(torch.randn(4, generator=generator(seed, step)).tolist()) for seed in range(3) for step in range(50)}
    assert len(drawn) == 150
    assert torch.equal(torch.randn(4, generator=generator(2, 7)), torch.randn(4, generator=generator(2, 7)))


def test_a_batch_that_hides_tensors_is_refused() -> None:
    x = torch.ones(2)
    assert [len(tensors(batch)) for batch in ((x, {"a": x, "b": (x, None)}), Labelled(x, x), x)] == [3, 2, 1]
    for hidden in ([x], (x, [x]), {"a": [x]}, (x, 1.0)):
        with pytest.raises(TypeError, match="a batch may not hold"):
            map_tensors(torch.clone, hidden)
