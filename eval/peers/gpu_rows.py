"""The measurements of `python -m eval.peers.gpu`: a step of the UNet, a picture, and a training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from eval.peers.official import adapter_parameters
from eval.peers.random_networks import Setting, inputs, our_networks, peer_or_none, their_pipeline, their_unet
from eval.peers.timing import Run, Timing, training_step
from model.context import Context
from model.vae import VAE
from sampling.ddim import ddim, ddim_times
from sampling.guidance import guided
from sampling.lambdas import as_tensors
from sampling.loading import compile_unet
from sampling.schedule import Schedule
from train.loss import diffusion_loss


def measure(setting: Setting, run: Callable[[], Any]) -> Timing:
    """Return the median seconds of a run, after a warm-up, and on a GPU the peak memory in GB. Timer waits for the device."""
    for _ in range(3):
        run()
    on_gpu = setting.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(setting.device)
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    row: Timing = {"seconds": timer.blocked_autorange(min_run_time=setting.seconds).median}
    return row | ({"memory": torch.cuda.max_memory_allocated(setting.device) / 1e9} if on_gpu else {})


def peak(setting: Setting, dtype: torch.dtype) -> float:
    """Return the speed of a large matrix product in FLOP/s."""
    n = 8192 if setting.device.startswith("cuda") else 512
    a, b = (torch.randn(n, n, device=setting.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / float(measure(setting, lambda: a @ b)["seconds"])


def step(setting: Setting, dtype: torch.dtype, batch: int, mode: str | None = None) -> Timing:
    """Measure one call of the UNet with the adapter. `mode` is that of torch.compile; None is eager."""
    (x, text, image), t = inputs(setting, dtype, batch), torch.tensor(500, device=setting.device)
    unet, adapter = our_networks(setting, dtype)
    context = adapter(Context(text), image)
    with FlopCounterMode(display=False) as counter:
        unet(x, t, context)
    if mode:
        unet, context = compile_unet(unet, mode), as_tensors(context)
    row: Timing = {"ours": measure(setting, partial(unet, x, t, context))}
    del unet, adapter
    if (peer := peer_or_none(partial(their_unet, setting, dtype))) is not None:
        peer = torch.compile(peer, mode=mode) if mode else peer
        conditions = {"image_embeds": [image[:, None]]}
        row["theirs"] = measure(setting, lambda: peer(x, t, text, added_cond_kwargs=conditions))
    return row | {"limit": counter.get_total_flops() / peak(setting, dtype)}


def picture(setting: Setting, dtype: torch.dtype) -> Timing:
    """Measure a picture from text tokens and an image embedding, with guidance 7.5, decoded by the VAE."""
    x, text, image = inputs(setting, dtype, 2)
    row: Timing = {"ours": measure(setting, _our_picture(setting, dtype, x, text, image))}
    if (theirs := peer_or_none(partial(their_pipeline, setting, dtype))) is not None:
        prompts = {"prompt_embeds": text[1:], "negative_prompt_embeds": text[:1]}
        arguments = prompts | {"ip_adapter_image_embeds": [image[:, None]], "num_inference_steps": setting.steps}
        size = setting.side * setting.vae.factor
        row["theirs"] = measure(setting, lambda: theirs(**arguments, height=size, width=size, output_type="pt"))
    return row


def _our_picture(setting: Setting, dtype: torch.dtype, x: Tensor, text: Tensor, image: Tensor) -> Run:
    """Return a function that draws our picture. Our networks live as long as it does, so they do not count as diffusers' memory."""
    unet, adapter = our_networks(setting, dtype)
    vae = VAE(setting.vae).to(setting.device, dtype).requires_grad_(False)
    uncond, cond = (adapter(Context(text[i : i + 1]), image[i : i + 1]) for i in (0, 1))
    schedule = Schedule()

    def run() -> Tensor:
        times, z = ddim_times(schedule, setting.steps), x[:1].float()
        for state in ddim(guided(unet, uncond, cond, 7.5), z, schedule, times):
            z = state.x
        return vae.decode(z.to(dtype))

    return run


def training(setting: Setting) -> Timing:
    """Measure a training step of the adapter in float32, under autocast, on a frozen base in bfloat16: the official recipe for a GPU."""

    def step_of(loss: Callable[[], Tensor], weights: list[Tensor]) -> Run:
        return training_step(torch.autocast(torch.device(setting.device).type, torch.bfloat16)(loss), weights)

    row = {"ours": measure(setting, step_of(*_our_loss(setting)))}
    if (theirs := peer_or_none(partial(_their_loss, setting))) is not None:
        row["theirs"] = measure(setting, step_of(*theirs))
    return row


def _noise(setting: Setting, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return timesteps and noise for latents."""
    return torch.full((len(x),), 500, device=setting.device), torch.randn_like(x)


def _our_loss(setting: Setting) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return our loss and the parameters to train."""
    x, text, image = inputs(setting, torch.float32, setting.training)
    (t, eps), schedule = _noise(setting, x), Schedule()
    unet, adapter = our_networks(setting, torch.bfloat16)
    adapter.float().requires_grad_(True)

    def loss() -> Tensor:
        return diffusion_loss(unet, schedule, x, adapter(Context(text), image), t, eps).mean()

    return loss, [*adapter.parameters()]


def _their_loss(setting: Setting) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return the loss of diffusers' UNet and the parameters to train."""
    x, text, image = inputs(setting, torch.float32, setting.training)
    t, eps = _noise(setting, x)
    peer, noisy = their_unet(setting, torch.bfloat16), Schedule().add_noise(x, eps, t)
    parameters = adapter_parameters(peer)
    for weight in parameters:
        weight.data = weight.data.float()
    conditions = {"image_embeds": [image[:, None]]}
    return lambda: F.mse_loss(peer(noisy, t, text, added_cond_kwargs=conditions).sample, eps), parameters
