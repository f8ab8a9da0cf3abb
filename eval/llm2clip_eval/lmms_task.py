"""One model, one task: what a child process of `llm2clip-eval lmms` does.

lmms-eval's Python API runs the task, `LlavaAdapter` answers. `tasks/<task>.json` is written only if the task is whole:
every document there once, none failed, hardly any empty response, every score finite, every answer judged that a judge
scores.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import lmms_eval.evaluator
import lmms_eval.tasks
import loguru
import numpy as np
from lmms_eval.api.task import ConfigurableMessagesTask
from tenacity import RetryError

from llm2clip.run_dir import atomic_write
from llm2clip_eval.lmms import TaskCall
from llm2clip_eval.lmms_model import Asked, LlavaAdapter, generation_settings
from llm2clip_eval.lmms_tasks import describe, load_task
from llm2clip_eval.response_store import ResponseStore, digest
from llm2clip_eval.suites import SuiteTask

logger = logging.getLogger(__name__)

DEFAULT_FILTER = "none"
"""What lmms-eval calls answers that are scored as they are."""
NO_JUDGE = ("", "Failed Request")
"""What MM-Vet (with a score of 0) and LLaVA-Bench call the judge when it could not be asked."""


def run_task(call: TaskCall) -> None:
    """Ask, score and write one task.

    Raises:
        Exception: whatever keeps the task from being whole; nothing is written then but responses.
    """
    loguru.logger.remove()
    loguru.logger.add(sys.stderr, level="WARNING")
    task = load_task(call.task.task, call.include, call.data)
    _check_row(call.task, task)
    about = describe(task)
    images = call.directory / "images"
    images.mkdir(exist_ok=True)
    with ResponseStore(call.responses) as store, contextlib.redirect_stdout(sys.stderr):
        model = LlavaAdapter(
            str(call.model),
            batch_size=call.batch_size,
            device=call.device,
            dtype=call.dtype,
            store=store,
            identity={"model": call.model_fingerprint, "task": about["task_config"]},
            thumbnails=images,
            name=f"{call.arm}, {call.task.task}",
        )
        try:
            results: Any = lmms_eval.evaluator.simple_evaluate(
                model=model,
                tasks=[task],
                task_manager=lmms_eval.tasks.TaskManager(include_defaults=False),
                batch_size=call.batch_size,
                limit=call.limit,
                bootstrap_iters=0,
                process_docs_parallel=1,
                cli_args=argparse.Namespace(
                    output_path=str(call.directory / "submissions" / call.task.task),
                    process_with_media=False,
                    reasoning_tags=None,
                ),
            )
        except RetryError as error:  # lmms-eval scores five times before it gives up; what went wrong is inside
            raise error.last_attempt.exception() or error from error
    num_items = min(len(task.eval_docs), call.limit or len(task.eval_docs))
    about["image_processor"] = type(model.processor.image_processor).__name__  # backends differ by a grey level
    record = task_record(call, task, about, model.asked, results, num_items)
    call.file.parent.mkdir(exist_ok=True)
    atomic_write(call.file, json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")


def _check_row(row: SuiteTask, task: ConfigurableMessagesTask) -> None:
    """Refuse before hours of answering what would be refused behind them."""
    if row.metric is not None and row.metric.partition(",")[0] not in task.aggregation():
        raise ValueError(f"has no metric {row.metric}, which the suite names; it has {', '.join(task.aggregation())}")
    documents: Any = task.eval_docs_no_media
    columns = list(documents.features)
    if row.category is not None and row.category not in columns:
        raise ValueError(f"has no {row.category}, which the suite names as category; it has {', '.join(columns)}")


def task_record(
    call: TaskCall,
    task: ConfigurableMessagesTask,
    about: Mapping[str, str],
    asked: Mapping[int, Asked],
    results: Mapping[str, Any],
    num_items: int,
) -> dict[str, Any]:
    """What is written about a task that is whole.

    Args:
        call: what was to be done.
        task: with its documents.
        about: what it and the model's preprocessing are.
        asked: what the model was asked and said, by document.
        results: what lmms-eval returned.
        num_items: documents that must be there.

    Raises:
        ValueError: if something is missing, too many responses are empty, or a score is not finite.
        RuntimeError: if the judge failed.
    """
    name, documents = call.task.task, sorted(asked)
    if documents != list(range(num_items)):
        raise ValueError(f"{len(documents)} of {num_items} documents were asked for")
    if empty := [number for number in documents if not asked[number].response.text]:
        if len(empty) > call.max_empty_fraction * num_items:
            first = empty[0]
            raise ValueError(
                f"{len(empty)} of {num_items} responses are empty, such as that to document {first}: "
                f"{asked[first].question!r}; at most {call.max_empty_fraction:g} of them may be. Look at the model "
                "with llava-bridge chat, or raise max_empty_fraction"
            )
    metrics = _metrics(results["results"][name], task.aggregation())
    if call.task.metric is not None and call.task.metric not in metrics:
        raise ValueError(f"lmms-eval returned no {call.task.metric}; it returned {', '.join(metrics) or 'nothing'}")
    for metric, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f"{metric} is {value}")
    kept = metrics if call.task.judge != "server" else dict.fromkeys(task.aggregation())
    scores, samples = _by_document(results["samples"][name], kept)
    if sorted(samples) != documents:
        raise ValueError(f"lmms-eval scored {len(samples)} of {num_items} documents")
    if call.task.judge == "llm":
        _check_judge({number: scores[number].get(str(call.task.metric)) for number in documents})
    targets = {number: target_of(samples[number], task.config.doc_to_target) for number in documents}
    category = call.task.category
    items = [
        _item(number, asked[number], samples[number], targets[number], scores[number], category)
        for number in documents
    ]
    return {
        "task": name,
        "arm": call.arm,
        "seed": call.seed,
        "model_fingerprint": call.model_fingerprint,
        "judge": call.task.judge,
        "metric": call.task.metric,
        "metrics": metrics,
        "identity": {
            **about,
            "prompts": digest([asked[number].prompt for number in documents]),
            "data": digest([item["item"] for item in items]),
            "generation": generation_settings(task.config.generation_kwargs),
            "dtype": call.dtype,
            "batch_size": call.batch_size,
            **{name: importlib.metadata.version(name) for name in ("lmms_eval", "torch", "transformers")},
        },
        "seconds": round(sum(asked[number].response.seconds for number in documents), 2),
        "num_items": num_items,
        "items": items,
    }


def _metrics(found: Mapping[str, Any], aggregations: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that lmms-eval aggregated; what it wrote for a server is none."""
    metrics = {}
    for key, value in found.items():
        metric, _, filter_name = key.partition(",")
        if metric in aggregations and isinstance(value, (bool, int, float, np.number)):
            metrics[metric if filter_name == DEFAULT_FILTER else key] = float(value)
    return metrics


def _by_document(
    samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]
) -> tuple[dict[int, dict[str, Any]], dict[int, Mapping[str, Any]]]:
    """Scores and samples by document. lmms-eval returns the samples filter by filter, in the order of its filters."""
    filters = list(dict.fromkeys(key.partition(",")[2] for key in metrics))
    scores: dict[int, dict[str, Any]] = {}
    first: dict[int, Mapping[str, Any]] = {}
    times: dict[int, int] = {}
    for sample in samples:
        number = sample["doc_id"]
        first.setdefault(number, sample)
        times[number] = times.get(number, -1) + 1
        if times[number] >= len(filters):
            raise ValueError(f"lmms-eval scored document {number} more than once")
        suffix = f",{filters[times[number]]}" if filters[times[number]] else ""
        of_sample = {key: key.removesuffix(suffix) for key in metrics if key.partition(",")[2] == suffix[1:]}
        plain = {key: _plain(sample[name], number) for key, name in of_sample.items() if name in sample}
        scores.setdefault(number, {}).update(plain)
    return scores, first


def _check_judge(records: Mapping[int, Any]) -> None:
    """Refuse answers without a verdict, which lmms-eval scores 0 or, as LLaVA-Bench, -1 for both sides."""
    failed = [
        number
        for number, record in records.items()
        if isinstance(record, Mapping)
        and (record.get("eval_model") in NO_JUDGE or any(points < 0 for points in record.get("scores", ())))
    ]
    if failed:
        raise RuntimeError(
            f"the judge failed on {len(failed)} of {len(records)} answers, first on that to document {failed[0]}; run "
            "the same command again when it can be asked: the responses are kept"
        )


def target_of(sample: Mapping[str, Any], source: Any) -> str:
    """What the answer should be.

    VQAv2, TextVQA and VizWiz have `doc_to_target: answer`, a column that is not there, of which lmms-eval makes the
    target "answer" for all documents: here it is what people answered.
    """
    document, target = sample["doc"], sample["target"]
    is_absent = isinstance(source, str) and source not in document and target == source
    if is_absent and document.get("answers") is not None:
        target = [answer["answer"] if isinstance(answer, Mapping) else answer for answer in document["answers"]]
    return target if isinstance(target, str) else json.dumps(_plain(target, sample["doc_id"]))


def _item(
    number: int,
    asked: Asked,
    sample: Mapping[str, Any],
    target: str,
    scores: Mapping[str, Any],
    category: str | None,
) -> dict[str, Any]:
    if not scores:
        raise ValueError(f"lmms-eval gave document {number} no score")
    return {
        "doc_id": number,
        "item": digest([asked.question, target, asked.images]),
        "images": asked.images,
        "question": asked.question,
        "target": target,
        "response": asked.response.text,
        "category": None if category is None else str(sample["doc"][category]),
        "scores": scores,
    }


def _plain(value: Any, number: int) -> Any:
    """A score in JSON types.

    Raises:
        ValueError: if a number is not finite: a score, or the part of a record that is called score.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"document {number} has a score of {value}")
    if isinstance(value, Mapping):
        # A number that is missing in the data, such as a fifth choice, is a NaN to pandas.
        absent = {
            key for key, item in value.items() if key != "score" and isinstance(item, float) and math.isnan(item)
        }
        return {str(key): None if key in absent else _plain(item, number) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item, number) for item in value]
    return value
