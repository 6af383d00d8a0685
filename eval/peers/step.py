"""Time a step of the UNet: diffusers', this project's, and its fast form.  `python -m eval.peers.step FOLDER COLUMN DTYPE`

A step is one call with the adapter: a guidance batch of 2, and latents of 64 x 64.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from checkpoints.adapters import load_adapter
from checkpoints.single_file import load_single
from eval.peers import official
from eval.peers.timing import Run, seconds
from model.adapter import IPAdapter
from model.context import Context
from model.fast import fasten
from model.image_encoder import VIT_H
from model.image_projection import ImageProjection
from model.unet import SD15, UNet
from sampling.loading import compile_unet
from sampling.machine import keep_memory

# A name, the network, and whether the process keeps freed memory (sampling/machine.py).
COLUMNS = {
    "diffusers": ("theirs", False),
    "plain": ("plain", False),
    "fast": ("fast", True),
    "diffusers, memory kept": ("theirs", True),
}
FORMS: dict[str, Callable[[UNet], Callable[..., Any]]] = {"plain": lambda unet: unet, "fast": fasten, "compiled": compile_unet}
RATIOS = {
    "plain": ("plain", "diffusers"),
    "fast": ("fast", "diffusers"),
    "fast, and diffusers keeps memory too": ("fast", "diffusers, memory kept"),
}


def inputs(dtype: torch.dtype, batch: int = 2, side: int = 64) -> tuple[torch.Tensor, ...]:
    """Return latents `b 4 side side`, text tokens `b 77 768` and image embeddings `b 1024`."""
    g = torch.Generator().manual_seed(1)
    shapes = (batch, 4, side, side), (batch, 77, 768), (batch, 1024)
    return tuple(torch.randn(*shape, generator=g).to(dtype) for shape in shapes)


def network_of(folder: Path, name: str, dtype: torch.dtype) -> Callable[[int, int], Run]:
    """Load a network, "theirs" or one of `FORMS`. Return a function of batch and side of the latents that returns a step."""
    if name == "theirs":
        peer = official.peer_unet(folder, dtype)

        def their_step(batch: int, side: int) -> Run:
            x, text, image = inputs(dtype, batch, side)
            conditions = {"image_embeds": [image[:, None]]}
            return lambda: peer(x, 500, text, added_cond_kwargs=conditions)

        return their_step
    unet = load_single(folder / official.SINGLE, dtype).unet
    adapter = load_adapter(folder / official.ADAPTER, unet, VIT_H, dtype)
    form = FORMS[name](unet)

    def our_step(batch: int, side: int) -> Run:
        x, text, image = inputs(dtype, batch, side)
        context = adapter(Context(text), image)
        return lambda: form(x, 500, context)

    return our_step


def operations() -> int:
    """Return the floating-point operations of the matrix products, convolutions and attention of a step."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet = UNet(SD15)
        adapter = IPAdapter(unet, ImageProjection(VIT_H.output_dim, SD15.context_dim))
        x, text, image = (torch.empty_like(tensor, device="meta") for tensor in inputs(torch.float32))
        unet(x, torch.zeros(1), adapter(Context(text), image))
    return int(counter.get_total_flops())


def main() -> None:
    folder, column, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
    network, keeps = COLUMNS[column]
    with torch.no_grad():
        run = network_of(folder, network, dtype)(2, 64)
        if keeps:
            keep_memory()
        print(json.dumps({"seconds": seconds(run)}))


if __name__ == "__main__":
    main()
