"""Command `answers`: ask a LLaVA model the questions of every pool, with the image and, for comparison, blind.

Reads any exported stock `LlavaForConditionalGeneration` with its processor, through transformers alone, and question
files. Writes `answers/<pool>.jsonl`, one record per question in the order of the file.

Blind, the model sees an image of the same size in the processor's mean colour: what it answers right then, it knows
from the question. A pool that a killed run finished is kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, model_fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from llm2clip_eval.answerer import Answerer
    from llm2clip_eval.questions import QuestionFile

logger = logging.getLogger(__name__)

ANSWERS = "answers"


@dataclass(kw_only=True)
class AnswersConfig(StageConfig):
    """Ask a LLaVA model the questions of every pool, with the image and blind; score by normalised exact match."""

    arm: str
    """Name of the model in results and reports."""
    model: str
    """Directory (or hub id) of a stock LlavaForConditionalGeneration with its processor, as llava-bridge export writes
    it."""
    questions: dict[str, Path]
    """Parquet files of questions by pool."""
    blind: bool = True
    """Also ask every question with an image of the processor's mean colour."""
    seed: int = 0
    """Training seed of the model, recorded in the results; greedy answers draw nothing."""
    batch_size: int = 32
    """Questions answered at a time."""
    max_new_tokens: int = 12
    """Where an answer that does not end by itself is cut off."""
    max_empty_fraction: float = 0.05
    """Share of empty answers in a pool above which the stage fails: such a model is broken, not bad."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the weights. float32 is the fastest on most CPUs, and answers do not depend on batches there."""

    def __post_init__(self) -> None:
        problems = [] if self.questions else ["questions: at least one pool is needed"]
        problems += [
            f"questions: {name!r} becomes a file name, so it cannot hold /" for name in self.questions if "/" in name
        ]
        problems += [
            f"{name}: {getattr(self, name)} is not positive"
            for name in ("batch_size", "max_new_tokens")
            if getattr(self, name) < 1
        ]
        if not 0 <= self.max_empty_fraction <= 1:
            problems.append(f"max_empty_fraction: {self.max_empty_fraction} is not between 0 and 1")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[AnswersConfig]:
    """Read the configuration of a command line."""
    return parse_stage(AnswersConfig, argv, prog="llm2clip-eval answers")


def inputs(call: StageCall[AnswersConfig]) -> dict[str, str]:
    """Fingerprints of the model and the question files."""
    config = call.config
    found = {"model": model_fingerprint(config.model)}
    return found | {f"questions.{pool}": fingerprint(path) for pool, path in config.questions.items()}


def run(call: StageCall[AnswersConfig]) -> None:
    """Ask every pool; pools that a killed run finished are kept."""
    config = call.config
    fingerprints = inputs(call)
    with RunDir(call, stage="answers", inputs=fingerprints) as run:
        if run.complete:
            logger.info("answers: %s is complete", run.path)
            return
        from llm2clip_eval.answerer import Answerer
        from llm2clip_eval.questions import QuestionFile

        pools = {pool: QuestionFile(path) for pool, path in config.questions.items()}
        answerer = Answerer(
            config.model, dtype=config.dtype, batch_size=config.batch_size, max_new_tokens=config.max_new_tokens
        )
        accuracy = {}
        for pool, questions in pools.items():
            file = run.path / ANSWERS / f"{pool}.jsonl"
            if not file.is_file():
                records = answer_pool(answerer, pool, questions, config)
                file.parent.mkdir(exist_ok=True)
                atomic_write(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            accuracy[pool] = pool_accuracy(read_answers(file))
            logger.info("%s on %s: %s", config.arm, pool, accuracy[pool])
        run.finish(
            outputs=[ANSWERS],
            arm=config.arm,
            seed=config.seed,
            model_fingerprint=fingerprints["model"],
            questions={pool: str(path) for pool, path in config.questions.items()},
            accuracy=accuracy,
        )


def read_answers(file: Path) -> list[dict[str, Any]]:
    """The records of one pool."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def pool_accuracy(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, float | int]]:
    """Percentage of right answers by type of question, seen and blind, and the number of questions."""
    of_type: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        of_type.setdefault(record["type"], []).append(record)
    found: dict[str, dict[str, float | int]] = {}
    for kind, asked in of_type.items():
        found[kind] = {"num_questions": len(asked)}
        for name in ("correct", "blind_correct"):
            if name in asked[0]:
                found[kind][name] = round(100 * sum(record[name] for record in asked) / len(asked), 2)
    return found


def answer_pool(answerer: Answerer, pool: str, questions: QuestionFile, config: AnswersConfig) -> list[dict[str, Any]]:
    """Ask all questions of a pool, with their images and blind.

    Returns:
        One record per question, in the order of the file; with `blind_prediction` and `blind_correct` if
        `config.blind`.

    Raises:
        ValueError: if too many answers are empty, or a question cannot be asked; names an example.
    """
    from llm2clip_eval.questions import is_correct

    for question in questions.questions:
        if answerer.image_token in question.question:
            raise ValueError(
                f"{questions.path}, question {question.id}: holds {answerer.image_token}, which marks where the image "
                "goes; expected the question alone"
            )
    texts = [question.question for question in questions.questions]
    predictions = answerer.answer(texts, questions.image_digests(), questions.load_image, f"{config.arm}, {pool}")
    if empty := [index for index, prediction in enumerate(predictions) if not prediction]:
        if len(empty) > config.max_empty_fraction * len(texts):
            first = questions.questions[empty[0]]
            raise ValueError(
                f"{config.model} gives no answer to {len(empty)} of {len(texts)} questions of {pool}, such as "
                f"{first.id}: {first.question!r}; at most {config.max_empty_fraction:g} of them may be empty. "
                "Look at it with llava-bridge chat, or raise max_empty_fraction"
            )
    records: list[dict[str, Any]] = []
    for question, prediction in zip(questions.questions, predictions, strict=True):
        right = is_correct(prediction, question.answer)
        records.append({**asdict(question), "prediction": prediction, "correct": right})
    if config.blind:
        sizes = [questions.load_image(index).size for index in range(len(questions))]
        # Blind, the same text on a canvas of the same size is the same question: it is asked once.
        asked = list(dict.fromkeys(zip(texts, sizes, strict=True)))
        found = answerer.answer(
            [text for text, _ in asked],
            [size for _, size in asked],
            lambda index: answerer.blank(asked[index][1]),
            f"{config.arm}, {pool}, blind",
        )
        answers = dict(zip(asked, found, strict=True))
        for record, size in zip(records, sizes, strict=True):
            record["blind_prediction"] = answers[record["question"], size]
            record["blind_correct"] = is_correct(record["blind_prediction"], record["answer"])
    return records


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm2clip-eval answers`."""
    run(parse(argv))
