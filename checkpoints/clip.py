"""CLIP's towers in transformers' layout, and the tokenizer beside a text tower."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from checkpoints import configs
from checkpoints.cards import load
from checkpoints.files import naming, read_json, read_json_if_there
from checkpoints.fill import assemble
from checkpoints.folders import folder_of, has_config, module_from_config, weights_in
from checkpoints.names import image_names, text_names
from checkpoints.reader import File
from model.image_encoder import ImageConfig, ImageEncoder
from model.text_encoder import TextConfig, TextEncoder


def load_text_encoder(
    path: Path, dtype: torch.dtype | None = torch.float32, build: Callable[[TextConfig], TextEncoder] = TextEncoder
) -> TextEncoder:
    """A text tower: a file of our own, or a folder in transformers' layout with the tokenizer's folder beside it. `build` makes
    the empty tower of a config."""
    if not has_config(path):
        return load(path, build, TextConfig, dtype)
    folder = folder_of(path)
    pad = pad_of(folder.parent / "tokenizer")
    text = module_from_config(folder, build, lambda config: configs.text_config(config, pad), "a text encoder")
    return assemble_text(text, weights_in(path), "the text encoder of its config.json", dtype)


def assemble_text(text: TextEncoder, file: File, what: str, dtype: torch.dtype | None) -> TextEncoder:
    """Fills a text tower from transformers' names, with or without their prefix. Leaves out a whole CLIP's other parts, and a
    projection that the tower does not have."""
    file = file.without(r"vision_model\.|visual_projection\.|logit_scale$")
    if not text.config.output_dim:
        file = file.without(r"text_projection\.")
    prefix = "text_model." if any(name.startswith("text_model.") for name in file) else ""
    return assemble(text, text_names(text.state_dict(), text.config, prefix), file, what, dtype)


def pad_of(tokenizer: Path) -> int:
    """The token that fills up a prompt, of a tokenizer's folder; CLIP's end token without one."""
    with naming(tokenizer, "is not a tokenizer that is read"):
        words = None
        if (tokenizer / "vocab.json").exists():
            words = read_json(tokenizer / "vocab.json")
        elif (tokenizer / "tokenizer.json").exists():
            words = read_json(tokenizer / "tokenizer.json")["model"]["vocab"]
        settings, special = (
            read_json_if_there(tokenizer / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map")
        )
        return configs.pad_token(words, settings, special)


def load_image_encoder(
    path: Path, dtype: torch.dtype | None = torch.float32, build: Callable[[ImageConfig], ImageEncoder] = ImageEncoder
) -> ImageEncoder:
    """An image tower: a file of our own, a folder in transformers' layout or its file of weights, or such a folder of a whole CLIP.
    `build` makes the empty tower of a config."""
    if not has_config(path):
        return load(path, build, ImageConfig, dtype)
    image = module_from_config(folder_of(path), build, configs.image_config, "an image encoder")
    file = weights_in(path).without(r"text_model\.|text_projection\.|logit_scale$")
    names = image_names(image.state_dict(), image.config)
    return assemble(image, names, file, "the image encoder of its config.json", dtype)
