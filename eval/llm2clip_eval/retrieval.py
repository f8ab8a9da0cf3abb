"""Command `retrieval`: image-text retrieval of one model on every held-out pool, with the rank of every query.

Reads a CLIP directory (LLM2CLIPModel, or a stock CLIP or SigLIP model), caption data for each pool and, for an
LLM2CLIPModel, the embeddings of the pools' captions, or the teacher that makes them. Writes
`results/<pool>__<kind>.json`, one per pool and caption kind, each with per-query ranks, so that models can be compared
query by query.
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
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, model_fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    import torch

    from llm2clip.caption_data import CaptionData
    from llm2clip_eval.dual_encoder import DualEncoder

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
    """Directory of extract-embeddings that holds the pools' captions; for an LLM2CLIPModel, and only there."""
    teacher: Path | None = None
    """Instead of embeddings: the LLM2CLIPModel's teacher, which embeds the captions here."""
    ks: list[int] = field(default_factory=lambda: [1, 5, 10])
    """R@k is reported for these; the 1:1 sets of long captions are reported at 1, 5, 10, 25 and 50."""
    split: str = "test"
    """Recorded in the results, so that numbers that chose a setting are not mistaken for numbers that test it."""
    seed: int = 0
    """Training seed of the model, recorded in the results; retrieval itself draws nothing."""
    batch_size: int = 128
    """Images or captions encoded at a time."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in this one, which is faster for a few thousand small images."""
    feature_cache: Path | None = None
    """Folder where image features are kept by the content of model and images; default none are kept."""

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
        if not {1} <= set(self.ks) or min(self.ks) < 1:
            problems.append(f"ks: {self.ks}, expected positive numbers with 1 among them")
        if self.embeddings is not None and self.teacher is not None:
            problems.append("embeddings, teacher: give one of the two")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[RetrievalConfig]:
    """Read the configuration of a command line."""
    return parse_stage(RetrievalConfig, argv, prog="llm2clip-eval retrieval")


def inputs(call: StageCall[RetrievalConfig]) -> dict[str, str]:
    """Fingerprints of the model, the pools and the embeddings or the teacher."""
    config = call.config
    found = {"clip": model_fingerprint(config.clip)}
    found |= {f"pools.{name}": fingerprint(pool.data) for name, pool in config.pools.items()}
    if config.embeddings is not None:
        found["embeddings"] = fingerprint(config.embeddings)
    if config.teacher is not None:
        found["teacher"] = fingerprint(config.teacher)
    return found


def run(call: StageCall[RetrievalConfig]) -> None:
    """Encode and rank every pool; results that a killed run left are kept."""
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="retrieval", inputs=fingerprints) as run:
        if run.complete:
            logger.info("retrieval: %s is complete", run.path)
            return
        from llm2clip.caption_data import CaptionData
        from llm2clip_eval.dual_encoder import DualEncoder

        (run.path / RESULTS).mkdir(exist_ok=True)
        encoder = DualEncoder(config.clip, teacher=config.teacher, batch_size=config.batch_size)
        encode_texts = text_encoder(encoder, config)
        recalls = {}
        for name, pool in config.pools.items():
            data = CaptionData.open(pool.data, pool.fields)
            kinds = pool.kinds or sorted(data.kind_names)
            if unknown := set(kinds) - set(data.kind_names):
                raise ValueError(f"pools.{name}: no captions of kind {sorted(unknown)}; {pool.data} has {data.kinds}")
            paths = {kind: run.path / RESULTS / f"{name}__{kind}.json" for kind in kinds}
            todo = [kind for kind in kinds if not paths[kind].is_file()]
            began = time.monotonic()
            images = encode_images(encoder, data, config) if todo else None
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
                atomic_write(
                    paths[kind], json.dumps(facts | rank_kind(images, data, kind, encode_texts, config.ks)) + "\n"
                )
            recalls[name] = {kind: json.loads(path.read_text())["recall"] for kind, path in paths.items()}
            means = ", ".join(f"{kind} {recall['mean']['R@1']:.1f}" for kind, recall in recalls[name].items())
            rate = len(data) / (time.monotonic() - began)
            logger.info("%s, R@1 (mean of both ways) on %s: %s  [%.0f images/s]", config.arm, name, means, rate)
        run.finish(outputs=[RESULTS], arm=config.arm, clip_fingerprint=fingerprints["clip"], recall=recalls)


def rank_kind(
    images: torch.Tensor, data: CaptionData, kind: str, encode_texts: EncodeTexts, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Any]:
    """Rank the captions of one kind against the images that have one.

    Args:
        images: (rows, dim) features of all images of the data.
        data: the pool.
        kind: caption kind; images without such a caption are left out and counted.
        encode_texts: captions to features.
        ks: for which R@k is reported.
    """
    import torch

    from llm2clip.metrics import recall_at_k, retrieval_ranks

    captions = np.flatnonzero(data.kind_codes == data.kind_names.index(kind))
    rows = np.searchsorted(data.offsets, captions, side="right") - 1  # (num_captions,) row of each caption
    used, caption_image = np.unique(rows, return_inverse=True)
    texts, num_truncated = encode_texts(data, captions)
    ranks = retrieval_ranks(images[torch.from_numpy(used)], texts, torch.from_numpy(caption_image))
    recall = {"i2t": recall_at_k(ranks.i2t_ranks, ks), "t2i": recall_at_k(ranks.t2i_ranks, ks)}
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


def encode_images(encoder: DualEncoder, data: CaptionData, config: RetrievalConfig) -> torch.Tensor:
    """Features of every image of a pool, (rows, dim), L2-normalised, on the CPU."""
    from llm2clip_eval.feature_cache import projected_features

    return projected_features(
        encoder, data, batch_size=config.batch_size, num_workers=config.num_workers, cache=config.feature_cache
    )


def text_encoder(encoder: DualEncoder, config: RetrievalConfig) -> EncodeTexts:
    """How this model's captions become features: from an embedding store, through its teacher, or by its text tower.

    Returns:
        A function of the pool and the indices of n captions, giving (n, dim) L2-normalised features on the CPU and how
        many captions were longer than the text tower reads (None where that is not known here).

    Raises:
        ValueError: if the embeddings are missing, of another teacher, or given to a model that does not use them.
    """
    if encoder.reads_captions and config.embeddings is not None:
        raise ValueError(f"embeddings: {config.clip} reads captions itself; leave embeddings out for arm {config.arm}")
    if config.embeddings is not None:
        return _stored_embeddings(encoder, config.embeddings)
    if not encoder.reads_captions and config.teacher is None:
        raise ValueError(
            f"embeddings: {config.clip} was trained on an LLM's caption embeddings; give the directory of "
            "extract-embeddings that holds those of the pools, or its teacher"
        )

    def encode(data: CaptionData, captions: np.ndarray) -> tuple[torch.Tensor, int | None]:
        features, num_truncated = encoder.encode_captions(data.texts.take(captions).to_pylist())
        return features.cpu(), num_truncated

    return encode


def _stored_embeddings(encoder: DualEncoder, embeddings: Path) -> EncodeTexts:
    import torch

    from llm2clip.embedding_store import EmbeddingStore

    store = EmbeddingStore(embeddings)
    store.require(
        needed_by=encoder.clip,
        teacher_fingerprint=encoder.model.config.teacher_fingerprint,
        dim=encoder.model.config.caption_embedding_dim,
    )

    def encode(data: CaptionData, captions: np.ndarray) -> tuple[torch.Tensor, None]:
        rows = store.rows(data).rows[captions]
        starts = range(0, len(rows), encoder.batch_size)
        batches = (store.gather(rows[start : start + encoder.batch_size]) for start in starts)
        return torch.cat([encoder.adapt(vectors).cpu() for vectors in batches]), None

    return encode


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval retrieval`."""
    run(parse(argv))
