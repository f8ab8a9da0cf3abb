"""`llm2clip-eval <command>`: imports the command's module when it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from llm2clip.cli import dispatch

COMMANDS = {
    "retrieval": ("llm2clip_eval.retrieval", "image-text retrieval of one model on every held-out pool"),
    "answers": ("llm2clip_eval.answers", "ask a LLaVA model questions about images, and the same without the image"),
    "answers-report": (
        "llm2clip_eval.answers_report",
        "compare LLaVA models by their answers: tables, intervals, pictures",
    ),
    "report": ("llm2clip_eval.report", "compare models: tables, intervals, pictures; report.md and report.html"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `llm2clip-eval` command."""
    sys.exit(dispatch("llm2clip-eval", COMMANDS, list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
