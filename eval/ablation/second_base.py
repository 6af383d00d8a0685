"""Tier E of the ablation: does its result hold on another base?

`python -m eval second-base` compares on a base and a CLIP that were trained from another seed, `python -m eval half-base` on a base of
half the width. docs/ablation-protocol.md, "Tier E", says what is compared. The first base's numbers are those of the same forms in tier B.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from checkpoints.files import replacing
from eval.ablation import robustness
from eval.ablation.appendix import mark
from eval.ablation.endpoint import PARTS, endpoint
from eval.ablation.forms import FORMS, IP_ADAPTER, SIMPLE
from eval.ablation.report import spread
from eval.ablation.rows import Results
from eval.ablation.statistics import at_level
from eval.ablation.tier import ShortStudy, Tier, check_options, earlier, jobs_of, means_at_one
from eval.tables import markdown, seeds_interval, with_interval
from model.unet import MINI

SEED = 2  # the CLIP and the base of the mini world are trained with seeds 0 and 1
FILES = {"clip": "image_encoder", "unet": "unet"}  # stage -> the file that it writes last


@dataclass(frozen=True)
class SecondStudy(ShortStudy):
    """The size of tier E."""

    seeds: int = 3
    forms: tuple[str, ...] = (IP_ADAPTER, SIMPLE)


@dataclass(frozen=True)
class OtherBase:
    """A base of tier E. `command`: of `python -m eval`. `kept`: the parts that are those of the first base. `stages`: what is trained, each
    with options of its own."""

    command: str
    name: str
    kept: tuple[str, ...]
    stages: dict[str, list[str]]

    def folder(self, out: Path) -> Path:
        """Return the folder of its weights."""
        return out / "runs" / self.command.replace("-", "_") / "weights"

    def commands(self, base: Path, state: Path, device: str) -> dict[Path, list[str]]:
        """Return the command lines that train what is its own in the folder `base`, by the file that each writes last."""
        on = [] if device == "cpu" else ["--device", device, "--scale", "4"]
        given = ["--seed", str(SEED), "--weights", str(base), "--state", str(state), *on]
        return {base / f"{FILES[stage]}.safetensors": ["train", stage, *given, *own] for stage, own in self.stages.items()}

    def train(self, base: Path, weights: Path, state: Path, device: str) -> None:
        """Train what is missing in the folder `base`. What is kept is copied from the folder `weights`.

        Raises ValueError if a training fails.
        """
        for file in (weights / f"{name}.{end}" for name in self.kept for end in ("safetensors", "json")):
            if not (base / file.name).exists():
                with replacing(base / file.name) as part:
                    shutil.copyfile(file, part)
        for file, command in self.commands(base, state, device).items():
            if not file.exists() and subprocess.run([sys.executable, "-m", *command]).returncode:
                raise ValueError(f"{file} was not trained; its training says why, above. The same command continues")


SECOND = OtherBase("second-base", "the second", ("vae", "judge"), {"clip": [], "unet": []})
HALF = OtherBase(
    "half-base",
    "half as wide",
    ("vae", "judge", "text_encoder", "image_encoder"),
    {"unet": ["--channels", *(str(c // 2) for c in MINI.channels)]},
)
BASES = {base.command: base for base in (SECOND, HALF)}


def summarise(results: Results) -> dict[str, Any]:
    """Compute all numbers of the table, from a study that has both forms: this tier, or tier B."""
    level, forms = results.study["level"], (IP_ADAPTER, SIMPLE)
    curves = {form: results.curve(form) for form in forms}
    return {
        "alone": float(results.alone()["following"].mean()),
        "ceiling": float(results.measures("references")["information"][1].mean()),
        "endpoint": {form: endpoint(curve, level) for form, curve in curves.items()},
        "one": {form: means_at_one(results, form) for form in forms},
        "difference": asdict(results.bootstrap.difference(curves[IP_ADAPTER], curves[SIMPLE], at_level(level))),
        "only": {key: robustness.only(results, key) for key in PARTS},
    }


def table(summaries: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """Tabulate both forms on each base. `summaries`: by the name of the base."""
    lines = []
    for base, summary in summaries.items():
        for form, end in summary["endpoint"].items():
            one, line = summary["one"][form], {"base": base, "form": FORMS[form].short}
            line |= {"information at the level": mark(spread(end["information"]), end), "λ = 1: follows": f"{one['following']:.0%}"}
            lines.append(line | {"λ = 1: concept": f"{one['concept']:.0%}", "λ = 1: information": f"{one['information']:.1f}"})
        for name, numbers in differences(summary).items():
            lines.append({"base": base, "form": name, "information at the level": numbers})
    return pd.DataFrame(lines)


def differences(summary: dict[str, Any]) -> dict[str, str]:
    """Format the difference of the two forms by name: with an interval over seeds and prompts, over seeds alone, and if only a part of the
    text counts as following, also at the highest level."""
    found = {"difference [95 %]": with_interval(summary["difference"]), "the same, over seeds alone": seeds_interval(summary["difference"])}
    for key, only in summary["only"].items():
        name, strict = f"counting only {key.removeprefix('right ')}", only["strict"]["test"]
        read = [f"{ends['end']} of {FORMS[form].short}" for form, ends in only["read"]["test"].items() if ends["end"]]
        found[name] = with_interval(only["test"]) + (f"; seeds at their largest λ: {', '.join(read)}" if read else "")
        alone = seeds_interval(strict)
        found[f"{name}, at {robustness.LEVELS[-1]:.0%}"] = with_interval(strict) + (f"; over seeds alone {alone}" if alone else "")
    return {name: numbers for name, numbers in found.items() if numbers}


def both_bases(results: Results, first: Results | None, other: OtherBase = SECOND) -> dict[str, dict[str, Any]]:
    """Return the summaries of both bases by name; `first`: the results of tier B, if they are there."""
    return ({"the first": summarise(first)} if first else {}) | {other.name: results.data["summary"]}


def run(args: Namespace) -> None:
    """`python -m eval second-base`, `python -m eval half-base`"""
    check_options(args)
    other = BASES[args.command]
    base = args.base or other.folder(args.out)
    if args.smoke and args.base is None:
        raise ValueError("--smoke does not train a base: name a folder of weights with --base, such as weights")
    tier = Tier(other.command, SecondStudy(), jobs_of, summarise)
    if args.base is None and tier.results(args).exists() and not base.exists():
        print(f"The base of {tier.results(args)} is not in {base}: only the report is written. --out FOLDER trains anew")
        results = tier.report(tier.results(args))
    else:
        if args.base is None:
            other.train(base, args.weights, base.parent, args.device)
        results = tier.run(args, base)
    print(markdown(table(both_bases(results, earlier(results, args.out, "cause"), other))))
