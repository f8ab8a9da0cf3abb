"""Result directories as `llm2clip-eval lmms` writes them, with scores of the test's choice; shared by tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from llm2clip.config import StageCall, StageConfig
from llm2clip.run_dir import RunDir, atomic_write
from llm2clip_eval.task_metrics import measure

IDENTITY = {
    "task_config": "1" * 64,
    "scorer": "2" * 64,
    "prompts": "3" * 64,
    "data": "4" * 64,
    "generation": {"max_new_tokens": 16},
    "dtype": "float32",
    "batch_size": 16,
    "lmms_eval": "0.7.3",
    "torch": "2.12.1",
    "transformers": "5.23.0",
}


@dataclass(kw_only=True)
class LmmsSettings(StageConfig):
    """Of a run that never ran."""

    model: str


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def item(
    number: int, scores: dict[str, Any], *, image: str | None = None, category: str | None = None, **fields: Any
) -> dict[str, Any]:
    """One answered question; without `image` it has a picture of its own."""
    picture = digest(image if image is not None else f"image {number}")[:32]
    return {
        "doc_id": number,
        "item": digest(f"question {number}"),
        "images": [picture],
        "question": f"What is number {number}?",
        "target": "yes",
        "response": "yes",
        "category": category,
        "scores": scores,
        **fields,
    }


def matched(right: Sequence[float], **fields: Any) -> list[dict[str, Any]]:
    """Items of a task that is scored by exact_match."""
    return [item(number, {"exact_match": float(score)}, **fields) for number, score in enumerate(right)]


def pope(answers: Sequence[tuple[str, str]], per_image: int = 3) -> list[dict[str, Any]]:
    """Items of POPE from (prediction, ground truth)."""
    items = []
    for number, (said, truth) in enumerate(answers):
        value = {"question_id": number, "score": float(said == truth), "prediction": said, "ground_truth": truth}
        scores = {f"pope_{name}": value for name in ("accuracy", "precision", "recall", "f1_score")}
        items.append(item(number, scores, image=f"image {number // per_image}", response=said, target=truth))
    return items


def record(task: str, items: Sequence[dict[str, Any]], metric: str = "exact_match", **fields: Any) -> dict[str, Any]:
    """What is in tasks/<task>.json; metrics are what the items come to, which test_task_metrics.py proves right."""
    return {
        "task": task,
        "judge": None,
        "metric": metric,
        "metrics": {name: measure(items, name).value for name in {metric, *fields.pop("others", ())}},
        "identity": IDENTITY | fields.pop("identity", {}),
        "seconds": 60.0,
        "num_items": len(items),
        "items": list(items),
        **fields,
    }


def write_run(
    directory: Path,
    records: Sequence[dict[str, Any]],
    *,
    arm: str = "clip",
    seed: int = 0,
    fingerprint: str | None = None,
    model: Path | str = "lab/model",
    images: bool = False,
    finish: bool = True,
) -> Path:
    """A run directory of `llm2clip-eval lmms`; the pictures are only needed for a page."""
    model_fingerprint = fingerprint or digest(f"{arm} {seed}")
    config = LmmsSettings(output_dir=directory, model=str(model))
    call = StageCall(config=config, training=None, resolved={"output_dir": str(directory), "model": str(model)})
    with RunDir(call, stage="lmms", inputs={"model": model_fingerprint}) as run:
        (directory / "tasks").mkdir()
        (directory / "images").mkdir()
        for content in records:
            whole = {"arm": arm, "seed": seed, "model_fingerprint": model_fingerprint, **content}
            atomic_write(directory / "tasks" / f"{content['task']}.json", json.dumps(whole))
            for picture in {name for entry in content["items"] for name in entry["images"] if images}:
                Image.new("RGB", (8, 8), f"#{picture[:6]}").save(directory / "images" / f"{picture}.jpg")
        if finish:
            run.finish(["tasks", "images"], arm=arm, seed=seed, model_fingerprint=model_fingerprint)
    return directory
