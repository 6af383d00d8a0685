"""Load, save and check IP-Adapters in the official layout, and load the checkpoints of the official trainer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from checkpoints.adapter_layouts import with_official_names
from checkpoints.files import is_finite, replacing_in, short_list, write_json, write_tensors
from checkpoints.fill import FLOATS, assemble
from checkpoints.lora import Updates, read_updates
from checkpoints.names import adapter_names, projection_names
from checkpoints.reader import File
from checkpoints.single_file import single_kind
from model.adapter import IPAdapter
from model.features import FACE, FACE_AND_FINE, FACE_DIM, FINE, GLOBAL, RAW_FACE, Embedder
from model.image_encoder import ImageConfig
from model.image_projection import (
    HEAD,
    FacePlus,
    FaceProjection,
    ImageProjection,
    MLPProjection,
    Projection,
    RawFaceResampler,
    Resampler,
)
from model.unet import UNet, UNetConfig

# Names by width: of the text tokens, and of the image encoder's features.
BASES = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2.1", 2048: "Stable Diffusion XL"}
_FINE = {1280: "ViT-H", 1664: "ViT-bigG", 1024: "ViT-L"}
_INSIGHTFACE = {FACE_DIM: "InsightFace"}
ENCODERS: dict[Embedder, dict[int, str]] = {
    GLOBAL: {1024: "ViT-H", 1280: "ViT-bigG", 768: "ViT-L"},
    FINE: _FINE,
    FACE: _INSIGHTFACE,
    RAW_FACE: _INSIGHTFACE,
    FACE_AND_FINE: _FINE,
}
PROJECTIONS: dict[str, type[Projection]] = {
    "IP-Adapter": ImageProjection,
    "IP-Adapter Plus": Resampler,
    "IP-Adapter Full": MLPProjection,
    "IP-Adapter FaceID": FaceProjection,
    "IP-Adapter FaceID Portrait": FaceProjection,
    "IP-Adapter FaceID Portrait, unnorm": RawFaceResampler,
    "IP-Adapter FaceID Plus": FacePlus,
    "IP-Adapter FaceID PlusV2": FacePlus,
}


def display_name(names: dict[int, str], width: int) -> str:
    """Return the name of a model of this width, such as "ViT-H (1024-d)", or "12-d" if it is unknown."""
    return f"{names[width]} ({width}-d)" if width in names else f"{width}-d"


def adapter_file(path: Path) -> File:
    """Open an adapter file of any layout under the official names.

    Raises FileNotFoundError, and ValueError when the file is not a supported adapter.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; `make weights` trains the mini adapter")
    file = with_official_names(File(path))
    if (kind := adapter_kind(file)) not in PROJECTIONS:
        raise ValueError(f"{path} is {kind}; only the base IP-Adapter, Plus, Full and FaceID are supported")
    return file


_LORA = r"ip_adapter\.\d+\.to_(q|k|v|out)_lora\.(down|up)\.weight$"


def own_updates(file: File) -> Updates:
    """Return the updates of the LoRA inside a FaceID adapter, for all attention layers of the UNet; {} if it has none."""
    return read_updates(file.rename({name: name for name in file if re.match(_LORA, name)}))


def adapter_kind(file: File) -> str:
    """Return the kind of adapter, by the names and shapes of its tensors, as in diffusers; for other files, what they are.

    FaceID PlusV2 has the tensors of FaceID Plus. Only the file's name tells them apart, as in the official code.
    """
    if not any(name.startswith("image_proj.") for name in file):
        return kind if (kind := single_kind(file)) != "not a base model" else "not an adapter"
    if any(name.startswith("image_proj.perceiver_resampler.") for name in file):
        return "IP-Adapter FaceID PlusV2" if is_plus_v2(file.path) else "IP-Adapter FaceID Plus"
    if "image_proj.latents" in file:
        over_a_face = "image_proj.proj_in.weight" in file and file.shape("image_proj.proj_in.weight")[1:] == (FACE_DIM,)
        return "IP-Adapter FaceID Portrait, unnorm" if over_a_face else "IP-Adapter Plus"
    if "image_proj.proj.3.weight" in file:
        return "IP-Adapter Full"
    if "image_proj.proj.0.weight" in file:
        has_lora = any(re.match(_LORA, name) for name in file)
        return "IP-Adapter FaceID" if has_lora else "IP-Adapter FaceID Portrait"
    return "IP-Adapter" if "image_proj.proj.weight" in file else "not an adapter"


def is_plus_v2(path: Path) -> bool:
    """Return whether the name of a FaceID Plus file says that it is PlusV2."""
    return "plusv2" in path.name.lower()


class _Shapes:
    """The shapes of an adapter's projection, checked as they are read."""

    def __init__(self, file: File) -> None:
        self.file = file

    def __call__(self, name: str, axes: int = 2) -> tuple[int, ...]:
        name, file = f"image_proj.{name}", self.file
        if name not in file or len(file.shape(name)) != axes or 0 in file.shape(name):
            raise ValueError(f"{file.path} is not a complete adapter: {name} is missing or misshapen")
        return file.shape(name)

    def divide(self, rows: int, size: int, what: str) -> int:
        if rows % size:
            raise ValueError(
                f"{self.file.path} is not a complete adapter: the {rows} outputs of its projection do not divide into {what} "
                f"of width {size}"
            )
        return rows // size

    def layers(self, prefix: str = "") -> dict[str, int]:
        """Return the sizes of a Resampler's layers."""
        depth = sum(name.endswith(".to_kv.weight") for name in self.file)
        return {"depth": depth, "heads": self.divide(self(f"{prefix}layers.0.0.to_q.weight")[0], HEAD, "heads")}


def adapter_sizes(file: File) -> dict[str, int]:
    """Infer the arguments of the adapter's class in PROJECTIONS from the shapes of its tensors.

    Raises ValueError when one of these tensors is missing or has the wrong shape.
    """
    kind, shape = adapter_kind(file), _Shapes(file)
    if issubclass(PROJECTIONS[kind], FaceProjection):
        (width, face_dim), (rows, _), (context_dim,) = shape("proj.0.weight"), shape("proj.2.weight"), shape("norm.weight", 1)
        sizes = {"context_dim": context_dim, "tokens": shape.divide(rows, context_dim, "tokens"), "width": width}
        if PROJECTIONS[kind] is FaceProjection:
            return sizes | {"image_dim": face_dim}
        image_dim, prefix = shape("perceiver_resampler.proj_in.weight")[1], "perceiver_resampler."
        return sizes | {"image_dim": image_dim, "face_dim": face_dim, "shortcut": kind.endswith("V2"), **shape.layers(prefix)}
    if issubclass(PROJECTIONS[kind], Resampler):
        _, tokens, width = shape("latents", 3)
        image_dim, context_dim = shape("proj_in.weight")[1], shape("proj_out.weight")[0]
        return {"image_dim": image_dim, "context_dim": context_dim, "tokens": tokens, "width": width, **shape.layers()}
    if kind == "IP-Adapter Full":
        return {"image_dim": shape("proj.0.weight")[1], "context_dim": shape("proj.3.weight", 1)[0]}
    (rows, image_dim), (context_dim,) = shape("proj.weight"), shape("norm.weight", 1)
    return {"image_dim": image_dim, "context_dim": context_dim, "tokens": shape.divide(rows, context_dim, "tokens")}


def projection_of(file: File) -> Projection:
    """Return the adapter's image projection on the meta device: its class and sizes, without the weights."""
    with torch.device("meta"):
        return PROJECTIONS[adapter_kind(file)](**adapter_sizes(file))


def encoder_name(reads: Embedder, width: int) -> str:
    """Return the name of the image encoder whose features have this width. The name mentions fine features."""
    name = display_name(ENCODERS[reads], width)
    return name if reads == GLOBAL else f"the {reads.name} of {name}"


def check_fit(path: Path, projection: Projection, unet: UNetConfig, encoder: ImageConfig | None = None) -> None:
    """Raise ValueError unless an adapter fits the base model and the image encoder, if there is one."""
    context_dim, image_dim, reads = projection.context_dim, projection.image_dim, projection.reads
    if context_dim != unet.context_dim:
        expected, actual = display_name(BASES, context_dim), display_name(BASES, unet.context_dim)
        raise ValueError(
            f"{path} is an adapter for {expected}, but you gave a base model of {actual}: use an adapter made for this base model"
        )
    if encoder is not None and reads.needs_encoder and (width := reads.width(encoder)) != image_dim:
        expected, actual = encoder_name(reads, image_dim), encoder_name(reads, width)
        raise ValueError(
            f"{path} needs {expected}, but you gave {actual}: pass that encoder as --image-encoder, or use another adapter"
        )


def load_adapter(
    path: Path, unet: UNet, encoder: ImageConfig | None = None, dtype: torch.dtype | None = torch.float32
) -> IPAdapter:
    """Load an adapter for this UNet.

    The kind of adapter and its sizes are inferred from the weights. The LoRA inside a FaceID file is not read here: it is for the base
    model (`own_updates`). If the file has no W'_k and W'_v, the adapter shares those of the UNet. `encoder`: the sizes of the image
    encoder; None skips this check. Raises ValueError when the file is not a supported adapter, or is for another base model or image
    encoder.
    """
    file = adapter_file(path)
    projection = projection_of(file)
    check_fit(path, projection, unet.config, encoder)
    own = any(name.startswith("ip_adapter.") for name in file)
    with torch.device("meta"):
        adapter = IPAdapter(UNet(unet.config) if own else unet, projection, own_projections=own)
    names = adapter_names(adapter.state_dict(), unet)
    return assemble(adapter, names, file.without(_LORA), "an adapter for this base model", dtype)


def save_adapter(
    adapter: IPAdapter, unet: UNet, path: Path, card: dict[str, Any], dtype: torch.dtype | None = torch.float16
) -> None:
    """Save an adapter in the official layout, which diffusers can load, and its card.

    `dtype=None` keeps each tensor's dtype.

    Raises OSError when a file can't be written, and ValueError when a value is too large for `dtype`.
    """
    state = adapter.state_dict()
    with replacing_in(path.parent) as part:
        names = adapter_names(state, unet).items()
        write_tensors(part / path.name, {new: state[ours] for ours, (new,) in names}, dtype)
        write_json(part / path.with_suffix(".json").name, card)


_LAYER = re.compile(r"(ip_adapter\.\d+)\.to_[kv]_ip\.weight$")


def problems(file: File) -> list[str]:
    """List what is missing, unknown or invalid in an adapter file, without reference to a base model."""
    projection = projection_names(f"image_projection.{name}" for name in projection_of(file).state_dict())
    layers = {m[1] for name in file if (m := _LAYER.match(name))}
    expected = {name for (name,) in projection.values()} | {f"{layer}.to_{x}_ip.weight" for layer in layers for x in "kv"}
    expected |= {name for name in file if re.match(_LORA, name)}
    dtypes = {name: file[name].dtype for name in file}
    lines = (
        ("it lacks", expected - file.keys()),
        ("it also holds", file.keys() - expected),
        (
            "it has weights that are not float32, float16 or bfloat16:",
            [n for n, dtype in dtypes.items() if dtype not in FLOATS],
        ),
        (
            "it has values that are not finite in",
            [n for n, dtype in dtypes.items() if dtype in FLOATS and not is_finite(file[n])],
        ),
    )
    return [f"{problem} {short_list(names)}" for problem, names in lines if names]
