"""Tier F of the ablation: the simple adapter at the learning rate of IP-Adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_world import write_world

from eval import __main__ as commands
from eval.ablation import equal_rates, rates
from eval.ablation.rows import Results

ROOT = Path(__file__).parent.parent


def test_a_tiny_study_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The rate is that of IP-Adapter in tier A. Each of three lengths of training is read. Tier A has other prompts, so it is not shown."""
    weights = write_world(tmp_path / "weights")
    given = ["--weights", str(weights), "rates", "--out", str(tmp_path), "--smoke", "--jobs", "1"]
    commands.run(commands.parser().parse_args(given))
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if line.startswith("| simple")]
    assert "no results of `python -m eval ablation` on the same prompts" in said and len(rows) == 1
    summary = Results.of(tmp_path / "results" / "rates.json").data["summary"]
    assert [*summary["endpoint"]] == ["4", "8", "16"]
    shipped = Results.of(ROOT / "results" / "ablation.json")
    assert summary["rate"] == rates.of_form(shipped, "ip_adapter")["rate"] == 1.5e-3


def test_the_table_beside_the_first_study() -> None:
    """The endpoints of tier A are those of RESULTS.md, and so is the difference. Both forms are compared on the seeds that both have."""
    first = Results.of(ROOT / "results" / "ablation.json")
    told, by_step = first.data["summary"]["endpoint"], first.data["summary"]["steps"]
    for form in ("ip_adapter", "simple"):
        ends = rates.of_form(first, form)["endpoint"]
        assert ends["8000"]["information"] == pytest.approx(told[form]["information"][:3])
        assert ends["2000"]["information"] == pytest.approx(by_step["endpoint"][form][by_step["steps"].index(2000)][:3])
    seeds = {name: unit.value.get("seed", 0) for name, unit in first.units.items() if isinstance(unit.value, dict)}
    units = {name: unit for name, unit in first.units.items() if seeds.get(name, 0) < 3}
    own = Results({**first.data, "study": first.study | {"seeds": 3}, "summary": rates.of_form(first, "simple")}, units)
    own.data["summary"] = rates.summarise(own)
    lines = rates.table(own, first, None).to_dict("records")
    heads = [(line.pop("form"), line["rate"]) for line in lines]
    assert heads == [("IP-Adapter, tier A", "0.0015"), ("simple, tier A", "0.0045"), ("simple, tier F", "0.0045")]
    assert lines[1] == lines[2], "tier A in the place of tier F is the same on the three seeds"
    short = Results.of(ROOT / "results" / "cause.json")
    (line,) = rates.table(own, None, short).to_dict("records")[1:]
    assert line["form"] == "simple, tier B" and line["rate"] == "0.0015" and line["2,000 steps"].startswith("> 3")
    leads = equal_rates.leads(own, first, 3)
    found = {name: lead.difference for name, lead in leads.items()}
    pairs = zip(*(told[form]["information"][:3] for form in ("ip_adapter", "simple")), strict=True)
    assert found["at the level"].mean == pytest.approx(sum(a - b for a, b in pairs) / 3)
    at_one = first.data["summary"]["paper"]
    for task, name in (("complementary", "at λ = 1"), ("picture", "the image prompt alone at λ = 1")):
        ours, simple = (sum(at_one[task][form]["information"][:3]) / 3 for form in ("ip_adapter", "simple"))
        assert found[name].mean == pytest.approx(ours - simple)
    best = leads["at the level, the simple adapter after the best number of steps"]
    assert best.difference.mean < found["at the level"].mean and best.note.startswith("2,000 steps")
    assert all(each.seeds for each in found.values())
    table = rates.difference_table(own, first)
    assert len(table) == len(found) == 6 and (table["tier A, 0.0045"] == table["tier F, 0.0045"]).all()
    with pytest.raises(ValueError, match=r"ip_adapter was trained at 0\.0015, and not at the rate of tier F"):
        rates.one_rate(own, first)
    own.data["summary"]["rate"] = 0.0015
    with pytest.raises(ValueError, match=r"simple was trained at 0\.0045"):
        rates.one_rate(own, first)
