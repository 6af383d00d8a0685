"""Compare speed and memory with diffusers on one device, a GPU above all.  `python -m eval.peers.gpu --device cuda`

It needs no network and no files: all weights are random, since speed does not depend on them. Each line is printed and saved as soon as it
is measured, the most important first. Where diffusers is not installed, only this project is measured. `limit` is the time that the
arithmetic of a step would take at the speed of the device's fastest matrix product.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

from checkpoints.configs import diffusers_config
from checkpoints.files import check_output, write_json
from checkpoints.names import adapter_names
from eval.peers.official import peer_autoencoder
from model.adapter import IPAdapter
from model.context import Context
from model.image_projection import ImageProjection
from model.unet import SD15, UNet, UNetConfig
from model.vae import SD_VAE, VAE, VAEConfig
from sampling.ddim import ddim, ddim_times
from sampling.device import check_device
from sampling.guidance import guided
from sampling.lambdas import as_tensors
from sampling.pipeline import compiled
from sampling.schedule import Schedule
from train.loss import diffusion_loss

Row = dict[str, Any]
IMAGE_DIM = 1024  # width of the image encoder's embedding
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Setting:
    """The device and the sizes: of the networks, the latents, the batches of a step and of training, and the steps of a picture."""

    device: str
    unet: UNetConfig = SD15
    vae: VAEConfig = SD_VAE
    side: int = 64
    batches: tuple[int, int] = (2, 16)
    training: int = 8
    steps: int = 50
    seconds: float = 2.0  # to measure for


def tiny(device: str) -> Setting:
    """Sizes at which the script itself can be tried. The numbers mean nothing."""
    unet = UNetConfig(channels=(32, 64), depth=(1, 0), heads=(2, 2), res_blocks=1, context_dim=16)
    return Setting(device, unet, VAEConfig(channels=(32, 32), res_blocks=1), 8, (2, 3), 2, 3, 0.0)


def measure(setting: Setting, run: Callable[[], Any]) -> Row:
    """Return the median seconds of a run, after a warm-up, and on a GPU the peak memory in GB. Timer waits for the device."""
    for _ in range(3):
        run()
    on_gpu = setting.device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    row: Row = {"seconds": timer.blocked_autorange(min_run_time=setting.seconds).median}
    return row | ({"memory": torch.cuda.max_memory_allocated() / 1e9} if on_gpu else {})


def inputs(setting: Setting, dtype: torch.dtype, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random latents `b 4 h w`, text tokens `b 77 c` and image embeddings `b e`."""
    make = partial(torch.randn, device=setting.device, dtype=dtype)
    text = make(batch, 77, setting.unet.context_dim)
    return make(batch, 4, setting.side, setting.side), text, make(batch, IMAGE_DIM)


def our_networks(setting: Setting, dtype: torch.dtype) -> tuple[UNet, IPAdapter]:
    """Build our UNet and adapter with their initial weights, frozen."""
    with torch.device(setting.device):
        unet = UNet(setting.unet)
        adapter = IPAdapter(unet, ImageProjection(IMAGE_DIM, setting.unet.context_dim))
    return unet.to(dtype).eval().requires_grad_(False), adapter.to(dtype).requires_grad_(False)


def their_unet(setting: Setting, dtype: torch.dtype) -> Any:
    """Build diffusers' UNet with an adapter at lambda 1, with random weights, frozen."""
    from diffusers import UNet2DConditionModel

    ours, adapter = our_networks(setting, torch.float32)
    names = adapter_names(adapter.state_dict(), ours)
    state: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for name, tensor in adapter.state_dict().items():
        group, _, rest = names[name][0].partition(".")
        state[group][rest] = tensor.cpu()
    peer: Any = UNet2DConditionModel.from_config(diffusers_config(setting.unet))
    peer._load_ip_adapter_weights([state])
    return peer.to(setting.device, dtype).eval().requires_grad_(False)


def peer_or_none(build: Callable[[], Any]) -> Any:
    """Call `build`, unless diffusers is not installed."""
    return build() if find_spec("diffusers") else None


def peak(setting: Setting, dtype: torch.dtype) -> float:
    """Return the speed of a large matrix product in FLOP/s."""
    n = 8192 if setting.device.startswith("cuda") else 512
    a, b = (torch.randn(n, n, device=setting.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / float(measure(setting, lambda: a @ b)["seconds"])


def step(setting: Setting, dtype: torch.dtype, batch: int, mode: str | None = None) -> Row:
    """Measure one call of the UNet with the adapter. `mode` is that of torch.compile; None is eager."""
    (x, text, image), t = inputs(setting, dtype, batch), torch.tensor(500, device=setting.device)
    unet, adapter = our_networks(setting, dtype)
    context = adapter(Context(text), image)
    with FlopCounterMode(display=False) as counter:
        unet(x, t, context)
    if mode:
        unet, context = compiled(unet, mode), as_tensors(context)
    row: Row = {"ours": measure(setting, partial(unet, x, t, context))}
    del unet, adapter
    if (peer := peer_or_none(partial(their_unet, setting, dtype))) is not None:
        peer = torch.compile(peer, mode=mode) if mode else peer
        added = {"image_embeds": [image[:, None]]}
        row["theirs"] = measure(setting, lambda: peer(x, t, text, added_cond_kwargs=added))
    return row | {"limit": counter.get_total_flops() / peak(setting, dtype)}


def picture(setting: Setting, dtype: torch.dtype) -> Row:
    """Measure a picture from text tokens and an image embedding, with guidance 7.5, decoded by the VAE."""
    x, text, image = inputs(setting, dtype, 2)
    unet, adapter = our_networks(setting, dtype)
    vae = VAE(setting.vae).to(setting.device, dtype).requires_grad_(False)
    uncond, cond = (adapter(Context(text[i : i + 1]), image[i : i + 1]) for i in (0, 1))
    schedule = Schedule()

    def ours() -> Tensor:
        times, z = ddim_times(schedule, setting.steps), x[:1].float()
        for state in ddim(guided(unet, uncond, cond, 7.5), z, schedule, times):
            z = state.x
        return vae.decode(z.to(dtype))

    row = {"ours": measure(setting, ours)}
    if (theirs := peer_or_none(partial(_their_pipeline, setting, dtype))) is not None:
        prompts = {"prompt_embeds": text[1:], "negative_prompt_embeds": text[:1]}
        given = prompts | {"ip_adapter_image_embeds": [image[:, None]], "num_inference_steps": setting.steps}
        size = setting.side * setting.vae.factor
        row["theirs"] = measure(setting, lambda: theirs(**given, height=size, width=size, output_type="pt"))
    return row


def _their_pipeline(setting: Setting, dtype: torch.dtype) -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    vae, unet = peer_autoencoder(setting.vae).to(setting.device, dtype), their_unet(setting, dtype)
    pipe: Any = StableDiffusionPipeline(vae, None, None, unet, scheduler, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def training(setting: Setting) -> Row:
    """Measure a training step of the adapter in float32, under autocast, on a frozen base in bfloat16: the official recipe for a GPU."""

    def step_of(loss: Callable[[], Tensor], trained: list[Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(trained, 1e-4, weight_decay=0.01)

        def run() -> None:
            with torch.enable_grad(), torch.autocast(torch.device(setting.device).type, torch.bfloat16):
                value = loss()
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    row = {"ours": measure(setting, step_of(*_our_loss(setting)))}
    if (theirs := peer_or_none(partial(_their_loss, setting))) is not None:
        row["theirs"] = measure(setting, step_of(*theirs))
    return row


def _noise(setting: Setting, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return timesteps and noise for latents."""
    return torch.full((len(x),), 500, device=setting.device), torch.randn_like(x)


def _our_loss(setting: Setting) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return our loss, and what is trained."""
    x, text, image = inputs(setting, torch.float32, setting.training)
    (t, eps), schedule = _noise(setting, x), Schedule()
    unet, adapter = our_networks(setting, torch.bfloat16)
    adapter.float().requires_grad_(True)

    def loss() -> Tensor:
        return diffusion_loss(unet, schedule, x, adapter(Context(text), image), t, eps).mean()

    return loss, [*adapter.parameters()]


def _their_loss(setting: Setting) -> tuple[Callable[[], Tensor], list[Tensor]]:
    """Return the same for diffusers."""
    x, text, image = inputs(setting, torch.float32, setting.training)
    t, eps = _noise(setting, x)
    peer, noisy = their_unet(setting, torch.bfloat16), Schedule().add_noise(x, eps, t)
    trained = [p for name, p in peer.named_parameters() if "_ip" in name or name.startswith("encoder_hid_proj")]
    for weight in trained:
        weight.data = weight.data.float()
        weight.requires_grad_(True)
    added = {"image_embeds": [image[:, None]]}
    return lambda: F.mse_loss(peer(noisy, t, text, added_cond_kwargs=added).sample, eps), trained


def rows(s: Setting) -> dict[str, Callable[[], Row]]:
    """The lines by their names, in the order in which they are measured."""
    few, many = s.batches
    bf16, fp16 = DTYPES.values()
    found: dict[str, Callable[[], Row]] = {
        f"eager bf16, batch {few}": partial(step, s, bf16, few),
        f"eager fp16, batch {few}": partial(step, s, fp16, few),
        f"training step, batch {s.training}": partial(training, s),
        f"{s.steps}-step picture, bf16": partial(picture, s, bf16),
    }
    cases = ((bf16, few), (bf16, many), (fp16, few), (fp16, many))
    names = {bf16: "bf16", fp16: "fp16"}
    for mode in ("reduce-overhead", "max-autotune"):
        for dtype, batch in cases:
            found[f"compiled {names[dtype]}, batch {batch}, {mode}"] = partial(step, s, dtype, batch, mode)
        for dtype in (bf16, fp16) if mode == "reduce-overhead" else ():
            found[f"eager {names[dtype]}, batch {many}"] = partial(step, s, dtype, many)
    return found


def evaluate(setting: Setting, out: Path, only: list[str]) -> dict[str, Any]:
    """Measure all lines, or those whose names begin with one of `only`. Print each, and write `out` (JSON) after it.

    A line that fails is saved with its error, and the others go on.
    """
    check_device(setting.device)
    check_output(out)
    on_gpu = setting.device.startswith("cuda")
    results: dict[str, Any] = {
        "command": "python -m eval.peers.gpu",
        "device": torch.cuda.get_device_name() if on_gpu else setting.device,
        "torch": torch.__version__,
    }
    for name, run in rows(setting).items():
        if only and not name.startswith(tuple(only)):
            continue
        torch._dynamo.reset()
        try:
            with torch.no_grad():
                results[name] = run()
        except RuntimeError as error:  # out of memory, or a compiler that is missing
            results[name] = {"error": str(error).partition("\n")[0]}
        print(name, json.dumps(results[name]), flush=True)
        write_json(out, results)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    return results


def main() -> None:
    p = argparse.ArgumentParser(prog="python -m eval.peers.gpu", description=__doc__)
    p.add_argument("--device", default="cuda", help="device to measure (default: cuda)")
    p.add_argument("--out", type=Path, default=Path("results/gpu.json"), help="file of the results (default: results/gpu.json)")
    p.add_argument("--tiny", action="store_true", help="try the script at a tiny size; the numbers mean nothing")
    p.add_argument("--row", action="append", default=[], help="measure only lines whose names begin with this; may be given again")
    args = p.parse_args()
    try:
        evaluate(tiny(args.device) if args.tiny else Setting(args.device), args.out, args.row)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
