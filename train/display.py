"""What a run shows beside its log: a progress bar, pictures of fixed prompts, and curves in TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import nn
from tqdm import tqdm

from train.clock import ROW

Draw = Callable[[nn.Module, Path], None]


class Display:
    """Call `draw(module, file)` every `every` steps, and write the rows of the log for TensorBoard with `tensorboard`.

    Both are off by default. Nothing here changes a number of the training. Raises ValueError if the package tensorboard is missing.
    """

    def __init__(self, draw: Draw | None = None, every: int = 0, tensorboard: bool = False) -> None:
        self.draw, self.every, self.tensorboard = draw, every, tensorboard
        self.writer: Any = None
        if tensorboard:
            _summary_writer()

    def start(self, folder: Path, name: str, step: int) -> None:
        """Begin to show a run in the state `folder`, which has done `step` steps."""
        self.folder, self.name = folder, name
        if self.tensorboard:
            self.writer = _summary_writer()(str(folder / "tensorboard" / name), purge_step=step + 1)

    def row(self, row: Mapping[str, Any]) -> None:
        """Show a row of the log."""
        if self.writer is not None:
            for name, value in row.items():
                self.writer.add_scalar(name, value, row["step"])

    def step(self, module: nn.Module, step: int) -> None:
        """Draw, if it is time, `previews/NAME-STEP.png`."""
        if self.draw is not None and self.every and step % self.every == 0:
            file = self.folder / "previews" / f"{self.name}-{step:07}.png"
            file.parent.mkdir(exist_ok=True)
            self.draw(module, file)


def bar(name: str, steps: int, step: int, hidden: bool) -> tqdm[NoReturn]:
    """Return the progress bar of a run that has done `step` of its steps."""
    return tqdm(total=steps, initial=step, desc=name, dynamic_ncols=True, disable=hidden)


def last_numbers(log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the numbers of the last row, for the progress bar."""
    return {k: f"{v:.4g}" for k, v in (log[-1] if log else {}).items() if k not in ("step", "lr", *ROW)}


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboard: pip install -e '.[tensorboard]'") from None
    return SummaryWriter
