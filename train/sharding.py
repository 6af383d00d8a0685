"""Share the frozen base among the processes, with PyTorch's fully_shard (arXiv 2304.11277), or the moments of AdamW (1910.02054)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from model.layers import ResBlock, TransformerBlock
from model.unet import UNet
from train import processes


def shard(unet: UNet) -> None:
    """Keep 1/n of the weights of a frozen UNet in each of n processes.

    Each block gathers its weights before it runs, forward and backward, and frees them afterwards. So all processes must run the UNet
    equally often.
    """
    from torch.distributed.device_mesh import init_device_mesh  # imported here, because they take a second
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(unet.parameters()).device.type, (dist.get_world_size(),))
    unet.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    for block in [module for module in unet.modules() if isinstance(module, ResBlock | TransformerBlock)]:
        fully_shard(block, mesh=mesh)
    fully_shard(unet, mesh=mesh)


def sharded_adamw(parameters: list[nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Return an AdamW that keeps the moments of some of the parameters in each process: the first stage of ZeRO.

    Each process steps its parameters, and sends them to the others. `state_dict` is that of a plain AdamW once the first process has
    gathered the moments.
    """
    from torch.distributed.optim import ZeroRedundancyOptimizer  # imported here, because it takes a second

    return ZeroRedundancyOptimizer(parameters, torch.optim.AdamW, **settings)


def check_team(preview_every: int) -> None:
    """Raise ValueError if there is one process only, or the first one would run the base alone."""
    if processes.team().size == 1:
        raise ValueError("--shard shares the base among several processes: start them with torchrun, or leave it out")
    if preview_every:
        raise ValueError("--preview-every draws in one process, which with --shard has only a part of the base: leave one of them out")
