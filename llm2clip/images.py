"""Decode images and turn them into `pixel_values`.

`decode_image` makes one kind of picture (8-bit RGB, upright, on white) out of whatever the bytes hold, and says in
one ValueError what is wrong with bytes it cannot read. `ImageTransform` is the training and the evaluation transform
of CLIP towers, without torchvision.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile, UnidentifiedImageError

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor

# Mean and standard deviation of OpenAI's CLIP training images, RGB in [0, 1] (openai/CLIP, clip/clip.py `_transform`).
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)

# Pillow's own warning level (a quarter of a gigabyte of RGB); it refuses only at twice that.
MAX_PIXELS = 89_478_485

# Formats whose decoders run in-process: EPS, for one, would start Ghostscript on bytes from strangers.
Image.init()
_FORMATS = tuple(
    name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN
)
# What Pillow's decoders raise on damaged files (SyntaxError: PNG; RuntimeError: AVIF; TypeError: TIFF).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    EOFError,
    ValueError,
    IndexError,
    struct.error,
    zlib.error,
    OverflowError,
    RuntimeError,
    TypeError,
)

# What makes an image upright. ImageOps.exif_transpose also writes the EXIF anew, which fails on slightly broken ones.
_EXIF_ORIENTATION = 0x0112
_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(data: bytes, *, min_edge: int | None = None) -> Image.Image:
    """Decode an image to upright 8-bit RGB.

    EXIF rotation is applied, transparency is put on white, 16-bit grey is scaled (65535 -> 255), CMYK and palettes are
    converted, and of an animation the first frame is taken.

    Args:
        data: The whole file.
        min_edge: If given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shorter edge keeps at
            least this many pixels: much faster for big photos that are scaled down anyway.

    Raises:
        ValueError: The reason, as "<kind>: <detail>"; kinds are "zero-byte image", "unreadable image",
            "truncated image", "image too large" and "unsupported image".
    """
    if not data:
        raise ValueError("zero-byte image: the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{width}x{height} pixels")
        if min_edge is not None and min(image.size) >= 2 * min_edge:
            _draft(image, min_edge)
        with _whole_images_only():
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"image too large: {error}; at most {MAX_PIXELS} pixels are decoded") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"unreadable image: no known format, {len(data)} bytes starting {data[:8]!r}") from error
    except _DECODE_ERRORS as error:
        raise ValueError(f"truncated image: {error} ({len(data)} bytes)") from error
    return _to_rgb(_upright(image))


@contextmanager
def _whole_images_only() -> Iterator[None]:
    """Undo for a while what some libraries (lmms-eval) set for the whole process: grey in place of lost pixels."""
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _draft(image: Image.Image, min_edge: int) -> None:
    """Let libjpeg decode at a fraction (other formats ignore it); `draft` never goes below the size asked for."""
    ratio = min_edge / min(image.size)
    image.draft(None, (math.ceil(image.width * ratio), math.ceil(image.height * ratio)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    except _DECODE_ERRORS:
        return image  # broken metadata around good pixels: it says nothing about orientation
    turn = _EXIF_TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # I;16, I;16B, and I, which is what older Pillow makes of 16-bit PNGs
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("unsupported image: float pixels have no defined white; save it with 8 or 16 bits")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        layer = image.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"unsupported image: mode {image.mode}: {error}") from error
    background = Image.new("RGB", layer.size, (255, 255, 255))
    background.paste(layer, mask=layer.getchannel("A"))
    return background


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError(f"unsupported image: mode {image.mode} with values outside 0..65535; save it with 16 bits")
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")


@dataclass(frozen=True, kw_only=True)
class ImageTransform:
    """Images to `pixel_values`, for training and for evaluation.

    Evaluation is CLIP's: resize the shorter edge to `size`, cut out the middle, normalise; equal to transformers'
    `CLIPImageProcessor` (PIL backend). Training cuts a random box (torchvision's RandomResizedCrop; open_clip trains
    with `scale` 0.9-1.0) and resizes it. There is no flip: captions say left and right.
    """

    size: int
    """Height and width of the output in pixels."""
    scale: tuple[float, float] = (0.9, 1.0)
    """Range of the random box's share of the image area; (1, 1) trains on what evaluation sees."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the random box's width / height (torchvision's default)."""
    mean: tuple[float, ...] = OPENAI_MEAN
    """Mean of the RGB channels in [0, 1]."""
    std: tuple[float, ...] = OPENAI_STD
    """Standard deviation of the RGB channels."""
    resize: Literal["shortest_edge", "squash"] = "shortest_edge"
    """Evaluation: keep the aspect ratio and crop (CLIP), or stretch to a square (SigLIP)."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling filter."""

    def train(self, image: Image.Image, rng: np.random.Generator) -> torch.Tensor:
        """Cut a random box, resize and normalise.

        Args:
            image: RGB.
            rng: The only source of randomness; left alone when `scale` is (1, 1).

        Returns:
            (3, size, size) float32.
        """
        if tuple(self.scale) == (1.0, 1.0):
            return self.evaluate(image)
        left, top, width, height = random_box(image.width, image.height, self.scale, self.ratio, rng)
        pixels = _pixels(image.crop((left, top, left + width, top + height)))
        if (width, height) != (self.size, self.size):
            # As Pillow's within one grey level, and four times as fast.
            pixels = F.interpolate(pixels[None], (self.size, self.size), mode=self.interpolation, antialias=True)[0]
        return self._normalize(pixels)

    def evaluate(self, image: Image.Image) -> torch.Tensor:
        """Resize, centre-crop and normalise an RGB image to (3, size, size) float32."""
        if self.resize == "squash":
            return self._normalize(_pixels(self._resize(image, self.size, self.size)))
        short = min(image.size)
        image = self._resize(image, self.size * image.width // short, self.size * image.height // short)
        left, top = (image.width - self.size) // 2, (image.height - self.size) // 2
        if image.size != (self.size, self.size):
            image = image.crop((left, top, left + self.size, top + self.size))
        return self._normalize(_pixels(image))

    @property
    def min_edge(self) -> int:
        """What to pass to `decode_image` in training: every random box keeps twice the pixels that are needed."""
        smallest = self.scale[0] * min(self.ratio[0], 1 / self.ratio[1])
        return math.ceil(2 * self.size / math.sqrt(smallest))

    def _resize(self, image: Image.Image, width: int, height: int) -> Image.Image:
        if image.size == (width, height):
            return image
        return image.resize((width, height), Image.Resampling[self.interpolation.upper()])

    def _normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        factor, shift = self._factor_and_shift
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(factor).sub_(shift)

    @cached_property
    def _factor_and_shift(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = torch.tensor([self.mean, self.std], dtype=torch.float64).view(2, 3, 1, 1)
        return (1 / (255 * std)).float(), (mean / std).float()

    @classmethod
    def from_image_processor(
        cls, processor: CLIPImageProcessor, *, scale: tuple[float, float] = (0.9, 1.0)
    ) -> ImageTransform:
        """Take size, normalisation and resampling over from a transformers image processor (CLIP's or SigLIP's).

        Raises:
            ValueError: It does something that this transform does not.
        """
        config = processor.to_dict()
        size, crop = config["size"], config.get("crop_size")
        cropping = bool(config.get("do_center_crop"))
        edge = size.get("shortest_edge") if cropping else size.get("height")
        square = (crop or {}) if cropping else size
        filters: dict[int, Literal["bicubic", "bilinear"]] = {2: "bilinear", 3: "bicubic"}
        interpolation = filters.get(config["resample"])
        complete = all(config[step] for step in ("do_resize", "do_rescale", "do_normalize"))
        if edge is None or {square.get("height"), square.get("width")} != {edge} or not interpolation or not complete:
            raise ValueError(
                f"{type(processor).__name__} with size {size}, crop_size {crop}, do_center_crop {cropping}, resample "
                f"{config['resample']} is not supported; expected a shortest edge cropped to a square of that size "
                "(CLIP) or one square size (SigLIP), bilinear or bicubic, rescaled and normalised"
            )
        return cls(
            size=edge,
            scale=scale,
            mean=tuple(config["image_mean"]),
            std=tuple(config["image_std"]),
            resize="shortest_edge" if cropping else "squash",
            interpolation=interpolation,
        )

    def to_image_processor(self) -> CLIPImageProcessor:
        """The transformers image processor that does what `evaluate` does."""
        from transformers import CLIPImageProcessor

        square = {"height": self.size, "width": self.size}
        cropping = self.resize == "shortest_edge"
        return CLIPImageProcessor(
            size={"shortest_edge": self.size} if cropping else square,
            do_center_crop=cropping,
            crop_size=square,
            resample=Image.Resampling[self.interpolation.upper()],
            image_mean=list(self.mean),
            image_std=list(self.std),
        )


def _pixels(image: Image.Image) -> torch.Tensor:
    """(3, H, W) uint8, channels last in memory."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Draw a box as torchvision's RandomResizedCrop does.

    Returns:
        left, top, width, height in pixels. After ten boxes that did not fit: the largest central one of an allowed
        ratio.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(rng.integers(0, width - box_width + 1))
            return left, int(rng.integers(0, height - box_height + 1)), box_width, box_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width, box_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    return (width - box_width) // 2, (height - box_height) // 2, box_width, box_height
