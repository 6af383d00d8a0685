"""Filling modules: strict loads of a file's tensors into a module built on the meta device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from checkpoints.configs import plausible
from checkpoints.files import is_finite, short_list
from checkpoints.names import TRANSPOSED, Names
from checkpoints.reader import File

M = TypeVar("M", bound=nn.Module)
# What older files hold beside weights.
_EXTRA = re.compile(r"position_ids$")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape_of(shapes: list[tuple[int, ...]], transposed: bool) -> tuple[int, ...]:
    """The shape that the file's tensors, of equal shapes, have once they are joined and turned."""
    first = shapes[0]
    joined = (len(shapes) * first[0], *first[1:]) if first else ()
    return joined[::-1] if transposed else joined


def _fits(shape: tuple[int, ...], ours: torch.Size) -> bool:
    """Equal, but for a 1 x 1 convolution, which is a matrix here."""
    return 0 not in shape and (shape == ours or (len(ours) == 2 and shape == (*ours, 1, 1)))


def _read(file: File, theirs: tuple[str, ...], like: Tensor, transposed: bool, dtype: torch.dtype | None) -> Tensor:
    """One tensor of ours, in memory of its own, in the memory format that the module wants."""
    parts = [file[name] for name in theirs]
    for name, part in zip(theirs, parts, strict=True):
        if part.dtype not in (FLOATS if like.is_floating_point() else (like.dtype,)):
            raise ValueError(
                f"{file.path} holds {name} as {part.dtype}; weights are read in float32, float16 or bfloat16"
            )
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = (tensor.T if transposed else tensor).reshape(like.shape)
    flat = torch.empty(like.numel(), dtype=dtype or tensor.dtype)
    ours = flat.as_strided(like.shape, like.stride()).copy_(tensor)
    if not is_finite(flat):
        raise ValueError(f"{file.path} holds values that are not finite in {ours.dtype}, in {theirs[0]}")
    return ours


def check(module: nn.Module, names: Names, file: File, what: str) -> None:
    """Raises ValueError unless the file's tensors are exactly those of `names`, in the right shapes."""
    state = module.state_dict()
    if unfilled := state.keys() ^ names.keys():
        raise RuntimeError(f"the table and the module differ in {short_list(unfilled)}")
    wanted = {name for theirs in names.values() for name in theirs}
    unknown = {name for name in file if name not in wanted and not _EXTRA.search(name)}
    if missing := wanted - file.keys():
        also = f"; it holds instead {short_list(unknown)}" if unknown else ""
        raise ValueError(f"{file.path} is not {what}: it lacks {short_list(missing)}{also}")
    if unknown:
        raise ValueError(f"{file.path} is not {what}: it also holds {short_list(unknown)}")
    for name, tensor in state.items():
        shapes = [file.shape(n) for n in names[name]]
        if len(set(shapes)) > 1 or not _fits(_shape_of(shapes, names[name][0] in TRANSPOSED), tensor.shape):
            found = " and ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{file.path} is not {what}: {short_list(names[name])} is {found}, for {list(tensor.shape)} here"
            )


def assemble(module: M, names: Names, file: File, what: str, dtype: torch.dtype | None) -> M:
    """Fills a module that was built on the meta device from a file, after `check`; `dtype=None` keeps the file's own.

    Returns it frozen and in eval mode. Raises ValueError that names what is missing, unknown, misshapen or not finite.
    """
    check(module, names, file, what)
    tensors = {
        name: _read(file, names[name], like, names[name][0] in TRANSPOSED, dtype if like.is_floating_point() else None)
        for name, like in module.state_dict().items()
    }
    return fill(module, tensors)


def fill(module: M, tensors: dict[str, Tensor]) -> M:
    """Puts the tensors into a module built on the meta device, strictly; returns it frozen and in eval mode."""
    module.load_state_dict(tensors, strict=True, assign=True)
    if left := [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]:
        raise RuntimeError(f"these tensors were not filled: {', '.join(left)}")
    return module.eval().requires_grad_(False)


def empty_module(module: Callable[[Any], M], config: Any) -> M:
    plausible(config)
    with torch.device("meta"):
        return module(config)
