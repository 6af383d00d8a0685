"""Compare our outputs with those of the public implementations at full size.  `python -m eval parity`

The weights are random, with peaky attention, in the official layouts. The error is max |a - b| / max |b|, where b is the output of the
public network in float64. Another order of summation changes the last bits, and a deep network amplifies these differences. We therefore
allow at most twice the error of the public network itself, in float32 and in bfloat16.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints.adapters import load_adapter
from checkpoints.clip import load_image_encoder
from checkpoints.files import check_output, write_json
from checkpoints.single_file import load_single
from eval.peers import official, own_files
from eval.tables import markdown
from model.context import Context
from model.image_encoder import VIT_H

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Network = Callable[..., Tensor]
Make = Callable[[Path, torch.dtype], Network]


def _peer_unet(folder: Path, dtype: torch.dtype) -> Network:
    unet = official.peer_unet(folder, dtype)
    return lambda x, t, text, image: unet(x, t, text, added_cond_kwargs={"image_embeds": [image[:, None]]}).sample


def _our_unet(folder: Path, dtype: torch.dtype) -> Network:
    unet = load_single(folder / official.SINGLE, dtype).unet
    adapter = load_adapter(folder / official.ADAPTER, unet, VIT_H, dtype)
    return lambda x, t, text, image: unet(x, t, adapter(Context(text), image))


def _peer_encode(folder: Path, dtype: torch.dtype) -> Network:
    vae = official.peer_vae(folder, dtype)
    return lambda x: vae.encode(x).latent_dist.mean * vae.config.scaling_factor


def _peer_decode(folder: Path, dtype: torch.dtype) -> Network:
    vae = official.peer_vae(folder, dtype)
    return lambda z: vae.decode(z / vae.config.scaling_factor).sample


def _peer_text(folder: Path, dtype: torch.dtype) -> Network:
    text = official.peer_text(folder, dtype)
    return lambda tokens: text(tokens).last_hidden_state


def _peer_image(folder: Path, dtype: torch.dtype) -> Network:
    image = official.peer_image(folder, dtype)
    return lambda pixels: image(pixels).image_embeds


PARTS: dict[str, tuple[Make, Make]] = {
    "UNet + adapter": (_peer_unet, _our_unet),
    "VAE, encode": (_peer_encode, lambda f, d: load_single(f / official.SINGLE, d).vae.encode),
    "VAE, decode": (_peer_decode, lambda f, d: load_single(f / official.SINGLE, d).vae.decode),
    "text encoder": (_peer_text, lambda f, d: load_single(f / official.SINGLE, d).text),
    "image encoder": (_peer_image, lambda f, d: load_image_encoder(f / official.ENCODER, d)),
}


def inputs(part: str, side: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Draw random inputs for a part; `side` is the side of the latents."""
    g = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    if part == "UNet + adapter":
        return randn(2, 4, side, side), torch.tensor([981, 21]), randn(2, 77, 768), randn(2, 1024)
    if part == "VAE, encode":
        return (randn(1, 3, 8 * side, 8 * side).clamp(-1, 1),)
    if part == "VAE, decode":
        return (randn(1, 4, side, side),)
    if part == "text encoder":
        return (torch.randint(49406, (2, 77), generator=g),)
    return (randn(2, 3, 224, 224),)


@torch.no_grad()
def measure(folder: Path, side: int = 64, parts: tuple[str, ...] = tuple(PARTS)) -> dict[str, Any]:
    """Return {part: {dtype: [error of the public network, our error]}}."""
    official.write(folder)
    results: dict[str, Any] = {}
    for part in tqdm(parts, desc="parity", unit="part"):
        peer, ours = PARTS[part]
        want = peer(folder, torch.float64)(*inputs(part, side, torch.float64))
        gc.collect()
        results[part] = {}
        for name, dtype in DTYPES.items():
            errors = []
            for make in (peer, ours):
                got = make(folder, dtype)(*inputs(part, side, dtype)).double()
                errors.append(float((got - want).abs().max() / want.abs().max()))
                gc.collect()
            results[part][name] = errors
    return results


def table(results: dict[str, Any]) -> str:
    """Make the table of README.md and docs/parity.md."""
    frame = pd.DataFrame(
        [
            [part, *(f"{error:.1e}" for pair in errors.values() for error in pair)]
            for part, errors in results["parts"].items()
        ]
    )
    return markdown(frame.set_axis(["", *(name for dtype in DTYPES for name in (f"{dtype}: public", "ours"))], axis=1))


def evaluate(folder: Path, out: Path, side: int) -> dict[str, Any]:
    """Measure all parts and write `out` (JSON). Raises ValueError if our error is more than twice the public one."""
    check_output(out)
    parts = measure(folder, side)
    results = {"command": f"python -m eval parity --side {side}", "latents": side, "parts": parts}
    write_json(out, results)
    pairs = {f"{part} in {name}": pair for part, errors in parts.items() for name, pair in errors.items()}
    if worse := [f"{what}: {ours:.1e} against {theirs:.1e}" for what, (theirs, ours) in pairs.items() if ours > 2 * theirs]:
        raise ValueError(f"our error is more than twice the public one: {'; '.join(worse)}")
    return results


def run(args: Namespace) -> None:
    """`python -m eval parity`; with a checkpoint, one picture from your own files."""
    if args.checkpoint:
        own_files.run(args)
        return
    if options := [name for name in ("ip_adapter", "image_encoder", "image", "prediction") if getattr(args, name)]:
        raise ValueError(f"--{options[0].replace('_', '-')} is for your own base model: name its file with --checkpoint")
    print(table(evaluate(args.state, args.out, args.side)))
