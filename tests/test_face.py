"""FaceID: projections, the LoRA in its files, files of faces and whole pictures, against diffusers and the official modules."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from base_files import change
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.embeddings import IPAdapterFaceIDImageProjection, IPAdapterFaceIDPlusImageProjection
from peers import max_error, randn, randomise
from PIL import Image
from safetensors.torch import save_file
from small_models import BASES, Ask, Model, adapter, build
from test_face_layouts import lora_shapes
from test_lora import beside, outputs, small
from tiny import again, difference, draw
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.adapters import adapter_file, adapter_kind, adapter_sizes, own_updates, save_adapter
from checkpoints.lora import merge
from checkpoints.names import projection_names
from checkpoints.reader import File
from model.adapter import IPAdapter
from model.features import FACE_DIM
from model.image_encoder import ImageEncoder
from model.image_projection import (
    FacePlus,
    FaceProjection,
    Projection,
    RawFaceResampler,
)
from model.unet import UNet
from sampling import loading, request
from sampling.command import check_prompt, load_model
from sampling.faces import Faces, read_faces
from sampling.images import to_images
from sampling.inputs import prompt_inputs
from sampling.loading import load
from sampling.pipeline import Pipeline
from sampling.request import ImagePrompt

Tensors = dict[str, Tensor]
EXACT = 1e-12  # measured: 4e-15
LEVEL = 1
SMALL = BASES["sd15"]


def official_names(projection: Projection) -> Tensors:
    state = {f"image_projection.{name}": tensor for name, tensor in projection.state_dict().items()}
    return {theirs.removeprefix("image_proj."): state[ours] for ours, (theirs,) in projection_names(state).items()}


# The projections. The official modules, as ip_adapter/ip_adapter_faceid.py and resampler.py have them.


class PerceiverAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, inner = heads, 64 * heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, inner, bias=False), nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        x, latents = self.norm1(x), self.norm2(latents)
        b, n, _ = latents.shape
        k, v = self.to_kv(torch.cat([x, latents], dim=-2)).chunk(2, dim=-1)
        q, k, v = (t.view(b, t.shape[1], self.heads, -1).transpose(1, 2) for t in (self.to_q(latents), k, v))
        scale = 64**-0.25
        weight = torch.softmax((q * scale) @ (k * scale).transpose(-2, -1), dim=-1)
        return self.to_out((weight @ v).permute(0, 2, 1, 3).reshape(b, n, -1))


def feed_forward(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim, bias=False), nn.GELU(), nn.Linear(4 * dim, dim, bias=False))


class FacePerceiverResampler(nn.Module):
    def __init__(self, dim: int, embedding_dim: int, heads: int) -> None:
        super().__init__()
        self.proj_in, self.proj_out, self.norm_out = nn.Linear(embedding_dim, dim), nn.Linear(dim, dim), nn.LayerNorm(dim)
        self.layers = nn.ModuleList(nn.ModuleList([PerceiverAttention(dim, heads), feed_forward(dim)]) for _ in range(4))

    def forward(self, latents: Tensor, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        for attn, ff in self.layers:  # type: ignore[misc]
            latents = attn(x, latents) + latents
            latents = ff(latents) + latents
        return self.norm_out(self.proj_out(latents))


class ProjPlusModel(nn.Module):
    def __init__(self, dim: int, id_dim: int, clip_dim: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.dim, self.tokens = dim, tokens
        self.proj = nn.Sequential(nn.Linear(id_dim, id_dim * 2), nn.GELU(), nn.Linear(id_dim * 2, dim * tokens))
        self.norm = nn.LayerNorm(dim)
        self.perceiver_resampler = FacePerceiverResampler(dim, clip_dim, heads)

    def forward(self, face: Tensor, clip: Tensor, shortcut: bool = False, scale: float = 1.0) -> Tensor:
        x = self.norm(self.proj(face).reshape(-1, self.tokens, self.dim))
        out = self.perceiver_resampler(x, clip)
        return x + scale * out if shortcut else out


@pytest.mark.parity("IP-Adapter ProjPlusModel, and diffusers IPAdapterFaceIDPlusImageProjection", EXACT)
@pytest.mark.parametrize("shortcut, scale", [(False, 1.0), (True, 1.0), (True, 0.6)])
@pytest.mark.parametrize("heads, tokens, m", [(1, 4, 2), (3, 5, 257)])
def test_plus_equals_both(shortcut: bool, scale: float, heads: int, tokens: int, m: int) -> None:
    official = randomise(ProjPlusModel(12, 10, 15, tokens, heads), seed=heads)
    ours = FacePlus(15, 12, tokens, 20, face_dim=10, heads=heads, shortcut=shortcut).double()
    ours.load_state_dict({name: official.state_dict()[theirs] for name, theirs in plus_names(ours).items()})
    ours.structure_scale = scale
    face, fine = randn(3, 10), randn(3, m, 15, seed=1)
    features = torch.cat([torch.cat([face, torch.zeros(3, 5)], -1)[:, None].double(), fine], dim=1)
    wanted = official(face, fine, shortcut, scale)
    assert max_error(ours(features), wanted) < EXACT
    if tokens == 4:  # the only number that diffusers reads
        state = {name: tensor.float().double() for name, tensor in official.state_dict().items()}
        peer: Any = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers(None, state, False)
        assert type(peer) is IPAdapterFaceIDPlusImageProjection
        peer.double().clip_embeds, peer.shortcut, peer.shortcut_scale = fine[:, None], shortcut, scale
        ours.load_state_dict({name: state[theirs] for name, theirs in plus_names(ours).items()})
        assert max_error(ours(features), peer(face)) < EXACT


def plus_names(projection: Projection) -> dict[str, str]:
    state = [f"image_projection.{name}" for name in projection.state_dict()]
    return {a.removeprefix("image_projection."): b.removeprefix("image_proj.") for a, (b,) in projection_names(state).items()}


@pytest.mark.parity("diffusers IPAdapterFaceIDImageProjection", EXACT)
@pytest.mark.parametrize("tokens", [4, 16])
def test_the_projection_equals_diffusers(tokens: int) -> None:
    ours = randomise(FaceProjection(10, 12, tokens, width=20), seed=tokens).float().double()
    peer: Any = UNet2DConditionLoadersMixin._convert_ip_adapter_image_proj_to_diffusers(None, official_names(ours), False)
    assert type(peer) is IPAdapterFaceIDImageProjection
    peer.double()
    face = randn(3, 10)
    assert max_error(ours(face[:, None]), peer(face)) < EXACT


def test_several_faces_of_a_portrait_share_one_softmax() -> None:
    """As officially: b x 5 x 512 goes through the projection face by face, and its tokens are joined."""
    unet = small("one_block")[2].unet
    whole = randomise(IPAdapter(unet, FaceProjection(10, unet.config.context_dim, 16, width=20)))
    faces = randn(2, 5, 1, 10)
    wanted = whole.image_projection(faces.reshape(10, 1, 10)).reshape(2, 80, -1)
    assert torch.equal(whole.tokens(faces), wanted)


# The LoRA in a file.


@pytest.mark.parity("diffusers UNet, with B (A x) added to q, k, v and out of each layer", 1e-11)
@pytest.mark.parametrize("name", ["one_block", "sdxl"])
def test_the_lora_of_a_face_is_found_and_removed(tmp_path: Path, name: str) -> None:
    """W' = W + s up down in every attention layer, self-attention too. Without it, the base is as it was, bit for bit."""
    peer, _, base = small(name)
    tensors: Tensors = {"image_proj.proj.0.weight": torch.ones(2, 2)}
    updates = {}
    for n, processor in enumerate(peer.attn_processors):
        for i, to in enumerate(("to_q", "to_k", "to_v", "to_out.0")):
            module = f"{processor.removesuffix('.processor')}.{to}"
            out, into = peer.get_submodule(module).weight.shape
            down, up = randn(3, into, seed=4 * n + i) / into**0.5, randn(out, 3, seed=900 + 4 * n + i)
            updates[module] = down, up, 0.5
            key = f"ip_adapter.{n}.{to.removesuffix('.0')}_lora"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    before = {name: tensor.clone() for name, tensor in base.unet.state_dict().items()}
    merged = merge(base, [(tmp_path / "a.safetensors", own_updates(File(tmp_path / "a.safetensors")), 0.5)])
    if name == "one_block":
        want = outputs(beside(peer, updates), ours=False)
        assert max_error(outputs(merged.unet, ours=True), want) < 1e-11
        assert max_error(want, outputs(peer, ours=False)) > 0.1
    changed = {name for name, tensor in merged.unet.state_dict().items() if not torch.equal(tensor, before[name])}
    assert len(changed) == len(updates) == 4 * len(peer.attn_processors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.unet.state_dict().items())


# Files, and whole pictures.


def face_projection(form: str, seed: int, context: int, clip: int) -> Tensors:
    """A random projection under its official names, in float32."""
    module: nn.Module = nn.Sequential()
    module.proj = nn.Sequential(nn.Linear(FACE_DIM, 1024), nn.GELU(), nn.Linear(1024, (16 if form == "portrait" else 4) * context))
    module.norm = nn.LayerNorm(context)
    if form.startswith("plus"):
        module.perceiver_resampler = FacePerceiverResampler(context, clip, 2)
    return {name: tensor.float() for name, tensor in randomise(module, seed).state_dict().items()}


@dataclass(frozen=True)
class Files:
    model: Model
    paths: dict[str, Path]
    face: Path
    embedding: Tensor


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("face")
    model, paths = build(root, "sd15"), {}
    folder = model.adapters[0].parent
    for i, form in enumerate(("faceid", "plus", "plusv2", "portrait")):
        file = adapter(model.peers[0].unet, 1, 7 + i)
        file["image_proj"] = face_projection(form, i if form != "plusv2" else 1, SMALL.unet.context_dim, 512)
        paths[form] = folder / f"ip-adapter-{'' if form == 'faceid' else 'faceid-'}{form}_sd15.bin"
        torch.save(file, paths[form])
    embedding = 20 * randn(3, FACE_DIM, dtype=torch.float32)
    picture = torch.randint(0, 256, (3, 40, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"face": embedding[0], "picture": picture[0]}, root / "face.safetensors")
    save_file({"face": embedding, "picture": picture}, root / "faces.safetensors")
    save_file({"face": embedding[0]}, root / "plain.safetensors")
    return Files(model, paths, root / "face.safetensors", embedding)


def drawn(pipe: Pipeline, faces: list[Path], ask: Ask) -> np.ndarray:
    pictures = pipe.sample(
        [ask.prompt] * ask.num, [ask.seed + i for i in range(ask.num)], pipe.embed(faces), [ask.negative] * ask.num,
        0.8, ask.guidance, ask.steps, size=ask.size,  # type: ignore[arg-type]
    )  # fmt: skip
    return np.stack([np.asarray(image).astype(int) for image in to_images(pictures)])


@pytest.mark.parity("diffusers StableDiffusionPipeline with FaceID, in levels of 255", LEVEL)
@pytest.mark.parametrize("num", [1, 2])
def test_the_picture_is_diffusers(files: Files, num: int) -> None:
    """The face is normalised, and the null face is a zero embedding."""
    ask, pipe, folder = Ask("A photo of a fox", "blurry", num=num), files.model.peers[0], files.model.encoder.parent
    pipe.load_ip_adapter(folder.parent, subfolder="models", weight_name=files.paths["faceid"].name, image_encoder_folder=None)
    try:
        pipe.set_ip_adapter_scale(0.8)
        face = files.embedding[:1] / files.embedding[:1].norm()
        both = torch.stack([torch.zeros(1, FACE_DIM), face])
        pictures = pipe(
            [ask.prompt] * num, negative_prompt=[ask.negative] * num, height=24, width=40, num_inference_steps=ask.steps,
            generator=[torch.Generator().manual_seed(ask.seed + i) for i in range(num)], ip_adapter_image_embeds=[both],
        ).images  # fmt: skip
    finally:
        pipe.unload_ip_adapter()
    want = np.stack([np.asarray(image).astype(int) for image in pictures])
    ours = drawn(load(files.model.base, [files.paths["faceid"]]), [files.face], ask)  # without an image encoder
    assert difference(ours, want) <= LEVEL and want.std() > 20
    other = drawn(load(files.model.base, [files.paths["faceid"]]), [files.face.with_name("faces.safetensors")], ask)
    assert difference(other, want) > 10


def test_kinds_and_sizes_are_read(files: Files) -> None:
    kinds = {form: adapter_kind(adapter_file(path)) for form, path in files.paths.items()}
    assert kinds == {
        "faceid": "IP-Adapter FaceID Portrait",  # it has no LoRA
        "plus": "IP-Adapter FaceID Plus",
        "plusv2": "IP-Adapter FaceID PlusV2",
        "portrait": "IP-Adapter FaceID Portrait",
    }
    sizes = {form: adapter_sizes(adapter_file(path)) for form, path in files.paths.items()}
    assert sizes["portrait"] == {"context_dim": 24, "tokens": 16, "width": 1024, "image_dim": 512}
    assert sizes["plusv2"] == sizes["plus"] | {"shortcut": True}
    assert sizes["plus"]["heads"] == 2 and sizes["plus"]["depth"] == 4 and not sizes["plus"]["shortcut"]


@pytest.mark.parametrize("form", ["plus", "plusv2"])
def test_plus_reads_the_face_and_its_picture(files: Files, form: str) -> None:
    """The features are the face over the picture's, and the null image is zeros over zero pixels. Only V2 adds the shortcut."""
    pipe = load(files.model.base, [files.paths[form]], wide_encoder(files))
    e, null = pipe.embed(files.face), pipe.null(pipe.adapters[0], torch.zeros(1, 512))
    assert e.shape == null.shape == (1, 1, 18, 512) and pipe.image is not None
    face = files.embedding[0] / files.embedding[0].norm()
    assert max_error(e[0, 0, 0], face) < 1e-7
    pixels = torch.stack([pipe.image.preprocess(read_faces(files.face).pictures[0])])  # type: ignore[union-attr]
    assert torch.equal(e[0, :, 1:], pipe.image.fine(pixels))
    assert not null[0, 0, 0].any() and torch.equal(null[0, :, 1:], pipe.image.fine(torch.zeros_like(pixels)))
    official = ProjPlusModel(24, 512, 512, 4, 2)
    official.proj[0], official.proj[2] = nn.Linear(512, 1024), nn.Linear(1024, 96)
    official.load_state_dict(torch.load(files.paths[form], weights_only=True)["image_proj"])
    wanted = official(face[None], e[0, :, 1:], shortcut=form == "plusv2")
    assert max_error(pipe.adapters[0].tokens(e), wanted) < 1e-5  # float32
    weaker = functools.partial(load, files.model.base, [files.paths[form]], wide_encoder(files), face_structure_scale=0.5)
    if form == "plusv2":
        wanted = official(face[None], e[0, :, 1:], shortcut=True, scale=0.5)
        assert max_error(weaker().adapters[0].tokens(e), wanted) < 1e-5
    else:
        with pytest.raises(ValueError, match="--face-structure-scale is for IP-Adapter FaceID PlusV2"):
            weaker()
    ask = Ask("A photo of a fox", num=1)
    assert difference(drawn(pipe, [files.face], ask), drawn(pipe, [files.face.with_name("faces.safetensors")], ask)) > 5


def wide_encoder(files: Files) -> Path:
    """A small image encoder whose fine features are 512 wide, so that a face fits above them."""
    config = replace(SMALL.image, width=512, heads=4, layers=(1,))
    path = files.face.with_name("wide.safetensors")
    cards.save(randomise(ImageEncoder(config)).float(), path, {})
    return path


# What is refused.


def test_a_photograph_is_refused(files: Files, tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "photo.png")
    sentence = "a FaceID adapter reads a face embedding, not a photograph: make a file of it with InsightFace"
    prompt = prompt_inputs(ImagePrompt(tmp_path / "photo.png"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence):
        check_prompt(prompt, files.paths["faceid"], files.model.base)
    with pytest.raises(ValueError, match=sentence):
        load(files.model.base, [files.paths["faceid"]]).embed(tmp_path / "photo.png")


WRONG: dict[str, tuple[Tensors, str, str]] = {
    "size": ({"face": torch.ones(128)}, "faceid", "holds face embeddings of 128 numbers, but this adapter reads 512"),
    "no picture": ({"face": torch.ones(512)}, "plus", "holds no `picture` of the face, which FaceID Plus reads too"),
    "zeros": ({"face": torch.zeros(512)}, "faceid", "a face embedding is all zeros: compute it again"),
    "not finite": ({"face": torch.full((512,), float("nan"))}, "faceid", "`face` must be finite numbers"),
    "integers": ({"face": torch.ones(512, dtype=torch.int64)}, "faceid", "`face` must be finite numbers, 512 for each face"),
    "pictures": ({"face": torch.ones(2, 512), "picture": torch.zeros(1, 9, 9, 3, dtype=torch.uint8)}, "plus", "for each of 2 faces"),
    "floats": ({"face": torch.ones(512), "picture": torch.zeros(9, 9, 3)}, "plus", "`picture` must be one picture for each"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_of_faces_is_refused(files: Files, tmp_path: Path, case: str) -> None:
    tensors, form, sentence = WRONG[case]
    save_file(tensors, tmp_path / "f.safetensors")
    prompt = prompt_inputs(ImagePrompt(tmp_path / "f.safetensors"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=sentence) as refused:
        check_prompt(prompt, files.paths[form], files.model.base)
    assert "f.safetensors" in str(refused.value)


def test_faces_are_only_for_face_adapters(files: Files) -> None:
    prompt = prompt_inputs(ImagePrompt(files.face))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holds faces, but this adapter reads image embeddings: give it a picture"):
        check_prompt(prompt, files.model.adapters[0], files.model.base)
    assert not check_prompt(prompt, files.paths["faceid"], files.model.base)
    assert check_prompt(prompt, files.paths["plus"], files.model.base)  # it needs the image encoder


def test_the_raw_embedding_is_kept_for_unnorm() -> None:
    unnorm, normed = RawFaceResampler(image_dim=512, width=64, heads=1), FaceProjection(width=8)
    face = Faces(Path("f"), 20 * randn(2, 512, dtype=torch.float32))
    assert torch.equal(face.features(unnorm, None)[0, :, 0], face.embeddings)
    assert max_error(face.features(normed, None).norm(dim=-1), torch.ones(1, 2, 1)) < 1e-6
    unit = replace(face, embeddings=face.embeddings / face.embeddings.norm(dim=-1, keepdim=True))
    with pytest.raises(ValueError, match="reads the face embedding as InsightFace gives it, `embedding`, not `normed_embedding`"):
        unit.features(unnorm, None)


class WideEncoder(nn.Module):
    """Fine features of 20 numbers, all 7. `fits`: how pictures were cropped."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.fits = nn.Parameter(torch.ones(1)), list[str]()

    def preprocess(self, image: Image.Image, fit: str = "crop") -> Tensor:
        self.fits.append(fit)
        return torch.zeros(3, 4, 4)

    def fine(self, pixels: Tensor) -> Tensor:
        return torch.full((len(pixels), 5, 20), 7.0)


def test_a_face_is_narrower_than_the_features_of_its_picture() -> None:
    """The face, of length 1, is the first token, filled up with zeros. The official encoder has 1280 features, and a face 512."""
    plus, encoder = FacePlus(20, 8, width=6, face_dim=10, heads=1), WideEncoder()
    face = Faces(Path("f"), torch.ones(1, 10), (Image.new("RGB", (9, 6)),))
    features = face.features(plus, encoder, "squash")  # type: ignore[arg-type]
    assert features.shape == (1, 1, 6, 20) and encoder.fits == ["squash"] and (features[0, 0, 1:] == 7).all()
    assert torch.allclose(features[0, 0, 0], torch.cat([torch.full((10,), 10**-0.5), torch.zeros(10)]))


def test_one_wrong_face_of_two_is_refused(tmp_path: Path) -> None:
    save_file({"face": torch.stack([torch.ones(512), torch.zeros(512)])}, tmp_path / "f.safetensors")
    with pytest.raises(ValueError, match="all zeros"):
        read_faces(tmp_path / "f.safetensors")
    faces = 20 * randn(2, 512, dtype=torch.float32)
    faces[1] /= faces[1].norm()
    with pytest.raises(ValueError, match="not `normed_embedding`"):
        Faces(Path("f"), faces).features(RawFaceResampler(image_dim=512, width=64, heads=1), None)


def test_the_scale_of_the_structure_reaches_the_adapter(files: Files) -> None:
    model = request.Model(files.model.base, (files.paths["plusv2"],), wide_encoder(files), face_structure_scale=0.5)
    projection = load_model(model, "cpu").adapters[0].image_projection
    assert isinstance(projection, FacePlus) and projection.structure_scale == 0.5


# The command line.


def test_a_face_is_drawn_and_drawn_again(weights: Path, tmp_path: Path, image: Path) -> None:
    """The LoRA in the adapter's file has a scale of its own, which lambda does not touch."""
    unet = UNet(tiny.UNET)
    save_adapter(tiny.loud(IPAdapter(unet, FaceProjection(512, tiny.UNET.context_dim, width=8))), unet, tmp_path / "f.safetensors", {})
    lora = {name: randn(*shape, seed=i).half() for i, (name, shape) in enumerate(lora_shapes(unet, 2).items())}
    change(tmp_path / "f.safetensors", lambda tensors: tensors.update(lora))
    save_file({"face": randn(512).float()}, tmp_path / "face.safetensors")
    options = "--prompt", "a fox", "--ip-adapter", tmp_path / "f.safetensors", "--image", tmp_path / "face.safetensors"
    plain = draw(weights, tmp_path / "plain.png", "--prompt", "a fox")
    full = draw(weights, tmp_path / "full.png", *options)
    without = draw(weights, tmp_path / "without.png", *options, "--face-lora-scale", 0)
    only = draw(weights, tmp_path / "only.png", *options, "--scale", 0)
    neither = draw(weights, tmp_path / "neither.png", *options, "--scale", 0, "--face-lora-scale", 0)
    assert difference(neither, plain) == 0
    assert all(difference(a, b) > 3 for a, b in ((full, without), (full, only), (only, plain), (without, plain)))
    assert difference(again(tmp_path / "without.png", tmp_path / "b.png"), without) == 0
    with pytest.raises(ValueError, match="a FaceID adapter reads a face embedding, not a photograph"):
        draw(weights, tmp_path / "c.png", "--ip-adapter", tmp_path / "f.safetensors", "--image", image)
    faceless = draw(weights, tmp_path / "faceless.png", *options[:4])
    assert difference(faceless, only) == 0 and difference(again(tmp_path / "faceless.png", tmp_path / "b.png"), faceless) == 0


def test_the_scale_of_no_lora_is_refused(weights: Path, tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_base", lambda *_: pytest.fail("the base was read"))
    for options in ((), ("--image", image)):
        with pytest.raises(ValueError, match="--face-lora-scale is for an IP-Adapter FaceID that holds a LoRA: leave it out"):
            draw(weights, tmp_path / "c.png", *options, "--face-lora-scale", 0.5)
