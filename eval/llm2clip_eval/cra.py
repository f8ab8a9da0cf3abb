"""Command `cra`: caption retrieval accuracy of a teacher, or of an LLM as it comes, with the rank of every query.

Do two captions of an image find each other among those of other images (LLM2CLIP, section 3.1; the rule is that of
`llm2clip.caption_retrieval`)? Reads a teacher directory or any decoder LLM, and caption data; writes
`results/<pool>.json` with both accuracies and per-query ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, model_fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from typing import Any

    import torch

    from llm2clip.teacher import CaptionEncoder

logger = logging.getLogger(__name__)

RESULTS = "results"
CHUNK = 1024
"""Queries compared at a time."""


@dataclass(kw_only=True)
class CaptionPool:
    """Images whose captions are searched together."""

    data: Path
    """Caption data: a directory, JSONL, parquet or tar; images are not read."""
    query: str
    """Kind of the captions that search."""
    positive: str
    """Kind of the captions that are to be found; may be the same kind, then another caption of it."""
    fields: dict[str, str] | None = None
    """Caption kind to field name, for data in a foreign layout."""


@dataclass(kw_only=True)
class CraConfig(StageConfig):
    """Measure how well a teacher finds one caption of an image by another: top-1 both ways, and every query's rank."""

    arm: str
    """Name of the teacher in results and reports."""
    pools: dict[str, CaptionPool]
    """What to search, by name."""
    teacher: str | None = None
    """Teacher directory (or hub id of one)."""
    llm: str | None = None
    """Instead of a teacher: directory or hub id of any decoder LLM, taken as it is."""
    num_hidden_layers: int | None = None
    """Of the LLM: keep only that many of its lowest layers; default all."""
    bidirectional: bool = True
    """Of the LLM: let every token see every other one; false is the causal LLM."""
    pooling: Literal["mean", "last", "weighted_mean"] = "mean"
    """Of the LLM: over the caption's tokens."""
    max_length: int = 512
    """Of the LLM: tokens; longer captions are cut."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of weights and activations; auto takes what the weights are stored in."""
    batch_tokens: int = 4096
    """Tokens, padding included, in one forward pass; on CPUs about 512 is fastest."""
    seed: int = 0
    """Training seed of the teacher, recorded in the results; nothing is drawn here."""

    def __post_init__(self) -> None:
        problems = [] if self.pools else ["pools: at least one is needed"]
        problems += [f"pools: {name!r} becomes a file name, so it cannot hold /" for name in self.pools if "/" in name]
        if (self.teacher is None) == (self.llm is None):
            problems.append("teacher, llm: give one of the two")
        changed = self.num_hidden_layers is not None or not self.bidirectional or self.pooling != "mean"
        if self.teacher is not None and (changed or self.max_length != 512):
            problems.append(
                "num_hidden_layers, bidirectional, pooling, max_length: a teacher says these itself; they go with llm"
            )
        if self.batch_tokens < 1:
            problems.append(f"batch_tokens: {self.batch_tokens} is not positive")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[CraConfig]:
    """Read the configuration of a command line."""
    return parse_stage(CraConfig, argv, prog="llm2clip-eval cra")


def inputs(call: StageCall[CraConfig]) -> dict[str, str]:
    """Fingerprints of the model and of every pool's captions."""
    from llm2clip.caption_data import CaptionData

    config = call.config
    found = {"model": model_fingerprint(str(config.teacher or config.llm))}
    return found | {
        f"pools.{label}": CaptionData.open(pool.data, pool.fields).fingerprint for label, pool in config.pools.items()
    }


def run(call: StageCall[CraConfig]) -> None:
    """Measure every pool; results that a killed run left are kept."""
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="cra", inputs=fingerprints) as run:
        if run.complete:
            logger.info("cra: %s is complete", run.path)
            return
        from llm2clip.caption_data import CaptionData
        from llm2clip.caption_retrieval import caption_pool

        (run.path / RESULTS).mkdir(exist_ok=True)
        encoder = load_encoder(config)
        accuracy = {}
        for name, pool in config.pools.items():
            path = run.path / RESULTS / f"{name}.json"
            if not path.is_file():
                data = CaptionData.open(pool.data, pool.fields)
                texts = caption_pool(data, pool.query, pool.positive)
                facts = {
                    "arm": config.arm,
                    "pool": name,
                    "query": pool.query,
                    "positive": pool.positive,
                    "seed": config.seed,
                    "data": str(pool.data),
                    "data_fingerprint": data.fingerprint,
                    "model_fingerprint": fingerprints["model"],
                }
                atomic_write(path, json.dumps(facts | rank_captions(encoder, *texts, config.batch_tokens)) + "\n")
            accuracy[name] = json.loads(path.read_text(encoding="utf-8"))["accuracy"]
            logger.info(
                "%s on %s: %s", config.arm, name, {key: round(value, 2) for key, value in accuracy[name].items()}
            )
        run.finish(outputs=[RESULTS], arm=config.arm, model_fingerprint=fingerprints["model"], accuracy=accuracy)


def load_encoder(config: CraConfig) -> CaptionEncoder:
    """The teacher, or the LLM as an untuned one, on a GPU if there is one."""
    import torch

    from llm2clip.llm import load_llm_config
    from llm2clip.teacher import CaptionEncoder, TeacherSpec

    if config.teacher is not None:
        encoder = CaptionEncoder.from_pretrained(config.teacher, dtype=config.dtype)
    else:
        assert config.llm is not None
        spec = TeacherSpec(
            base_model=config.llm,
            num_hidden_layers=load_llm_config(config.llm, config.num_hidden_layers).num_hidden_layers,
            bidirectional=config.bidirectional,
            pooling=config.pooling,
            max_length=config.max_length,
        )
        encoder = CaptionEncoder.from_llm(config.llm, spec=spec, dtype=config.dtype)
    return encoder.to("cuda" if torch.cuda.is_available() else "cpu")


def rank_captions(
    encoder: CaptionEncoder, queries: Sequence[str], positives: Sequence[str], batch_tokens: int
) -> dict[str, Any]:
    """Rank `positives` for every query and the other way round.

    Returns:
        `num_images`, `accuracy` (top-1 in percent, both ways and their mean) and the 0-based ranks of all queries.
    """
    import numpy as np
    import torch
    import torch.nn.functional as F

    from llm2clip.teacher import encode_texts

    texts = sorted({*queries, *positives})
    rows = {text: row for row, text in enumerate(texts)}
    embeddings = F.normalize(encode_texts(encoder, texts, batch_tokens), dim=-1)
    first, second = (torch.tensor([rows[text] for text in side]) for side in (queries, positives))
    forth, back = text_ranks(embeddings, first, second), text_ranks(embeddings, second, first)
    top1 = [float(100 * np.mean(np.array(ranks) == 0)) for ranks in (forth, back)]
    return {
        "num_images": len(queries),
        "accuracy": {"query_to_positive": top1[0], "positive_to_query": top1[1], "mean": sum(top1) / 2},
        "query_to_positive_ranks": forth,
        "positive_to_query_ranks": back,
    }


def text_ranks(embeddings: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor) -> list[int]:
    """How many other texts are at least as near to query i as the text of candidate i.

    Args:
        embeddings: (texts, dim), L2-normalised, one row for each distinct text.
        queries: (n,) rows of the queries.
        candidates: (n,) rows of what they are to find; a candidate with the very text of the right one is right too.
    """
    from llm2clip.metrics import relevant_ranks

    ranks: list[int] = []
    for start in range(0, len(queries), CHUNK):
        part = slice(start, start + CHUNK)
        similarity = embeddings[queries[part]] @ embeddings[candidates].T  # (chunk, n)
        ranks += relevant_ranks(similarity, candidates[part, None] == candidates[None]).tolist()
    return ranks


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval cra`."""
    run(parse(argv))
