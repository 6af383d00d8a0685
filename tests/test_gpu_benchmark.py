"""The benchmark for a GPU, at a tiny size on the CPU: it runs, saves every line at once, and needs no diffusers."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from checkpoints.files import read_json, write_json
from eval.device import processor
from eval.peers import gpu, gpu_rows, random_networks
from model.unet import UNet


def test_it_measures_both_sides_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "gpu.json"
    gpu.evaluate(gpu.tiny("cpu"), out, ["eager bf16, batch 2", "training", "3-step"])
    saved = read_json(out)
    lines = ["eager bf16, batch 2", "training step, batch 2", "3-step picture, bf16"]
    assert [name for name in saved if isinstance(saved[name], dict)] == lines
    assert all(saved[name][side]["seconds"] > 0 for name in lines for side in ("ours", "theirs"))
    assert [line.partition(" {")[0] for line in capsys.readouterr().out.splitlines() if " {" in line] == lines
    rows = gpu.table(saved).splitlines()
    assert rows[0] == f"Measured on one {processor('cpu')} with torch {saved['torch']}."
    assert [row.split(" | ")[0] for row in rows[4:]] == [f"| {line}" for line in lines]
    monkeypatch.setattr(random_networks, "find_spec", lambda _: None)
    assert "theirs" not in gpu.evaluate(gpu.tiny("cpu"), out, ["eager bf16, batch 2"])[lines[0]]


def test_what_is_measured_first() -> None:
    names = list(gpu.rows(gpu.Setting("cuda")))
    assert names[:5] == [
        "eager bf16, batch 2",
        "eager fp16, batch 2",
        "training step, batch 8",
        "50-step picture, bf16",
        "compiled bf16, batch 2, reduce-overhead",
    ]
    assert names[5:7] == ["eager bf16, batch 16", "eager fp16, batch 16"] and len(names) == 14
    assert all("max-autotune" in name for name in names[-4:])


def test_a_line_that_fails_is_saved_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> dict[str, float]:
        raise RuntimeError("out of memory\nmore")

    monkeypatch.setattr(gpu, "step", fail)
    results = gpu.evaluate(gpu.tiny("cpu"), tmp_path / "a.json", ["eager"])
    assert results["eager bf16, batch 2"] == results["eager fp16, batch 3"] == {"error": "out of memory"}


def test_a_device_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda:99"):
        gpu.evaluate(gpu.tiny("cuda:99"), tmp_path / "a.json", [])


def test_other_lines_are_kept_on_the_same_device(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    gpu.evaluate(gpu.tiny("cpu"), out, ["eager bf16, batch 2"])
    assert {"eager bf16, batch 2", "eager fp16, batch 2"} <= set(gpu.evaluate(gpu.tiny("cpu"), out, ["eager fp16, batch 2"]))
    write_json(out, read_json(out) | {"device": "an abacus"})
    with pytest.raises(ValueError, match="measured on an abacus"):
        gpu.evaluate(gpu.tiny("cpu"), out, ["eager"])


def test_only_one_side_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """When diffusers is measured, our networks are gone, so their memory is not counted as diffusers'."""
    alive: list[int] = []

    def measure(*_: object) -> dict[str, float]:
        gc.collect()
        alive.append(sum(isinstance(each, UNet) for each in gc.get_objects()))
        return {"seconds": 1.0}

    monkeypatch.setattr(gpu_rows, "measure", measure)
    gc.collect()
    before = sum(isinstance(each, UNet) for each in gc.get_objects())
    for name, run in gpu.rows(gpu.tiny("cpu")).items():
        if name.startswith(("eager bf16, batch 2", "training", "3-step")):
            alive.clear()
            run()
            assert [count - before for count in alive[:2]] == [1, 0], name
