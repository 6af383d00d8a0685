"""The paper's measurement (section 4.2.1, Table 1): draw variations of image prompts, and score them with CLIP.  `python -m eval clip`

The paper draws 4 pictures for each of the 5,000 pictures of COCO's validation set of 2017. CLIP-I is the mean cosine similarity of a
drawing and its image prompt; CLIP-T is the mean CLIPScore, 2.5 max(cos, 0), of a drawing and the caption of its image prompt.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoints.files import check_output, write_json
from eval import clip_score
from eval.bench import embed
from eval.clip_score import Scorer
from eval.clip_score import clip_score as score_of
from eval.device import device_of, dtype, precision
from eval.protocol import Protocol
from eval.scores import RESAMPLES, bootstrap
from sampling.device import check_device
from sampling.images import to_images
from sampling.loading import load
from sampling.pipeline import Pipeline
from train import processes
from train.album import Album, CaptionedPicture, first_rows
from train.captioned import captioned_files
from train.card import code_version
from train.fingerprint import digest, fingerprint

BLOCK = 16  # prompts whose scores are written together
TABLE_1 = {"CLIP-I": 0.828, "CLIP-T": 0.588, "trainable parameters": "22M"}  # the row of IP-Adapter
NOT_STATED = "which of a picture's captions is used, the seeds, and the negative prompt"


def first_of_each(files: Album, n: int) -> Album:
    """Return the first n different pictures, each with the first entry that names it."""
    return files.select(first_rows(files.keys).sort().values[:n])


@torch.no_grad()
def scores_of(
    pipeline: Pipeline, scorer: Scorer, files: Sequence[CaptionedPicture], first: int, protocol: Protocol, batch: int
) -> dict[str, Any]:
    """Draw and score the prompts first, first + 1, ...: the cosines, one list of `images_per_prompt` for each prompt."""
    images, k, embeddings = [file.open() for file in files], protocol.images_per_prompt, list[Tensor]()
    embedding, prompt = embed(pipeline, images), torch.arange(len(files)).repeat_interleave(k)
    for rows in torch.arange(len(prompt)).split(batch):
        seeds = (protocol.seed + first * k + rows).tolist()
        with precision(device_of(pipeline.unet)):
            drawings = pipeline.sample(
                [protocol.prompt] * len(rows),
                seeds,
                embedding[prompt[rows]],
                scale=protocol.scale,
                guidance=protocol.guidance,
                steps=protocol.steps,
            )
        embeddings.append(scorer.images(to_images(drawings)))
    targets = {"clip_i": scorer.images(images), "clip_t": scorer.texts([file.text for file in files])}
    return {name: F.cosine_similarity(torch.cat(embeddings), target[prompt]).view(-1, k).tolist() for name, target in targets.items()}


def measure_cosines(pipeline: Pipeline, scorer: Scorer, files: Album, protocol: Protocol, batch: int, folder: Path) -> dict[str, Tensor]:
    """Return the cosines `n k` of all drawings. Blocks of prompts are stored in `folder`, and processes share those that are missing."""
    blocks = [(first, folder / f"{first:06}.json") for first in range(0, len(files), BLOCK)]
    missing, team = [block for block in blocks if not block[1].exists()], processes.team()
    processes.wait()  # so that all processes find the same blocks missing
    for first, file in tqdm(missing[team.rank :: team.size], desc=f"{BLOCK} prompts each", disable=team.rank > 0):
        part = [files[i] for i in range(first, min(first + BLOCK, len(files)))]
        write_json(file, scores_of(pipeline, scorer, part, first, protocol, batch))
    processes.wait()
    contents = [json.loads(file.read_text()) for _, file in blocks]
    return {name: torch.tensor([row for block in contents for row in block[name]]) for name in ("clip_i", "clip_t")}


def report(cosines: dict[str, Tensor]) -> dict[str, list[float]]:
    """Compute the means, each with its interval: the cosines, and 2.5 max(cos, 0)."""
    scores = {name: bootstrap(values.mean(dim=1)) for name, values in cosines.items()}
    return scores | {f"{name}_score": bootstrap(score_of(values).mean(dim=1)) for name, values in cosines.items()}


def evaluate(
    data: Path, pipeline: Pipeline, scorer: Scorer, protocol: Protocol, state: Path, batch: int, about: dict[str, Any]
) -> dict[str, Any]:
    """Measure an adapter on the pictures in `data`. `about` is copied into the results; `batch`: pictures drawn at a time.

    Raises ValueError if the pipeline has no image encoder or not exactly one adapter, or the pictures cannot be read.
    """
    if pipeline.image is None or len(pipeline.adapters) != 1:
        raise ValueError("this measures one adapter and its image encoder: name them with --ip-adapter and --image-encoder")
    files = first_of_each(captioned_files(data, state / "cache"), protocol.pictures)
    protocol = Protocol(**{**asdict(protocol), "pictures": len(files)})
    (adapter,), device = pipeline.adapters, device_of(pipeline.unet)
    networks = {"unet": pipeline.unet, "vae": pipeline.vae, "text": pipeline.text, "image encoder": pipeline.image, "adapter": adapter}
    identity: dict[str, Any] = {name: fingerprint(part) for name, part in networks.items()}
    identity |= {"scorer": scorer.name, "dtype": dtype(device), **files.made_from()}
    processes.check_same(identity)
    cosines = measure_cosines(pipeline, scorer, files, protocol, batch, state / f"clip-{digest([identity, asdict(protocol)])}")
    return {
        **about,
        "protocol": {**asdict(protocol), "sampler": "DDIM", "size": list(pipeline.native_size), "data": data.resolve().name},
        "drawings": len(files) * protocol.images_per_prompt,
        "departs from the paper in": protocol.differences(),
        "the paper does not state": NOT_STATED,
        "scores": report(cosines),
        "compare": "clip_i with CLIP-I, and clip_t_score with CLIP-T, of Table 1, if the scorer is ViT-L/14 of OpenAI",
        "Table 1": TABLE_1,
        "interval": f"95 %, percentile bootstrap over prompts, {RESAMPLES} resamples",
        "trainable parameters": sum(p.numel() for p in adapter.parameters()),
        "made_from": identity,
        "code": code_version(),
        "torch": torch.__version__,
    }


def run(args: Namespace) -> None:
    """`python -m eval clip`, in one process or in those that torchrun started"""
    check_output(args.out)
    check_device(args.device)
    with processes.join_team(args.device) as team:
        pipeline = load(args.checkpoint or args.weights, args.ip_adapter, args.image_encoder, device=args.device)
        scorer = clip_score.find(args.scorer, args.device)
        protocol = Protocol(args.n, args.images_per_prompt, args.prompt, args.scale, args.steps, args.guidance, args.seed)
        about = {"base": (args.checkpoint or args.weights).name, "adapter": args.ip_adapter.name if args.ip_adapter else "its own"}
        results = evaluate(args.data, pipeline, scorer, protocol, args.state, args.batch, {"scorer": scorer.name, **about})
        if not team.rank:
            write_json(args.out, results)
            print("\n".join(f"{name}: {value:.4f} ({low:.4f} to {high:.4f})" for name, (value, low, high) in results["scores"].items()))
