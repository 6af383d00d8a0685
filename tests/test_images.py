"""Picture files: all modes and rotations of Pillow, damaged files, and settings in a PNG."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, PngImagePlugin

from model.image_encoder import ImageConfig, ImageEncoder
from sampling.images import KEY, open_image, picture_size, read_mask, read_settings, save_image, to_images, to_rgb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def corners(image: Image.Image) -> list[Any]:
    """The pixels at the top left, top right, bottom left and bottom right."""
    w, h = image.size
    return [image.getpixel(at) for at in ((0, 0), (w - 1, 0), (0, h - 1), (w - 1, h - 1))]


def four_colours(width: int = 40, height: int = 24) -> Image.Image:
    """Quarters of red, green, blue and white."""
    image = Image.new("RGB", (width, height), WHITE)
    for colour, at in ((RED, (0, 0)), (GREEN, (width // 2, 0)), (BLUE, (0, height // 2))):
        image.paste(colour, (*at, at[0] + width // 2, at[1] + height // 2))
    return image


def noise(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


ORIENTATIONS = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {"quality": 100, "subsampling": 0} if suffix == "jpg" else {}
    image = open_image(saved(four_colours(), tmp_path / f"a.{suffix}", exif=exif, **options))
    assert image.mode == "RGB" and image.size == ((40, 24) if orientation < 5 else (24, 40))
    np.testing.assert_allclose(corners(image), ORIENTATIONS[orientation], atol=3)


XMP = "XML:com.adobe.xmp"


def late(path: Path) -> Path:
    """Move the metadata of a PNG behind its pixels."""
    data, at, chunks = path.read_bytes(), 8, list[bytes]()
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        chunks.append(data[at:end])
        at = end
    moved = [chunk for chunk in chunks if chunk[4:8] in (b"eXIf", b"iTXt")]
    assert moved
    path.write_bytes(data[:8] + b"".join([*(chunk for chunk in chunks[:-1] if chunk not in moved), *moved, chunks[-1]]))
    return path


@pytest.mark.parametrize("orientation", [None, *ORIENTATIONS])
@pytest.mark.parametrize("kind", ["png", "late png", "xmp png", "late xmp png", "jpg", "webp", "tiff"])
def test_the_size_of_a_picture_is_read_without_decoding_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, orientation: int | None
) -> None:
    """Upright, from a path and an open file. Only a PNG with metadata behind its pixels is decoded."""
    exif, options, path = Image.Exif(), dict[str, Any](), tmp_path / f"a.{kind.split()[-1]}"
    if orientation and "xmp" in kind:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(XMP, f'<x tiff:Orientation="{orientation}"/>')
    elif orientation:
        exif[ExifTags.Base.Orientation] = orientation
        options["exif"] = exif
    saved(noise(), path, **options)
    if "late" in kind and orientation:
        late(path)
    with Image.open(path) as file:
        file.load()
        width, height = ImageOps.exif_transpose(file).size
    assert (width, height) == ((48, 64) if orientation and orientation > 4 else (64, 48))
    if "late" not in kind or not orientation:
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("the picture was decoded"))
    assert picture_size(path) == picture_size(io.BytesIO(path.read_bytes())) == (height, width)


def rgba(alpha: int) -> Image.Image:
    return Image.new("RGBA", (4, 4), (*RED, alpha))


def palette_png(index: int, alpha: int | bytes) -> tuple[Image.Image, dict[str, Any]]:
    image = Image.new("P", (4, 4), index)
    image.putpalette([0, 0, 0, *RED, *BLUE])
    return image, {"transparency": alpha}


TRANSPARENT: dict[str, tuple[Image.Image, dict[str, Any], tuple[int, int, int]]] = {
    "clear RGBA": (rgba(0), {}, WHITE),
    "half RGBA": (rgba(128), {}, (255, 127, 127)),
    "full RGBA": (rgba(255), {}, RED),
    "clear LA": (Image.new("LA", (4, 4), (10, 0)), {}, WHITE),
    "half LA": (Image.new("LA", (4, 4), (0, 128)), {}, (127, 127, 127)),
    "full LA": (Image.new("LA", (4, 4), (10, 255)), {}, (10, 10, 10)),
    "P, the clear index": (*palette_png(1, 1), WHITE),
    "P, another index": (*palette_png(2, 1), BLUE),
    "P, alpha by index": (*palette_png(1, b"\xff\x00\xff"), WHITE),
    "P without alpha": (palette_png(1, 0)[0], {}, RED),
    "RGB with a clear colour": (Image.new("RGB", (4, 4), RED), {"transparency": RED}, WHITE),
    "RGB with another clear colour": (Image.new("RGB", (4, 4), RED), {"transparency": BLUE}, RED),
    "L with a clear level": (Image.new("L", (4, 4), 7), {"transparency": 7}, WHITE),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparency_is_white(tmp_path: Path, name: str) -> None:
    image, options, expected = TRANSPARENT[name]
    opened = open_image(saved(image, tmp_path / "a.png", **options))
    assert opened.mode == "RGB"
    np.testing.assert_allclose(corners(opened), [expected] * 4, atol=1)


def test_transparent_gif(tmp_path: Path) -> None:
    image, options = palette_png(1, 1)
    assert open_image(saved(image, tmp_path / "a.gif", **options)).getpixel((1, 1)) == WHITE


def ramp16() -> Image.Image:
    return Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))


OTHER: dict[str, tuple[Image.Image, str, list[Any]]] = {
    "16-bit PNG": (ramp16(), "png", [0, 1, 128, 255]),
    "16-bit TIFF": (ramp16(), "tiff", [0, 1, 128, 255]),
    "1-bit": (Image.fromarray(np.array([[True, False]])), "png", [255, 0]),
    "grey": (Image.fromarray(np.array([[0, 9, 200]], dtype=np.uint8)), "png", [0, 9, 200]),
    "float to 1": (Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)), "tiff", [0, 128, 255]),
    "float to 255": (Image.fromarray(np.array([[0.0, 99.6, 255.0]], dtype=np.float32)), "tiff", [0, 100, 255]),
    "float above 1": (Image.fromarray(np.array([[0.0, 0.5, 1.5]], dtype=np.float32)), "tiff", [0, 128, 255]),
    "float with highlights": (Image.fromarray(np.array([[0.25, 1.0, 16.0]], dtype=np.float32)), "tiff", [64, 255, 255]),
    "float to 65535": (Image.fromarray(np.array([[0, 257, 65535]], dtype=np.float32)), "tiff", [0, 1, 255]),
    "float with NaN": (Image.fromarray(np.array([[np.nan, 0.5, 1.0]], dtype=np.float32)), "tiff", [0, 128, 255]),
    "float with infinities": (
        Image.fromarray(np.array([[-np.inf, 0.5, np.inf]], dtype=np.float32)),
        "tiff",
        [0, 128, 255],
    ),
    "32-bit to 255": (Image.fromarray(np.array([[0, 9, 255]], dtype=np.int32)), "tiff", [0, 9, 255]),
    "32-bit to 65535": (Image.fromarray(np.array([[-5, 257, 65535]], dtype=np.int32)), "tiff", [0, 1, 255]),
    "32-bit to 2^31 - 1": (Image.fromarray(np.array([[0, 2**30, 2**31 - 1]], dtype=np.int32)), "tiff", [0, 128, 255]),
    "float below 0": (Image.fromarray(np.array([[-3.0, 0.5, 1.0]], dtype=np.float32)), "tiff", [0, 128, 255]),
}


@pytest.mark.parametrize("name", OTHER)
def test_grey_depths(tmp_path: Path, name: str) -> None:
    image, suffix, levels = OTHER[name]
    opened = open_image(saved(image, tmp_path / f"a.{suffix}"))
    assert opened.mode == "RGB"
    assert np.asarray(opened)[0].tolist() == [[level] * 3 for level in levels]


def test_a_transparent_level_of_16_bits_is_white(tmp_path: Path) -> None:
    levels = np.full((4, 4), 0x1234, np.uint16)
    levels[0] = 0
    Image.fromarray(levels).save(tmp_path / "a.png", transparency=0x1234)
    opened = open_image(tmp_path / "a.png")
    assert (opened.getpixel((0, 0)), opened.getpixel((0, 3))) == ((0, 0, 0), (255, 255, 255))


def test_cmyk(tmp_path: Path) -> None:
    for suffix, atol in (("tiff", 0), ("jpg", 4)):
        opened = open_image(saved(four_colours().convert("CMYK"), tmp_path / f"a.{suffix}"))
        assert opened.mode == "RGB"
        np.testing.assert_allclose(corners(opened), [RED, GREEN, BLUE, WHITE], atol=atol)


@pytest.mark.parametrize("mode", ["YCbCr", "LAB"])
def test_other_colour_spaces(tmp_path: Path, mode: str) -> None:
    """Pillow 12 can't read an uncompressed YCbCr TIFF that it wrote."""
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" else {}
    opened = open_image(saved(Image.new(mode, (3, 3), (255, 128, 128)), tmp_path / "a.tiff", **options))
    assert opened.mode == "RGB"
    np.testing.assert_allclose(corners(opened), [WHITE] * 4, atol=2)


@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (4000, 10), (10, 4000), (1, 50)])
def test_strange_shapes_reach_the_encoder(tmp_path: Path, size: tuple[int, int], fit: Any) -> None:
    image = open_image(saved(Image.new("RGB", size, RED), tmp_path / "a.png"))
    assert image.size == size and image.getpixel((0, 0)) == RED
    encoder = ImageEncoder(ImageConfig(image_size=16, patch=8, width=8, layers=(1,), heads=2, output_dim=4))
    pixels = encoder.preprocess(image, fit)
    assert pixels.shape == (3, 16, 16) and pixels.isfinite().all()


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), BLUE)]
    path = saved(frames[0], tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == RED


FORMATS = {"jpg": "JPEG", "jfif": "JPEG", "tif": "TIFF", "tiff": "TIFF", "jp2": "JPEG2000", "ico": "ICO", "tga": "TGA"}
FORMATS |= {suffix: suffix.upper() for suffix in ("png", "gif", "webp", "bmp", "avif", "dds", "pcx", "sgi", "ppm")}


def encoded(suffix: str, image: Image.Image | None = None) -> bytes:
    file = io.BytesIO()
    (image or noise()).save(file, FORMATS[suffix])
    return file.getvalue()


@pytest.mark.parametrize("suffix", ["jpg", "jfif", "png", "gif", "tif", "tiff", "webp", "avif", "bmp"])
def test_usual_files_are_read(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(encoded(suffix, four_colours()))
    np.testing.assert_allclose(corners(open_image(tmp_path / f"a.{suffix}")), [RED, GREEN, BLUE, WHITE], atol=9)


# Masks: what is transparent is not painted.


def strokes(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """The left is white. The right is transparent, or black if the mode has no transparency."""
    image = Image.new("L", (8, 8), 0)
    image.paste(255, (0, 0, 4, 8))
    if mode in ("RGBA", "LA"):
        return Image.merge("LA", (Image.new("L", (8, 8), 255), image)).convert(mode), {}
    key = {"L key": 7, "RGB key": (7, 7, 7), "1 key": 0, "I;16 key": 300, "P key": 1, "P alpha": b"\xff\x00"}.get(mode)
    if mode.startswith("P"):
        palette = image.point(lambda level: int(level == 0)).convert("L")
        indexed = Image.frombytes("P", (8, 8), palette.tobytes())
        indexed.putpalette([255] * 6 if key else [255, 255, 255, 0, 0, 0])
        return indexed, {"transparency": key} if key else {}
    if mode.startswith("I;16"):
        levels = np.where(np.asarray(image) == 255, 65535, 300 if key else 0).astype(np.uint16)
        return Image.fromarray(levels), {"transparency": key} if key else {}
    if mode in ("I", "F"):
        return Image.fromarray(np.asarray(image).astype(np.int32 if mode == "I" else np.float32)), {}
    if mode in ("L key", "RGB key"):
        image = image.point(lambda level: level or 7)
    if mode == "YCbCr":
        return image.convert(mode), {"compression": "tiff_lzw"}  # Pillow 12 can't read what it wrote without
    return image.convert(mode.split()[0]), {} if key is None else {"transparency": key}


TRANSPARENT_MODES = ["RGBA", "LA", "P key", "P alpha", "L key", "RGB key", "1 key", "I;16 key"]
OPAQUE_MODES = ["1", "L", "P", "RGB", "CMYK", "I;16", "I", "F", "YCbCr"]


@pytest.mark.parametrize("mode", TRANSPARENT_MODES + OPAQUE_MODES)
def test_masks_with_white_strokes(tmp_path: Path, mode: str) -> None:
    image, options = strokes(mode)
    suffix = "tiff" if mode in ("CMYK", "I", "F", "YCbCr") else "png"
    mask = read_mask(saved(image, tmp_path / f"a.{suffix}", **options))
    assert mask.shape == (1, 1, 8, 8)
    wanted = (torch.arange(8) < 4).float().expand(1, 1, 8, 8)
    assert float((mask - wanted).abs().max()) < 0.02


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La", "RGBa"])
def test_every_mode_with_alpha_is_laid_over_both_backgrounds(mode: str) -> None:
    clear = Image.new(mode, (3, 3))
    assert [to_rgb(clear, behind).getpixel((1, 1)) for behind in ("white", "black")] == [WHITE, (0, 0, 0)]


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_truncated_files_are_refused_by_name(tmp_path: Path, suffix: str, share: float) -> None:
    data, path = encoded(suffix), tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match=r"cut\." + suffix):
        open_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("suffix", FORMATS)
def test_flipped_bytes_are_a_picture_or_a_value_error(tmp_path: Path, suffix: str) -> None:
    data, path, rng = encoded(suffix), tmp_path / f"bad.{suffix}", np.random.default_rng(1)
    for _ in range(60):
        bad = bytearray(data)
        for at in rng.integers(0, min(len(data), 200), 3):
            bad[at] = int(rng.integers(256))
        path.write_bytes(bad)
        try:
            assert open_image(path).mode == "RGB"
        except ValueError as error:
            assert path.name in str(error)


@pytest.mark.parametrize("fourcc", [b"XXXX", b"DX10", b"\0\0\0\0"])
def test_pixel_formats_that_pillow_does_not_know(tmp_path: Path, fourcc: bytes) -> None:
    """Pillow's decoders raise NotImplementedError, RuntimeError and others."""
    (tmp_path / "a.dds").write_bytes(encoded("dds")[:80] + struct.pack("<I", 4) + fourcc + encoded("dds")[88:])
    with pytest.raises(ValueError, match=r"a\.dds"):
        open_image(tmp_path / "a.dds")


@pytest.mark.parametrize(
    "content", [b"", b"just some text\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"%PDF-1.4"]
)
def test_files_that_are_not_pictures(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.png"):
        open_image(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.png: there is no such file"):
        open_image(tmp_path / "nowhere.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder"):
        open_image(tmp_path / "folder")


@pytest.mark.parametrize("read", [open_image, read_mask], ids=["picture", "mask"])
def test_only_regular_files_are_read(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        with pytest.raises(ValueError, match="not a regular file"):
            read(path)


def test_a_strip_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"strip\.png: more pixels"):
        open_image(saved(Image.new("1", (2**16 + 1, 1)), tmp_path / "strip.png"))


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"big\.png: more pixels"):
        open_image(saved(Image.new("RGB", (15, 15)), tmp_path / "big.png"))


def test_tensors_to_levels() -> None:
    levels = torch.arange(256) / 127.5 - 1
    row = levels.view(1, 1, 1, 256).expand(1, 3, 2, 256)
    assert np.asarray(to_images(row)[0])[0, :, 0].tolist() == list(range(256))
    two = torch.stack([torch.full((3, 2, 5), -7.0), torch.full((3, 2, 5), 7.0)])
    black, white = to_images(two.bfloat16())
    assert black.size == (5, 2) and black.getpixel((0, 0)) == (0, 0, 0) and white.getpixel((4, 1)) == WHITE


def test_settings_round_trip(tmp_path: Path) -> None:
    settings = {
        "arguments": {"prompt": 'a "fox" – λ 狐\n', "scale": 0.1 + 0.2, "image": ["ä.png"], "width": None},
        "sha256": {},
    }
    path = tmp_path / "new" / "folder" / "a.png"
    save_image(four_colours(), path, settings)
    assert read_settings(path) == settings
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(four_colours()))
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


def test_saving_over_a_picture_replaces_it(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for seed in (1, 2):
        save_image(four_colours(), path, {"seed": seed})
    assert read_settings(path) == {"seed": 2}


@pytest.mark.parametrize("name", ["a.jpg", "a.jpeg", "a.webp", "a", "a.png.gif", "a.safetensors"])
def test_other_formats_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"written as PNG, which stores their settings: use the name a\.?[a-z]*\.png"):
        save_image(four_colours(), tmp_path / name, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.PNG"
    save_image(four_colours(), path, {"seed": 1})

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match=r"a\.PNG can't be written: No space left on device"):
        save_image(four_colours(), path, {"seed": 2})
    assert read_settings(path) == {"seed": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_string_is_a_path(tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    save_image(four_colours(), path, {"seed": 1})
    assert open_image(path).size == (40, 24) and read_mask(path).shape == (1, 1, 24, 40)
    assert read_settings(path) == {"seed": 1}


def png_with(text: str | None, path: Path) -> Path:
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_text(KEY, text)
    return saved(four_colours(), path, pnginfo=info)


@pytest.mark.parametrize("text", [None, "not JSON", json.dumps([1]), ""])
def test_settings_of_a_foreign_picture(tmp_path: Path, text: str | None) -> None:
    with pytest.raises(ValueError, match=r"foreign\.png"):
        read_settings(png_with(text, tmp_path / "foreign.png"))


def test_settings_of_files_that_are_not_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("text")
    for name in ("a.png", "missing.png", ""):
        with pytest.raises(ValueError, match=name or str(tmp_path)):
            read_settings(tmp_path / name)
