"""`llm2clip <command>`: imports the stage's module when it is asked for, and turns errors into exit codes."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from collections.abc import Mapping, Sequence

COMMANDS = {
    "data assets": ("llm2clip.demo.assets", "fetch the demo's packages and write its pretrained LLM and tokenizer"),
    "data demo": ("llm2clip.demo.build", "build the demo's images and captions"),
    "data check": ("llm2clip.data_check", "report what is wrong with caption data, row by row"),
    "finetune-llm": ("llm2clip.finetune_llm", "turn a decoder LLM into a caption encoder"),
    "extract-embeddings": ("llm2clip.extract_embeddings", "encode every caption once, to disk"),
    "train-clip": ("llm2clip.train_clip", "train a CLIP vision encoder against captions"),
    "export": ("llm2clip.export", "write the vision tower as a plain Hugging Face model"),
}

# Bad input, a full disk or a directory that can't be written: the user's to mend, told without a traceback.
USER_ERRORS = (ValueError, OSError)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `llm2clip` command."""
    sys.exit(dispatch("llm2clip", COMMANDS, list(sys.argv[1:] if argv is None else argv)))


def dispatch(program: str, commands: Mapping[str, tuple[str, str]], argv: list[str]) -> int:
    """Run the command that `argv` begins with.

    Returns:
        0 done, 2 bad input (message on stderr), 1 failed (traceback on stderr).
    """
    for words in (2, 1):
        name = " ".join(argv[:words])
        if len(argv) >= words and name in commands:
            return run_command(commands[name][0], argv[words:])
    asked_for_help = not argv or argv[0] in ("-h", "--help")
    stream = sys.stdout if asked_for_help else sys.stderr
    if not asked_for_help:
        stream.write(f"{program}: no command {' '.join(argv[:2])!r}\n")
    stream.write(f"usage: {program} COMMAND --config FILE.yaml [--section.field VALUE ...]\n\ncommands:\n")
    for name, (_, summary) in commands.items():
        stream.write(f"  {name:20} {summary}\n")
    stream.write(f"\n{program} COMMAND --help lists the settings of a command.\n")
    return 0 if asked_for_help and argv else 2


def run_command(module: str, argv: list[str]) -> int:
    """Call `main(argv)` of a stage's module with logging set up, and map its errors to an exit code."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s [rank {rank}] %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
    )
    for noisy in ("httpx", "datasets", "torch.distributed", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        importlib.import_module(module).main(argv)
    except USER_ERRORS as error:
        if os.environ.get("LLM2CLIP_DEBUG"):
            traceback.print_exc()
        sys.stderr.write(f"error: {error}\n(LLM2CLIP_DEBUG=1 shows where)\n")
        return 2
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    main()
