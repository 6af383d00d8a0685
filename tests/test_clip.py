"""The final scaling of the mini CLIP; CLIP-I and CLIP-T compared with open_clip and the published formula."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval.clip_score import clip_score, open_clip_scorer, scorer
from model.image_encoder import MINI_IMAGE, ImageConfig, ImageEncoder
from model.text_encoder import TextEncoder
from model.vae import MINI_VAE, VAE
from train import clip, vae
from train.colour import FINE_NAMES, fine_bin, fine_colours

COSINE = 1e-5


def noise(n: int, width: int = 70, height: int = 64) -> list[Image.Image]:
    rng = np.random.default_rng(n)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(n)]


def test_embeddings_get_entries_of_deviation_one_and_keep_their_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    image, pixels = ImageEncoder(MINI_IMAGE).eval(), torch.randn(40, 3, 64, 64)
    monkeypatch.setattr(clip, "probe_data", lambda _: (pixels, {}, 30))
    with torch.no_grad():
        image.clip.attnpool.c_proj.weight.mul_(40)
        image.clip.attnpool.c_proj.bias.normal_()
        before = image(pixels)
        clip.unit_entries(image)
        after = image(pixels)
    assert float(after[:30].std()) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(
        F.cosine_similarity(after, after[:1]), F.cosine_similarity(before, before[:1]), atol=1e-6, rtol=0
    )


def test_targets_over_colour_names_are_a_softmax_of_linear_functions_of_the_colour() -> None:
    """The adapter's projection and the layer that predicts colour names are both linear, so both can represent CIELAB exactly."""
    colours = torch.from_numpy(fine_colours()) * torch.tensor([2.0, 1.0, 1.0])
    logits = colours @ colours.T / clip.SIMILAR**2 - colours.square().sum(dim=1) / (2 * clip.SIMILAR**2)
    torch.testing.assert_close(logits.softmax(dim=1).float(), clip.similar_names(), atol=1e-6, rtol=0)


def test_the_middle_of_a_fine_name_has_that_name() -> None:
    assert [fine_bin(colour) for colour in fine_colours()] == list(range(len(FINE_NAMES)))


@pytest.mark.parametrize("stage", ["clip", "vae"])
def test_a_finished_stage_that_runs_again_writes_the_same_file(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a GPU measures the standard deviation a little differently: here by a millionth of it."""
    torch.manual_seed(0)
    pixels, tensors, deviation = torch.randn(8, 3, 64, 64), list[Tensor](), Tensor.std
    encoder, autoencoder = ImageEncoder(MINI_IMAGE).eval(), VAE(MINI_VAE)
    monkeypatch.setattr(clip, "probe_data", lambda _: (pixels, {}, 8))
    for factor in (1, 1 + 1e-6):
        monkeypatch.setattr(Tensor, "std", lambda x, factor=factor: deviation(x).double() * factor)
        if stage == "clip":
            image = copy.deepcopy(encoder)
            clip.unit_entries(image)
            tensors.append(image.clip.attnpool.c_proj.weight)
        else:
            tensors.append(torch.tensor(vae.unit_scale(autoencoder, pixels.split(4)), dtype=torch.float64))
    assert torch.equal(*tensors)


def test_clip_score_is_the_published_formula() -> None:
    assert clip_score(torch.tensor([0.235, -0.1, 1.0])).tolist() == pytest.approx([0.5875, 0.0, 2.5])


@pytest.mark.parity("open_clip encoders and preprocessing, float32", COSINE)
@pytest.mark.parametrize("n", [1, 3])
def test_any_open_clip_model_scores_as_its_own_features_say(n: int, tmp_path: Path) -> None:
    """The reference uses open_clip's preprocessing, tokenizer and encoders. Pictures are scored one at a time or together."""
    vision = {"image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16}
    sizes = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": {"width": 32, "heads": 2, "layers": 2}}
    (tmp_path / "tiny-CLIP.json").write_text(json.dumps(sizes))
    open_clip.add_model_config(tmp_path)
    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("tiny-CLIP")
    path = tmp_path / "tiny.pt"
    torch.save(model.state_dict(), path)
    ours, drawn, prompts = open_clip_scorer("tiny-CLIP", str(path)), noise(n), noise(n + 3)[:n]
    captions = [f"a picture of {i} foxes" for i in range(n)]
    with torch.no_grad():
        a, b = (model.eval().encode_image(torch.stack([preprocess(p) for p in part])) for part in (drawn, prompts))
        text = model.encode_text(open_clip.get_tokenizer("tiny-CLIP")(captions))
    shown = ours.images(drawn)
    for scored, x in ((ours.images(prompts), b), (ours.texts(captions), text)):
        want = (a / a.norm(dim=-1, keepdim=True) * x / x.norm(dim=-1, keepdim=True)).sum(dim=-1)
        torch.testing.assert_close(F.cosine_similarity(shown, scored), want, atol=COSINE, rtol=0)


def test_our_own_towers_score_too() -> None:
    torch.manual_seed(0)
    image = ImageEncoder(ImageConfig(image_size=32, patch=16, width=16, layers=(2,), heads=2, output_dim=8)).eval()
    text = TextEncoder(replace(clip.MINI_TEXT, width=16, layers=1, heads=2, output_dim=8)).eval()
    ours, drawn = scorer("tiny", image, text), noise(70, 40, 33)
    with torch.no_grad():
        a, c = image(torch.stack([image.preprocess(p) for p in drawn])), text.pooled(text.tokenize(["a fox"] * 70))
    torch.testing.assert_close(ours.images(drawn), a, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.texts(["a fox"] * 70), c, atol=1e-5, rtol=1e-5)
