"""Tables at the end of RESULTS.md: learning rates, lambdas, floors and ceilings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from eval.ablation.forms import FORMS, fraction
from eval.ablation.rows import Results
from eval.ablation.summary import trainings


def mark(number: str, ends: Mapping[str, int]) -> str:
    """Mark a number that some seeds read at the end of their curve by ">", and one that some read before their smallest lambda by "†"."""
    return ("> " if ends.get("end") else "") + number + (" †" if ends.get("start") else "")


def rate_table(results: Results) -> pd.DataFrame:
    """Tabulate the held-out loss and the endpoint after the short training at each rate. The chosen rate is marked by "*"."""
    lines, runs = [], trainings(results)
    for form, rates in results.data["summary"]["rates"].items():
        line: dict[str, Any] = {"form": FORMS[form].name, "parameters": f"{runs[form][0]['parameters']:,}"}
        for rate, row in rates.items():
            end = row["endpoint"]
            text = "diverged" if end is None else f"{row['held_out']:.5f}, {mark(f'{end:.1f}', row['read'])}"
            line[rate] = text + (" \\*" if float(rate) == runs[form][0]["rate"] else "")
        lines.append(line)
    return pd.DataFrame(lines)


def grid_table(results: Results) -> pd.DataFrame:
    """Tabulate the lambdas of each form."""
    return pd.DataFrame(
        {"form": FORMS[form].name, "λ": ", ".join(map(fraction, results.grid(form)))} for form in results.study["forms"]
    )


def ceiling_table(results: Results) -> pd.DataFrame:
    """Tabulate the ceilings and floors."""
    names = {
        "truth": "information of the image prompts themselves",
        "vae": "information of the image prompts through the VAE: the ceiling",
        "alone": "information of the text alone",
        "error, vae": "raw palette error of the image prompts through the VAE",
        "error, grey": "raw palette error of a grey",
        "error, best constant": "raw palette error of the best constant palette",
        "error, another's": "raw palette error of another image prompt's palette",
    }
    values = results.data["summary"]["ceilings"]
    return pd.DataFrame({"": name, "value": f"{values[key]:.1f}"} for key, name in names.items() if key in values)
