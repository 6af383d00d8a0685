"""`python -m eval ablation`: run a study, or draw one of its cells again."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from checkpoints.files import check_output, replacing
from eval.ablation import plots, report
from eval.ablation.draws import draw_unit
from eval.ablation.memo import Memo
from eval.ablation.names import Draw
from eval.ablation.rows import Results
from eval.ablation.study import SMOKE, Study, Workspace
from eval.ablation.study_file import complete, describe
from eval.ablation.summary import summarise
from eval.ablation.training import plan_of, settings_of
from sampling.device import check_device
from train.setting import TrainingSource

STUDY_OPTIONS = ("smoke", "data", "steps", "batch", "prompts", "rates", "seeds")  # options that change the study
# Largest accepted difference between a redrawn and a stored mean. Processors round differently or lack bfloat16, so pictures differ
# slightly. In the first study, on a processor without bfloat16, one cell differed in 2 of 128 concepts; its means of the palette error,
# CLIP-I and CLIP-T differed by 0.28, 0.03 and 0.0006.
TOLERANCE = {
    "following": 0.03,
    "concept": 0.03,
    "information": 1.0,
    "error": 1.0,
    "auc": 0.02,
    "clip_i": 0.01,
    "clip_t": 0.005,
}


def execute(workspace: Workspace, out: Path, jobs: int | None) -> None:
    """Complete results/ablation.json and .safetensors in `out`, and write RESULTS.md and its figures."""
    path = out / "results" / "ablation.json"
    check_output(path)
    check_output(out / "RESULTS.md")
    complete(workspace.with_fingerprints(), path, jobs)  # loads the scorer and the judge before hours of training
    rewrite(workspace, out)


def rewrite(workspace: Workspace, out: Path) -> None:
    """Write the summary, the figures and RESULTS.md again, from the stored results and the shipped adapters.

    Raises FileNotFoundError if there are no stored results.
    """
    path = results_in(out)
    results = describe(path, summarise, {})
    plots.plot_all(results, stored(workspace, results), out / "results")
    with replacing(out / "RESULTS.md") as part:
        part.write_text(report.render(results, results.beside(path.parent, "rates")))


def results_in(out: Path) -> Path:
    """Return the results file in `out`. Raises FileNotFoundError if there is none."""
    path = out / "results" / "ablation.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run `python -m eval ablation` first")
    return path


def stored(workspace: Workspace, results: Results) -> Workspace:
    """Return the workspace with the study of a results file, on the same device."""
    return replace(workspace, study=replace(Study.of(results.study), device=workspace.study.device))


def redraw(workspace: Workspace, out: Path, name: str) -> pd.DataFrame:
    """Draw and read the cell FORM:SEED:TASK again with the adapter of the stored study; `compare` it with the stored results.

    Raises FileNotFoundError if there are no stored results or their adapter is not there, and ValueError if there is no such cell.
    """
    results = Results.of(results_in(out))
    workspace, tasks = stored(workspace, results), results.data["tasks"]
    study = workspace.study
    form, seed, task = (*name.split(":"), "", "")[:3]
    if form not in study.forms or seed not in map(str, study.seeds_of(form)) or task not in tasks:
        raise ValueError(
            f"there is no cell {name}: give FORM:SEED:TASK, with FORM one of {', '.join(study.forms)}; SEED from 0 to "
            f"{study.seeds - 1} ({study.other_seeds - 1} for some forms); TASK one of {', '.join(tasks)}"
        )
    torch.set_num_threads(1)  # as in the stored run
    workspace = replace(workspace, made_from=results.data["made_from"])
    Memo(workspace.work).restore({name: unit for name, unit in results.units.items() if name.startswith("rate-")})
    plan, what = plan_of(workspace, form, int(seed)), Draw(form, int(seed), study.steps, task)
    if workspace.card(plan, study.steps).get("settings") != settings_of(workspace, plan):
        adapter = workspace.adapter(plan, study.steps)
        raise FileNotFoundError(f"{adapter} is not the adapter of the stored results: restore it from the commit of RESULTS.md")
    again = draw_unit(workspace, what, results.units[what.name].value["lambdas"])
    return compare(results, Results(results.data, results.units | {what.name: again}), what.name)


def compare(old: Results, redrawn: Results, unit: str) -> pd.DataFrame:
    """Tabulate for each lambda and measure of a unit: the stored and redrawn mean, the largest difference, and `TOLERANCE`."""
    before, after, lines = old.measures(unit), redrawn.measures(unit), []
    for i, lam in enumerate(old.units[unit].value["lambdas"]):
        for key, tolerance in TOLERANCE.items():
            if key in before:
                a, b = before[key][i], after[key][i]
                line = {"lambda": lam, "measure": key, "stored": a.mean(), "redrawn": b.mean()}
                largest = {"largest difference": np.abs(a - b).max(), "tolerance": tolerance}
                lines.append({**line, **largest, "within": abs(a.mean() - b.mean()) <= tolerance})
    return pd.DataFrame(lines).round(4)


def workspace_of(args: Namespace) -> Workspace:
    """Choose the study and its files. Raises ValueError if options cannot be combined."""
    options = [name for name in STUDY_OPTIONS if getattr(args, name)]
    if options and args.out == Path("."):
        raise ValueError(f"--{options[0]} changes the study: choose another folder with --out, to keep the default results")
    if (args.base is None) != (args.data is None):
        raise ValueError("--base and --data must be given together: the mini world's pictures need the mini world's base")
    if args.data is not None and args.scorer is None:
        raise ValueError("--data needs a CLIP that scores the drawings, such as --scorer ViT-L-14:openai")
    pictures = 4 * SMOKE.batch if args.smoke else TrainingSource.pictures
    source = TrainingSource(args.base or args.weights, args.image_encoder, pictures=pictures, data=args.data)
    adapters, state = args.out / "results" / "ablation", args.state or args.out / "runs" / "ablation"
    return Workspace(study_of(args), source, adapters, state, args.scorer or str(args.weights))


def study_of(args: Namespace) -> Study:
    """Choose the settings of the study. Raises ValueError if it is too small."""
    check_device(args.device)
    settings = {key: value for key in ("prompts", "steps", "batch", "seeds") if (value := getattr(args, key)) is not None}
    if args.rates is not None:
        settings["rates"] = tuple(args.rates)
    return replace(SMOKE if args.smoke else Study(), device=args.device, **settings)


def run(args: Namespace) -> None:
    """`python -m eval ablation`"""
    workspace = workspace_of(args)
    if args.report:
        rewrite(workspace, args.out)
        return
    if args.cell is None:
        execute(workspace, args.out, args.jobs)
        return
    comparison = redraw(workspace, args.out, args.cell)
    print(comparison.to_string(index=False))
    if not comparison["within"].all():
        sys.exit(f"{args.cell} differs from the stored numbers by more than the tolerance")
    print(f"{args.cell} agrees with the stored numbers within the tolerance")
