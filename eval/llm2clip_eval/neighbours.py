"""Nearest-neighbour pictures: what each arm finds for a caption, as small embedded images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from llm2clip.caption_data import CaptionData
from llm2clip_eval.report_data import ArmResults, Key

THUMBNAIL = 128
"""Longer edge in pixels."""


def nearest(arms: Sequence[ArmResults], key: Key, num_queries: int) -> dict[str, Any]:
    """The five nearest images of some captions of a pool, for the first seed of every arm.

    Captions are taken at even distances through the pool, so none is chosen for how an arm did on it.

    Returns:
        `key`, `num_images` and `queries`: for each its `caption`, the `right` image, and per arm `label`, `rank`
        (1-based) and `images`; an image is (data URI, image id, whether it is the right one).

    Raises:
        ValueError: if the pool's data is no longer what was evaluated.
    """
    records = [arm.records[key][0] for arm in arms]
    record = records[0]
    data = CaptionData.open(record["data"], record["fields"])
    if data.fingerprint != record["data_fingerprint"]:
        raise ValueError(f"{record['data']} has changed since it was evaluated; run llm2clip-eval retrieval again")
    rows = {image_id: row for row, image_id in enumerate(data.ids.to_pylist())}
    captions = np.flatnonzero(data.kind_codes == data.kind_names.index(key[1]))
    uris: dict[int, str] = {}

    def picture(image: int, right: int) -> tuple[str, str, bool]:
        image_id = record["image_ids"][image]
        if image not in uris:
            uris[image] = data_uri(data.load_image(rows[image_id]))
        return uris[image], image_id, image == right

    queries = []
    chosen = np.linspace(0, len(captions) - 1, min(num_queries, len(captions)) + 2).round().astype(int)[1:-1]
    for query in dict.fromkeys(chosen.tolist()):
        right = record["caption_image"][query]
        queries.append(
            {
                "caption": data.texts[captions[query]].as_py(),
                "right": picture(right, right),
                "arms": [
                    {
                        "label": arm.label,
                        "rank": found["t2i_ranks"][query] + 1,
                        "images": [picture(image, right) for image in found["top5"]["t2i"][query]],
                    }
                    for arm, found in zip(arms, records, strict=True)
                ],
            }
        )
    return {"key": key, "num_images": record["num_images"], "queries": queries}


def data_uri(image: Image.Image, max_edge: int = THUMBNAIL) -> str:
    """An image, made smaller if its longer edge is above `max_edge` pixels, as JPEG in a data URI."""
    image.thumbnail((max_edge, max_edge))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
