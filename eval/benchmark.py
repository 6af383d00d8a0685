"""Speed and memory beside diffusers, at the true size.  `python -m eval benchmark`

Same files, weights, threads and dtype; ours and theirs in turn in one process; the medians of the ratios (machines are noisy,
ratios less so). The machine's own matrix-multiply peak is measured beside each step, as the limit that nothing can pass.
"""

from __future__ import annotations

import gc
import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from checkpoints.adapters import load_adapter
from checkpoints.files import read_json, write_json
from checkpoints.single_file import load_single
from eval import official
from model.context import Context
from model.unet import UNet
from sampling.pipeline import Pipeline, compiled
from sampling.schedule import Schedule
from train.loss import diffusion_loss

Run = Callable[[], Any]


def seconds(run: Run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def beside(ours: Run, theirs: Run, rounds: int) -> dict[str, float]:
    """Medians of the seconds, and of the ratio ours / theirs round by round, after a warm-up of both."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    return {
        "ours": statistics.median(a for a, _ in pairs),
        "theirs": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def peak(dtype: torch.dtype, n: int = 4096) -> float:
    """The best of five matrix products, in FLOP/s."""
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    return 2 * n**3 / min(seconds(lambda: a @ b) for _ in range(5))


def _inputs(dtype: torch.dtype, batch: int = 2) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    shapes = (batch, 4, 64, 64), (batch, 77, 768), (batch, 1024)
    x, text, image = (torch.randn(*shape, generator=g).to(dtype) for shape in shapes)
    return x, text, image


def steps(folder: Path, dtype: torch.dtype, rounds: int, compile_ours: bool = False) -> dict[str, float]:
    """One UNet call with the adapter: a guidance batch of 2, 64 x 64 latents. Theirs is diffusers' default.

    `limit`: the seconds that its matrix products and convolutions take at the machine's peak, if nothing else took any.
    """
    peer = official.peer_unet(folder, dtype)
    unet, adapter = _ours(folder, dtype)
    if compile_ours:
        unet = compiled(unet)
    x, text, image = _inputs(dtype)
    context = adapter(Context(text), image)
    added = {"image_embeds": [image[:, None]]}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            peer(x, 500, text, added_cond_kwargs=added)
        times = beside(lambda: unet(x, 500, context), lambda: peer(x, 500, text, added_cond_kwargs=added), rounds)
    return times | {"limit": counter.get_total_flops() / peak(dtype)}


def _ours(folder: Path, dtype: torch.dtype) -> tuple[UNet, Any]:
    unet = load_single(folder / official.SINGLE, dtype).unet
    return unet, load_adapter(folder / official.ADAPTER, unet, 1024, dtype)


def pipelines(folder: Path, rounds: int, few: tuple[int, int] = (1, 3)) -> dict[str, Any]:
    """Prompt and picture to picture, 512 x 512, 50 steps, guidance 7.5; extrapolated from two short runs each, in turn."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    dtype = torch.float32
    base = load_single(folder / official.SINGLE, dtype)
    adapter = load_adapter(folder / official.ADAPTER, base.unet, 1024, dtype)
    ours = Pipeline(base.unet, base.vae, base.text, Schedule(), None, (adapter,))
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    text, unet = official.peer_text(folder, dtype), official.peer_unet(folder, dtype)
    theirs = StableDiffusionPipeline(
        official.peer_vae(folder, dtype), text, None, unet, scheduler, None, None, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    image, tokens = torch.randn(1, 1, 1024), base.text.tokenize(["", "a fox"])

    def their_picture(n: int) -> Any:
        empty, prompt = text(tokens).last_hidden_state.chunk(2)
        embeds = [torch.cat([torch.zeros_like(image), image])]
        return theirs(
            prompt_embeds=prompt,
            negative_prompt_embeds=empty,
            ip_adapter_image_embeds=embeds,
            num_inference_steps=n,
            output_type="pt",
        )

    def our_picture(n: int) -> Any:
        return ours.draw(["a fox"], [0], image, steps=n)

    with torch.no_grad():
        short, long = (beside(partial(our_picture, n), partial(their_picture, n), rounds) for n in few)
    whole = {
        side: short[side] + (50 - few[0]) * (long[side] - short[side]) / (few[1] - few[0])
        for side in ("ours", "theirs")
    }
    return whole | {"ratio": whole["ours"] / whole["theirs"], "extrapolated_from": few}


def training(folder: Path, rounds: int) -> dict[str, float]:
    """An adapter's training step, batch 1: ours holds the frozen base in bfloat16 under an adapter in float32."""
    unet, _ = _ours(folder, torch.bfloat16)
    adapter = load_adapter(folder / official.ADAPTER, unet, 1024).requires_grad_(True)
    peer = official.peer_unet(folder, torch.float32)
    theirs = [p for name, p in peer.named_parameters() if "_ip" in name or name.startswith("encoder_hid_proj")]
    for parameter in theirs:
        parameter.requires_grad_(True)
    our_optimizer = torch.optim.AdamW(adapter.parameters(), 1e-4, weight_decay=0.01)
    their_optimizer = torch.optim.AdamW(theirs, 1e-4, weight_decay=0.01)
    (x, text, image), t, schedule = _inputs(torch.float32, batch=1), torch.tensor([500]), Schedule()
    eps = torch.randn_like(x)

    def our_step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            diffusion_loss(unet, schedule, x, adapter(Context(text), image), t, eps).mean().backward()
        our_optimizer.step()
        our_optimizer.zero_grad()

    def their_step() -> None:
        added = {"image_embeds": [image[:, None]]}
        out = peer(schedule.add_noise(x, eps, t), t, text, added_cond_kwargs=added).sample
        F.mse_loss(out, eps).backward()
        their_optimizer.step()
        their_optimizer.zero_grad()

    return beside(our_step, their_step, rounds)


_LOAD = """
import json, re, sys, time, torch
from pathlib import Path
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
folder, side, dtype = Path(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before, began = peak(), time.perf_counter()
if side == "ours":
    base = load_single(folder / "sd15.safetensors", dtype)
    parts = [base.unet, base.vae, base.text]
else:
    parts = [
        UNet2DConditionModel.from_pretrained(folder / "diffusers" / "unet", torch_dtype=dtype),
        AutoencoderKL.from_pretrained(folder / "diffusers" / "vae", torch_dtype=dtype),
        CLIPTextModel.from_pretrained(folder / "diffusers" / "text_encoder", dtype=dtype),
    ]
for p in (p for part in parts for p in part.parameters()):
    p.as_strided((-(-p.numel() // 1024),), (1024,)).sum()
print(json.dumps([time.perf_counter() - began, peak() - before, sum(p.nbytes for m in parts for p in m.parameters())]))
"""


def loading(folder: Path, rounds: int, dtype: str) -> dict[str, float]:
    """Reading the base model, each time in a fresh process: ours from the single file (float16), theirs from their own folder.

    Until every page of the weights is in memory: diffusers maps a file of the wanted dtype and reads it when it is first used.
    `*_memory` is the peak over the bytes of the weights.
    """
    for name, peer in (("unet", official.peer_unet), ("vae", official.peer_vae), ("text_encoder", official.peer_text)):
        if not (folder / "diffusers" / name).exists():
            options = {"adapter": False} if name == "unet" else {}
            peer(folder, torch.float16, **options).save_pretrained(folder / "diffusers" / name)
            gc.collect()
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "theirs": []}
    for _ in range(rounds + 1):
        for side, rows in found.items():
            command = [sys.executable, "-c", _LOAD, str(folder), side, dtype]
            took, grown, size = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            rows.append((took, grown / size))
    ours, theirs = (rows[1:] for rows in found.values())
    return {
        "ours": statistics.median(s for s, _ in ours),
        "theirs": statistics.median(s for s, _ in theirs),
        "ratio": statistics.median(a[0] / b[0] for a, b in zip(ours, theirs, strict=True)),
        "our_memory": max(m for _, m in ours),
        "their_memory": max(m for _, m in theirs),
    }


def machine() -> str:
    """The processor's name, from Linux's list of them."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def evaluate(folder: Path, out: Path, rounds: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measures every row, or `only` some and keeps the others of `out`; writes `out` (JSON) after each.

    Raises ValueError for a row that is none.
    """
    results: dict[str, Any] = {
        "command": "python -m eval benchmark",
        "machine": machine(),
        "torch": torch.__version__,
    }
    rows: dict[str, Callable[[], dict[str, Any]]] = {
        "load, float16": lambda: loading(folder, rounds, "float16"),
        "load, float32": lambda: loading(folder, rounds, "float32"),
        "step, float32": lambda: steps(folder, torch.float32, rounds),
        "step, bfloat16": lambda: steps(folder, torch.bfloat16, rounds),
        "training step": lambda: training(folder, rounds),
        "50-step pipeline": lambda: pipelines(folder, rounds),
        "step, float32, ours compiled": lambda: steps(folder, torch.float32, rounds, compile_ours=True),
    }
    if strange := [name for name in only if name not in rows]:
        raise ValueError(f"the benchmark has no row {strange[0]!r}: its rows are {', '.join(rows)}")
    official.write(folder)
    if only:
        results = read_json(out) | results
    for name in only or rows:
        results[name] = rows[name]() | {"rounds": rounds}
        print(name, json.dumps(results[name]), flush=True)
        write_json(out, results)
        gc.collect()
    return results


def table(results: dict[str, Any]) -> str:
    """The results as the table of the README."""
    lines = ["| | ours | diffusers | ratio | at the peak |", "|---|---|---|---|---|"]
    for name, row in results.items():
        if isinstance(row, dict):
            limit = f"{row['limit']:.1f} s" if "limit" in row else ""
            lines.append(f"| {name} | {row['ours']:.1f} s | {row['theirs']:.1f} s | {row['ratio']:.2f} | {limit} |")
    for name, row in results.items():
        if name.startswith("load"):
            ours, theirs = row["our_memory"], row["their_memory"]
            lines.append(f"| {name}: peak memory / weights | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | |")
    return "\n".join(lines)
