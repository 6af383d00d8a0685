"""The paper's two measures, CLIP-I and CLIP-T (section 4.2), for any CLIP.  `python -m eval clip` trains the mini world's own.

CLIP-I is the cosine of the embeddings of a drawn picture and its image prompt; CLIP-T that of a drawn picture and its caption, and
the CLIPScore of arXiv 2104.08718, 2.5 max(cos, 0), which is the scale of the paper's CLIP-T. The mini world is scored by a
*second* CLIP: another patch size, width, seed and other training pictures, which no adapter ever reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoints import cards
from checkpoints.stable_diffusion import load_image_encoder, load_text_encoder
from model.image_encoder import MINI_IMAGE, ImageEncoder
from model.text_encoder import TextEncoder
from train import clip
from train.loop import Plan, card, run

NAME = "the mini world's second CLIP"
PLAN = Plan("clip_score", 1500, 128, 1e-3, decay=0.7, weight_decay=0.05, bf16=True, seed=50, validate_every=500)
TEXT = replace(clip.MINI_TEXT, width=96, layers=3, output_dim=192)
IMAGE = replace(
    MINI_IMAGE, width=24, heads=12, output_dim=192, stem_pool=True
)  # a grid of 2 x 2: patches twice as large


@dataclass(frozen=True)
class Scorer:
    """A CLIP as two functions to embeddings `b e`; of which model, and what is done to pictures first, is in `name`."""

    name: str
    images: Callable[[Sequence[Image.Image]], Tensor]
    texts: Callable[[Sequence[str]], Tensor]

    def clip_i(self, drawn: Sequence[Image.Image], prompts: Sequence[Image.Image]) -> Tensor:
        """Cosine of each drawn picture and its image prompt, `b`."""
        return cosine(self.images(drawn), self.images(prompts))

    def clip_t(self, drawn: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """Cosine of each drawn picture and its caption, `b`."""
        return cosine(self.images(drawn), self.texts(captions))


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of two embeddings `b e`, `b`."""
    return F.cosine_similarity(a, b, dim=-1)


def clip_score(cosine: Tensor) -> Tensor:
    """2.5 max(cos, 0)  (arXiv 2104.08718, Eq. 1)."""
    return 2.5 * cosine.clamp(min=0)


def scorer(name: str, image: ImageEncoder, text: TextEncoder) -> Scorer:
    """Our own towers as a Scorer. The text tower must keep its projection."""

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([image.preprocess(picture) for picture in pictures])
        return torch.cat([image(part) for part in pixels.split(64)])

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        return torch.cat([text.pooled(part) for part in text.tokenize(list(captions)).split(64)])

    return Scorer(name, images, texts)


def open_clip_scorer(architecture: str, pretrained: str, device: str = "cpu") -> Scorer:
    """Any CLIP of open_clip, by its names there ("ViT-L-14", "openai") or with the path of a file as `pretrained`.

    Raises ValueError when open_clip does not know or cannot load it.
    """
    import open_clip

    try:
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=pretrained)
    except RuntimeError as error:
        raise ValueError(f"{architecture}:{pretrained} is no CLIP that open_clip loads: {error}") from error
    tokenizer = open_clip.get_tokenizer(architecture)
    model.eval().to(device)

    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        return torch.cat([model.encode_image(part.to(device)).cpu() for part in pixels.split(32)])

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        tokens = tokenizer(list(captions))
        return torch.cat([model.encode_text(part.to(device)).cpu() for part in tokens.split(32)])

    return Scorer(f"{architecture}, {pretrained} (open_clip: {model.visual.preprocess_cfg})", images, texts)


def load(weights: Path) -> Scorer:
    """The mini world's second CLIP."""
    image = load_image_encoder(weights / "score_image.safetensors")
    text = load_text_encoder(weights / "score_text.safetensors")
    size = image.config.image_size
    return scorer(f"{NAME} ({size} x {size} pixels, bicubic, centre crop)", image, text)


def find(name: str, device: str = "cpu") -> Scorer:
    """The CLIP of a folder that has score_image and score_text (on the CPU), or one of open_clip as ARCHITECTURE:PRETRAINED.

    Raises ValueError when the name is neither.
    """
    if Path(name).is_dir():
        return load(Path(name))
    if ":" not in name:
        raise ValueError(
            f"{name} is no CLIP: name one of open_clip, as in ViT-L-14:openai or ViT-L-14:model.safetensors"
        )
    architecture, pretrained = name.split(":", 1)
    return open_clip_scorer(architecture, pretrained, device)


def train(folder: Path, weights: Path, plan: Plan = PLAN) -> None:
    torch.manual_seed(plan.seed)
    towers = clip.CLIP(TEXT, IMAGE)

    def validate(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, clip.CLIP)
        return clip.probe(module.image)

    batches, loss = functools.partial(clip.batch_of, towers.text, plan), functools.partial(clip.clip_loss, towers)
    _, log = run(plan, towers, batches, loss, validate, folder)
    written = card((plan,), log, "python -m eval clip")
    cards.save(towers.text, weights / "score_text.safetensors", written)
    cards.save(towers.image.eval(), weights / "score_image.safetensors", written)
