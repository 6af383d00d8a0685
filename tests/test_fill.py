"""Loaded modules own their memory: no more than the file takes, and nothing changes with the file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from base_files import (
    Peers,
    base,
    check_base,
    single,
    write_single,
)
from safetensors.torch import save_file

from checkpoints.names import named, unet_rows
from checkpoints.single_file import load_single
from model.unet import UNet, UNetConfig

ROOT = Path(__file__).parent.parent
__all__ = ["base", "single"]  # fixtures


def test_a_module_outlives_its_file(base: Peers, tmp_path: Path) -> None:
    """Weights are copied, so a file that is written over does not change a model in use."""
    for suffix in (".safetensors", ".ckpt"):
        path = write_single(base, tmp_path / f"sd{suffix}")
        found = load_single(path, dtype=None)
        path.write_bytes(bytes(path.stat().st_size))
        check_base(found, base.ours)


MEASURE = """
import sys, threading
from pathlib import Path
from checkpoints.single_file import load_single

def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

load_single(Path(sys.argv[2]), None)
before = peak = anonymous()
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
base = load_single(Path(sys.argv[1]), None)
done.set()
thread.join()
print(max(peak, anonymous()) - before, sum(p.nbytes for p in base.unet.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_peak_memory_is_that_of_the_file(base: Peers, single: Path, tmp_path: Path, suffix: str) -> None:
    """RssAnon, which the kernel can't reclaim, of loading 300 MB: at most 1.05 x the file."""
    config = UNetConfig(channels=(320, 640), depth=(1, 0), heads=(8, 8), res_blocks=1, context_dim=16)
    with torch.device("meta"):
        unet = UNet(config)
    state = unet.state_dict()
    wide = {
        f"model.diffusion_model.{ldm}": torch.zeros(state[name].shape)
        for name, (ldm,) in named(state, unet_rows(config), 2).items()
    }
    tensors = wide | {k: v for k, v in base.single.items() if not k.startswith("model.diffusion_model.")}
    path = tmp_path / f"wide{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    del wide, tensors
    size = path.stat().st_size
    measured = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(single)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    path.unlink()
    peak, loaded = map(int, measured.stdout.split())
    print(f"peak RssAnon {peak / size:.3f} x the file of {size / 1e6:.0f} MB")
    assert size > 250e6 and loaded > 0.9 * size
    assert 0.9 * loaded < peak < 1.05 * size


