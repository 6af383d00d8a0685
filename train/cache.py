"""Encode a user's pictures ahead of training.  `python -m train cache`

Training encodes what is missing by itself. This command does only that, so that it can run on other machines, or on more processes.
"""

from __future__ import annotations

from pathlib import Path

from train.setting import TrainingSource, prepare


def fill(source: TrainingSource, folder: Path, device: str) -> str:
    """Encode the pictures that are not yet in the cache of the state `folder`. Return a sentence that says how many there are.

    Several processes share the work. Raises ValueError or OSError before anything is encoded if the pictures or the base are unsuitable.
    """
    setting = prepare(source, folder, device)
    count = len(setting.pairs) + (len(setting.held_out) if setting.held_out else 0)
    return f"{folder / 'cache'}: {count} pictures are encoded; training with the same --data, --base, --side and --state finds them"
