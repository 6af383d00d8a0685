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
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoints.adapters import adapter_file, problems
from checkpoints.cards import save
from checkpoints.clip import load_image_encoder, load_text_encoder
from checkpoints.describe import inspect, kind_of
from checkpoints.files import replacing_in, short_list, write_json, write_tensors
from checkpoints.single_file import load_single
from checkpoints.stable_diffusion import load_base, load_unet, load_vae, save_diffusers, scheduler_config

_LOADERS: dict[str, Callable[..., nn.Module]] = {
    "unet": load_unet,
    "vae": load_vae,
    "text_encoder": load_text_encoder,
    "image_encoder": load_image_encoder,
}


def convert(
    source: Path, target: Path, dtype: torch.dtype | None = None, ema: bool = False, diffusers: bool = False
) -> None:
    """Writes an adapter as the official .safetensors, a base model as a folder of our own, a network of one as a file of our own,
    or with `diffusers` a UNet as a diffusers folder. `dtype=None` keeps every tensor bit for bit.

    Raises ValueError for bad input and OSError where nothing can be written, and then leaves the old files as they were.
    """
    kind, card = kind_of(source), {"converted_from": source.name}
    one = kind != "base" and not diffusers
    if one and target.suffix != ".safetensors":
        raise ValueError(f"the {kind} is written as one file: name TARGET.safetensors, not {target}")
    if ema and (kind != "base" or source.is_dir()):
        raise ValueError(f"{source} is not a base model in a single file, so it has no EMA copy: leave out --ema")
    if diffusers and kind != "unet":
        raise ValueError(f"{source} is not a UNet but {kind}; --diffusers writes UNets")
    if target.exists() and one == target.is_dir():
        raise ValueError(f"{target} is a {'folder' if one else 'file'}: name another {'file' if one else 'folder'}")
    if diffusers:
        save_diffusers(load_unet(source, dtype=None), target, dtype)
    elif kind == "adapter":
        file = adapter_file(source)
        if wrong := problems(file):
            raise ValueError(f"{source} is not a complete adapter: {'; '.join(wrong)}")
        write_tensors(target, {name: file[name] for name in file}, dtype)
    elif kind == "base":
        base = load_single(source, None, ema) if source.is_file() else load_base(source, None)
        with replacing_in(target) as part:
            for name, module in base.parts.items():
                save(module, part / f"{name}.safetensors", card, dtype)
            if scheduler := scheduler_config(source):
                write_json(part / "scheduler" / "scheduler_config.json", scheduler)
    else:
        save(_LOADERS[kind](source, dtype=None), target, card, dtype)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of anything that is read, under this project's names (an adapter's under the official ones)."""
    kind = kind_of(path)
    if kind == "adapter":
        return dict(adapter_file(path))
    if kind == "base":
        parts = load_base(path, dtype=None).parts
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    return dict(_LOADERS[kind](path, dtype=None).state_dict())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def verify(a: Path, b: Path) -> list[str]:
    """How two checkpoints differ, tensor by tensor, whatever their layouts; nothing when they are equal bit for bit."""
    one, two = tensors_of(a), tensors_of(b)
    lines = [
        f"only in {path}: {short_list(names)}"
        for path, names in ((a, one.keys() - two.keys()), (b, two.keys() - one.keys()))
        if names
    ]
    for name in sorted(one.keys() & two.keys()):
        x, y = one[name], two[name]
        if x.shape != y.shape:
            lines.append(f"{name}: {list(x.shape)} against {list(y.shape)}")
        elif x.dtype != y.dtype or not torch.equal(_bits(x), _bits(y)):
            lines.append(
                f"{name}: {x.dtype} against {y.dtype}, largest difference {float((x.double() - y.double()).abs().max()):.3g}"
            )
    return lines


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
