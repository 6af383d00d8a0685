"""The paper's two metrics, CLIP-I and CLIP-T (section 4.2), for any CLIP model.

CLIP-I is the cosine similarity between a drawing and its image prompt. CLIP-T is the cosine similarity between a drawing and its
caption; the paper reports it as CLIPScore (arXiv 2104.08718), 2.5 max(cos, 0). The mini world is scored by a second CLIP, which no
adapter uses (train/scorer.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from checkpoints.clip import load_image_encoder, load_text_encoder
from model.image_encoder import ImageEncoder
from model.text_encoder import TextEncoder

NAME = "the mini world's second CLIP"
Encode = Callable[..., Tensor]


@dataclass(frozen=True)
class Scorer:
    """A CLIP, as two functions that return embeddings `b e`; CLIP-I and CLIP-T are their cosines. `name` also states the preprocessing."""

    name: str
    images: Callable[[Sequence[Image.Image]], Tensor]
    texts: Callable[[Sequence[str]], Tensor]


def clip_score(cosine: Tensor) -> Tensor:
    """Compute CLIPScore, 2.5 max(cos, 0)  (arXiv 2104.08718, Eq. 1)."""
    return 2.5 * cosine.clamp(min=0)


def _scorer(name: str, preprocess: Encode, image: Encode, tokenize: Encode, text: Encode, device: str = "cpu", batch: int = 64) -> Scorer:
    @torch.no_grad()
    def images(pictures: Sequence[Image.Image]) -> Tensor:
        pixels = torch.stack([preprocess(picture) for picture in pictures])
        return torch.cat([image(part.to(device)).cpu() for part in pixels.split(batch)])

    @torch.no_grad()
    def texts(captions: Sequence[str]) -> Tensor:
        return torch.cat([text(part.to(device)).cpu() for part in tokenize(list(captions)).split(batch)])

    return Scorer(name, images, texts)


def scorer(name: str, image: ImageEncoder, text: TextEncoder, device: str = "cpu") -> Scorer:
    """Build a Scorer from this project's towers, which move to `device`. The text tower must have its projection."""
    return _scorer(name, image.preprocess, image.to(device), text.tokenize, text.to(device).pooled, device)


def open_clip_scorer(architecture: str, pretrained: str, device: str = "cpu") -> Scorer:
    """Build a Scorer from a CLIP of open_clip, such as ("ViT-L-14", "openai"); `pretrained` may also be a file.

    Raises ValueError if open_clip does not know the model or cannot load it.
    """
    import open_clip

    try:
        model, _, preprocess = open_clip.create_model_and_transforms(architecture, pretrained=pretrained)
    except RuntimeError as error:
        raise ValueError(f"open_clip cannot load {architecture}:{pretrained}: {error}") from error
    model.eval().to(device)
    name = f"{architecture}, {pretrained} (open_clip: {model.visual.preprocess_cfg})"
    tokenizer = open_clip.get_tokenizer(architecture)
    return _scorer(name, preprocess, model.encode_image, tokenizer, model.encode_text, device, batch=32)


def load(weights: Path, device: str = "cpu") -> Scorer:
    """Load the mini world's second CLIP from a folder of weights. Its embeddings are on the CPU."""
    image = load_image_encoder(weights / "score_image.safetensors")
    text = load_text_encoder(weights / "score_text.safetensors")
    size = image.config.image_size
    return scorer(f"{NAME} ({size} x {size} pixels, bicubic, centre crop)", image, text, device)


def find(name: str, device: str = "cpu") -> Scorer:
    """Load a CLIP: the second CLIP in a folder of mini weights, or ARCHITECTURE:PRETRAINED from open_clip.

    Raises ValueError if the name is neither.
    """
    if Path(name).is_dir():
        return load(Path(name), device)
    if ":" not in name:
        raise ValueError(f"{name} does not name a CLIP: give an open_clip model, such as ViT-L-14:openai or ViT-L-14:model.safetensors")
    architecture, pretrained = name.split(":", 1)
    return open_clip_scorer(architecture, pretrained, device)
