"""Files of weights to these modules, and back.

Read: the project's own safetensors (each with a JSON card beside it); Stable Diffusion 1.5 as a single file or a diffusers
folder; CLIP towers in transformers' layout; IP-Adapters in the official layout, or as the official trainer leaves them.
Renames are tables, loads are strict, nothing is unpickled but tensors, and files are written to a temporary name first.

  python weights_convert.py inspect FILE              says in words what a file is
  python weights_convert.py convert SOURCE TARGET     an adapter to the official .safetensors, a base model to a folder of our own
  python weights_convert.py convert --diffusers UNET TARGET     a UNet to the folder of a diffusers UNet2DConditionModel
  python weights_convert.py verify A B                compares two checkpoints tensor by tensor, whatever their layouts
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import configs
from model.adapter import IPAdapter
from model.image_encoder import ImageConfig, ImageEncoder
from model.image_projection import HEAD, ImageProjection, MLPProjection, Projection, Resampler
from model.names import (
    TRANSPOSED,
    Names,
    adapter_names,
    image_names,
    named,
    projection_names,
    text_names,
    unet_rows,
    vae_rows,
)
from model.text_encoder import TextConfig, TextEncoder
from model.unet import UNet, UNetConfig
from model.vae import VAE, VAEConfig

M = TypeVar("M", bound=nn.Module)


# --- reading files -----------------------------------------------------------------------------------------------------


class _Inert:
    """Stands in for the classes that old Lightning checkpoints name; it holds nothing and runs nothing."""

    def __setstate__(self, _: Any) -> None: ...


_LIGHTNING: list[Any] = [
    (_Inert, f"{package}.callbacks.model_checkpoint.ModelCheckpoint")
    for package in ("pytorch_lightning", "lightning.pytorch")
]
_WINDOW = 1 << 25  # bytes


def _flat(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of nested dicts, by their joined keys. A dict that stands in two places is read once."""
    tensors: dict[str, Tensor] = {}
    seen, stack = {id(tree)}, [("", tree)]
    while stack:
        prefix, branch = stack.pop()
        for key, value in branch.items():
            if isinstance(value, Tensor):
                if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
                    raise ValueError(f"{prefix}{key} is no plain tensor")
                if f"{prefix}{key}" in tensors:
                    raise ValueError(f"two tensors are named {prefix}{key}")
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and id(value) not in seen:
                seen.add(id(value))
                stack.append(("" if key == "state_dict" else f"{prefix}{key}.", value))
    return tensors


def _whole(path: Path) -> bool:
    """Whether a zip file can be mapped, because nothing in it is compressed. Raises ValueError when a checksum is wrong."""
    with ZipFile(path) as file:
        if bad := file.testzip():
            raise ValueError(f"its part {bad} is damaged")
        return all(part.compress_type == ZIP_STORED for part in file.infolist())


class _Source:
    """The tensors of one file.

    It is mapped to memory, and mapped anew after every 32 MB read (or 1/32 of the file), so that pages already copied to a
    module leave memory. A pickle of before PyTorch 1.6, or a compressed one, is read as a whole.
    """

    names: Iterable[str]
    shape: Callable[[str], Iterable[int]]
    _get: Callable[[str], Tensor]

    def __init__(self, path: Path) -> None:
        if path.is_dir():
            raise ValueError(f"{path} is a folder: name the file of weights in it")
        with open(path, "rb") as file:
            start = file.read(9)
        if not start:
            raise ValueError(f"{path} is empty: download it again")
        self.path, self._read, self._window = path, 0, max(_WINDOW, path.stat().st_size // 32)
        self._safetensors = start[8:] == b"{"
        with self._blamed():
            self._mapped = self._safetensors or (start[:2] == b"PK" and _whole(path))
            self._open()

    @contextmanager
    def _blamed(self) -> Iterator[None]:
        try:
            yield
        except SafetensorError as error:
            raise ValueError(f"{self.path} is not a complete safetensors file ({error}): download it again") from error
        except Exception as error:  # a damaged pickle can raise anything
            kind, says = type(error).__name__, str(error).partition("\n")[0]
            why = f"is not a readable checkpoint ({kind}: {says}): download it again"
            if kind == "UnpicklingError":
                why = "is damaged, or holds more than tensors, and nothing else is ever unpickled: ask for a .safetensors file"
            raise ValueError(f"{self.path} {why}") from error

    def _open(self) -> None:
        if self._safetensors:
            handle = safe_open(self.path, "pt")
            self.names, self._get = handle.keys(), handle.get_tensor
            self.shape = lambda name: handle.get_slice(name).get_shape()
        else:
            with torch.serialization.safe_globals(_LIGHTNING):
                tensors = _flat(torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped))
            self.names, self._get = tensors, tensors.__getitem__
            self.shape = lambda name: tensors[name].shape

    def get(self, name: str) -> Tensor:
        with self._blamed():
            tensor = self._get(name)
            self._read += tensor.nbytes
            if self._mapped and self._read > self._window:
                self._read = 0
                self._open()
        return tensor


class File(Mapping[str, Tensor]):
    """A checkpoint's tensors by name: safetensors, or a pickle that holds nothing but tensors.

    Raises ValueError when the file is not a complete checkpoint of either kind, or is unsafe to unpickle. What it gives can be
    memory of the file itself: copy what is to stay.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._source = path, _Source(path)
        self._names = {name: name for name in self._source.names}
        if not self._names:
            raise ValueError(f"{path} holds no tensors")

    def renamed(self, names: dict[str, str]) -> File:
        """The same file under other names, new: old; what is not named is left out."""
        other = copy.copy(self)
        other._names = {new: self._names[old] for new, old in names.items()}
        return other

    def __getitem__(self, name: str) -> Tensor:
        return self._source.get(self._names[name])

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._source.shape(self._names[name]))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.shape(name) for name in self}

    def part(self, prefix: str) -> File:
        """What begins with `prefix`, without it."""
        return self.renamed({name.removeprefix(prefix): name for name in self if name.startswith(prefix)})


# --- filling modules ---------------------------------------------------------------------------------------------------

# What older files hold beside weights.
_EXTRA = re.compile(r"position_ids$")
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _list(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _shape_of(shapes: list[tuple[int, ...]], transposed: bool) -> tuple[int, ...]:
    """The shape that the file's tensors, of equal shapes, have once they are joined and turned."""
    first = shapes[0]
    joined = (len(shapes) * first[0], *first[1:]) if first else ()
    return joined[::-1] if transposed else joined


def _fits(shape: tuple[int, ...], ours: torch.Size) -> bool:
    """Equal, but for a 1 x 1 convolution, which is a matrix here."""
    return 0 not in shape and (shape == ours or (len(ours) == 2 and shape == (*ours, 1, 1)))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _read(file: File, theirs: tuple[str, ...], like: Tensor, transposed: bool, dtype: torch.dtype | None) -> Tensor:
    """One tensor of ours, in memory of its own, in the memory format that the module wants."""
    parts = [file[name] for name in theirs]
    for name, part in zip(theirs, parts, strict=True):
        if part.dtype not in (FLOATS if like.is_floating_point() else (like.dtype,)):
            raise ValueError(
                f"{file.path} holds {name} as {part.dtype}; weights are read in float32, float16 or bfloat16"
            )
    tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
    tensor = (tensor.T if transposed else tensor).reshape(like.shape)
    flat = torch.empty(like.numel(), dtype=dtype or tensor.dtype)
    ours = flat.as_strided(like.shape, like.stride()).copy_(tensor)
    if not _finite(flat):
        raise ValueError(f"{file.path} holds values that are not finite in {ours.dtype}, in {theirs[0]}")
    return ours


def check(module: nn.Module, names: Names, file: File, what: str) -> None:
    """Raises ValueError unless the file's tensors are exactly those of `names`, in the right shapes."""
    state = module.state_dict()
    if unfilled := state.keys() ^ names.keys():
        raise RuntimeError(f"the table and the module differ in {_list(unfilled)}")
    wanted = {name for theirs in names.values() for name in theirs}
    unknown = {name for name in file if name not in wanted and not _EXTRA.search(name)}
    if missing := wanted - file.keys():
        also = f"; it holds instead {_list(unknown)}" if unknown else ""
        raise ValueError(f"{file.path} is not {what}: it lacks {_list(missing)}{also}")
    if unknown:
        raise ValueError(f"{file.path} is not {what}: it also holds {_list(unknown)}")
    for name, tensor in state.items():
        shapes = [file.shape(n) for n in names[name]]
        if len(set(shapes)) > 1 or not _fits(_shape_of(shapes, names[name][0] in TRANSPOSED), tensor.shape):
            found = " and ".join(str(list(shape)) for shape in shapes)
            raise ValueError(
                f"{file.path} is not {what}: {_list(names[name])} is {found}, for {list(tensor.shape)} here"
            )


def assemble(module: M, names: Names, file: File, what: str, dtype: torch.dtype | None) -> M:
    """Fills a module that was built on the meta device from a file, after `check`; `dtype=None` keeps the file's own.

    Returns it frozen and in eval mode. Raises ValueError that names what is missing, unknown, misshapen or not finite.
    """
    check(module, names, file, what)
    tensors = {
        name: _read(file, names[name], like, names[name][0] in TRANSPOSED, dtype if like.is_floating_point() else None)
        for name, like in module.state_dict().items()
    }
    return fill(module, tensors)


def fill(module: M, tensors: dict[str, Tensor]) -> M:
    """Puts the tensors into a module built on the meta device, strictly; returns it frozen and in eval mode."""
    module.load_state_dict(tensors, strict=True, assign=True)
    if left := [name for name, t in [*module.named_parameters(), *module.named_buffers()] if t.is_meta]:
        raise RuntimeError(f"these tensors were not filled: {', '.join(left)}")
    return module.eval().requires_grad_(False)


def _empty(module: Callable[[Any], M], config: Any) -> M:
    configs.plausible(config)
    with torch.device("meta"):
        return module(config)


# --- the project's own files -------------------------------------------------------------------------------------------


@contextmanager
def _written(path: Path) -> Iterator[Path]:
    """A temporary name, which becomes `path` in the end, or goes when something is raised."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


_LINES = re.compile(r"\n *")


def write_json(path: Path, data: Any) -> None:
    """Writes JSON, a list of plain values on one line, under a temporary name, then renames it."""
    text = re.sub(
        r"\[\n([^][{}]*)\n *\]", lambda found: f"[{_LINES.sub(' ', found[1]).strip()}]", json.dumps(data, indent=1)
    )
    with _written(path) as part:
        part.write_text(text + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> None:
    """Writes safetensors under a temporary name, then renames it. Raises ValueError when a value is too large for `dtype`."""
    out: dict[str, Tensor] = {}
    places = set()
    for name, tensor in tensors.items():
        plain = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        if plain.dtype != tensor.dtype and plain.numel() and not _finite(plain):
            raise ValueError(f"{path} is not written: {name} holds values that are not finite in {dtype}")
        out[name] = (
            plain.clone() if plain.data_ptr() in places else plain
        )  # safetensors refuses tensors that share memory
        places.add(plain.data_ptr())
    with _written(path) as part:
        save_file(out, part)


def sha256(path: Path) -> str:
    """The hash of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(module: nn.Module, path: Path, card: dict[str, Any], dtype: torch.dtype | None = torch.float16) -> None:
    """Writes `path` (safetensors) and the card beside it (`.json`), with the module's config if it has one."""
    write_tensors(path, module.state_dict(), dtype)
    config = getattr(module, "config", None)
    write_json(path.with_suffix(".json"), ({"config": asdict(config)} if config else {}) | card)


def read_card(path: Path) -> dict[str, Any]:
    """The card of a file of weights. Raises FileNotFoundError that names the command which makes it."""
    card = path.with_suffix(".json")
    if not path.exists() or not card.exists():
        raise FileNotFoundError(f"{path} and its card {card.name} are not there; `make weights` trains them")
    return read_json(card)


# --- Stable Diffusion --------------------------------------------------------------------------------------------------

LDM = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text": "cond_stage_model.transformer."}


@dataclass(frozen=True)
class Base:
    """A base model."""

    unet: UNet
    vae: VAE
    text: TextEncoder

    @property
    def parts(self) -> dict[str, nn.Module]:
        """By the names of their files and folders."""
        return {"unet": self.unet, "vae": self.vae, "text_encoder": self.text}


def single_kind(file: File) -> str:
    """What a single file is, by the names in it."""
    if any(name.startswith("conditioner.embedders.") for name in file):
        return "Stable Diffusion XL"
    if any(name.startswith("cond_stage_model.model.") for name in file):
        return "Stable Diffusion 2.x"
    if any(name.startswith(("control_model.", "controlnet_")) for name in file):
        return "a ControlNet"
    if any("lora" in name for name in file):
        return "a LoRA"
    return "Stable Diffusion 1.x" if any(name.startswith(LDM["unet"]) for name in file) else "not a base model"


def _ema(file: File) -> File:
    """The slow copy in the place of the weights: LDM names it `model_ema.` and the name without its first part and dots."""
    fast = [name for name in file if name.startswith(LDM["unet"])]
    slow = {name: f"model_ema.{name.removeprefix('model.').replace('.', '')}" for name in fast}
    if absent := slow.values() - file.keys():
        raise ValueError(f"{file.path} has no EMA copy of the UNet (it lacks {_list(absent)})")
    return file.renamed({name: slow.get(name, name) for name in file})


def _single(path: Path) -> File:
    file = File(path)
    if (kind := single_kind(file)) != "Stable Diffusion 1.x":
        raise ValueError(
            f"{path} is {kind}; of single files only Stable Diffusion 1.x is read (others as diffusers folders)"
        )
    return file


def load_single(path: Path, dtype: torch.dtype | None = torch.float32, ema: bool = False) -> Base:
    """Stable Diffusion 1.x from one file in LDM's layout, `.safetensors` or `.ckpt`; with `ema` the UNet's slow copy."""
    file = _ema(_single(path)) if ema else _single(path)
    unet, vae, text = (file.part(prefix) for prefix in LDM.values())
    with _blame(path, "is not a complete Stable Diffusion 1.x checkpoint"):
        sizes = configs.ldm_unet(unet.shapes), configs.ldm_vae(vae.shapes), configs.ldm_text(text.shapes)
        empty = _empty(UNet, sizes[0]), _empty(VAE, sizes[1]), _empty(TextEncoder, sizes[2])
    tables = (
        named(empty[0].state_dict(), unet_rows(sizes[0]), 2),
        named(empty[1].state_dict(), vae_rows(sizes[1]), 2),
        text_names(empty[2].state_dict(), sizes[2]),
    )
    what = "a complete Stable Diffusion 1.x checkpoint"
    for module, names, part in zip(empty, tables, (unet, vae, text), strict=True):
        check(module, names, part, what)
    return Base(
        assemble(empty[0], tables[0], unet, what, dtype),
        assemble(empty[1], tables[1], vae, what, dtype),
        assemble(empty[2], tables[2], text, what, dtype),
    )


@contextmanager
def _blame(path: Path, says: str) -> Iterator[None]:
    """Errors about a config name the file."""
    try:
        yield
    except OSError:
        raise
    except KeyError as error:
        raise ValueError(f"{path} {says}: it lacks {error}") from None
    except Exception as error:  # JSON can hold anything
        raise ValueError(f"{path} {says}: {error or type(error).__name__}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError, or ValueError that names the file when it is none."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    with _blame(path, "is not a JSON object"):
        return dict(json.loads(path.read_text()))


def _if_there(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where there is no file."""
    return read_json(path) if path.exists() else {}


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's config in the folder of a base model, {} where there is none."""
    return _if_there(folder / "scheduler" / "scheduler_config.json")


def _described(folder: Path, module: Callable[[Any], M], config: Callable[[dict[str, Any]], Any], what: str) -> M:
    """The empty module that a folder's `config.json` describes."""
    with _blame(folder / "config.json", f"is not the config of {what} that is read"):
        return _empty(module, config(read_json(folder / "config.json")))


def _weights_in(folder: Path) -> File:
    """The weights in a folder of diffusers or transformers."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    names = [f"{stem}{variant}{end}" for end in (".safetensors", ".bin") for variant in ("", ".fp16") for stem in stems]
    for name in names:
        if (folder / name).exists():
            return File(folder / name)
    raise FileNotFoundError(f"{folder} holds no weights, neither {names[0]} nor {names[1]} nor their .bin")


def _carded(path: Path, module: Callable[..., M], config: type[Any] | None) -> M:
    """The empty module that the card of a file of our own describes."""
    card = read_card(path)
    with torch.device("meta"), _blame(path.with_suffix(".json"), "does not describe a network"):
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()} if config else {}
        return _empty(module, config(**values)) if config else module()


def load(
    path: Path, module: Callable[..., M], config: type[Any] | None, dtype: torch.dtype | None = torch.float32
) -> M:
    """A module of our own from its file and card."""
    empty, file = _carded(path, module, config), File(path)
    return assemble(empty, {name: (name,) for name in empty.state_dict()}, file, "what its card says", dtype)


def _described_unet(folder: Path) -> UNet:
    prediction = scheduler_config(folder.parent).get("prediction_type", "epsilon")
    return _described(folder, UNet, lambda config: configs.unet_config(config, prediction), "a UNet")


def unet_config(path: Path) -> UNetConfig:
    """The config of a base model's UNet, without its weights: from its card, its `config.json`, or a single file's header.

    Raises what `load_base` does where that does not describe one.
    """
    if path.is_file():
        with _blame(path, "is not a complete Stable Diffusion 1.x checkpoint"):
            return configs.ldm_unet(_single(path).part(LDM["unet"]).shapes)
    if (path / "unet").is_dir():
        return _described_unet(path / "unet").config
    return _carded(path / "unet.safetensors", UNet, UNetConfig).config


def load_unet(path: Path, dtype: torch.dtype | None = torch.float32) -> UNet:
    """A UNet: a file of our own, or a diffusers folder (whether it predicts v stands in the scheduler's folder beside it)."""
    if not path.is_dir():
        return load(path, UNet, UNetConfig, dtype)
    unet = _described_unet(path)
    names = named(unet.state_dict(), unet_rows(unet.config), 1)
    return assemble(unet, names, _weights_in(path), "the UNet of its config.json", dtype)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_vae(path: Path, dtype: torch.dtype | None = torch.float32) -> VAE:
    """An autoencoder: a file of our own, or a diffusers folder, older names of its attention included."""
    if not path.is_dir():
        return load(path, VAE, VAEConfig, dtype)
    vae, file = _described(path, VAE, configs.vae_config, "a VAE"), _weights_in(path)
    old = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_OLD_ATTENTION)})(?=\.)")
    file = file.renamed({old.sub(lambda m: _OLD_ATTENTION[m[0]], name): name for name in file})
    names = named(vae.state_dict(), vae_rows(vae.config), 1)
    return assemble(vae, names, file, "the VAE of its config.json", dtype)


def load_text_encoder(path: Path, dtype: torch.dtype | None = torch.float32) -> TextEncoder:
    """A text tower: a file of our own, or a folder in transformers' layout with the tokenizer's folder beside it."""
    if not path.is_dir():
        return load(path, TextEncoder, TextConfig, dtype)
    tokenizer, words = path.parent / "tokenizer", None
    with _blame(tokenizer, "is not a tokenizer that is read"):
        if (tokenizer / "vocab.json").exists():
            words = read_json(tokenizer / "vocab.json")
        elif (tokenizer / "tokenizer.json").exists():
            words = read_json(tokenizer / "tokenizer.json")["model"]["vocab"]
        pad = configs.pad_token(words, _if_there(tokenizer / "tokenizer_config.json"))
    text = _described(path, TextEncoder, lambda config: configs.text_config(config, pad), "a text encoder")
    file = _weights_in(path)
    prefix = "text_model." if any(name.startswith("text_model.") for name in file) else ""
    names = text_names(text.state_dict(), text.config, prefix)
    return assemble(text, names, file, "the text encoder of its config.json", dtype)


def load_image_encoder(path: Path, dtype: torch.dtype | None = torch.float32) -> ImageEncoder:
    """An image tower: a file of our own, or a folder in transformers' layout."""
    if not path.is_dir():
        return load(path, ImageEncoder, ImageConfig, dtype)
    image = _described(path, ImageEncoder, configs.image_config, "an image encoder")
    names = image_names(image.state_dict(), image.config)
    return assemble(image, names, _weights_in(path), "the image encoder of its config.json", dtype)


def load_base(path: Path, dtype: torch.dtype | None = torch.float32) -> Base:
    """A base model: Stable Diffusion 1.x as a single file, a diffusers folder, or a folder of our own.

    Raises ValueError when its parts do not fit together.
    """
    end = "" if (path / "unet").is_dir() else ".safetensors"
    base = (
        load_single(path, dtype)
        if path.is_file()
        else Base(
            load_unet(path / f"unet{end}", dtype),
            load_vae(path / f"vae{end}", dtype),
            load_text_encoder(path / f"text_encoder{end}", dtype),
        )
    )
    unet, vae, text = base.unet.config, base.vae.config, base.text.config
    if unet.in_channels not in (vae.latent_channels, 2 * vae.latent_channels + 1):  # alone, or with a mask to inpaint
        raise ValueError(
            f"{path} has a UNet that reads {unet.in_channels} channels, where its VAE gives {vae.latent_channels}: "
            "only ordinary models and those for inpainting are read"
        )
    if unet.context_dim != text.width:
        raise ValueError(
            f"{path} has a UNet that reads a text of width {unet.context_dim}, where its text encoder gives {text.width}"
        )
    return base


def files_of(path: Path) -> list[Path]:
    """The files that `path` is read from: itself with its card, or what counts in a folder."""
    if path.is_dir():
        return sorted(f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin", ".json") and f.is_file())
    return [path, *([card] if (card := path.with_suffix(".json")).exists() else [])]


# --- adapters ----------------------------------------------------------------------------------------------------------

BASES = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2.1", 2048: "Stable Diffusion XL"}
ENCODERS = {1024: "ViT-H", 1280: "ViT-bigG", 768: "ViT-L"}
FINE = {1280: "ViT-H", 1664: "ViT-bigG", 1024: "ViT-L"}  # by the width of their fine features
PROJECTIONS: dict[str, type[Projection]] = {
    "IP-Adapter": ImageProjection,
    "IP-Adapter Plus": Resampler,
    "IP-Adapter Full": MLPProjection,
}


def _called(names: dict[int, str], width: int) -> str:
    return f"{names[width]} ({width}-d)" if width in names else f"{width}-d"


def adapter_file(path: Path) -> File:
    """An adapter's file under the official names, also where it is a checkpoint of the official trainer.

    That trainer saves the whole model: the projection is `image_proj_model.`, the layers are `adapter_modules.<n>.` or, where
    accelerate dropped those as shared, stand in the UNet as `...attn2.processor.`; the UNet itself is left out.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there; `make weights` trains the mini adapter")
    file = File(path)
    if any(name.startswith("image_proj_model.") for name in file):
        parts = (("image_proj_model.", "image_proj."), ("adapter_modules.", "ip_adapter."))
        names = {new + name.removeprefix(old): name for old, new in parts for name in file if name.startswith(old)}
        if not any(name.startswith("ip_adapter.") for name in names):
            found = {m[1] for name in file if (m := _PROCESSOR.match(name))}
            for position, layer in enumerate(sorted(found, key=_processor_order)):
                for to in ("to_k_ip.weight", "to_v_ip.weight"):
                    if f"{layer}.{to}" in file:
                        names[f"ip_adapter.{2 * position + 1}.{to}"] = f"{layer}.{to}"
        file = file.renamed(names)
    if (kind := adapter_kind(file)) not in PROJECTIONS:
        raise ValueError(f"{path} is {kind}; only the base IP-Adapter, Plus and Full are read")
    return file


_PROCESSOR = re.compile(r"(unet\.(?:down|up|mid)_block.*\.processor)\.to_[kv]_ip\.weight$")


def _processor_order(layer: str) -> tuple[bool, bool, list[int]]:
    """diffusers' order: down, up, mid."""
    return "mid_block" in layer, "up_blocks" in layer, [int(n) for n in re.findall(r"\d+", layer)]


def adapter_kind(file: File) -> str:
    """What kind of adapter a file is, by its names, as diffusers tells them apart."""
    if not any(name.startswith("image_proj.") for name in file):
        return kind if (kind := single_kind(file)) != "not a base model" else "not an adapter"
    if any("lora" in name for name in file) or any(name.startswith("image_proj.perceiver_resampler.") for name in file):
        return "an IP-Adapter FaceID"
    if "image_proj.latents" in file:
        return "IP-Adapter Plus"
    if "image_proj.proj.3.weight" in file:
        return "IP-Adapter Full"
    if "image_proj.proj.0.weight" in file:
        return "an IP-Adapter FaceID"
    return "IP-Adapter" if "image_proj.proj.weight" in file else "not an adapter"


def adapter_sizes(file: File) -> dict[str, int]:
    """The sizes of an adapter's projection, as its class in PROJECTIONS takes them, from the shapes.

    Raises ValueError when a tensor that shows one is missing or misshapen.
    """

    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        name = f"image_proj.{name}"
        if name not in file or len(file.shape(name)) != axes or 0 in file.shape(name):
            raise ValueError(f"{file.path} is not a complete adapter: {name} is missing or misshapen")
        return file.shape(name)

    def whole(rows: int, size: int, what: str) -> int:
        if rows % size:
            raise ValueError(
                f"{file.path}: a projection to {rows} numbers is no whole number of {what} of width {size}"
            )
        return rows // size

    kind = adapter_kind(file)
    if kind == "IP-Adapter Plus":
        _, tokens, width = shape("latents", 3)
        return {
            "image_dim": shape("proj_in.weight")[1],
            "context_dim": shape("proj_out.weight")[0],
            "tokens": tokens,
            "width": width,
            "depth": sum(name.endswith(".to_kv.weight") for name in file),
            "heads": whole(shape("layers.0.0.to_q.weight")[0], HEAD, "heads"),
        }
    if kind == "IP-Adapter Full":
        return {"image_dim": shape("proj.0.weight")[1], "context_dim": shape("proj.3.weight", 1)[0]}
    (rows, image_dim), (context_dim,) = shape("proj.weight"), shape("norm.weight", 1)
    return {"image_dim": image_dim, "context_dim": context_dim, "tokens": whole(rows, context_dim, "tokens")}


def projection_of(file: File) -> Projection:
    """The empty projection of an adapter's file, from its header."""
    with torch.device("meta"):
        return PROJECTIONS[adapter_kind(file)](**adapter_sizes(file))


def _encoder(projection: Projection, width: int) -> str:
    """The image encoder whose embeddings, or fine features, are that wide."""
    return f"the fine features of {_called(FINE, width)}" if projection.fine else _called(ENCODERS, width)


def load_adapter(
    path: Path,
    unet: UNet,
    image_dim: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    fine_dim: int | None = None,
) -> IPAdapter:
    """An adapter for this UNet, and for an encoder whose embeddings are `image_dim` wide, its fine features `fine_dim`.

    The form, tokens and widths come from the weights; a file without W'_k and W'_v shares the UNet's. Raises ValueError when
    the adapter is for another base or encoder, or of another kind.
    """
    file = adapter_file(path)
    projection = projection_of(file)
    context_dim, encoder_dim = projection.context_dim, fine_dim if projection.fine else image_dim
    if context_dim != unet.config.context_dim:
        wants, given = _called(BASES, context_dim), _called(BASES, unet.config.context_dim)
        raise ValueError(
            f"{path} is an adapter for {wants}, you gave a base of {given}: use the adapter made for this base"
        )
    if encoder_dim is not None and projection.image_dim != encoder_dim:
        wants, given = _encoder(projection, projection.image_dim), _encoder(projection, encoder_dim)
        raise ValueError(
            f"{path} wants {wants}, you gave {given}: pass that encoder as --image-encoder, or another adapter"
        )
    own = any(name.startswith("ip_adapter.") for name in file)
    with torch.device("meta"):
        adapter = IPAdapter(UNet(unet.config) if own else unet, projection, own_projections=own)
    names = adapter_names(adapter.state_dict(), unet)
    return assemble(adapter, names, file, "an adapter for this base model", dtype)


def save_adapter(
    adapter: IPAdapter, unet: UNet, path: Path, card: dict[str, Any], dtype: torch.dtype | None = torch.float16
) -> None:
    """Writes an adapter in the official layout, which diffusers loads, and its card."""
    state = adapter.state_dict()
    write_tensors(path, {new: state[ours] for ours, (new,) in adapter_names(state, unet).items()}, dtype)
    write_json(path.with_suffix(".json"), card)


_AROUND = re.compile(r"attn\.proj_(in|out)\.weight$")


def save_diffusers(unet: UNet, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Writes a UNet, its `config.json` and weights, as a folder that diffusers' `UNet2DConditionModel.from_pretrained` loads.

    Whether it predicts epsilon or v is no part of such a folder: diffusers has that in the pipeline's scheduler.
    """
    config, state = configs.diffusers_config(unet.config), unet.state_dict()
    names = named(state, unet_rows(unet.config), 1)
    turn = not config["use_linear_projection"]
    tensors = {names[k][0]: v[:, :, None, None] if turn and _AROUND.search(k) else v for k, v in state.items()}
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors, dtype)
    write_json(folder / "config.json", config)


# --- inspect, convert, verify ------------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[..., nn.Module]] = {
    "unet": load_unet,
    "vae": load_vae,
    "text_encoder": load_text_encoder,
    "image_encoder": load_image_encoder,
}
_CLASSES = {
    "UNet2DConditionModel": "unet",
    "AutoencoderKL": "vae",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder",
    "CLIPVisionModelWithProjection": "image_encoder",
}
# What only its config holds.
_CARDS = {"prediction": "unet", "scale": "vae", "vocabulary": "text_encoder", "patch": "image_encoder"}


def kind_of(path: Path) -> str:
    """base, adapter, unet, vae, text_encoder or image_encoder. Raises ValueError, or FileNotFoundError, when it is none."""
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there")
    if path.is_dir():
        if (path / "unet").is_dir() or (path / "unet.safetensors").exists():
            return "base"
        config = _if_there(path / "config.json")
        classes = config.get("_class_name") or config.get("architectures") or "no config.json that names a network"
        name = str(classes[0] if isinstance(classes, list) else classes)
        if name not in _CLASSES:
            raise ValueError(f"{path} is not a folder of weights that is read: {name}")
        return _CLASSES[name]
    card = path.with_suffix(".json")
    entries = _if_there(card).get("config") if card != path else None
    for key, kind in _CARDS.items():
        if isinstance(entries, dict) and key in entries:
            return kind
    file = File(path)
    if any(name.startswith(("image_proj.", "image_proj_model.")) for name in file):
        return "adapter"
    if (kind := single_kind(file)) != "not a base model":
        return "base"
    raise ValueError(f"{path} is {kind}, no adapter, and has no card beside it; it holds {_list(file)}")


def _size(tensors: Iterable[Tensor]) -> str:
    sizes = [(str(tensor.dtype).removeprefix("torch."), tensor.numel()) for tensor in tensors]
    count = {dtype: sum(n for kind, n in sizes if kind == dtype) for dtype, _ in sizes}
    kinds = ", ".join(count) if len(count) == 1 else ", ".join(f"{n:,} {dtype}" for dtype, n in count.items())
    return f"{sum(count.values()):,} parameters in {len(sizes)} tensors, {kinds}"


_LAYER = re.compile(r"(ip_adapter\.\d+)\.to_[kv]_ip\.weight$")


def _broken(file: File) -> list[str]:
    """What is wrong with an adapter, whatever its base."""
    projection = projection_names(f"image_projection.{name}" for name in projection_of(file).state_dict())
    layers = {m[1] for name in file if (m := _LAYER.match(name))}
    wanted = {name for (name,) in projection.values()} | {f"{layer}.to_{x}_ip.weight" for layer in layers for x in "kv"}
    dtypes = {name: file[name].dtype for name in file}
    lines = (
        ("it lacks", wanted - file.keys()),
        ("it also holds", file.keys() - wanted),
        (
            "weights that are not float32, float16 or bfloat16:",
            [n for n, dtype in dtypes.items() if dtype not in FLOATS],
        ),
        (
            "values that are not finite in",
            [n for n, dtype in dtypes.items() if dtype in FLOATS and file[n].numel() and not _finite(file[n])],
        ),
    )
    return [f"{says} {_list(names)}" for says, names in lines if names]


def _describe_adapter(path: Path) -> list[str]:
    file = adapter_file(path)
    projection, tokens = projection_of(file), adapter_sizes(file).get("tokens")
    context_dim, reads = projection.context_dim, _encoder(projection, projection.image_dim)
    layers = [int(m[1]) for name in file if (m := re.match(r"ip_adapter\.(\d+)\.to_k_ip\.weight$", name))]
    lines = [
        f"{adapter_kind(file)} for {_called(BASES, context_dim)}, reads {reads}, {tokens or 'as many'} tokens",
        f"{len(layers)} cross-attention layers, {_size(file[name] for name in file)}",
    ]
    wanted = {768: 16, 1024: 16, 2048: 70}.get(context_dim, len(layers))
    if len(layers) != wanted:
        lines.append(f"odd: {_called(BASES, context_dim)} has {wanted} cross-attention layers")
    if sorted(layers) != list(range(1, 2 * len(layers), 2)):
        lines.append("odd: its layers are not numbered 1, 3, 5, ...")
    return lines + [f"odd: {line}" for line in _broken(file)]


def _describe_single(path: Path) -> list[str]:
    file = File(path)
    lines = [f"{single_kind(file)}, a single file: {_size(file[name] for name in file)}"]
    try:
        base = load_single(path, dtype=None)
        parts = {"UNet": base.unet, "VAE": base.vae, "text encoder": base.text}
        lines += [f"{name}: {_size(part.state_dict().values())}" for name, part in parts.items()]
        channels, latent = base.unet.config.in_channels, base.vae.config.latent_channels
        if channels == 2 * latent + 1:
            lines.append(f"for inpainting: the UNet reads {channels} channels, a mask and the masked picture too")
        elif channels != latent:
            lines.append(f"odd: the UNet reads {channels} channels, where its VAE gives {latent}")
    except ValueError as error:
        lines.append(f"odd: {error}")
    if slow := [name for name in file if name.startswith("model_ema.")]:
        lines.append(f"an EMA copy of the UNet: {len(slow)} tensors (convert --ema takes it)")
    return lines


def inspect(path: Path) -> list[str]:
    """What a file or folder is, in words: model, base, encoder, tokens, parameters, dtype; and what is missing or odd.

    Raises ValueError or FileNotFoundError when it is nothing that is read.
    """
    kind = kind_of(path)
    if kind == "adapter":
        return _describe_adapter(path)
    if kind == "base" and path.is_file():
        return _describe_single(path)
    if kind == "base":
        lines = [
            "a base model in a diffusers folder"
            if (path / "unet").is_dir()
            else "a base model in this project's own files"
        ]
        for name in LOADERS:
            part = path / name if (path / name).is_dir() else path / f"{name}.safetensors"
            if part.exists():
                lines += [f"{name}: {line}" for line in inspect(part)]
            elif name != "image_encoder":
                lines.append(f"odd: it has no {name}")
        return lines
    module: Any = LOADERS[kind](path, dtype=None)
    config = {k: v for k, v in asdict(module.config).items() if k != "vocabulary"}
    what = kind.replace("_", " ")
    if kind == "unet":
        what = f"UNet for {_called(BASES, config['context_dim'])}"
    if kind == "image_encoder":
        what = f"CLIP image encoder, {_called(ENCODERS, config['output_dim'])}"
    return [f"{what}, {_size(module.state_dict().values())}", ", ".join(f"{k} {v}" for k, v in config.items())]


def convert(
    source: Path, target: Path, dtype: torch.dtype | None = None, ema: bool = False, diffusers: bool = False
) -> None:
    """An adapter to the official .safetensors, a base model to a folder of our own, or (`diffusers`) a UNet to a diffusers folder.

    `dtype=None` keeps every tensor as it is, bit for bit. Raises ValueError, and writes nothing, where something is wrong.
    """
    kind, card = kind_of(source), {"converted_from": source.name}
    if kind != "base" and not diffusers and target.suffix != ".safetensors":
        raise ValueError(f"the {kind} is written as one file: name TARGET.safetensors, not {target}")
    if ema and (kind != "base" or source.is_dir()):
        raise ValueError(f"{source} is not a base model in a single file, so it has no EMA copy: leave out --ema")
    if diffusers:
        if kind != "unet":
            raise ValueError(f"{source} is not a UNet but {kind}; --diffusers writes UNets")
        save_diffusers(load_unet(source, dtype=None), target, dtype)
    elif kind == "adapter":
        file = adapter_file(source)
        if wrong := _broken(file):
            raise ValueError(f"{source} is not a complete adapter: {'; '.join(wrong)}")
        write_tensors(target, {name: file[name] for name in file}, dtype)
    elif kind == "base":
        base = load_single(source, None, ema) if source.is_file() else load_base(source, None)
        for name, module in base.parts.items():
            save(module, target / f"{name}.safetensors", card, dtype)
        if scheduler := scheduler_config(source):
            write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    else:
        save(LOADERS[kind](source, dtype=None), target, card, dtype)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of anything that is read, under this project's names (an adapter's under the official ones)."""
    kind = kind_of(path)
    if kind == "adapter":
        return dict(adapter_file(path))
    if kind == "base":
        parts = load_base(path, dtype=None).parts
        return {f"{part}.{name}": t for part, module in parts.items() for name, t in module.state_dict().items()}
    return dict(LOADERS[kind](path, dtype=None).state_dict())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def verify(a: Path, b: Path) -> list[str]:
    """How two checkpoints differ, tensor by tensor, whatever their layouts; nothing when they are equal bit for bit."""
    one, two = tensors_of(a), tensors_of(b)
    lines = [
        f"only in {path}: {_list(names)}"
        for path, names in ((a, one.keys() - two.keys()), (b, two.keys() - one.keys()))
        if names
    ]
    for name in sorted(one.keys() & two.keys()):
        x, y = one[name], two[name]
        if x.shape != y.shape:
            lines.append(f"{name}: {list(x.shape)} against {list(y.shape)}")
        elif x.dtype != y.dtype or not torch.equal(_bits(x), _bits(y)):
            lines.append(
                f"{name}: {x.dtype} against {y.dtype}, largest difference {float((x.double() - y.double()).abs().max()):.3g}"
            )
    return lines


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="weights_convert.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = p.add_subparsers(dest="command", required=True)
    commands.add_parser("inspect").add_argument("files", type=Path, nargs="+")
    c = commands.add_parser("convert")
    c.add_argument("source", type=Path)
    c.add_argument("target", type=Path)
    c.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: as it is, bit for bit")
    c.add_argument("--ema", action="store_true", help="take the UNet's slow copy from a single file")
    c.add_argument(
        "--diffusers",
        action="store_true",
        help="write a UNet as diffusers has it: config.json and diffusion_pytorch_model.safetensors into TARGET, nothing else "
        "(that a model predicts v stands in the pipeline's scheduler, not there)",
    )
    v = commands.add_parser("verify")
    v.add_argument("a", type=Path)
    v.add_argument("b", type=Path)
    args = p.parse_args(argv)
    try:
        if args.command == "inspect":
            for path in args.files:
                print("\n  ".join([str(path), *inspect(path)]))
        elif args.command == "convert":
            convert(
                args.source, args.target, getattr(torch, args.dtype) if args.dtype else None, args.ema, args.diffusers
            )
            print("\n  ".join([str(args.target), *inspect(args.target)]))
        elif lines := verify(args.a, args.b):
            sys.exit("\n".join(lines))
        else:
            print("equal, bit for bit")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
