"""`python -m train`: where things go, what is said, what is refused, and how quickly help comes."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from own_pictures import ENVIRONMENT, base, command, nothing_encoded, trained, write_pictures
from torch import Tensor

from model.features import FINE, GLOBAL, Features
from model.unet import UNet
from sampling.request import WEIGHTS
from train import adapter, file_pairs, gains, plus, setting
from train.__main__ import folders, main, plans_of, source_of, status
from train.errors import Diverged, GateError, Interrupted, OtherRun
from train.gains import verdict
from train.options import SETTINGS, STAGES, parser
from train.pairs import Pairs
from train.plan import Plan
from train.plus import PLAN as PLUS
from train.setting import GAMMA, SAYS, TrainingSource, prepare

__all__ = ["base", "trained"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:these words are not")


# where things are read and written


def arguments(*line: str) -> Any:
    return parser("").parse_args(line)


def test_a_users_run_has_places_of_its_own() -> None:
    own, world = arguments("adapter", "--data", "a/cats"), arguments("adapter")
    assert folders(own) == (Path("runs/cats"), Path("out/adapter")) and folders(world) == (Path("runs"), Path("weights"))
    assert source_of(own, "adapter", folders(own)[1]).base == WEIGHTS
    named = arguments("plus", "--data", "cats.json", "--weights", "o", "--state", "s", "--base", "b")
    assert folders(named) == (Path("s"), Path("o")) and source_of(named, "plus", Path("o")).base == Path("b")
    assert [source_of(own, stage, Path("o")).reads for stage in ("adapter", "plus")] == [GLOBAL, FINE]
    for stage in ("adapter", "all"):
        elsewhere = arguments(stage, "--weights", "w")
        assert source_of(elsewhere, "plus", folders(elsewhere)[1]).base == Path("w")


def test_the_mini_world_may_be_smaller(base: Path) -> None:
    def pictures(*line: str) -> int:
        return source_of(arguments("adapter", *line), "adapter", Path("w")).pictures

    assert (pictures(), pictures("--pictures", "24")) == (60_000, 24)
    with pytest.raises(ValueError, match="omit it with --data"):
        pictures("--pictures", "24", "--data", "cats")


@pytest.mark.parametrize("stage", [adapter, plus])
def test_the_default_rate(stage: Any, base: Path) -> None:
    """The paper's where a base is named, constant; the mini world's for the mini weights; and what is given wins."""
    (paper,) = stage.phases_for(TrainingSource(base, data=Path("data"), reads=FINE if stage is plus else GLOBAL))
    assert paper.lr == 1e-4 and all(paper.rate(step) == 1 for step in (0, 1, paper.steps - 1))
    (mini,) = stage.phases_for(TrainingSource(data=Path("data"), reads=FINE if stage is plus else GLOBAL))
    assert (mini.lr, mini.decay) == ((PLUS.lr, PLUS.decay) if stage is plus else (adapter.PLAN.lr, adapter.PLAN.decay))
    given = plans_of(arguments("adapter", "--lr", "1e-5", "--steps", "7"), (paper,))
    assert (given[0].lr, given[0].steps) == (1e-5, 7)
    assert stage.phases_for(TrainingSource(reads=FINE if stage is plus else GLOBAL)) == stage.PHASES


def test_the_recipe_can_be_changed(trained: Path, base: Path, tmp_path: Path) -> None:
    """Each option reaches the plan or the loss; without options, both are the paper's."""
    line = ("--warmup", "0", "--ema", "0", "--clip", "0.5", "--save-every", "3", "--validate-every", "4")
    (plan,) = plans_of(arguments("adapter", *line), (adapter.PLAN,))
    assert (plan.warmup, plan.ema, plan.clip, plan.save_every, plan.validate_every) == (0, 0.0, 0.5, 3, 4)
    named = arguments("adapter", "--data", "cats", "--min-snr", "5", "--noise-offset", "0.1")
    assert (source_of(named, "adapter", base).gamma, source_of(named, "adapter", base).noise_offset) == (5.0, 0.1)
    source = TrainingSource(base, data=trained / "data", side=16)
    own = setting.prepare(source, trained / "state")
    assert (own.gamma, own.noise_offset) == (None, 0.0)
    changed = setting.prepare(replace(source, gamma=5.0, noise_offset=0.1), trained / "state")
    assert (changed.gamma, changed.noise_offset) == (5.0, 0.1)
    for name, option in (("weights", ()), ("other", ("--min-snr", "0.01")), ("offset", ("--noise-offset", "0.3"))):
        main([*command(trained, base, *option), "--state", str(tmp_path / name), "--weights", str(tmp_path / name)])
    logs = [(tmp_path / name / "ip_adapter.jsonl").read_text().splitlines() for name in ("weights", "other", "offset")]
    assert len({json.loads(lines[0])["loss"] for lines in logs}) == 3
    with pytest.raises(OtherRun, match="with different noise offset: choose another folder"):
        main([*command(trained, base, "--noise-offset", "0.2"), "--state", str(tmp_path / "offset"), "--weights", str(tmp_path / "offset")])
    with pytest.raises(OtherRun, match="with different noise offset: choose another folder"):
        main([*command(trained, base), "--state", str(tmp_path / "offset"), "--weights", str(tmp_path / "without")])
    with pytest.raises(OSError, match="was written by another run"):
        main([*command(trained, base), "--state", str(tmp_path / "new"), "--weights", str(tmp_path / "offset")])


def test_the_precision_of_autocast() -> None:
    """bfloat16 as in the plan, unless float16 or float32 is asked for; the base is in what is asked for."""
    plans = {option: plans_of(arguments("adapter", *option), (adapter.PLAN,))[0] for option in ((), ("--bf16",), ("--fp16",), ("--fp32",))}
    assert [(plan.bf16, plan.fp16) for plan in plans.values()] == [(True, False), (True, False), (False, True), (False, False)]
    assert source_of(arguments("adapter", "--fp32"), "adapter", Path()).base_dtype == torch.float32


@pytest.mark.parametrize("options", [(), ("--fp16",)])
def test_no_part_of_a_training_needs_more_memory_than_its_steps(
    base: Path, tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate, steps, validations and the verdict: no call of the UNet has more pictures than a batch, and the base is in its precision."""
    calls, forward = list[tuple[int, torch.dtype]](), UNet.forward

    def recorded(self: UNet, x: Tensor, *more: Any) -> Tensor:
        calls.append((len(x), self.conv_in.weight.dtype))
        return forward(self, x, *more)

    monkeypatch.setattr(UNet, "forward", recorded)
    write_pictures(tmp_path / "data")
    main([*command(tmp_path, base, *options), "--batch", "3", "--validate-every", "1"])
    assert max(n for n, _ in calls) == 3 and {dtype for _, dtype in calls} == {torch.float16 if options else torch.float32}


# what is said


def test_the_end_says_where_the_adapter_is(trained: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command(trained, base))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("adapter: ") and said[1].startswith(f"{trained / 'data'}: 16 pictures to train on, 4 held out")
    assert said[-1].startswith(f"{trained / 'out' / 'ip_adapter.safetensors'}: it has not learned to read pictures yet: on 4")


def test_the_verdict_is_whether_the_right_picture_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a made-up loss: the distance of what the adapter reads from what the latents are, and a lot of noise."""
    g = torch.Generator().manual_seed(0)
    mean, zeros = torch.randn(8, 3, 2, 2, generator=g), torch.zeros(8, dtype=torch.long)
    features = Features(mean.flatten(1)[:, None, None], torch.zeros(1, 1, 1, 12))
    pairs = Pairs(mean, torch.zeros_like(mean), zeros, torch.zeros(1, 77, 8), features)

    def loss(_: Any, __: Any, x0: Tensor, read: Tensor, t: Tensor, ___: Tensor) -> Tensor:
        return 0.1 * (x0.flatten(1) - read.flatten(1)).square().mean(dim=1) + t / 100

    monkeypatch.setattr(gains, "diffusion_loss", loss)
    readers: dict[str, Callable[[Tensor], Tensor]] = {
        "it learned to read pictures: on 8 held-out pictures, the loss with another picture minus that with the": lambda image: image,
        "it has not learned to read pictures yet: on 8": lambda image: -image,
        "it has not learned": lambda image: torch.randn(image.shape, generator=g),
    }
    for said, read in readers.items():
        sentence = verdict(SimpleNamespace(config=None), lambda _, image, read=read: read(image), None, pairs, "cpu")  # type: ignore[arg-type]
        assert sentence.startswith(said), sentence


WHOLE = "steps", "side", "accumulate", "batch"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        *(((f"--{name}", value), f"argument --{name}") for name in WHOLE for value in ("0", "-1", "1.5", "many")),
        *((("--lr", value), "argument --lr") for value in ("0", "-1", "nan", "inf", "fast")),
        *((("--ema", value), "argument --ema") for value in ("1", "-0.1", "nan", "x")),
        *((("--noise-offset", value), "argument --noise-offset") for value in ("1", "-1", "nan")),
        *((("--seed", value), "argument --seed") for value in ("-1", "99999999999", "x")),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_at_once(
    options: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["adapter", "--data", "data", *options])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda", "cuda:9", "gpu", "meta", ""])
def test_a_device_that_is_not_there_gets_a_sentence(device: str, tmp_path: Path, base: Path) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    write_pictures(tmp_path / "data", 2)
    said = status(command(tmp_path, base, "--device", device))
    assert isinstance(said, str) and said.startswith(f"error: --device {device} can't be used here (")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--side", "17"), "--side 17 must be a multiple of 4"),
        (("--base", "nowhere"), "nowhere"),
        (("--from", "nowhere.safetensors"), r"nowhere\.safetensors"),
        (("--data", "nowhere"), "nowhere: No such file"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], sentence: str
) -> None:
    nothing_encoded(monkeypatch)
    write_pictures(tmp_path / "data", 2)
    said = status(command(tmp_path, base, *options))
    assert isinstance(said, str) and said.startswith("error: ") and sentence.replace("\\", "") in said
    assert not (tmp_path / "state").exists()


def test_broken_pictures_stop_the_command_before_the_base_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setting, "load", lambda *_, **__: pytest.fail("the base was loaded"))
    write_pictures(tmp_path / "data", 3)
    (tmp_path / "data" / "01.png").write_bytes(b"")
    (tmp_path / "data" / "02.txt").write_bytes(b"\xff")
    said = status(command(tmp_path, base))
    assert isinstance(said, str) and "01.png: the file is empty" in said and "02.txt: the caption is not UTF-8" in said


def test_ctrl_c_while_encoding_is_a_sentence_and_a_status(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    write_pictures(tmp_path / "data", 3)
    monkeypatch.setattr(file_pairs, "latents", interrupted)
    assert status(command(tmp_path, base)) == 130
    assert "the same command resumes the run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "lower --batch"), (ModuleNotFoundError("", name="resvg_py"), r"[world]")],
)
def test_known_failures_are_sentences(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    write_pictures(tmp_path / "data", 3)
    monkeypatch.setattr(file_pairs, "latents", fails)
    assert sentence in str(status(command(tmp_path, base)))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Interrupted("ip_adapter: stopped after step 3", 2), 130),
        (Interrupted("ip_adapter: stopped after step 3", 15), 143),
        (Diverged("ip_adapter: loss or gradient is not finite"), "error: ip_adapter: loss or gradient is not finite"),
        (GateError("gradients reach the frozen base"), "error: gradients reach the frozen base"),
    ],
)
def test_every_early_end_has_a_status(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    expected: int | str,
) -> None:
    def fails(*_: Any) -> Any:
        raise error

    write_pictures(tmp_path / "data", 3)
    monkeypatch.setattr(adapter, "run", fails)
    assert status(command(tmp_path, base)) == expected
    assert isinstance(expected, str) or "stopped after step 3" in capsys.readouterr().err


# the command line


def test_help_imports_no_torch() -> None:
    """For the command and for every stage; it takes a fraction of a second."""
    script = "import sys; from train.options import STAGES, parser; import train.__main__\n"
    script += "parser('x').format_help(); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=ENVIRONMENT)
    for stage in ("", "adapter"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "train", *([stage] if stage else []), "--help"],
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
        )
        assert done.returncode == 0 and "usage: python -m train" in done.stdout
        assert not {line.split("|")[-1].strip() for line in done.stderr.splitlines()} & {"torch", "numpy", "open_clip"}


def test_stages_have_one_shape_and_states_of_their_own() -> None:
    stages = [importlib.import_module(f"train.{name}") for name in STAGES]
    assert all([*inspect.signature(stage.train).parameters][:3] == ["folder", "weights", "phases"] for stage in stages)
    assert all("command" in inspect.signature(stage.train).parameters for stage in stages)
    names = [plan.name for stage in stages for plan in stage.PHASES]
    assert len(set(names)) == len(names)


def test_every_option_has_a_sentence() -> None:
    for stage in parser("")._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr,attr-defined]
        assert all(action.help for action in stage._actions)


@pytest.mark.parametrize("options", [("--side", "32"), ("--buckets",), ("--skip-broken",), ("--preview-every", "5")])
def test_options_of_pictures_need_pictures(options: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=f"{options[0]} .*: give --data"):
        main(["adapter", *options])


VALUES = {"accumulate": 2, "lr": 0.5, "seed": 7, "warmup": 3, "ema": 0.5, "clip": 0.25, "save_every": 4, "validate_every": 6}


def test_every_setting_reaches_the_plan() -> None:
    """Each that the parser has."""
    values = {"steps": 9, "batch": 8, **VALUES}
    assert set(values) == set(SETTINGS)
    options = [part for name, value in values.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    (plan,) = plans_of(arguments("adapter", *options), (Plan("x", 5, 4, 1e-3),))
    assert {name: getattr(plan, name) for name in values} == values


def test_options_reach_the_base(base: Path) -> None:
    unet = TrainingSource(base, checkpointing=2, prediction="v", data=Path("data")).pipeline("cpu").unet
    assert unet.checkpointing == 2 and unet.config.prediction == "v"


def test_a_gamma_that_is_given_is_the_gamma(tmp_path: Path) -> None:
    for given, gamma in ((5.0, 5.0), (None, GAMMA)):
        source = TrainingSource(Path("weights"), pictures=8, gamma=given)
        assert prepare(source, tmp_path, "cpu", SAYS).gamma == gamma


@pytest.mark.parametrize("stage", ["vae", "clip", "unet", "judge", "scorer", "all"])
def test_data_is_for_adapters_alone(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([stage, "--data", "data"])
    assert "unrecognized arguments: --data" in capsys.readouterr().err
