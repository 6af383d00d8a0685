"""Rows on disk: what is encoded once, what is encoded again, damage, several processes, and memory that does not grow."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from own_pictures import ENVIRONMENT
from teams import together
from torch import Tensor

from checkpoints.files import replacing
from train import store
from train.data import Data, OnTheFly
from train.fingerprint import content_key
from train.store import Rows, Store, encode_rows

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def numbered(broken: int | None = None) -> tuple[Data[Tensor], list[int]]:
    """Return batches that contain their own index, one of which may be broken, and the list of encoded indices."""
    seen: list[int] = []

    def make(i: int) -> Tensor:
        if i == broken:
            raise ValueError(f"{i}.png: the picture is damaged")
        return torch.full((1, 2), float(i))

    return OnTheFly(make), seen


def keys(*names: str) -> Tensor:
    return torch.tensor([content_key(name.encode()) for name in names])


SIX = keys(*(f"k{i}" for i in range(6)))


def count(data: Data[Tensor], seen: list[int], wanted: Tensor, folder: Path) -> list[float]:
    def encode(x: Tensor) -> dict[str, Tensor]:
        seen.append(int(x[0, 0]))
        return {"x": x, "y": x[:, :1, None] + 0.5}

    rows = encode_rows(data, wanted, encode, folder, workers=0)
    assert torch.equal(rows["x"].all()[:, 0] + 0.5, rows["y"].all()[:, 0, 0])
    return rows["x"].all()[:, 0].tolist()


def test_encoded_pictures_are_kept_if_a_later_one_is_broken(tmp_path: Path) -> None:
    data, seen = numbered(broken=4)
    with pytest.raises(ValueError, match=r"^4\.png: the picture is damaged$"):
        count(data, seen, SIX, tmp_path)
    assert seen == [0, 1, 2, 3]
    data, seen = numbered()
    assert count(data, seen, SIX, tmp_path) == [0, 1, 2, 3, 4, 5] and seen == [4, 5]
    data, seen = numbered()
    assert count(data, seen, torch.cat([SIX[3:4], keys("new"), SIX[:1]]), tmp_path) == [3, 1, 0] and seen == [1]


def test_copies_are_encoded_once(tmp_path: Path) -> None:
    data, seen = numbered()
    assert count(data, seen, SIX[torch.tensor([2, 0, 2, 2, 0])], tmp_path) == [0, 1, 0, 0, 1] and seen == [0, 1]


@pytest.mark.parametrize("damage", [b"", b"{}", b"half", None])
def test_a_damaged_pack_is_named_and_computed_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damage: bytes | None
) -> None:
    monkeypatch.setattr(store, "SIZE", 1)  # a pack for each row
    whole = count(*numbered(), SIX, tmp_path)
    path = sorted(tmp_path.glob("pack-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1] if damage is None else damage)
    data, seen = numbered()
    assert count(data, seen, SIX, tmp_path) == whole and len(seen) == 1
    assert f"{path.name} is damaged" in capsys.readouterr().err
    data, seen = numbered()
    assert count(data, seen, SIX, tmp_path) == whole and seen == []


def test_a_pack_that_another_process_writes_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError), replacing(tmp_path / "pack-0.safetensors") as part:
        part.write_bytes(b"half")
        assert Store(tmp_path).packs == [] and part.read_bytes() == b"half" and capsys.readouterr().err == ""
        raise KeyError  # it is not finished


def test_batches_of_several_rows(tmp_path: Path) -> None:
    """The last batch may be smaller. A batch with a missing row is encoded whole."""
    x = torch.arange(10.0)
    data, seen = OnTheFly(lambda i: x[4 * i : 4 * i + 4]), list[int]()

    def encode(part: Tensor) -> dict[str, Tensor]:
        seen.append(len(part))
        return {"x": part}

    wanted = keys(*(f"{i}" for i in range(10)))
    for times in ([4, 4, 2], []):
        seen.clear()
        assert torch.equal(encode_rows(data, wanted, encode, tmp_path, 4, workers=0)["x"].all().float(), x) and seen == times


def test_rows_are_read_across_packs() -> None:
    """Any rows, in any order, more than once."""
    x = torch.randn(50, 2, 3).half()
    places = torch.randperm(50)
    rows = Rows(list(x.split([20, 1, 0, 29])), places)
    picked = torch.randint(50, (200,))
    assert torch.equal(rows[picked], x[places[picked]]) and rows.shape == (50, 2, 3) and torch.equal(rows.all(), x[places])


def test_processes_share_what_is_missing(tmp_path: Path) -> None:
    count(*numbered(), SIX[:2], tmp_path)

    def work(rank: int) -> None:
        data, seen = numbered()
        assert count(data, seen, SIX, tmp_path) == [0, 1, 2, 3, 4, 5]
        (tmp_path / f"{rank}.json").write_text(json.dumps(seen))

    together(2, work)
    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [[2, 4], [3, 5]]


def test_what_another_process_wrote_must_be_there(tmp_path: Path) -> None:
    with Store(tmp_path).writing() as add:
        add(SIX[:1], {"x": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="keep --state on a disk that all processes share"):
        Store(tmp_path).rows(SIX)




def anonymous() -> int:
    """Return the memory of this process that is not a mapped file, in kB."""
    return int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_pictures(tmp_path: Path) -> None:
    """100,000 pictures take 50 MB on disk. A process that reads all of them at random has 8 bytes for each in memory."""
    n = 100_000
    wanted = torch.arange(n) * 7919
    with Store(tmp_path).writing() as add:
        for part in wanted.split(10_000):
            add(part, {"x": part[:, None].expand(-1, 250).remainder(1000)})
    code = f"""
import sys, torch
sys.path.insert(0, "tests")
from pathlib import Path
from test_store import anonymous
from train.store import Store
keys, before = torch.arange({n}) * 7919, anonymous()
rows = Store(Path({str(tmp_path)!r})).rows(keys)["x"]
for part in torch.randperm({n}).split(1000):
    assert torch.equal(rows[part][:, 0].long(), keys[part].remainder(1000))
print(anonymous() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 15_000, done.stdout
