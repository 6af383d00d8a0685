"""Small adapters, and the layout in which diffusers reads them."""

from __future__ import annotations

from peers import randomise
from torch import Tensor

from model.adapter import IPAdapter
from model.image_projection import ImageProjection
from model.unet import UNet

IMAGE = 10  # width of the image embeddings


def adapter_for(unet: UNet, seed: int = 3) -> IPAdapter:
    """With weights that float32 can hold, because diffusers reads an adapter into float32 first."""
    return randomise(IPAdapter(unet, ImageProjection(IMAGE, unet.config.context_dim)), seed).float().double()


def official(adapter: IPAdapter, unet: UNet) -> dict[str, dict[str, Tensor]]:
    """The released files' layout: keys 1, 3, 5, ... over the layers down, up, and mid last."""
    down = sum(len(stage.attn.blocks) for stage in unet.down if stage.attn is not None)
    layers = list(range(len(adapter.heads)))
    mid = layers[down : down + unet.config.mid_depth]
    order = layers[:down] + layers[down + len(mid) :] + mid
    keys = {
        f"{2 * i + 1}.to_{x}_ip.weight": (adapter.to_k if x == "k" else adapter.to_v)[layer].weight
        for i, layer in enumerate(order)
        for x in "kv"
    }
    return {
        "image_proj": dict(adapter.image_projection.state_dict()),
        "ip_adapter": {k: v.detach().clone() for k, v in keys.items()},
    }
