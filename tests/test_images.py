"""Decoding of every kind of image file, and the transforms beside Pillow, torchvision and transformers."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, features
from transformers import SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llm2clip.images import MAX_PIXELS, ImageTransform, decode_image, random_box

GREY_LEVEL = 1 / 255 / 0.26130258  # one grey level after normalisation, at the smallest of CLIP's deviations


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something with the smooth and the sharp parts of a photo."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cell, weight in ((64, 0.5), (16, 0.3), (4, 0.15), (1, 0.05)):
        noise = rng.integers(0, 256, (max(height // cell, 2), max(width // cell, 2), 3), dtype=np.uint8)
        pixels += weight * np.asarray(Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC))
    return Image.fromarray(pixels.astype(np.uint8))


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """Upper left, upper right, lower left, lower right."""
    right, bottom = image.width - 1, image.height - 1
    return [image.getpixel(xy) for xy in ((0, 0), (right, 0), (0, bottom), (right, bottom))]


RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)


def four_colours() -> Image.Image:
    image = Image.new("RGB", (6, 4))
    for xy, colour in zip(((0, 0), (5, 0), (0, 3), (5, 3)), (RED, GREEN, BLUE, WHITE), strict=True):
        image.putpixel(xy, colour)
    return image


KINDS = {"zero-byte image", "unreadable image", "truncated image", "image too large", "unsupported image"}


# Decoding


def test_plain_rgb_is_unchanged() -> None:
    image = photo(37, 23)
    np.testing.assert_array_equal(np.asarray(decode_image(encode(image))), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_bilevel_and_palette(mode: str) -> None:
    image = decode_image(encode(four_colours().convert(mode)))
    assert image.mode == "RGB"
    assert corners(image)[3] == WHITE
    if mode == "P":
        assert corners(image) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("mode", "image_format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")]
)
def test_transparency_is_put_on_white(mode: str, image_format: str) -> None:
    layer = Image.new(mode, (4, 4))
    black = (0, 0, 0) if mode == "RGBA" else (0,)
    layer.putpixel((0, 0), (*black, 255))
    layer.putpixel((3, 0), (*black, 128))
    image = decode_image(encode(layer, image_format, **({"lossless": True} if image_format == "WEBP" else {})))
    assert image.mode == "RGB"
    assert corners(image) == [BLACK, (127, 127, 127), WHITE, WHITE]


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_transparent_colour_is_put_on_white(mode: str) -> None:
    """Palette entries and the single transparent colour of PNGs without alpha."""
    image = Image.new("RGB", (4, 4), BLACK)
    image.putpixel((0, 0), (200, 200, 200))
    if mode == "P":
        data = encode(image.quantize(2), transparency=image.quantize(2).getpixel((3, 3)))
    else:
        data = encode(image.convert(mode), transparency=(0, 0, 0) if mode == "RGB" else 0)
    upper_left, _, _, lower_right = corners(decode_image(data))
    assert lower_right == WHITE
    assert upper_left == (200, 200, 200)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_16_bit_is_scaled(image_format: str) -> None:
    values = np.array([[0, 200, 128 * 257, 65535]], np.uint16)  # 200 / 257 rounds to 1
    image = decode_image(encode(Image.fromarray(values), image_format))
    assert [image.getpixel((x, 0)) for x in range(4)] == [BLACK, (1, 1, 1), (128, 128, 128), WHITE]


def test_16_bit_big_endian_tiff() -> None:
    image = Image.frombytes("I;16B", (2, 1), struct.pack(">HH", 0, 65535))
    assert corners(decode_image(encode(image, "TIFF")))[:2] == [BLACK, WHITE]


def test_32_bit_and_float_are_refused() -> None:
    for values in (np.array([[0, 1 << 20]], np.int32), np.array([[0.5, 1.0]], np.float32)):
        with pytest.raises(ValueError, match=r"^unsupported image: .*16 bits"):
            decode_image(encode(Image.fromarray(values), "TIFF"))


def test_cmyk_jpeg() -> None:
    colours = Image.new("RGB", (32, 16), RED)
    image = decode_image(encode(colours.convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    np.testing.assert_allclose(np.asarray(image)[8, 16], RED, atol=6)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_animations(image_format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = decode_image(encode(frames[0], image_format, save_all=True, append_images=frames[1:], **options))
    assert image.mode == "RGB"
    assert corners(image) == [RED] * 4


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, None),
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (4, Image.Transpose.FLIP_TOP_BOTTOM),
        (5, Image.Transpose.TRANSPOSE),
        (6, Image.Transpose.ROTATE_90),
        (7, Image.Transpose.TRANSVERSE),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_exif_rotation(image_format: str, orientation: int, turn: Image.Transpose | None) -> None:
    upright = four_colours().resize((48, 32), Image.Resampling.NEAREST)
    stored = upright if turn is None else upright.transpose(turn)  # what a camera held that way writes
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode_image(encode(stored, image_format, exif=exif, quality=95))
    assert image.size == upright.size
    np.testing.assert_allclose(np.asarray(image)[2, 2], RED, atol=60)
    np.testing.assert_allclose(np.asarray(image)[-3, 2], BLUE, atol=60)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_cost_the_image() -> None:
    image = decode_image(encode(four_colours(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f"))
    assert image.size == (6, 4)


def test_exif_rotation_beside_a_broken_tag() -> None:
    tags = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"abc")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + tags + struct.pack("<I", 0)
    assert decode_image(encode(four_colours(), "JPEG", exif=exif)).size == (4, 6)


def png_header(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("edge", [9_500, 60_000])  # Pillow warns at the first and refuses the second
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(edge: int) -> None:
    assert edge * edge > MAX_PIXELS
    with pytest.raises(ValueError, match="^image too large: "):
        decode_image(png_header(edge, edge))


@pytest.mark.parametrize("data", [b"not an image at all", b"\0" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>"])
def test_unreadable(data: bytes) -> None:
    with pytest.raises(ValueError, match="^unreadable image: "):
        decode_image(data)


def test_zero_bytes() -> None:
    with pytest.raises(ValueError, match="^zero-byte image: "):
        decode_image(b"")


def test_postscript_is_not_run() -> None:
    with pytest.raises(ValueError, match="^unreadable image: "):
        decode_image(encode(four_colours(), "EPS"))


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(image_format: str, tolerant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another library has told Pillow to make do with what is left."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data = encode(photo(64, 48), image_format)
    with pytest.raises(ValueError, match="^(truncated|unreadable) image: "):
        decode_image(data[: len(data) // 2])


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_an_image_or_a_value_error(image_format: str) -> None:
    if not features.check({"JPEG2000": "jpg_2000", "AVIF": "avif"}.get(image_format, "jpg")):
        pytest.skip(f"this Pillow has no {image_format}")
    data = encode(photo(40, 30), image_format)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data[: rng.integers(1, len(data) + 1)]) if rng.random() < 0.5 else bytearray(data)
        for position in rng.integers(0, min(len(damaged), 400), rng.integers(0, 8)):
            damaged[position] = rng.integers(0, 256)
        try:
            assert decode_image(bytes(damaged)).mode == "RGB"
        except ValueError as error:
            refused += 1
            assert str(error).partition(":")[0] in KINDS
    assert refused > 10


def test_draft_decodes_big_jpegs_small_but_not_too_small() -> None:
    data = encode(photo(640, 480), "JPEG", quality=90)
    assert decode_image(data, min_edge=100).size == (160, 120)
    assert decode_image(data, min_edge=120).size == (160, 120)
    assert decode_image(data, min_edge=121).size == (320, 240)
    assert decode_image(data, min_edge=300).size == (640, 480)
    assert decode_image(encode(photo(640, 480)), min_edge=100).size == (640, 480)  # a PNG


# Transforms


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (224, 224), (225, 224), (64, 57), (500, 32)])
def test_evaluate_equals_the_clip_image_processor(size: tuple[int, int]) -> None:
    image = photo(*size)
    expected = CLIPImageProcessorPil()(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ImageTransform(size=224).evaluate(image), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(300, 200), (224, 224)])
def test_squash_equals_the_siglip_image_processor(size: tuple[int, int]) -> None:
    image = photo(*size)
    processor = SiglipImageProcessor()
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    transform = ImageTransform.from_image_processor(processor)
    # The default backend resizes tensors with torchvision, which is within one grey level of Pillow.
    torch.testing.assert_close(transform.evaluate(image), expected, atol=1.01 / 255 / 0.5, rtol=0)


def test_image_processor_round_trip(tmp_path) -> None:
    transform = ImageTransform(size=96, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")
    transform.to_image_processor().save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    assert ImageTransform.from_image_processor(processor) == transform
    image = photo(130, 100)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(transform.evaluate(image), expected, atol=1e-6, rtol=0)
    squash = ImageTransform(size=96, resize="squash")
    assert ImageTransform.from_image_processor(squash.to_image_processor()) == squash


@pytest.mark.parametrize(
    "options", [{"size": {"shortest_edge": 256}}, {"resample": 0}, {"do_center_crop": False}, {"do_normalize": False}]
)
def test_foreign_image_processors_are_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="not supported"):
        ImageTransform.from_image_processor(CLIPImageProcessorPil(**options))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(300, 200), (100, 80), (900, 700)])
def test_train_is_pillows_crop_and_resize_within_a_grey_level(size: tuple[int, int], interpolation: str) -> None:
    image = photo(*size)
    transform = ImageTransform(size=96, scale=(0.3, 1.0), interpolation=interpolation)
    left, top, width, height = random_box(*size, transform.scale, transform.ratio, np.random.default_rng(5))
    crop = image.crop((left, top, left + width, top + height))
    crop = crop.resize((96, 96), Image.Resampling[interpolation.upper()])
    expected = transform.evaluate(crop)
    pixel_values = transform.train(image, np.random.default_rng(5))
    torch.testing.assert_close(pixel_values, expected, atol=1.01 * GREY_LEVEL, rtol=0)
    assert (pixel_values != expected).float().mean() < 0.05


def test_output_layout() -> None:
    for pixel_values in (
        ImageTransform(size=32).train(photo(50, 40), np.random.default_rng(0)),
        ImageTransform(size=32).evaluate(photo(50, 40)),
        ImageTransform(size=32).evaluate(photo(32, 32)),
    ):
        assert pixel_values.shape == (3, 32, 32)
        assert pixel_values.dtype == torch.float32
        assert pixel_values.is_contiguous()


def test_randomness_comes_from_the_generator_alone() -> None:
    image, transform = photo(80, 60), ImageTransform(size=32, scale=(0.5, 1.0))
    first, again, other = (transform.train(image, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_scale_one_trains_on_what_evaluation_sees() -> None:
    image, transform = photo(80, 60), ImageTransform(size=32, scale=(1, 1))
    rng = np.random.default_rng(0)
    assert torch.equal(transform.train(image, rng), transform.evaluate(image))
    assert rng.random() == np.random.default_rng(0).random()


def test_random_boxes_are_drawn_as_torchvision_does() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    width, height, scale, ratio = 200, 180, (0.2, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    image = Image.new("RGB", (width, height))
    ours = np.array([random_box(width, height, scale, ratio, rng) for _ in range(4000)])
    theirs = np.array([transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)])
    theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= width).all() and (ours[:, 1] + ours[:, 3] <= height).all()
    areas = [
        np.quantile(boxes[:, 2:].prod(axis=1), (0, 0.05, 0.5, 0.95, 1)) / (width * height) for boxes in (ours, theirs)
    ]
    np.testing.assert_allclose(*areas, atol=0.03)
    # Standard error of a mean is about 0.6 pixels here.
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=2.5)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), atol=2.5)


@pytest.mark.parametrize("size", [(1000, 20), (20, 1000), (1, 1)])
def test_random_boxes_of_extreme_shapes(size: tuple[int, int]) -> None:
    left, top, width, height = random_box(*size, (0.9, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
    assert 0 <= left <= left + width <= size[0] and width > 0
    assert 0 <= top <= top + height <= size[1] and height > 0
    assert ImageTransform(size=16).train(Image.new("RGB", size), np.random.default_rng(0)).shape == (3, 16, 16)


def test_drafted_jpegs_train_on_nearly_the_same_pixels() -> None:
    """`min_edge` keeps two decoded pixels for each pixel of the output, so that the shortcut does not show."""
    transform = ImageTransform(size=64)
    for seed in range(5):
        data = encode(photo(800, 600, seed), "JPEG", quality=90)
        small, full = decode_image(data, min_edge=transform.min_edge), decode_image(data)
        assert min(small.size) >= transform.min_edge and small.width < full.width
        difference = (transform.evaluate(small) - transform.evaluate(full)).abs() / GREY_LEVEL
        assert difference.mean() < 1.0
        assert difference.max() < 6.0


def test_min_edge_covers_every_box() -> None:
    transform = ImageTransform(size=64, scale=(0.3, 1.0))
    rng = np.random.default_rng(0)
    for width, height in ((transform.min_edge, transform.min_edge), (transform.min_edge, 3 * transform.min_edge)):
        for _ in range(500):
            box = random_box(width, height, transform.scale, transform.ratio, rng)
            assert min(box[2:]) >= 2 * transform.size - 1
