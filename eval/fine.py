"""Compare global with fine-grained image features (Figure 11).  `python -m eval fine`

Each adapter draws the image prompts alone (empty text, lambda 1), which shows how well it reproduces them, and beside texts that name
another background, size and place (eval/scenes.py), which shows how well it follows a text. The shipped adapters do not have equal
amounts of training: Plus started from the global adapter and was trained further.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from checkpoints.adapters import load_adapter
from checkpoints.files import check_output, write_json
from eval import clip_score
from eval.bench import Bench, Row, through_the_vae
from eval.header import header
from eval.prompts import Prompts, Truth
from eval.scores import hits_of, nearest
from eval.tables import markdown
from sampling.device import check_device
from sampling.loading import load
from train.judge import Judge, delta_e, load_judge

ADAPTERS = {"ip_adapter": "global: 4 tokens of the embedding", "ip_adapter_plus": "fine-grained: Plus, 16 tokens"}
COLUMNS = {  # column -> title and format
    "concept_own": ("concept", ".0%"),
    "background_own": ("background", ".0%"),
    "drawing_own": ("drawing", ".0%"),
    "palette_error": ("palette error", ".1f"),
    "placement_error": ("placement error", ".1f"),
    "clip_i": ("CLIP-I", ".3f"),
    "follows": ("follows a text", ".0%"),
}


def evaluate(weights: Path, out: Path, n: int, steps: int, guidance: float, device: str) -> dict[str, Any]:
    """Draw n held-out image prompts with both adapters, score the drawings, and write `out` (JSON).

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
    rows = [score_rows(bench, through, "the image prompt, through the VAE")]
    for file, form in zip(files, ADAPTERS.values(), strict=True):
        adapter = load_adapter(file, pipeline.unet).to(device)
        alone, beside = (bench.draw(task, adapter, lam=1.0) for task in ("picture", "complementary"))
        rows.append(score_rows(bench, alone, form) | {"follows": follows_text(bench, judge, beside)})
    results = {
        **header("fine", weights, n, steps, guidance, device),
        "scorer": bench.scorer.name,
        "truth": bench.prompts.to_json()["truth"],
        "rows": rows,
    }
    write_json(out, results)
    return results


def score_rows(bench: Bench, drawings: Tensor, form: str) -> Row:
    """Score drawings: a list over prompts for each measure, where concept, background and drawing are indices."""
    truth, readings = bench.prompts.truth, bench.read("picture", drawings)
    assert isinstance(truth, Truth)
    labels = truth.labels
    return {
        "form": form,
        "concept": readings["concept"].tolist(),
        "background": readings["background"].tolist(),
        "palette_error": [round(x, 1) for x in delta_e(readings["palette"], labels["palette"]).tolist()],
        "placement_error": [round(x, 1) for x in (readings["placement"] - labels["placement"]).norm(dim=-1).tolist()],
        "drawing": nearest(truth.scenes, drawings, readings["placement"]),
        "clip_i": [round(x, 3) for x in readings["clip_i"].tolist()],
    }


def follows_text(bench: Bench, judge: Judge, drawings: Tensor) -> list[int]:
    """Return 1 for each drawing whose background, size and place are those of the complementary text, otherwise 0."""
    assert isinstance(bench.prompts.truth, Truth)
    hits = hits_of(judge.read(drawings), bench.prompts.truth.complement)
    return torch.stack([hits[key] for key in ("background", "size", "place")]).all(dim=0).int().tolist()


def frame_of(rows: Sequence[Row], truth: Mapping[str, Any]) -> pd.DataFrame:
    """Make a frame with a line per drawing: `form`, `prompt` and `COLUMNS`.

    Concept, background and drawing are 1 if they are those of the image prompt, otherwise 0; NaN if its concept has only one drawing.
    `follows` is NaN for pictures that no text was drawn with.
    """
    frame = pd.concat([pd.DataFrame({"prompt": range(len(row["clip_i"])), "follows": np.nan, **row}) for row in rows], ignore_index=True)
    for key, own in {**truth["own"], "drawing": truth["drawing"]}.items():
        values = pd.Series(np.array(own, float)[frame["prompt"]])
        frame[f"{key}_own"] = (frame[key] == values).astype(float).where(values.notna())
    return frame[["form", "prompt", *COLUMNS]]


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/world.md: the scores of each adapter, and their difference with a 95 % interval over prompts."""
    pictures = frame_of(results["rows"], results["truth"])
    lines = {
        form: {title: format(group[key].mean(), style) for key, (title, style) in COLUMNS.items() if group[key].notna().any()}
        for form, group in pictures.groupby("form", sort=False)
    }
    own, fine = (pictures[pictures["form"] == form].set_index("prompt") for form in ADAPTERS.values())
    lines["fine-grained minus global"] = {}
    for key, (title, style) in COLUMNS.items():
        difference = (fine[key] - own[key]).dropna() * (100 if style == ".0%" else 1)
        half, digits = 1.96 * difference.std() / len(difference) ** 0.5, 3 if style == ".3f" else 1
        lines["fine-grained minus global"][title] = f"{difference.mean():+.{digits}f} ± {half:.{digits}f}"
    return markdown(pd.DataFrame(lines).T.rename_axis("").reset_index())


def run(args: Namespace) -> None:
    """`python -m eval fine`"""
    print(table(evaluate(args.weights, args.out, args.n, args.steps, args.guidance, args.device)))
