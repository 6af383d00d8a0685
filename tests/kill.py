"""Trains the same adapter again and again, each time killed (SIGKILL) at another point and started again.

`python tests/kill.py BASE DATA WORK` prints, as JSON, the names of the points, and for each the hash of the final file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

events: list[str] = []
kill_at: int | None = None


def event(name: str) -> None:
    """Something that a process may be killed at."""
    events.append(name)
    if len(events) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


def around(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def called(*args: Any, **options: Any) -> Any:
        event(f"before {name}")
        result = function(*args, **options)
        event(f"after {name}")
        return result

    return called


def in_halves(write: Callable[..., Any], name: str) -> Callable[..., Any]:
    """What writes a file, so that it can be killed when half is on disk."""

    def called(data: Any, path: Path, *args: Any) -> None:
        write(data, path, *args)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        event(f"half of {name}")
        path.write_bytes(content)

    return called


os.replace = around(os.replace, "rename")
torch.save = in_halves(torch.save, "state")
torch.optim.AdamW.step = around(torch.optim.AdamW.step, "step")  # type: ignore[method-assign]
safetensors.torch.save_file = in_halves(safetensors.torch.save_file, "tensors")

from model.image_encoder import ImageEncoder  # noqa: E402
from model.text_encoder import words_of  # noqa: E402
from model.vae import VAE  # noqa: E402
from train import adapter, setting  # noqa: E402
from train import card as cards  # noqa: E402
from train.clock import ROW  # noqa: E402
from train.setting import TrainingSource  # noqa: E402

VAE.moments = around(VAE.moments, "latents")  # type: ignore[method-assign]
ImageEncoder.forward = around(ImageEncoder.forward, "embedding")  # type: ignore[method-assign]
adapter.verdict = lambda *_: ""  # comes after everything is written
cards.code_version = lambda: "a test"
setting.load = functools.cache(setting.load)  # loading the base writes nothing, so all processes get it from their parent
PLAN = replace(adapter.PLAN, steps=6, batch=4, save_every=2, validate_every=3, bf16=False)


def trained(base: Path, data: Path, work: Path, at: int | None) -> list[str] | None:
    """Trains in a process of its own, killed at event `at`; the events, or None when it was killed."""
    global kill_at
    kill_at, trace = at, work / "events.json"
    if (child := os.fork()) == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        adapter.train(work / "state", work / "out", (PLAN,), TrainingSource(base, data=data, side=16))
        trace.write_text(json.dumps(events))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    assert status == 0, status
    results: list[str] = json.loads(trace.read_text())
    return results


def result(work: Path) -> tuple[str, Any]:
    """The hash of the adapter, and its card without the clock."""
    card = json.loads((work / "out" / "ip_adapter.json").read_text())
    card["results"] = {name: value for name, value in card["results"].items() if name not in ROW}
    return hashlib.sha256((work / "out" / "ip_adapter.safetensors").read_bytes()).hexdigest(), card


def chosen(names: list[str], count: int = 20) -> list[int]:
    """`count` points to be killed at, from 1: the last of each kind, and others spread over the whole run."""
    last = {name: i for i, name in enumerate(names, 1)}
    rest = [i for i in range(1, len(names) + 1) if i not in last.values()]
    more = count - len(last)
    return sorted([*last.values(), *(rest[i * len(rest) // more] for i in range(more))])


def main(base: Path, data: Path, work: Path) -> None:
    torch.set_num_threads(1)
    words_of("loads the tokenizer, once for all processes")
    TrainingSource(base).pipeline("cpu")
    work.mkdir()
    names = trained(base, data, work, None)
    assert names is not None
    whole = result(work)
    points, same = chosen(names), []
    for point in points:
        shutil.rmtree(work)
        work.mkdir()
        assert trained(base, data, work, point) is None
        assert trained(base, data, work, None) is not None
        same.append(result(work) == whole)
    print(json.dumps({"points": [names[point - 1] for point in points], "same": same}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
