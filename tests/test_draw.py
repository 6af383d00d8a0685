"""Drawing in Python: a request gives the same picture as the command line, and single values are accepted as lists of one."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import max_error
from PIL import Image
from tiny import difference, draw

from model.context import Context
from sampling.dpm import dpm
from sampling.embeddings import PictureWeights, load_embedding, save_embedding
from sampling.euler import euler
from sampling.fields import paths
from sampling.inputs import read_inputs
from sampling.lcm import lcm
from sampling.loading import load
from sampling.options import parse
from sampling.pipeline import SAMPLERS, Pipeline
from sampling.record import ROOT
from sampling.request import ImagePrompt, Request
from sampling.sampler import State, randn


@pytest.fixture(scope="module")
def pipeline(weights: Path) -> Pipeline:
    return load(str(weights))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def test_a_request_is_the_command_lines_picture(weights: Path, pipeline: Pipeline, tmp_path: Path, image: Path) -> None:
    request = Request("a fox", ImagePrompt(image, 0.5, end=0.7), steps=3, seed=4, sampler="dpm++")  # type: ignore[arg-type]
    options = "--prompt fox --scale 0.5 --image-end 0.7 --seed 4 --sampler dpm++".replace("fox", "a_fox").split()
    options = [option.replace("_", " ") for option in options]
    drawn = draw(weights, tmp_path / "a.png", "--image", image, *options)
    assert difference(pixels(pipeline.draw(request)), drawn) == 0


KARRAS = {"schedule": "karras"}
SAMPLED = {"sampler": "euler"}, {"sampler": "lcm"}, {"sampler": "dpm++", **KARRAS}, {"sampler": "euler", **KARRAS}


@pytest.mark.parametrize("options", SAMPLED)
def test_a_request_runs_the_sampler_that_it_names(pipeline: Pipeline, options: dict[str, Any]) -> None:
    """On the schedule that it names, and at the same timesteps, which are fractions for Euler's method."""
    request = Request("a fox", guidance=1, steps=4, seed=3, **options)
    schedule, sampler = replace(pipeline.schedule, karras="schedule" in options), SAMPLERS[request.sampler]
    context, own = Context(pipeline.text(pipeline.text.tokenize("a fox"))), [torch.Generator().manual_seed(3)]
    draws: dict[str, Callable[..., Any]] = {"dpm++": dpm, "euler": euler, "lcm": partial(lcm, generators=own)}
    noise = randn((4, 4, 4), own)
    with torch.no_grad():
        states = draws[request.sampler](
            lambda x, t: pipeline.unet(x, torch.tensor([t]), context), noise, schedule, sampler.times(schedule, request.steps)
        )
        want = list(states)[-1].x
    seen: list[State] = []
    next(pipeline.series(read_inputs(request), watch=seen.append))
    assert max_error(seen[-1].x, want) < 1e-3  # of about 30; measured: 2e-5


def test_single_values_are_accepted_as_lists_of_one(pipeline: Pipeline, image: Path) -> None:
    """A string is one prompt, not a list of characters."""
    several = pipeline.sample(["a fox"], [3], pipeline.embed([Image.open(image)]), ["an owl"], steps=2)
    assert torch.equal(pipeline.sample("a fox", 3, pipeline.embed(str(image)), "an owl", steps=2), several)
    assert torch.equal(pipeline.text.tokenize("a fox"), pipeline.text.tokenize(["a fox"]))


def test_one_embedding_takes_a_lambda_for_each_layer(pipeline: Pipeline, image: Path) -> None:
    """Also beside weights of its pictures, where each picture is an image prompt of its own."""
    embedding, layers = pipeline.embed([image, image]), [0.5] * len(pipeline.unet.cross_attentions())
    for weights in (None, [PictureWeights((0.3, 1.5))], [PictureWeights((0.3, 1.5), "tokens")]):
        drawn = [pipeline.sample("a fox", 3, embedding, scale=scale, weights=weights, steps=1) for scale in (0.5, layers)]
        assert torch.equal(*drawn)


def test_a_string_is_a_path(weights: Path, pipeline: Pipeline, tmp_path: Path, image: Path) -> None:
    embedding, path = pipeline.embed(image), str(tmp_path / "kept.safetensors")
    save_embedding(embedding, path)
    assert torch.equal(load_embedding(path, pipeline.adapters[0].image_projection), embedding)
    assert torch.equal(pipeline.embed([path, str(image)]), torch.cat([embedding, embedding], dim=1))
    adapter, encoder = (str(weights / f"{name}.safetensors") for name in ("ip_adapter", "image_encoder"))
    for named in (adapter, [adapter]):
        other = load(str(weights), named, encoder, vae=str(weights / "vae.safetensors"))
        assert torch.equal(other.embed(image), embedding)


@pytest.mark.parametrize(
    ("prompts", "seeds", "negatives", "said"),
    [
        (["a fox", "an owl"], [0], "", "2 prompts, 1 seeds and 2 negative prompts"),
        ("a fox", [0, 1, 2], "", "1 prompts, 3 seeds and 1 negative prompts"),
        (["a fox", "an owl"], 7, "", "2 prompts, 1 seeds and 2 negative prompts"),
        (["a fox"], [0], ["", ""], "1 prompts, 1 seeds and 2 negative prompts"),
        ([], [], "", "0 prompts, 0 seeds and 0 negative prompts"),
        ("a fox", 2**64, "", r"the seed must be a whole number from -2\^63 to 2\^64 - 1"),
    ],
)
def test_a_wrong_number_of_seeds_says_what_is_wanted(
    pipeline: Pipeline, prompts: Any, seeds: Any, negatives: Any, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        pipeline.sample(prompts, seeds, negatives=negatives, steps=1)


def test_a_request_for_other_adapters_is_refused(pipeline: Pipeline, image: Path) -> None:
    with pytest.raises(ValueError, match="2 image prompts for 1 adapters"):
        pipeline.draw(Request(image_prompts=(ImagePrompt((image,)),) * 2, steps=1))
    with pytest.raises(FileNotFoundError, match="an image prompt needs an image encoder and an adapter"):
        Pipeline(pipeline.unet, pipeline.vae, pipeline.text, pipeline.schedule).draw(
            Request(image_prompts=(ImagePrompt((image,)),), steps=1)
        )


HEAVY = ("torch", "open_clip", "numpy", "PIL")


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("sampling --help", HEAVY),
        ("sampling --image-layers", HEAVY),  # a mistake is told as soon
        ("sampling.sheets --help", HEAVY),
        ("sampling.sheets gallery --help", HEAVY),
        ("weights_convert --help", HEAVY),
        ("weights_convert convert --help", HEAVY),
        ("sampling.pipeline", ("open_clip",)),
        ("weights_convert inspect weights/ip_adapter.safetensors weights/unet.safetensors", ("open_clip",)),
    ],
)
def test_arguments_are_read_before_anything_heavy_is_imported(module: str, heavy: tuple[str, ...]) -> None:
    code = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print(",".join(sys.modules), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, *module.split()], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not {*heavy} & {*done.stderr.splitlines()[-1].split(",")}


PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "docs/drawing.md", "docs/checkpoints.md")}


@pytest.mark.parametrize("name", PAGES)
def test_the_commands_on_a_page_are_read(name: str) -> None:
    """The commands can be parsed, and the pictures of the first one are shipped."""
    text = PAGES[name].replace("\\\n", " ")
    commands = [
        parse(shlex.split(line)[3:])
        for line in re.findall(r"^(?:\.venv/bin/)?python -m sampling .*", text, re.MULTILINE)
    ]
    assert commands
    if name != "docs/checkpoints.md":
        assert all((ROOT / path).is_file() for path in paths(commands[0].request)) and paths(commands[0].request)


@pytest.mark.parametrize("name", ["README.md", "docs/drawing.md"])
def test_the_python_on_a_page_draws(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", PAGES[name], re.DOTALL) if "Request(" in block]
    assert len([line for line in code.splitlines() if line]) <= 6
    monkeypatch.chdir(ROOT)
    path = str(tmp_path / "drawn.png")
    exec(re.sub(r'save\(".*?"\)', f"save({path!r})", code).replace("steps=20", "steps=1"), {})
    assert Image.open(path).size == (64, 64)
