"""Command `retrieval`: image-text retrieval of one model on every held-out pool, with the rank of every query.

Reads a CLIP directory (LLM2CLIPModel, or a stock CLIP or SigLIP model), caption data for each pool and, for an
LLM2CLIPModel, the embeddings of the pools' captions. Writes `results/<pool>__<kind>.json`, one per pool and caption
kind, each with per-query ranks, so that models can be compared query by query.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    import torch

    from llm2clip.caption_data import CaptionData

    EncodeTexts = Callable[[CaptionData, np.ndarray], tuple[torch.Tensor, int | None]]

logger = logging.getLogger(__name__)

RESULTS = "results"


@dataclass(kw_only=True)
class Pool:
    """One set of images that are searched together, with their captions."""

    data: Path
    """Caption data: a directory, JSONL, parquet or tar."""
    kinds: list[str] = field(default_factory=list)
    """Caption kinds to search with, each on its own; empty means all that the data has."""
    fields: dict[str, str] | None = None
    """Caption kind to field name, for data in a foreign layout."""


@dataclass(kw_only=True)
class RetrievalConfig(StageConfig):
    """Measure image-text retrieval of one model on every pool: R@1, R@5, R@10 both ways, and every query's rank."""

    arm: str
    """Name of the model in results and reports."""
    clip: str
    """Directory (or hub id) of the model: LLM2CLIPModel, or a stock CLIP or SigLIP model with its tokenizer."""
    pools: dict[str, Pool]
    """What to search, by name."""
    embeddings: Path | None = None
    """Directory of extract-embeddings that holds the pools' captions; needed for an LLM2CLIPModel, and only there."""
    split: str = "test"
    """Recorded in the results, so that numbers that chose a setting are not mistaken for numbers that test it."""
    seed: int = 0
    """Training seed of the model, recorded in the results; retrieval itself draws nothing."""
    batch_size: int = 128
    """Images or captions encoded at a time."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in this one, which is faster for a few thousand small images."""

    def __post_init__(self) -> None:
        problems = [] if self.pools else ["pools: at least one is needed"]
        names = [self.arm, *self.pools, *(kind for pool in self.pools.values() for kind in pool.kinds)]
        problems += [
            f"{name!r}: a name becomes part of a file name, so it cannot hold / or __"
            for name in names
            if ("/" in name or "__" in name)
        ]
        if self.batch_size < 1:
            problems.append(f"batch_size: {self.batch_size} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[RetrievalConfig]:
    """Read the configuration of a command line."""
    return parse_stage(RetrievalConfig, argv, prog="llm2clip-eval retrieval")


def inputs(call: StageCall[RetrievalConfig]) -> dict[str, str]:
    """Fingerprints of the model, the pools and the embeddings."""
    config = call.config
    found = {"clip": fingerprint(config.clip) if Path(config.clip).exists() else config.clip}
    found |= {f"pools.{name}": fingerprint(pool.data) for name, pool in config.pools.items()}
    if config.embeddings is not None:
        found["embeddings"] = fingerprint(config.embeddings)
    return found


def run(call: StageCall[RetrievalConfig]) -> None:
    """Encode and rank every pool; results that a killed run left are kept."""
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="retrieval", inputs=fingerprints) as run:
        if run.complete:
            logger.info("retrieval: %s is complete", run.path)
            return
        import torch
        from transformers import AutoImageProcessor

        from llm2clip.caption_data import CaptionData
        from llm2clip.images import ImageTransform

        (run.path / RESULTS).mkdir(exist_ok=True)
        model = load_model(config.clip).to("cuda" if torch.cuda.is_available() else "cpu")
        encode_texts = text_encoder(model, config)
        transform = ImageTransform.from_image_processor(AutoImageProcessor.from_pretrained(config.clip))
        recalls = {}
        for name, pool in config.pools.items():
            data = CaptionData.open(pool.data, pool.fields)
            kinds = pool.kinds or sorted(data.kind_names)
            if unknown := set(kinds) - set(data.kind_names):
                raise ValueError(f"pools.{name}: no captions of kind {sorted(unknown)}; {pool.data} has {data.kinds}")
            paths = {kind: run.path / RESULTS / f"{name}__{kind}.json" for kind in kinds}
            todo = [kind for kind in kinds if not paths[kind].is_file()]
            began = time.monotonic()
            images = encode_images(model, data, transform, config) if todo else None
            for kind in todo:
                assert images is not None
                facts = {
                    "arm": config.arm,
                    "pool": name,
                    "kind": kind,
                    "split": config.split,
                    "seed": config.seed,
                    "data": str(pool.data),
                    "fields": pool.fields,
                    "clip_fingerprint": fingerprints["clip"],
                }
                atomic_write(paths[kind], json.dumps(facts | rank_kind(images, data, kind, encode_texts)) + "\n")
            recalls[name] = {kind: json.loads(path.read_text())["recall"] for kind, path in paths.items()}
            means = ", ".join(f"{kind} {recall['mean']['R@1']:.1f}" for kind, recall in recalls[name].items())
            rate = len(data) / (time.monotonic() - began)
            logger.info("%s, R@1 (mean of both ways) on %s: %s  [%.0f images/s]", config.arm, name, means, rate)
        run.finish(outputs=[RESULTS], arm=config.arm, clip_fingerprint=fingerprints["clip"], recall=recalls)


def load_model(clip: str) -> Any:
    """Load an LLM2CLIPModel or a stock CLIP or SigLIP model, in float32.

    Raises:
        ValueError: if it is none of them.
    """
    from transformers import AutoModel

    import llm2clip.modeling_clip  # noqa: F401  # registers LLM2CLIPModel with AutoModel

    model = AutoModel.from_pretrained(clip, dtype="float32")
    if model.config.model_type not in ("llm2clip", "clip", "siglip"):
        raise ValueError(
            f"{clip} is a {model.config.model_type}, which has no features to compare captions with; expected a "
            "directory of train-clip, or a CLIP or SigLIP model"
        )
    return model.eval()


def rank_kind(images: torch.Tensor, data: CaptionData, kind: str, encode_texts: EncodeTexts) -> dict[str, Any]:
    """Rank the captions of one kind against the images that have one.

    Args:
        images: (rows, dim) features of all images of the data.
        data: the pool.
        kind: caption kind; images without such a caption are left out and counted.
        encode_texts: captions to features.
    """
    import torch

    from llm2clip.metrics import recall_at_k, retrieval_ranks

    captions = np.flatnonzero(data.kind_codes == data.kind_names.index(kind))
    rows = np.searchsorted(data.offsets, captions, side="right") - 1  # (num_captions,) row of each caption
    used, caption_image = np.unique(rows, return_inverse=True)
    texts, num_truncated = encode_texts(data, captions)
    ranks = retrieval_ranks(images[torch.from_numpy(used)], texts, torch.from_numpy(caption_image))
    recall = {"i2t": recall_at_k(ranks.i2t_ranks), "t2i": recall_at_k(ranks.t2i_ranks)}
    recall["mean"] = {k: (recall["i2t"][k] + recall["t2i"][k]) / 2 for k in recall["i2t"]}
    return {
        "data_fingerprint": data.fingerprint,
        "num_images": len(used),
        "num_captions": len(captions),
        "num_distinct_captions": len(data.texts.take(captions).unique()),
        "num_truncated_captions": num_truncated,
        "num_images_without_caption": len(data) - len(used),
        "recall": recall,
        "image_ids": data.ids.take(used).to_pylist(),
        "caption_image": caption_image.tolist(),
        "i2t_ranks": ranks.i2t_ranks.tolist(),
        "t2i_ranks": ranks.t2i_ranks.tolist(),
        "top5": {"t2i": ranks.t2i_top.tolist()},
    }


def encode_images(model: Any, data: CaptionData, transform: Any, config: RetrievalConfig) -> torch.Tensor:
    """Features of every image of a pool, (rows, dim), L2-normalised, on the CPU."""
    import torch
    from torch.utils.data import DataLoader

    loader = DataLoader(
        _PoolImages(data, transform),  # type: ignore[arg-type]
        batch_size=config.batch_size,
        num_workers=config.num_workers,
    )
    features = []
    with torch.inference_mode():
        for pixel_values in loader:
            found = model.get_image_features(pixel_values=pixel_values.to(model.device))
            pooled = found if isinstance(found, torch.Tensor) else found.pooler_output
            features.append(torch.nn.functional.normalize(pooled, dim=-1).cpu())
    return torch.cat(features)


class _PoolImages:
    """What a DataLoader needs of a pool."""

    def __init__(self, data: CaptionData, transform: Any) -> None:
        self.data = data
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform.evaluate(self.data.load_image(index))


def text_encoder(model: Any, config: RetrievalConfig) -> EncodeTexts:
    """How this model's captions become features: from an embedding store, or by its own text tower.

    Returns:
        A function of the pool and the indices of n captions, giving (n, dim) L2-normalised features on the CPU and how
        many captions were longer than the text tower reads (None where that is not known here).

    Raises:
        ValueError: if the embeddings are missing, of another teacher, or given to a model that does not use them.
    """
    if model.config.model_type != "llm2clip":
        if config.embeddings is not None:
            raise ValueError(
                f"embeddings: {config.clip} reads captions itself; leave embeddings out for arm {config.arm}"
            )
        return _own_text_tower(model, config)
    if config.embeddings is None:
        raise ValueError(
            f"embeddings: {config.clip} was trained on an LLM's caption embeddings; give the directory of "
            "extract-embeddings that holds those of the pools"
        )
    return _stored_embeddings(model, config.embeddings, config)


def _stored_embeddings(model: Any, embeddings: Path, config: RetrievalConfig) -> EncodeTexts:
    import torch

    from llm2clip.embedding_store import EmbeddingStore

    store = EmbeddingStore(embeddings)
    store.require(
        needed_by=config.clip,
        teacher_fingerprint=model.config.teacher_fingerprint,
        dim=model.config.caption_embedding_dim,
    )

    def encode(data: CaptionData, captions: np.ndarray) -> tuple[torch.Tensor, None]:
        rows = store.rows(data).rows[captions]
        features = []
        with torch.inference_mode():
            for start in range(0, len(rows), config.batch_size):
                vectors = store.gather(rows[start : start + config.batch_size]).to(model.device)
                features.append(model.get_text_features(vectors).cpu())
        return torch.cat(features), None

    return encode


def _own_text_tower(model: Any, config: RetrievalConfig) -> EncodeTexts:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.clip)
    length = model.config.text_config.max_position_embeddings
    # SigLIP was trained with every caption padded to full length, and reads the last position.
    padding = "max_length" if model.config.model_type == "siglip" else True

    def encode(data: CaptionData, captions: np.ndarray) -> tuple[torch.Tensor, int]:
        input_ids = tokenizer(data.texts.take(captions).to_pylist(), verbose=False)["input_ids"]
        lengths = np.array([len(ids) for ids in input_ids])
        shortest_first = np.argsort(lengths, kind="stable")  # else each batch is padded to its longest caption
        features = []
        with torch.inference_mode():
            for start in range(0, len(captions), config.batch_size):
                rows = shortest_first[start : start + config.batch_size]
                texts = data.texts.take(captions[rows]).to_pylist()
                batch = tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
                pooled = model.get_text_features(**batch.to(model.device)).pooler_output
                features.append(torch.nn.functional.normalize(pooled, dim=-1).cpu())
        return torch.cat(features)[torch.from_numpy(np.argsort(shortest_first))], int((lengths > length).sum())

    return encode


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval retrieval`."""
    run(parse(argv))
