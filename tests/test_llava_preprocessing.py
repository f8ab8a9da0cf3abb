"""Images of LLaVA: its own padding bit by bit, or the tower's own preprocessing."""

from __future__ import annotations

import numpy as np
import pytest
import transformers
from PIL import Image
from tiny_llava import tower_processor

from llava_bridge.export_files import image_processor_for


def llava_pixels(image: Image.Image, size: int, mean: list[float], std: list[float], resample: int) -> np.ndarray:
    """LLaVA's preprocessing: `expand2square` with the mean colour, then CLIPImageProcessor's steps in its order."""
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    pixels = np.array(square.resize((size, size), resample=resample))  # the crop takes all of a square
    scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
    normalized = (scaled - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    return normalized.transpose(2, 0, 1)


SIZES = [(28, 28), (30, 41), (41, 30), (1, 50), (50, 1), (3, 50), (50, 3), (1, 1), (3, 3), (2, 3), (4, 1), (500, 333)]


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_padding_is_llavas_bit_by_bit(kind):
    rng = np.random.default_rng(0)
    processor = tower_processor(kind)
    settings = processor.to_dict()
    mean, std = list(settings["image_mean"]), list(settings["image_std"])
    sizes = SIZES + [(int(width), int(height)) for width, height in rng.integers(1, 120, (40, 2))]
    for width, height in sizes:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        found = image_processor_for(processor, "pad")(images=image, return_tensors="np")["pixel_values"][0]
        np.testing.assert_array_equal(found, llava_pixels(image, 32, mean, std, settings["resample"]))


@pytest.mark.parametrize(("width", "left", "right"), [(4, 2, 2), (5, 1, 2), (7, 0, 1)])
def test_of_an_odd_difference_the_larger_half_is_behind(width, left, right):
    """Counted in columns of the padded image, an 8 x 8 square that is not resized."""
    settings = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    white = Image.new("RGB", (width, 8), (255, 255, 255))
    pixels = image_processor_for(transformers.CLIPImageProcessor(**settings), "pad")(images=white)["pixel_values"][0]
    bright = [bool(column > 1) for column in np.asarray(pixels)[0, 0]]
    assert bright == [False] * left + [True] * width + [False] * right


@pytest.mark.parametrize("kind", ["clip", "siglip", "vit"])
def test_square_is_the_towers_own_preprocessing(kind):
    own = tower_processor(kind)
    pil = getattr(transformers, f"{type(own).__name__.removesuffix('Pil')}Pil")(**own.to_dict())
    processor = image_processor_for(own, "square")
    assert processor.crop_size["height"] == processor.crop_size["width"] == 32  # LlavaProcessor counts tokens by it
    rng = np.random.default_rng(0)
    for width, height in [(40, 50), (90, 33), (31, 70), (32, 32), (7, 5)]:
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        expected = pil(images=image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(processor(images=image, return_tensors="np")["pixel_values"], expected)


def test_the_preprocessing_follows_the_towers_image_size():
    square = {"height": 224, "width": 224}
    dino = transformers.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=square)
    image = Image.new("RGB", (600, 300))
    for aspect, edge in (("square", 592), ("pad", 518)):
        processor = image_processor_for(dino, aspect, image_size=518)
        assert processor.size["shortest_edge"] == edge
        assert processor(images=image, return_tensors="np")["pixel_values"].shape == (1, 3, 518, 518)
    assert image_processor_for(dino, "square").size["shortest_edge"] == 256


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 32, "width": 48}, "do_center_crop": False},
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 48}},
        {"size": {"shortest_edge": 32}, "do_center_crop": False},
        {"do_normalize": False},
        {"do_resize": False},
    ],
)
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_other_preprocessing_is_bad_input(settings, aspect):
    with pytest.raises(ValueError, match="cannot be used; expected one that resizes, makes squares of one size"):
        image_processor_for(transformers.CLIPImageProcessor(**settings), aspect)
