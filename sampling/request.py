"""What to draw, as data. The command line, `--again` and the gallery all use it.

A Request says which picture to draw, a Model which files draw it. Both are frozen, check themselves, and turn into JSON and
back. Nothing here imports torch, so that a command can read its arguments at once.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

VERSION = 1  # of the JSON; a later version reads the earlier ones
LIMIT = 1e4  # largest magnitude of lambda, a guidance weight or a picture's weight: beyond it float16 and the networks overflow
MOST_PIXELS = 1 << 24  # 4096 x 4096
LARGEST = 1 << 16  # side of a picture that SDXL is told about
WEIGHTS = Path(__file__).parent.parent / "weights"

Fit = Literal["crop", "squash", "pad"]
Preset = Literal["style", "layout", "finest"]
Rule = Literal["output", "embedding", "tokens"]
SamplerName = Literal["ddim", "dpm++", "euler"]
NoiseLevels = Literal["karras"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Layers = str | tuple[float, ...] | dict[str, Any]  # as `sampling.lambdas.layer_weights` reads them
T = TypeVar("T")
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, as a command line that is not UTF-8 leaves it


@dataclass(frozen=True)
class ImagePrompt:
    """One adapter's image prompt: its pictures, and how strongly, where and when they act.

    `images` are picture files, or files of --save-embedding; `negatives` are the same for the unconditional side. `weights`
    has one number for each of `images`; `rule` says what they multiply. The other fields are those of
    `sampling.lambdas.Lambda`; `mask` is a picture, white where the image prompt acts.
    """

    images: tuple[Path, ...]
    scale: float = 1.0
    layers: Layers | None = None
    start: float = 0.0
    end: float = 1.0
    mask: Path | None = None
    weights: tuple[float, ...] = ()
    rule: Rule = "output"
    negatives: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        _settle(self)
        if not self.images:
            raise ValueError("an image prompt needs a picture: name it with --image")
        if self.weights and len(self.weights) != len(self.images):
            raise ValueError(
                f"{len(self.weights)} --image-weight for {len(self.images)} --image: give each picture its own"
            )


@dataclass(frozen=True)
class HintFile:
    """One control's hint, a picture file, and how strongly and when the control acts, as in `sampling.control.Hint`."""

    picture: Path
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        _settle(self)


@dataclass(frozen=True)
class Request:
    """One picture to draw: a text prompt, image prompts (one for each adapter), both, or neither; and a hint for each control.

    `guidance` is w (Eq. 7), and of the text alone where `image_guidance` is given. Without `width` and `height` the picture has
    the size of `init_image`, or else the size that the base model was trained at. `init_image` is a picture to change by
    `strength`, in (0, 1] (default 0.8, with a mask 1); `mask` is white where to repaint it; `paste` keeps what is black as it
    was; `crop` cuts its middle to a size that the base model draws. `schedule` sets the noise levels of Karras et al., instead of
    those of the scheduler file. In Python a string does for a Path, one value for a tuple.

    SDXL alone reads `original_size`, `target_size` (width, height), `crop_corner` (left, top) and `zero_negative`, which are
    explained in `sampling.micro.Micro`.

    Raises ValueError where a field has another type or lacks its counterpart.
    """

    prompt: str = ""
    image_prompts: tuple[ImagePrompt, ...] = ()
    negative_prompt: str = ""
    guidance: float = 7.5
    image_guidance: float | None = None
    fit: Fit = "crop"
    steps: int = 50
    sampler: SamplerName = "ddim"
    eta: float = 0.0
    seed: int = 0
    width: int | None = None
    height: int | None = None
    init_image: Path | None = None
    strength: float | None = None
    mask: Path | None = None
    paste: bool = True
    crop: bool = False
    hints: tuple[HintFile, ...] = ()
    original_size: tuple[int, int] | None = None
    crop_corner: tuple[int, int] | None = None
    target_size: tuple[int, int] | None = None
    zero_negative: bool = False
    schedule: NoiseLevels | None = None

    def __post_init__(self) -> None:
        _settle(self)
        check_seed(self.seed)
        check_size(self.width or 1, self.height or 1)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 (DDIM) and 1 (DDPM), not {self.eta}")
        if self.eta and self.sampler != "ddim":
            raise ValueError(f"eta is DDIM's: {self.sampler} adds no noise, so leave it at 0, not {self.eta}")
        if self.schedule and self.sampler == "ddim":
            raise ValueError("--schedule karras is for --sampler dpm++ and euler, not ddim")
        if self.image_guidance is not None and not self.image_prompts:
            raise ValueError("--image-guidance is for an image prompt: name it with --image")
        if self.init_image is None:
            for name in ("mask", "strength", "crop"):
                if getattr(self, name) not in (None, False):
                    raise ValueError(f"--{name} is for a picture to change: name it with --init-image")
        for name in ("original_size", "crop_corner", "target_size"):
            if (pair := getattr(self, name)) is not None and not (len(pair) == 2 and all(0 <= n <= LARGEST for n in pair)):
                raise ValueError(f"{name} must be two whole numbers from 0 to {LARGEST}, not {' '.join(map(reprlib.repr, pair))}")
        if self.zero_negative and self.negative_prompt:
            raise ValueError("--zero-negative is for an empty negative prompt: leave out --negative-prompt, or this option")
        if not self.paste and self.mask is None:
            raise ValueError("--no-paste is for a picture with a --mask")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, as a file, and the factor s of its updates: W' = W + s (alpha / r) B A. With 0 it changes nothing."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        _settle(self)


@dataclass(frozen=True)
class Model:
    """The files of a model, as `sampling.loading.load` takes them. Without names, those in the checkpoint's folder are used.

    `face_lora_scale`: the factor of the LoRA inside FaceID adapters.
    """

    checkpoint: Path = WEIGHTS
    adapters: tuple[Path, ...] = ()
    image_encoder: Path | None = None
    vae: Path | None = None
    prediction: Literal["epsilon", "v"] | None = None
    dtype: DtypeName = "float32"
    controls: tuple[Path, ...] = ()
    loras: tuple[LoraFile, ...] = ()
    face_lora_scale: float = 1.0

    def __post_init__(self) -> None:
        _settle(self)


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed outside the range of torch's generators."""
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"the seed must be a whole number from -2^63 to 2^64 - 1, not {reprlib.repr(seed)}")


def check_size(width: int, height: int) -> None:
    """Raises ValueError for more than MOST_PIXELS pixels, before memory is allocated."""
    if abs(width * height) > MOST_PIXELS:
        asked = f"{reprlib.repr(width)} x {reprlib.repr(height)}"
        raise ValueError(f"{asked} is too large: a picture has at most {MOST_PIXELS:,} pixels (4096 x 4096)")


def to_json(item: object) -> Any:
    """Convert to plain values for `json.dumps`: a Request becomes an object with a version, a Path a string, a tuple a list."""
    if is_dataclass(item):
        version = {"version": VERSION} if isinstance(item, Request) else {}
        return version | {field.name: to_json(getattr(item, field.name)) for field in fields(item)}
    if isinstance(item, Mapping):
        return {key: to_json(value) for key, value in item.items()}
    if isinstance(item, tuple):
        return [to_json(value) for value in item]
    return item.as_posix() if isinstance(item, Path) else item


def from_json(kind: type[T], data: object) -> T:
    """Build a Request, ImagePrompt, HintFile, LoraFile or Model from the result of `to_json`; missing fields take their defaults.

    Raises ValueError where `data` is anything else. It may come from a stranger.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{kind.__name__} must be a JSON object, not {reprlib.repr(data)}")
    values = dict(data)
    if kind is Request and (version := values.pop("version", None)) not in range(1, VERSION + 1):
        raise ValueError(f"a request of version {reprlib.repr(version)}; this program reads up to version {VERSION}")
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if unknown := [name for name in values if name not in names]:
        raise ValueError(f"{kind.__name__} has no setting {reprlib.repr(unknown[0])}: another version wrote it")
    needed = {
        ImagePrompt: ("images", "an image prompt needs its images"),
        HintFile: ("picture", "a hint needs its picture"),
        LoraFile: ("path", "a LoRA needs its file"),
    }
    if kind in needed and needed[kind][0] not in values:
        raise ValueError(needed[kind][1])
    return kind(**values)


def map_paths(item: T, change: Callable[[Path], Path]) -> T:
    """Apply `change` to every path in a Request or Model."""

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(each) for each in value)
        if is_dataclass(value):
            return map_paths(value, change)
        return change(value) if isinstance(value, Path) else value

    return replace(item, **{field.name: changed(getattr(item, field.name)) for field in fields(item)})  # type: ignore


def paths(item: object) -> list[Path]:
    """Every path in a Request or Model."""
    found: list[Path] = []

    def keep(path: Path) -> Path:
        found.append(path)
        return path

    map_paths(item, keep)
    return found


# Types.


def _settle(item: Any) -> None:
    """Check the type of every field of a frozen dataclass, and convert it."""
    hints = get_type_hints(type(item))
    for field in fields(item):
        object.__setattr__(item, field.name, _read(hints[field.name], getattr(item, field.name), field.name))


def _read(kind: Any, value: object, name: str) -> Any:
    """Convert `value` to `kind`, the type of the field `name`. Raises ValueError that names the field."""
    if kind == Layers | None:
        return None if value is None else _layers(value, name)
    if get_origin(kind) in (Union, UnionType):
        return None if value is None else _read(next(k for k in get_args(kind) if k is not NoneType), value, name)
    if get_origin(kind) is tuple:
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_read(get_args(kind)[0], each, name) for each in values)
    if is_dataclass(kind):
        return value if isinstance(value, kind) else from_json(kind, value)  # type: ignore[arg-type]
    if get_origin(kind) is Literal:
        return _check(value, value in get_args(kind), name, f"one of {', '.join(get_args(kind))}")
    if kind is float:
        return check_number(value, name)
    if kind is int:
        return _check(value, isinstance(value, int) and not isinstance(value, bool), name, "a whole number")
    if kind is Path:
        return Path(_check(value, isinstance(value, str | Path), name, "the name of a file"))  # type: ignore[arg-type]
    if kind is bool:
        return _check(value, isinstance(value, bool), name, "true or false")
    return _check(value, isinstance(value, str) and not _SURROGATE.search(value), name, "text")


def _check(value: object, right: bool, name: str, wanted: str) -> object:
    if not right:
        raise ValueError(f"{name} must be {wanted}, not {reprlib.repr(value)}")
    return value


def check_number(value: object, name: str) -> float:
    """Return a number as a float. Raises ValueError, with the field's name, if it is not finite or its magnitude exceeds LIMIT."""
    right = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LIMIT  # False for NaN
    return float(_check(value, right, name, f"a number between {-LIMIT:g} and {LIMIT:g}"))  # type: ignore[arg-type]


def _layers(value: object, name: str) -> Layers:
    """A preset's name, a weight for each layer, or diffusers' blocks: {"up": {"block_1": [0, 1, 0]}, "mid": 1}."""
    if not isinstance(value, Mapping | list | tuple):
        return str(_check(value, value in get_args(Preset), name, f"{', '.join(get_args(Preset))}, or weights in JSON"))

    def weights(each: object, depth: int) -> Any:
        if isinstance(each, Mapping) and depth:
            return {_read(str, key, name): weights(inner, depth - 1) for key, inner in each.items()}
        return tuple(check_number(one, name) for one in each) if isinstance(each, list | tuple) else check_number(each, name)

    return weights(value, 2)
