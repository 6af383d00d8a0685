"""How much of a joint softmax the picture gets: 1 - g of `concatenated`, layer by layer, head by head, timestep by timestep.

Text and picture compete there, 77 keys against a few, so what the picture is left with explains what such a form can learn. The
number of text keys is an axis: all 77, or as many as the longest text has. So is the picture: a dropped one (the null image) is
not lambda 0, it still takes its share. `decoupled` has no such gate: its (g, 1 - g) is (1, lambda).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from eval.attention_maps import record
from eval.tasks import Bench, Row
from model.adapter import IPAdapter
from model.attention import concatenated
from model.context import Context

TIMES = (981, 801, 601, 401, 201, 21)


@torch.no_grad()
def image_mass(bench: Bench, adapter: IPAdapter) -> list[Row]:
    """The mean over pictures and queries of 1 - g, a list of heads for each layer, timestep, number of text keys, and picture."""
    pipeline, device = bench.pipeline, next(bench.pipeline.unet.parameters()).device
    tokens = pipeline.text.tokenize(bench.prompts.other)
    longest = int(tokens.argmax(dim=1).max()) + 1  # <|endoftext|> is the last in the vocabulary
    text = pipeline.text(tokens.to(device))
    own = bench.embedding(adapter)
    null = replace(pipeline, adapters=(adapter,)).null(adapter, own).expand_as(own)
    x0 = pipeline.vae.encode(bench.prompts.pixels.to(device))
    eps, rows = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device), []
    for t in TIMES:
        x_t = pipeline.schedule.add_noise(x0, eps, torch.full((len(x0),), t, device=device))
        for words in dict.fromkeys((text.shape[1], longest)):
            for picture, embedding in (("own", own), ("null", null)):
                with record(pipeline.unet) as maps:
                    pipeline.unet(x_t, t, adapter(Context(text[:, :words], fuse=concatenated), embedding))
                for found in maps:
                    assert found.image_mass is not None
                    heads = [round(x, 4) for x in found.image_mass.mean(dim=(0, 2)).tolist()]
                    rows.append({"t": t, "layer": found.layer, "words": words, "picture": picture, "heads": heads})
    return rows
