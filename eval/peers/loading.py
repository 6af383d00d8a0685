"""Load a base model in this process, and read all its weights.  `python -m eval.peers.loading FOLDER ours|theirs DTYPE`

Prints JSON: the seconds until the model is loaded (`seconds`) and until its weights were read as well (`seconds_read`), and the
anonymous memory (`RssAnon`, which the system cannot drop under pressure) that this has added, divided by the bytes of the weights
(`memory_read`).
The reading counts, because both sides map files: a page is read when it is first needed. All libraries are imported before the clock
starts.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import open_clip  # noqa: F401  (loaded before the clock starts, as their libraries are)
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from checkpoints.single_file import load_single
from eval.peers.official import SINGLE
from eval.peers.timing import memory


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


def read(parameters: list[nn.Parameter]) -> None:
    """Read a number from every page of the weights."""
    for p in parameters:
        p.as_strided((-(-p.numel() // 1024),), (1024,)).sum()


def main() -> None:
    folder, side, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
    before, began = memory("RssAnon"), time.perf_counter()
    parameters = [p for part in load(folder, side, dtype) for p in part.parameters()]
    loaded = time.perf_counter() - began
    read(parameters)
    both = {"seconds": loaded, "seconds_read": time.perf_counter() - began}
    print(json.dumps(both | {"memory_read": (memory("RssAnon") - before) / sum(p.nbytes for p in parameters)}))


if __name__ == "__main__":
    main()
