"""Compare global with fine-grained image features (Figure 11).  `python -m eval fine`

The image prompt is the only prompt (empty text, lambda 1). The scores show how well the drawing reproduces it. The shipped adapters do
not have equal amounts of training: Plus started from the global adapter and was trained further.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pandas as pd

from checkpoints.adapters import load_adapter
from checkpoints.files import check_output, sha256, write_json
from eval import clip_score
from eval.ablation.report import measures
from eval.ablation.rows import frame_of
from eval.bench import Bench, through_the_vae
from eval.device import dtype
from eval.prompts import Prompts
from eval.tables import markdown
from model.attention import decoupled
from sampling.device import check_device
from sampling.loading import load
from train.judge import load_judge

ADAPTERS = {"ip_adapter": "global: 4 tokens of the embedding", "ip_adapter_plus": "fine-grained: Plus, 16 tokens"}
COLUMNS = {
    "concept_own": 1,
    "background_own": 1,
    "drawing_own": 1,
    "palette_error": 1,
    "placement_error": 1,
    "clip_i": 3,
}


def evaluate(weights: Path, out: Path, n: int, steps: int, guidance: float, device: str) -> dict[str, Any]:
    """Draw n held-out image prompts with both adapters, score the drawings, and write `out` (JSON; rows have the format of the ablation).

    Raises FileNotFoundError if an adapter is missing; the message names the command that trains it.
    """
    check_output(out)
    check_device(device)
    files = [weights / f"{name}.safetensors" for name in ADAPTERS]
    for file, stage in zip(files, ("adapter", "plus"), strict=True):
        if not file.exists():
            raise FileNotFoundError(f"{file} is missing: run `python -m train {stage}` first")
    pipeline, judge = load(weights, (), device=device), load_judge(weights / "judge.safetensors").to(device)
    bench = Bench(pipeline, Prompts.of_the_world(n, seed=4), clip_score.load(weights, device), judge, steps, guidance)
    through = through_the_vae(pipeline.vae, bench.prompts.pixels)
    rows = [bench.read("picture", through, form="the image prompt, through the VAE")]
    for file, form in zip(files, ADAPTERS.values(), strict=True):
        adapter = load_adapter(file, pipeline.unet).to(device)
        rows += bench.cell("picture", adapter, decoupled, (1.0,), form=form)
    results = {
        "command": f"python -m eval fine --n {n} --steps {steps} --guidance {guidance:g}",
        "settings": {"n": n, "steps": steps, "guidance": guidance, "dtype": dtype(device), "seeds": f"0..{n - 1}"},
        "sha256": {file.name: sha256(file) for file in files},
        "scorer": bench.scorer.name,
        "truth": bench.prompts.to_json()["truth"],
        "rows": rows,
    }
    write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/world.md: the scores of each adapter, and their difference with a 95 % interval over prompts."""
    pictures = frame_of(results["rows"], results["truth"])
    lines = {form: measures(group) for form, group in pictures.groupby("form", sort=False)}
    frame = pd.DataFrame(lines).T.drop(columns=["CLIP-T", "CLIPScore"])
    own, fine = (pictures[pictures["form"] == form].set_index("prompt") for form in ADAPTERS.values())
    added = []
    for key, digits in COLUMNS.items():
        difference = (fine[key] - own[key]).dropna() * (100 if key.endswith("_own") else 1)
        half = 1.96 * difference.std() / len(difference) ** 0.5
        added.append(f"{difference.mean():+.{digits}f} ± {half:.{digits}f}")
    frame.loc["fine-grained minus global"] = added
    return markdown(frame.rename_axis("").reset_index())


def run(args: Namespace) -> None:
    """`python -m eval fine`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance, args.device)))
