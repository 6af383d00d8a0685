"""Tiers B, D and E of the ablation: what the forms compute, and tiny studies from end to end."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peers import SMALL_SD15, randn
from PIL import Image
from tiny_world import write_world
from torch import Tensor

from checkpoints.clip import load_text_encoder
from checkpoints.stable_diffusion import load_unet
from eval import __main__ as commands
from eval.ablation import cause, second_base, variants
from eval.ablation.forms import FORMS, OWN, SHARED, VARIANTS
from eval.ablation.fuses import (
    MixedAdapter,
    WithoutPadding,
    even_odds,
    gate,
    image_yields,
    mixed,
    text_yields,
    unpadded,
)
from eval.ablation.grid import bisect_lambdas
from eval.ablation.rows import Results
from eval.ablation.training import load, save
from model.attention import attention, concatenated, decoupled
from model.context import Context
from model.image_projection import ImageProjection
from model.source import Source
from model.unet import UNet
from train import options as training_options

ROOT = Path(__file__).parent.parent
HEADS = [FORMS[form].name for form in (*OWN, *SHARED)]


def sources(scale: float | Tensor = 1.0) -> tuple[Tensor, Source, Source]:
    """Queries, a text of 7 tokens and an image prompt of 4, for 2 rows and 3 heads, in float64."""
    q, text, image = (2 * randn(2, 3, n, 5, seed=n) for n in (11, 7, 4))
    return q, Source(text, text.flip(-1)), Source(image, image.flip(-1), scale)


def test_a_joint_softmax_is_taken_apart() -> None:
    """g A_t + A_i and A_t + (1 - g) A_i are together the sum and the joint softmax."""
    q, text, image = sources()
    together = text_yields(q, text, [image]) + image_yields(q, text, [image])
    torch.testing.assert_close(together, decoupled(q, text, [image]) + concatenated(q, text, [image]))
    everything = torch.cat([q @ text.k.mT, q @ image.k.mT], dim=-1) / math.sqrt(5)
    torch.testing.assert_close(gate(q, text, image), everything.softmax(-1)[..., :7].sum(-1, keepdim=True))


@pytest.mark.parametrize("lam", [0.0, 0.3, 2.0])
def test_lambda_multiplies_the_image(lam: float) -> None:
    q, text, image = sources(lam)
    a, b, g = attention(q, text.k, text.v), attention(q, image.k, image.v), gate(q, text, image)
    torch.testing.assert_close(text_yields(q, text, [image]), g * a + lam * b)
    torch.testing.assert_close(image_yields(q, text, [image]), a + lam * (1 - g) * b)
    mu = torch.tensor([0.2, 0.5, 0.9]).double().view(1, 3, 1, 1)
    q, text, image = sources(mu)
    torch.testing.assert_close(mixed(q, text, [image]), (1 - mu) * a + mu * b)


def test_the_mixture_is_trained_and_saved(tmp_path: Path) -> None:
    """Each layer and head has its own mu, from 1/2, with a gradient; the file and its card give the same adapter again."""
    torch.manual_seed(0)
    unet = UNet(SMALL_SD15).requires_grad_(False)
    adapter = MixedAdapter(unet, ImageProjection(12, SMALL_SD15.context_dim))
    x, text, features = (randn(*shape).float() for shape in ((2, 4, 8, 8), (2, 7, SMALL_SD15.context_dim), (2, 12)))
    assert all(torch.equal(mu, torch.full_like(mu, 0.5)) for mu in adapter.mu)
    unet(x, 100, adapter(Context(text, fuse=mixed), features)).square().mean().backward()
    assert all(mix.grad is not None and mix.grad.all() for mix in adapter.mix)
    with torch.no_grad():
        for mix in adapter.mix:
            mix.normal_()
        save(adapter, unet, tmp_path / "mixed.safetensors", {"a": "card"})
        again = load(tmp_path / "mixed.safetensors", unet)
        assert isinstance(again, MixedAdapter) and "mix" in json.loads((tmp_path / "mixed.json").read_text())
        outputs = [unet(x, 100, each(Context(text, fuse=mixed), features)) for each in (adapter, again)]
    torch.testing.assert_close(*outputs, atol=1e-3, rtol=1e-3)  # the file is in half precision


def test_a_form_without_lambda_is_drawn_as_it_was_trained() -> None:
    assert bisect_lambdas(lambda lam: 1 - lam, "none") == {0.0: 1.0, 1.0: 0.0}


def test_each_form_has_its_fuse() -> None:
    """Each is combined in the same way with own projections and with the text's."""
    pairs = {"decoupled": ("ip_adapter", "shared"), "concatenated": ("concatenated", "simple")}
    pairs |= {name: (name, f"shared_{name}") for name in ("image_yields", "text_yields")}
    for fuse, (own, shared) in pairs.items():
        assert FORMS[own].fuse.__name__ == FORMS[shared].fuse.__name__ == fuse
        assert FORMS[own].own_projections and not FORMS[shared].own_projections
    assert [name for name, form in FORMS.items() if form.zero_values] == ["zero_values"]


def test_a_tiny_study_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All tables are printed. With the finished file alone, nothing is computed again, and the digits are the same."""
    weights, path = write_world(tmp_path / "weights"), tmp_path / "results" / "cause.json"

    def call() -> str:
        given = ["--weights", str(weights), "cause", "--out", str(tmp_path), "--smoke", "--jobs", "1"]
        commands.run(commands.parser().parse_args(given))
        return capsys.readouterr().out

    said, written = call(), path.read_text()
    results = Results.of(path)
    assert [*results.data["summary"]["endpoint"]][:9] == [*OWN, *SHARED] and all(name in said for name in HEADS)
    assert len(results.data["summary"]["difference"]) == len(cause.CONTRASTS) == 9
    assert Image.open(path.with_suffix(".png")).size == (1200, 480)
    shares = results.data["summary"]["shares"]
    assert {len(layer) for layers in shares.values() for layer in layers} == {len(results.data["summary"]["mu"][0])}
    assert all(0 < share < 1 for layers in shares.values() for layer in layers for share in layer)
    own, other = (results.units[f"drawn-simple-0-16-complementary-test-all{end}"] for end in ("", "-as-shared"))
    assert own.value["sampled"] == "" and other.value["sampled"] == "shared" and max(other.value["lambdas"]) == 2
    shutil.rmtree(tmp_path / "runs")
    monkeypatch.setattr("train.adapter.fit", None)
    assert call().endswith(said[said.index("|") :]) and path.read_text() == written


NAMES = [
    "difference [95 %]",
    "counting only background",
    "counting only background, at 95%",
    "counting only size and place",
    "counting only size and place, at 95%",
]


@pytest.mark.parametrize("name", second_base.BASES)
def test_another_base_end_to_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has both forms, beside those of tier B if its results are there."""
    path = tmp_path / "results" / f"{name.replace('-', '_')}.json"
    weights = write_world(tmp_path / "weights")
    size = ["--out", str(tmp_path), "--smoke", "--jobs", "1"]
    commands.run(commands.parser().parse_args(["--weights", str(weights), name, "--base", str(weights), *size]))
    lines = capsys.readouterr().out.splitlines()
    rows = lines[lines.index(next(line for line in lines if line.startswith("| base"))) :]
    assert [row.split(" | ")[1] for row in rows[2:]] == ["IP-Adapter", "simple", *NAMES]
    results = Results.of(path)
    assert set(results.data["summary"]) == {"alone", "ceiling", "endpoint", "one", "difference", "only"}
    assert len(second_base.table(second_base.both_bases(results, results))) == 2 * (2 + len(NAMES))
    written, said = path.read_text(), rows
    monkeypatch.setattr(second_base.OtherBase, "train", lambda *_: pytest.fail("a base was trained"))
    commands.run(commands.parser().parse_args([name, "--out", str(tmp_path)]))
    assert path.read_text() == written
    assert capsys.readouterr().out.splitlines()[-len(said) :] == said, "without the second base, the results are reported again"


@pytest.mark.parametrize("name", second_base.BASES)
def test_another_base_is_trained_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command lines are those of `python -m train`; what is there is not trained again; a failure is said."""
    other, base, said = second_base.BASES[name], tmp_path / "base", list[argparse.Namespace]()

    def train(command: list[str]) -> subprocess.CompletedProcess[str]:
        options = training_options.parser("").parse_args(command[3:])
        assert command[1:3] == ["-m", "train"] and (options.seed, options.weights, options.device) == (2, base, "cuda")
        said.append(options)
        (base / f"{second_base.FILES[options.stage]}.safetensors").write_bytes(b"")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("subprocess.run", train)
    for _ in range(2):
        other.train(base, ROOT / "weights", tmp_path / "state", "cuda")
    stages = {"second-base": [("clip", None), ("unet", None)], "half-base": [("unet", [32, 64, 96])]}
    assert [(options.stage, options.channels) for options in said] == stages[name]
    trained = {"image_encoder", "unet"} & {second_base.FILES[options.stage] for options in said}
    for part in {"vae", "judge", "image_encoder"} - trained:
        assert (base / f"{part}.safetensors").read_bytes() == (ROOT / "weights" / f"{part}.safetensors").read_bytes()
    (base / "unet.safetensors").unlink()
    monkeypatch.setattr("subprocess.run", lambda command: subprocess.CompletedProcess(command, 1))
    with pytest.raises(ValueError, match="was not trained"):
        other.train(base, ROOT / "weights", tmp_path / "state", "cuda")


def test_even_odds_count_tokens() -> None:
    """7 text tokens and 4 image tokens: as the joint softmax at lambda 7/4 times as large."""
    q, text, image = sources(0.3)
    _, _, larger = sources(0.3 * 7 / 4)
    torch.testing.assert_close(even_odds(q, text, [image]), concatenated(q, text, [larger]))


@pytest.mark.parametrize("lam", [1.0, 0.3, torch.tensor([0.2, 3.0]).double().view(2, 1, 1, 1)])
def test_padding_is_left_out(lam: float | Tensor) -> None:
    """With the last tokens of each row set to zero, a row is what the joint softmax gives for the other tokens alone."""
    q, text, image = sources(lam)
    keep = torch.arange(7) < torch.tensor([3, 5])[:, None]
    zeroed = Source(*(x * keep[:, None, :, None] for x in (text.k, text.v)))
    out = unpadded(q, zeroed, [image])
    for row, length in enumerate((3, 5)):
        short = Source(*(x[row : row + 1, :, :length] for x in (text.k, text.v)))
        scale = lam[row : row + 1] if isinstance(lam, Tensor) else lam
        picture = Source(image.k[row : row + 1], image.v[row : row + 1], scale)
        torch.testing.assert_close(out[row : row + 1], concatenated(q[row : row + 1], short, [picture]))


@pytest.mark.parametrize("tier", ["cause", "rivals", "variants", "second-base", "half-base", "rates"])
def test_a_tiny_run_does_not_replace_the_results(tier: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another folder with --out"):
        commands.run(commands.parser().parse_args([tier, "--smoke"]))
    if tier in second_base.BASES:
        with pytest.raises(ValueError, match="--smoke does not train a base"):
            commands.run(commands.parser().parse_args([tier, "--smoke", "--out", str(tmp_path)]))


def test_a_text_encoder_without_padding() -> None:
    """The tokens up to the first end token are those of the text encoder; the others are zero."""
    text = load_text_encoder(ROOT / "weights" / "text_encoder.safetensors")
    without, prompts = WithoutPadding.of(text), ["", "a fox", "a fox on a pink background, top left"]
    full, cut = (each(text.tokenize(prompts)) for each in (text, without))
    for row, length in enumerate(len(tokens) for tokens in text.split(prompts)):
        torch.testing.assert_close(cut[row, :length], full[row, :length])
        assert not cut[row, length:].any() and full[row, length:].any()


def test_the_variants_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every form is trained as it says, and has a line; the forms without padding are drawn without it."""
    weights = write_world(tmp_path / "weights")
    size = ["--out", str(tmp_path), "--smoke", "--jobs", "1"]
    commands.run(commands.parser().parse_args(["--weights", str(weights), "variants", *size]))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines[next(i for i, line in enumerate(lines) if line.startswith("| form")) + 2 :]]
    sizes = {row[0].removeprefix("| "): int(row[1].replace(",", "")) for row in rows}
    controls = [f"{FORMS[form].name}; seed 0, trained again" for form in variants.CONTROLS]
    assert sorted(sizes) == sorted([*(FORMS[form].name for form in VARIANTS), *controls])
    sizes = {form: sizes[FORMS[form].name] for form in VARIANTS}
    assert sizes["tokens_1"] < sizes["zero_values"] < sizes["tokens_16"] < sizes["tokens_64"]
    assert sizes["joint_even"] == sizes["joint_unpadded"] == sizes["zero_values"] and sizes["simple_even"] < sizes["tokens_1"]
    adapter = load(tmp_path / "results" / "variants" / "tokens_16-0.safetensors", load_unet(weights / "unet.safetensors"))
    assert adapter.image_projection.tokens == 16
    path = tmp_path / "results" / "variants.json"
    monkeypatch.setattr(variants, "VARIANTS", {"tokens_16": "tokens_1"})
    monkeypatch.setattr(variants, "CONTROLS", ("tokens_1",))
    table = variants.table(Results.of(path), Results.of(path))  # as if tier B had the first of two forms
    assert [*table["form"]] == ["IP-Adapter, 1 token", "IP-Adapter, 1 token; seed 0, trained again", "IP-Adapter, 16 tokens"]
    empty, _, difference = table["difference [95 %]"]
    assert empty == "" and "[" in difference
