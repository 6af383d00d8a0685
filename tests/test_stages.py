"""Every stage of the mini world at a small size: it trains, and its step could be recorded as a CUDA graph."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoints.cards import read_card
from checkpoints.stable_diffusion import load_unet
from model.features import FINE
from train import adapter, clip, control, judge, plus, preview, probe, scorer, setting, step, structure, t2i, unet, vae
from train.__main__ import main
from train.data import tensors
from train.setting import TrainingSource

HOST = ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select", "is_pinned")  # they wait for a GPU, or copy to it


class Watch(TorchDispatchMode):
    """Lists the operations of HOST, and where they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = list[str]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(name in op.name() for name in HOST):
            frames = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if "/train/" in frame.filename]
            self.ops.append(f"{op.name()} at {frames[-1:]}")
        return op(*args, **(kwargs or {}))


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Little to validate on, and no previews."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (vae, unet, setting, judge, structure):
            patch.setattr(module, "HELD_OUT", 8)
        patch.setattr(clip, "probe", lambda _: {"concept": 0.0})
        patch.setattr(probe.probe_data.__wrapped__, "__defaults__", (16, 8))
        for name in ("draw_captions", "draw_image_prompts"):
            patch.setattr(preview, name, lambda *_: None)
        yield
    probe.probe_data.cache_clear()


def test_every_stage_trains_and_its_steps_wait_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recorded step may not read a number back, nor copy one to the GPU, and its batch may hide no tensor."""
    watch, seen, state, weights = Watch(), dict[str, int](), tmp_path / "state", tmp_path / "weights"
    gradients = step.Step.gradients

    def watched(self: Any, batches: Sequence[Any], generators: Sequence[torch.Generator]) -> Any:
        seen[stage] = len(tensors(batches[0]))
        with watch:
            return gradients(self, batches, generators)

    def tiny(phases: Sequence[Any]) -> Any:
        return tuple(replace(plan, steps=2, batch=8, warmup=1, validate_every=2) for plan in phases)

    monkeypatch.setattr(step.Step, "gradients", watched)
    stage, source = "vae", TrainingSource(base=weights, pictures=16)
    vae.train(state, weights, tiny(vae.PHASES), pictures=16)
    stage = "clip"
    clip.train(state, weights, tiny(clip.PHASES), pictures=24)
    stage = "unet"
    unet.train(state, weights, tiny(unet.PHASES), pictures=16)
    stage = "adapter"
    adapter.train(state, weights, tiny(adapter.PHASES), source)
    stage = "plus"
    plus.train(state, weights, tiny(plus.PHASES), replace(source, reads=FINE))
    stage = "judge"
    judge.train(state, weights, tiny(judge.PHASES), pictures=40)
    stage = "scorer"
    scorer.train(state, weights, tiny(scorer.PHASES), pictures=24)
    stage = "control"
    control.train(state, weights, tiny(control.PHASES), pictures=16)
    stage = "t2i"
    t2i.train(state, weights, tiny(t2i.PHASES), pictures=16)
    assert not watch.ops
    assert seen == {"vae": 1, "clip": 3, "unet": 4, "adapter": 6, "plus": 6, "judge": 6, "scorer": 3, "control": 5, "t2i": 5}
    for file in weights.glob("*.safetensors"):
        assert all(plan["steps"] == 2 and plan["batch"] == 8 for plan in read_card(file)["settings"])


def test_a_base_of_another_width(tmp_path: Path) -> None:
    """It is written with its channels, and can be loaded; widths that the UNet cannot have are refused before anything is read."""
    source = Path(__file__).parent.parent / "weights"
    for part in ("vae", "text_encoder"):
        for end in ("safetensors", "json"):
            (tmp_path / f"{part}.{end}").symlink_to(source / f"{part}.{end}")
    settings = ["--weights", str(tmp_path), "--state", str(tmp_path / "state"), "--steps", "1", "--batch", "2", "--pictures", "8"]
    main(["unet", *settings, "--channels", "8", "16", "24"])
    assert load_unet(tmp_path / "unet.safetensors").config.channels == (8, 16, 24)
    with pytest.raises(ValueError, match="--channels needs 3 multiples of 8"):
        main(["unet", "--weights", str(tmp_path / "none"), "--state", str(tmp_path / "state"), "--channels", "8", "16", "20"])
    assert not (tmp_path / "none").exists()


def test_the_watch_sees_what_would_wait() -> None:
    with Watch() as watch:
        float(torch.ones(2).sum())
        torch.tensor([1.0, 2.0])
    assert len(watch.ops) >= 2
