"""Loaded modules are mapped from their file: they take no more memory than it, and never write to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base_files import Peers, check_base, write_single
from safetensors.torch import save_file

from checkpoints.fill import copy_weights
from checkpoints.names import map_names, unet_rows
from checkpoints.reader import File
from checkpoints.single_file import load_single
from model.unet import UNet, UNetConfig

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_module_outlives_a_file_that_is_replaced(base: Peers, tmp_path: Path, suffix: str) -> None:
    """As all commands here write: a new file takes the name."""
    path = write_single(base, tmp_path / f"sd{suffix}")
    actual = load_single(path, dtype=None)
    (tmp_path / "new").write_bytes(bytes(path.stat().st_size))
    (tmp_path / "new").replace(path)
    check_base(actual, base.ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_copied_weights_outlive_a_file_that_is_written_over(base: Peers, tmp_path: Path, suffix: str) -> None:
    path = write_single(base, tmp_path / f"sd{suffix}")
    actual = load_single(path, dtype=None)
    for part in actual.parts.values():
        copy_weights(part)
    path.write_bytes(bytes(path.stat().st_size))
    check_base(actual, base.ours)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_a_change_to_a_module_is_not_written_to_its_file(base: Peers, tmp_path: Path, suffix: str) -> None:
    path = write_single(base, tmp_path / f"sd{suffix}")
    before = path.read_bytes()
    actual = load_single(path, dtype=None)
    for part in actual.parts.values():
        for weight in part.parameters():
            weight.fill_(0.5)
    assert path.read_bytes() == before
    check_base(load_single(path, dtype=None), base.ours)


def test_tensors_of_a_pickle_that_share_memory_are_separated(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    torch.save({"a": one, "b": one, "c": one[2:4], "d": torch.ones(2)}, tmp_path / "a.bin")
    file = File(tmp_path / "a.bin")
    loaded = {name: file[name] for name in file}
    for name, tensor in loaded.items():
        tensor.add_(1 + ord(name))
    assert loaded["a"].tolist() == [98, 99, 100, 101, 102, 103] and loaded["b"].tolist() == [99, 100, 101, 102, 103, 104]
    assert loaded["c"].tolist() == [102, 103] and loaded["d"].tolist() == [102, 102]


MEASURE = """
import os, sys, threading
from pathlib import Path
import torch
from checkpoints.single_file import load_single
from model.context import Context

def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

small, *large = map(Path, sys.argv[1:])
load_single(small, None)
for path in large:
    if os.fork():  # each file has a process of its own
        os.wait()
        continue
    before = peak = anonymous()
    done = threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    base = load_single(path, None)
    done.set()
    thread.join()
    loaded = max(peak, anonymous())
    with torch.no_grad():
        base.unet(torch.randn(1, 4, 8, 8), 5, Context(torch.randn(1, 3, 16)))
    print(loaded - before, max(loaded, anonymous()) - before, sum(p.nbytes for p in base.unet.parameters()), flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_peak_memory_is_that_of_the_file(base: Peers, single: Path, tmp_path: Path) -> None:
    """RssAnon, which the kernel can't reclaim, of 300 MB: little after the load, and at most 1.05 x the file after a step."""
    config = UNetConfig(channels=(320, 640), depth=(1, 0), heads=(8, 8), res_blocks=1, context_dim=16)
    with torch.device("meta"):
        unet = UNet(config)
    state = unet.state_dict()
    wide = {
        f"model.diffusion_model.{ldm}": torch.zeros(state[name].shape)
        for name, (ldm,) in map_names(state, unet_rows(config), 2).items()
    }
    tensors = wide | {k: v for k, v in base.single.items() if not k.startswith("model.diffusion_model.")}
    paths = tmp_path / "wide.safetensors", tmp_path / "wide.ckpt"
    save_file(tensors, paths[0])
    torch.save(tensors, paths[1])
    del wide, tensors
    command = [sys.executable, "-c", MEASURE, single, *paths]
    measured = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(measured) == len(paths)
    for path, line in zip(paths, measured, strict=True):
        size = path.stat().st_size
        path.unlink()
        loaded, stepped, weights = map(int, line.split())
        print(f"{path.suffix}: RssAnon {loaded / size:.3f} and {stepped / size:.3f} x the file of {size / 1e6:.0f} MB")
        assert size > 250e6 and weights > 0.9 * size
        assert loaded < 0.25 * size and stepped < 1.05 * size
