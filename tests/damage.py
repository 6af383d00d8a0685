"""Seeded damage to tensors, headers, bytes and configs."""

from __future__ import annotations

import json
import math
import random

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.uint8, torch.bool,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
)  # fmt: skip


def poison(tensor: Tensor, value: float, rng: random.Random) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[rng.randrange(tensor.numel())] = value
    return tensor


def damage_tensors(tensors: Tensors, rng: random.Random) -> Tensors:
    """One change of names, shapes, dtypes or values."""
    tensors = dict(tensors)
    name, other = rng.sample(sorted(tensors), 2)
    t = tensors[name]
    kind = rng.choice(("rename", "drop", "add", "swap", "reshape", "cast", "cast all", "poison", "scale"))
    if kind == "rename":
        new = rng.choice(
            (name + "x", name[1:], name.replace("weight", "bias"), name.replace(".", "", 1), other, "état")
        )
        tensors[new] = tensors.pop(name)
    elif kind == "drop":
        del tensors[name]
    elif kind == "add":
        tensors[rng.choice((name + ".weight", "x", "model.diffusion_model.x", name.replace("1", "2")))] = t.clone()
    elif kind == "swap":
        tensors[name], tensors[other] = tensors[other], t
    elif kind == "reshape":
        shapes = (t.flatten(), t[None], t[..., None, None], t.T if t.ndim == 2 else t[:-1], t[:0], t.flatten()[0])
        tensors[name] = rng.choice((*shapes, torch.cat([t, t]))).contiguous()
    elif kind == "cast":
        tensors[name] = t.to(rng.choice(DTYPES))
    elif kind == "cast all":
        dtype = rng.choice(DTYPES)
        tensors = {k: v.to(dtype) for k, v in tensors.items()}
    elif kind == "poison":
        tensors[name] = poison(t, rng.choice((math.nan, math.inf, -math.inf)), rng)
    else:
        tensors[name] = t * rng.choice((0.0, -1.0, 100.0))
    return tensors


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed anywhere, in the header or at the end; or the file cut, or longer, or with a hole."""
    data, n = bytearray(content), len(content)
    kind = rng.choice(("any", "head", "head", "header", "tail", "cut", "more", "hole", "move"))
    header = 8 + int.from_bytes(content[:8], "little")
    inside = {"any": (0, n), "head": (0, 64), "header": (0, min(header, n)), "tail": (max(0, n - 300), n)}
    if kind in inside:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(*inside[kind])] = rng.randrange(256)
    elif kind == "cut":
        del data[rng.randrange(n) :]
    elif kind == "more":
        data += rng.randbytes(rng.randint(1, 99))
    else:
        start = rng.randrange(n)
        end = min(n, start + rng.randint(1, n // 4))
        data[start:end] = bytes(end - start) if kind == "hole" else data[: end - start]
    return bytes(data)


def damage_header(content: bytes, rng: random.Random) -> bytes:
    """Another word in the header of a safetensors file, whose length is put right."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    entry = header[rng.choice([name for name in header if name != "__metadata__"])]
    kind = rng.choice(("dtype", "shape", "data_offsets", "drop"))
    if kind == "dtype":
        entry["dtype"] = rng.choice(("F16", "BF16", "F32", "F64", "I32", "U8", "F8_E4M3", "F4", "X", 3, None))
    elif kind == "drop":
        del entry[rng.choice(list(entry))]
    else:
        values = entry[kind] or [0]
        values[rng.randrange(len(values))] = rng.choice((0, 1, -1, 2**31, 2**63, 2**70, "a", None, 1.5, [1]))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


WRONG = (
    None, True, False, -1, 0, 1, 2, 3, 8.5, 1e30, 10**30, 10**9, "", "x", "gelu", [], [1], [0], [8, 8], [[1]], ["x"], {}, {"a": 1},
    math.nan, math.inf,
)  # fmt: skip


def damage_json(text: str, rng: random.Random) -> bytes:
    """An entry changed, dropped or added; or the text itself."""
    kind = rng.choice(("change", "change", "change", "drop", "add", "bytes"))
    if kind == "bytes":
        return damage_bytes(text.encode(), rng)
    config = json.loads(text)
    where = rng.choice([config, *(value for value in config.values() if isinstance(value, dict))])
    name = rng.choice(list(where))
    if kind == "drop":
        del where[name]
    elif kind == "add":
        where[rng.choice(("x", "class_embed_type", "hidden_act", "scaling_factor", "num_attention_heads"))] = (
            rng.choice(WRONG)
        )
    elif isinstance(where[name], list) and where[name] and rng.random() < 0.5:
        where[name][rng.randrange(len(where[name]))] = rng.choice(WRONG)
    else:
        where[name] = rng.choice(WRONG)
    return json.dumps(config).encode()
