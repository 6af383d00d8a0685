"""Load a base model in this process; print {seconds, memory} as JSON.  `python -m eval.peers.loading FOLDER ours|theirs DTYPE`

The clock stops when all pages of the weights are in memory, because diffusers memory-maps files and only reads them on first use.
`memory` is the growth of this process's peak memory divided by the bytes of the weights.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from checkpoints.single_file import load_single
from eval.peers.official import SINGLE


def peak_bytes() -> int:
    match = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def load(folder: Path, side: str, dtype: torch.dtype) -> list[nn.Module]:
    """Load UNet, VAE and text encoder; `side` is "ours" or "theirs"."""
    if side == "ours":
        base = load_single(folder / SINGLE, dtype)
        return [base.unet, base.vae, base.text]
    return [
        UNet2DConditionModel.from_pretrained(folder / "diffusers" / "unet", torch_dtype=dtype),
        AutoencoderKL.from_pretrained(folder / "diffusers" / "vae", torch_dtype=dtype),
        CLIPTextModel.from_pretrained(folder / "diffusers" / "text_encoder", dtype=dtype),
    ]


def main() -> None:
    folder, side, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
    before, began = peak_bytes(), time.perf_counter()
    parameters = [p for part in load(folder, side, dtype) for p in part.parameters()]
    for p in parameters:
        p.as_strided((-(-p.numel() // 1024),), (1024,)).sum()  # touch every page
    took, grown = time.perf_counter() - began, peak_bytes() - before
    print(json.dumps({"seconds": took, "memory": grown / sum(p.nbytes for p in parameters)}))


if __name__ == "__main__":
    main()
