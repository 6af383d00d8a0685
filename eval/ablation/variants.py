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
from eval.ablation.statistics import Bootstrap, at_level
from eval.ablation.study import source_hash
from eval.ablation.summary import trainings
from eval.ablation.tier import CODE, ShortStudy, Tier, at_one, check_options, earlier, jobs_of
from eval.tables import markdown, with_interval


@dataclass(frozen=True)
class VariantStudy(ShortStudy):
    """The size of tier D. `code`: a hash of the source files of the forms."""

    seeds: int = 3
    forms: tuple[str, ...] = tuple(VARIANTS)
    code: str = field(default_factory=lambda: source_hash(CODE))


def summarise(results: Results) -> dict[str, Any]:
    """Compute the numbers of each form, by its name."""
    return {form: of_form(results, form) for form in results.study["forms"]}


def of_form(results: Results, form: str) -> dict[str, Any]:
    """Return the endpoint of a form over its seeds, what is drawn at lambda 1, and its parameters."""
    parameters = trainings(results)[form][0]["parameters"]
    return {"endpoint": endpoint(results.curve(form), results.study["level"]), "one": at_one(results, form), "parameters": parameters}


def compare(results: Results, first: Results | None) -> pd.DataFrame:
    """Tabulate each form, below the form of tier B that it varies, with the difference. `first`: the results of tier B."""
    lines = []
    bootstrap, read = Bootstrap(results.study["resamples"]), at_level(results.study["level"])
    for origin in dict.fromkeys(VARIANTS.values()):
        if first is not None:
            lines.append(_line(origin, of_form(first, origin)))
        for form in [form for form, varied in VARIANTS.items() if varied == origin]:
            line = _line(form, results.data["summary"][form])
            if first is not None:
                difference = bootstrap.difference(results.curve(form), first.curve(origin), read)
                line["minus the form it varies [95 %]"] = with_interval(asdict(difference))
            lines.append(line)
    return pd.DataFrame(lines)


def _line(form: str, numbers: dict[str, Any]) -> dict[str, str]:
    """Format the numbers of a form."""
    end, one = numbers["endpoint"], numbers["one"]
    line = {"form": FORMS[form].name, "parameters": f"{numbers['parameters']:,}"}
    line |= {"information at the level": mark(spread(end["information"]), end), "minus the form it varies [95 %]": ""}
    line |= {"λ = 1: follows": f"{one['following']:.0%}", "λ = 1: concept": f"{one['concept']:.0%}"}
    return line | {"λ = 1: information": f"{one['information']:.1f}"}


def run(args: Namespace) -> None:
    """`python -m eval variants`"""
    check_options(args)
    results = Tier("variants", "variants", VariantStudy(), jobs_of, summarise, {}).run(args, args.weights)
    print(markdown(compare(results, earlier(results, args.out, "cause"))))
