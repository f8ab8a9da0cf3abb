"""Image and text towers behind one pair of calls, `encode_image` and `encode_text`, for any model of the comparison.

`DualEncoder` reads a CLIP directory: LLM2CLIPModel together with the teacher it was trained on, which embeds captions
as they come, or a stock CLIP or SigLIP model, which reads captions itself. It is what the stages before LLaVA use, and
what outside tooling may call:

    encoder = DualEncoder("runs/demo/clip-llm2clip/seed-0", teacher="runs/demo/teacher")
    encoder.encode_image(pictures) @ encoder.encode_text(["a red cat"]).T       # cosines
    model, transform, tokenizer = encoder, encoder.transform, encoder.tokenizer  # CLIP_benchmark, open_clip
    encoder.encode(["a red cat"])                                                # sentence-transformers: numpy arrays
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoTokenizer

from llm2clip.clip_init import load_model
from llm2clip.images import ImageTransform
from llm2clip.run_dir import fingerprint
from llm2clip.teacher import CaptionEncoder, encode_texts

MODEL_TYPES = ("llm2clip", "clip", "siglip")
TOKENS_PER_TEXT = 64
"""Padded tokens that a teacher's batch has room for, for each caption of `batch_size`."""


class Texts(list[str]):
    """What `DualEncoder.tokenizer` returns: the texts themselves, for tooling that moves tokens to a device."""

    def to(self, *_: Any, **__: Any) -> Texts:
        """Return itself; texts are tokenised when they are encoded."""
        return self


class DualEncoder(nn.Module):
    """A model of the comparison with its image transform and whatever reads its captions.

    Args:
        clip: directory (or hub id) of an LLM2CLIPModel, or of a stock CLIP or SigLIP model with its tokenizer.
        teacher: directory of the teacher whose embeddings an LLM2CLIPModel was trained on; None for stock models, and
            for an LLM2CLIPModel of which only images, or stored embeddings, are encoded.
        batch_size: images or texts in one forward pass.
        device: default a GPU if there is one.

    Attributes:
        model: the CLIP model, in float32.
        transform: the evaluation transform of its images; callable, (H, W) RGB image -> (3, size, size).

    Raises:
        ValueError: if `clip` has no features to compare captions with, or the teacher is another one than it was
            trained on, or is given to a model that reads captions itself.
    """

    def __init__(
        self,
        clip: str | Path,
        *,
        teacher: str | Path | None = None,
        batch_size: int = 128,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        self.clip = str(clip)
        self.batch_size = batch_size
        self.model: Any = load_clip(self.clip)
        self.image_transform = ImageTransform.from_image_processor(AutoImageProcessor.from_pretrained(self.clip))
        self.teacher: CaptionEncoder | None = None
        self._tokenizer: Any = None
        if self.reads_captions:
            if teacher is not None:
                raise ValueError(f"teacher: {clip} reads captions itself; leave teacher out")
            self._tokenizer = AutoTokenizer.from_pretrained(self.clip)
        elif teacher is not None:
            self.teacher = CaptionEncoder.from_pretrained(teacher)
            check_teacher(self.model, self.clip, teacher)
        self.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.eval()

    @property
    def reads_captions(self) -> bool:
        """Whether the model has a text tower of its own."""
        return self.model.config.model_type != "llm2clip"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def transform(self) -> Callable[[Image.Image], torch.Tensor]:
        """Image to (3, size, size), as `encode_image` wants it; images of other modes than RGB are converted."""
        return lambda image: self.image_transform.evaluate(image.convert("RGB"))

    @property
    def tokenizer(self) -> Callable[[str | Sequence[str]], Texts]:
        """For tooling that tokenises first: gives what `encode_text` takes."""
        return lambda texts: Texts([texts] if isinstance(texts, str) else texts)

    @torch.inference_mode()
    def encode_image(self, images: Sequence[Image.Image] | torch.Tensor, normalize: bool = True) -> torch.Tensor:
        """Encode images.

        Args:
            images: pictures, or (batch, 3, height, width) as `transform` gives them.
            normalize: accepted for open_clip's callers; features of an LLM2CLIPModel have no other form.

        Returns:
            (batch, dim), L2-normalised, on the model's device.
        """
        features = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            if not isinstance(batch, torch.Tensor):
                batch = torch.stack([self.transform(image) for image in batch])
            found = self.model.get_image_features(pixel_values=batch.to(self.device, torch.float32))
            pooled = found if isinstance(found, torch.Tensor) else found.pooler_output
            features.append(F.normalize(pooled, dim=-1))
        return torch.cat(features)

    def encode_text(self, texts: str | Sequence[str], normalize: bool = True) -> torch.Tensor:
        """Encode texts; `normalize` as in `encode_image`.

        Returns:
            (texts, dim), L2-normalised, on the model's device.

        Raises:
            ValueError: if an LLM2CLIPModel was loaded without its teacher.
        """
        return self.encode_captions([texts] if isinstance(texts, str) else texts)[0]

    def encode_captions(self, texts: Sequence[str]) -> tuple[torch.Tensor, int | None]:
        """`encode_text`, and how many of the texts were longer than the text tower reads (None for a teacher)."""
        if self.reads_captions:
            return self._read(list(texts))
        if self.teacher is None:
            raise ValueError(
                f"{self.clip} was trained on an LLM's caption embeddings and reads no text itself; give the directory "
                "of its teacher (teacher), or for retrieval those of extract-embeddings (embeddings)"
            )
        return self.adapt(encode_texts(self.teacher, texts, self.batch_size * TOKENS_PER_TEXT)), None

    @torch.inference_mode()
    def adapt(self, caption_embeddings: torch.Tensor) -> torch.Tensor:
        """Features of an LLMs' caption embeddings: (texts, caption_embedding_dim) -> (texts, dim), normalised."""
        batches = caption_embeddings.split(self.batch_size)
        return torch.cat([self.model.get_text_features(batch.to(self.device)) for batch in batches])

    @torch.inference_mode()
    def _read(self, texts: list[str]) -> tuple[torch.Tensor, int]:
        """Encode with the model's own text tower."""
        text_config = self.model.config.text_config
        length = text_config.max_position_embeddings
        # SigLIP was trained with every caption padded to full length, and reads the last position.
        padding = "max_length" if self.model.config.model_type == "siglip" else True
        lengths = np.array([len(ids) for ids in self._tokenizer(texts, verbose=False)["input_ids"]])
        shortest_first = np.argsort(lengths, kind="stable")  # else each batch is padded to its longest caption
        features = []
        for start in range(0, len(texts), self.batch_size):
            rows = shortest_first[start : start + self.batch_size]
            batch = self._tokenizer(
                [texts[row] for row in rows],
                padding=padding,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            )
            pooled = self.model.get_text_features(**batch.to(self.device)).pooler_output
            features.append(F.normalize(pooled, dim=-1))
        order = torch.from_numpy(np.argsort(shortest_first)).to(self.device)
        return torch.cat(features)[order], int((lengths > length).sum())

    @overload
    def encode(self, inputs: str | Image.Image, **_: Any) -> np.ndarray: ...
    @overload
    def encode(self, inputs: Sequence[str] | Sequence[Image.Image], **_: Any) -> np.ndarray: ...
    def encode(self, inputs: Any, *, convert_to_tensor: bool = False, **_: Any) -> np.ndarray | torch.Tensor:
        """Encode texts or images as `SentenceTransformer.encode` does.

        Args:
            inputs: one text or image, or a list of one of the two.
            convert_to_tensor: return a tensor on the model's device.

        Returns:
            (inputs, dim) float32, L2-normalised, without the first axis for a single input. Further arguments of
            sentence-transformers (batch_size, show_progress_bar, normalize_embeddings) change nothing.
        """
        single = isinstance(inputs, str | Image.Image)
        items: Any = [inputs] if single else list(inputs)
        features = self.encode_text(items) if isinstance(items[0], str) else self.encode_image(items)
        features = features[0] if single else features
        return features if convert_to_tensor else features.cpu().numpy()


def load_clip(clip: str) -> Any:
    """Load an LLM2CLIPModel or a stock CLIP or SigLIP model, in float32.

    Raises:
        ValueError: if it is none of them, or tensors are missing.
    """
    model = load_model(clip)
    if model.config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"{clip} is a {model.config.model_type}, which has no features to compare captions with; expected a "
            "directory of train-clip, or a CLIP or SigLIP model"
        )
    return model.eval()


def check_teacher(model: Any, clip: str, teacher: str | Path) -> None:
    """Refuse a teacher that an LLM2CLIPModel was not trained on.

    Raises:
        ValueError: naming both fingerprints.
    """
    expected, found = model.config.teacher_fingerprint, fingerprint(teacher)
    if expected is not None and found != expected:
        raise ValueError(
            f"teacher: {clip} was trained on teacher {expected[:12]}, but {teacher} is {found[:12]}; give the teacher "
            "that its embeddings were extracted with"
        )


class Images(Protocol):
    """Images by number, such as `CaptionData`."""

    def __len__(self) -> int: ...

    def image_bytes(self, index: int) -> bytes:
        """The undecoded file."""
        ...

    def load_image(self, index: int) -> Image.Image:
        """The decoded image, RGB; raises ValueError naming it if it cannot be read."""
        ...


def encode_dataset(
    images: Images,
    transform: ImageTransform,
    encode: Callable[[torch.Tensor], torch.Tensor],
    *,
    batch_size: int,
    num_workers: int = 0,
) -> torch.Tensor:
    """Features of every image, on the CPU.

    Args:
        images: what to encode.
        transform: its evaluation transform is used.
        encode: (batch, 3, size, size) -> (batch, dim).
        batch_size: images in one call of `encode`.
        num_workers: processes that decode images; 0 decodes in this one.

    Returns:
        (images, dim) float32.

    Raises:
        ValueError: if an image cannot be read; names it.
    """
    loader = DataLoader(
        _Transformed(images, transform),  # type: ignore[arg-type]
        batch_size=batch_size,
        num_workers=num_workers,
    )
    with torch.inference_mode():
        return torch.cat([encode(pixel_values).float().cpu() for pixel_values in loader])


class _Transformed:
    """What a DataLoader needs of a set of images."""

    def __init__(self, images: Images, transform: ImageTransform) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform.evaluate(self.images.load_image(index))
