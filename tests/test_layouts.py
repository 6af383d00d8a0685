"""Common and harmless spellings of the same weights: what other tools read is read here, and gives the same network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from base_files import IMAGE, TEXT, VAE_CONFIG, Peers, Tensors, change, change_json, check_base, equal
from diffusers import UNet2DConditionModel
from peers import max_error, randn, vae_pair, vision_pair
from safetensors.torch import load_file, save_file
from solvers import SD15
from test_reader import write_shards
from transformers import CLIPConfig, CLIPModel

from checkpoints.adapters import load_adapter, save_adapter
from checkpoints.clip import load_image_encoder, load_text_encoder
from checkpoints.convert import verify
from checkpoints.describe import inspect
from checkpoints.fill import empty_module
from checkpoints.single_file import load_single
from checkpoints.skeletons import image_skeleton, text_skeleton
from checkpoints.stable_diffusion import load_base, load_unet, load_vae, scheduler_config
from model.adapter import IPAdapter
from model.image_encoder import MINI_IMAGE, VIT_BIGG, VIT_H, VIT_L, ImageEncoder
from model.image_projection import Resampler
from model.text_encoder import SD15_TEXT, SD21_TEXT, TextConfig, TextEncoder
from sampling.loading import load
from sampling.request import WEIGHTS
from train.clip import MINI_TEXT
from weights_convert import main

ROOT = Path(__file__).parent.parent
DOUBLE = 1e-11  # measured: 1e-13
SINGLE = 1e-5  # in float32

TEXT_PART, VAE_PART = "cond_stage_model.transformer.", "first_stage_model."
Edit = Callable[[Tensors], Tensors]


def rename(pattern: str, new: str) -> Edit:
    return lambda tensors: {re.sub(pattern, new, name): tensor for name, tensor in tensors.items()}


def add(**names: torch.Tensor) -> Edit:
    return lambda tensors: tensors | {name.replace("__", "."): tensor for name, tensor in names.items()}


def spelled_as_diffusers(tensors: Tensors) -> Tensors:
    """The attention of a single file's VAE with the names and matrices that converters leave."""
    new = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "norm": "group_norm"}
    out = {}
    for name, tensor in tensors.items():
        m = re.fullmatch(r"(first_stage_model\..*mid\.attn_1\.)(\w+)\.(weight|bias)", name)
        out[f"{m[1]}{new[m[2]]}.{m[3]}" if m else name] = tensor.flatten(1) if m and tensor.ndim == 4 else tensor
    return out


HARMLESS: dict[str, Edit] = {
    "a text projection": add(cond_stage_model__transformer__text_projection__weight=torch.ones(2, 2)),
    "a scale of logits": add(cond_stage_model__transformer__logit_scale=torch.ones(()), cond_stage_model__logit_scale=torch.ones(())),
    "a loss": add(first_stage_model__loss__discriminator__main__0__weight=torch.ones(2), first_stage_model__loss__logvar=torch.ones(())),
    "an EMA copy of the VAE": add(
        first_stage_model__model_ema__decoderconv_inweight=torch.ones(2),
        first_stage_model__model_ema__decay=torch.ones(()),
    ),
    "text names without text_model": rename(r"^cond_stage_model\.transformer\.text_model\.", TEXT_PART),
    "VAE attention spelled to_q": spelled_as_diffusers,
    "a prefix module.": rename("^", "module."),
    "a stray lora": add(lora_note=torch.ones(1)),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_single_files_with_harmless_spellings(base: Peers, tmp_path: Path, case: str) -> None:
    path = tmp_path / "sd.safetensors"
    save_file({name: t.contiguous() for name, t in HARMLESS[case](base.single).items()}, path)
    check_base(load_base(path), base.ours)
    assert not any("odd" in line for line in inspect(path))


@pytest.mark.parametrize("end", [".safetensors", ".bin"])
@pytest.mark.parametrize("form", ["shards", "fp16", "non_ema", "fp16 shards"])
def test_folders_with_shards_and_variants(base: Peers, own_folder: Path, form: str, end: str) -> None:
    """As diffusers and transformers name them."""
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        stem_here = "pytorch_model" if part == "text_encoder" and end == ".bin" else stem
        plain = own_folder / part / f"{stem}.safetensors"
        tensors = load_file(plain)
        plain.unlink()
        if "shards" in form:
            index = write_shards(own_folder / part, stem_here, end, tensors)
            if form == "fp16 shards":
                index.rename(index.with_name(index.name.replace(".index.json", ".index.fp16.json")))
        else:
            file = own_folder / part / f"{stem_here}.{form}{end}"
            (save_file if end == ".safetensors" else torch.save)(tensors, file)  # type: ignore[operator]
    check_base(load_base(own_folder), base.ours)


def test_the_full_weights_come_before_a_variant(base: Peers, own_folder: Path) -> None:
    wrong = {
        name: tensor + 1
        for name, tensor in load_file(own_folder / "vae" / "diffusion_pytorch_model.safetensors").items()
    }
    save_file(wrong, own_folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save(wrong, own_folder / "vae" / "diffusion_pytorch_model.bin")
    equal(load_vae(own_folder / "vae"), base.ours.vae)


def test_networks_by_the_name_of_their_file(base: Peers, folder: Path, tmp_path: Path) -> None:
    equal(load_unet(folder / "unet" / "diffusion_pytorch_model.safetensors"), base.ours.unet)
    equal(load_vae(folder / "vae" / "diffusion_pytorch_model.safetensors"), base.ours.vae)
    equal(load_text_encoder(folder / "text_encoder" / "model.safetensors"), base.ours.text)
    peer, ours = vision_pair(IMAGE)
    peer.float().save_pretrained(tmp_path / "encoder")
    equal(load_image_encoder(tmp_path / "encoder" / "model.safetensors"), ours)
    assert "CLIP image encoder" in inspect(tmp_path / "encoder" / "model.safetensors")[0]


@pytest.mark.parity("transformers CLIPModel, float32", "1e-04 of the largest entry")
@pytest.mark.parametrize("defaults", [False, True], ids=["small", "transformers' defaults"])
def test_the_image_tower_of_a_whole_clip(tmp_path: Path, defaults: bool) -> None:
    vision = (
        {}
        if defaults
        else {
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        }
    )
    text = {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 50,
    }
    whole = CLIPModel(
        CLIPConfig(text_config=text, vision_config=vision | {"num_hidden_layers": 2}, projection_dim=24)
    ).eval()
    whole.save_pretrained(tmp_path)
    tower = load_image_encoder(tmp_path)
    pixels = randn(1, 3, tower.config.image_size, tower.config.image_size, dtype=torch.float32)
    with torch.no_grad():
        want = whole.visual_projection(whole.vision_model(pixels).pooler_output)
        assert max_error(tower(pixels), want) < 1e-4 * float(want.abs().max())
    assert "CLIP image encoder" in inspect(tmp_path)[0]


def test_a_vae_of_its_own(base: Peers, tmp_path: Path) -> None:
    """As `vae-ft-mse-840000` is released: LDM's names without the model's prefix, beside a loss and an EMA copy."""
    alone = {
        name.removeprefix(VAE_PART): t.contiguous() for name, t in base.single.items() if name.startswith(VAE_PART)
    }
    extra = {"loss.logvar": torch.ones(()), "model_ema.decay": torch.ones(())}
    save_file(alone | extra, tmp_path / "vae.safetensors")
    torch.save({"state_dict": alone | extra}, tmp_path / "vae.ckpt")
    save_file({"first_stage_model." + name: t for name, t in alone.items()}, tmp_path / "model.safetensors")
    for name in ("vae.safetensors", "vae.ckpt", "model.safetensors"):
        equal(load_vae(tmp_path / name), base.ours.vae)
    assert inspect(tmp_path / "vae.safetensors")[0].startswith("vae, ")


def test_a_vae_in_place_of_the_models_own(base: Peers, single: Path, own_folder: Path, tmp_path: Path) -> None:
    peer, other = vae_pair(VAE_CONFIG, seed=9)
    peer.float().save_pretrained(tmp_path / "other")
    none = change(
        Path(shutil.copy(single, tmp_path / "none.safetensors")),
        lambda t: [t.pop(k) for k in list(t) if k.startswith(VAE_PART)],
    )
    shutil.rmtree(own_folder / "vae")
    with pytest.raises(ValueError, match="is not a complete"):
        load_base(none)
    for path in (single, none, own_folder):
        loaded = load_base(path, vae=tmp_path / "other")
        equal(loaded.vae, other.float())
        equal(loaded.unet, base.ours.unet)
    equal(load(single, (), vae=tmp_path / "other").vae, other)


YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.001
    linear_end: 0.013
    timesteps: 900
    parameterization: "v"
    scale_factor: 0.25
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params: {num_heads: 4, context_dim: 16}
"""


@pytest.mark.parametrize("end", [".yaml", ".yml"])
def test_the_yaml_beside_a_single_file(single: Path, tmp_path: Path, end: str) -> None:
    path = Path(shutil.copy(single, tmp_path / "sd.safetensors"))
    assert scheduler_config(path) == {} and load_single(path).unet.config.prediction == "epsilon"
    path.with_suffix(end).write_text(YAML)
    loaded = load(path, ())
    assert loaded.unet.config.prediction == loaded.schedule.prediction == "v"
    assert loaded.unet.config.heads == (4,) * 4 and loaded.vae.config.scale == 0.25
    assert (loaded.schedule.timesteps, loaded.schedule.beta_start, loaded.schedule.beta_end) == (900, 0.001, 0.013)
    assert not loaded.schedule.final_one
    path.with_suffix(end).write_text(YAML.replace("num_heads: 4", "num_head_channels: 16"))
    assert load_single(path).unet.config.heads == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"v"', '"x0"', "parameterization is 'x0'"),
        ("model:", "models:", "lacks 'model'"),
        ("  params:\n    linear", "  params: [\n    linear", "LDM config: "),
        ("target:", "target: !!python/object/apply:os.system [id] #", "LDM config: "),
        ("linear_start: 0.001", "linear_start: x", "beta_start is 'x'"),
        ("0.25", "much", "its scale is 'much'"),
        ("0.001", "0.001\n    beta_schedule: cosine", "beta_schedule is 'cosine'"),
    ],
)
def test_a_yaml_that_asks_for_more_is_refused(single: Path, tmp_path: Path, old: str, new: str, sentence: str) -> None:
    path = Path(shutil.copy(single, tmp_path / "sd.safetensors"))
    path.with_suffix(".yaml").write_text(YAML.replace(old, new, 1))
    with pytest.raises(ValueError, match=rf"sd\.(yaml|safetensors) is not .*{sentence}"):
        load(path, ())


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_prediction_that_is_named_counts(single: Path, own_folder: Path, prediction: Any) -> None:
    change_json(own_folder / "scheduler" / "scheduler_config.json", **SD15)
    for path in (single, own_folder):
        loaded = load(path, (), prediction=prediction)
        assert loaded.unet.config.prediction == loaded.schedule.prediction == prediction


def test_a_marker_of_v_prediction_counts_more_than_the_yaml(base: Peers, tmp_path: Path) -> None:
    """The marker is in the file itself."""
    for path in (tmp_path / "sd.safetensors", tmp_path / "sd.ckpt"):
        tensors = {name: t.contiguous() for name, t in base.single.items()} | {"v_pred": torch.zeros(0)}
        (save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)  # type: ignore[operator]
        path.with_suffix(".yaml").write_text(YAML.replace('"v"', '"eps"'))
        for prediction, expected in ((None, "v"), ("epsilon", "epsilon")):
            loaded = load(path, (), prediction=prediction)  # type: ignore[arg-type]
            assert loaded.unet.config.prediction == loaded.schedule.prediction == expected


# inspect


@pytest.mark.parametrize(
    "config", [SD15_TEXT, SD21_TEXT, MINI_TEXT, replace(TEXT, output_dim=10, mlp_ratio=2.5)], ids=str
)
def test_skeletons_of_text_towers(config: TextConfig) -> None:
    tower, bones = empty_module(TextEncoder, config), empty_module(text_skeleton, config)
    assert {k: (t.shape, t.dtype) for k, t in bones.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in tower.state_dict().items()
    }


@pytest.mark.parametrize(
    "config", [VIT_H, VIT_L, VIT_BIGG, MINI_IMAGE, replace(MINI_IMAGE, layers=(2, 1, 3, 1), stem_pool=True)], ids=str
)
def test_skeletons_of_image_towers(config: Any) -> None:
    tower, bones = empty_module(ImageEncoder, config), empty_module(image_skeleton, config)
    assert {k: (t.shape, t.dtype) for k, t in bones.state_dict().items()} == {
        k: (t.shape, t.dtype) for k, t in tower.state_dict().items()
    }


LIGHT = """
import sys
from pathlib import Path
from checkpoints.describe import inspect
for path in sys.argv[1:]:
    assert inspect(Path(path))
print(sorted(name for name in ("open_clip", "torchvision", "transformers", "diffusers") if name in sys.modules))
"""


def test_inspect_does_not_import_open_clip(single: Path, folder: Path, tmp_path: Path) -> None:
    """It takes seconds, through torchvision."""
    vision_pair(IMAGE)[0].save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "config.json").exists()
    paths = [single, folder, tmp_path / "encoder", ROOT / "weights", *(ROOT / "weights").glob("[ius]*.safetensors")]
    run = subprocess.run([sys.executable, "-c", LIGHT, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stdout + run.stderr


def test_inspect_says_what_the_judge_is() -> None:
    with pytest.raises(
        ValueError, match=r"judge\.safetensors is neither a base model, an adapter nor .* \(made by `python -m "
    ):
        inspect(ROOT / "weights" / "judge.safetensors")


def test_one_stray_key_makes_no_lora(tmp_path: Path) -> None:
    save_file({"lora_note": torch.ones(1), "a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="is neither a base model"):
        inspect(tmp_path / "a.safetensors")
    save_file(
        {f"lora_unet_{i}.{leaf}": torch.ones(1) for i in range(3) for leaf in ("lora_up.weight", "alpha")},
        tmp_path / "b.safetensors",
    )
    with pytest.raises(ValueError, match="is a LoRA"):
        load_base(tmp_path / "b.safetensors")


@pytest.mark.parity("diffusers _convert_ip_adapter_image_proj_to_diffusers", 0)
@pytest.mark.parametrize("joined", [False, True], ids=["to_k and to_v", "to_kv"])
def test_plus_as_diffusers_spells_it(pair: Any, tmp_path: Path, joined: bool) -> None:
    """The state of diffusers' own module, made from the official file."""
    both = pair("one_block")
    adapter = IPAdapter(both.ours, Resampler(image_dim=10, context_dim=6, tokens=3, width=64, depth=4, heads=1))
    save_adapter(adapter, both.ours, tmp_path / "plus.safetensors", {}, None)
    official = load_file(tmp_path / "plus.safetensors")
    layers = {name.removeprefix("image_proj."): t for name, t in official.items() if name.startswith("image_proj.")}
    theirs = UNet2DConditionModel._convert_ip_adapter_image_proj_to_diffusers(
        both.peer, layers, low_cpu_mem_usage=False
    ).state_dict()
    assert "layers.0.attn.to_q.weight" in theirs
    if joined:
        theirs = {name: t for name, t in theirs.items() if ".to_k." not in name and ".to_v." not in name} | {
            name.replace(".0.to_kv", ".attn.to_kv"): t for name, t in layers.items() if ".to_kv." in name
        }
    projection = {f"image_proj.{name}": t.contiguous() for name, t in theirs.items()}
    save_file(
        projection | {k: t for k, t in official.items() if k.startswith("ip_adapter.")}, tmp_path / "a.safetensors"
    )
    assert verify(tmp_path / "plus.safetensors", tmp_path / "a.safetensors") == []
    equal(load_adapter(tmp_path / "a.safetensors", both.ours), adapter.float())
    assert not any("odd" in line for line in inspect(tmp_path / "a.safetensors"))


def test_every_file_is_inspected_whatever_is_wrong_with_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    files = [tmp_path / "page.safetensors", WEIGHTS / "vae.safetensors", tmp_path / "absent.bin"]
    with pytest.raises(SystemExit, match=r"error: .*page\.safetensors.*\nerror: .*absent\.bin"):
        main(["inspect", *map(str, files)])
    assert "vae, " in capsys.readouterr().out
