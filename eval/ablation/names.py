"""The names of the units of work, by which they are stored, and what a unit of drawings draws."""

from __future__ import annotations

from dataclasses import dataclass

from eval.ablation.forms import FORMS
from model.attention import Fuse


def training_name(form: str, seed: int) -> str:
    """Name the training of a counted adapter."""
    return f"train-{form}-{seed}"


def rate_name(form: str, rate: float) -> str:
    """Name the training that tests a learning rate."""
    return f"rate-{form}-{rate:g}"


def grid_name(form: str, sampled: str = "") -> str:
    """Name the lambdas of a form. `sampled`: as in `Draw`."""
    return f"grid-{form}{_ending(sampled)}"


def alone_name(task: str, split: str = "test") -> str:
    """Name the drawings of a task from the text alone."""
    return f"alone-{task}-{split}"


def _ending(sampled: str) -> str:
    return f"-as-{sampled}" if sampled else ""


@dataclass(frozen=True)
class Draw:
    """Drawings of a task by one adapter, at several lambdas.

    `rate`: that of a training that tests a learning rate. `sampled`: the form whose `fuse` draws, if not that of the training.
    """

    form: str
    seed: int
    step: int
    task: str
    split: str = "test"
    layers: str = "all"
    rate: float | None = None
    sampled: str = ""

    @property
    def fuse(self) -> Fuse:
        return FORMS[self.sampled or self.form].fuse

    @property
    def grid(self) -> str:
        """The unit of its lambdas."""
        return grid_name(self.form, self.sampled)

    @property
    def run(self) -> str:
        """The training that it needs."""
        return training_name(self.form, self.seed) if self.rate is None else rate_name(self.form, self.rate)

    @property
    def name(self) -> str:
        run = self.run.removeprefix("train-")
        return f"drawn-{run}-{self.step}-{self.task}-{self.split}-{self.layers}{_ending(self.sampled)}"
