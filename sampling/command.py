"""Run a Command: read its files, check them, load the model, draw, write."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from checkpoints.adapters import adapter_file, projection_of
from checkpoints.controls import check_fit, open_control
from checkpoints.files import check_output
from checkpoints.stable_diffusion import unet_config
from model.fast import fasten
from sampling.device import check_device
from sampling.embeddings import load_embedding, save_embedding
from sampling.images import check_png, save_image
from sampling.inputs import Inputs, read_inputs
from sampling.layer_weights import layer_weights
from sampling.machine import check_keep_memory, keep_memory
from sampling.options import Command
from sampling.pipeline import Pipeline, compiled, load, prompt_files
from sampling.record import digests, recall, record
from sampling.request import Model, check_seed, map_paths


def run(command: Command) -> None:
    """Draw and write `num` pictures. Raises ValueError or OSError for invalid input."""
    request, model = recall(command.again) if command.again else (command.request, command.model)
    # "." becomes a full path, so that the recorded names of the files in it start with a folder
    model = map_paths(model, lambda path: Path.cwd() if path == Path(".") else path)
    check_seed(request.seed + command.num - 1)
    check_png(command.out)
    if command.save_embedding:
        if len(request.image_prompts) != 1:
            raise ValueError("--save-embedding writes one adapter's image prompt: name it with --image")
        check_output(command.save_embedding)
    inputs = read_inputs(request)
    check_model(inputs, model)
    check_machine(command, model)
    pipeline = load_model(model, command.device, command.copy)
    if command.fast:
        pipeline = replace(pipeline, unet=fasten(pipeline.unet))
    if command.compile:
        pipeline = replace(pipeline, unet=compiled(pipeline.unet))
    if command.keep_memory:
        keep_memory()
    if command.save_embedding:
        save_embedding(pipeline.embed(inputs.image_prompts[0].pictures, request.fit), command.save_embedding)
    hashes = digests(request, model)
    write(pipeline, inputs, command, lambda i: record(replace(request, seed=request.seed + i), model, hashes))


def write(pipeline: Pipeline, inputs: Inputs, command: Command, settings: Callable[[int], dict[str, Any]]) -> None:
    """Write each picture, with its settings, as soon as it is drawn. Ctrl-C exits with a message."""
    written, request = 0, inputs.request
    steps = request.steps - (inputs.edit.start(request.steps) if inputs.edit else 0)
    total = steps * len(pipeline.batches(inputs, command.num))
    try:
        with tqdm(total=total, desc="drawing", unit="step", disable=None) as bar:
            for picture in pipeline.series(inputs, command.num, lambda _: bar.update() and None):
                path = command.out
                if command.num > 1:
                    path = path.with_stem(f"{path.stem}-{written}")
                save_image(picture, path, settings(written))
                written += 1
                bar.write(str(path))
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {written} of {command.num} written") from None


def load_model(model: Model, device: str, copy: bool = False) -> Pipeline:
    """Load the pipeline of a Model. `copy`: as in `load`."""
    adapters, dtype = model.adapters or None, getattr(torch, model.dtype)
    files = model.checkpoint, adapters, model.image_encoder
    return load(*files, dtype, device, model.prediction, model.vae, model.controls, copy)


def check_model(inputs: Inputs, model: Model) -> None:
    """Raise ValueError or OSError if the model cannot read the image prompts or hints. This reads only the headers of its files."""
    for path, hint in zip(model.controls, inputs.hints, strict=True):
        network = open_control(path).control
        check_fit(network, unet_config(model.checkpoint), path)
        hint.check(network)
    prompts = inputs.image_prompts
    adapters, encoder = prompt_files(model.checkpoint, model.adapters or None, model.image_encoder)
    pictures = [one for prompt in prompts for one in (*prompt.pictures, *prompt.negatives)]
    if prompts and not (adapters and (encoder or not any(isinstance(one, Image.Image) for one in pictures))):
        missing = "--image-encoder" if adapters else "--ip-adapter"
        raise FileNotFoundError(
            f"an image prompt needs {missing}, because {model.checkpoint} has none; `make weights` trains the mini ones"
        )
    for prompt, adapter in zip(prompts, adapters, strict=False):
        if prompt.scale.layers is not None:
            layer_weights(prompt.scale.layers, unet_config(model.checkpoint))
        if saved := [one for one in (*prompt.pictures, *prompt.negatives) if isinstance(one, Path)]:
            projection = projection_of(adapter_file(adapter))
            for path in saved:
                load_embedding(path, projection)


def check_machine(command: Command, model: Model) -> None:
    """Raise ValueError if the device is missing, or if this machine or the fast UNet cannot do what the options ask for."""
    device = check_device(command.device)
    compilers = [os.environ.get("CXX", "g++")] if device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if command.compile and not any(map(shutil.which, compilers)):
        raise ValueError(f"--compile needs {compilers[0]}, which is not installed: install it, or leave out --compile")
    if command.fast and (command.compile or device != "cpu" or model.dtype == "float16"):
        raise ValueError("--fast is for a CPU, in float32 or bfloat16 and without --compile: leave it out, or the others")
    if command.keep_memory:
        check_keep_memory()
