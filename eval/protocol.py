"""What the paper's measurement draws (section 4.2.1). This file does not import torch, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Protocol:
    """What is drawn; the defaults are the paper's. `scale` is lambda. Drawing j of prompt i has the seed `seed` + i k + j, k per prompt."""

    pictures: int = 5000
    images_per_prompt: int = 4
    prompt: str = ""
    scale: float = 1.0
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0

    def differences(self) -> list[str]:
        """Say where this departs from the paper. The paper states no seed."""
        paper = asdict(Protocol(seed=self.seed))
        return [f"{name}: {value!r}, in the paper {paper[name]!r}" for name, value in asdict(self).items() if value != paper[name]]
