"""LoRA (arXiv 2106.09685): low-rank updates of a base model's weights, W' = W + s (alpha / r) B A, read from files and merged.

For a convolution, A is a convolution to r channels, and B a 1 x 1 convolution. `merge` never changes the model that it is given.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from checkpoints.base import Base
from checkpoints.files import is_finite, naming, read_json, short_list
from checkpoints.fill import FLOATS
from checkpoints.lora_names import CONFIG, PEFT, Target, role_of, targets
from checkpoints.reader import File


@dataclass(frozen=True)
class LowRank:
    """One update: A is `down`, `r i` or `r i k k`; B is `up`, `o r` or `o r 1 1`. Without `alpha` the factor alpha / r is 1."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    def delta(self, dtype: torch.dtype) -> Tensor:
        """(alpha / r) B A as a matrix, `o i` or `o (i k k)`."""
        product = self.up.to(dtype).flatten(1) @ self.down.to(dtype).flatten(1)
        return product if self.alpha is None else product * (self.alpha / len(self.down))


Updates = dict[str, LowRank]  # by the name of the module in the file


def is_lora(file: File) -> bool:
    """Return whether a file holds LoRA updates and no adapter."""
    return any(role_of(name)[1] in ("down", "up") for name in file) and not any(n.startswith("image_proj") for n in file)


def read_updates(file: File) -> Updates:
    """Read every update in a file. Raises ValueError, with its name, for a tensor that is not part of one, or an invalid one."""
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name in file:
        module, role = role_of(name)
        if not role or role in modules[module]:
            raise ValueError(
                f"{file.path} holds {name}, which is not LoRA: only low-rank updates (down, up and alpha) are supported, "
                "not DoRA, LoHa, LoKr and the like"
            )
        modules[module][role] = file[name]
    alpha = _common_alpha(file)
    updates = {}
    for module, parts in modules.items():
        if not parts.keys() >= {"down", "up"}:
            raise ValueError(f"{file.path} is not a complete LoRA: {module} needs both its matrices, but has {short_list(parts)}")
        _check(file.path, module, parts)
        own = float(parts["alpha"]) if "alpha" in parts else alpha
        updates[module] = LowRank(parts["down"], parts["up"], own)
    return updates


def _check(path: Path, module: str, parts: Mapping[str, Tensor]) -> None:
    down, up = parts["down"], parts["up"]
    if any(part.dtype not in FLOATS or not part.numel() or not is_finite(part) for part in (down, up)):
        raise ValueError(f"{path} is damaged: not all numbers of {module} are finite and floating point")
    if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[1:] != (len(down), *[1] * (up.ndim - 2)):
        raise ValueError(f"{path} is damaged: {module} has matrices of shapes {list(down.shape)} and {list(up.shape)}")
    if "alpha" in parts and (parts["alpha"].numel() != 1 or not math.isfinite(float(parts["alpha"]))):
        raise ValueError(f"{path} is damaged: alpha of {module} is not a number")


def peft_config(file: File) -> Path | None:
    """Return where PEFT's settings of a file with its own names are, beside the file; None for other files."""
    return file.path.with_name(CONFIG) if any(name.startswith(PEFT) for name in file) else None


def _settings(file: File) -> tuple[Path, dict[str, Any]]:
    """Return PEFT's settings of a whole file, and where they are: in `adapter_config.json` beside a file with PEFT's own names, or
    where diffusers writes them, in the header of a safetensors file. {} for other files.
    """
    path = file.path
    if config := peft_config(file):
        if not config.is_file():
            raise ValueError(f"{path} has PEFT's names, and its alpha is in another file: put its adapter_config.json beside it")
        return config, {"lora_alpha": 8} | read_json(config)  # PEFT's default
    with open(path, "rb") as stream:
        if stream.read(9)[8:] != b"{":
            return path, {}
    with naming(path, "has settings that are not supported"), safe_open(path, "pt") as header:
        return path, dict(json.loads((header.metadata() or {}).get("lora_adapter_metadata", "{}")))


def _common_alpha(file: File) -> float | None:
    """Return the alpha of modules that have none of their own, or None.

    Raises ValueError if the settings ask for another rule than alpha / r.
    """
    path, settings = _settings(file)
    with naming(path, "has settings that are not supported"):
        flat = {key.rpartition(".")[2]: value for key, value in settings.items()}
        if other := [key for key in ("use_rslora", "use_dora", "alpha_pattern") if flat.get(key)]:
            raise ValueError(f"{other[0]} = {flat[other[0]]}")
        alphas = {value for key, value in settings.items() if key.rpartition(".")[2] == "lora_alpha"}
        if len(alphas) > 1:
            raise ValueError(f"several values of lora_alpha, {alphas}")
        return float(alphas.pop()) if alphas else None


def merge(base: Base, loras: Sequence[tuple[Path, Updates, float]]) -> Base:
    """Merge LoRAs, (file, updates, scale s), into a copy of a base model: W' = W + sum_j s_j (alpha_j / r_j) B_j A_j.

    The sum is computed in float32 (or float64, if W has it), and rounded once to the dtype of W. The copy shares all other weights
    with `base`, which stays as it is. So the way to remove a LoRA, bit for bit, is to use `base` again. Raises ValueError, with its
    name, for an update of a module that the model does not have, or that has other sizes.
    """
    where, deltas = targets(base.parts), dict[tuple[str, str], Tensor]()
    for path, updates, scale in loras:
        if unknown := updates.keys() - where.keys():
            raise ValueError(f"{path} is a LoRA for another base model: this one has no {short_list(unknown)}")
        for name, update in updates.items():
            target = where[name]
            weight = base.parts[target.network].get_parameter(target.tensor)
            if scale:
                _add(deltas, target, weight, update, scale, f"{path} is a LoRA for another base model: {name}")
    twin = _twin(base)
    for (network, name), delta in deltas.items():
        module, _, leaf = name.rpartition(".")
        owner = twin.parts[network].get_submodule(module)
        weight = getattr(owner, leaf)
        total = (weight.detach().to(delta.dtype) + delta.reshape(weight.shape)).to(weight.dtype)
        setattr(owner, leaf, nn.Parameter(total, requires_grad=weight.requires_grad))
    return twin


def _add(
    deltas: dict[tuple[str, str], Tensor], target: Target, weight: Tensor, update: LowRank, scale: float, problem: str
) -> None:
    """Add the update of one module to the sum for its weight; q, k and v of the text encoders are the rows of one weight."""
    rows, columns = len(weight) // target.parts, weight[0].numel()
    if (len(update.up), update.down[0].numel()) != (rows, columns):
        raise ValueError(f"{problem} is for a weight of {len(update.up)} x {update.down[0].numel()}, not {rows} x {columns}")
    dtype = torch.promote_types(weight.dtype, torch.float32)
    key = target.network, target.tensor
    if key not in deltas:
        deltas[key] = torch.zeros(len(weight), columns, dtype=dtype)
    deltas[key][target.part * rows :][:rows] += scale * update.delta(dtype)


def _twin(base: Base) -> Base:
    """Copy the modules of a base model, but not their tensors."""
    tensors = [t for part in base.parts.values() for t in (*part.parameters(), *part.buffers())]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def open_lora(path: Path) -> File:
    """Open a file of LoRA updates. Raises FileNotFoundError, and ValueError if it is something else."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name the file of a LoRA with --lora")
    if not is_lora(file := File(path)):
        raise ValueError(f"{path} is not a LoRA; it holds {short_list(file)}")
    return file
