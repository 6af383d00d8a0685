"""Lay out pictures on a labelled sheet."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL, GAP, APART = 128, 6, 18


def sheet(
    columns: Sequence[Sequence[str]],
    rows: Sequence[Sequence[Image.Image]],
    notes: Sequence[str],
    note_at: int = 0,
    title: str = "",
) -> Image.Image:
    """Draw rows of pictures, resized to CELL x CELL, with a title above each column and a note below each row.

    `columns`: the titles, in groups that are set apart. `note_at`: the column where notes start. `title`: a line at the top.
    """
    large, font, small = (ImageFont.load_default(size) for size in (20, 17, 14))
    titles = [(group, text) for group, texts in enumerate(columns) for text in texts]
    lefts = [GAP + i * (CELL + GAP) + group * APART for i, (group, _) in enumerate(titles)]
    head = 36 if title else 0
    top, row_height = head + 36, CELL + 30
    width = max(lefts[-1] + CELL, GAP + int(large.getlength(title))) + GAP
    canvas = Image.new("RGB", (width, top + row_height * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, 10), title, fill="black", font=large)
    for left, (_, text) in zip(lefts, titles, strict=True):
        pen.text((left, head + 10), text, fill="black", font=font)
    for y, (pictures, note) in enumerate(zip(rows, notes, strict=True)):
        for left, picture in zip(lefts, pictures, strict=True):
            canvas.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top + y * row_height))
        pen.text((lefts[note_at], top + y * row_height + CELL + 4), note, fill="#333333", font=small)
    return canvas
