"""Networks that visit a device one at a time: the same picture, and never two of them there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

from sampling import __main__ as cli
from sampling import pipeline as pipelines
from sampling.loading import load
from sampling.request import HintFile, ImagePrompt, Request
from sampling.visit import visiting

OWL, CONTROL = Path("sampling/examples/owl.png"), Path("weights/controlnet.safetensors")


def test_weights_are_the_same_tensors_after_a_visit() -> None:
    module = nn.BatchNorm1d(3)
    before = {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), visiting([module], "meta"):
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        raise RuntimeError("inside")
    assert {name: tensor.data_ptr() for name, tensor in module.state_dict().items()} == before


@pytest.mark.parametrize("adapter", ["ip_adapter", "ip_adapter_plus"])
def test_one_network_at_a_time(monkeypatch: pytest.MonkeyPatch, adapter: str) -> None:
    """A network that is not visiting is on the meta device, where it can't compute, so every use of one is inside a visit."""
    request = Request("a fox", ImagePrompt((OWL, OWL), negatives=OWL if adapter == "ip_adapter" else ()), steps=2, init_image=OWL)
    plain = load(adapter=f"weights/{adapter}.safetensors")
    want = plain.draw(request)
    away = load(adapter=f"weights/{adapter}.safetensors", low_memory=True)
    assert away.visits == "cpu" and away.device == torch.device("cpu")
    parts: dict[str, nn.Module | None] = {"unet": away.unet, "vae": away.vae, "text": away.text}
    parts |= {"image": away.image, "adapter": away.adapters[0]}
    weights = {name: dict(part.state_dict()) for name, part in parts.items() if part}
    gone = {name: {key: tensor.to("meta") for key, tensor in state.items()} for name, state in weights.items()}
    for name, part in parts.items():
        assert part is not None
        part.load_state_dict(gone[name], assign=True)
    visits: list[str] = []
    here: list[str] = []

    @contextmanager
    def visit(modules: Sequence[nn.Module], device: str) -> Iterator[None]:
        names = [name for name, part in parts.items() if any(part is module for module in modules)]
        assert not here and len(names) == len(modules) == 1
        here.extend(names)
        visits.extend(names)
        modules[0].load_state_dict(weights[names[0]], assign=True)
        yield
        here.clear()
        modules[0].load_state_dict(gone[names[0]], assign=True)

    monkeypatch.setattr(pipelines, "visiting", visit)
    assert away.draw(request).tobytes() == want.tobytes()
    assert visits[-3:] == ["adapter", "unet", "vae"] and set(visits) == set(parts)
    assert plain.visits is None


def test_the_command_line(tmp_path: Path) -> None:
    for name, options in (("a", ["--low-memory"]), ("b", [])):
        cli.run(["--image", str(OWL), "--steps", "2", "--out", str(tmp_path / f"{name}.png"), *options])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with pytest.raises(ValueError, match="leave out one of them"):
        cli.run(["--low-memory", "--compile", "--out", str(tmp_path / "c.png")])


def test_all_parts_wait_on_the_cpu() -> None:
    """The device of the pipeline is another one. The meta device stands for a GPU."""
    away = load(device="meta", low_memory=True, controls=[CONTROL])
    parts = [away.unet, away.vae, away.text, away.image, *away.adapters, *away.controls]
    assert away.device.type == "meta"
    assert {p.device.type for part in parts if part is not None for p in part.parameters()} == {"cpu"}


def test_a_control_visits_with_the_unet(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def visit(modules: Sequence[nn.Module], device: str) -> AbstractContextManager[None]:
        seen.append([type(module).__name__ for module in modules])
        return nullcontext()

    away = load(low_memory=True, controls=[CONTROL])
    monkeypatch.setattr(pipelines, "visiting", visit)
    away.draw(Request(hints=(HintFile(Path("sampling/examples/hints/owl.png")),), steps=1))
    assert ["UNet", "ControlNet"] in seen
