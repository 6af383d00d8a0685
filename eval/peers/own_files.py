"""Draw one picture from your own files, here and in diffusers, and compare them.  `python -m eval parity --checkpoint FILE ...`

Both read the same base model, adapter, image encoder and picture (for FaceID a file of faces), with the same noise, text and sampler: DDIM,
or Euler for SDXL, in float32. diffusers reads a folder of its own directly, and other base models after `convert --diffusers`.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from checkpoints.adapters import adapter_file, own_updates, projection_of
from checkpoints.diffusers_folder import save_pipeline
from checkpoints.hub import locate
from checkpoints.stable_diffusion import load_base, scheduler_config, unet_config
from model.image_projection import FacePlus
from model.words import Prediction
from sampling.ddim import DDIM
from sampling.euler import EULER
from sampling.faces import Faces, read_faces
from sampling.images import open_image, to_images
from sampling.loading import load

NEGATIVE, SCALE, GUIDANCE = "blurry", 0.8, 7.5


@dataclass(frozen=True)
class Files:
    """The files to draw from; `image` is a picture or a file of faces. Without an adapter, the text alone is drawn."""

    checkpoint: Path
    adapter: Path | None = None
    encoder: Path | None = None
    image: Path | None = None
    prediction: Prediction | None = None

    @property
    def faces(self) -> Faces | None:
        """The faces, if `image` is a file of them."""
        return read_faces(self.image) if self.image and self.image.suffix == ".safetensors" else None

    def check(self) -> None:
        """Raise ValueError or ModuleNotFoundError unless diffusers can draw from these files."""
        for package in ("diffusers", "transformers"):
            _need(package)
        config = unet_config(self.checkpoint)
        if config.in_channels != config.out_channels:
            raise ValueError(f"{self.checkpoint} is for inpainting, which this comparison does not draw: use an ordinary base model")
        if self.adapter is None:
            return
        file = adapter_file(self.adapter)
        projection = projection_of(file)
        if self.image is None:
            raise ValueError(f"{self.adapter} needs an image prompt: name a picture, or for FaceID a file of faces, with --image")
        if projection.reads.face and self.faces is None:
            raise ValueError(f"{self.adapter} reads face embeddings: name a file of them with --image (see docs/drawing.md)")
        if self.faces:
            self.faces.check(projection)
        if projection.reads.needs_encoder and not (self.encoder and (self.encoder / "config.json").is_file()):
            raise ValueError(f"{self.adapter} needs an image encoder as a folder with a config.json: name it with --image-encoder")
        if isinstance(projection, FacePlus) and projection.tokens != 4:
            raise ValueError(f"{self.adapter} has {projection.tokens} tokens, but diffusers has FaceID Plus only with 4: use another one")
        if own_updates(file):
            _need("peft")  # without it diffusers leaves out the LoRA


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise ModuleNotFoundError(name=package)


@torch.no_grad()
def ours(files: Files, prompt: str, size: tuple[int, int], steps: int) -> np.ndarray:
    """Draw here. Return the picture, `H W 3` from 0 to 255."""
    pipe = load(files.checkpoint, files.adapter or [], files.encoder, prediction=files.prediction)
    sampler = EULER if pipe.unet.config.added_dim else DDIM
    embedding = pipe.embed(files.image) if files.adapter and files.image else None
    picture = pipe.sample(prompt, 0, embedding, NEGATIVE, SCALE, GUIDANCE, steps, size=size, sampler=sampler)
    return np.asarray(next(iter(to_images(picture)))).astype(int)


@torch.no_grad()
def theirs(files: Files, prompt: str, size: tuple[int, int], steps: int) -> np.ndarray:
    """Draw in diffusers."""
    pipe, arguments = _pipeline(files), dict[str, Any]()
    if files.adapter and files.image:
        _add_adapter(pipe, files)
        pipe.set_ip_adapter_scale(SCALE)
        arguments = _image_prompt(pipe, files)
    pipe.check_inputs = lambda *_, **__: None  # it wants multiples of 8, whatever the VAE's factor
    arguments |= {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": GUIDANCE}
    picture = pipe(prompt, negative_prompt=NEGATIVE, generator=torch.Generator().manual_seed(0), **arguments).images[0]
    return np.asarray(picture).astype(int)


def _pipeline(files: Files) -> Any:
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    xl = unet_config(files.checkpoint).added_dim > 0
    kind: Any = StableDiffusionXLPipeline if xl else StableDiffusionPipeline
    scheduler: Any = EulerDiscreteScheduler if xl else DDIMScheduler
    with TemporaryDirectory() as name:
        folder = files.checkpoint
        if not (folder / "model_index.json").is_file():
            folder = Path(name) / "pipeline"
            save_pipeline(load_base(files.checkpoint, None, files.prediction), scheduler_config(files.checkpoint), folder)
        pipe = kind.from_pretrained(folder, torch_dtype=torch.float32, **{"add_watermarker": False} if xl else {"safety_checker": None})
    settings = {"prediction_type": "v_prediction" if files.prediction == "v" else "epsilon"} if files.prediction else {}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config | settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _add_adapter(pipe: Any, files: Files) -> None:
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    assert files.adapter is not None
    if files.encoder and projection_of(adapter_file(files.adapter)).reads.needs_encoder:
        encoder: Any = CLIPVisionModelWithProjection.from_pretrained(files.encoder, dtype=torch.float32)
        side = encoder.config.image_size
        processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
        pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    path = files.adapter.resolve()
    pipe.load_ip_adapter(str(path.parent), subfolder="", weight_name=path.name, image_encoder_folder=None)


def _image_prompt(pipe: Any, files: Files) -> dict[str, Any]:
    """Return the arguments of diffusers' pipeline for the image prompt; the unconditional side reads the null image."""
    assert files.adapter is not None and files.image is not None
    if (faces := files.faces) is None:
        return {"ip_adapter_image": [[open_image(files.image)]]}
    projection = projection_of(adapter_file(files.adapter))
    raw = faces.check(projection).raw
    embeddings = faces.embeddings if raw else faces.embeddings / faces.embeddings.norm(dim=-1, keepdim=True)
    both = torch.stack([torch.zeros_like(embeddings), embeddings])
    if isinstance(projection, FacePlus):
        pixels = pipe.feature_extractor(list(faces.pictures), return_tensors="pt").pixel_values
        fine = [pipe.image_encoder(each, output_hidden_states=True).hidden_states[-2] for each in (torch.zeros_like(pixels), pixels)]
        layer = pipe.unet.encoder_hid_proj.image_projection_layers[0]
        layer.clip_embeds, layer.shortcut = torch.stack(fine), projection.shortcut
    elif raw:
        both = both[:, :, None]
    return {"ip_adapter_image_embeds": [both]}


def compare(files: Files, prompt: str, size: tuple[int, int], steps: int) -> str:
    """Draw with both; say how large the largest difference is, in grey levels, and where. Raises ValueError as `Files.check` does."""
    files.check()
    here = ours(files, prompt, size, steps)
    gc.collect()
    differences = np.abs(here - theirs(files, prompt, size, steps)).max(axis=-1)
    y, x = np.unravel_index(differences.argmax(), differences.shape)
    share = f"{100 * (differences > 1).mean():.2f} % of the pixels differ by more than 1"
    return f"largest difference {differences.max()} of 255 grey levels, at x = {x}, y = {y}; {share}"


def run(args: Namespace) -> None:
    """`python -m eval parity --checkpoint FILE`"""
    checkpoint, adapter, encoder = (path and locate(path) for path in (args.checkpoint, args.ip_adapter, args.image_encoder))
    print(compare(Files(checkpoint, adapter, encoder, args.image, args.prediction), args.prompt, (8 * args.side,) * 2, args.steps))
