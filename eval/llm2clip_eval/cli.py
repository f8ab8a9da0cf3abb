"""`llm2clip-eval <command>`: imports the command's module when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm2clip.cli import dispatch

COMMANDS = {
    "retrieval": ("llm2clip_eval.retrieval", "image-text retrieval of one model on every held-out pool"),
    "benchmark": ("llm2clip_eval.benchmark", "make caption data of a retrieval benchmark's own files"),
    "zeroshot": ("llm2clip_eval.zeroshot", "classify images by the names of their classes"),
    "probe": ("llm2clip_eval.probe", "linear classifier on frozen image features"),
    "cra": ("llm2clip_eval.cra", "caption retrieval accuracy of a teacher or an LLM"),
    "compositional": ("llm2clip_eval.compositional", "tell captions from nearly the same, wrong ones"),
    "answers": ("llm2clip_eval.answers", "ask a LLaVA model questions about images, and the same without the image"),
    "answers-report": (
        "llm2clip_eval.answers_report",
        "compare LLaVA models by their answers: tables, intervals, pictures",
    ),
    "lmms": ("llm2clip_eval.lmms", "run a suite of lmms-eval tasks for one LLaVA model"),
    "compare": ("llm2clip_eval.compare", "compare LLaVA models by their lmms-eval tasks: tests, intervals, report"),
    "gate": ("llm2clip_eval.gate", "pass or fail a LLaVA model against a baseline, by exit code"),
    "report": ("llm2clip_eval.report", "compare models: tables, intervals, pictures; report.md and report.html"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `llm2clip-eval` command."""
    sys.exit(dispatch("llm2clip-eval", COMMANDS, list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
