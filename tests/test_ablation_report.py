"""What the ablation reads from drawings, and what RESULTS.md says about it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eval import clip_score
from eval.ablation import equal_rates, report
from eval.ablation.against import against, each_change
from eval.ablation.command import TOLERANCE, compare
from eval.ablation.draws import quantise
from eval.ablation.endpoint import PARTS
from eval.ablation.forms import IP_ADAPTER, SIMPLE, TIER_A, fraction
from eval.ablation.memo import Unit
from eval.ablation.names import Draw
from eval.ablation.plots import matched_lambda
from eval.ablation.robustness import shares_of_the_lead
from eval.ablation.rows import Results, follows, hits
from eval.ablation.statistics import distances, information
from eval.ablation.study import RATE_SEED, SMOKE
from eval.ablation.summary import summarise
from eval.bench import Bench
from eval.prompts import TASKS, Prompts
from eval.tables import markdown, with_interval
from sampling.loading import load
from train.judge import load_judge

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights"
N = 40  # prompts of the results that are made up


# what is read from drawings


def right(prompts: Prompts, task: str) -> dict[str, Tensor]:
    """Return what a judge without errors reads from ideal drawings. Drawings in the middle of their cells are placed well."""
    truth = prompts.truth
    assert truth is not None
    image, scene = truth.labels, truth.complement
    readings = {"concept": image["concept"], "background": image["background"], "palette": image["palette"]}
    if task == "conflict":
        readings |= {"concept": truth.concept, "background": truth.background}
    placement = image["placement"].double()
    if task == "complementary":
        assert scene.size is not None and scene.place is not None
        readings["background"] = scene.background
        side = torch.tensor([43.0, 51.0, 59.0])[scene.size]
        cell = scene.place.clamp(min=0)
        x, y = ((part + 0.5) * (65 - side) / 3 for part in (cell % 3, cell // 3))
        placement = torch.stack([x + side / 2, y + side / 2, side], dim=1).double()
    return readings | {"placement": placement, "clip_i": torch.full((len(placement),), 0.5), "clip_t": torch.full((len(placement),), 0.25)}


@pytest.mark.parametrize("task", TASKS)
def test_ideal_drawings_follow_their_text(task: str) -> None:
    """And a mistake in any attribute that the text names makes a drawing fail, while one in the palette does not."""
    prompts = Prompts.of_the_world(60)
    truth, arrays = prompts.to_json()["truth"], quantise(right(prompts, task))
    assert follows(task, arrays, truth, arrays).tolist() == [1.0] * 60
    named = {"complementary": ["background", "placement"]}.get(task, ["concept", "background"])
    for key in arrays:
        spoiled = {**arrays, key: arrays[key] + (400 if key == "placement" else 1)}
        assert (follows(task, spoiled, truth, arrays).mean() < 0.7) == (key in named), key
    wrong = {"right background": "background"} | ({"right size and place": "placement"} if task == "complementary" else {})
    for part, key in wrong.items():
        right_parts = hits(task, {**arrays, key: arrays[key] + 400}, truth)
        assert right_parts[part].mean() < 0.7 and all(right_parts[other].all() for other in wrong if other != part)


def test_without_ground_truth_following_is_relative_to_the_text_alone() -> None:
    alone, drawn = ({"clip_t": torch.tensor(values, dtype=torch.int16)[:, None]} for values in ([2000, 4000], [1500, 6000]))
    assert follows("conflict", drawn, None, alone).tolist() == [0.5, 2]


def test_readings_are_rounded_to_int16() -> None:
    palette = torch.tensor([[[61.26, -40.04, 0.0], [5, 6, 7]]])
    arrays = quantise({"palette": palette, "clip_i": torch.tensor([0.12346]), "clip_t": torch.tensor([9.0])})
    assert arrays["palette"].tolist() == [[613, -400, 0, 50, 60, 70]] and arrays["clip_i"].tolist() == [[1235]]
    assert arrays["clip_t"].tolist() == [[32767]] and {array.dtype for array in arrays.values()} == {torch.int16}


def test_the_judge_reads_true_pictures() -> None:
    """All but one concept: the judge names 99.6 % of true pictures. Palettes are within a CIE76 of 5."""
    prompts = Prompts.of_the_world(12)
    scorer = clip_score.Scorer("none", lambda pictures: torch.ones(len(pictures), 2), lambda texts: torch.ones(len(texts), 2))
    read = Bench(load(WEIGHTS), prompts, scorer, load_judge(WEIGHTS / "judge.safetensors")).read("picture", prompts.pixels)
    assert prompts.truth is not None
    image = prompts.truth.labels
    assert (read["concept"] == image["concept"]).sum() >= 11 and torch.equal(read["background"], image["background"])
    assert (read["palette"] - image["palette"]).norm(dim=-1).mean() < 5 and read["clip_i"].tolist() == pytest.approx([1] * 12)


# results


LAMBDAS = {"ip_adapter": [0.5, 1.0, 2.0], "simple": [0.25, 1.0, 64.0]}
KNOWN = {"ip_adapter": [8, 24, 40], "simple": [4, 12, 40]}  # drawings with the true palette, at each lambda; the others are grey
FOLLOW = [36, 28, 0]  # drawings that follow the text, of 40


def made_up(known: Mapping[str, list[int]] = KNOWN, seeds: int = 2) -> Results:
    """Results of two forms, the same for all seeds, tasks and steps."""
    prompts = Prompts.of_the_world(N)
    told = prompts.to_json()

    def unit(task: str, lambdas: list[float], known: list[int], follow: list[int], **where: Any) -> Unit:
        parts = []
        for k, f in zip(known, follow, strict=True):
            read = right(prompts, task)
            read["palette"] = torch.where((torch.arange(N) < k)[:, None, None], read["palette"], torch.tensor([65.0, 0, 0]))
            read["background"] = torch.where(torch.arange(N) < f, read["background"], (read["background"] + 1) % 10)
            read["concept"] = torch.where(torch.arange(N) < k, read["concept"], 64)
            parts.append(quantise(read))
        arrays = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return Unit({"task": task, "split": "test", "lambdas": lambdas, **where}, {"commit": "abc", "processor": "x"}, arrays)

    study = replace(SMOKE, seeds=seeds, forms=("ip_adapter", "simple"), prompts=N, few=2, steps=16)
    units = {f"alone-{task}-test": unit(task, [0.0], [0], [N]) for task in TASKS}
    both = unit("picture", [0, 1], [N, N], [N, N])
    units["references"] = replace(both, value={"task": "picture", "split": "test", "references": ["truth", "vae"]})
    for form in study.forms:
        units[f"grid-{form}"] = Unit({"lambdas": [0.0, *LAMBDAS[form]]}, {"commit": "abc", "processor": "x"})
        for rate in study.rates:
            units[f"rate-{form}-{rate:g}"] = Unit(1.5, {"commit": "abc", "processor": "x"})
            name = Draw(form, RATE_SEED, study.rate_steps, TASKS[0], rate=rate).name
            units[name] = unit(TASKS[0], [LAMBDAS[form][0], LAMBDAS[form][-1]], [known[form][0], known[form][-1]], [FOLLOW[0], FOLLOW[-1]])
        for seed in range(seeds):
            run = {"form": form, "seed": seed, "rate": study.rates[0], "parameters": 1234, "losses": [{"held_out": 0.5}]}
            units[f"train-{form}-{seed}"] = Unit(run, {"commit": "abc", "processor": "x"})
            cells = [(study.steps, task, "all") for task in TASKS] + [(study.steps, TASKS[0], "finest")]
            cells += [(step, TASKS[0], "all") for step in study.checkpoints[:-1]]
            for step, task, layers in cells:
                few = slice(None, None, 1 if step == study.steps else 2)
                values = LAMBDAS[form][few], known[form][few], FOLLOW[few]
                units[Draw(form, seed, step, task, layers=layers).name] = unit(task, *values)
    data = {"study": json.loads(json.dumps(study.__dict__)), "tasks": list(TASKS), "prompts": {"test": told}}
    return Results(data | {"made_from": {"scorer": "a CLIP"}}, units)


def test_the_endpoint_is_the_information_at_equal_following() -> None:
    """80 % lies between 90 % and 70 %. Information at a lambda: that of the drawings with the true palette, and of the grey ones. The
    error allowed is that of colours rounded to tenths."""
    results = made_up()
    summary = summarise(results)
    true = np.round(results.palettes(), 1)
    grey = information(distances(np.broadcast_to([65.0, 0, 0], true.shape), results.palettes()))
    known = information(distances(true, results.palettes()))

    def at(k: int) -> float:
        return float((known[:k].sum() + grey[k:].sum()) / N)

    for form in results.study["forms"]:
        actual = summary["endpoint"][form]
        assert actual["information"] == pytest.approx([(at(KNOWN[form][0]) + at(KNOWN[form][1])) / 2] * 2, abs=0.02) and not actual["end"]
        assert actual["concept"] == pytest.approx([(KNOWN[form][0] + KNOWN[form][1]) / 2 / N] * 2)
        assert matched_lambda(results, form) == pytest.approx(sum(LAMBDAS[form][:2]) / 2)
    d = summary["difference"]["simple"]
    assert d["mean"] == pytest.approx((at(8) + at(24) - at(4) - at(12)) / 2, abs=0.02) and d["low"] > 0
    assert summary["ceilings"]["truth"] == pytest.approx(known.mean(), abs=0.02)
    assert summary["ceilings"]["alone"] == pytest.approx(0, abs=1e-9) and summary["ceilings"]["error, grey"] > 40
    assert summary["ceilings"]["error, best constant"] < summary["ceilings"]["error, grey"] < summary["ceilings"]["error, another's"]
    assert summary["paper"]["picture"]["simple"]["information"] == pytest.approx([at(12)] * 2, abs=0.02)
    few = (36 - 32) / (36 - 0)  # of the way from the first of two lambdas to the last, where following falls to 80 %
    assert summary["steps"]["endpoint"]["simple"][0] == pytest.approx([(1 - few) * at(4) + few * at(40)] * 2, abs=0.02)
    assert len(summary["steps"]["difference"]) == 5 and summary["steps"]["trend"]["mean"] == pytest.approx(0, abs=1e-9)


def test_the_page_states_the_result() -> None:
    results = made_up()
    results.data["summary"] = summary = summarise(results)
    page = report.render(results)
    d = summary["difference"][SIMPLE]
    told = "Decoupled attention beats the simple adapter here: where both follow the text equally often"
    assert f"{told}, IP-Adapter minus the simple adapter is {with_interval(d)} in palette information" in page
    assert f"the ceiling is {summary['ceilings']['vae']:.1f}" in page and "commit abc, and were computed on x." in page
    assert "2 of IP-Adapter and simple" in page and all(f"- {each}" in page for each in against(results))
    assert markdown(report.square(results.data["summary"]["endpoint"])) in page and "(concept 40%)" in page and "| simple |" in page
    swapped = made_up({IP_ADAPTER: KNOWN[SIMPLE], SIMPLE: KNOWN[IP_ADAPTER]})
    swapped.data["summary"] = summarise(swapped)
    assert report.headline(swapped).startswith("The simple adapter beats decoupled attention")
    even = made_up(dict.fromkeys(KNOWN, KNOWN[IP_ADAPTER]))
    even.data["summary"] = summarise(even)
    assert report.headline(even).startswith("The study does not decide")
    even.data["summary"]["steps"]["difference"][1] = d
    assert report.headline(even).startswith("The simple adapter catches up")
    results.data["summary"]["confirmed"] = {SIMPLE: d | {"low": -1.0}}
    assert report.headline(results).startswith("The study does not decide"), "the confirmation prompts must agree"


def test_the_page_leads_with_the_smaller_difference(tmp_path: Path) -> None:
    """The simple adapter at another learning rate, tier F: between the two forms, as good as IP-Adapter, and worse than in tier A."""
    results = made_up()
    results.data["summary"] = summarise(results)
    first = results.data["summary"]["difference"][SIMPLE]
    heads = {}
    for name, known in {"between": [6, 18, 40], "even": KNOWN[IP_ADAPTER], "worse": [2, 6, 40]}.items():
        rates = made_up({**KNOWN, SIMPLE: known})
        of_simple = {"rate": 0.5, "endpoint": {"16": {"information": [7.25]}}}
        rates.data["summary"] = of_simple
        equal = with_interval(asdict(equal_rates.primary(rates, results)))
        heads[name], page = report.headline(results, rates), report.render(results, rates)
        assert f"| the simple adapter at the learning rate 0.5 | test | {equal} |  |" in page
        assert equal in heads[name] and with_interval(first) in heads[name] and heads[name] in page
        assert "to the end at another rate, 0.5, the one of IP-Adapter: its seeds have 7.2 there; it was not drawn" in page
    wins = "Decoupled attention beats the simple adapter here: where both follow the text equally often"
    equal = with_interval(asdict(equal_rates.primary(made_up({**KNOWN, SIMPLE: [6, 18, 40]}), results)))
    rest = f"with one learning rate for both, and {with_interval(first)} with the rates that the held-out loss chose"
    assert heads["between"].startswith(f"{wins}, IP-Adapter minus the simple adapter is {equal} in palette information {rest}")
    assert heads["even"].startswith("The study does not decide")
    assert heads["worse"].startswith(report.headline(results)) and "With one learning rate for both, it is" in heads["worse"]
    assert results.beside(tmp_path, "rates") is None
    (tmp_path / "rates.json").write_text((ROOT / "results" / "cause.json").read_text())
    shutil.copy(ROOT / "results" / "cause.safetensors", tmp_path / "rates.safetensors")
    shipped = Results.of(ROOT / "results" / "ablation.json")
    assert results.beside(tmp_path, "rates") is None, "it is on other prompts"
    assert shipped.beside(tmp_path, "rates") is not None


def told(results: Results, summary: dict[str, Any]) -> list[str]:
    results.data["summary"] = summary
    return against(results)


def test_the_primary_difference_is_read_in_other_ways() -> None:
    """At 70 %, each form is read at its second lambda. As only backgrounds are wrong, counting them alone changes nothing; and where only
    size and place count, each form is read at its largest lambda."""
    results = made_up()
    summary = summarise(results)
    other, ours, simple = summary["robustness"], *(results.curve(form).value.mean(axis=(0, 2)) for form in (IP_ADAPTER, SIMPLE))
    assert other["levels"]["test"]["70%"]["mean"] == pytest.approx(ours[2] - simple[2])
    assert {split: set(levels) for split, levels in other["levels"].items()} == {"test": {"60%", "70%", "90%"}}, "95 % was not measured"
    grounds, rest = (other["only"][key] for key in PARTS)
    assert grounds["test"] | {"p": 0} == summary["difference"][SIMPLE] | {"p": 0} and set(grounds) == {"test", "read", "strict"}
    assert rest["test"]["mean"] == rest["strict"]["test"]["mean"] == pytest.approx(ours[-1] - simple[-1])
    assert set(map(tuple, (each.items() for each in rest["read"]["test"].values()))) == {(("end", 2), ("start", 0))}
    assert set(map(tuple, (each.items() for each in grounds["read"]["test"].values()))) == {(("end", 0), ("start", 0))}
    assert "IP-Adapter is read at its largest lambda in 2 of 2 readings, and the simple adapter in 2;" in " ".join(told(results, summary))
    assert other["smallest"] == pytest.approx({"share": 0.9, "information": simple[1]})
    assert other["extremes"] == pytest.approx([simple.max(), ours[2:].min()])
    finest, mean = (summary["secondary"][name] for name in ("finest layers", "mean over levels"))
    assert finest["read"] == {form: {"end": 0, "start": 0} for form in (IP_ADAPTER, SIMPLE)}
    assert mean["read"][SIMPLE] == {"end": 0, "start": 2} and mean["difference"] and finest["difference"]


def test_no_difference_is_given_where_nothing_was_drawn() -> None:
    """If following falls below the level before the smallest lambda for all seeds of a form, its reading is not a measurement."""
    results = made_up()
    for seed in range(2):
        unit = results.units[Draw(SIMPLE, seed, 16, TASKS[0], layers="finest").name]
        unit.arrays["background"][:N] = 99
    row = summarise(results)["secondary"]["finest layers"]
    assert row["read"][SIMPLE]["start"] == 2 and row["difference"] is None and len(row["forms"][SIMPLE]) == 2


def test_shares_of_the_lead() -> None:
    """`shared` draws as IP-Adapter does, and `concatenated` as the simple adapter does, so they have all and nothing of the lead."""
    results = made_up()
    for form, like in (("shared", IP_ADAPTER), ("concatenated", SIMPLE)):
        results.units.update({name.replace(like, form): unit for name, unit in list(results.units.items()) if like in name})
    results.data["study"]["forms"] = list(TIER_A)
    shares = shares_of_the_lead({form: results.curve(form) for form in TIER_A}, 0.8)
    assert shares == pytest.approx({"shared": 1, "concatenated": 0})


def test_what_each_change_gives_alone_is_said() -> None:
    results, four = made_up(), dict.fromkeys(TIER_A, 0.0)
    d = {"mean": 1.0, "low": -1.0, "high": 3.0, "p": 0.5}
    shares = {"60%": {"shared": 0.7, "concatenated": 0.9}, "80%": {"shared": 0.8, "concatenated": 0.6}}
    differences = {SIMPLE: d | {"mean": 40.0, "low": 30.0}, "shared": d | {"low": 0.1}, "concatenated": d}
    rest = {"test": d, "read": {"test": {IP_ADAPTER: {"end": 2, "start": 0}}}}
    robustness = {"only": {"right size and place": rest}, "shares": shares}
    results.data["summary"] = {"endpoint": four, "difference": differences, "robustness": robustness}
    said = "Either change alone recovers most of the lead: a separate softmax 70% to 80%, own projections 60% to 90%, depending on the "
    said += "level. These overlap, so they do not add up. "
    said += "Much of the lead is about the background: if only size and place count as following, it is +1.0 [-1.0, +3.0]; "
    said += "IP-Adapter is then above the level at its largest lambda. "
    said += "IP-Adapter and `concatenated` (own projections, joint softmax) "
    assert each_change(results) == [f"{said}do not differ significantly: +1.0 [-1.0, +3.0]."]


def test_mixed_records_are_reported() -> None:
    results = made_up()
    units = results.units | {"train-simple-1": replace(results.units["train-simple-1"], made={"commit": "def", "processor": "a GPU"})}
    said = report.records(Results(results.data, units))
    assert "commits abc, def**" in said and "a GPU; x" in said and "The forms of seed 1 were trained on different processors" in said


@pytest.mark.parametrize(("lam", "says"), [(0.25, "0.25"), (1 / 512, "1/512"), (1 / 8, "0.125"), (64.0, "64"), (0.0, "0")])
def test_lambdas_are_formatted_as_fractions(lam: float, says: str) -> None:
    assert fraction(lam) == says


@pytest.mark.parametrize(("p", "says"), [(0.0004, "< 0.001"), (0.001, "0.001"), (float("nan"), "")])
def test_small_p_values_are_not_written_out(p: float, says: str) -> None:
    assert report.p_value(p) == says


def test_a_cell_that_differs_is_told() -> None:
    """The first drawing of lambda 1 has other colours, by 30 in each; at the other lambdas, nothing differs."""
    results, name = made_up(), Draw("simple", 1, 16, "conflict").name
    arrays = {key: array.clone() for key, array in results.units[name].arrays.items()}
    arrays["palette"][N] += 300
    table = compare(results, Results(results.data, results.units | {name: replace(results.units[name], arrays=arrays)}), name)
    off = table[table["largest difference"] > 0]
    assert set(off["lambda"]) == {1.0} and set(off["measure"]) <= {"error", "information", "auc"} and len(table) == 3 * len(TOLERANCE)
    error = off.set_index("measure").loc["error"]
    assert error["largest difference"] == pytest.approx(30 * 3**0.5, abs=5) and not error["within"]
