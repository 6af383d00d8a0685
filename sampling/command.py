"""Run a Command: read its files, check them, load the model, draw, write."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from checkpoints.adapters import adapter_file, projection_of
from checkpoints.controls import check_fit, open_control
from checkpoints.files import check_output
from checkpoints.hub import locate
from checkpoints.stable_diffusion import scheduler_config, unet_config
from model.fast import fasten
from model.features import FACE_AND_FINE, FINE, NO_FACE
from sampling.device import check_device
from sampling.embeddings import load_embedding, save_embedding
from sampling.faces import read_faces
from sampling.fields import check_seed, map_paths
from sampling.images import check_png, save_image
from sampling.inputs import Inputs, PromptInputs, read_inputs
from sampling.layer_weights import layer_weights
from sampling.loading import compile_unet, load, prompt_files
from sampling.machine import check_keep_memory, keep_memory
from sampling.pipeline import SAMPLERS, Pipeline
from sampling.record import digests, recall, record, used_files
from sampling.request import Command, Model, Request
from sampling.scheduler_file import other_scheduler


def run(command: Command) -> None:
    """Draw and write `num` pictures. Raises ValueError or OSError for invalid input."""
    request, model = recall(command.again) if command.again else (command.request, command.model)
    # "." becomes a full path, so that the recorded names of the files in it start with a folder
    model = map_paths(model, lambda path: Path.cwd() if path == Path(".") else path)
    model = map_paths(model, partial(locate, download=command.download))
    check_seed(request.seed + command.num - 1)
    check_png(command.out)
    if command.save_embedding:
        if len(request.image_prompts) != 1:
            raise ValueError("--save-embedding writes one adapter's image prompt: name it with --image")
        check_output(command.save_embedding)
    inputs = read_inputs(request)
    check_model(inputs, model)
    check_outputs(command, request, model)
    check_machine(command, model)
    config, sampler = scheduler_config(model.checkpoint), SAMPLERS[request.sampler]
    if other := other_scheduler(config, sampler):
        print(f"note: the base model's scheduler file names {other}; drawing with {sampler.name}, {sampler.peer}", file=sys.stderr)
    pipeline = load_model(model, command.device, command.copy, command.low_memory)
    if command.fast:
        pipeline = replace(pipeline, unet=fasten(pipeline.unet))
    if command.compile:
        pipeline = replace(pipeline, unet=compile_unet(pipeline.unet))
    if command.keep_memory:
        keep_memory()
    if command.save_embedding:
        save_embedding(pipeline.embed(inputs.image_prompts[0].pictures, request.fit), command.save_embedding)
    hashes = digests(request, model)
    write(pipeline, inputs, command, lambda i: record(replace(request, seed=request.seed + i), model, hashes))


def check_outputs(command: Command, request: Request, model: Model) -> None:
    """Raise ValueError if a file to write is one that is read, or is written twice."""
    taken = {path.resolve() for path in [*used_files(request, model), *([command.again] if command.again else [])]}
    embedding = [command.save_embedding] if command.save_embedding else []
    for path in [*(picture_file(command, i) for i in range(command.num)), *embedding]:
        if path.resolve() in taken:
            option = "--save-embedding" if path in embedding else "--out"
            raise ValueError(f"{path} is also read or written for this drawing, and would be lost: give {option} another name")
        taken.add(path.resolve())


def picture_file(command: Command, index: int) -> Path:
    """Return the name of the picture `index` of `num`."""
    return command.out.with_stem(f"{command.out.stem}-{index}") if command.num > 1 else command.out


def write(pipeline: Pipeline, inputs: Inputs, command: Command, settings: Callable[[int], dict[str, Any]]) -> None:
    """Write each picture, with its settings, as soon as it is drawn. Ctrl-C exits with a message."""
    count, total = 0, inputs.steps * len(pipeline.batches(inputs, command.num))
    try:
        with tqdm(total=total, desc="drawing", unit="step", disable=None) as bar:
            for picture in pipeline.series(inputs, command.num, lambda _: bar.update() and None):
                path = picture_file(command, count)
                save_image(picture, path, settings(count))
                count += 1
                bar.write(str(path))
    except KeyboardInterrupt:
        raise SystemExit(f"stopped; {count} of {command.num} written") from None


def load_model(model: Model, device: str, copy: bool = False, low_memory: bool = False) -> Pipeline:
    """Load the pipeline of a Model. `copy`, `low_memory`: as in `load`."""
    return load(
        model.checkpoint,
        model.adapters or None,
        model.image_encoder,
        dtype=getattr(torch, model.dtype),
        device=device,
        prediction=model.prediction,
        vae=model.vae,
        controls=model.controls,
        copy=copy,
        low_memory=low_memory,
        loras=[(lora.path, lora.scale) for lora in model.loras],
        face_lora_scale=model.face_lora_scale,
        face_structure_scale=model.face_structure_scale,
    )


def check_model(inputs: Inputs, model: Model) -> None:
    """Raise ValueError or OSError if the model cannot read the image prompts or hints. This reads only the headers of its files."""
    for path, hint in zip(model.controls, inputs.hints, strict=True):
        network = open_control(path).control
        check_fit(network, unet_config(model.checkpoint), path)
        hint.check(network)
    inputs.micro.check(unet_config(model.checkpoint))
    prompts = inputs.image_prompts
    adapters, encoder = prompt_files(model.checkpoint, model.adapters or None, model.image_encoder)
    needs_encoder = [check_prompt(prompt, adapter, model.checkpoint) for prompt, adapter in zip(prompts, adapters, strict=False)]
    if prompts and not (adapters and (encoder or not any(needs_encoder))):
        missing = "--image-encoder" if adapters else "--ip-adapter"
        raise FileNotFoundError(
            f"an image prompt needs {missing}, because {model.checkpoint} has none; `make weights` trains the mini ones"
        )


def check_prompt(prompt: PromptInputs, adapter: Path, checkpoint: Path) -> bool:
    """Return whether this image prompt needs the image encoder. Raises ValueError if the adapter can't read its pictures."""
    if prompt.scale.layers is not None:
        layer_weights(prompt.scale.layers, unet_config(checkpoint))
    projection = projection_of(adapter_file(adapter))
    needs_encoder = not prompt.negatives and projection.reads in (FINE, FACE_AND_FINE)  # for the null image
    for one in (*prompt.pictures, *prompt.negatives):
        if isinstance(one, Path) and (faces := read_faces(one)):
            needs_encoder |= faces.check(projection).needs_encoder
        elif isinstance(one, Path):
            load_embedding(one, projection)
        elif projection.reads.face:
            raise ValueError(NO_FACE)
        else:
            needs_encoder = True
    return needs_encoder


def check_machine(command: Command, model: Model) -> None:
    """Raise ValueError if the device is missing, or if this machine or the fast UNet cannot do what the options ask for."""
    device = check_device(command.device)
    compilers = [os.environ.get("CXX", "g++")] if device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if command.compile and not any(map(shutil.which, compilers)):
        raise ValueError(f"--compile needs {compilers[0]}, which is not installed: install it, or leave out --compile")
    if command.fast and (command.compile or device != "cpu" or model.dtype == "float16"):
        raise ValueError("--fast is for a CPU, in float32 or bfloat16 and without --compile: leave it out, or the others")
    if command.low_memory and command.compile:
        raise ValueError("--low-memory moves the weights that --compile would keep in place: leave out one of them")
    if command.keep_memory:
        check_keep_memory()
