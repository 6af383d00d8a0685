"""The README shows what the result files say."""

import json
from pathlib import Path

import pytest

import weights_convert
from eval import benchmark, parity, world

ROOT = Path(__file__).parent.parent
RESULTS = json.loads((ROOT / "results" / "world.json").read_text())


def test_readme_shows_the_results():
    readme = (ROOT / "README.md").read_text()
    assert world.table(RESULTS) in readme
    assert f"{RESULTS['vae_psnr']:.1f} dB" in readme


@pytest.mark.parametrize("measure", [parity, benchmark])
def test_readme_shows_what_was_measured_beside_diffusers(measure):
    results = json.loads((ROOT / "results" / f"{measure.__name__.split('.')[-1]}.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert measure.table(results) in readme
    assert results["command"] in readme and results.get("machine", "") in readme


def test_results_are_of_the_shipped_weights():
    weights = {name: weights_convert.sha256(ROOT / "weights" / name) for name in RESULTS["sha256"]}
    assert weights == RESULTS["sha256"]


def test_weights_are_small_and_licensed():
    files = list((ROOT / "weights").glob("*.safetensors"))
    assert {"unet", "vae", "text_encoder", "image_encoder", "ip_adapter", "judge"} <= {f.stem for f in files}
    assert sum(f.stat().st_size for f in files) < 40e6
    assert all("OpenMoji" in weights_convert.read_card(f)["licence"] for f in files)
