"""The whole pipeline against diffusers': the same files on disk, the same starting noise, the same picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from open_clip.tokenizer import SimpleTokenizer
from peers import clip_tokenizer, clip_words, randn, text_pair, unet_pair, vae_pair, vision_pair
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from checkpoints.adapters import load_adapter
from eval import __main__ as measures
from model.image_encoder import ImageConfig
from model.text_encoder import END, TextConfig, words_of
from model.unet import UNetConfig
from model.vae import VAEConfig
from sampling import __main__ as cli
from sampling.images import read_settings
from sampling.options import parse
from sampling.pipeline import load
from sampling.request import ImagePrompt, Request
from train import __main__ as train

# As Stable Diffusion 1.5 ships it.
SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


@dataclass(frozen=True)
class Small:
    """A small relative of a base model, the image encoder of its adapters, and the side of its pictures in latents."""

    unet: UNetConfig
    linear: bool
    text: TextConfig
    vae: VAEConfig
    image: ImageConfig
    pad: str = "<|endoftext|>"
    side: int = 8


BASES = {
    "sd15": Small(
        UNetConfig(channels=(16, 32, 32), depth=(1, 1, 0), heads=(4, 4, 4), res_blocks=1, context_dim=24, groups=4),
        False,
        TextConfig(width=24, layers=2, heads=3),
        VAEConfig(channels=(8, 16), res_blocks=1, groups=4),
        ImageConfig(image_size=32, patch=8, width=24, layers=(2,), heads=3, mlp_ratio=3.0, output_dim=20),
    ),
    "wide": Small(
        UNetConfig(channels=(24, 48), depth=(1, 1), heads=(2, 2), context_dim=20, groups=8),
        False,
        TextConfig(width=20, layers=3, heads=5),
        VAEConfig(channels=(8, 8, 16), res_blocks=2, groups=2, scale=0.3),
        ImageConfig(image_size=28, patch=7, width=32, layers=(1,), heads=4, activation="quick_gelu", output_dim=12),
    ),
    "sd21": Small(
        UNetConfig(
            channels=(16, 32),
            depth=(1, 2),
            mid_depth=2,
            heads=(2, 4),
            res_blocks=1,
            context_dim=32,
            groups=4,
            prediction="v",
        ),
        True,
        TextConfig(width=32, layers=2, heads=2, activation="gelu"),
        VAEConfig(channels=(8, 16), res_blocks=1, groups=4),
        ImageConfig(image_size=32, patch=16, width=16, layers=(2,), heads=2, output_dim=24),
        pad="!",
    ),
}


def save_tokenizer(folder: Path, pad: str, official: bool) -> None:
    """As the released models have it, or as transformers writes it today."""
    if official:
        words, merges = clip_words()
        settings = {"model_max_length": 77, "pad_token": pad, "tokenizer_class": "CLIPTokenizer"}
        folder.mkdir()
        (folder / "vocab.json").write_text(json.dumps(words))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        clip_tokenizer(pad).save_pretrained(folder)


def adapter(unet: Any, image_dim: int, seed: int) -> dict[str, dict[str, Tensor]]:
    """A random adapter in the official layout, counted over the peer's own processors."""
    width, n = unet.config.cross_attention_dim, 0

    def weight(*shape: int, size: float = 1.0) -> Tensor:
        nonlocal n
        n += 1
        return size * randn(*shape, seed=100 * seed + n, dtype=torch.float32)

    projection = {
        "proj.weight": weight(4 * width, image_dim, size=image_dim**-0.5),
        "proj.bias": weight(4 * width, size=0.3),
        "norm.weight": 1 + weight(width, size=0.3),
        "norm.bias": weight(width, size=0.3),
    }
    layers = {}
    for i, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            dim = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
            layers[f"{i}.to_k_ip.weight"] = weight(dim, width, size=2 * width**-0.5)
            layers[f"{i}.to_v_ip.weight"] = weight(dim, width, size=width**-0.5)
    return {"image_proj": projection, "ip_adapter": layers}


def flat(nested: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, tensors in nested.items() for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Model:
    """What lies on disk, and diffusers' pipelines of it: for text alone, with one adapter and with two."""

    base: Path
    adapters: tuple[Path, Path]
    encoder: Path
    peers: tuple[Any, Any, Any]


def build(root: Path, name: str) -> Model:
    small = BASES[name]
    base, models = root / "base", root / "IP-Adapter" / "models"
    unet = unet_pair(small.unet, small.linear, seed=1).peer.float()
    unet.register_to_config(sample_size=small.side)
    unet.save_pretrained(base / "unet")
    vae_pair(small.vae, seed=2)[0].float().save_pretrained(base / "vae")
    text_pair(small.text)[0].float().save_pretrained(base / "text_encoder")
    vision_pair(small.image)[0].float().save_pretrained(models / "image_encoder")
    save_tokenizer(base / "tokenizer", small.pad, official=name == "sd15")
    v = {"prediction_type": "v_prediction"} if small.unet.prediction == "v" else {}
    (base / "scheduler").mkdir()
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER | v))
    parts = {
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
        "scheduler": "PNDMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
    }
    library = {part: "transformers" if kind.startswith("CLIP") else "diffusers" for part, kind in parts.items()}
    index = {"_class_name": "StableDiffusionPipeline"} | {part: [library[part], kind] for part, kind in parts.items()}
    (base / "model_index.json").write_text(json.dumps(index))
    torch.save(adapter(unet, small.image.output_dim, 3), models / "a.bin")
    save_file(flat(adapter(unet, small.image.output_dim, 4)), models / "b.safetensors")

    def peer(*weights: str) -> Any:
        size = small.image.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        pipe = StableDiffusionPipeline.from_pretrained(base, safety_checker=None, feature_extractor=processor)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        if weights:
            pipe.load_ip_adapter(models.parent, subfolder="models", weight_name=list(weights))
        return pipe

    peers = peer(), peer("a.bin"), peer("a.bin", "b.safetensors")
    return Model(base, (models / "a.bin", models / "b.safetensors"), models / "image_encoder", peers)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = build(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


@dataclass(frozen=True)
class Ask:
    """What to draw. `images`: for each adapter the numbers of its pictures, and lambda in `scales`."""

    prompt: str = ""
    negative: str = ""
    images: Sequence[Sequence[int]] = ()
    scales: Sequence[float] = ()
    steps: int = 5
    guidance: float = 7.5
    eta: float = 0.0
    num: int = 1
    size: tuple[int | None, int | None] = (24, 40)  # without: what the base was trained at
    seed: int = 11


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


def theirs(model: Model, ask: Ask, pictures: list[Path]) -> np.ndarray:
    """What diffusers draws, picture i with a CPU generator of seed + i."""
    pipe, prompts = model.peers[len(ask.images)], {}
    if ask.images:
        pipe.set_ip_adapter_scale(list(ask.scales))
        opened = [[Image.open(pictures[i]).convert("RGB") for i in numbers] for numbers in ask.images]
        prompts = {"ip_adapter_image": opened}
    drawn = pipe(
        [ask.prompt] * ask.num,
        negative_prompt=[ask.negative] * ask.num,
        height=ask.size[0],
        width=ask.size[1],
        num_inference_steps=ask.steps,
        guidance_scale=ask.guidance,
        eta=ask.eta,
        generator=[torch.Generator().manual_seed(ask.seed + i) for i in range(ask.num)],
        **prompts,
    ).images
    return np.stack([np.asarray(image).astype(int) for image in drawn])


FOX, OWL, LONG = "A photo of a fox, 4k", "blurry; an owl", "a very long story of foxes and owls " * 12
LEVEL = 1  # of 255
ONE, THREE = [[0]], [[0, 1, 2]]
ASKS = {
    "text, 5 steps": ("sd15", Ask(FOX, OWL)),
    "native size": ("wide", Ask(FOX, OWL, ONE, [1.0], size=(None, None))),
    "text, 50 steps": ("wide", Ask(FOX, OWL, steps=50)),
    "text, guidance 1": ("sd21", Ask(FOX, OWL, steps=30, guidance=1, eta=1)),
    "long text": ("sd15", Ask(LONG, guidance=3)),
    "image alone": ("sd15", Ask("", "", ONE, [1.0], steps=30)),
    "image, eta 1, three pictures": ("sd21", Ask("", "", ONE, [1.0], steps=5, eta=1, num=3)),
    "image and text": ("sd15", Ask(FOX, OWL, ONE, [0.5], steps=50, size=(40, 24))),
    "image and text, guidance 1": ("wide", Ask(FOX, OWL, ONE, [0.5], guidance=1, num=2)),
    "image and text, eta 1": ("wide", Ask(FOX, OWL, ONE, [0.5], steps=30, eta=1, size=(24, 32))),
    "scale 0": ("sd15", Ask(FOX, "", ONE, [0.0])),
    "three images": ("sd15", Ask(FOX, "", THREE, [0.7], steps=30, eta=1)),
    "v-prediction": ("sd21", Ask(FOX, OWL, [[1]], [1.0], steps=50, guidance=3)),
    "two adapters": ("sd15", Ask(FOX, OWL, [[0], [1]], [0.5, 0.8], steps=30)),
    "two adapters, images alone": ("wide", Ask("", "", [[0, 2], [1]], [0.5, 1.0], steps=5, eta=1, num=2)),
    "two adapters, one off": ("sd21", Ask(FOX, "", [[2], [1, 0]], [0.0, 0.6], steps=5)),
}


def difference(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a - b).max())


Get = Callable[[str], Model]


@pytest.mark.parity("diffusers StableDiffusionPipeline, in levels of 255", LEVEL)
@pytest.mark.parametrize("name", ASKS)
def test_the_picture_is_diffusers(model: Get, pictures: list[Path], tmp_path: Path, name: str) -> None:
    base, ask = ASKS[name]
    want, got = theirs(model(base), ask, pictures), ours(model(base), ask, pictures, tmp_path)
    assert want.shape == (ask.num, *(side or 32 for side in ask.size), 3)
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
        ("--image x --ip-adapter a --image y --ip-adapter b", "none stands before"),
        ("--scale 0.5 --ip-adapter a --image x --ip-adapter b --image y", "none stands before"),
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


# Tokens: CLIP's own rule, as open_clip has it, and where transformers has another.

READ_AS = {
    "HTML": ("cats &amp; dogs", "cats & dogs"),
    "HTML twice": ("cats &amp;lt; dogs", "cats < dogs"),
    "ligatures": ("a ﬁne ﬂower", "a fine flower"),
    "curly quotes": ("it’s a “fox”", 'it\'s a "fox"'),
    "wide letters": ("ＦＯＸ", "fox"),
    "mojibake": ("schÃ¶n", "schön"),
    "escapes": ("\x1b[31mred", "red"),
}


def tokens(prompt: str) -> list[int]:
    return [token for _, pieces in words_of(prompt) for token in pieces]


@pytest.fixture(scope="module")
def peer_tokens() -> Callable[..., list[int]]:
    made = {pad: clip_tokenizer(pad) for pad in ("<|endoftext|>", "!")}
    return lambda prompt, pad="<|endoftext|>": made[pad](prompt).input_ids[1:-1]


@pytest.mark.parity("open_clip SimpleTokenizer", 0)
@pytest.mark.parametrize("name", READ_AS)
def test_text_is_cleaned_before_it_is_cut(peer_tokens: Callable[..., list[int]], name: str) -> None:
    """ftfy and HTML first; transformers takes the letters as they are."""
    prompt, plain = READ_AS[name]
    assert tokens(prompt) == SimpleTokenizer().encode(prompt) == tokens(plain) == peer_tokens(plain)
    assert peer_tokens(prompt) != tokens(prompt)


@pytest.mark.parity("open_clip SimpleTokenizer", 0)
def test_special_tokens_in_a_prompt(peer_tokens: Callable[..., list[int]]) -> None:
    """`<|endoftext|>` is letters here; to transformers it is the end token. open_clip has another name for that token."""
    spelled = "fox <|endoftext|> owl"
    assert END not in tokens(spelled) and tokens(spelled) == SimpleTokenizer().encode(spelled)
    assert peer_tokens(spelled) == [*tokens("fox"), END, *tokens("owl")]
    assert tokens("fox <end_of_text> owl") == [*tokens("fox"), END, *tokens("owl")]


@pytest.mark.parity("transformers CLIPTokenizer", 0)
def test_an_exclamation_mark_where_it_pads(peer_tokens: Callable[..., list[int]]) -> None:
    """SD 2 pads with token 0, "!" inside a word. transformers takes every "!" of a prompt for padding."""
    assert tokens("fox!") == peer_tokens("fox!") == [*tokens("fox"), 256]
    assert peer_tokens("fox!", "!") == [*tokens("fox"), 0]


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
    named |= {"state": tmp_path / "state", "out": tmp_path, "seeds": 1, "steps": 4, "batch": 2, "jobs": 2}
    options = [str(part) for name, value in named.items() for part in (f"--{name}", value)]
    measures.run(measures.parser().parse_args(["ablation", "--smoke", *options]))
    found = json.loads((tmp_path / "results" / "ablation.json").read_text())
    held_out = sorted(range(20), key=lambda i: hashlib.sha256(pictures[i].read_bytes()).hexdigest())[:4]
    own = [f"picture {i}" for i in held_out]
    assert found["prompts"]["agreeing"] == own and found["prompts"]["conflict"] == [*own[1:], own[0]]
    assert "truth" not in found and set(found["summary"]["endpoint"]) == set(found["study"]["forms"])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "have no ground truth" in text and "another picture's caption" in text
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
