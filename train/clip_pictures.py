"""The batches that CLIP is trained on: pictures of the mini world with their captions, in groups that are hard to tell apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.image_encoder import normalise
from model.text_encoder import TextEncoder
from train.pool import in_parts, pixels_of, scenes_of
from train.randomness import Share, generator
from train.world import BACKGROUND_NAMES

GROUP = 8  # number of pictures in a batch that share concept and background
ClipBatch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class CaptionedPictures:
    """Batches of `size` pictures with captions. Each group of `GROUP` pictures shares concept and background.

    `pixels`: `n 3 64 64`, bytes. `plain` and `rich`: `n m`, the tokens of the two kinds of caption. `slots`: `n 10`. `cells`: for each
    picture, the rows of all pictures with its concept and background, as (first, count) in `order`.
    """

    pixels: Tensor
    plain: Tensor
    rich: Tensor
    slots: Tensor
    order: Tensor
    cells: Tensor
    size: int
    seed: int

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> ClipBatch:
        """Return pixels, tokens (three of four captions are rich), and the slots of the rich captions."""
        g = generator(self.seed, step)
        leaders = torch.randint(len(self.pixels), (-(-self.size // GROUP), 1), generator=g)
        first, count = self.cells[leaders].unbind(dim=-1)
        rows = self.order[first + (torch.rand(len(leaders), GROUP, generator=g) * count).long()].flatten()[: self.size]
        rows = rows.to(self.pixels.device)
        plain = torch.arange(self.size, device=rows.device) % 4 == 0
        own = Share(rank, world_size).rows(self.size)
        rows, plain = rows[own], plain[own]
        tokens = torch.where(plain[:, None], self.plain[rows], self.rich[rows])
        return normalise(self.pixels[rows].float() / 255), tokens, self.slots[rows]


def captioned_pictures(text: TextEncoder, count: int, first: int, device: str, size: int, seed: int) -> CaptionedPictures:
    """Return batches of the training scenes first .. first + count - 1, in memory on a device."""
    scenes, pixels = scenes_of("train", count, first), pixels_of("train", count, first)

    def tokens(name: str) -> Tensor:
        parts = in_parts(lambda part: text.tokenize([getattr(scenes[i], name) for i in part]), count, 0, f"{name}s")
        return torch.cat(parts)

    plain, rich = tokens("caption"), tokens("rich_caption")
    length = int((rich == rich[:, -1:]).int().argmax(dim=1).max()) + 1
    slots = torch.tensor([scene.slots for scene in scenes])
    cell = slots[:, 0] * len(BACKGROUND_NAMES) + slots[:, 1]
    counts = cell.bincount()
    cells = torch.stack([(counts.cumsum(dim=0) - counts)[cell], counts[cell]], dim=-1)
    pixels, plain, rich, slots = (part.to(device) for part in (pixels, plain[:, :length], rich[:, :length], slots))
    return CaptionedPictures(pixels, plain, rich, slots, cell.argsort(stable=True), cells, size, seed)
