"""A request as data: it comes back from JSON as it was, and whatever is not a request is refused with one sentence."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from sampling.fields import from_json, map_paths, paths, to_json
from sampling.request import HintFile, ImagePrompt, LoraFile, Model, Request

PROMPT = ImagePrompt(
    (Path("a.png"), Path("b/c.png")),
    0.4,
    {"up": {"block_1": (0.0, 1.0)}, "mid": 1.0},
    0.25,
    0.75,
    Path("mask.png"),
    (1.0, 0.5),
    "tokens",
    (Path("no.png"),),
)
LORA = LoraFile(Path("a.safetensors"), -0.7)
HINT = HintFile(Path("edges.png"), 0.8, 0.25, 0.75, True)
FULL = Request(
    'a "fox" – λ 狐\n',
    (PROMPT, ImagePrompt((Path("d.png"),), layers="style"), ImagePrompt((Path("e.png"),), layers=(1.0, 0.0))),
    "an owl",
    4.0,
    2.0,
    "pad",
    20,
    "dpm++",
    0.0,
    2**64 - 1,
    64,
    48,
    Path("photo.png"),
    0.5,
    Path("where.png"),
    False,
    True,
    (HINT, HintFile(Path("grey.png"))),
    (800, 600),
    (3, 5),
    (640, 480),
    False,
    "karras",
)
MODEL = Model(
    Path("base"), (Path("x.bin"), Path("y.bin")), Path("encoder"), Path("vae"), "v", "bfloat16", (Path("canny.pth"), Path("depth")),
    (LORA, LoraFile(Path("b"))), 0.4, 0.7,
)  # fmt: skip


@pytest.mark.parametrize("item", [Request(), FULL, PROMPT, HINT, LORA, Model(), MODEL], ids=lambda item: type(item).__name__)
def test_json_gives_it_back(item: Any) -> None:
    assert from_json(type(item), json.loads(json.dumps(to_json(item)))) == item


def test_every_field_of_the_full_ones_differs_from_its_default() -> None:
    """So that the round trip above is one of every field."""
    files = (HINT, HintFile(Path("x"))), (LORA, LoraFile(Path("x")))
    for full, default in ((FULL, Request()), (MODEL, Model()), (PROMPT, ImagePrompt((Path("x"),))), *files):
        same = [f.name for f in fields(full) if getattr(full, f.name) == getattr(default, f.name)]
        assert same == (["eta", "zero_negative"] if full is FULL else [])  # they contradict others


def test_what_is_absent_takes_its_default() -> None:
    """So that an option of tomorrow leaves the pictures of today readable."""
    assert from_json(Request, {"version": 1}) == Request() and from_json(Model, {}) == Model()
    full = replace(FULL, init_image=None, mask=None, strength=None, paste=True, crop=False, image_guidance=None, schedule=None)
    for field in fields(Request):
        less = {key: value for key, value in to_json(full).items() if key != field.name}
        assert from_json(Request, less) == replace(full, **{field.name: getattr(Request(), field.name)})


def test_python_may_be_short() -> None:
    """A string for a path, and one value for a tuple of one."""
    short = Request("a fox", ImagePrompt("a.png", weights=1, negatives=["b.png"]), guidance=4, init_image="c.png")  # type: ignore[arg-type]
    prompt = ImagePrompt((Path("a.png"),), weights=(1.0,), negatives=(Path("b.png"),))
    assert short == Request("a fox", (prompt,), guidance=4.0, init_image=Path("c.png"))
    assert Model("base", "a.bin") == Model(Path("base"), (Path("a.bin"),))  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        short.seed = 3  # type: ignore[misc]


def test_paths_are_found_and_changed() -> None:
    assert [path.name for path in paths(FULL)] == [
        "a.png", "c.png", "mask.png", "no.png", "d.png", "e.png", "photo.png", "where.png", "edges.png", "grey.png",
    ]  # fmt: skip
    moved = map_paths(MODEL, lambda path: Path("there") / path.name)
    names = "base", "x.bin", "y.bin", "encoder", "vae", "canny.pth", "depth", "a.safetensors", "b"
    assert paths(moved) == [Path("there") / name for name in names]
    assert (
        replace(
            moved,
            checkpoint=MODEL.checkpoint,
            adapters=MODEL.adapters,
            image_encoder=MODEL.image_encoder,
            vae=MODEL.vae,
            controls=MODEL.controls,
            loras=MODEL.loras,
        )
        == MODEL
    )


WRONG: dict[str, list[Any]] = {
    "prompt": [None, 3, ["a fox"], b"fox", "\udc80"],
    "image_prompts": [3, None, [3], [{}], [{"images": []}], [{"images": ["x"], "lambda": 1}], {"images": {"x": 1}}],
    "negative_prompt": [None, {}],
    "guidance": [None, "7.5", True, math.nan, math.inf, -math.inf, 1e30, 10**400],
    "image_guidance": ["2", math.nan, 1.0],  # the last: without an image prompt
    "fit": [None, "stretch", [], {}],
    "steps": [None, "abc", "20", 20.0, True, [20]],
    "sampler": [None, "heun", 3, []],
    "eta": [None, "0", math.nan],
    "seed": [None, "0", 1.0, 2**64, -(2**63) - 1, 10**400, True],
    "width": ["64", 64.0, 10**8, 10**400],
    "height": [{}, -(10**8)],
    "init_image": [3, True, ["a.png"]],
    "strength": ["0.5", 0.5],  # the last: without a picture to change
    "mask": [3, "a.png"],
    "paste": [None, 0, "yes", False],
    "crop": [None, 1, True],
    "hints": [3, None, [3], [{}], [{"picture": 3}], [{"picture": "x", "scale": "1"}], [{"picture": "x", "guess": 1}]],
    "original_size": [3, [3], [3, -1], [3, 10**8], [3, "4"], [3.0, 4], [3, 4, 5]],
    "crop_corner": [True, [3], [3, -1], [3, 10**400], [3, None]],
    "target_size": ["ab", [3], [-3, 1], [{}, 4]],
    "zero_negative": [None, 1, "yes"],
    "schedule": ["exponential", 3, "karras"],  # the last: with ddim
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=lambda x: str(x)[:20]
)
def test_a_wrong_value_is_refused_by_name(name: str, value: Any) -> None:
    """From JSON and in Python alike."""
    for make in (lambda: Request(**{name: value}), lambda: from_json(Request, {"version": 1, name: value})):
        with pytest.raises(ValueError) as caught:
            make()
        said = str(caught.value)
        assert len(said) < 300 and "\n" not in said
        assert re_name(name, said)


def re_name(name: str, said: str) -> bool:
    """Whether a sentence names a setting, or the one inside it."""
    said = said.replace("-", "_")
    inner = {
        "image_prompts": ("ImagePrompt", "images", "image prompt"),
        "hints": ("HintFile", "picture", "scale", "guess"),
        "width": ("too large",),
        "height": ("too large",),
    }
    return name in said or any(each in said for each in inner.get(name, ()))


def test_every_field_has_wrong_values() -> None:
    assert WRONG.keys() == {field.name for field in fields(Request)}


LAYERS = ["styles", "", 3, True, [["x"]], [1, None], {"up": "all"}, {"up": {"block_0": {"x": 1}}}, {"up": [math.nan]}]


@pytest.mark.parametrize("wrong", [*LAYERS, {"up": 1e30}])
def test_wrong_layers_are_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match="layers must be"):
        ImagePrompt((Path("a"),), layers=wrong)


@pytest.mark.parametrize("kind", [Request, Model, ImagePrompt, HintFile, LoraFile])
@pytest.mark.parametrize(
    "data", [None, [], "a fox", 3, {"version": 2}, {"version": 0}, {"version": None}, {"nothing": 1}, {"__class__": "x"}]
)
def test_what_is_no_request_is_refused(kind: type[Any], data: object) -> None:
    with pytest.raises(ValueError):
        from_json(kind, data)
