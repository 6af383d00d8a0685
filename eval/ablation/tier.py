"""What the tiers after the first one share: their trainings, and how a tier is run and its results are written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints.files import check_output
from eval.ablation.draws import alone, draw, find_grid, references, train_run
from eval.ablation.names import Draw, alone_name, training_name
from eval.ablation.rows import Results
from eval.ablation.study import Study, Workspace
from eval.ablation.study_file import complete, describe
from eval.ablation.summary import curve_at_one
from eval.ablation.work import Job, Jobs
from sampling.device import check_device
from train.card import ROOT
from train.setting import TrainingSource

CODE = [Path(__file__).parent / f"{name}.py" for name in ("forms", "fuses", "training", "names", "draws")]  # the source files of the forms


@dataclass(frozen=True)
class ShortStudy(Study):
    """Trainings of a quarter of the steps of tier A, at one learning rate. The defaults are those of the protocol."""

    steps: int = 2000
    rates: tuple[float, ...] = (1.5e-3,)

    @property
    def checkpoints(self) -> tuple[int, ...]:
        return (self.steps,)

    def hours(self) -> float:
        return self.estimate(grids=len(self.runs(*self.forms)) + len(self.forms))

    def estimate(self, grids: int) -> float:
        """Estimate the hours on one core of a CPU, as for tier A. `grids`: how many times a whole grid of lambdas is drawn."""
        steps = self.steps * len(self.runs(*self.forms))
        return (0.049 * self.batch * steps + 0.1 * 11 * self.prompts * grids) / 3600

    def smoke(self) -> ShortStudy:
        """Return the same study at a tiny size; its numbers are meaningless."""
        return replace(self, steps=16, batch=4, seeds=1, other_seeds=1, prompts=4, draw_steps=2, resamples=200)


def check_options(args: Namespace) -> None:
    """Raise ValueError if the device is not there, or a tiny run would take the place of the default results."""
    check_device(args.device)
    if args.smoke and args.out == Path("."):
        raise ValueError("--smoke changes the study: choose another folder with --out, to keep the default results")


def earlier(results: Results, out: Path, command: str) -> Results | None:
    """Read the results of `python -m eval COMMAND` in the folder `out`, or the shipped ones. If none are on the same prompts, say so and
    return None."""
    for folder in (out / "results", ROOT / "results"):
        if (first := results.beside(folder, command)) is not None:
            return first
    print(f"There are no results of `python -m eval {command}` on the same prompts, so its forms are not shown: run it first")
    return None


@dataclass(frozen=True)
class Tier:
    """A later tier. `command`: of `python -m eval`. `units`: describes the units of work that tier A does not have."""

    command: str
    study: ShortStudy
    jobs: Jobs
    summarise: Callable[[Results], dict[str, Any]]
    units: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of its files."""
        return self.command.replace("-", "_")

    def place(self, args: Namespace, base: Path) -> Workspace:
        """Return the study and the locations of its files, on the base model in the folder `base`."""
        study = replace(self.study.smoke() if args.smoke else self.study, device=args.device)
        source = TrainingSource(base, pictures=4 * study.batch if args.smoke else TrainingSource.pictures)
        state = args.state or args.out / "runs" / self.name
        adapters, command = args.out / "results" / self.name, f"python -m eval {self.command}"
        return Workspace(study, source, adapters, state, str(args.weights), command=command).with_fingerprints()

    def results(self, args: Namespace) -> Path:
        """Return the file of the results."""
        path: Path = args.out / "results" / f"{self.name}.json"
        return path

    def run(self, args: Namespace, base: Path) -> Results:
        """Train and draw what is missing, and write results/NAME.json and .safetensors. Results by other source files are only reported."""
        path = self.results(args)
        check_output(path)
        complete(self.place(args, base), path, args.jobs, self.jobs)
        return self.report(path)

    def report(self, path: Path) -> Results:
        """Write the description and the summary of the results in `path` again, and return the results."""
        return describe(path, self.summarise, self.units)


def jobs_of(workspace: Workspace, tasks: Sequence[str]) -> list[Job]:
    """List the jobs of a tier that compares forms: all adapters, and their drawings of the first task."""
    study, first = workspace.study, tasks[0]
    jobs = [Job("references", partial(references, workspace))]
    jobs += [Job(alone_name(task), partial(alone, workspace, task, "test")) for task in (first, "picture")]
    for form, seed in study.runs(*study.forms):
        jobs.append(Job(training_name(form, seed), partial(train_run, workspace, form, seed)))
        what = Draw(form, seed, study.steps, first)
        if seed == 0:
            jobs.append(Job(what.grid, partial(find_grid, workspace, form), (what.run,)))
        jobs.append(Job(what.name, partial(draw, workspace, what), (what.run, what.grid)))
    return jobs


def means_at_one(results: Results, form: str, seeds: int | None = None) -> dict[str, float]:
    """Return the means over prompts and over the first `seeds`, by default all, at lambda 1."""
    curves = {key: curve_at_one(results, form, key=key) for key in ("following", "concept", "information")}
    return {key: float(curve.value[:seeds].mean()) for key, curve in curves.items()}
