"""The results file of a study: compute what it lacks, and describe it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from checkpoints.files import write_json, write_tensors
from eval.ablation.memo import Memo, pack
from eval.ablation.rows import SCHEMA, Results
from eval.ablation.study import Workspace
from eval.ablation.work import Jobs, evaluate, jobs_of

GPU_JOBS = 6  # processes that share a GPU


def complete(workspace: Workspace, path: Path, jobs: int | None, list_jobs: Jobs = jobs_of) -> None:
    """Compute what is missing, in `jobs` processes, and write `path` (JSON) without a summary, and the arrays beside it.

    If `path` holds the results of the same study by other source files, nothing is computed. Raises FileExistsError if it holds those
    of another study.
    """
    if path.exists():
        before = Results.of(path)
        other = changed_names(before.data["made_from"], workspace.made_from)
        if other == {"source files"}:
            print(f"{path} was made by other source files: only its report is written. --out FOLDER trains anew")
            return
        if other:
            raise FileExistsError(
                f"{path} holds a study that was made from other {', '.join(sorted(other))}: continue it at a commit where they are the "
                "same, or choose another folder with --out"
            )
        Memo(workspace.work).restore(before.units)
    if workspace.study.device == "cpu":
        torch.set_num_threads(1)
    processes = jobs or ((os.cpu_count() or 1) if workspace.study.device == "cpu" else GPU_JOBS)
    data, units = evaluate(workspace, processes, list_jobs)
    rows, arrays = pack(units)
    write_tensors(path.with_suffix(".safetensors"), arrays, None)
    write_json(path, {"schema": {}, **data, "summary": {}, "units": rows})


def describe(path: Path, summarise: Callable[[Results], dict[str, Any]], units: Mapping[str, str]) -> Results:
    """Write the schema and the summary of the results in `path` again, and return the results. `units`: in addition to `SCHEMA`."""
    results = Results.of(path)
    summary = f"{summarise.__module__.replace('.', '/')}.py::{summarise.__name__}"
    write_json(path, results.data | {"schema": {**SCHEMA, **units, "summary": summary}, "summary": summarise(results)})
    return Results.of(path)


def changed_names(before: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Return the names whose values differ. `settings` are compared one by one."""
    flat = [{name: value for name, value in each.items() if name != "settings"} | each.get("settings", {}) for each in (before, now)]
    names = {"source": "source files", "code": "source files"}  # `code`: of the forms of a tier
    return {names.get(name, name) for name in {**flat[0], **flat[1]} if flat[0].get(name) != flat[1].get(name)}
