"""A form with one field for each setting, as a page shows it: from its values to a Request, and back."""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sampling.__main__ import printable
from sampling.images import save_image
from sampling.inputs import read_inputs
from sampling.pipeline import Pipeline
from sampling.record import digests, recall, record, sha256
from sampling.request import HintFile, ImagePrompt, Model, Request
from sampling.resized import resized
from sampling.sampler import State

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "sampling" / "examples").glob("*.png"))
SAME = ("prompt", "negative_prompt", "guidance", "steps", "seed", "sampler")  # in the form and in a Request alike


@contextmanager
def told(notes: list[str]) -> Iterator[None]:
    """Add to `notes` what the library warns of and what it refuses, in its own sentences, without temporary folders."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except (ValueError, OSError) as error:
            notes.append(str(error))
    said = [*dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning), *notes]
    notes[:] = [printable(re.sub(rf"{re.escape(tempfile.gettempdir())}/([^\s/]+/)*", "", one)) for one in said]


@dataclass(frozen=True)
class Desk:
    """Draws what a form asks for: a pipeline, the files that it was loaded from, and a folder for pictures to change."""

    pipeline: Pipeline
    model: Model
    folder: Path

    def request(self, form: dict[str, Any]) -> Request:
        """Make a Request of the form. A picture to change is fitted to the size of the base model."""
        values: dict[str, Any] = {name: form[name] for name in SAME}
        if form["image"]:
            same = [path for path in EXAMPLES if sha256(path) == sha256(Path(form["image"]))]
            layers = None if form["layers"] == "all" else form["layers"]
            values["image_prompts"] = ImagePrompt((same[0] if same else form["image"],), form["scale"], layers)
        if form.get("hint"):
            values["hints"] = HintFile(form["hint"])
        if form["edit"] and (background := form["edit"]["background"]):
            size = self.pipeline.native_size
            values |= {"init_image": resized(background, size, self.folder), "strength": form["strength"]}
            for layer in form["edit"]["layers"]:
                values["mask"] = resized(layer, size, self.folder, mask=True)
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
        """Read the settings of a PNG that this program drew, as values of the form."""
        request, _ = recall(Path(picture))
        values: dict[str, Any] = {name: getattr(request, name) for name in SAME} | {"image": None, "edit": None, "num": 1}
        for prompt in request.image_prompts[:1]:
            values |= {"image": str(prompt.images[0]), "scale": prompt.scale, "layers": prompt.layers or "all"}
        for hint in request.hints[:1]:
            values["hint"] = str(hint.picture)
        if request.init_image:
            layers = [str(request.mask)] if request.mask else []
            values["edit"] = {"background": str(request.init_image), "layers": layers, "composite": None}
            values["strength"] = request.strength
        return values
