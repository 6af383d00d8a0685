"""Tier D of the ablation: image tokens, zero values, the padding of the text, and even odds.  `python -m eval variants`

docs/ablation-protocol.md, "Tier D", says what is compared. The forms that are varied are those of tier B.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd

from eval.ablation.appendix import mark
from eval.ablation.endpoint import endpoint
from eval.ablation.forms import FORMS, VARIANTS
from eval.ablation.report import spread
from eval.ablation.rows import Results
from eval.ablation.statistics import at_index, at_level
from eval.ablation.study import source_hash
from eval.ablation.summary import curve_at_one, trainings
from eval.ablation.tier import CODE, ShortStudy, Tier, check_options, earlier, jobs_of, means_at_one
from eval.tables import markdown, with_interval

HEADS = "difference [95 %]", "λ = 1: difference [95 %]"
CONTROLS = tuple(dict.fromkeys(VARIANTS.values()))  # trained again with seed 0, because tier B ran on another processor


@dataclass(frozen=True)
class VariantStudy(ShortStudy):
    """The size of tier D. `code`: a hash of the source files of the forms."""

    seeds: int = 3
    forms: tuple[str, ...] = (*VARIANTS, *CONTROLS)
    code: str = field(default_factory=lambda: source_hash(CODE))

    def seeds_of(self, form: str) -> range:
        return range(1) if form in CONTROLS else super().seeds_of(form)


def summarise(results: Results) -> dict[str, Any]:
    """Compute the numbers of each form, by its name."""
    return {form: of_form(results, form) for form in results.study["forms"]}


def of_form(results: Results, form: str) -> dict[str, Any]:
    """Return the endpoint of a form over its seeds, what is drawn at lambda 1, and its parameters."""
    parameters = trainings(results)[form][0]["parameters"]
    return {"endpoint": endpoint(results.curve(form), results.study["level"]), "one": means_at_one(results, form), "parameters": parameters}


def table(results: Results, first: Results | None) -> pd.DataFrame:
    """Tabulate each form, below the form of tier B that it varies, with the difference. `first`: the results of tier B."""
    lines = []
    for origin in CONTROLS:
        if first is not None:
            lines.append(_line(FORMS[origin].name, of_form(first, origin)))
        for form in [form for form in results.study["forms"] if VARIANTS.get(form, form) == origin]:
            name = f"{FORMS[form].name}; seed 0, trained again" if form in CONTROLS else FORMS[form].name
            line = _line(name, results.data["summary"][form])
            lines.append(line if first is None else line | differences(results, form, first, origin))
    return pd.DataFrame(lines)


def differences(results: Results, form: str, first: Results, origin: str) -> dict[str, str]:
    """Format the difference of a form from the one that it varies, at the level and at lambda 1."""
    bootstrap, both = results.bootstrap, ((results, form), (first, origin))
    (a, b), (c, d) = [source.curve(each) for source, each in both], [curve_at_one(source, each) for source, each in both]
    found = bootstrap.difference(a, b, at_level(results.study["level"])), bootstrap.difference(c, d, at_index(0))
    return dict(zip(HEADS, (with_interval(asdict(each)) for each in found), strict=True))


def _line(name: str, numbers: dict[str, Any]) -> dict[str, str]:
    """Format the numbers of a form."""
    end, one = numbers["endpoint"], numbers["one"]
    line = {"form": name, "parameters": f"{numbers['parameters']:,}"}
    line |= {"information at the level": mark(spread(end["information"]), end), HEADS[0]: ""}
    line |= {"λ = 1: follows": f"{one['following']:.0%}", "λ = 1: concept": f"{one['concept']:.0%}"}
    return line | {"λ = 1: information": f"{one['information']:.1f}", HEADS[1]: ""}


def run(args: Namespace) -> None:
    """`python -m eval variants`"""
    check_options(args)
    results = Tier("variants", VariantStudy(), jobs_of, summarise).run(args, args.weights)
    print(markdown(table(results, earlier(results, args.out, "cause"))))
