"""A user's pictures in training: the same numbers from a folder, from shards and from a cache, and the choice among captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from own_pictures import base, command, picture, write_pictures
from safetensors.torch import load_file
from test_processes import torchrun
from test_shards import png, write
from torch import Tensor

from model.features import FINE
from sampling.loading import load
from train import store
from train.__main__ import main, status
from train.captioned import captioned_files
from train.file_pairs import FilePairs, FilePictures
from train.setting import TrainingSource, prepare

__all__ = ["base"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:these words are not", "ignore:this model's vocab")


def shards_of(folder: Path, out: Path, each: int = 7) -> Path:
    """Put the files of a folder into shards, in order."""
    files = sorted(folder.iterdir())
    for i, first in enumerate(range(0, len(files), 2 * each)):
        write(out / f"{i:05}.tar", *((file.name, file.read_bytes()) for file in files[first : first + 2 * each]))
    return out


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "out" / "ip_adapter.safetensors")


def log_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "state" / "ip_adapter.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row.keys() & {"step", "lr", "loss", "grad_norm", "held_out", "gain_shuffled"}} for row in rows]


@pytest.fixture(scope="module")
def folder(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a finished run on it."""
    work = tmp_path_factory.mktemp("folder")
    write_pictures(work / "data", 24)
    main(command(work, base))
    return work


def test_shards_train_as_a_folder_does(folder: Path, base: Path, tmp_path: Path) -> None:
    """The same weights and the same log, to the last bit."""
    shards_of(folder / "data", tmp_path / "data")
    main(command(tmp_path, base))
    assert all(torch.equal(tensor, adapter_of(folder)[name]) for name, tensor in adapter_of(tmp_path).items())
    assert log_of(tmp_path) == log_of(folder) and len(log_of(folder)) == 2


def test_a_cache_trains_as_pictures_do(folder: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train cache` in two processes, then training in one, which encodes nothing."""
    shards_of(folder / "data", tmp_path / "data")
    line = command(tmp_path, base, stage="cache")
    line = [part for i, part in enumerate(line) if not {line[i], line[i - 1]} & {"--steps", "--batch", "--weights"}]
    run = torchrun(2, line)
    said, problems = run.communicate(timeout=300)
    assert run.returncode == 0, problems[-2000:]
    assert "24 pictures are encoded; training with the same --data, --base, --side and --state finds them" in said
    packs = list((tmp_path / "state").rglob("pack-*.safetensors"))
    assert len(packs) >= 4  # of latents and embeddings, in two processes
    monkeypatch.setattr(store, "stream", lambda _, steps, __: iter(()) if not steps else pytest.fail("pictures were encoded"))
    main(command(tmp_path, base))
    assert all(torch.equal(tensor, adapter_of(folder)[name]) for name, tensor in adapter_of(tmp_path).items())
    assert log_of(tmp_path) == log_of(folder)


def test_the_cache_of_plus(folder: Path, base: Path, tmp_path: Path) -> None:
    line = ["cache", "--data", str(folder / "data"), "--base", str(base), "--side", "16", "--state", str(tmp_path), "--for", "plus"]
    main(line)
    pairs = prepare(TrainingSource(base, data=folder / "data", side=16, reads=FINE), tmp_path).pairs
    assert isinstance(pairs, FilePairs) and pairs.inputs is not None and pairs.inputs.shape[1] > 1
    with pytest.raises(SystemExit):
        main(["cache"])


def several(folder: Path) -> Path:
    """Shards of pictures with 1, 2 and 3 captions."""
    texts = [["a"], ["b", "c"], ["d", "e", "f"]] * 3
    members = [((f"{i}.png", png(i)), (f"{i}.json", json.dumps({"captions": each}).encode())) for i, each in enumerate(texts)]
    return write(folder / "0.tar", *(part for pair in members for part in pair)).parent


@pytest.fixture
def pairs(base: Path, tmp_path: Path) -> FilePairs:
    album, pipeline = captioned_files(several(tmp_path / "data"), tmp_path / "cache"), load(base, ())
    return FilePictures(album, 16, 16).pairs(pipeline.vae, pipeline.text, pipeline.image, tmp_path / "cache")


def test_batches_hold_what_the_encoders_give(pairs: FilePairs, base: Path) -> None:
    """Compared with the encoders called on one picture and one caption."""
    pipeline = load(base, ())
    assert pipeline.image is not None
    batch = pairs.at(torch.tensor([4, 0]), [1, 5])
    with torch.no_grad():
        for row, number, caption in ((0, 4, "c"), (1, 0, "a")):
            text = pipeline.text(pipeline.text.tokenize([caption]))[0]
            embedding = pipeline.image(pipeline.image.preprocess(picture(number))[None])[0]
            torch.testing.assert_close(batch.text[row], text, atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(batch.images(torch.zeros(2, dtype=torch.bool))[row, 0, 0], embedding, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(batch.empty, pipeline.text(pipeline.text.tokenize([""]))[0], atol=2e-3, rtol=2e-3)
    assert batch.mean.shape == (2, 4, 4, 4) and (batch.std > 0).all()


def test_captions_are_chosen_by_seed_step_and_position(pairs: FilePairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares of a batch choose as the whole batch does, all captions are chosen, and the seed matters for pictures and for captions."""
    chosen: list[tuple[int, int]] = []
    real = FilePairs.at

    def at(self: FilePairs, rows: Tensor, picks: list[int]) -> object:
        chosen.extend(zip(rows.tolist(), picks, strict=True))
        return real(self, rows, picks)

    def read(seed: int, size: int) -> list[tuple[int, int]]:
        chosen.clear()
        for step in range(12):
            for rank in range(size):
                pairs.batches(6, seed).batch(step, rank, size)
        return list(chosen)

    monkeypatch.setattr(FilePairs, "at", at)
    whole = read(0, 1)
    assert read(0, 2) == read(0, 3) == whole
    (rows, picks), (other_rows, other_picks) = (zip(*read(seed, 1), strict=True) for seed in (0, 1))
    assert rows != other_rows and picks != other_picks and picks[:6] != picks[6:12]
    assert {pick % 3 for row, pick in whole if len(pairs.files[row].texts) == 3} == {0, 1, 2}


def test_broken_members_stop_training_or_are_counted(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards_of(write_pictures(tmp_path / "pictures", 6), tmp_path / "data")
    write(tmp_path / "data" / "x.tar", ("x.png", b"no"), ("x.txt", b"x"))
    said = status(command(tmp_path, base))
    assert isinstance(said, str) and "x.tar: x.png: Pillow cannot read this file as a picture" in said
    assert status(command(tmp_path, base, "--skip-broken")) == 0
    assert "6 pictures to train on, 0 held out" in (out := capsys.readouterr().out) and "1 left out because they are broken" in out
