"""Training on pictures of several shapes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_pictures import base, command, write_pictures
from PIL import Image

from sampling.loading import load
from train import adapter, buckets
from train.__main__ import main
from train.album import ListAlbum
from train.buckets import BucketBatches, BucketPairs, BucketPictures, nearest, shapes
from train.captioned import captioned_files
from train.file_pairs import corner_of, cover
from train.pairs import Batch
from train.setting import TrainingSource, prepare
from train.step import GraphStep, Step, step_for

__all__ = ["base"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:this model.s vocabulary")
SIZES = [(20, 20), (20, 40), (38, 21), (90, 30), (17, 18)]  # (height, width)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> ListAlbum:
    folder = tmp_path_factory.mktemp("album")
    data = write_pictures(folder / "data", 0)
    for i in range(23):
        height, width = SIZES[i % len(SIZES)]
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)).save(data / f"{i:02}.png")
        (data / f"{i:02}.txt").write_text(f"picture {i}")
    pictures = captioned_files(data, folder)
    assert isinstance(pictures, ListAlbum)
    return pictures


@pytest.fixture(scope="module")
def pairs(album: ListAlbum, base: Path, tmp_path_factory: pytest.TempPathFactory) -> BucketPairs:
    pipeline = load(base, ())
    return BucketPictures(album, 32, 8).pairs(pipeline.vae, pipeline.text, pipeline.image, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize(("side", "multiple"), [(512, 64), (1024, 64), (1024, 32), (64, 16), (16, 16)])
def test_shapes(side: int, multiple: int) -> None:
    """All shapes that fit, each as wide as the area allows."""
    listed = shapes(side, multiple)
    fits = [(h, w) for h in range(multiple, 4 * side, multiple) for w in range(multiple, 4 * side, multiple) if h * w <= side * side]
    widest = {h: max(w for height, w in fits if height == h) for h, _ in fits}
    assert listed == [(h, w) for h, w in widest.items() if max(h, w) <= 2 * min(h, w)]
    assert (side, side) in listed
    with pytest.raises(ValueError, match=f"--side must be a multiple of {multiple}, not {side + 1}"):
        shapes(side + 1, multiple)


def test_the_nearest_shape() -> None:
    choices = shapes(512, 64)
    for size in [(480, 640), (640, 480), (1080, 1920), (100, 5000), (7, 7), (600, 617)]:
        ratios = [abs(np.log(h / w) - np.log(size[0] / size[1])) for h, w in choices]
        assert nearest(size, choices) == int(np.argmin(ratios))


@pytest.mark.parametrize("size", [(37, 91), (91, 37), (64, 64), (3, 400)])
@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
def test_the_centre_is_cut_out(size: tuple[int, int], shape: tuple[int, int]) -> None:
    """The grey level of a picture is its place; the middle of what is cut out is the middle of the picture."""
    rows, columns = (np.linspace(0, 255, n) for n in size)
    for grey in (np.repeat(rows[:, None], size[1], 1), np.repeat(columns[None], size[0], 0)):
        picture = cover(Image.fromarray(np.repeat(np.rint(grey)[..., None], 3, 2).astype(np.uint8)), shape)
        assert (picture.height, picture.width) == shape
        assert abs(np.asarray(picture).mean() - 127.5) < 6
    factor = max(shape[0] / size[0], shape[1] / size[1])
    whole = [n * factor for n in size]
    assert all(abs(corner - (n - part) / 2) <= 1 for corner, n, part in zip(corner_of(size, shape), whole, shape, strict=True))


def test_a_picture_is_in_the_pool_of_its_shape(album: ListAlbum, pairs: BucketPairs) -> None:
    assert len(pairs) == len(album) == sum(len(part) for part in pairs.parts())
    for pool in pairs.pools:
        assert tuple(pool.at(torch.arange(len(pool))).mean.shape[2:]) == (pool.shape[0] // 4, pool.shape[1] // 4)
        assert all(shapes(32, 8)[nearest(file.size, shapes(32, 8))] == pool.shape for file in pool.files)
    last = len(pairs) - 1
    assert torch.equal(pairs.at(torch.tensor([last])).mean, pairs.pools[-1].at(torch.tensor([len(pairs.pools[-1]) - 1])).mean)
    with pytest.raises(ValueError, match="of one shape"):
        pairs.at(torch.tensor([0, last]))


def test_an_epoch_shows_every_picture(pairs: BucketPairs) -> None:
    """In batches of one, each picture once per epoch; the next epoch has another order."""
    data = BucketBatches(pairs.pools, 1, seed=3)

    def epoch(first: int) -> list[float]:
        return [float(data.batch(first + i).mean.sum()) for i in range(len(pairs))]

    every = sorted(float(pool.at(torch.tensor([i])).mean.sum()) for pool in pairs.pools for i in range(len(pool)))
    one, two = epoch(0), epoch(len(pairs))
    assert sorted(one) == sorted(two) == every and one != two and one == epoch(0)


def rows_of(pairs: BucketPairs, batch: Batch) -> tuple[int, frozenset[int]]:
    """The pool that a batch comes from, and its pictures there."""
    pool = next(i for i, pool in enumerate(pairs.pools) if pool.mean.shape[2:] == batch.mean.shape[2:])
    known = pairs.pools[pool].mean.all().float()
    return pool, frozenset(int((known == one).flatten(1).all(dim=1).nonzero()) for one in batch.mean)


def test_the_seed_shuffles_shapes_and_pictures(pairs: BucketPairs) -> None:
    """One seed gives the same batches again. Another orders the shapes in another way, and puts other pictures of each shape together.

    Two pools with as many pictures are not shuffled alike.
    """

    def epoch(seed: int) -> list[tuple[int, frozenset[int]]]:
        buckets._order.cache_clear()  # as in another process
        return [rows_of(pairs, pairs.batches(2, seed).batch(step)) for step in range(sum(len(pool) // 2 for pool in pairs.pools))]

    one, again, other = map(epoch, (3, 3, 4))
    assert one == again and [pool for pool, _ in one] != [pool for pool, _ in other]
    for i in range(len(pairs.pools)):
        assert {rows for pool, rows in one if pool == i} != {rows for pool, rows in other if pool == i}
    first, second = (i for i, pool in enumerate(pairs.pools) if len(pool) == 9)
    assert {rows for pool, rows in one if pool == first} != {rows for pool, rows in one if pool == second}


@pytest.mark.parametrize("size", [1, 3, 4, 50])
def test_pictures_of_all_shapes_are_seen_equally_often(pairs: BucketPairs, size: int) -> None:
    """In `size` epochs, a pool of n pictures gives n batches. They are numbered from 0, and none is left out."""
    data = BucketBatches(pairs.pools, size, seed=5)
    places = [data.place(step) for step in range(len(pairs))]
    assert sorted(places) == [(i, number) for i, pool in enumerate(pairs.pools) for number in range(len(pool))]


def test_processes_share_a_batch(pairs: BucketPairs) -> None:
    data = BucketBatches(pairs.pools, 4, seed=0)
    for step in range(12):
        whole, parts = data.batch(step), [data.batch(step, rank, 2) for rank in range(2)]
        assert len(whole) == 4 and torch.equal(whole.mean, torch.cat([part.mean for part in parts]))


def test_train(album: ListAlbum, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps see several shapes, and the held-out pictures are squares."""
    (tmp_path / "data").symlink_to(album[0].path.parent)
    seen, sample = set[tuple[int, ...]](), adapter.sample_inputs

    def watch(batch: Batch, *rest: Any, **more: Any) -> Any:
        seen.add(tuple(batch.mean.shape[2:]))
        return sample(batch, *rest, **more)

    monkeypatch.setattr(adapter, "sample_inputs", watch)
    main(command(tmp_path, base, "--buckets", "--side", "32", "--steps", "8"))
    assert json.loads((tmp_path / "out" / "ip_adapter.json").read_text())["results"]["step"] == 8 and len(seen) > 2
    setting = prepare(TrainingSource(base, data=tmp_path / "data", side=32, buckets=True), tmp_path / "state")
    assert isinstance(setting.pairs, BucketPairs) and setting.made_from["side"] == "buckets of 32, 8"
    assert setting.held_out is not None and {tuple(part.mean.shape[2:]) for part in setting.held_out.parts()} == {(8, 8)}


def test_a_gpu_records_steps_of_one_shape_only() -> None:
    assert step_for("cuda") is GraphStep and step_for("cuda", BucketBatches.one_shape) is Step


@pytest.mark.parametrize(("options", "sentence"), [("--buckets --side 36", "--side must be a multiple of"), ("--buckets", "give --data")])
def test_bad_options_are_refused(options: str, sentence: str, base: Path, tmp_path: Path) -> None:
    write_pictures(tmp_path / "data", 4)
    line = command(tmp_path, base, *options.split())
    if sentence == "give --data":
        line = [part for i, part in enumerate(line) if part != "--data" and line[i - 1] != "--data"]
    with pytest.raises(ValueError, match=re.escape(sentence)):
        main(line)
