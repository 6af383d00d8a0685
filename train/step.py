"""One optimizer step: the gradients of the loss, gradient clipping, and AdamW.

On a GPU the whole step is recorded as a CUDA graph and then replayed. The networks of the mini world are so small that launching their
kernels one by one would take most of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from train.data import map_tensors, tensors
from train.errors import Diverged

T = TypeVar("T")
Loss = Callable[[T, torch.Generator], dict[str, Tensor]]
Values = dict[str, Tensor]  # named scalars
WARM_UP = 3  # steps that run before the graph is recorded


class Step(Generic[T]):
    """Run optimizer steps, on the device of the module. `lag`: the number of steps after which the loop reads the returned scalars."""

    lag, capturable = 1, False

    def __init__(
        self,
        module: nn.Module,
        loss: Loss[T],
        betas: tuple[float, float],
        weight_decay: float,
        clip: float,
        autocast: Callable[[], AbstractContextManager[Any]],
        fp16: bool,
    ) -> None:
        self.loss, self.clip, self.autocast = loss, clip, autocast
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.device = self.parameters[0].device
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        self.lr = torch.zeros((), device=self.device)
        lr = self.lr if self.capturable else 0.0
        self.optimizer = self.adamw(lr=lr, betas=betas, weight_decay=weight_decay, fused=True, capturable=self.capturable)

    def adamw(self, **settings: Any) -> torch.optim.Optimizer:
        """Return the optimizer of the parameters."""
        return torch.optim.AdamW(self.parameters, **settings)

    def gather(self) -> None:
        """Make `optimizer.state_dict()` complete in the first process."""

    def restore(self, optimizer: dict[str, Any], scaler: dict[str, Any]) -> None:
        """Load the states of an optimizer and of a scaler of the loss."""
        self.optimizer.load_state_dict(optimizer)
        self.scaler.load_state_dict(scaler)
        self.set_rate(0.0)

    def set_rate(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = self.lr.fill_(lr) if self.capturable else lr

    def idle(self) -> bool:
        """Return whether the device has finished all steps."""
        return True

    def generators(self, seeds: Sequence[int]) -> list[torch.Generator]:
        """Return the generators of the batches with these seeds."""
        return [torch.Generator(self.device).manual_seed(seed) for seed in seeds]

    def accumulate(self, batches: Sequence[T], generators: Sequence[torch.Generator], count: int) -> Values:
        """Add the gradients of the losses, divided by `count`. Return the sum of each named scalar, divided by `count`."""
        means: Values = {}
        for batch, generator in zip(batches, generators, strict=True):
            with self.autocast():
                values = self.loss(batch, generator)
            self.scaler.scale(values["loss"] / count).backward()
            for name, value in values.items():
                part = value.detach() / count
                means[name] = means[name] + part if name in means else part
        return means

    def average(self, batches: Sequence[T], generators: Sequence[torch.Generator]) -> Values:
        """Compute the gradients of the mean loss, and the mean of each named scalar."""
        return self.accumulate(batches, generators, len(batches))

    def gradients(self, batches: Sequence[T], generators: Sequence[torch.Generator]) -> Values:
        """Compute the gradients of the mean loss, and clip them. Return the mean of each named scalar, and the gradient norm.

        In float16, the loss is scaled before the backward pass, so that small gradients do not become 0; `loss_scale` is returned too.
        """
        means = self.average(batches, generators)
        scale = {"loss_scale": self.scaler.scale(torch.ones((), device=self.device))} if self.scaler.is_enabled() else {}
        self.scaler.unscale_(self.optimizer)
        return means | {"grad_norm": nn.utils.clip_grad_norm_(self.parameters, self.clip)} | scale

    def update(self) -> None:
        """Step the optimizer. In float16, skip the step if a gradient is not finite, and adapt the scale of the loss."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def __call__(self, batches: Sequence[T], seeds: Sequence[int], lr: float, name: str) -> Values:
        """Run a step on batches with these seeds. Raises `Diverged`, before the weights change, if a number is not finite."""
        values = self.gradients(map_tensors(lambda x: x.to(self.device), tuple(batches)), self.generators(seeds))
        check_finite(numbers([values])[0], name)
        self.set_rate(lr)
        self.update()
        self.optimizer.zero_grad(set_to_none=True)
        return values


class GraphStep(Step[T]):
    """Run optimizer steps on a GPU. All batches must have the same shapes, and the loss must not wait for the GPU."""

    lag, capturable = 100, True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = 0
        self.graph_generators: list[torch.Generator] = []

    def idle(self) -> bool:
        return torch.cuda.current_stream(self.device).query()

    def _step(self) -> Tensor:
        values = self.gradients(self.batches, self.graph_generators)
        self.update()
        self.names = [*values]
        return torch.stack([value.float() for value in values.values()])

    def _record(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # so that the graph owns the gradients, and overwrites them in each replay
        self.graph = torch.cuda.CUDAGraph()
        for generator in self.graph_generators:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.values = self._step()

    def _warm_up(self) -> Tensor:
        """Run a step without a graph, on a stream of its own, as recording requires."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.optimizer.zero_grad(set_to_none=True)
            values = self._step()
        torch.cuda.current_stream().wait_stream(stream)
        self.warm += 1
        return values

    def __call__(self, batches: Sequence[T], seeds: Sequence[int], lr: float, name: str) -> Values:
        """Run a step on batches with these seeds. The returned scalars stay on the GPU."""
        with torch.cuda.device_of(self.lr):  # streams and graphs are those of the current device
            return self._run(batches, seeds, lr)

    def _run(self, batches: Sequence[T], seeds: Sequence[int], lr: float) -> Values:
        if not self.graph_generators:
            self.graph_generators = self.generators(seeds)
            self.batches = map_tensors(lambda x: x.to(self.device, copy=True), tuple(batches))
        for old, new in zip(tensors(self.batches), tensors(tuple(batches)), strict=True):
            old.copy_(new, non_blocking=True)
        for generator, seed in zip(self.graph_generators, seeds, strict=True):
            generator.manual_seed(seed)
        self.set_rate(lr)
        if self.warm < WARM_UP:
            values = self._warm_up()
        else:
            if self.graph is None:
                self._record()
            assert self.graph is not None
            self.graph.replay()
            values = self.values.clone()
        return dict(zip(self.names, values, strict=True))


def step_for(device: str, one_shape: bool = True) -> type[Step[Any]]:
    """Return the kind of step to run: "cuda" GPUs record graphs of batches of one shape, everything else runs step by step."""
    return GraphStep if device.startswith("cuda") and one_shape else Step


def numbers(rows: Sequence[Values]) -> list[dict[str, float]]:
    """Copy the named scalars of several steps from their device, all at once."""
    if not rows:
        return []
    table = torch.stack([torch.stack([value.float() for value in row.values()]) for row in rows]).tolist()
    return [dict(zip(row, values, strict=True)) for row, values in zip(rows, table, strict=True)]


def check_finite(values: dict[str, float], name: str) -> None:
    """Raise `Diverged` if the loss or the gradient norm is not finite; in float16, if no scale of the loss keeps them finite."""
    has_scale = "loss_scale" in values
    if not (values["loss_scale"] >= 1 if has_scale else math.isfinite(values["loss"] + values["grad_norm"])):
        instead = "train with --bf16, or restart" if has_scale else "restart"
        raise Diverged(f"{name}: the loss or gradient is not finite; {instead} with a lower --lr")


@torch.no_grad()
def move_towards(slow: nn.Module, fast: nn.Module, weight: float) -> None:
    """Move the weights and buffers of `slow` towards those of `fast`: s + weight (f - s); copy integers. This updates an EMA."""
    pairs = list(zip(slow.state_dict().values(), fast.state_dict().values(), strict=True))
    real = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([a for a, _ in real], [b for _, b in real], weight)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)
