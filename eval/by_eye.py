"""Draw two pictures of each concept from text alone, and measure how often people's labels match the text.  `python -m eval by-eye`

`--draw` draws the pictures in random order, as the sheet labels.png, and writes what they should show to labels.json, in the format of
eval/calibration.py. People then label the sheet without seeing the texts; their labels are added to labels.json by hand. Without
`--draw`, the command compares their labels, and the judge's, with the texts.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from einops import rearrange
from PIL import Image

from checkpoints.files import check_output, read_json, read_json_if_there, replacing, sha256, write_json
from eval.bench import draw_prompts
from eval.calibration import Labels, read, share, tiles_of
from eval.tables import markdown
from sampling.images import to_images
from sampling.loading import load
from train.judge import Judge, load_judge
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, caption

EACH, ACROSS = 2, 16  # pictures of each concept, and in a row of the sheet
STEPS, GUIDANCE = 20, 4.0


def texts() -> list[tuple[str, str]]:
    """Return the concept and background of each picture, in random order. Each concept is on `EACH` different backgrounds."""
    rng = np.random.default_rng((929, 0))
    grounds = [rng.permutation(BACKGROUND_NAMES)[:EACH] for _ in CONCEPT_NAMES]
    pairs = [(concept, str(ground)) for concept, each in zip(CONCEPT_NAMES, grounds, strict=True) for ground in each]
    return [pairs[i] for i in rng.permutation(len(pairs))]


def draw(weights: Path, out: Path) -> None:
    """Draw the pictures with seeds 0, 1, ..., and write the sheet and what it should show to the folder `out`.

    Raises FileExistsError if the folder holds labels, which would not be those of the new pictures.
    """
    sheet, record = out / "labels.png", out / "labels.json"
    if read_json_if_there(record).get("labels"):
        raise FileExistsError(f"{record} holds the labels of other pictures: choose another folder with --labels")
    for path in (sheet, record):
        check_output(path)
    pairs = texts()
    prompts = [caption(concept, None, ground) for concept, ground in pairs]
    drawings = to_images(draw_prompts(load(weights, ()), prompts, None, 0.0, GUIDANCE, STEPS, "by eye"))
    grid = rearrange(np.stack([np.array(image) for image in drawings]), "(r c) h w k -> (r h) (c w) k", c=ACROSS)
    with replacing(sheet) as part:
        Image.fromarray(grid).save(part, "PNG")
    settings = {"steps": STEPS, "guidance": GUIDANCE, "unet": sha256(weights / "unet.safetensors")}
    rows = [{"text": text, "concept": c, "background": b, "seed": i} for i, (text, (c, b)) in enumerate(zip(prompts, pairs, strict=True))]
    write_json(record, {"made": settings, "drawn": rows, "labels": []})


def evaluate(judge: Judge, folder: Path) -> dict[str, dict[str, float]]:
    """Return for each labeller and for the judge the percentage of pictures whose concept and background are those of the text."""
    data = read_json(folder / "labels.json")
    if not data["labels"]:
        raise ValueError(f"{folder / 'labels.json'} holds no labels yet: label the pictures of labels.png, row by row")
    labels_of = {f"labeller {i}": Labels.of(labels) for i, labels in enumerate(data["labels"], start=1)}
    labels_of["judge"] = read(judge, tiles_of(folder / "labels.png"))
    truth = {key: [each[key] for each in data["drawn"]] for key in ("concept", "background")}
    return {name: {key: share(getattr(labels, key), truth[key]) for key in truth} for name, labels in labels_of.items()}


def table(results: dict[str, Any]) -> str:
    """Make the table of docs/world.md."""
    return markdown(pd.DataFrame(results["share"]).map(lambda x: f"{x:.1f}%").rename_axis("").reset_index())


def run(args: Namespace) -> None:
    """`python -m eval by-eye`"""
    if args.draw:
        draw(args.weights, args.labels)
        return
    check_output(args.out)
    file = args.weights / "judge.safetensors"
    results = {"sha256": {file.name: sha256(file)}, "share": evaluate(load_judge(file), args.labels)}
    write_json(args.out, results)
    print(table(results))
