"""What to draw, as data. The command line, `--again` and the gallery all use it.

A Request says which picture to draw, a Model which files draw it. Both are frozen, check themselves, and turn into JSON and
back. Nothing here imports torch, so that a command can read its arguments at once.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from model.words import Fit, Prediction
from sampling.fields import Layers, check_eta, check_seed, check_size, settle

LARGEST = 1 << 16  # side of a picture that SDXL is told about
STRENGTH = 0.8  # how much to change a picture, where nothing says it
WEIGHTS = Path(__file__).parent.parent / "weights"

Rule = Literal["output", "embedding", "tokens"]
SamplerName = Literal["ddim", "dpm++", "euler", "lcm"]
NoiseLevels = Literal["karras"]
DtypeName = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class ImagePrompt:
    """One adapter's image prompt: its pictures, and how strongly, where and when they act.

    `images` are picture files, or files of --save-embedding; `negatives` are the same for the unconditional side. `weights`
    has one number for each picture; `rule` says what they multiply. The other fields are those of
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
        settle(self)
        if not self.images:
            raise ValueError("an image prompt needs a picture: name it with --image")
        several = any(path.suffix == ".safetensors" for path in self.images)  # a file of --save-embedding holds one picture or more
        if self.weights and len(self.weights) != len(self.images) and not several:
            raise ValueError(f"{len(self.weights)} --image-weight for {len(self.images)} --image: give each picture its own")


@dataclass(frozen=True)
class HintFile:
    """One control's hint, a picture file, and how strongly and when the control acts, as in `sampling.control.Hint`."""

    picture: Path
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Request:
    """One picture to draw: a text prompt, image prompts (one for each adapter), both, or neither; and a hint for each control.

    `guidance` is w (Eq. 7), and of the text alone where `image_guidance` is given. Without `width` and `height` the picture has
    the size of `init_image`, or else the size that the base model was trained at. `init_image` is a picture to change by
    `strength`, in (0, 1] (default STRENGTH, with a mask 1); `mask` is white where to repaint it; `paste` keeps what is black as it
    was; `crop` cuts its middle to a size that the base model draws. `schedule` sets the noise levels of Karras et al., instead of
    those of the scheduler file. In Python, a string may stand for a Path, and one value for a tuple.

    SDXL alone reads `original_size`, `target_size` (width, height), `crop_corner` (left, top) and `zero_negative`, which are
    explained in `sampling.micro.Micro`.

    Raises ValueError where a field has another type or lacks its counterpart.
    """

    VERSION: ClassVar[int] = 1  # of the JSON; a later version reads the earlier ones
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
        settle(self)
        check_seed(self.seed)
        check_size(self.width or 1, self.height or 1)
        check_eta(self.eta, self.sampler, self.sampler == "ddim")
        if self.schedule and self.sampler not in ("dpm++", "euler"):
            raise ValueError(f"--schedule karras is for --sampler dpm++ and euler, not {self.sampler}")
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

    @property
    def unconditional(self) -> bool:
        """Whether there is an unconditional pass, which reads what is negative. At a guidance weight of 1 it is not computed."""
        return self.guidance != 1 or self.image_guidance not in (None, 1)


@dataclass(frozen=True)
class LoraFile:
    """A LoRA, as a file, and the factor s of its updates: W' = W + s (alpha / r) B A. With 0 it changes nothing."""

    path: Path
    scale: float = 1.0

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Model:
    """The files of a model, as `sampling.loading.load` takes them. Without names, those in the checkpoint's folder are used.

    `face_lora_scale`: the factor of the LoRA inside FaceID adapters. `face_structure_scale`: s of FaceID PlusV2 (`FacePlus`).
    """

    checkpoint: Path = WEIGHTS
    adapters: tuple[Path, ...] = ()
    image_encoder: Path | None = None
    vae: Path | None = None
    prediction: Prediction | None = None
    dtype: DtypeName = "float32"
    controls: tuple[Path, ...] = ()
    loras: tuple[LoraFile, ...] = ()
    face_lora_scale: float = 1.0
    face_structure_scale: float = 1.0

    def __post_init__(self) -> None:
        settle(self)


@dataclass(frozen=True)
class Command:
    """What the command line asks for: a request drawn `num` times, and options that do not affect the picture: where to run and to write.

    `again` is a picture to draw again: it holds the request and the model, and those here are the defaults.
    """

    request: Request = field(default_factory=Request)
    model: Model = field(default_factory=Model)
    num: int = 1
    out: Path = Path("out.png")
    again: Path | None = None
    save_embedding: Path | None = None
    device: str = "cpu"
    compile: bool = False
    fast: bool = False
    keep_memory: bool = False
    copy: bool = False
    download: bool = False
    low_memory: bool = False
