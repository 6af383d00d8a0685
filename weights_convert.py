"""Files of weights: what each layout calls the parts of these networks; and a command that inspects, converts and compares.

  python weights_convert.py inspect FILE              says what a file is
  python weights_convert.py convert SOURCE TARGET     an adapter to the official .safetensors, a base model to a folder of our own
  python weights_convert.py convert --diffusers UNET TARGET     a UNet to the folder of a diffusers UNet2DConditionModel
  python weights_convert.py verify A B                compares two checkpoints tensor by tensor, whatever their layouts

What maps onto what (the tables are in checkpoints/names.py; tests/test_names.py proves that each is a bijection):

  here          diffusers, transformers            a single file (LDM)               sizes from
  UNet          unet/                              model.diffusion_model.*           unet/config.json, or the shapes
    down.n.res    down_blocks.i.resnets.j            input_blocks.n+1.0              n counts all stages, i levels
    down.n.attn   down_blocks.i.attentions.j         input_blocks.n+1.1
    mid.0, mid.1  mid_block.resnets.0, .1            middle_block.0, .2
    up.n          up_blocks.i.resnets.j              output_blocks.n.0
  VAE           vae/                               first_stage_model.*               vae/config.json, or the shapes
    decoder.up    up_blocks.i, from the smallest     decoder.up.i, from the largest
  TextEncoder   text_encoder/, tokenizer/          cond_stage_model.transformer.*    config.json, or the shapes
    attn.in_proj  q_proj, k_proj, v_proj             the same                        three matrices are joined into one
  ImageEncoder  image_encoder/                     -                                 config.json

  here                        the official adapter, and diffusers'             the official trainer
  image_projection.*          image_proj.*                                     image_proj_model.*
  to_k.i, to_v.i (layer i)    ip_adapter.n.to_k_ip, to_v_ip: n = 1, 3, 5, ...  adapter_modules.n.*, or unet.*.processor.*
                              in the order down, up, mid

The project's own files are safetensors with the names in the first column, and a JSON card beside each. Loads are strict: a
tensor that is missing, unknown, misshapen or not finite is an error. Only tensors are ever unpickled.
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
    does = "Say what each file or folder of weights is, and what is missing or odd."
    i = commands.add_parser("inspect", help="say what files are", description=does)
    i.add_argument("files", type=Path, nargs="+", metavar="FILE", help="a file or folder of weights")
    does = "Write an adapter in the official layout, or a base model or one of its networks in this project's own."
    c = commands.add_parser("convert", help="write weights in another layout", description=does)
    c.add_argument("source", type=Path, help="a file or folder of weights")
    c.add_argument("target", type=Path, help="TARGET.safetensors, or a folder for a base model")
    c.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: keep every tensor's own")
    c.add_argument("--ema", action="store_true", help="take the EMA copy of the UNet from a single file")
    c.add_argument(
        "--diffusers",
        action="store_true",
        help="write a UNet as diffusers does, config.json and diffusion_pytorch_model.safetensors, into the folder TARGET "
        "(whether it predicts v is stored in a pipeline's scheduler, not here)",
    )
    does = "Compare two checkpoints tensor by tensor, whatever their layouts. Exits with 1 if they differ."
    v = commands.add_parser("verify", help="compare two checkpoints", description=does)
    v.add_argument("a", type=Path, help="a file or folder of weights")
    v.add_argument("b", type=Path, help="another one")
    return p


def main(argv: list[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    import torch  # takes seconds: only once the arguments are read

    from checkpoints.convert import convert, verify
    from checkpoints.describe import inspect

    try:
        if args.command == "inspect":
            for path in args.files:
                print("\n  ".join([str(path), *inspect(path)]))
        elif args.command == "convert":
            convert(
                args.source, args.target, getattr(torch, args.dtype) if args.dtype else None, args.ema, args.diffusers
            )
            print("\n  ".join([str(args.target), *inspect(args.target)]))
        elif lines := verify(args.a, args.b):
            sys.exit("\n".join(lines))
        else:
            print("equal, bit for bit")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
