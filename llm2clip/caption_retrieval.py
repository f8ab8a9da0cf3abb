"""Caption retrieval accuracy (CRA): do two captions of an image find each other among those of other images?

LLM2CLIP's own measure of a teacher (arXiv 2411.04997, section 3.1): top-1, in both directions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm2clip.caption_data import CaptionData
from llm2clip.metrics import relevant_ranks
from llm2clip.teacher import CaptionEncoder, encode_texts


def caption_pool(data: CaptionData, query: str, positive: str) -> tuple[list[str], list[str]]:
    """The first caption of kind `query` of each image, and the first other one of kind `positive`.

    Raises:
        ValueError: if less than two images have both.
    """
    queries, positives = [], []
    for sample in data:
        first = next((caption.text for caption in sample.captions if caption.kind == query), None)
        other = next((c.text for c in sample.captions if c.kind == positive and c.text != first), None)
        if first is not None and other is not None:
            queries.append(first)
            positives.append(other)
    if len(queries) < 2:
        raise ValueError(
            f"evaluation: {data.path} has {len(queries)} images with different captions {query!r} and {positive!r}, "
            f"expected at least 2; it holds {dict(data.kinds)}"
        )
    return queries, positives


def caption_retrieval_accuracy(
    encoder: CaptionEncoder, queries: list[str], positives: list[str], batch_tokens: int = 4096
) -> dict[str, float]:
    """Top-1 accuracy of finding `positives[i]` with `queries[i]`, and the other way round.

    Vectors are compared as they are extracted later: without a training instruction, by cosine. A candidate with the
    very text of the right one is right too; other ties count as misses.

    Returns:
        `num_images`, `query_to_positive`, `positive_to_query`.
    """
    texts = sorted({*queries, *positives})
    rows = {text: row for row, text in enumerate(texts)}
    embeddings = F.normalize(encode_texts(encoder, texts, batch_tokens), dim=-1)
    first, second = (torch.tensor([rows[text] for text in side]) for side in (queries, positives))
    return {
        "num_images": len(queries),
        "query_to_positive": _top1(embeddings, first, second),
        "positive_to_query": _top1(embeddings, second, first),
    }


def _top1(embeddings: torch.Tensor, queries: torch.Tensor, candidates: torch.Tensor, chunk: int = 1024) -> float:
    hits = 0
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        similarity = embeddings[queries[rows]] @ embeddings[candidates].T  # (chunk, images)
        relevant = candidates[rows, None] == candidates[None]
        hits += int((relevant_ranks(similarity, relevant) == 0).sum())
    return hits / len(queries)
