"""Insert generated tables into README.md and docs/.  `python -m eval docs`

The text between the lines `<!-- insert: NAME -->` and `<!-- end -->` of a page is generated.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path

from checkpoints.files import read_json, replacing
from eval import by_eye, calibration, fine, frechet, structure, style, world_table
from eval.ablation import cause, rates, report, rivals_table, second_base, variants
from eval.ablation.rows import Results
from eval.peers import benchmark, gpu, marks, parity, scaling
from eval.tables import markdown

PLACE = re.compile(r"(<!-- insert: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def inserts(root: Path) -> dict[str, str]:
    """Return the generated texts by name, computed from the files in `root`/results and the marks in `root`/tests."""
    results = {path.stem: read_json(path) for path in sorted((root / "results").glob("*.json"))}
    files = [root / "results" / f"{name}.json" for name in ("ablation", "cause", "rivals", "variants", "second_base", "rates")]
    tier_a, tier_b, tier_c, tier_d, tier_e, tier_f = map(Results.of, files)
    return {
        **{name: markdown(table(tier_b)) for name, table in cause.TABLES.items()},
        "rivals": markdown(rivals_table.table(tier_c)),
        "rival_scenes": markdown(rivals_table.scene_table(tier_c)),
        "rival_losses": markdown(rivals_table.loss_table(tier_c)),
        "variants": markdown(variants.table(tier_d, tier_b)),
        "second_base": markdown(second_base.table(second_base.both_bases(tier_e, tier_b))),
        "rates": markdown(rates.table(tier_f, tier_a, tier_b)),
        "rates_differences": markdown(rates.difference_table(tier_f, tier_a)),
        "one_rate": markdown(rates.one_rate(tier_f, tier_a)),
        "ablation": report.lead(tier_a, tier_f),
        "world": world_table.table(results["world"]),
        "by_eye": by_eye.table(results["by_eye"]),
        "judges": world_table.two_judges(results["world"], results["world_judge"]),
        "calibration": calibration.table(results["calibration"], results["calibration_judge"]),
        "frechet": frechet.table(results["frechet"]),
        "fine": fine.table(results["fine"]),
        "structure": structure.table(results["structure"]),
        "style": style.table(results["style"]),
        "parity": parity.table(results["parity"]),
        "parity_sdxl": parity.table(results["parity_sdxl"]),
        "parity_tests": marks.table(root),
        "scaling": scaling.table(results["scaling"]),
        "gpu": gpu.table(results["gpu"]),
        "gpu_h200": gpu.table(results["gpu_h200"]),
        "benchmark": benchmark.table(results["benchmark"]),
        "machine": f"Measured on {results['benchmark']['machine']}.",
    }


def fill_page(page: str, values: dict[str, str]) -> str:
    """Regenerate all generated texts of a page. Raises ValueError for an unknown name."""

    def fill(place: re.Match[str]) -> str:
        if place[2] not in values:
            raise ValueError(f"unknown insert {place[2]!r}: use one of {', '.join(values)}")
        return f"{place[1]}{values[place[2]]}\n{place[3]}"

    return PLACE.sub(fill, page)


def pages(root: Path) -> list[Path]:
    """List the pages that may contain generated texts."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def write(root: Path) -> list[Path]:
    """Regenerate all pages in `root`; return the paths of those that changed."""
    values, paths = inserts(root), []
    for path in pages(root):
        old = path.read_text()
        if (new := fill_page(old, values)) != old:
            with replacing(path) as part:
                part.write_text(new)
            paths.append(path)
    return paths


def run(args: Namespace) -> None:
    """`python -m eval docs`"""
    paths = write(args.root)
    print("\n".join(map(str, paths)) or "every page is up to date")
