"""Load CLIP's text and image encoders, and read the padding token from a tokenizer's folder."""

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
    """Load a text encoder from a file in this project's own format, or from a folder in transformers' layout.

    In transformers' layout, the folder `tokenizer` must be beside it unless the padding token is CLIP's (`tokenizer_2` beside
    `text_encoder_2`). `build` makes the module from its config.
    """
    if not has_config(path):
        return load(path, build, TextConfig, dtype)
    folder = folder_of(path)
    pad = padding_token(folder.parent / ("tokenizer_2" if folder.name == "text_encoder_2" else "tokenizer"))
    text = module_from_config(folder, build, lambda config: configs.text_config(config, pad), "a text encoder")
    return assemble_text(text, weights_in(path), "the text encoder of its config.json", dtype)


def assemble_text(text: TextEncoder, file: File, what: str, dtype: torch.dtype | None) -> TextEncoder:
    """Fill a text encoder with tensors that have transformers' names, with or without the prefix `text_model.`.

    Ignores the image encoder of a full CLIP model, and the text projection if `text` has none.
    """
    file = file.without(r"vision_model\.|visual_projection\.|logit_scale$")
    if not text.config.output_dim:
        file = file.without(r"text_projection\.")
    prefix = "text_model." if any(name.startswith("text_model.") for name in file) else ""
    return assemble(text, text_names(text.state_dict(), text.config, prefix), file, what, dtype)


def assemble_open_clip(text: TextEncoder, file: File, what: str, dtype: torch.dtype | None) -> TextEncoder:
    """Fill a text encoder with tensors that have open_clip's names, as in a single file of SD 2.x and SDXL.

    Ignores layers after those that `text` has (SD 2.x does not use the last one), and the text projection if `text` has none.
    """
    unused = rf"logit_scale$|transformer\.resblocks\.{text.config.layers}\."
    file = file.without(unused if text.config.output_dim else rf"{unused}|text_projection$")
    return assemble(text, {name: (name.removeprefix("clip."),) for name in text.state_dict()}, file, what, dtype)


def padding_token(tokenizer: Path) -> int:
    """Read the padding token from a tokenizer's folder. It is CLIP's end token if there is no such folder."""
    with naming(tokenizer, "is not a supported tokenizer"):
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
    """Load an image encoder from a file in this project's own format, or from a folder in transformers' layout.

    The folder may contain a full CLIP model, and `path` may also be a weights file in it. `build` makes the module from
    its config.
    """
    if not has_config(path):
        return load(path, build, ImageConfig, dtype)
    image = module_from_config(folder_of(path), build, configs.image_config, "an image encoder")
    file = weights_in(path).without(r"text_model\.|text_projection\.|logit_scale$")
    names = image_names(image.state_dict(), image.config)
    return assemble(image, names, file, "the image encoder of its config.json", dtype)
