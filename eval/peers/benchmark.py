"""Compare speed and memory with diffusers at full size.  `python -m eval benchmark`

Both implementations use the same files, weights, threads and dtype, and are measured alternately, most of them in one process. The rows of
the fast form, and loads, use separate processes (eval/peers/columns.py). The reported ratio is the median over rounds, since ratios vary
less than times. Each step also has a lower bound, `limit`: the time its arithmetic would take
at the speed of this machine's fastest matrix product.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from checkpoints.adapters import load_adapter
from checkpoints.files import check_output, read_json, write_json
from checkpoints.single_file import load_single
from eval.device import processor
from eval.peers import columns, official
from eval.peers.columns import inputs
from eval.peers.timing import Timing, beside, medians, peak, training_step
from eval.tables import markdown
from model.adapter import IPAdapter
from model.context import Context
from model.image_encoder import VIT_H
from model.unet import UNet
from sampling.loading import compile_unet
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule
from train.loss import diffusion_loss


def _ours(folder: Path, dtype: torch.dtype) -> tuple[UNet, IPAdapter]:
    unet = load_single(folder / official.SINGLE, dtype).unet
    return unet, load_adapter(folder / official.ADAPTER, unet, VIT_H, dtype)


def steps(folder: Path, dtype: torch.dtype, rounds: int, compile_ours: bool = False) -> Timing:
    """Time one UNet call with the adapter: a guidance batch of 2, 64 x 64 latents; diffusers runs with its defaults.

    `limit`: the seconds that the matrix products and convolutions would take at the machine's peak.
    """
    peer = official.peer_unet(folder, dtype)
    unet, adapter = _ours(folder, dtype)
    if compile_ours:
        unet = compile_unet(unet)
    x, text, image = inputs(dtype)
    context = adapter(Context(text), image)
    conditions = {"image_embeds": [image[:, None]]}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            peer(x, 500, text, added_cond_kwargs=conditions)
        times = beside(lambda: unet(x, 500, context), lambda: peer(x, 500, text, added_cond_kwargs=conditions), rounds)
    return times | {"limit": counter.get_total_flops() / peak(dtype)}


def pipelines(folder: Path, rounds: int, few: tuple[int, int] = (1, 3)) -> Timing:
    """Time the whole pipeline: text and image prompt, 512 x 512, 50 steps, guidance 7.5. Extrapolate from two short runs each."""
    base = load_single(folder / official.SINGLE, torch.float32)
    adapter = load_adapter(folder / official.ADAPTER, base.unet, VIT_H, torch.float32)
    ours = Pipeline(base.unet, base.vae, base.text, Schedule(), None, (adapter,))
    text = official.peer_text(folder, torch.float32)
    unet, vae = official.peer_unet(folder, torch.float32), official.peer_vae(folder, torch.float32)
    theirs = official.peer_pipeline(unet, vae, text)
    image, tokens = torch.randn(1, 1, 1024), base.text.tokenize(["", "a fox"])

    def their_picture(n: int) -> Any:
        empty, prompt = text(tokens).last_hidden_state.chunk(2)
        embeds = [torch.cat([torch.zeros_like(image), image])]
        prompts = {"prompt_embeds": prompt, "negative_prompt_embeds": empty, "ip_adapter_image_embeds": embeds}
        return theirs(**prompts, num_inference_steps=n, output_type="pt")

    def our_picture(n: int) -> Any:
        return ours.sample(["a fox"], [0], image[:, None], steps=n)

    with torch.no_grad():
        short, long = (beside(partial(our_picture, n), partial(their_picture, n), rounds) for n in few)
    step = {side: (long[side] - short[side]) / (few[1] - few[0]) for side in ("ours", "theirs")}
    seconds = {side: short[side] + (50 - few[0]) * step[side] for side in step}
    return seconds | {"ratio": seconds["ours"] / seconds["theirs"], "extrapolated_from": few}


def training(folder: Path, rounds: int) -> Timing:
    """Time a training step of an adapter at batch 1. Ours keeps the frozen base in bfloat16 and the adapter in float32."""
    unet, _ = _ours(folder, torch.bfloat16)
    adapter = load_adapter(folder / official.ADAPTER, unet, VIT_H).requires_grad_(True)
    peer = official.peer_unet(folder, torch.float32)
    parameters = official.adapter_parameters(peer)
    (x, text, image), t, schedule = inputs(torch.float32, batch=1), torch.tensor([500]), Schedule()
    eps = torch.randn_like(x)

    def our_loss() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return diffusion_loss(unet, schedule, x, adapter(Context(text), image), t, eps).mean()

    def their_loss() -> torch.Tensor:
        conditions = {"image_embeds": [image[:, None]]}
        out = peer(schedule.add_noise(x, eps, t), t, text, added_cond_kwargs=conditions).sample
        return F.mse_loss(out, eps)

    return beside(training_step(our_loss, adapter.parameters()), training_step(their_loss, parameters), rounds)


def loading(folder: Path, rounds: int, dtype: str) -> Timing:
    """Time loading the base model, each time in a new process (eval/peers/loading.py).

    We read the single file in float16; diffusers reads its own folder layout. `ours_read` and `theirs_read`: the seconds until all
    weights were read as well. `our_memory` and `their_memory`: anonymous memory then, divided by the bytes of the weights.
    """
    for name, peer in (("unet", official.peer_unet), ("vae", official.peer_vae), ("text_encoder", official.peer_text)):
        if not (folder / "diffusers" / name).exists():
            options = {"adapter": False} if name == "unet" else {}
            peer(folder, torch.float16, **options).save_pretrained(folder / "diffusers" / name)
            gc.collect()

    def measure(side: str) -> dict[str, float]:
        command = [sys.executable, "-m", "eval.peers.loading", str(folder), side, dtype]
        return dict(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))

    rows = [(measure("ours"), measure("theirs")) for _ in range(rounds + 1)][1:]  # drop the first round, which reads from the disk
    memory = {f"{side}_memory": max(row[i]["memory_read"] for row in rows) for i, side in enumerate(("our", "their"))}
    loads, reads = (medians([(ours[key], theirs[key]) for ours, theirs in rows]) for key in ("seconds", "seconds_read"))
    return loads | {f"{key}_read": value for key, value in reads.items()} | memory


ROWS: dict[str, Callable[[Path, int], Timing]] = {
    "load, float16": partial(loading, dtype="float16"),
    "load, float32": partial(loading, dtype="float32"),
    "step, float32": lambda folder, rounds: steps(folder, torch.float32, rounds),
    "step, bfloat16": lambda folder, rounds: steps(folder, torch.bfloat16, rounds),
    "fast step, float32": partial(columns.columns, dtype="float32"),
    "fast step, bfloat16": partial(columns.columns, dtype="bfloat16"),
    "training step": training,
    "50-step pipeline": pipelines,
    "step, float32, ours compiled": lambda folder, rounds: steps(folder, torch.float32, rounds, compile_ours=True),
}


def evaluate(folder: Path, out: Path, rounds: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all rows, or those in `only` (other rows of `out` are kept). Write `out` (JSON) after each row.

    Raises ValueError for an unknown row.
    """
    if unknown := [name for name in only if name not in ROWS]:
        raise ValueError(f"the benchmark has no row {unknown[0]!r}: use one of {'; '.join(ROWS)}")
    check_output(out)
    machine = f"{processor('cpu')}, {torch.get_num_threads()} threads"
    results: dict[str, Any] = {"command": "python -m eval benchmark", "machine": machine, "torch": torch.__version__}
    official.write(folder)
    if only:
        results = read_json(out) | results
    for name in only or ROWS:
        results[name] = ROWS[name](folder, rounds) | {"rounds": rounds}
        print(name, json.dumps(results[name]), flush=True)
        write_json(out, results)
        gc.collect()
    return results


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/benchmark.md."""
    rows = {name: row for name, row in results.items() if isinstance(row, dict)}
    lines = []
    for name, row in rows.items():
        limit = f"{row['limit']:.1f} s" if "limit" in row else ""
        lines.append([name, f"{row['ours']:.1f} s", f"{row['theirs']:.1f} s", f"{row['ratio']:.2f}", limit])
        if "our_memory" in row:
            lines.append([f"{name}, and read", f"{row['ours_read']:.1f} s", f"{row['theirs_read']:.1f} s", f"{row['ratio_read']:.2f}", ""])
            memory = [f"{row['our_memory']:.2f}", f"{row['their_memory']:.2f}"]
            lines.append([f"{name}: anonymous memory / weights", *memory, "", ""])
    frame = pd.DataFrame(lines, columns=["", "ours", "diffusers", "ratio", "at the peak"])
    return markdown(frame)


def run(args: Namespace) -> None:
    """`python -m eval benchmark`"""
    results = evaluate(args.state, args.out, args.rounds, args.row)
    print(table(results))
    for name, row in results.items():
        if isinstance(row, dict) and "ratios" in row:
            print(f"\n{name}\n\n{columns.table(row)}")
