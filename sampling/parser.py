"""The parser of `python -m sampling`. Options that are not given keep the defaults of Request and Model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from model.words import Fit, Prediction
from sampling.following import Following, FollowingControl, FollowingLora, flag
from sampling.request import (
    STRENGTH,
    Command,
    DtypeName,
    HintFile,
    ImagePrompt,
    LoraFile,
    Model,
    NoiseLevels,
    Request,
    Rule,
    SamplerName,
)

MACHINE = {  # options that do not change the picture, but how it is computed
    "compile": "Compile the UNet: slow to start, then faster.",
    "fast": "Draw with the fast form of the UNet: needs a CPU, takes more memory and a minute more to start.",
    "keep_memory": "Keep freed memory in this process, which saves the time to get it again (Linux with glibc).",
    "download": "Download models, named as owner/name or owner/name/path, that are not in the Hugging Face cache.",
    "low_memory": "Keep one network at a time on the device, and decode large pictures in strips: slower, for a small GPU.",
    "copy": "Copy the weights into memory, so that their files may be overwritten while the program runs.",
}


def layers(text: str) -> Any:
    """Parse the value of --image-layers: a preset's name, or JSON."""
    try:
        return json.loads(text) if text[:1] in ("{", "[") else text
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text[:60]} is not JSON ({error})") from None


def parser(about: str | None = None) -> argparse.ArgumentParser:
    """Return the parser. `about` describes the command."""
    p = argparse.ArgumentParser(
        prog="python -m sampling",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    _picture(p.add_argument_group("picture", "Image prompts. Of several --ip-adapter, each takes those that follow it."))
    _text(p.add_argument_group("text"))
    _micro(p.add_argument_group("size", "SDXL's size conditioning: the size and crop that a training picture would have had."))
    _control(p.add_argument_group("structure", "Controls. Of several --control, each takes those that follow it."))
    _edit(p.add_argument_group("edit", "Start from a picture instead of noise."))
    _sampler(p.add_argument_group("sampler"))
    _files(p.add_argument_group("files"))
    return p


def _picture(group: Any) -> None:
    def add(name: str, about: str, kind: Any = float, **options: Any) -> None:
        options |= {"metavar": "FILE"} if kind is Path else {}
        group.add_argument(name, type=kind, action=Following, help=about, **options)

    add(
        "--image",
        "Picture to use as the image prompt, or a file of --save-embedding. Give it again to add pictures.",
        Path,
    )
    add("--scale", f"Lambda, the weight of the image prompt (Eq. 8). Default {ImagePrompt.scale:g}.")
    add("--negative-image", "Negative image prompt, for the unconditional pass. May be given again.", Path)
    add("--image-weight", "Weight of one picture. Give one for each, in the same order; a file of --save-embedding may hold several.")
    add(
        "--image-rule",
        "What the weights multiply: what is read from each picture (output, as in diffusers), its embedding (as in "
        f"ComfyUI_IPAdapter_plus), or its tokens (as in refiners). Default {ImagePrompt.rule}.",
        str,
        choices=get_args(Rule),
    )
    add(
        "--image-layers",
        "Layers in which the image prompt acts: style or layout (the blocks of InstantStyle), finest (the finest level, which "
        "carries the colours in the mini world), a JSON list with a weight for each cross-attention layer, "
        """or diffusers' blocks, as in '{"up": {"block_1": [0, 1, 0]}}'. Default: all alike.""",
        layers,
    )
    add("--image-start", "Begin to use the image prompt after this share of the steps. Default 0.")
    add("--image-end", "Stop using the image prompt after this share of the steps. Default 1.")
    add(
        "--image-mask",
        "Picture that shows where the image prompt acts: fully in white, not at all in black or where it is transparent. "
        "It may have any size.",
        Path,
    )
    about = f"How to make a picture square: crop the middle, squash it, or pad it. Default {Request.fit}."
    group.add_argument("--fit", choices=get_args(Fit), help=about)
    about = "Guidance weight of the image prompt alone; --guidance is then that of the text alone."
    group.add_argument("--image-guidance", type=float, help=about)


def _text(group: Any) -> None:
    group.add_argument("--prompt", help="Text prompt.")
    group.add_argument("--negative-prompt", help="Negative text prompt, for the unconditional pass.")
    about = f"w, the guidance weight (Eq. 7). Default {Request.guidance:g}."
    group.add_argument("--guidance", type=float, help=about)


def _micro(group: Any) -> None:
    def add(name: str, pair: tuple[str, str], about: str) -> None:
        group.add_argument(name, type=int, nargs=2, metavar=pair, help=about)

    size = ("WIDTH", "HEIGHT")
    add("--original-size", size, "Size of the file before it was resized; a small one is drawn blurred. Default: the drawing's.")
    add("--crop-corner", ("LEFT", "TOP"), "Corner of the part that was cut out of it. Default 0 0: nothing is cut off.")
    add("--target-size", size, "Size of that part. Default: the drawing's.")
    about = "Let the unconditional pass read zeros (as SDXL was trained) instead of the encoded empty text (as IP-Adapter was)."
    group.add_argument("--zero-negative", action="store_true", help=about)


def _control(group: Any) -> None:
    def add(name: str, about: str, **options: Any) -> None:
        group.add_argument(name, action=FollowingControl, help=about, **options)

    about = "ControlNet or T2I-Adapter: an official file, a diffusers folder, or a file of this project. May be given again."
    group.add_argument("--control", type=Path, metavar="FILE", action="append", help=about)
    about = "Picture that the control reads, such as edges, white on black. It is stretched to the size of the drawing."
    add("--hint", about, type=Path, metavar="FILE")
    add("--control-scale", f"How strongly the control acts. Default {HintFile.scale:g}.", type=float)
    add("--control-start", "Begin to use the control after this share of the steps. Default 0.", type=float)
    add("--control-end", "Stop using the control after this share of the steps. Default 1.", type=float)
    about = "Guess mode of a ControlNet, to draw without a prompt: it acts in the conditional pass alone."
    add("--guess", about, nargs=0, const=True)


def _edit(group: Any) -> None:
    group.add_argument(
        "--init-image", type=Path, metavar="FILE", help="Picture to change. It sets the width and height."
    )
    about = f"How much to change it: the fraction of the steps to run, above 0 and at most 1. Default {STRENGTH}, with --mask 1."
    group.add_argument("--strength", type=float, help=about)
    about = "Picture that shows where to repaint: white yes, black or transparent no. It has the size of --init-image."
    group.add_argument("--mask", type=Path, metavar="FILE", help=about)
    about = "With --mask: do not put the old pixels back where the mask is black."
    group.add_argument("--no-paste", dest="paste", action="store_false", help=about)
    about = "Cut the middle of --init-image and --mask to --width and --height, or to the largest size that can be drawn."
    group.add_argument("--crop", action="store_true", help=about)


def _sampler(group: Any) -> None:
    group.add_argument("--steps", type=int, help=f"Number of steps. Default {Request.steps}.")
    about = "DDIM, DPM-Solver++(2M), which needs fewer steps, Euler's method, or LCM, for a base with an LCM-LoRA."
    group.add_argument("--sampler", choices=get_args(SamplerName), help=f"{about} Default {Request.sampler}.")
    about = "Noise levels of dpm++ and euler: karras is what is called DPM++ 2M Karras. Default: those of the scheduler file."
    group.add_argument("--schedule", choices=get_args(NoiseLevels), help=about)
    group.add_argument("--eta", type=float, help="Noise added in each step of ddim: 0 is DDIM, 1 is DDPM. Default 0.")
    group.add_argument("--seed", type=int, help="Seed of the noise; picture i uses seed + i. Default 0.")
    group.add_argument("--num", type=int, help="Number of pictures. Default 1.")
    group.add_argument("--width", type=int, help="Width in pixels. Default: what the base model was trained at.")
    group.add_argument("--height", type=int, help="Height in pixels. Default: what the base model was trained at.")


def _files(group: Any) -> None:
    def add(name: str, about: str, kind: Any = Path, **options: Any) -> None:
        options |= {"metavar": "FILE"} if kind is Path else {}
        group.add_argument(name, type=kind, help=about, **options)

    add(
        "--checkpoint",
        "Base model: Stable Diffusion as one file or as a diffusers folder, a folder of this project, or owner/name of one in the "
        "Hugging Face cache. Default: the mini weights.",
    )
    about = "Official adapter file. Default: the one in the folder of --checkpoint. Give it again to add adapters."
    group.add_argument("--ip-adapter", type=Path, metavar="FILE", action="append", help=about)
    add("--image-encoder", "Image encoder: a folder, or a file of this project. Default: the one in --checkpoint.")
    about = "LoRA file to merge into the base model. May be given again; each is followed by its own --lora-scale."
    group.add_argument("--lora", type=Path, metavar="FILE", action="append", help=about)
    about = f"Factor of the LoRA. Default {LoraFile.scale:g}."
    group.add_argument("--lora-scale", type=float, action=FollowingLora, help=about)
    add("--face-lora-scale", f"Factor of the LoRA inside a FaceID adapter. Default {Model.face_lora_scale:g}.", float)
    about = f"Weight of the face's structure in FaceID PlusV2. Default {Model.face_structure_scale:g}."
    add("--face-structure-scale", about, float)
    add("--vae", "Autoencoder to use instead of the base model's own.")
    add("--prediction", "What the UNet predicts, where its files do not say it.", str, choices=get_args(Prediction))
    add("--dtype", f"Precision. Default {Model.dtype}.", str, choices=get_args(DtypeName))
    add("--device", f"Device, such as cuda or mps. Default {Command.device}.", str)
    for name, about in MACHINE.items():
        group.add_argument(flag(name), action="store_true", help=about)
    add("--out", f"PNG file to write; with --num, {Command.out.stem}-0.png and so on. Default {Command.out}.")
    add("--save-embedding", "Also write the embedding of the image prompt to this safetensors file; --image reads it.")
    add(
        "--again",
        "PNG that this program wrote: draw it again, to --out. All settings come from the picture, so only --out, "
        f"--save-embedding, --device, {', '.join(map(flag, MACHINE))} go with it.",
    )
    group.add_argument("-h", "--help", action="help", help="Show this help.")
