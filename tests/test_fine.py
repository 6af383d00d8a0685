"""Global compared with fine-grained features: the measurement and its table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints.adapters import save_adapter
from checkpoints.files import sha256
from eval import fine
from eval.__main__ import main
from eval.bench import Bench
from model.adapter import IPAdapter
from model.image_projection import Resampler
from sampling.loading import load

ROOT = Path(__file__).parent.parent


def made_up() -> dict[str, Any]:
    """Four prompts, the second of a concept with one drawing only."""
    wanted = {"own": {"concept": [0, 1, 2, 3], "background": [0, 0, 1, 1]}, "drawing": [0, None, 1, 2]}
    rows = [
        {
            "concept": [0, 1, 0, 0],
            "background": [0, 0, 1, 0],
            "drawing": [0, 0, 0, 0],
            "palette_error": [10, 20, 30, 40],
        },
        {
            "concept": [0, 1, 2, 0],
            "background": [0, 0, 1, 1],
            "drawing": [0, 0, 1, 2],
            "palette_error": [9, 20, 28, 39],
        },
    ]
    other = {"placement_error": [1.0, 2.0, 3.0, 4.0], "clip_i": [0.5, 0.6, 0.7, 0.8], "follows": [1, 1, 0, 1]}
    named = [{"form": form, **row, **other} for form, row in zip(fine.ADAPTERS.values(), rows, strict=True)]
    return {"truth": wanted, "rows": named}


def test_the_table_has_differences_paired_by_prompt() -> None:
    _, _, own, plus, difference = fine.table(made_up()).splitlines()
    assert own.split(" | ")[1:5] == ["50%", "75%", "33%", "25.0"]
    assert plus.split(" | ")[1:5] == ["75%", "100%", "100%", "24.0"]
    half = 1.96 * np.std([-1, 0, -2, -1], ddof=1) / 2
    assert difference.split(" | ")[4] == f"-1.0 ± {half:.1f}" and "+0.000 ± 0.000" in difference
    assert difference.split(" | ")[3] == f"+66.7 ± {1.96 * np.std([0, 100, 100], ddof=1) / 3**0.5:.1f}"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The mini weights, and beside them an untrained Plus."""
    folder, pipeline = tmp_path / "weights", load()
    shutil.copytree(ROOT / "weights", folder)
    assert pipeline.image is not None
    width = pipeline.unet.config.context_dim
    projection = Resampler(pipeline.image.config.fine_dim, width, tokens=3, width=width, depth=1, heads=2)
    file = folder / "ip_adapter_plus.safetensors"
    save_adapter(IPAdapter(pipeline.unet, projection), pipeline.unet, file, {})
    return folder


def test_both_adapters_are_read(
    weights: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes one row per adapter, with the image prompt alone, and the hashes of all weights."""
    drawn: list[tuple[str, float, bool]] = []
    draw = Bench.draw

    def spy(self: Bench, task: str, adapter: Any, lam: float) -> Any:
        drawn.append((task, lam, isinstance(adapter.image_projection, Resampler)))
        return draw(self, task, adapter, lam=lam)

    monkeypatch.setattr(Bench, "draw", spy)
    out = weights.parent / "fine.json"
    command = ["eval", "--weights", str(weights), "fine", "--n", "6", "--steps", "2", "--out", str(out)]
    monkeypatch.setattr("sys.argv", command)
    main()
    results = json.loads(out.read_text())
    tasks = ("picture", "complementary")
    assert drawn == [(task, 1.0, fine) for fine in (False, True) for task in tasks]  # one embedding, and a grid of features
    assert "follows" not in results["rows"][0] and all(set(row["follows"]) <= {0, 1} for row in results["rows"][1:])
    assert [row["form"] for row in results["rows"][1:]] == list(fine.ADAPTERS.values())
    assert all(len(row["placement_error"]) == 6 and "clip_t" not in row for row in results["rows"])
    assert results["sha256"] == {path.name: sha256(path) for path in weights.glob("*.safetensors")}
    assert results["command"] == "python -m eval fine --n 6 --steps 2 --guidance 4 --device cpu"
    assert fine.table(results) in capsys.readouterr().out
    (weights / "ip_adapter_plus.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"plus\.safetensors is missing: run `python -m train plus` first"):
        main()
