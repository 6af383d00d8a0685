"""Time a training step of an adapter at batch 1, and measure its peak memory.  `python -m eval.peers.training FOLDER COLUMN`

diffusers' column follows the official recipe, which is float32 on a CPU. Ours keep the adapter in float32, and the frozen base in float32
or bfloat16.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints.adapters import load_adapter
from checkpoints.single_file import load_single
from eval.peers import official
from eval.peers.step import inputs
from eval.peers.timing import memory, seconds, training_step
from model.context import Context
from model.image_encoder import VIT_H
from sampling.schedule import Schedule
from train.loss import diffusion_loss
from train.options import ALL_LEVELS

# Our columns: the dtype of the frozen base, and how many levels of the UNet recompute their activations.
OURS = {
    "float32": (torch.float32, 0),
    "bfloat16": (torch.bfloat16, 0),
    "bfloat16, --checkpointing 1": (torch.bfloat16, 1),
    "bfloat16, --checkpointing": (torch.bfloat16, ALL_LEVELS),
}
COLUMNS = "diffusers", *OURS
RATIOS = {name: (name, "diffusers") for name in OURS}

Loss = Callable[[], Tensor]


def our_loss(folder: Path, dtype: torch.dtype, levels: int) -> tuple[Loss, Iterable[Tensor]]:
    """Return our loss, and the tensors to train."""
    unet = load_single(folder / official.SINGLE, dtype).unet
    unet.checkpointing = levels
    adapter = load_adapter(folder / official.ADAPTER, unet, VIT_H).requires_grad_(True)
    (x, text, image), t, schedule = inputs(torch.float32, batch=1), torch.tensor([500]), Schedule()
    eps = torch.randn_like(x)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return diffusion_loss(unet, schedule, x, adapter(Context(text), image), t, eps).mean()

    return loss, adapter.parameters()


def their_loss(folder: Path) -> tuple[Loss, Iterable[Tensor]]:
    """Return the loss of diffusers' UNet, and the tensors to train."""
    unet = official.peer_unet(folder, torch.float32)
    (x, text, image), t = inputs(torch.float32, batch=1), torch.tensor([500])
    eps = torch.randn_like(x)
    noisy, conditions = Schedule().add_noise(x, eps, t), {"image_embeds": [image[:, None]]}
    return lambda: F.mse_loss(unet(noisy, t, text, added_cond_kwargs=conditions).sample, eps), official.adapter_parameters(unet)


def forget_peak() -> None:
    """Let VmHWM, the peak of the resident memory, begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    folder, column = Path(sys.argv[1]), sys.argv[2]
    loss, weights = our_loss(folder, *OURS[column]) if column in OURS else their_loss(folder)
    forget_peak()
    taken = seconds(training_step(loss, weights))
    print(json.dumps({"seconds": taken, "gigabytes": memory("VmHWM") / 1e9}))


if __name__ == "__main__":
    main()
