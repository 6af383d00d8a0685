"""Measure the share of a joint softmax that goes to the picture: 1 - g of `concatenated`, by layer, head and timestep.

In a joint softmax, 77 text keys compete with a few image keys, so this share limits what the form can learn. We measure it with all 77
text keys and with only as many as the longest text has; and for the prompt's own picture and for the null image, which also receives
attention. `decoupled` has no such gate: its weights are (1, lambda) instead of (g, 1 - g).
"""

from __future__ import annotations

import torch

from eval.attention_maps import record
from eval.bench import Bench, Row
from model.adapter import IPAdapter
from model.attention import concatenated
from model.context import Context

TIMES = (981, 801, 601, 401, 201, 21)


@torch.no_grad()
def image_mass(bench: Bench, adapter: IPAdapter) -> list[Row]:
    """Average 1 - g over pictures and queries. Return a row per layer, timestep, number of text keys and picture (own or null)."""
    pipeline, device = bench.pipeline, next(bench.pipeline.unet.parameters()).device
    tokens = pipeline.text.tokenize(bench.prompts.conflicts)
    longest = int(tokens.argmax(dim=1).max()) + 1  # <|endoftext|> has the largest number in the vocabulary
    text = pipeline.text(tokens.to(device))
    pictures = {"own": bench.embedding(adapter), "null": bench.null(adapter)}
    x0 = pipeline.vae.encode(bench.prompts.pixels.to(device))
    eps, rows = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device), []
    for t in TIMES:
        x_t = pipeline.schedule.add_noise(x0, eps, torch.full((len(x0),), t, device=device))
        for words in dict.fromkeys((text.shape[1], longest)):
            for picture, embedding in pictures.items():
                with record(pipeline.unet) as maps:
                    pipeline.unet(x_t, t, adapter(Context(text[:, :words], fuse=concatenated), embedding))
                for each in maps:
                    assert each.image_mass is not None
                    heads = [round(x, 4) for x in each.image_mass.mean(dim=(0, 2)).tolist()]
                    rows.append({"t": t, "layer": each.layer, "words": words, "picture": picture, "heads": heads})
    return rows
