"""The device of a measurement: its name, batch size and dtype."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch
from torch import nn

from train.plan import has_bfloat16

# flags of /proc/cpuinfo, from the narrowest
VECTORS = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_bf16": "AVX-512 with bfloat16", "amx_bf16": "AMX"}


def device_of(module: nn.Module) -> str:
    """Return the device of a module's weights."""
    return str(next(module.parameters()).device)


def batch_size(device: str, side: int = 64) -> int:
    """Return how many pictures to encode or draw at a time: 32 on the CPU, 256 on other devices; fewer above 64 x 64 pixels."""
    most = 32 if device.startswith("cpu") else 256
    return max(1, most * 64**2 // max(64, side) ** 2)


def precision(device: str) -> torch.autocast:
    """Return the autocast for drawing: bfloat16 if the device supports it, as in training."""
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=has_bfloat16(device))


def dtype(device: str) -> str:
    """Name the dtype that `precision` selects, for a results file."""
    with precision(device):
        return "bfloat16" if torch.is_autocast_enabled(device.split(":")[0]) else "float32"


def processor(device: str) -> str:
    """Return the name of a GPU, or of the processor (from /proc/cpuinfo)."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match[1] if match else platform.machine()


def machine() -> str:
    """Describe the processor: its name, its widest vector instructions, and the number of threads that PyTorch uses."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    widest = [name for flag, name in VECTORS.items() if flag in flags][-1:]
    return ", ".join([processor("cpu"), *widest, f"{torch.get_num_threads()} threads"])
