"""The pages show the numbers of the result files, and these files belong to the shipped weights."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from checkpoints.cards import read_card
from checkpoints.clip import load_image_encoder
from checkpoints.files import sha256
from eval import docs

ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "results" / "world.json").read_text())
PAGE = (ROOT / "RESULTS.md").read_text()


def test_make_docs_changes_nothing() -> None:
    """README.md and docs/ show the numbers of the result files."""
    values = docs.inserts(ROOT)
    assert not [path.name for path in docs.pages(ROOT) if docs.filled(path.read_text(), values) != path.read_text()]


def test_every_insert_is_shown_somewhere() -> None:
    shown = {name for path in docs.pages(ROOT) for _, name, _ in docs.PLACE.findall(path.read_text())}
    assert shown == set(docs.inserts(ROOT))


def test_pages_are_filled_where_they_are_marked() -> None:
    page = "a\n<!-- insert: one -->\nold\n<!-- end -->\nb\n<!-- insert: two -->\n<!-- end -->\n"
    new = docs.filled(page, {"one": "1\n1", "two": "2"})
    assert new == "a\n<!-- insert: one -->\n1\n1\n<!-- end -->\nb\n<!-- insert: two -->\n2\n<!-- end -->\n"
    assert docs.filled(new, {"one": "1\n1", "two": "2"}) == new
    with pytest.raises(ValueError, match="unknown insert 'two'"):
        docs.filled(page, {"one": "1"})


def test_fine_results_are_of_the_shipped_adapters() -> None:
    results = json.loads((ROOT / "results" / "fine.json").read_text())
    assert results["sha256"] == {n: sha256(ROOT / "weights" / n) for n in results["sha256"]}


def test_results_are_of_the_shipped_weights():
    weights = {name: sha256(ROOT / "weights" / name) for name in RESULTS["sha256"]}
    assert weights == RESULTS["sha256"]


def test_weights_are_small_and_licensed():
    files = list((ROOT / "weights").glob("*.safetensors"))
    assert {"unet", "vae", "text_encoder", "image_encoder", "ip_adapter", "ip_adapter_plus", "judge"} <= {
        f.stem for f in files
    }
    assert sum(f.stat().st_size for f in files) < 48e6
    assert all("OpenMoji" in read_card(f)["licence"] for f in files)


def first_study() -> dict[str, Any]:
    """The results of the first ablation, from the commit that RESULTS.md names."""
    commit = re.findall(r"Commit ([0-9a-f]{7})", PAGE)
    assert len(commit) == 1, "RESULTS.md does not name one commit"
    command = ["git", "show", f"{commit[0]}:results/ablation.json"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if shown.returncode and subprocess.run(["git", "log", "-1", commit[0]], cwd=ROOT, capture_output=True).returncode:
        pytest.skip("this copy of the project does not hold the history")
    assert not shown.returncode, shown.stderr
    return dict(json.loads(shown.stdout))


def drawings(study: dict[str, Any]) -> pd.DataFrame:
    """One line per drawing of the finished adapters; `follows`: it has the concept of the conflicting text."""
    rows = [row for name, unit in study["units"].items() if name.startswith("rows-") for row in unit["value"]]
    whole = [pd.DataFrame(row) for row in rows if "lambda" in row and row["share"] == 1]
    wanted = study["truth"]["wanted"]["concept"]
    return pd.concat(whole).assign(follows=lambda all_rows: all_rows["concept"] == np.tile(wanted, len(whole)))


def test_the_page_of_the_first_ablation_says_what_its_results_say() -> None:
    """The numbers are recomputed from the rows in the commit that the page names, with pandas' rank correlations."""
    found, said = first_study(), " ".join(PAGE.split())
    pictures, study = drawings(found), found["study"]
    d, ends = found["summary"]["difference"]["simple"], found["summary"]["endpoint"]
    assert f"worse than IP-Adapter by {d['mean']:.1f} [{d['low']:.1f}, {d['high']:.1f}]" in said
    palettes = np.reshape(found["truth"]["palette"], (-1, 3))
    grey, best = np.linalg.norm(palettes - [65, 0, 0], axis=-1).mean(), np.mean(ends["ip_adapter"])
    assert f"scores {grey:.2f}. IP-Adapter, the best form, scores {best:.1f}" in said
    assert best == min(np.mean(values) for values in ends.values())
    share = 100 * study["steps"] * study["batch"] / found["shipped_pictures"]
    assert f"{study['steps']} training steps are {share:.1f} %" in said
    alone = pictures[pictures["task"] == "picture"].groupby("form")[["palette_error", "clip_i"]].mean()
    worse = (alone.loc["simple"] - alone.loc["ip_adapter"]).abs()
    assert f"was worse by {worse['palette_error']:.1f} [" in said and f"by {worse['clip_i']:.3f} [" in said
    at_one = pictures[(pictures["task"] == "conflict") & (pictures["lambda"] == 1)].groupby(["form", "seed"])["follows"].mean()
    assert (at_one["simple_wide"].sort_values() * 100).round().tolist() == [1, 2, 2, 50, 73]
    each = [(form, seed) for form in study["forms"] for seed in range(study["seeds"])]
    lines = [(found["gains"][form][seed][-1]["gain_shuffled"], ends[form][seed], at_one[form, seed]) for form, seed in each]
    _, end, follows = pd.DataFrame(lines).corr("spearman")[0]
    assert f"{len(each)} adapters, its Spearman correlation is {end:+.2f} with the endpoint and {follows:+.2f} with" in said


def test_the_readme_does_not_claim_what_the_first_ablation_did_not_show() -> None:
    readme = " ".join((ROOT / "README.md").read_text().split())
    claim = readme[readme.index("## The claim") : readme.index("## Official weights")]
    assert "does not support the claim" in claim and "(RESULTS.md)" in claim and "new study is under way" in claim
    assert "does not support the claim" in PAGE and len(PAGE.splitlines()) <= 40


def test_the_second_clip_is_another_than_the_adapters() -> None:
    """It has another width and patch size than the CLIP of the adapters, and it recognises concepts (probe in its card)."""
    found = json.loads((ROOT / "weights" / "score_image.json").read_text())["results"]
    assert found["concept"] > 0.95 and found["background"] > 0.95
    score, own = (
        load_image_encoder(ROOT / "weights" / f"{n}.safetensors").config for n in ("score_image", "image_encoder")
    )
    assert score.width != own.width and score.stem_pool != own.stem_pool and score.output_dim != own.output_dim
