"""Global against fine-grained image features (Figure 11).  `python -m eval fine`, after `python -m train adapter --fine`

The image prompt alone (empty text, lambda 1): how much of it comes back? Of n held-out pictures the judge reads concept,
background, palette, placement, and which of its concept's drawings is shown, where there are several. Plus began as the
global adapter and was trained on: they are compared as they are shipped, and not the two forms at equal training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from checkpoints.adapters import load_adapter
from checkpoints.files import sha256, write_json
from eval import attributes, clip_score, report
from eval.ablation import asked
from eval.report import measures, right
from eval.tasks import Bench, Prompts
from eval.world import through_the_vae
from model.attention import decoupled
from sampling.pipeline import load

ADAPTERS = {"ip_adapter": "global: 4 tokens of the embedding", "ip_adapter_plus": "fine-grained: Plus, 16 tokens"}
MEASURES = ("concept", "background", "drawing", "palette_error", "placement_error", "clip_i")


def evaluate(weights: Path, out: Path, n: int = 512, steps: int = 12, guidance: float = 4.0) -> dict[str, Any]:
    """Draws and reads everything, and writes `out` (JSON): a row an adapter, as the rows of results/ablation.json.

    Raises FileNotFoundError, naming the command that makes it, when an adapter is missing.
    """
    files = [weights / f"{name}.safetensors" for name in ADAPTERS]
    for file, option in zip(files, ("", " --fine"), strict=True):
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there; `python -m train adapter{option}` trains it")
    pipeline, judge = load(weights, ()), attributes.load(weights / "judge.safetensors")
    bench = Bench(pipeline, Prompts.of_the_world(n, seed=4), clip_score.load(weights), judge, steps, guidance)
    through = through_the_vae(pipeline.vae, bench.prompts.pixels)
    rows = [bench.read("picture", through, form="the image prompt, through the VAE")]
    for file, form in zip(files, ADAPTERS.values(), strict=True):
        rows += bench.cell("picture", load_adapter(file, pipeline.unet), decoupled, (1.0,), form=form)
    results = {
        "command": f"python -m eval fine --n {n} --steps {steps} --guidance {guidance:g}",
        "settings": {"n": n, "steps": steps, "guidance": guidance, "dtype": "bfloat16", "seeds": f"0..{n - 1}"},
        "sha256": {file.name: sha256(file) for file in files},
        "scorer": bench.scorer.name,
        "truth": asked(bench.prompts)["truth"],
        "rows": rows,
    }
    write_json(out, results)
    return results


def table(results: dict[str, Any]) -> str:
    """The results as the table of the README, and what fine-grained features add, with its interval (95 %, over prompts)."""
    rows = {row["form"]: row for row in results["rows"]}
    own, fine = (rows[form] for form in ADAPTERS.values())

    def added(key: str, percent: bool = False) -> str:
        values = [right(results, row, key) if percent else np.array(row[key]) for row in (own, fine)]
        difference = (values[1] - values[0]) * (100 if percent else 1)
        digits = 3 if key == "clip_i" else 1
        half = 1.96 * difference.std(ddof=1) / len(difference) ** 0.5
        return f"{difference.mean():+.{digits}f} ± {half:.{digits}f}"

    lines = [(form, *measures(results, [row])[:6]) for form, row in rows.items()]
    shares = [added(key, percent=True) for key in MEASURES[:3]]
    lines.append(("fine-grained minus global", *shares, *(added(key) for key in MEASURES[3:])))
    return report.table(("", "concept", "background", "drawing", "palette error", "placement error", "CLIP-I"), lines)
