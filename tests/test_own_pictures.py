"""Training on a user's pictures from the command line: states, caches, outputs, cards, messages, and SIGKILL at 20 points."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from own_pictures import (
    ENVIRONMENT,
    IMAGE,
    UNET,
    base,
    command,
    nothing_encoded,
    picture,
    trained,
    write_base,
    write_pictures,
)
from safetensors.torch import load_file
from tiny import TEXT, VAE_CONFIG
from torch import Tensor

from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.files import sha256
from model.adapter import IPAdapter
from model.features import FINE
from model.image_encoder import ImageEncoder
from model.image_projection import FaceProjection, ImageProjection, MLPProjection, Projection, Resampler
from model.text_encoder import TextEncoder
from model.unet import UNet
from model.vae import VAE
from sampling.loading import load
from sampling.schedule import Schedule
from train import adapter, encode, plan, preview, setting
from train import unet as unet_stage
from train.__main__ import main, status
from train.captioned import captioned_files
from train.card import card, code_version
from train.data import Data, ShuffledBatches
from train.errors import OtherRun
from train.file_pairs import FilePairs, FilePictures
from train.pairs import Pairs
from train.setting import TrainingSource
from train.store import Rows

__all__ = ["base", "trained"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:these words are not")


# states


def another_picture(folder: Path) -> None:
    picture(99).save(folder / "data" / "07.png")


def another_caption(folder: Path) -> None:
    (folder / "data" / "07.txt").write_text("a fox")


def picture_less(folder: Path) -> None:
    (folder / "data" / "07.png").unlink()


CHANGES: dict[str, tuple[Callable[[Path], Any] | None, tuple[str, ...], str]] = {
    "a picture of the same name": (another_picture, (), "pictures"),
    "a caption": (another_caption, (), "captions"),
    "a picture less": (picture_less, (), "pictures, captions"),
    "the size": (None, ("--side", "32"), "side"),
    "the steps": (None, ("--steps", "3"), "steps"),
    "the rate": (None, ("--lr", "1e-3"), "lr"),
    "the seed": (None, ("--seed", "5"), "seed"),
    "the base": (None, ("--base", "OTHER"), "base, vae, text encoder, image encoder"),
    "the encoder": (None, ("--image-encoder", "OTHER/image_encoder.safetensors"), "image encoder"),
    "precision": (None, ("--bf16",), "precision of the base"),  # where the processor has bfloat16
    "where it starts": (None, ("--from", "STARTED"), "--from"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_runs_adapter_is_not_returned(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """The command fails before anything is encoded and names what differs. State and result are unchanged."""
    folder, other = tmp_path / "work", write_base(tmp_path / "other", seed=1)
    shutil.copytree(trained, folder)
    edit, options, names = CHANGES[change]
    monkeypatch.setattr(plan, "has_bfloat16", lambda _: True)
    if edit:
        edit(folder)
    started = trained / "out" / "ip_adapter.safetensors"
    options = tuple(part.replace("OTHER", str(other)).replace("STARTED", str(started)) for part in options)
    before = {path: sha256(path) for path in folder.rglob("*.safetensors")} | {folder: sha256(folder / "state/ip_adapter.pt")}
    nothing_encoded(monkeypatch)
    with pytest.raises(OtherRun, match=rf"ip_adapter\.pt is the state of a run with different {names}[:,]"):
        main(command(folder, base, *options))
    after = {path: sha256(path) for path in folder.rglob("*.safetensors")} | {folder: sha256(folder / "state/ip_adapter.pt")}
    assert before == after


CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"prediction": "v"},
    "vae": {"scale": 0.5},
    "image_encoder": {"heads": 4},
    "text_encoder": {"activation": "gelu"},
}


@pytest.mark.parametrize("part", CONFIGS)
def test_the_same_weights_with_another_config_are_another_run(
    trained: Path, base: Path, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "work", tmp_path / "other"
    shutil.copytree(trained, folder)
    shutil.copytree(base, other)
    card = json.loads((other / f"{part}.json").read_text())
    assert CONFIGS[part].items().isdisjoint(card["config"].items())
    (other / f"{part}.json").write_text(json.dumps(card | {"config": card["config"] | CONFIGS[part]}))
    nothing_encoded(monkeypatch)
    with pytest.raises(OtherRun, match=r"ip_adapter\.pt is the state of a run with different configs:"):
        main(command(folder, base, "--base", other))


def test_features_are_found_by_the_config_of_the_encoder(tmp_path: Path) -> None:
    """The same weights with other heads compute other features, so those in the cache are not used."""
    pictures = FilePictures(captioned_files(write_pictures(tmp_path / "data", 2), tmp_path), 16, 16)
    torch.manual_seed(0)
    first, text, vae = ImageEncoder(IMAGE), TextEncoder(TEXT), VAE(VAE_CONFIG)
    second = ImageEncoder(replace(IMAGE, heads=4))
    second.load_state_dict(first.state_dict())
    a, b = (pictures.pairs(vae, text, image.eval(), tmp_path / "cache").inputs for image in (first, second))
    assert a is not None and b is not None and not torch.equal(a[torch.arange(2)], b[torch.arange(2)])


def test_a_finished_command_is_not_trained_again(
    trained: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(trained, folder)
    monkeypatch.setattr(ShuffledBatches, "batch", lambda *_: pytest.fail("a step was run"))
    main(command(folder, base))
    assert sha256(folder / "out" / "ip_adapter.safetensors") == sha256(trained / "out" / "ip_adapter.safetensors")


def test_a_result_of_another_run_is_not_overwritten(trained: Path, base: Path, tmp_path: Path) -> None:
    """This holds with and without its card."""
    for cards in (True, False):
        folder = tmp_path / f"cards {cards}"
        shutil.copytree(trained, folder)
        shutil.rmtree(folder / "state")
        another_picture(folder)
        if not cards:
            (folder / "out" / "ip_adapter.json").unlink()
        before = sha256(folder / "out" / "ip_adapter.safetensors")
        with pytest.raises(OSError, match=r"ip_adapter\.safetensors was written by another run: choose another folder"):
            main(command(folder, base))
        assert sha256(folder / "out" / "ip_adapter.safetensors") == before


def test_a_second_run_in_the_folder_is_refused(base: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "data")
    hold = "import sys, time; from pathlib import Path; from train.checkpoint import lock_folder\n"
    hold += "with lock_folder(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    first = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "state"], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"locked\n"
        said = status(command(tmp_path, base))
    finally:
        first.kill()
        first.wait()
    assert isinstance(said, str) and f"state is in use by another run (process {first.pid})" in said


# caches


def test_replaced_pictures_are_encoded_anew(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cached latents depend on the content of a picture, not on its name, and on the encoder and the size."""
    folder = write_pictures(tmp_path / "data", 3)
    encoded: list[int] = []
    real = encode.encode_rows

    def counted(data: Data[Tensor], keys: Tensor, encode_: Any, cache: Path, each: int) -> dict[str, Rows]:
        def one(x: Tensor) -> dict[str, Tensor]:
            encoded.append(len(x))
            return encode_(x)

        return real(data, keys, one, cache, each, workers=0)

    monkeypatch.setattr(encode, "encode_rows", counted)

    def pairs(where: Path = base, side: int = 16) -> tuple[FilePairs, int]:
        encoded.clear()
        actual = setting.prepare(TrainingSource(where, data=folder, side=side), tmp_path / "state").pairs
        assert isinstance(actual, FilePairs)
        return actual, len(encoded)

    first, n = pairs()
    assert n == 6  # latents and embeddings
    assert pairs()[1] == 0
    picture(99).save(folder / "01.png")
    second, n = pairs()
    assert n == 2 and (first.mean.all() != second.mean.all()).flatten(1).any(dim=1).tolist() == [False, True, False]
    fresh = FilePictures(TrainingSource(base, data=folder).files(tmp_path)[0], 16, 16)  # type: ignore[index]
    pipeline = load(base, ())
    again = fresh.pairs(pipeline.vae, pipeline.text, pipeline.image, tmp_path / "another cache")
    assert torch.equal(again.mean.all(), second.mean.all()) and again.inputs and second.inputs
    assert torch.equal(again.inputs.all(), second.inputs.all())
    (folder / "00.png").rename(folder / "x.png")
    (folder / "02.png").rename(folder / "00.png")
    (folder / "x.png").rename(folder / "02.png")
    swapped, n = pairs()
    assert n == 0 and torch.equal(swapped.mean.all(), second.mean.all().flip(0))
    assert pairs(side=32)[1] == 3 and pairs(write_base(tmp_path / "other", seed=1))[1] == 6


@pytest.mark.parametrize("stage", ["adapter", "unet"])
def test_no_number_depends_on_what_was_cached(
    stage: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seed gives the same weights with a full, a partial and no cache, whatever ran before."""
    monkeypatch.setattr(preview, "draw_captions", lambda *_: None)
    monkeypatch.setattr(unet_stage, "MINI", replace(UNET, prediction="v"))
    write_pictures(tmp_path / "data", 6)
    plan = replace(adapter.PLAN if stage == "adapter" else unet_stage.PHASES[0], steps=1, batch=2, bf16=False)
    out = tmp_path / "out"
    shutil.copytree(base, out)

    def train() -> dict[str, Tensor]:
        if stage == "adapter":
            adapter.train(tmp_path / "state", out, (plan,), TrainingSource(base, data=tmp_path / "data", side=16))
            return load_file(out / "ip_adapter.safetensors")
        unet_stage.train(tmp_path / "state", out, (plan,), pictures=4, channels=UNET.channels)
        return load_file(out / "unet.safetensors")

    first = train()
    for kept in ("all", "some", "none"):
        torch.rand(5)
        (tmp_path / "state" / f"{plan.name}.pt").unlink()
        files = sorted((tmp_path / "state" / "cache").rglob("*.safetensors"))
        for file in {"all": [], "some": files[::2], "none": files}[kept]:
            file.unlink()
        again = train()
        assert again.keys() == first.keys() and all(torch.equal(again[name], first[name]) for name in first), kept


def test_a_run_killed_at_twenty_points_ends_in_the_same_file(base: Path, tmp_path: Path) -> None:
    """SIGKILL while it encodes, writes caches, states and the result, and between steps; then run the same command again."""
    data = write_pictures(tmp_path / "data", 8)
    arguments = [sys.executable, "tests/kill.py", base, data, tmp_path / "work"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=900, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results["points"]) == 20 and all(results["same"]), results
    kinds = {"half of tensors", "half of state", "before rename", "after rename", "before step", "after latents"}
    assert kinds <= set(results["points"])


# few pictures


@pytest.mark.parametrize(("n", "batch"), [(1, 4), (3, 8), (6, 32), (5, 5), (7, 3)])
def test_fewer_pictures_than_the_batch_are_repeated(n: int, batch: int) -> None:
    """Every batch is full, and the counts of all pictures differ by at most one."""
    pairs = Pairs(torch.zeros(n, 1), torch.zeros(n, 1), torch.zeros(n, dtype=torch.long), torch.zeros(1, 1), None)
    data = ShuffledBatches(pairs, batch, seed=0)
    for step in range(4):
        counts = torch.bincount(data.rows(step), minlength=n)
        assert counts.sum() == batch and int(counts.max() - counts.min()) <= 1


@pytest.mark.parametrize("stage", ["adapter", "plus"])
def test_six_pictures_are_enough(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch is the default, 32. The output says at the start and at the end that nothing is measured."""
    write_pictures(tmp_path / "data", 6)
    monkeypatch.chdir(tmp_path)
    main([stage, "--data", "data", "--base", str(base), "--steps", "2", "--side", "16"])
    said = capsys.readouterr().out
    assert "fewer than 20 different pictures, so none are held out and nothing is measured" in said
    file = Path("out/adapter/ip_adapter_plus.safetensors" if stage == "plus" else "out/adapter/ip_adapter.safetensors")
    assert said.endswith(f"{file}: no pictures were held out, so the program cannot tell whether it learned\n")
    assert file.exists() and sorted(path.name for path in Path("runs").iterdir()) == ["data"]
    kind = Resampler if stage == "plus" else ImageProjection
    assert isinstance(load_adapter(file, load(base, ()).unet).image_projection, kind)


@pytest.mark.parametrize("stage", ["adapter", "plus"])
def test_processors_with_bfloat16_train_and_measure(base: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "has_bfloat16", lambda _: True)
    write_pictures(tmp_path / "data")
    main(command(tmp_path, base, "--preview-every", 2, stage=stage))
    (log,) = (tmp_path / "state").glob("*.jsonl")
    assert {"held_out", "gain_zero", "gain_shuffled"} <= json.loads(log.read_text().splitlines()[-1]).keys()


# cards


def test_the_card_says_what_was_done(trained: Path, base: Path) -> None:
    written = json.loads((trained / "out" / "ip_adapter.json").read_text())
    assert written["command"] == f"python -m train {' '.join(command(trained, base))}"
    assert written["data"] == "data: 16 pictures to train on, 4 held out" and written["base"] == base.name
    assert "licence" not in written and "OpenMoji" not in json.dumps(written)
    assert [plan["steps"] for plan in written["settings"]] == [2] and written["results"]["step"] == 2
    assert written["code"].removesuffix("-dirty") == code_version().removesuffix("-dirty")
    assert written["torch"] == torch.__version__
    assert {"pictures", "captions", "base", "image encoder", "side"} <= written["made_from"].keys()


def test_a_licence_is_stated_where_it_is_known() -> None:
    plan, log = adapter.PLAN, [{"step": 1}, {"step": 2, "seconds": 1.0}, {"step": 3}]
    known = card((plan,), log, "c", {"data": "d"}, "a licence")
    assert known["licence"] == "a licence" and known["results"] == log[1] and known["settings"][0]["lr"] == plan.lr
    assert "licence" not in card((plan,), log, "c", {}, None)


def test_the_code_is_named_by_its_commit_or_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit does not count if it belongs to a repository that the project was copied into."""
    from train import card as cards

    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if head:
        assert head.startswith(code_version().removesuffix("-dirty"))
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", inner.parent], check=True)
    monkeypatch.setattr(cards, "ROOT", inner)
    monkeypatch.setattr(cards.metadata, "version", lambda _: "1.2.3")
    assert code_version() == "1.2.3"


# going on from a released adapter


def released(folder: Path, base: Path, projection: Projection, name: str) -> Path:
    """Write an adapter in the official layout, with weights that differ from those of the UNet."""
    unet = load(base, ()).unet
    known = IPAdapter(unet, projection)
    with torch.no_grad():
        for tensor in known.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(known, unet, folder / name, {}, dtype=None)
    return folder / name


FORMS: dict[str, tuple[str, Callable[[], Projection]]] = {
    "ip_adapter": ("adapter", lambda: ImageProjection(IMAGE.output_dim, UNET.context_dim, 4)),
    "ip_adapter_plus": ("plus", lambda: Resampler(IMAGE.fine_dim, UNET.context_dim, 5, 16, 2, 1)),
    "ip_adapter_full": ("plus", lambda: MLPProjection(IMAGE.fine_dim, UNET.context_dim)),
}


@pytest.mark.parametrize("form", FORMS)
def test_from_continues_a_released_adapter(base: Path, tmp_path: Path, form: str) -> None:
    """The result has the same form and sizes and nearly the same weights. The card names the original, but no licence."""
    stage, projection = FORMS[form]
    start = released(tmp_path, base, projection(), "released.safetensors")
    write_pictures(tmp_path / "data", 6)
    main(command(tmp_path, base, "--from", start, "--lr", "1e-6", stage=stage))
    before, after = load_file(start), load_file(tmp_path / "out" / f"{form}.safetensors")
    assert before.keys() == after.keys() and all(before[name].shape == after[name].shape for name in before)
    moved = max(float((before[name] - after[name].float()).abs().max()) for name in before)
    assert 0 < moved < 2e-3  # it is stored in half precision
    written = json.loads((tmp_path / "out" / f"{form}.json").read_text())
    assert written["from"] == "released.safetensors" and "licence" not in written
    other = "adapter" if stage == "plus" else "plus"
    with pytest.raises(ValueError, match=rf"released\.safetensors is IP-Adapter.*: continue it with `python -m train {stage}`"):
        main(command(tmp_path, base, "--from", start, stage=other))


@pytest.mark.parametrize("stage", ["adapter", "plus"])
def test_from_refuses_an_adapter_that_reads_faces(base: Path, tmp_path: Path, stage: str) -> None:
    start = released(tmp_path, base, FaceProjection(512, UNET.context_dim, 16), "faceid.safetensors")
    write_pictures(tmp_path / "data", 4)
    with pytest.raises(ValueError, match=r"faceid\.safetensors is IP-Adapter FaceID Portrait, which reads faces and cannot be trained"):
        main(command(tmp_path, base, "--from", start, stage=stage))


def test_plus_for_sdxl_has_the_official_sizes() -> None:
    """Width 1280 and 20 heads, where the text tokens are 2048 wide; for SD 1.5, 768 and 12 (the official trainers)."""
    for context, added, width, heads in ((2048, 2816, 1280, 20), (768, 0, 768, 12)):
        unet = UNet(replace(UNET, context_dim=context, added_dim=added))
        pairs = SimpleNamespace(width=1280)
        own = setting.Setting(SimpleNamespace(unet=unet), pairs, None, reads=FINE)  # type: ignore[arg-type]
        projection = own.adapter().image_projection
        assert isinstance(projection, Resampler) and projection.queries.shape == (1, 16, width)
        assert projection.proj_out.weight.shape == (context, width) and {layer.heads for layer in projection.layers} == {heads}


def test_a_schedule_of_another_length_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = setting.load
    monkeypatch.setattr(setting, "load", lambda *a, **k: replace(loaded(*a, **k), schedule=Schedule(timesteps=500)))
    write_pictures(tmp_path / "data", 4)
    with pytest.raises(ValueError, match="has 500 timesteps; adapters are trained on models with 1000"):
        main(command(tmp_path, base))


def test_every_tensor_of_a_continued_adapter_trains(base: Path, tmp_path: Path) -> None:
    """Loaded adapters are frozen, but an adapter that is trained further must not be."""
    start = released(tmp_path, base, FORMS["ip_adapter"][1](), "released.safetensors")
    source = TrainingSource(base, data=write_pictures(tmp_path / "data", 4), side=16, start=start)
    own = setting.prepare(source, tmp_path / "state")
    first = adapter.initial_adapter(own, source, 0)
    assert all(p.requires_grad for p in first.parameters()) and first.training
    assert not any(p.requires_grad for p in UNet.parameters(own.pipeline.unet))
