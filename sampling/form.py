"""A form with one field for each setting, as a page shows it: from its values to a Request, and back."""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from checkpoints.files import read_json_if_there
from checkpoints.stable_diffusion import unet_config
from model.unet import UNetConfig
from sampling.__main__ import printable
from sampling.command import load_model
from sampling.fields import map_paths
from sampling.images import save_image
from sampling.inputs import read_inputs
from sampling.pipeline import Pipeline
from sampling.record import digests, recall, record, sha256
from sampling.request import STRENGTH, HintFile, ImagePrompt, Model, Request
from sampling.resize import resize_file
from sampling.sampler import State

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "sampling" / "examples").glob("*.png"))
SAME = ("prompt", "negative_prompt", "guidance", "steps", "seed", "sampler")  # in the form and in a Request alike


@contextmanager
def collect_notes(notes: list[str]) -> Iterator[None]:
    """Add to `notes` what the library warns of and what it refuses, in its own sentences, without temporary folders."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except (ValueError, OSError) as error:
            notes.append(str(error))
    sentences = [*dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning), *notes]
    notes[:] = [printable(re.sub(rf"{re.escape(tempfile.gettempdir())}/([^\s/]+/)*", "", one)) for one in sentences]


@dataclass(frozen=True)
class Desk:
    """Draws what a form asks for, with the files of a model, once `load` has read them. `folder`: for pictures to change."""

    model: Model
    folder: Path
    future: Future[Pipeline] = field(default_factory=Future)

    def load(self, device: str) -> None:
        """Load the model. Raises ValueError or OSError, here and where someone waits for the pipeline."""
        try:
            self.future.set_result(load_model(self.model, device))
        except (ValueError, OSError) as error:
            self.future.set_exception(error)
            raise

    @property
    def pipeline(self) -> Pipeline:
        """The loaded model; waits for it."""
        return self.future.result()

    @cached_property
    def config(self) -> UNetConfig:
        """The config of the UNet, without its weights. Raises ValueError or OSError if there is no such model."""
        return unet_config(self.model.checkpoint)

    @cached_property
    def mini(self) -> bool:
        """Whether this is a mini world, whose text encoder has a small vocabulary of its own."""
        return bool(read_json_if_there(self.model.checkpoint / "text_encoder.json").get("config", {}).get("vocabulary"))

    def request(self, form: dict[str, Any]) -> Request:
        """Make a Request of the form. A picture to change is fitted to the size of the base model. An `image_guidance` of 0 is none."""
        values: dict[str, Any] = {name: form[name] for name in SAME}
        if form["image"]:
            same = [path for path in EXAMPLES if sha256(path) == sha256(Path(form["image"]))]
            layers = None if form["layers"] == "all" else form["layers"]
            values["image_prompts"] = ImagePrompt((same[0] if same else form["image"],), form["scale"], layers)
            values["image_guidance"] = form["image_guidance"] or None
        if form.get("hint"):
            values["hints"] = HintFile(form["hint"])
        if form["edit"] and (background := form["edit"]["background"]):
            size = self.pipeline.native_size
            values |= {"init_image": resize_file(background, size, self.folder), "strength": form["strength"]}
            for layer in form["edit"]["layers"]:
                values["mask"] = resize_file(layer, size, self.folder, mask=True)
        return Request(**values)

    def draw(self, folder: Path, form: dict[str, Any], watch: Callable[[State], None]) -> tuple[list[Path], Request]:
        """Draw into `folder`. Each PNG holds its request, and `--again` draws it again."""
        request, files = self.request(form), []
        inputs, hashes = read_inputs(request), digests(request, self.model)
        for i, picture in enumerate(self.pipeline.series(inputs, form["num"], watch)):
            one = replace(request, seed=request.seed + i)
            files.append(folder / f"drawn-{one.seed}.png")
            save_image(picture, files[-1], record(one, self.model, hashes))
        return files, request

    def form(self, picture: str) -> dict[str, Any]:
        """Read the settings of a PNG that this program drew, as values of the form. Warns of those that have no field."""
        request, model = recall(Path(picture))
        request = map_paths(request, self._copy)
        if edit := read_inputs(request).edit:
            request = replace(request, strength=edit.strength)
        values: dict[str, Any] = {name: getattr(request, name) for name in (*SAME, "strength")} | {"image": None, "edit": None}
        for prompt in request.image_prompts[:1]:
            if prompt.images[0].suffix == ".safetensors":
                continue  # an embedding can't be shown
            layers = prompt.layers if isinstance(prompt.layers, str) else "all"
            values |= {"image": str(prompt.images[0]), "scale": prompt.scale, "layers": layers}
        for hint in request.hints[:1]:
            values["hint"] = str(hint.picture)
        if request.init_image:
            paint = [str(request.mask)] if request.mask else []
            values["edit"] = {"background": str(request.init_image), "layers": paint, "composite": None}
        values["image_guidance"] = request.image_guidance or 0
        self._warn(request, model, self.request(values))
        return values | {"num": 1, "strength": request.strength or STRENGTH}

    def _copy(self, path: Path) -> Path:
        """Copy a picture into the folder, from which a page may show it. A shipped example keeps its place."""
        if path in EXAMPLES or path.is_relative_to(self.folder):
            return path
        return Path(shutil.copy(path, self.folder / f"{sha256(path)[:16]}{path.suffix}"))

    def _warn(self, request: Request, model: Model, back: Request) -> None:
        """Warn where `back`, the request of the form, differs from the request in more than its files."""
        there, here = (map_paths(one, lambda _: Path()) for one in (request, back))
        missing = [one.name for one in fields(Request) if getattr(there, one.name) != getattr(here, one.name)]
        if missing:
            names = ", ".join(name.replace("_", " ") for name in missing)
            warnings.warn(f"this page has no field for all of its {names}: draw it again with --again", stacklevel=2)
        if map_paths(model, Path.absolute) != map_paths(self.model, Path.absolute):
            warnings.warn("it was drawn with other weights than those of this page", stacklevel=2)
