"""Inspect, convert and compare files of weights.

  python weights_convert.py inspect FILE              describe a file
  python weights_convert.py convert SOURCE TARGET     convert an adapter to the official .safetensors or .bin file, or a base model
                                                      to a folder in this project's own format
  python weights_convert.py convert --diffusers SOURCE TARGET     convert a base model, or a network of one, to a diffusers folder
  python weights_convert.py verify A B                compare two checkpoints of any layout, tensor by tensor

How the layouts correspond (the full tables are in checkpoints/names.py; tests/test_names.py checks that each is a bijection):

  here          diffusers, transformers            a single file (LDM)               sizes from
  UNet          unet/                              model.diffusion_model.*           unet/config.json, or the shapes
    down.n.res    down_blocks.i.resnets.j            input_blocks.n+1.0              n numbers all stages, i the levels
    down.n.attn   down_blocks.i.attentions.j         input_blocks.n+1.1
    mid.0, mid.1  mid_block.resnets.0, .1            middle_block.0, .2
    up.n          up_blocks.i.resnets.j              output_blocks.n.0
  VAE           vae/                               first_stage_model.*               vae/config.json, or the shapes
    decoder.up    up_blocks.i, from the smallest     decoder.up.i, from the largest
  TextEncoder   text_encoder/, tokenizer/          cond_stage_model.transformer.*    config.json, or the shapes
    attn.in_proj  q_proj, k_proj, v_proj             the same                        three matrices become one
                  SD 2.x: the same                   cond_stage_model.model.*          here the names are ours
                  SDXL: and text_encoder_2/          conditioner.embedders.i.*
  ImageEncoder  image_encoder/                     -                                 config.json

  ControlNet    controlnet/                        control_model.*, or without it   config.json, or the shapes
    its encoder   as the UNet's                       as the UNet's
    hint.n        controlnet_cond_embedding.*         input_hint_block.n
    zero.n        controlnet_down_blocks.n            zero_convs.n.0
  T2IAdapter    adapter.body.i.resnets.j            body.n (official file)           config.json, or the shapes

  here                        the official adapter, and diffusers'             the official trainer
  image_projection.*          image_proj.*                                     image_proj_model.*
    of FaceID Plus              image_proj.perceiver_resampler.*
  to_k.i, to_v.i (layer i)    ip_adapter.n.to_k_ip, to_v_ip: n = 1, 3, 5, ...  adapter_modules.n.*, or unet.*.processor.*
                              in the order down, up, mid

The project's own format is a safetensors file with the names of the first column, and a JSON card beside it. Loading is strict: a
tensor that is missing, unknown, not finite or of the wrong shape is an error. Only tensors are unpickled.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="weights_convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    description = "Describe each file or folder of weights, and list what is missing or odd."
    i = commands.add_parser("inspect", help="describe files", description=description)
    i.add_argument("files", type=Path, nargs="+", metavar="FILE", help="weights, a file or a folder")
    description = "Convert an adapter to the official layout; a base model, one of its networks or a control to this project's format."
    c = commands.add_parser("convert", help="convert weights to another layout", description=description)
    c.add_argument("source", type=Path, help="a file or folder of weights")
    c.add_argument("target", type=Path, help="TARGET.safetensors (an adapter also TARGET.bin), or a folder")
    c.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: keep the dtype of each tensor")
    c.add_argument("--ema", action="store_true", help="use the EMA copy of the UNet in a single file")
    about = "what the UNet predicts, for a single file of Stable Diffusion 2.x, which does not say it"
    c.add_argument("--prediction", choices=("epsilon", "v"), help=about)
    about = (
        "write the folder TARGET that diffusers loads with from_pretrained: of a base model a whole pipeline, of a network or a control "
        "its config.json and weights (then nothing says whether a UNet predicts epsilon or v: in diffusers the scheduler does)"
    )
    c.add_argument("--diffusers", action="store_true", help=about)
    description = "Compare two checkpoints of any layout, tensor by tensor. Exits with 1 if they differ."
    v = commands.add_parser("verify", help="compare two checkpoints", description=description)
    v.add_argument("a", type=Path, help="a file or folder of weights")
    v.add_argument("b", type=Path, help="another file or folder of weights")
    return p


def inspect_all(files: list[Path]) -> None:
    """Describe all files. If some are not supported, describe the others, then exit with the errors."""
    from checkpoints.describe import inspect

    errors = []
    for path in files:
        try:
            print("\n  ".join([str(path), *inspect(path)]))
        except (ValueError, OSError) as error:
            errors.append(f"error: {error}")
    if errors:
        sys.exit("\n".join(errors))


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    import torch  # imported after the arguments are parsed, because it takes seconds

    from checkpoints.convert import convert, verify
    from checkpoints.describe import inspect

    if args.command == "inspect":
        inspect_all(args.files)
        return
    try:
        if args.command == "convert":
            dtype = getattr(torch, args.dtype) if args.dtype else None
            convert(args.source, args.target, dtype, args.ema, args.diffusers, args.prediction)
            print("\n  ".join([str(args.target), *inspect(args.target)]))
        elif lines := verify(args.a, args.b):
            sys.exit("\n".join(lines))
        else:
            print("equal, bit for bit")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
