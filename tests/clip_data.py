"""Small pictures with captions and made-up embeddings of them, for the tests of train-clip."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import scene_captions, tiny_tokenizer, write_captions
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llm2clip.caption_data import CaptionData
from llm2clip.embedding_store import shard_name, write_index, write_shard

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}


def write_scenes(directory: Path, num_images: int = 24, *, size: int = 32, seed: int = 0) -> Path:
    """Caption data with coarse random pictures, one raw and two long captions each; returns `directory`."""
    rng = np.random.default_rng(seed)
    rows = []
    (directory / "images").mkdir(parents=True)
    for row in scene_captions(num_images):
        name = f"images/{row['id']}.png"
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((size, size)).save(directory / name)
        rows.append({**row, "image": name})
    return write_captions(directory, rows)


def write_embeddings(directory: Path, data: Sequence[Path], *, dim: int = 12, teacher: str = "teacher-a") -> Path:
    """A complete directory as extract-embeddings leaves it, vectors made from the texts alone; returns `directory`."""
    directory.mkdir(parents=True)
    vectors: dict[str, int] = {}
    sources = []
    for number, path in enumerate(data):
        captions = CaptionData.open(path)
        rows = [vectors.setdefault(text, len(vectors)) for text in captions.texts.to_pylist()]
        kinds = np.array(captions.kind_names)[captions.kind_codes]
        ids = [sample.id for sample in captions]
        write_index(directory / f"index-{number}.parquet", ids, kinds, captions.offsets, np.array(rows))
        sources.append({"path": str(path), "fingerprint": captions.fingerprint, "index": f"index-{number}.parquet"})
    table = torch.stack([text_vector(text, dim) for text in vectors])
    write_shard(directory / shard_name(0), table, {"texts": "all"})
    manifest = {
        "stage": "extract-embeddings",
        "fingerprint": hashlib.sha256(table.numpy().tobytes()).hexdigest(),
        "dim": dim,
        "dtype": "float32",
        "normalized": False,
        "teacher_fingerprint": teacher,
        "num_rows": len(table),
        "rows_per_shard": len(table),
        "shards": [{"file": shard_name(0), "num_rows": len(table), "texts": "all"}],
        "data": sources,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def text_vector(text: str, dim: int) -> torch.Tensor:
    """(dim,) float32, a pure function of the text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))


def adapter_arguments(output_dir: Path, data: Path, embeddings: Path, **overrides: Any) -> list[str]:
    """Command line of a run with the adapter that takes a few seconds; `overrides` in dotted form, as a dict."""
    return arguments(
        {
            "output_dir": output_dir,
            "data.sources": [{"path": str(data)}],
            "embeddings": embeddings,
            "model.vision_config": VISION,
            "model.projection_dim": 8,
            "model.adapter_num_blocks": 1,
            **TRAINING,
            **overrides,
        }
    )


def clip_arguments(output_dir: Path, data: Path, tokenizer: Path, **overrides: Any) -> list[str]:
    """Command line of a vanilla CLIP run from scratch that takes a few seconds."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return arguments(
        {
            "output_dir": output_dir,
            "data.sources": [{"path": str(data)}],
            "model.text": "clip",
            "model.vision_config": VISION,
            "model.text_config": text,
            "model.tokenizer": tokenizer,
            "model.projection_dim": 8,
            **TRAINING,
            **overrides,
        }
    )


TRAINING = {
    "training.per_device_train_batch_size": 8,
    "training.max_steps": 6,
    "training.learning_rate": 1e-3,
    "training.logging_steps": 1,
    "training.save_steps": 2,
    "training.use_cpu": True,
}


def arguments(settings: dict[str, Any]) -> list[str]:
    """Dotted settings as a command line."""
    values = ((k, str(v) if isinstance(v, Path) else v) for k, v in settings.items())
    return [part for k, v in values for part in (f"--{k}", v if isinstance(v, str) else json.dumps(v))]


@contextmanager
def deepspeed_forgotten() -> Iterator[None]:
    """What training arguments with DeepSpeed leave behind in a process is undone at the end."""
    environment = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        unset_hf_deepspeed_config()


def write_clip_tokenizer(directory: Path) -> Path:
    """A tokenizer that ends every text with its end token, as CLIP's does; returns `directory`."""
    from tokenizers import processors

    tokenizer = tiny_tokenizer(chat_template=None)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(directory)
    return directory
