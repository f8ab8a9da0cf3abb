"""What an answers report says, as plain data: answers are read, checked against each other, measured and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llm2clip.run_dir import fingerprint, read_manifest
from llm2clip_eval.answer_statistics import ClusterBootstrap, Estimate, statement, verdict
from llm2clip_eval.answers import ANSWERS, read_answers
from llm2clip_eval.neighbours import data_uri
from llm2clip_eval.questions import QuestionFile, normalized

Record = Mapping[str, Any]
"""What `llm2clip-eval answers` wrote about one question."""
ASKED = ("id", "question", "answer", "type", "subtype", "language", "image_id", "chance")
EXAMPLE_PIXELS = 256
"""Longer edge of a picture in the report."""


class Group(NamedTuple):
    """Questions of one pool, type and language; what is measured."""

    pool: str
    type: str
    language: str

    @property
    def key(self) -> str:
        """pool/type, and the language where it is not English."""
        return f"{self.pool}/{self.kind}"

    @property
    def kind(self) -> str:
        """type, and the language where it is not English."""
        return self.type if self.language == "en" else f"{self.type}/{self.language}"


@dataclass(frozen=True)
class ArmAnswers:
    """All answers of one arm."""

    name: str
    label: str
    directories: Sequence[Path]
    pools: Mapping[str, Sequence[Sequence[Record]]]
    """For each pool, one list of records per training seed."""
    files: Mapping[str, tuple[str, str]]
    """For each pool, path and fingerprint of the question file."""

    @property
    def num_seeds(self) -> int:
        return len(self.directories)

    def scores(self, group: Group, rows: np.ndarray, name: str) -> np.ndarray | None:
        """(num_seeds, len(rows)) 1 where `name`, correct or blind_correct, is true; None if that was not asked."""
        if any(name not in records[0] for records in self.pools[group.pool]):
            return None
        return np.array([[float(records[row][name]) for row in rows] for records in self.pools[group.pool]])


@dataclass(frozen=True)
class Score:
    """How one arm did on one group."""

    label: str
    accuracy: Estimate
    blind: Estimate | None
    over_blind: Estimate | None
    """Accuracy minus blind accuracy, paired."""
    verdict: str

    @property
    def colour(self) -> str:
        """better if it is above chance and above the blind baseline, worse if it is below one of them."""
        if self.verdict == "above chance and above the blind baseline":
            return "better"
        return "worse" if "below" in self.verdict else "undecided"


@dataclass(frozen=True)
class Difference:
    """One arm against another on one group."""

    target: float
    baseline: float
    difference: Estimate
    text: str

    @property
    def verdict(self) -> str:
        return {"above": "better", "below": "worse", "undecided": "undecided"}[self.difference.against(0)]


@dataclass(frozen=True)
class GroupFacts:
    """One group, how every arm did there, and how they compare."""

    group: Group
    num_questions: int
    num_images: int
    chance: float
    """Share that guessing among the possible answers gets right."""
    majority: float
    """Share that the most frequent answer, given always, gets right."""
    majority_answer: str
    scores: Mapping[str, Score]
    """By arm name."""
    differences: Mapping[tuple[str, str], Difference]
    """By names of target and baseline."""

    @property
    def bar(self) -> float:
        """What needs neither picture nor question."""
        return max(self.chance, self.majority)


def load_arm(name: str, label: str, directories: Sequence[Path]) -> ArmAnswers:
    """Read the answers of one arm.

    Args:
        name: key of the arm in the report's configuration.
        label: what readers see.
        directories: run directories of `llm2clip-eval answers`, one per training seed.

    Raises:
        FileNotFoundError: if a directory is not a complete run.
        ValueError: if it is a run of something else, one model is given as two seeds, or seeds differ in their pools.
    """
    pools: dict[str, list[Sequence[Record]]] = {}
    files: dict[str, tuple[str, str]] = {}
    models: dict[str, Path] = {}
    for directory in directories:
        manifest = read_manifest(directory)
        if manifest["stage"] != "answers":
            raise ValueError(f"arms.{name}: {directory} was written by {manifest['stage']}, expected answers")
        if other := models.get(manifest["model_fingerprint"]):
            raise ValueError(
                f"arms.{name}: {directory} and {other} are answers of the very same model; give one per seed"
            )
        models[manifest["model_fingerprint"]] = directory
        for pool, path in manifest["questions"].items():
            pools.setdefault(pool, []).append(read_answers(directory / ANSWERS / f"{pool}.jsonl"))
            files.setdefault(pool, (path, manifest["inputs"][f"questions.{pool}"]))
    if incomplete := [pool for pool, seeds in pools.items() if len(seeds) != len(directories)]:
        raise ValueError(
            f"arms.{name}: pool {incomplete[0]} was not asked in every seed; run llm2clip-eval answers again"
        )
    return ArmAnswers(name, label, directories, pools, files)


def check_same_questions(arms: Sequence[ArmAnswers]) -> None:
    """Refuse arms that were not asked the same questions.

    Raises:
        ValueError: naming the arm, the pool and what to run.
    """
    first = arms[0]
    for arm in arms:
        if differing := sorted(first.pools.keys() ^ arm.pools.keys()):
            without = arm if differing[0] in first.pools else first
            raise ValueError(
                f"pool {differing[0]} was not asked of {without.name}; run llm2clip-eval answers with the same pools "
                "for every arm"
            )
        for pool, seeds in arm.pools.items():
            expected = [[record[part] for part in ASKED] for record in first.pools[pool][0]]
            if any([[record[part] for part in ASKED] for record in records] != expected for records in seeds):
                raise ValueError(
                    f"pool {pool}: {arm.name} and {first.name} were not asked the same questions; the file changed in "
                    "between, run llm2clip-eval answers again for both"
                )


def groups(arm: ArmAnswers, order: Sequence[str]) -> dict[Group, np.ndarray]:
    """Rows of every group, pools in the given order and then by name, groups as they come up, English first."""
    found: dict[Group, list[int]] = {}
    for pool in sorted(arm.pools, key=lambda pool: (order.index(pool) if pool in order else len(order), pool)):
        of_pool: dict[Group, list[int]] = {}
        for row, record in enumerate(arm.pools[pool][0]):
            of_pool.setdefault(Group(pool, record["type"], record["language"]), []).append(row)
        found |= {group: of_pool[group] for group in sorted(of_pool, key=lambda group: group.language != "en")}
    return {group: np.array(rows) for group, rows in found.items()}


def measure(
    arms: Sequence[ArmAnswers], group: Group, rows: np.ndarray, pairs: Sequence[tuple[str, str]], **bootstrap: Any
) -> GroupFacts:
    """Accuracies, baselines and differences of one group.

    Args:
        arms: all that were asked.
        group: of questions.
        rows: its rows in the pool's records.
        pairs: names of target and baseline of every comparison.
        bootstrap: `num_resamples`, `confidence` and `seed` of `ClusterBootstrap`.
    """
    records = [arms[0].pools[group.pool][0][row] for row in rows]
    scores = {
        f"{arm.name} {name}": of_arm
        for arm in arms
        for name in ("correct", "blind_correct")
        if (of_arm := arm.scores(group, rows, name)) is not None
    }
    images = [record["image_id"] for record in records]
    resampled = ClusterBootstrap(scores, images, **bootstrap)
    answers = Counter(normalized(record["answer"]) for record in records)
    frequent, times = answers.most_common(1)[0]
    chance, majority = float(np.mean([record["chance"] for record in records])), times / len(records)

    def score(arm: ArmAnswers) -> Score:
        seen, blind = f"{arm.name} correct", f"{arm.name} blind_correct"
        accuracy = resampled.mean(seen)
        over_blind = resampled.difference(seen, blind, same_models=True) if blind in scores else None
        return Score(
            label=arm.label,
            accuracy=accuracy,
            blind=resampled.mean(blind) if blind in scores else None,
            over_blind=over_blind,
            verdict=verdict(accuracy, max(chance, majority), over_blind),
        )

    def compare(target: str, baseline: str) -> Difference:
        ours, theirs = found[target], found[baseline]
        difference = resampled.difference(f"{target} correct", f"{baseline} correct")
        both = ours.accuracy.value, theirs.accuracy.value
        text = statement(ours.label, theirs.label, both, difference, bootstrap["confidence"])
        return Difference(*both, difference, text)

    found = {arm.name: score(arm) for arm in arms}
    return GroupFacts(
        group=group,
        num_questions=len(records),
        num_images=len(set(images)),
        chance=chance,
        majority=majority,
        majority_answer=next(r["answer"] for r in records if normalized(r["answer"]) == frequent),
        scores=found,
        differences={pair: compare(*pair) for pair in pairs},
    )


def examples(arms: Sequence[ArmAnswers], pool: str, num: int, seed: int) -> list[dict[str, Any]]:
    """Some questions of a pool with their pictures and everyone's answers, for the first seed of every arm.

    Of every type of question, `num` that the first arm answers rightly and `num` that it does not are drawn, as far as
    there are any, from all languages.

    Raises:
        FileNotFoundError, ValueError: if the question file is no longer what was asked.
    """
    path, digest = arms[0].files[pool]
    if fingerprint(path) != digest:
        raise ValueError(f"{path} has changed since it was asked; run llm2clip-eval answers again")
    questions = QuestionFile(Path(path))
    records = [arm.pools[pool][0] for arm in arms]
    drawn: list[int] = []
    rng = np.random.default_rng(seed)
    for kind in dict.fromkeys(record["type"] for record in records[0]):
        for right in (True, False):
            rows = [n for n, record in enumerate(records[0]) if record["type"] == kind and record["correct"] == right]
            drawn += sorted(rng.permutation(rows)[:num].tolist())
    return [
        {
            "image": data_uri(questions.load_image(row), EXAMPLE_PIXELS),
            "record": records[0][row],
            "arms": [(arm.label, answers[row]) for arm, answers in zip(arms, records, strict=True)],
        }
        for row in drawn
    ]
