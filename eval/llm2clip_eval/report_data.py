"""What a report says, as plain data: results are read, checked against each other, averaged and compared.

Everything that templates and figures show is made here; they only lay it out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.run_dir import read_manifest
from llm2clip_eval.statistics import Comparison, QueryHits, paired_bootstrap, statement

Key = tuple[str, str]
"""Pool and caption kind."""


@dataclass(frozen=True)
class ArmResults:
    """All results of one arm."""

    name: str
    label: str
    records: Mapping[Key, Sequence[Mapping[str, Any]]]
    """For each pool and kind the JSON that `llm2clip-eval retrieval` wrote, one per training seed."""

    @property
    def num_seeds(self) -> int:
        return len(next(iter(self.records.values())))

    def recall(self, key: Key, direction: str, k: str = "R@1") -> float:
        """Recall in percent, mean over seeds."""
        return float(np.mean([record["recall"][direction][k] for record in self.records[key]]))

    def spread(self, key: Key) -> float | None:
        """Standard deviation over seeds of mean R@1; None for a single seed."""
        if self.num_seeds == 1:
            return None
        return float(np.std([record["recall"]["mean"]["R@1"] for record in self.records[key]], ddof=1))


@dataclass(frozen=True)
class Difference:
    """One comparison on one pool."""

    key: Key
    target: str
    baseline: str
    comparison: Comparison
    text: str


@dataclass(frozen=True)
class PoolFacts:
    """One pool and kind, and how every arm did there."""

    key: Key
    note: str
    num_images: int
    num_captions: int
    num_repeated_captions: int
    """Captions that repeat another one of the pool word for word; if it is another image's, image to text is a tie."""
    truncated: Mapping[str, int]
    """Arm label to number of captions that its text tower cut off, where there are any."""
    scores: Sequence[Mapping[str, Any]]
    """For each arm: `label`, `i2t`, `t2i`, `mean` (lists of `(k, percent, is best)`) and `spread`."""

    @property
    def chance(self) -> float:
        """R@1 of guessing, in percent."""
        return 100 / self.num_images


def load_arm(name: str, label: str, directories: Sequence[Path]) -> ArmResults:
    """Read the results of one arm.

    Args:
        name: key of the arm in the report's configuration.
        label: what readers see.
        directories: run directories of `llm2clip-eval retrieval`, one per training seed.

    Raises:
        FileNotFoundError: if a directory is not a complete run.
        ValueError: if it is a run of something else, or one model is given as two seeds.
    """
    records: dict[Key, list[Mapping[str, Any]]] = {}
    seen: dict[str, Path] = {}
    for directory in directories:
        manifest = read_manifest(directory)
        if manifest["stage"] != "retrieval":
            raise ValueError(f"arms.{name}: {directory} was written by {manifest['stage']}, expected retrieval")
        if other := seen.get(manifest["clip_fingerprint"]):
            raise ValueError(f"arms.{name}: {directory} and {other} evaluate the very same model; give one per seed")
        seen[manifest["clip_fingerprint"]] = directory
        for file in sorted((directory / "results").glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            records.setdefault((record["pool"], record["kind"]), []).append(record)
    return ArmResults(name, label, records)


def check_same_queries(arms: Sequence[ArmResults]) -> None:
    """Refuse arms that were not asked the same questions.

    Raises:
        ValueError: naming the arm, the pool and what to run.
    """
    first = arms[0]
    for arm in arms:
        for key in first.records.keys() | arm.records.keys():
            pool = "/".join(key)
            expected, found = first.records.get(key, []), arm.records.get(key, [])
            if not expected or len(found) != arm.num_seeds:
                missing = first if not expected else arm
                raise ValueError(
                    f"pool {pool} is missing in a result of {missing.name}; run llm2clip-eval retrieval with the same "
                    "pools for every arm and seed"
                )
            for record in found:
                for part in ("data_fingerprint", "image_ids", "caption_image", "split"):
                    if record[part] != expected[0][part]:
                        raise ValueError(
                            f"pool {pool}: {part} of {arm.name} (seed {record['seed']}) is not that of {first.name}; "
                            "the pool changed in between, run llm2clip-eval retrieval again for both"
                        )
                ours, theirs = (", ".join(recall_names(one)) for one in (record, expected[0]))
                if ours != theirs:
                    raise ValueError(
                        f"pool {pool}: {arm.name} (seed {record['seed']}) has {ours}, {first.name} {theirs}; run "
                        "llm2clip-eval retrieval with the same ks for both"
                    )


def recall_names(record: Mapping[str, Any]) -> list[str]:
    """Names of the recalls that a result of retrieval has in every direction, such as R@1 and R@5, by their k."""
    return sorted(record["recall"]["mean"], key=lambda name: int(name.removeprefix("R@")))


def pool_facts(arms: Sequence[ArmResults], key: Key, note: str) -> PoolFacts:
    """Every arm's recall in one pool, the best of each column marked."""
    record = arms[0].records[key][0]
    columns = {
        (direction, k): [arm.recall(key, direction, k) for arm in arms]
        for direction in record["recall"]
        for k in recall_names(record)
    }
    scores = []
    for row, arm in enumerate(arms):
        score: dict[str, Any] = {"name": arm.name, "label": arm.label, "spread": arm.spread(key)}
        for (direction, k), values in columns.items():
            is_best = len(arms) > 1 and values[row] == max(values)
            score.setdefault(direction, []).append((k, values[row], is_best))
        scores.append(score)
    truncated = {arm.label: arm.records[key][0]["num_truncated_captions"] or 0 for arm in arms}
    return PoolFacts(
        key=key,
        note=note,
        num_images=record["num_images"],
        num_captions=record["num_captions"],
        num_repeated_captions=record["num_captions"] - record["num_distinct_captions"],
        truncated={label: count for label, count in truncated.items() if count},
        scores=scores,
    )


def compare(
    target: ArmResults,
    baseline: ArmResults,
    key: Key,
    *,
    k: int = 1,
    num_resamples: int,
    confidence: float,
    seed: int,
) -> Difference:
    """Paired bootstrap of mean R@k in one pool."""
    hits = [
        [QueryHits.from_ranks(r["i2t_ranks"], r["t2i_ranks"], r["caption_image"], k) for r in arm.records[key]]
        for arm in (target, baseline)
    ]
    found = paired_bootstrap(*hits, num_resamples=num_resamples, confidence=confidence, seed=seed)
    return Difference(
        key, target.label, baseline.label, found, statement(found, target.label, baseline.label, f"R@{k}")
    )


def settings_that_differ(first: Path, second: Path) -> list[tuple[str, str, str]]:
    """What two runs did differently: (setting or input, value in the first, value in the second)."""
    ours, theirs = (
        {**manifest["settings"], **{f"fingerprint of {name}": digest for name, digest in manifest["inputs"].items()}}
        for manifest in (read_manifest(first), read_manifest(second))
    )
    return [
        (name, _plain(ours.get(name)), _plain(theirs.get(name)))
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _plain(value: Any) -> str:
    text = "–" if value is None else str(value)
    is_digest = len(text) == 64 and all(character in "0123456789abcdef" for character in text)
    return text[:12] if is_digest else text


def loss_curve(run: Path) -> tuple[list[int], list[float]]:
    """Steps and losses of a training run; empty if it recorded none."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return [], []
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [line["step"] for line in lines], [line["loss"] for line in lines]


def run_facts(title: str, run: Path) -> dict[str, Any]:
    """Where a run's output comes from, for the provenance section."""
    manifest = read_manifest(run)
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    return {
        "title": title,
        "directory": run.name,
        "stage": manifest["stage"],
        "fingerprint": manifest["fingerprint"][:12],
        "inputs": {name: _plain(digest) for name, digest in manifest["inputs"].items()},
        "minutes": ((run / "manifest.json").stat().st_mtime - (run / "identity.json").stat().st_mtime) / 60,
        "steps": manifest.get("num_steps"),
        "batch": manifest.get("global_batch_size"),
        "commit": environment["git_commit"],
        "machine": ", ".join(filter(None, [environment["processor"], environment["accelerator"]])),
        "num_cpus": environment["num_cpus"],
        "versions": {name: version for name, version in environment["packages"].items() if version},
        "config": (run / "config.yaml").read_text(encoding="utf-8"),
    }


def teacher_accuracy(teacher: Path) -> list[dict[str, Any]]:
    """Caption retrieval accuracy before and after tuning, in percent, for each evaluation pool of `finetune-llm`."""
    cra = json.loads((teacher / "cra.json").read_text(encoding="utf-8"))
    return [
        {
            "pool": pool,
            "num_images": before["num_images"],
            **{
                f"{name}_{moment}": 100 * values[name]
                for moment, values in (("before", before), ("after", cra["after"][pool]))
                for name in ("query_to_positive", "positive_to_query")
            },
        }
        for pool, before in cra["before"].items()
    ]
