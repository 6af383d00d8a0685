"""Training an adapter on Stable Diffusion XL: its text encoders, its sizes, and the loss of diffusers' UNet."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from own_pictures import picture, write_pictures
from PIL import Image
from small_models import Model, build

from checkpoints.adapters import save_adapter
from eval.peers.official import attach_adapter
from sampling import __main__ as sampling
from sampling.images import open_image, picture_size
from train.__main__ import main
from train.album import CaptionedPicture, Member
from train.file_pairs import FilePairs
from train.loss import diffusion_loss, sample_inputs
from train.setting import Setting, TrainingSource, prepare

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:these words are not")
SIDE = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("sdxl")
    write_pictures(folder / "data", 24)
    (folder / "data" / "03.txt").write_text("")
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (37, 61, 3), np.uint8)).save(folder / "data" / "07.png")
    return build(folder, "sdxl")


@pytest.fixture(scope="module")
def setting(model: Model) -> Setting:
    return prepare(TrainingSource(model.base, model.encoder, data=model.base.parent / "data", side=SIDE), model.base.parent / "state")


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tiff", "avif"])
def test_the_size_of_a_picture_is_that_of_the_opened_one(kind: str, tmp_path: Path) -> None:
    """For all EXIF orientations, and an impossible one."""
    for orientation in range(10):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}.{kind}"
        picture(1).save(file, exif=exif)
        opened = open_image(file)
        assert picture_size(file) == (opened.height, opened.width)


def test_the_size_of_a_picture_in_a_shard(tmp_path: Path) -> None:
    picture(2).save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "a.png")
    with tarfile.open(tmp_path / "shard.tar") as tar:
        member = tar.getmember("a.png")
    packed = CaptionedPicture(tmp_path / "shard.tar", ("",), 0, Member("a.png", member.offset_data, member.size))
    assert packed.size == (18, 20) == CaptionedPicture(tmp_path / "a.png", ("",), 0).size


@pytest.mark.parity("IP-Adapter tutorial_train_sdxl.py, original_size and crop_coords_top_left of a centred crop", "restated")
def test_sizes_are_those_of_the_official_trainer(setting: Setting) -> None:
    pairs = setting.pairs
    assert isinstance(pairs, FilePairs)
    for row in range(len(pairs)):
        raw = pairs.files[row].open()
        width, height = raw.size
        scale = SIDE / min(width, height)  # transforms.Resize keeps the ratio; the long side is rounded down
        resized = (int(width * scale + 1e-9), int(height * scale + 1e-9))
        left, top = ((n - SIDE) // 2 for n in resized)
        assert pairs.sizes(torch.tensor([row]))[0].tolist() == [height, width, top, left, SIDE, SIDE]


@pytest.mark.parity("diffusers StableDiffusionXLPipeline.encode_prompt and UNet2DConditionModel with an IP-Adapter, float32", 2e-5)
def test_the_loss_is_that_of_diffusers(model: Model, setting: Setting, tmp_path: Path) -> None:
    """A batch of all pictures, some of which lose their text, their picture or both."""
    torch.manual_seed(3)
    adapter, pairs, unet = setting.adapter(), setting.pairs, setting.pipeline.unet
    assert isinstance(pairs, FilePairs)
    rows = torch.arange(len(pairs)).repeat(4)
    inputs = sample_inputs(pairs.at(rows), torch.Generator().manual_seed(0), dropping=True)
    context = adapter(inputs.context(unet.config), inputs.image)
    ours = diffusion_loss(unet, setting.pipeline.schedule, inputs.x0, context, inputs.t, inputs.eps)

    save_adapter(adapter, unet, tmp_path / "adapter.safetensors", {}, torch.float32)
    peer = attach_adapter(UNet2DConditionModel.from_pretrained(model.base / "unet"), tmp_path / "adapter.safetensors")
    empty = pairs.at(rows).text.eq(inputs.text).flatten(1).all(dim=1).logical_not()
    captions = ["" if lost else pairs.files[row].text for row, lost in zip(rows.tolist(), empty.tolist(), strict=True)]
    encoded = model.peers[0].encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
    tokens, pooled = (encoded[i].half().float() for i in (0, 2))  # as ours are kept
    added = {"text_embeds": pooled, "time_ids": pairs.sizes(rows), "image_embeds": [inputs.image[:, :, 0]]}
    noisy = DDPMScheduler.from_pretrained(model.base / "scheduler").add_noise(inputs.x0, inputs.eps, inputs.t)
    with torch.no_grad():
        predicted = peer(noisy, inputs.t, tokens, added_cond_kwargs=added).sample
    assert 3 < empty.sum() < len(rows) / 2
    assert torch.allclose(ours, (predicted - inputs.eps).square().mean(dim=(1, 2, 3)), atol=2e-5)


@pytest.mark.parametrize("stage", ["adapter", "plus"])
def test_train_and_draw(model: Model, stage: str, tmp_path: Path) -> None:
    data, base = model.base.parent / "data", ["--image-encoder", str(model.encoder)]
    options = f"--data {data} --base {model.base} --state {tmp_path / 'state'} --weights {tmp_path} --steps 2 --batch 4 --side {SIDE}"
    main([stage, *options.split(), *base])
    (adapter,) = tmp_path.glob("*.safetensors")
    files = ["--checkpoint", str(model.base), "--ip-adapter", str(adapter), "--image", str(data / "00.png"), *base]
    sampling.run([*files, "--out", str(tmp_path / "out.png"), *["--steps", "2", "--height", "32", "--width", "32"]])
    assert Image.open(tmp_path / "out.png").size == (32, 32)


def test_the_mini_world_is_refused(model: Model, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is Stable Diffusion XL: name pictures to train on with --data"):
        main(["adapter", "--base", str(model.base), "--image-encoder", str(model.encoder), "--weights", str(tmp_path)])
