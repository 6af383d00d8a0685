"""The paper's figures: every sheet is drawn, with untrained controls and differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints import cards
from checkpoints.stable_diffusion import load_unet
from sampling.sheets import __main__ as sheets
from sampling.sheets import figures
from train import control, style, t2i
from train.lora import LoRA

ROOT = Path(__file__).parent.parent
FILES = {"CONTROLNET": "control", "T2I": "t2i", "COMIC": "style"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> figures.Studio:
    """A studio whose ControlNet is untrained and whose T2I-Adapter and low-rank differences are random."""
    folder, unet = tmp_path_factory.mktemp("figures"), load_unet(ROOT / "weights" / "unet.safetensors")
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        for name, stage in (("CONTROLNET", control), ("T2I", t2i)):
            file = folder / stage.KIND.file
            cards.save(stage.KIND.build(unet, 4), file, {})
            patch.setattr(figures, name, file)
        lora = LoRA(unet, 2)
        with torch.no_grad():
            for b in lora.up:
                b.normal_(std=0.1)
        cards.save_tensors(style.peft_layout(lora, unet), folder / "comic.safetensors", {})
        patch.setattr(figures, "COMIC", folder / "comic.safetensors")
        made = figures.Studio.of(folder, 3)
    few = {name: replace(getattr(made, name), steps=4) for name in ("base", "controlnet", "t2i", "comic")}
    return figures.Studio(**few)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_figure_is_drawn(studio: figures.Studio, name: str) -> None:
    """All columns have titles, all rows have notes, and the rows differ."""
    title, draw = figures.FIGURES[name]
    columns, rows, notes = draw(studio)
    assert title.startswith(f"Figure {name.split('_')[1]}:") and len(notes) == len(rows) > 1
    assert {len(row) for row in rows} == {sum(map(len, columns))}
    assert len({tuple(picture.tobytes() for picture in row) for row in rows}) == len(rows)


def test_another_base_draws_something_else(studio: figures.Studio) -> None:
    """The same adapter, image prompt and noise on two bases."""
    columns, rows, _ = figures.figure_4(studio)
    original, comic = (slice(1, 4), slice(4, 7))
    assert len(columns[1]) == len(columns[2]) == 3
    assert all(a.tobytes() != b.tobytes() for row in rows for a, b in zip(row[original], row[comic], strict=True))


@pytest.mark.parametrize(("constant", "stage"), FILES.items())
def test_a_missing_network_is_named(
    constant: str, stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in FILES:
        monkeypatch.setattr(figures, name, tmp_path / "missing" if name == constant else ROOT / "weights" / "unet.safetensors")
    with pytest.raises(SystemExit, match=f"run `python -m train {stage}` first"):
        sheets.main(["figures", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
