"""The whole pipeline against diffusers': the same files on disk, the same starting noise, the same picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_models import Ask, Model, build, theirs
from tiny import difference
from torch import Tensor

from checkpoints.adapters import load_adapter
from eval import __main__ as measures
from sampling import __main__ as cli
from sampling.images import read_settings
from sampling.loading import load
from sampling.options import parse
from sampling.request import ImagePrompt, Request
from train import __main__ as train


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = build(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def ours(model: Model, ask: Ask, pictures: list[Path], folder: Path) -> np.ndarray:
    """What the command line draws, `b h w 3`."""
    options: list[Any] = ["--checkpoint", model.base, "--image-encoder", model.encoder, "--out", folder / "out.png"]
    named = {"prompt": ask.prompt, "negative-prompt": ask.negative, "steps": ask.steps, "guidance": ask.guidance}
    named |= {"eta": ask.eta, "num": ask.num, "seed": ask.seed, "height": ask.size[0], "width": ask.size[1]}
    options += [part for name, value in named.items() if value is not None for part in (f"--{name}", value)]
    for file, numbers, scale in zip(model.adapters, ask.images, ask.scales, strict=False):
        options += ["--ip-adapter", file, "--scale", scale]
        options += [option for i in numbers for option in ("--image", pictures[i])]
    cli.run([str(option) for option in options])
    names = ["out.png"] if ask.num == 1 else [f"out-{i}.png" for i in range(ask.num)]
    return np.stack([np.asarray(Image.open(folder / name)).astype(int) for name in names])


FOX, OWL, LONG = "A photo of a fox, 4k", "blurry; an owl", "a very long story of foxes and owls " * 12
LEVEL = 1  # of 255
NATIVE = {"wide": 32, "sdxl": 16}
ONE, THREE = [[0]], [[0, 1, 2]]
ASKS = {
    "text, 5 steps": ("sd15", Ask(FOX, OWL)),
    "native size": ("wide", Ask(FOX, OWL, ONE, [1.0], size=(None, None))),
    "text, 50 steps": ("wide", Ask(FOX, OWL, steps=50)),
    "text, guidance 1": ("sd21", Ask(FOX, "", steps=30, guidance=1, eta=1)),
    "long text": ("sd15", Ask(LONG, guidance=3)),
    "image alone": ("sd15", Ask("", "", ONE, [1.0], steps=30)),
    "image, eta 1, three pictures": ("sd21", Ask("", "", ONE, [1.0], steps=5, eta=1, num=3)),
    "image and text": ("sd15", Ask(FOX, OWL, ONE, [0.5], steps=50, size=(40, 24))),
    "image and text, guidance 1": ("wide", Ask(FOX, "", ONE, [0.5], guidance=1, num=2)),
    "image and text, eta 1": ("wide", Ask(FOX, OWL, ONE, [0.5], steps=30, eta=1, size=(24, 32))),
    "scale 0": ("sd15", Ask(FOX, "", ONE, [0.0])),
    "three images": ("sd15", Ask(FOX, "", THREE, [0.7], steps=30, eta=1)),
    "v-prediction": ("sd21", Ask(FOX, OWL, [[1]], [1.0], steps=50, guidance=3)),
    "two adapters": ("sd15", Ask(FOX, OWL, [[0], [1]], [0.5, 0.8], steps=30)),
    "two adapters, images alone": ("wide", Ask("", "", [[0, 2], [1]], [0.5, 1.0], steps=5, eta=1, num=2)),
    "SDXL, text": ("sdxl", Ask(FOX, OWL, num=2)),
    "SDXL, long text, 30 steps": ("sdxl", Ask(LONG, "", steps=30, guidance=3)),
    "SDXL, native size": ("sdxl", Ask("", "", ONE, [1.0], steps=30, size=(None, None))),
    "SDXL, image and text": ("sdxl", Ask(FOX, OWL, ONE, [0.5], steps=50, size=(40, 24))),
    "SDXL, guidance 1": ("sdxl", Ask(FOX, "", ONE, [0.5], guidance=1)),
    "SDXL, two adapters": ("sdxl", Ask(FOX, OWL, [[0, 2], [1]], [0.5, 0.8], num=2)),
    "two adapters, one off": ("sd21", Ask(FOX, "", [[2], [1, 0]], [0.0, 0.6], steps=5)),
}


Get = Callable[[str], Model]


@pytest.mark.parity("diffusers StableDiffusionPipeline, StableDiffusionXLPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("name", ASKS)
def test_the_picture_is_diffusers(model: Get, pictures: list[Path], tmp_path: Path, name: str) -> None:
    base, ask = ASKS[name]
    want, got = theirs(model(base), ask, pictures), ours(model(base), ask, pictures, tmp_path)
    assert want.shape == (ask.num, *(side or NATIVE[base] for side in ask.size), 3)
    assert difference(got, want) <= LEVEL
    assert want.std() > 20 and ((want == 0) | (want == 255)).mean() < 0.5  # neither grey nor cut off


CHANGES = {
    "prompt": {"prompt": FOX + "!"},
    "one word less": {"prompt": "A photo of a fox,"},
    "negative": {"negative": "blurry; an"},
    "lambda": {"scales": [0.5, 0.75]},
    "order": {"images": [[1], [0]]},
    "picture": {"images": [[0], [2]]},
    "one more": {"images": [[0], [1, 2]]},
    "steps": {"steps": 6},
    "guidance": {"guidance": 7.0},
    "eta": {"eta": 0.1},
    "seed": {"seed": 12},
}


def test_every_setting_shows(model: Get, pictures: list[Path], tmp_path: Path) -> None:
    """So that equal pictures mean equal settings: each small change is many grey levels."""
    ask = Ask(FOX, OWL, [[0], [1]], [0.5, 0.8])
    first = ours(model("sd15"), ask, pictures, tmp_path)
    for name, change in CHANGES.items():
        assert difference(first, ours(model("sd15"), replace(ask, **change), pictures, tmp_path)) > 10, name


@pytest.mark.parity("diffusers StableDiffusionPipeline, in levels of 255", LEVEL)
def test_guidance_below_one_is_equation_7_here(model: Get, pictures: list[Path], tmp_path: Path) -> None:
    """At w = 0 the unconditional pass alone decides; diffusers leaves guidance out below 1."""
    none = Ask(FOX, OWL, guidance=0)
    assert difference(ours(model("sd15"), none, [], tmp_path), theirs(model("sd15"), Ask(OWL, guidance=1), [])) <= LEVEL
    assert difference(theirs(model("sd15"), none, []), theirs(model("sd15"), Ask(FOX, guidance=1), [])) == 0


# Two adapters on the command line.


def two(model: Model, pictures: list[Path]) -> list[str]:
    first, second = map(str, model.adapters)
    a, b, c = map(str, pictures)
    return ["--ip-adapter", first, "--image", a, "--image", b, "--scale", "0.5", "--ip-adapter", second, "--image", c]


def test_again_with_two_adapters(model: Get, pictures: list[Path], tmp_path: Path) -> None:
    """lambda is 1 where it is not named."""
    base, out = model("sd15"), tmp_path / "a.png"
    common = ["--checkpoint", str(base.base), "--image-encoder", str(base.encoder), "--steps", "3", "--height", "16"]
    cli.run([*two(base, pictures), *common, "--out", str(out)])
    settings = read_settings(out)
    names = [str(path) for path in pictures]
    assert settings["model"]["adapters"] == [str(path) for path in base.adapters]
    first, second = settings["request"]["image_prompts"]
    assert (first["images"], second["images"]) == (names[:2], names[2:])
    assert (first["scale"], second["scale"]) == (0.5, 1.0)
    assert {*names, *map(str, base.adapters)} < set(settings["sha256"])
    cli.run(["--again", str(out), "--out", str(tmp_path / "b.png")])
    assert (tmp_path / "b.png").read_bytes() == out.read_bytes()


def test_one_adapter_takes_everything_wherever_it_stands() -> None:
    parts = ["--image", "x.png"], ["--scale", "0.5"], ["--ip-adapter", "a.bin"], ["--image", "y.png"]
    orders = [
        parse([option for i in order for option in parts[i]]) for order in ((0, 1, 2, 3), (2, 1, 0, 3), (0, 3, 2, 1))
    ]
    assert orders[0] == orders[1] == orders[2]
    (prompt,) = orders[0].request.image_prompts
    assert prompt == ImagePrompt((Path("x.png"), Path("y.png")), scale=0.5)
    assert orders[0].model.adapters == (Path("a.bin"),)
    assert parse([]).request == Request() and parse([]).model.adapters == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--image x --ip-adapter a --image y --ip-adapter b", "none before the first"),
        ("--scale 0.5 --ip-adapter a --image x --ip-adapter b --image y", "none before the first"),
        ("--ip-adapter a --ip-adapter b --image x --image y", "its own --image; a has none"),
        ("--ip-adapter a --image x --ip-adapter b --scale 0.5", "its own --image; b has none"),
        ("--ip-adapter a --image x --ip-adapter b --image y --scale 1 --scale 0.5", "twice for one adapter"),
        ("--image x --scale 1 --scale 0.5", "twice for one adapter"),
    ],
)
def test_what_could_be_misread_is_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cli.run(options.split())


def test_a_pipeline_wants_an_embedding_for_each_adapter(model: Get) -> None:
    base = model("sd15")
    pipeline, e = load(base.base, base.adapters, base.encoder), torch.zeros(1, 1, 1, 20)
    assert len(pipeline.contexts([""], [""], [e, e])[1].image) == 2
    for embedding, scale in ((e, 1.0), ([e], [1.0]), ([e, e], [1.0]), ([e, e, e], 1.0)):
        with pytest.raises(ValueError, match="has 2 adapters, but"):
            pipeline.contexts([""], [""], embedding, scale)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("form", ["base", "plus"])
def test_an_adapter_is_trained_on_the_files_of_a_base_model(
    form: str, model: Callable[[str], Model], pictures: list[Path], tmp_path: Path
) -> None:
    """As with official weights: one's own pictures, bfloat16 base, recomputed stages; what comes out, diffusers loads."""
    files = model("sd15")
    data = [{"image_file": str(path), "text": f"picture {i}"} for i, path in enumerate(pictures)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    named = {"base": files.base, "image-encoder": files.encoder, "data": tmp_path / "data.json"}
    named |= {"weights": tmp_path / "out", "state": tmp_path / "state", "steps": 3, "batch": 2, "accumulate": 2}
    options = [str(part) for name, value in named.items() for part in (f"--{name}", value)]
    stage, name, tokens = ("plus", "ip_adapter_plus", 16) if form == "plus" else ("adapter", "ip_adapter", 4)
    train.main([stage, *options, "--bf16", "--checkpointing"])
    trained, base = tmp_path / "out" / f"{name}.safetensors", load(files.base, ()).unet
    assert load_adapter(trained, base).image_projection.tokens == tokens
    files.peers[0].unet._load_ip_adapter_weights([nested(load_file(trained))])
    files.peers[0].unload_ip_adapter()
    with pytest.raises(ValueError, match="give one with --image-encoder"):
        train.main([stage, *[o for o in options if o not in ("--image-encoder", str(files.encoder))]])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_ablation_runs_on_the_files_of_a_base_model(model: Callable[[str], Model], tmp_path: Path) -> None:
    """As with official weights and one's own pictures: no truth, so CLIP alone reads; every form is trained and drawn with."""
    files = model("sd15")
    pictures = [tmp_path / f"{i}.png" for i in range(20)]
    for i, path in enumerate(pictures):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (12, 14, 3), np.uint8)).save(path)
    data = [{"image_file": str(path), "text": f"picture {i}"} for i, path in enumerate(pictures)]
    (tmp_path / "data.json").write_text(json.dumps(data))
    named = {"base": files.base, "image-encoder": files.encoder, "data": tmp_path / "data.json", "scorer": "weights"}
    named |= {"state": tmp_path / "state", "out": tmp_path, "seeds": 1, "steps": 16, "batch": 2, "rates": 1e-3, "jobs": 1}
    options = [str(part) for name, value in named.items() for part in (f"--{name}", value)]
    measures.run(measures.parser().parse_args(["ablation", "--smoke", *options]))
    results = json.loads((tmp_path / "results" / "ablation.json").read_text())
    hashes = [int.from_bytes(hashlib.sha256(path.read_bytes()).digest()[:8], "little", signed=True) for path in pictures]
    own = [f"picture {i}" for i in sorted(range(20), key=hashes.__getitem__)[:4]]
    assert results["tasks"] == ["conflict", "picture"] and results["prompts"] == {"test": {"texts": {"conflict": [*own[1:], own[0]]}}}
    assert set(results["summary"]["endpoint"]) == set(results["study"]["forms"]) and "confirmed" not in results["summary"]
    assert set(load_file(tmp_path / "results" / "ablation.safetensors")) == {"clip_i", "clip_t"}
    text = (tmp_path / "RESULTS.md").read_text()
    assert "have no ground truth" in text and "another picture's caption" in text and "palette information" not in text
    trained = load_file(tmp_path / "results" / "ablation" / "ip_adapter-0.safetensors")
    files.peers[0].unet._load_ip_adapter_weights([nested(trained)])
    files.peers[0].unload_ip_adapter()


def nested(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {
        part: {
            name.partition(".")[2]: tensor.float() for name, tensor in tensors.items() if name.startswith(f"{part}.")
        }
        for part in ("image_proj", "ip_adapter")
    }
