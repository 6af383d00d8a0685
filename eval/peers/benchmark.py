"""Compare speed and memory with diffusers at full size.  `python -m eval benchmark`

Both implementations use the same files, weights and threads. Steps and loads are measured in separate processes that take turns; the
pipeline and the compiled step in one process, alternately. The reported ratio is the median over rounds, since ratios vary less than
times. A step also has a lower bound, `limit`: the time its arithmetic would take at the speed of this machine's fastest matrix product.
"""

from __future__ import annotations

import gc
import json
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from checkpoints.adapters import load_adapter
from checkpoints.files import check_output, read_json, write_json
from checkpoints.single_file import load_single
from eval.device import machine
from eval.peers import official, step, training
from eval.peers.columns import lines, take_turns
from eval.peers.timing import Timing, beside, peak
from eval.tables import markdown
from model.image_encoder import VIT_H
from sampling.pipeline import Pipeline
from sampling.schedule import Schedule

LOAD_COLUMNS = "ours", "theirs"


def columns(folder: Path, rounds: int, dtype: torch.dtype) -> Timing:
    """Time a step of diffusers, of this project, and of its fast form (eval/peers/step.py)."""
    values = take_turns("eval.peers.step", folder, [*step.COLUMNS], rounds, str(dtype).removeprefix("torch."))
    return {"values": values, "limit": step.operations() / peak(dtype)}


def compiled(folder: Path, rounds: int) -> Timing:
    """Time a step with our UNet compiled, and diffusers with its defaults."""
    with torch.no_grad():
        ours, theirs = (step.network_of(folder, name, torch.float32)(2, 64) for name in ("compiled", "theirs"))
        return beside(ours, theirs, rounds) | {"limit": step.operations() / peak(torch.float32)}


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


def training_steps(folder: Path, rounds: int) -> Timing:
    """Time a training step of an adapter, and measure its memory (eval/peers/training.py)."""
    return {"values": take_turns("eval.peers.training", folder, training.COLUMNS, rounds)}


def loading(folder: Path, rounds: int, dtype: str) -> Timing:
    """Time loading the base model, each time in a new process (eval/peers/loading.py).

    We read the single file in float16; diffusers reads its own folder layout. The first round, which reads from the disk, is dropped.
    """
    unet = partial(official.peer_unet, adapter=False)
    for name, peer in (("unet", unet), ("vae", official.peer_vae), ("text_encoder", official.peer_text)):
        if not (folder / "diffusers" / name).exists():
            peer(folder, torch.float16).save_pretrained(folder / "diffusers" / name)
            gc.collect()
    values = take_turns("eval.peers.loading", folder, LOAD_COLUMNS, rounds + 1, dtype)
    return {"values": {key: {side: each[1:] for side, each in columns.items()} for key, columns in values.items()}}


ROWS: dict[str, Callable[[Path, int], Timing]] = {
    "load, float16": partial(loading, dtype="float16"),
    "load, float32": partial(loading, dtype="float32"),
    "step, float32": partial(columns, dtype=torch.float32),
    "step, bfloat16": partial(columns, dtype=torch.bfloat16),
    "training step": training_steps,
    "50-step pipeline": pipelines,
    "step, float32, ours compiled": compiled,
}

ROW_RATIOS = {"training step": training.RATIOS, **{name: {"": LOAD_COLUMNS} for name in ("load, float16", "load, float32")}}


def evaluate(folder: Path, out: Path, rounds: int, only: Sequence[str] = ()) -> dict[str, Any]:
    """Measure all rows, or those in `only` (other rows of `out` are kept). Write `out` (JSON) after each row.

    Raises ValueError for an unknown row, and if the other rows were measured on another machine.
    """
    if unknown := [name for name in only if name not in ROWS]:
        raise ValueError(f"the benchmark has no row {unknown[0]!r}: use one of {'; '.join(ROWS)}")
    check_output(out)
    results: dict[str, Any] = {"command": "python -m eval benchmark", "machine": machine(), "torch": torch.__version__}
    if only and out.exists():
        results = kept(out, results) | results
    official.write(folder)
    for name in only or ROWS:
        load = os.getloadavg()[0]
        results[name] = ROWS[name](folder, rounds) | {"rounds": rounds, "load": load}
        print(name, json.dumps(results[name]), flush=True)
        write_json(out, results)
        gc.collect()
    return results


def kept(out: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Read the results in `out`. Raises ValueError if they were measured on another machine, or with another PyTorch."""
    old = read_json(out)
    if (there := f"{old.get('machine')}, PyTorch {old.get('torch')}") != (here := f"{results['machine']}, PyTorch {results['torch']}"):
        raise ValueError(f"{out} was measured on another machine ({there}) than this one ({here}): measure all rows, or name another --out")
    return old


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/benchmark.md."""
    rows = []
    for name, row in ((name, results[name]) for name in ROWS if name in results):
        if "values" in row:
            rows += lines(name, row["values"], ROW_RATIOS.get(name, step.RATIOS))
        else:
            few = row.get("extrapolated_from")
            label = f"{name}, extrapolated from {few[0]} and {few[1]} steps" if few else name
            rows.append([label, f"{row['ours']:.1f} s", f"{row['theirs']:.1f} s", f"{row['ratio']:.2f}"])
        if "limit" in row:
            rows.append([f"{name}: at the peak of this machine", f"{row['limit']:.1f} s", "", ""])
    return markdown(pd.DataFrame(rows, columns=["", "ours", "diffusers", "ratio"]))


def run(args: Namespace) -> None:
    """`python -m eval benchmark`"""
    print(table(evaluate(args.state, args.out, args.rounds, args.row)))
