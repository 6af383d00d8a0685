"""`python -m eval parity --checkpoint`: the same picture from the same files, here and in diffusers, for small models."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peers import vision_pair
from small_models import build
from test_face import SMALL
from test_face import files as faces

from eval.__main__ import main
from eval.peers.own_files import Files, compare

__all__ = ["faces"]  # a fixture
SIZE, STEPS = (24, 40), 3


def level(said: str) -> int:
    match = re.match(r"largest difference (\d+) of 255 grey levels, at x = \d+, y = \d+; [\d.]+ % of the pixels differ by more", said)
    assert match, said
    return int(match[1])


@pytest.mark.parity("diffusers StableDiffusionPipeline with IP-Adapter and FaceID, in levels of 255", 1)
def test_a_small_sd15(faces: Any, pictures: list[Path]) -> None:
    model, many = faces.model, faces.face.with_name("faces.safetensors")
    wide = faces.face.with_name("wide")
    vision_pair(replace(SMALL.image, width=512, heads=4, layers=(2,)))[0].float().save_pretrained(wide)
    cases = [
        Files(model.base),
        Files(model.base, model.adapters[0], model.encoder, pictures[0]),
        Files(model.base, faces.paths["faceid"], None, faces.face),
        Files(model.base, faces.paths["portrait"], None, many),
        Files(model.base, faces.paths["plus"], wide, faces.face),
        Files(model.base, faces.paths["plusv2"], wide, faces.face),
    ]
    for case in cases:
        assert level(compare(case, "A photo of a fox", SIZE, STEPS)) <= 1, case


@pytest.mark.parity("diffusers StableDiffusionPipeline and StableDiffusionXLPipeline, in levels of 255", 1)
@pytest.mark.parametrize("name", ["sd21", "sdxl"])
def test_sd2_and_sdxl(tmp_path: Path, pictures: list[Path], name: str) -> None:
    model = build(tmp_path, name)
    assert level(compare(Files(model.base, model.adapters[1], model.encoder, pictures[1]), "A fox, 4k", SIZE, STEPS)) <= 1


def told(monkeypatch: pytest.MonkeyPatch, *options: object) -> str:
    monkeypatch.setattr("sys.argv", ["eval", "parity", *map(str, options)])
    with pytest.raises(SystemExit) as error:
        main()
    return str(error.value)


def test_what_cannot_be_compared(faces: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pictures: list[Path]) -> None:
    base, plain, face = faces.model.base, faces.model.adapters[0], faces.paths["faceid"]
    assert "is for your own base model: name its file with --checkpoint" in told(monkeypatch, "--image", pictures[0])
    assert "needs an image prompt" in told(monkeypatch, "--checkpoint", base, "--ip-adapter", plain)
    assert "name it with --image-encoder" in told(monkeypatch, "--checkpoint", base, "--ip-adapter", plain, "--image", pictures[0])
    assert "reads face embeddings" in told(monkeypatch, "--checkpoint", base, "--ip-adapter", face, "--image", pictures[0])
    assert "holds faces, but this adapter" in told(monkeypatch, "--checkpoint", base, "--ip-adapter", plain, "--image", faces.face)
    mini = told(monkeypatch, "--checkpoint", "weights", "--prompt", "a fox", "--steps", 1, "--side", 8)
    assert "transformers has no text encoder with a reduced vocabulary" in mini
    monkeypatch.setattr("eval.peers.own_files.find_spec", lambda _: None)
    assert told(monkeypatch, "--checkpoint", base) == "error: diffusers is not installed: pip install -e '.[world,eval,test]'"

