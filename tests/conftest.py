"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from peers import SMALL_UNETS, UNetPair, unet_pair


@pytest.fixture(scope="session")
def pair() -> Callable[[str], UNetPair]:
    """A small UNet and diffusers' with the same weights, by name. Both are shared: a test that changes one makes its own."""
    made: dict[str, UNetPair] = {}

    def get(name: str) -> UNetPair:
        if name not in made:
            made[name] = unet_pair(*SMALL_UNETS[name])
        return made[name]

    return get
