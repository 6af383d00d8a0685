"""Tier F of the ablation: the simple adapter at lower learning rates."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_world import write_world

from eval import __main__ as commands
from eval.ablation import rates
from eval.ablation.forms import RATES
from eval.ablation.rows import Results

ROOT = Path(__file__).parent.parent


def test_a_tiny_study_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each rate is the one that its name says, and is read after three lengths of training. The shipped study is shown beside them."""
    weights = write_world(tmp_path / "weights")
    for name in ("score_image", "score_text"):
        for end in (".safetensors", ".json"):
            shutil.copy(ROOT / "weights" / f"{name}{end}", weights)
    given = ["--weights", str(weights), "rates", "--out", str(tmp_path), "--smoke", "--jobs", "1"]
    commands.run(commands.parser().parse_args(given))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| the simple adapter")]
    assert [row.split(" | ")[1] for row in rows] == ["0.0015", "0.0005"]
    results = Results.of(tmp_path / "results" / "rates.json")
    assert [results.data["summary"][form]["rate"] for form in RATES] == [1.5e-3, 5e-4]
    assert all([*results.data["summary"][form]["endpoint"]] == ["4", "8", "16"] for form in RATES)
    assert len({results.units[f"train-{form}-0"].value["losses"][-1]["held_out"] for form in RATES}) == 2


def test_the_table_beside_the_first_study() -> None:
    """The endpoints of tier A are those of RESULTS.md, and a form minus itself is 0."""
    first = Results.of(ROOT / "results" / "ablation.json")
    told = first.data["summary"]["endpoint"]
    for form in ("ip_adapter", "simple"):
        numbers = rates.of_form(first, form)
        assert numbers["endpoint"]["8000"]["information"] == pytest.approx(told[form]["information"])
        by_step = first.data["summary"]["steps"]
        assert numbers["endpoint"]["2000"]["information"] == pytest.approx(by_step["endpoint"][form][by_step["steps"].index(2000)])
    own = Results({**first.data, "summary": {"simple": rates.of_form(first, "simple")}}, first.units)
    lines = rates.table(own, first).to_dict("records")
    assert [line["form"] for line in lines] == ["IP-Adapter", "the simple adapter"] and lines[1]["rate"] == "0.0045"
    assert lines[1]["IP-Adapter minus it [95 %]"] == "+39.6 [+28.3, +45.7]"
