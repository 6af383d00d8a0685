"""Models named as owner/name are found in a Hugging Face cache that the tests lay out; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from PIL import Image

from checkpoints.hub import locate
from sampling import __main__ as cli
from sampling.loading import load
from sampling.options import parse
from sampling.request import WEIGHTS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Store = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Put files into the cache as huggingface_hub does: blobs, a snapshot of links, and a reference to it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)

    def put(repository: str, **files: bytes) -> Path:
        folder = cache / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "blobs").mkdir(exist_ok=True)
        for name, content in files.items():
            blob, link = folder / "blobs" / name.replace("/", "-"), folder / "snapshots" / COMMIT / name
            blob.write_bytes(content)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        return folder / "snapshots" / COMMIT

    return put


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be downloaded."""
    calls: list[dict[str, Any]] = []
    real = huggingface_hub.snapshot_download

    def snapshot(repository: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return real(repository, **options)
        calls.append({"repository": repository, **options})
        raise ConnectionError("no route to the host\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return calls


def test_files_and_folders_in_the_cache(store: Store) -> None:
    base = store("owner/sd", **{"unet/config.json": b"{}", "model_index.json": b"{}"})
    adapters = store("h94/IP-Adapter", **{"models/a.safetensors": b"a", "models/image_encoder/config.json": b"{}"})
    assert locate(Path("owner/sd")) == base
    assert locate(Path("h94/IP-Adapter/models/a.safetensors")).read_bytes() == b"a"
    assert locate(Path("h94/IP-Adapter/models/image_encoder")) == adapters / "models" / "image_encoder"


def test_what_is_here_comes_first(store: Store, tmp_path: Path) -> None:
    store("owner/sd", **{"unet/config.json": b"{}"})
    (tmp_path / "owner" / "sd").mkdir(parents=True)
    assert locate(Path("owner/sd")) == Path("owner/sd")
    for name in ("sd.safetensors", "/nowhere/sd", "../owner/sd", "~/owner"):
        assert locate(Path(name)) == Path(name)


@pytest.mark.parametrize("name", ["owner/sd", "h94/IP-Adapter", "h94/IP-Adapter/models/b.bin", "models/none.safetensors"])
def test_offline_nothing_is_asked(store: Store, asked: list[dict[str, Any]], name: str) -> None:
    store("h94/IP-Adapter", **{"models/a.safetensors": b"a"})
    message = f"{name} is neither here nor in the Hugging Face cache: name a file or folder, or add --download"
    with pytest.raises(FileNotFoundError, match=message):
        locate(Path(name))
    with pytest.raises(FileNotFoundError, match=message):
        load(name)
    with pytest.raises(FileNotFoundError, match=message):
        cli.run(["--ip-adapter", name])
    assert asked == []


def test_download_asks_for_what_is_needed(store: Store, asked: list[dict[str, Any]]) -> None:
    for name in ("owner/sd", "h94/IP-Adapter/models/image_encoder"):
        with pytest.raises(OSError, match=f"^{name} can't be downloaded: no route to the host$"):
            cli.run(["--checkpoint", name, "--download"])
    first, second = asked
    assert first["repository"] == "owner/sd" and {"unet/*.safetensors", "scheduler/*.json"} <= set(first["allow_patterns"])
    assert not any(pattern.startswith("*") for pattern in first["allow_patterns"])  # not the single files beside the folders
    assert second["repository"] == "h94/IP-Adapter"
    assert second["allow_patterns"] == ["models/image_encoder", "models/image_encoder/*"]


def lists(snapshot: Path, *names: str) -> None:
    """What huggingface_hub notes of a repository when it begins to download: all its files."""
    write_tree_cache(str(snapshot.parent.parent), COMMIT, {name: TreeCacheEntry(1, "0" * 40) for name in names})


PARTS = {  # files that an interrupted download left, and those it had still to do
    "owner/sd": (["unet/config.json"], ["unet/diffusion_pytorch_model.safetensors", "vae/config.json"]),
    "h94/IP-Adapter/models/image_encoder": (["models/image_encoder/config.json"], ["models/image_encoder/model.safetensors"]),
}


@pytest.mark.parametrize("name", PARTS)
def test_an_interrupted_download_is_resumed(store: Store, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    here, rest = PARTS[name]
    snapshot, real = store("/".join(Path(name).parts[:2]), **dict.fromkeys(here, b"{}")), huggingface_hub.snapshot_download

    def download(repository: str, **options: Any) -> str:
        return real(repository, **options) if "local_files_only" in options else str(store(repository, **dict.fromkeys(rest, b"{}")))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate(Path(name)) == locate(Path(name), download=True) == snapshot.joinpath(*Path(name).parts[2:])
    assert all((snapshot / file).exists() for file in rest)


@pytest.fixture(params=["huggingface_hub's own", "another error"])
def offline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network: for some errors huggingface_hub itself uses the cache, others it raises."""
    if request.param == "another error":
        request.getfixturevalue("asked")
    else:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_what_is_all_in_the_cache_needs_no_network(store: Store, name: str, listed: bool) -> None:
    names = [*PARTS[name][0], *PARTS[name][1]]
    snapshot = store("/".join(Path(name).parts[:2]), **dict.fromkeys(names, b"{}"))
    if listed:
        lists(snapshot, *names, "another.ckpt", "unet/model.fp16.safetensors")
    for download in (False, True):
        assert locate(Path(name), download) == snapshot.joinpath(*Path(name).parts[2:])


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", PARTS)
def test_an_interrupted_download_needs_the_network(store: Store, name: str) -> None:
    here, rest = PARTS[name]
    lists(store("/".join(Path(name).parts[:2]), **dict.fromkeys(here, b"{}")), *here, *rest)
    with pytest.raises(OSError, match=f"^{name} can't be downloaded: "):
        locate(Path(name), download=True)


@pytest.mark.usefixtures("offline")
def test_what_the_cache_lacks_needs_the_network(store: Store) -> None:
    lists(store("h94/IP-Adapter", **{"models/a.safetensors": b"a"}), "models/a.safetensors", "models/b.safetensors")
    for name in ("h94/IP-Adapter/models/b.safetensors", "owner/sd"):
        with pytest.raises(OSError, match=f"^{name} can't be downloaded: "):
            locate(Path(name), download=True)


def test_a_name_that_the_repository_lacks(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repository, **_: str(store(repository)))
    with pytest.raises(FileNotFoundError, match=r"is not in the repository h94/IP-Adapter, or .* can't be reached: look up its name"):
        locate(Path("h94/IP-Adapter/models/none.bin"), download=True)


def test_draw_with_a_model_in_the_cache(store: Store, tmp_path: Path) -> None:
    """The mini weights, as one of a repository's folders."""
    store("owner/mini", **{f"mini/{path.name}": path.read_bytes() for path in WEIGHTS.iterdir() if "score" not in path.name})
    cli.run(["--checkpoint", "owner/mini/mini", "--steps", "1", "--out", str(tmp_path / "a.png")])
    cli.run(["--steps", "1", "--out", str(tmp_path / "b.png")])
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    assert not parse([]).download and parse(["--download"]).download
