"""Load the tensors of a file into a module built on the meta device, strictly."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from checkpoints.configs import check_values
from checkpoints.files import is_finite, short_list
from checkpoints.names import TRANSPOSED, Names
from checkpoints.reader import File

M = TypeVar("M", bound=nn.Module)
_EXTRA = re.compile(r"position_ids$")  # buffers in older files, which are not needed
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _shape_of(shapes: list[tuple[int, ...]], transposed: bool) -> tuple[int, ...]:
    """Return the shape of a file's tensors, all of the first one's shape, after concatenation and transposition."""
    first = shapes[0]
    shape = (len(shapes) * first[0], *first[1:]) if first else ()
    return shape[::-1] if transposed else shape


def _fits(shape: tuple[int, ...], ours: torch.Size) -> bool:
    """Return whether the shapes are equal, or the file has a 1x1 convolution where the module has a linear layer."""
    return 0 not in shape and (shape == ours or (len(ours) == 2 and shape == (*ours, 1, 1)))


def _read(file: File, theirs: tuple[str, ...], like: Tensor, transposed: bool, dtype: torch.dtype | None) -> Tensor:
    """Read one tensor of the module. `theirs` are its parts in the file.

    It stays in the mapped file if it is there as a whole, in the wanted dtype. Otherwise it is copied, with the strides of `like`.
    """
    parts = [file[name] for name in theirs]
    for name, part in zip(theirs, parts, strict=True):
        if part.dtype not in (FLOATS if like.is_floating_point() else (like.dtype,)):
            raise ValueError(
                f"{file.path} holds {name} as {part.dtype}; only float32, float16 and bfloat16 weights are supported"
            )
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = (tensor.T if transposed else tensor).reshape(like.shape)
    target = dtype or tensor.dtype
    if tensor.dtype == target and tensor.is_contiguous():
        source = ours = tensor
    else:
        flat = torch.empty(like.numel(), dtype=target)
        ours = flat.as_strided(like.shape, like.stride()).copy_(tensor)
        source = tensor if torch.promote_types(tensor.dtype, target) == target else flat  # a wider dtype makes no value infinite
    if not is_finite(source):
        raise ValueError(f"{file.path} holds values that are not finite in {target}, in {theirs[0]}")
    return ours


def check(state: Mapping[str, Tensor], names: Names, file: File, what: str) -> None:
    """Raise ValueError unless the file has exactly the tensors in `names`, in the shapes of a module's `state_dict`.

    `what` completes the message "the file is not ...".
    """
    if difference := state.keys() ^ names.keys():
        raise RuntimeError(f"the table of names and the module differ in {short_list(difference)}")
    expected = {name for theirs in names.values() for name in theirs}
    unknown = {name for name in file if name not in expected and not _EXTRA.search(name)}
    if missing := expected - file.keys():
        also = f", but holds {short_list(unknown)}" if unknown else ""
        raise ValueError(f"{file.path} is not {what}: it lacks {short_list(missing)}{also}")
    if unknown:
        raise ValueError(f"{file.path} is not {what}: it also holds {short_list(unknown)}")
    for name, tensor in state.items():
        shapes = [file.shape(n) for n in names[name]]
        if len(set(shapes)) > 1 or not _fits(_shape_of(shapes, names[name][0] in TRANSPOSED), tensor.shape):
            actual = " and ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{file.path} is not {what}: the shape of {short_list(names[name])} is {actual}, not {list(tensor.shape)}"
            )


def assemble(module: M, names: Names, file: File, what: str, dtype: torch.dtype | None) -> M:
    """Check a file and fill a module from it.

    The module must be on the meta device. `dtype=None` keeps the file's dtypes. Tensors that are in the file as they are needed stay
    mapped: memory is filled when they are first read, and a change to one is not written to the file. If the file may be overwritten while
    the module is in use, call `copy_weights`.

    Returns the module, frozen and in eval mode. Raises ValueError when tensors are missing, unknown, not finite or of
    the wrong shape or dtype.
    """
    state = module.state_dict()
    check(state, names, file, what)
    tensors = {
        name: _read(file, names[name], like, names[name][0] in TRANSPOSED, dtype if like.is_floating_point() else None)
        for name, like in state.items()
    }
    return fill(module, tensors)


def fill(module: M, tensors: dict[str, Tensor]) -> M:
    """Load tensors into a module on the meta device, strictly. Returns it, frozen and in eval mode."""
    module.load_state_dict(tensors, strict=True, assign=True)
    if missing := [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]:
        raise RuntimeError(f"these tensors were not filled: {', '.join(missing)}")
    return module.eval().requires_grad_(False)


def copy_weights(module: nn.Module) -> None:
    """Copy the tensors of a module out of the file that they are mapped from, in place and one by one."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()


class _NoInit(TorchFunctionMode):
    """Skip the functions of `torch.nn.init`, which would spend half a second on weights that are not there."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def empty_module(module: Callable[[Any], M], config: Any) -> M:
    """Check a config and build its module on the meta device.

    Raises ValueError when a value is of the wrong type or implausible.
    """
    check_values(config)
    with torch.device("meta"), _NoInit():
        return module(config)
