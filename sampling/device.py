"""Check the device to compute on."""

from __future__ import annotations

import torch


def check_device(device: str) -> str:
    """Return the kind of a device, such as "cuda" for "cuda:1". Raises ValueError if torch cannot compute on it."""
    try:
        one = torch.ones(1, device=device)
        one.item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} can't be used here ({reason}); omit it to use the CPU") from None
    return one.device.type
