"""Networks that wait in main memory and visit a device only while they compute, so that it holds one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def visiting(modules: Sequence[nn.Module], device: str) -> Iterator[None]:
    """Put the weights of modules on a device for the body of a `with`. Afterwards they are the very tensors that they were before.

    So nothing is copied back, and weights that are mapped from their file stay mapped.
    """
    home = [
        (module, name, tensor)
        for root in modules
        for module in root.modules()
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    try:
        for module, name, tensor in home:
            there = tensor.to(device)
            setattr(module, name, nn.Parameter(there, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else there)
        yield
    finally:
        for module, name, tensor in home:
            setattr(module, name, tensor)
