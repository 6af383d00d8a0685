"""`python -m eval ablation`: run a study, or draw one of its cells again."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

from checkpoints.adapters import load_adapter
from checkpoints.files import check_output, replacing, write_json
from eval.ablation import plots, report
from eval.ablation.endpoint import summary
from eval.ablation.forms import FORMS
from eval.ablation.memo import Memo
from eval.ablation.rows import SCHEMA, Results, frame_of
from eval.ablation.study import SMOKE, Study, Workspace
from eval.ablation.work import evaluate
from eval.prompts import TASKS
from sampling.device import check_device
from train.setting import TrainingSource

STUDY_OPTIONS = ("smoke", "data", "steps", "batch", "prompts", "rates")  # options that change the study
# Largest accepted difference between a redrawn and a stored mean. Processors round differently or lack bfloat16, so pictures differ
# slightly. In the first study, on a processor without bfloat16, ip_adapter:0:picture differed in 2 of 128 concepts and 1 drawing; the
# means of the other measures differed by 0, 0.28, 0.03 and 0.0006.
TOLERANCE = {
    "concept": 0.03,
    "background": 0.03,
    "drawing": 0.03,
    "palette_error": 1.0,
    "placement_error": 0.2,
    "clip_i": 0.01,
    "clip_t": 0.005,
}


def execute(workspace: Workspace, study: Study, out: Path, jobs: int) -> None:
    """Run the parts of the study that are missing; write results/ablation.json, RESULTS.md and its figures to `out`.

    Add seeds one by one until the interval of the primary difference is narrow enough.
    """
    path = out / "results" / "ablation.json"
    check_output(path)
    check_output(out / "RESULTS.md")
    bench = workspace.bench(study)  # load the scorer and the judge before hours of training
    workspace = workspace.fingerprinted(bench)
    if path.exists() and (before := Results.of(path).data)["made_from"] == workspace.made_from:
        Memo(workspace.work).restore(before["units"])
    if study.device == "cpu":
        torch.set_num_threads(1)
    while True:
        data = evaluate(workspace, study, bench, jobs)
        data["summary"] = summary(Results(data))
        wide = report.half_width(data["summary"]) > study.half_width  # false for NaN, which more seeds cannot fix
        if not wide or study.seeds >= study.most_seeds:
            break
        study = replace(study, seeds=study.seeds + 1)
    write_json(path, {"schema": SCHEMA, **data})
    plots.plot_all(Results(data), workspace, study, out / "results")
    with replacing(out / "RESULTS.md") as part:
        part.write_text(report.render(Results(data)))


def redraw(workspace: Workspace, out: Path, name: str) -> pd.DataFrame:
    """Draw and score the cell FORM:SEED:TASK again with the adapter of the stored study; `compare` it with the stored results.

    Raises FileNotFoundError if there are no stored results, and ValueError if there is no such cell.
    """
    path = out / "results" / "ablation.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: run `python -m eval ablation` first")
    results = Results.of(path)
    study = Study.of(results.study)
    form, seed, task = (*name.split(":"), "", "")[:3]
    if form not in study.forms or seed not in map(str, range(study.seeds)) or task not in TASKS:
        raise ValueError(
            f"there is no cell {name}: give FORM:SEED:TASK, with FORM one of {', '.join(study.forms)}; SEED from 0 to "
            f"{study.seeds - 1}; TASK one of {', '.join(TASKS)}"
        )
    torch.set_num_threads(1)  # as in the stored run
    bench = workspace.bench(study)
    adapter = load_adapter(workspace.adapter(form, int(seed)), bench.pipeline.unet).to(study.device)
    where = {"form": form, "seed": int(seed), "share": 1.0}
    rows = bench.cell(task, adapter, FORMS[form].fuse, FORMS[form].lambdas_of(task), **where)
    stored = results.pictures
    stored = stored[(stored["form"] == form) & (stored["seed"] == int(seed)) & (stored["share"] == 1)]
    stored = stored[(stored["task"] == task) & stored["control"].isna()]
    return compare(stored, frame_of(rows, results.truth), "wanted" if task == "conflict" else "own")


def compare(stored: pd.DataFrame, redrawn: pd.DataFrame, whose: str) -> pd.DataFrame:
    """Tabulate for each lambda and measure: the stored and redrawn mean, the largest difference of a picture, and `TOLERANCE`.

    `whose`: score concept, background and drawing against the text ("wanted") or the image prompt ("own").
    """
    keys = {f"{name}_{whose}" if name in ("concept", "background", "drawing") else name: name for name in TOLERANCE}
    known = [key for key in keys if key in stored and stored[key].notna().any()]
    before, after = (
        x.astype(dict.fromkeys(known, float)).melt(["lambda", "prompt"], known, "measure") for x in (stored, redrawn)
    )
    both = before.merge(after, on=["lambda", "prompt", "measure"], suffixes=("_stored", "_redrawn"))
    both["difference"] = (both["value_stored"] - both["value_redrawn"]).abs()
    means = {"stored": ("value_stored", "mean"), "redrawn": ("value_redrawn", "mean")}
    table = (
        both.groupby(["lambda", "measure"]).agg(**means, **{"largest difference": ("difference", "max")}).reset_index()
    )
    table["measure"] = table["measure"].map(keys)
    table["tolerance"] = table["measure"].map(TOLERANCE)
    table["within"] = (table["stored"] - table["redrawn"]).abs() <= table["tolerance"]
    return table.round(4)


def workspace_of(args: Namespace) -> Workspace:
    """Choose the files of the study. Raises ValueError if options cannot be combined."""
    changed = [name for name in STUDY_OPTIONS if getattr(args, name)] + ["device"] * (args.device != "cpu")
    if changed and args.out == Path("."):
        raise ValueError(f"--{changed[0]} changes the study: choose another folder with --out, to keep the default results")
    if (args.base is None) != (args.data is None):
        raise ValueError("--base and --data must be given together: the mini world's pictures need the mini world's base")
    if args.data is not None and args.scorer is None:
        raise ValueError("--data needs a CLIP that scores the drawings, such as --scorer ViT-L-14:openai")
    pictures = 4 * SMOKE.batch if args.smoke else TrainingSource.pictures
    source = TrainingSource(args.base or args.weights, args.image_encoder, pictures=pictures, data=args.data)
    shipped, state = args.out / "results" / "ablation", args.state or args.out / "runs" / "ablation"
    return Workspace(source, shipped, state, args.scorer or str(args.weights))


def study_of(args: Namespace) -> Study:
    """Choose the settings of the study. Raises ValueError if it is too small."""
    check_device(args.device)
    given = {key: value for key in ("prompts", "steps", "batch") if (value := getattr(args, key)) is not None}
    if args.seeds is not None:
        given |= {"seeds": args.seeds, "most_seeds": args.seeds}
    if args.rates is not None:
        given["rates"] = tuple(args.rates)
    return replace(SMOKE if args.smoke else Study(), device=args.device, **given)


def run(args: Namespace) -> None:
    """`python -m eval ablation`"""
    workspace = workspace_of(args)
    if args.cell is None:
        execute(workspace, study_of(args), args.out, args.jobs if args.device == "cpu" else 1)
        return
    compared = redraw(workspace, args.out, args.cell)
    print(compared.to_string(index=False))
    if not compared["within"].all():
        sys.exit(f"{args.cell} differs from the stored numbers by more than the tolerance")
    print(f"{args.cell} agrees with the stored numbers within the tolerance")
