"""Drawing with structure controls against diffusers' pipelines: the same files on disk, the same picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from control_peers import controlnet_pair, t2i_pair
from diffusers import (
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
)
from diffusers import T2IAdapter as PeerT2I
from input_pictures import picture, write_inputs
from PIL import Image
from small_models import BASES, Model, build
from tiny import difference

from checkpoints.controls import load_control, save_control_diffusers
from model.context import Context
from model.controlnet import ControlNet, ControlNetConfig
from model.t2i import T2IConfig
from sampling import __main__ as cli
from sampling import pipeline as pipelines
from sampling.control import bind
from sampling.images import read_settings
from sampling.loading import load
from sampling.request import HintFile, ImagePrompt, Request

FOX, OWL = "A photo of a fox, 4k", "blurry; an owl"
LEVEL = 1  # of 255
SIZE = (24, 40)
UNET = BASES["sd15"].unet
CONTROLS = {
    "edges": ControlNetConfig.of(UNET, (4, 6)),
    "depth": ControlNetConfig.of(UNET, (8, 6)),
    "shuffle": ControlNetConfig.of(UNET, (4, 6), pooled=True),
}


@dataclass(frozen=True)
class Files:
    """A base model with adapters on disk, controls beside it, hints, and a picture with its masks."""

    model: Model
    folder: Path

    def path(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("control")
    for i, (name, config) in enumerate(CONTROLS.items()):
        controlnet_pair(config, False, seed=20 + i)[0].float().save_pretrained(folder / name)
    t2i_pair(T2IConfig(UNET.channels, unshuffle=2), seed=30)[0].float().save_pretrained(folder / "t2i")
    t2i_pair(T2IConfig(UNET.channels, 1, unshuffle=2), seed=31)[0].float().save_pretrained(folder / "sketch")
    write_inputs(folder, SIZE, 64)
    picture((50, 20), 2).convert("L").save(folder / "grey.png")
    return Files(build(tmp_path_factory.mktemp("base"), "sd15"), folder)


@dataclass(frozen=True)
class Use:
    """One control: its folder, its hint, and its settings."""

    control: str = "edges"
    hint: str = "hint.png"
    scale: float = 0.8
    start: float = 0.0
    end: float = 1.0
    guess: bool = False


@dataclass(frozen=True)
class Ask:
    uses: tuple[Use, ...] = (Use(),)
    edit: Literal["", "img2img", "inpaint"] = ""
    prompted: bool = False  # by a picture too
    masked: bool = False  # the picture acts in a region
    guidance: float = 4.0
    steps: int = 4
    num: int = 1


def ours(files: Files, ask: Ask, out: Path) -> np.ndarray:
    """What the command line draws."""
    options: list[Any] = ["--checkpoint", files.model.base, "--prompt", FOX, "--seed", 11]
    options += [] if ask.guidance == 1 else ["--negative-prompt", OWL]
    options += ["--steps", ask.steps, "--guidance", ask.guidance, "--num", ask.num, "--out", out]
    options += [] if ask.edit else ["--height", SIZE[0], "--width", SIZE[1]]
    if ask.prompted:
        options += ["--ip-adapter", files.model.adapters[0], "--image-encoder", files.model.encoder]
        options += ["--image", files.path("prompt.png"), "--scale", 0.6]
        options += ["--image-mask", files.path("left.png")] if ask.masked else []
    if ask.edit:
        options += ["--init-image", files.path("init.png"), "--strength", 0.8]
        options += ["--mask", files.path("mask.png"), "--no-paste"] if ask.edit == "inpaint" else []
    for use in ask.uses:
        options += ["--control", files.path(use.control), "--hint", files.path(use.hint), "--control-scale", use.scale]
        options += ["--control-start", use.start, "--control-end", use.end, *(["--guess"] if use.guess else [])]
    cli.run([str(option) for option in options])
    names = [out] if ask.num == 1 else [out.with_stem(f"{out.stem}-{i}") for i in range(ask.num)]
    return np.stack([np.asarray(Image.open(name)).astype(int) for name in names])


PIPELINES = {
    "": StableDiffusionControlNetPipeline,
    "img2img": StableDiffusionControlNetImg2ImgPipeline,
    "inpaint": StableDiffusionControlNetInpaintPipeline,
}


def run(files: Files, ask: Ask, pipe: Any, **given: Any) -> np.ndarray:
    """What a pipeline of diffusers draws."""
    pipe.set_progress_bar_config(disable=True)
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the VAE's factor
    drawn = pipe(
        [FOX] * ask.num,
        negative_prompt=[OWL] * ask.num,
        height=SIZE[0],
        width=SIZE[1],
        num_inference_steps=ask.steps,
        guidance_scale=ask.guidance,
        generator=[torch.Generator().manual_seed(11 + i) for i in range(ask.num)],
        **given,
    ).images
    return np.stack([np.asarray(image).astype(int) for image in drawn])


def listed(values: list[Any]) -> Any:
    """One value, or a list for MultiControlNet."""
    return values if len(values) > 1 else values[0]


def theirs(files: Files, ask: Ask) -> np.ndarray:
    """What diffusers draws with ControlNets."""
    peer = files.model.peers[1 if ask.prompted else 0]
    nets = [ControlNetModel.from_pretrained(files.path(use.control)) for use in ask.uses]
    pipe = PIPELINES[ask.edit](**peer.components, controlnet=listed(nets), requires_safety_checker=False)
    hints = listed([Image.open(files.path(use.hint)).convert("RGB") for use in ask.uses])
    given: dict[str, Any] = {"control_image" if ask.edit else "image": hints}
    given |= {"controlnet_conditioning_scale": listed([use.scale for use in ask.uses])}
    given |= {"control_guidance_start": listed([use.start for use in ask.uses])}
    given |= {"control_guidance_end": listed([use.end for use in ask.uses]), "guess_mode": ask.uses[0].guess}
    if ask.prompted:
        pipe.set_ip_adapter_scale(0.6)
        given["ip_adapter_image"] = [[Image.open(files.path("prompt.png")).convert("RGB")]]
    if ask.masked:
        left = torch.from_numpy(np.array(Image.open(files.path("left.png")))).float() / 255
        given["cross_attention_kwargs"] = {"ip_adapter_masks": [left[None, None]]}
    if ask.edit:
        given |= {"image": [Image.open(files.path("init.png"))] * ask.num, "strength": 0.8}
    if ask.edit == "inpaint":
        given["mask_image"] = [Image.open(files.path("mask.png"))] * ask.num
    return run(files, ask, pipe, **given)


EDGES, DEPTH, SHUFFLE = Use(), Use("depth", "grey.png", 1.2), Use("shuffle", scale=1.0)
ASKS = {
    "one": Ask(),
    "several pictures": Ask(num=3, guidance=1.0),
    "start and end": Ask((replace(EDGES, start=0.2, end=0.7),), steps=7),
    "two, each with its range": Ask((EDGES, replace(DEPTH, start=0.4)), num=2),
    "guess mode": Ask((replace(EDGES, guess=True),)),
    "guess mode, guidance 1": Ask((replace(EDGES, guess=True),), guidance=1.0),
    "shuffle": Ask((SHUFFLE,)),
    "with an image prompt": Ask(prompted=True, num=2),
    "with an image prompt in a region": Ask(prompted=True, masked=True),
    "two, and an image prompt": Ask((EDGES, DEPTH), prompted=True),
    "image to image": Ask(edit="img2img", prompted=True),
    "image to image, a range": Ask((replace(EDGES, end=0.5),), edit="img2img", steps=10, num=2),
    "inpainting": Ask(edit="inpaint", prompted=True, masked=True),
    "inpainting, two": Ask((EDGES, DEPTH), edit="inpaint"),
}


@pytest.mark.parity("diffusers StableDiffusionControlNetPipeline, and those for editing, in levels of 255", LEVEL)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ASKS)
def test_the_picture_is_diffusers(files: Files, name: str, tmp_path: Path) -> None:
    ask = ASKS[name]
    want, got = theirs(files, ask), ours(files, ask, tmp_path / "out.png")
    assert want.shape == (ask.num, *SIZE, 3)
    assert difference(got, want) <= LEVEL
    assert want.std() > 20 and ((want == 0) | (want == 255)).mean() < 0.5  # neither grey nor cut off


@pytest.mark.parity("diffusers StableDiffusionAdapterPipeline, in levels of 255", LEVEL)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("use", [Use("t2i", scale=1.3), Use("sketch", "grey.png", 1.0)], ids=lambda use: use.control)
def test_a_t2i_adapters_picture_is_diffusers(files: Files, use: Use, tmp_path: Path) -> None:
    ask, peer = Ask((use,), num=2), files.model.peers[0]
    parts = {name: part for name, part in peer.components.items() if name != "image_encoder"}
    t2i = PeerT2I.from_pretrained(files.path(use.control))
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=t2i, requires_safety_checker=False)
    hint = Image.open(files.path(use.hint))
    want = run(files, ask, pipe, image=[hint] * 2, adapter_conditioning_scale=use.scale)
    assert difference(ours(files, ask, tmp_path / "out.png"), want) <= LEVEL
    assert want.std() > 20


CHANGES = {
    "scale": (replace(EDGES, scale=0.7),),
    "hint": (replace(EDGES, hint="prompt.png"),),
    "start": (replace(EDGES, start=0.5),),
    "end": (replace(EDGES, end=0.5),),
    "guess": (replace(EDGES, guess=True),),
    "another control": (replace(EDGES, control="depth"),),
    "two": (EDGES, replace(EDGES, control="t2i")),
    "none": (),
}


def test_every_setting_shows(files: Files, tmp_path: Path) -> None:
    """So that equal pictures mean equal settings: each change is many grey levels. At scale 0 a control does nothing."""
    first = ours(files, Ask(), tmp_path / "out.png")
    drawn = {name: ours(files, Ask(uses), tmp_path / "out.png") for name, uses in CHANGES.items()}
    assert {name: difference(first, each) > 10 for name, each in drawn.items()} == dict.fromkeys(CHANGES, True)
    off = ours(files, Ask((replace(EDGES, scale=0.0), Use("t2i", scale=0.0))), tmp_path / "out.png")
    assert difference(off, drawn["none"]) == 0


def test_controls_add_up_in_any_order(files: Files, tmp_path: Path) -> None:
    uses = EDGES, Use("sketch", "grey.png", 0.5), replace(SHUFFLE, end=0.6)
    one, other = (ours(files, Ask(each, prompted=True), tmp_path / "out.png") for each in (uses, uses[::-1]))
    assert difference(one, other) <= LEVEL


@pytest.fixture
def fresh(files: Files) -> Callable[..., Path]:
    """An untrained ControlNet of the base, which must change nothing, as a folder of diffusers."""
    from checkpoints.stable_diffusion import load_unet

    def make(folder: Path, scale: float = 1.0) -> Path:
        control = ControlNet.of(load_unet(files.model.base / "unet"), (4, 6))
        save_control_diffusers(control, folder)
        return folder

    return make


def test_an_untrained_controlnet_changes_nothing(files: Files, fresh: Callable[..., Path], tmp_path: Path) -> None:
    control = Use(str(fresh(tmp_path / "fresh")), scale=1.0)
    out = tmp_path / "out.png"
    assert difference(ours(files, Ask((control,)), out), ours(files, Ask(()), out)) == 0


def test_again_with_controls(files: Files, tmp_path: Path) -> None:
    """Controls, hints and their settings are in the record, with the hash of every file."""
    uses = replace(EDGES, end=0.8, guess=True), Use("sketch", "grey.png", 0.5, 0.2)
    first = ours(files, Ask(uses, prompted=True), tmp_path / "a.png")
    settings = read_settings(tmp_path / "a.png")
    assert settings["model"]["controls"] == [str(files.path(use.control)) for use in uses]
    assert settings["request"]["hints"][0] == {
        "picture": str(files.path("hint.png")),
        "scale": 0.8,
        "start": 0.0,
        "end": 0.8,
        "guess": True,
    }
    wanted = {str(files.path("edges") / name) for name in ("config.json", "diffusion_pytorch_model.safetensors")}
    assert wanted | {str(files.path("grey.png"))} < set(settings["sha256"])
    cli.run(["--again", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png")])
    assert difference(np.asarray(Image.open(tmp_path / "b.png")).astype(int)[None], first) == 0
    with pytest.raises(ValueError, match="leave out --control, --hint"):
        cli.run(["--again", str(tmp_path / "a.png"), "--control", "x", "--hint", "y"])


MISTAKES = {
    "no hint": ("--control {edges}", "edges needs a hint, such as a picture of edges: name it with --hint"),
    "no control": ("--hint {hint.png}", "--hint is for a control: name its file with --control"),
    "a scale alone": ("--control-scale 1", "--control-scale is for a control"),
    "no file": ("--control {nothing} --hint {hint.png}", "nothing is not there: name a ControlNet or a T2I-Adapter"),
    "no picture": ("--control {edges} --hint {nothing.png}", r"nothing\.png: there is no such file"),
    "not a picture": ("--control {edges} --hint {edges/config.json}", "Pillow cannot read this file as a picture"),
    "a picture": ("--control {hint.png} --hint {hint.png}", "not a file of weights but a PNG picture"),
    "an adapter": ("--control {adapter} --hint {hint.png}", "only ControlNets and T2I-Adapters can be used as a control"),
    "a range that is none": ("--control {edges} --hint {hint.png} --control-start 0.5 --control-end 0.5", "not 0.5 to 0.5"),
    "no step": (
        "--control {edges} --hint {hint.png} --control-start 0.4 --control-end 0.6 --steps 3",
        "between --control-start 0.4 and --control-end 0.6 there is no whole step of 3",
    ),
    "beyond the end": ("--control {edges} --hint {hint.png} --control-end 1.5", "0 <= start < end <= 1, not 0.0 to 1.5"),
    "too large": ("--control {edges} --hint {hint.png} --control-scale 1e9", "scale must be a number between"),
    "before both": ("--hint {hint.png} --control {edges} --control {depth} --hint {hint.png}", "its own --hint and --control-scale"),
    "the second has none": ("--control {edges} --hint {hint.png} --control {depth}", "depth needs a hint"),
    "twice": ("--control {edges} --hint {hint.png} --hint {grey.png}", "--hint is given twice for one control"),
    "guess": ("--control {t2i} --hint {hint.png} --guess", "leave out --guess for a T2I-Adapter"),
    "another base": ("--control {wide} --hint {hint.png}", "use a control made for this base model"),
    "another factor": ("--control {far} --hint {hint.png}", "for latents 4 times smaller than the picture, but those here are 2"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_one_sentence(files: Files, case: str, tmp_path: Path) -> None:
    """Nothing is written."""
    options, message = MISTAKES[case]
    if case == "another base":
        save_control_diffusers(ControlNet(ControlNetConfig.of(replace(UNET, context_dim=20), (4, 6))), tmp_path / "wide")
    if case == "another factor":
        save_control_diffusers(ControlNet(ControlNetConfig.of(UNET, (4, 6, 8))), tmp_path / "far")
    paths = {"adapter": files.model.adapters[1], "wide": tmp_path / "wide", "far": tmp_path / "far"}
    words = [str(paths.get(w[1:-1], files.path(w[1:-1]))) if w.startswith("{") else w for w in options.split()]
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message):
        cli.run(["--checkpoint", str(files.model.base), "--out", str(tmp_path / "out.png"), *words])
    assert sorted(tmp_path.iterdir()) == before


def test_controls_are_frozen(files: Files) -> None:
    assert not any(p.requires_grad for p in load_control(files.path("edges")).parameters())


# The mini weights.

OWL_PICTURE, LINES = Path("sampling/examples/owl.png"), HintFile(Path("sampling/examples/hints/owl.png"))
MINI_CONTROLS = [Path("weights/controlnet.safetensors"), Path("weights/t2i.safetensors")]


def test_controls_in_bfloat16() -> None:
    request = Request("a fox", hints=(LINES, LINES), steps=2)
    both = [load(dtype=dtype, controls=MINI_CONTROLS) for dtype in (torch.float32, torch.bfloat16)]
    full, half = (np.asarray(each.draw(request)).astype(int) for each in both)
    assert 0 < np.abs(full - half).mean() < 8


def test_a_control_reads_no_text_in_the_pass_of_the_picture_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sides: dict[str, Context] = {}

    def keep(networks: Any, hints: Any, unet: Any, contexts: dict[str, Context], *rest: Any) -> Any:
        sides.update(contexts)
        return bind(networks, hints, unet, contexts, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipelines, "bind", keep)
    load(controls=MINI_CONTROLS[:1]).draw(Request("a fox", (ImagePrompt((OWL_PICTURE,)),), image_guidance=2, hints=(LINES,), steps=1))
    assert torch.equal(sides["image"].text, sides["uncond"].text) and not torch.equal(sides["cond"].text, sides["uncond"].text)
