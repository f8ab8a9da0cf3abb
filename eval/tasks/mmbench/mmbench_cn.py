"""MMBench in Chinese, scored by lmms-eval's rules for mmbench_en_dev_static instead of its judge."""

from __future__ import annotations

from typing import Any

from lmms_eval.tasks.mmbench.cn_utils import mmbench_evaluator


def static_score(results: list[dict[str, Any]]) -> float:
    """Percentage of questions that are answered rightly in all their rotations."""
    overall, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return overall * 100
