"""Trains one part of the mini world, or all of them in order: vae, clip, unet, adapter.

A run that is stopped (Ctrl-C) goes on when the same command is given again, to the same numbers.

The adapter can also be trained on other weights and your own pictures, for example on a GPU:
  python -m train adapter --base sd15.safetensors --image-encoder models/image_encoder --data data.json --weights out \
      --batch 8 --accumulate 8 --lr 1e-4 --bf16 --checkpointing --device cuda
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from train import adapter, clip, unet, vae
from train.loop import Plan

P = TypeVar("P", bound=Plan)
STAGES = {"vae": vae, "clip": clip, "unet": unet}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("stage", choices=(*STAGES, "adapter", "all"))
    p.add_argument("--state", type=Path, default=Path("runs"), help="checkpoints and logs (default: runs)")
    p.add_argument("--weights", type=Path, default=Path("weights"), help="finished weights (default: weights)")
    for name, kind in (("steps", int), ("batch", int), ("lr", float), ("seed", int), ("accumulate", int)):
        p.add_argument(f"--{name}", type=kind, help="instead of the stage's own")
    p.add_argument("--device", default="cpu")
    p.add_argument("--bf16", action="store_true", help="bfloat16 autocast; the adapter's base is held in bfloat16 too")
    only = p.add_argument_group("adapter only")
    only.add_argument("--base", type=Path, help="base model, a single file or a folder (default: --weights)")
    only.add_argument("--image-encoder", type=Path, help="folder or file (default: the base folder's own)")
    only.add_argument("--data", type=Path, help='JSON list [{"image_file": ..., "text": ...}], or pictures with .txt')
    only.add_argument("--side", type=int, help="of the training pictures (default: the base model's own)")
    only.add_argument("--fine", action="store_true", help="train Plus, which reads fine features (ip_adapter_plus)")
    only.add_argument("--checkpointing", action="store_true", help="recompute the UNet's stages: less memory, slower")
    return p


def main(argv: list[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.fine and args.stage != "adapter":  # after hours there would be no adapter for Plus to begin as
        raise ValueError(f"--fine goes with adapter, not with {args.stage}: train Plus after it")

    def plan_of(default: P) -> P:
        given = {k: v for k in ("steps", "batch", "lr", "seed", "accumulate") if (v := getattr(args, k)) is not None}
        return replace(default, device=args.device, bf16=args.bf16 or default.bf16, **given)

    for name, stage in STAGES.items():
        if args.stage in (name, "all"):
            stage.train(args.state, args.weights, tuple(plan_of(plan) for plan in stage.PHASES))
    if args.stage in ("adapter", "all"):
        source = adapter.Source(
            args.base or args.weights,
            args.image_encoder,
            args.fine,
            data=args.data,
            side=args.side,
            base_dtype=torch.bfloat16 if args.bf16 else torch.float32,
            checkpointing=args.checkpointing,
        )
        phases = (adapter.FINE,) if args.fine else adapter.PHASES if args.data is None else (adapter.PLAN,)
        begin = plan_of(adapter.BEGIN) if args.fine and args.data is None else None
        adapter.train(args.state, args.weights, tuple(plan_of(phase) for phase in phases), source, begin)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
