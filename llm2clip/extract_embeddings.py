"""Stage 2: encode every distinct caption once with the frozen teacher, to disk.

Reads a teacher (`llm2clip finetune-llm`) and caption data, writes the directory of `llm2clip.embedding_store`.

Work is done and resumed by shard. What is in a shard depends on its texts, the teacher and the configuration only, so
it does not matter which process makes it, or when. Under `accelerate launch` process r of W makes shards r, r+W, ...
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

from llm2clip.caption_data import CaptionData
from llm2clip.caption_sources import write_skipped
from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.run_dir import RunDir, fingerprint, is_main_process

logger = logging.getLogger(__name__)

STAGE = "extract-embeddings"


@dataclass(kw_only=True)
class CaptionSource:
    """Caption data whose texts are encoded."""

    path: Path
    """JSONL + image folder, WebDataset tars, parquet or a `datasets` directory."""
    fields: dict[str, str] | None = None
    """Caption kind -> field name, for files of another layout."""


@dataclass(kw_only=True)
class ExtractEmbeddingsConfig(StageConfig):
    """Encode every distinct caption once with the frozen teacher, to disk."""

    teacher: Path
    """Directory with the merged LLM, its tokenizer and teacher.json."""
    data: list[CaptionSource]
    """All captions that will be trained or evaluated on; a text that occurs in several is encoded once."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the stored vectors; the published recipe computes them in bfloat16 as well."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the teacher's weights and activations; float32 is faster on most CPUs."""
    batch_tokens: int = 16_384
    """Tokens, padding included, in one forward pass; on CPUs about 512 is fastest."""
    rows_per_shard: int = 65_536
    """Texts in one file; what a killed run loses at most (512 MiB at 4096 dimensions in bfloat16)."""
    max_bad_fraction: float = 0.01
    """Fail if more of the rows of a source are unusable."""
    verify: bool = False
    """Also check the digest of every file and encode some texts again, when complete or already complete."""

    def __post_init__(self) -> None:
        problems = []
        for key in ("batch_tokens", "rows_per_shard"):
            if getattr(self, key) < 1:
                problems.append(f"{key} is {getattr(self, key)}, expected at least 1")
        if not self.data:
            problems.append("data is empty; name at least one source, such as [{path: captions}]")
        if not 0 <= self.max_bad_fraction <= 1:
            problems.append(f"max_bad_fraction is {self.max_bad_fraction}, expected 0 to 1")
        if problems:
            raise ValueError("; ".join(problems))


def parse(argv: Sequence[str] | None = None) -> StageCall[ExtractEmbeddingsConfig]:
    """Parse the command line of `llm2clip extract-embeddings`."""
    call = parse_stage(ExtractEmbeddingsConfig, argv, prog=f"llm2clip {STAGE}")
    # Asking for a check does not make it another run.
    return replace(call, resolved={key: value for key, value in call.resolved.items() if key != "verify"})


def inputs(call: StageCall[ExtractEmbeddingsConfig]) -> dict[str, str]:
    """Fingerprints of the teacher and of every data source."""
    return _fingerprints(call.config, _open_sources(call.config))


def main(argv: Sequence[str] | None = None) -> None:
    """`llm2clip extract-embeddings`."""
    run(parse(argv))


def run(call: StageCall[ExtractEmbeddingsConfig]) -> None:
    """Encode what is not encoded yet, write indices and manifest, and check them if asked to.

    Raises:
        FileNotFoundError: if the teacher or caption data are missing.
        ValueError: if data or output directory are not as they should be, or the check fails.
        RuntimeError: if the teacher returns NaN or infinity; names the text.
        OSError: if the output cannot be written; nothing half-written is left.
    """
    config = call.config
    sources = _open_sources(config)
    fingerprints = _fingerprints(config, sources)
    rank, world_size = _join_processes()
    with ExitStack() as stack:
        run_dir = RunDir(call, stage=STAGE, inputs=fingerprints)
        if is_main_process():
            stack.enter_context(run_dir)
            for leftover in run_dir.path.glob(".*.tmp"):  # of a process that was killed while it wrote
                leftover.unlink()
        _wait_for_all(world_size)
        if not is_main_process():
            stack.enter_context(run_dir)
        if run_dir.complete and not config.verify:
            logger.info("%s: already complete, %s", STAGE, run_dir.path)
            return

        from llm2clip.embedding_writer import EmbeddingWriter, UniqueTexts  # imports torch and transformers

        writer = EmbeddingWriter(
            run_dir.path,
            UniqueTexts(sources),
            teacher=config.teacher,
            teacher_fingerprint=fingerprints["teacher"],
            compute_dtype=config.compute_dtype,
            dtype=config.dtype,
            batch_tokens=config.batch_tokens,
            rows_per_shard=config.rows_per_shard,
        )
        if not run_dir.complete:
            writer.write_shards(rank, world_size)
            _wait_for_all(world_size)
            if is_main_process():
                outputs, facts = writer.write_indices(sources)
                write_skipped(run_dir.path / "skipped.jsonl", sources)
                run_dir.finish(outputs, **facts)
        if config.verify and is_main_process():
            writer.verify()


def _open_sources(config: ExtractEmbeddingsConfig) -> list[CaptionData]:
    return [
        CaptionData.open(source.path, source.fields, max_bad_fraction=config.max_bad_fraction)
        for source in config.data
    ]


def _fingerprints(config: ExtractEmbeddingsConfig, sources: Sequence[CaptionData]) -> dict[str, str]:
    if not (config.teacher / "teacher.json").is_file():
        raise FileNotFoundError(
            f"teacher: {config.teacher} is no teacher, it has no teacher.json; make one with `llm2clip finetune-llm`"
        )
    data = {f"data.{number}": source.fingerprint for number, source in enumerate(sources)}
    return {"teacher": fingerprint(config.teacher), **data}


def _join_processes() -> tuple[int, int]:
    """Rank and number of processes.

    They only wait for each other, through gloo also on GPUs: that notices at once when another one dies, and has no
    watchdog that would end a run because one process has a shard more to do.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timedelta(days=30))
    return int(os.environ.get("RANK", "0")), world_size


def _wait_for_all(world_size: int) -> None:
    if world_size > 1:
        import torch.distributed as dist

        dist.barrier()
