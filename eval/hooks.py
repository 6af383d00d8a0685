"""Look into a network while it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Any) -> Iterator[None]:
    """Call `hook(module, inputs, output)` after every call of these modules; what it returns replaces the output, unless it is None."""
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(module.register_forward_hook(hook))
        yield
