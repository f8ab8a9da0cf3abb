"""Stage 1: turn a decoder LLM into a caption encoder, the teacher.

Reads an LLM, caption data and text pairs. Writes a teacher directory (see `llm2clip.teacher`), `cra.json` (caption
retrieval accuracy before and after) and `skipped.jsonl` (rows that could not be used).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from llm2clip.caption_pairs import CaptionPairs, CaptionSource, TextPairs, TextSource, source_weights
from llm2clip.caption_sources import write_skipped
from llm2clip.config import StageCall, StageConfig, parse_stage
from llm2clip.mntp import MntpConfig
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, model_fingerprint

TYPE_CHECKING = False  # typing's own would not do: jsonargparse executes such blocks, and --help would import torch
if TYPE_CHECKING:
    from llm2clip.caption_data import CaptionData
    from llm2clip.teacher import CaptionEncoder, TeacherSpec

logger = logging.getLogger(__name__)

STAGE = "finetune-llm"
CRA = "cra.json"


@dataclass(kw_only=True)
class LLMSettings:
    """The LLM and how captions go through it."""

    name: str
    """Directory or hub id of any decoder LLM."""
    num_hidden_layers: int | None = None
    """Keep only that many of the lowest layers; default all."""
    adapters: list[str] = field(default_factory=list)
    """PEFT adapters of its decoder that are merged first, in this order."""
    bidirectional: bool = True
    """Let every token see every other one."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the weights, also of the teacher that is written."""
    attn_implementation: str | None = None
    """sdpa, eager, flash_attention_2 ...; default transformers' choice."""
    pooling: Literal["mean", "last", "weighted_mean"] = "mean"
    """Over caption and suffix; over BOS, prefix and instruction only where the text had to be cut."""
    max_length: int = 512
    """Tokens; longer captions are cut."""
    chat: Literal["template", "none", "custom"] = "template"
    """Wrap captions in the user turn of the tokenizer's chat template, in nothing, or in the two texts below."""
    chat_prefix: str = ""
    """In front of the caption, for `chat: custom`."""
    chat_suffix: str = ""
    """Behind the caption, for `chat: custom`; it is pooled too."""


@dataclass(kw_only=True)
class LoraSettings:
    """Low-rank adapters, merged at the end."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    """Last parts of the names of the linear layers."""
    num_layers: int | None = None
    """Only the topmost layers; default all. No gradient is computed below them."""


@dataclass(kw_only=True)
class LossSettings:
    """Cross-entropy of cosines."""

    scale: float = 50.0
    """Multiplier of the cosines, a temperature of 0.02."""
    symmetric: bool = False
    """Also rank the queries for each positive."""
    mask_false_negatives: bool = True
    """Leave out candidates that have the text of the query or its positive, or are of the same image. The original
    keeps them, so that equal captions push each other away."""


@dataclass(kw_only=True)
class EvaluationPool:
    """Images of which two captions should find each other."""

    path: Path
    """Caption data."""
    query: str
    """Caption kind of one of them; its first caption is taken."""
    positive: str
    """Caption kind of the other."""
    fields: dict[str, str] | None = None
    """Caption kind -> field name, for foreign files."""
    name: str | None = None
    """In the report; default made of path and kinds."""

    @property
    def label(self) -> str:
        return self.name or f"{self.path.name}: {self.query} - {self.positive}"


@dataclass(kw_only=True)
class FinetuneLLMConfig(StageConfig):
    """Turn a decoder LLM into a caption encoder: bidirectional attention, pooling, caption contrastive tuning."""

    model: LLMSettings
    captions: list[CaptionSource] = field(default_factory=list)
    """Images with captions; two captions of one image are a pair."""
    texts: list[TextSource] = field(default_factory=list)
    """Files of text pairs, mixed in."""
    batches: Literal["one_source", "mixed"] = "one_source"
    """Whether the pairs that are contrasted with each other come from one source."""
    tune: bool = True
    """false: write the LLM, bidirectional and pooled, as a teacher without any training."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    merge_share: float = 1.0
    """Share of the learned change that is merged. Less than 1 keeps more of what the LLM had, such as where things are
    (weights between old and new, as in WiSE-FT, arXiv 2109.01903)."""
    loss: LossSettings = field(default_factory=LossSettings)
    mntp: MntpConfig | None = None
    """Train masked next token prediction first; off in the paper."""
    evaluation: list[EvaluationPool] = field(default_factory=list)
    """Where caption retrieval accuracy is measured, before and after."""
    length_groups: int = 1
    """Encode a batch in that many parts, sorted by length: less padding, the same result."""
    max_bad_fraction: float = 0.01
    """Fail if more of the rows of a source are unusable."""

    def __post_init__(self) -> None:
        problems = []
        if self.tune and not self.captions and not self.texts:
            problems.append("captions and texts are both empty; name at least one, or set tune to false")
        if not self.tune and self.mntp:
            problems.append("mntp trains, but tune is false")
        weighted = [source.weight is not None for source in (*self.captions, *self.texts)]
        if any(weighted) and not all(weighted):
            problems.append("captions.weight, texts.weight: give one to every source or to none")
        for source in (*self.captions, *self.texts):
            if source.weight is not None and source.weight <= 0:
                problems.append(f"weight of {source.path} is {source.weight}, expected more than 0")
        for source in self.captions:
            weights = [pair.weight for pair in source.pairs]
            if weights and (min(weights) < 0 or max(weights) == 0):
                problems.append(
                    f"captions.pairs of {source.path}: weights {weights}, expected one above 0, none below"
                )
        if self.model.chat != "custom" and (self.model.chat_prefix or self.model.chat_suffix):
            problems.append(f"model.chat_prefix and chat_suffix need model.chat custom, it is {self.model.chat}")
        for key, value in (
            ("lora.rank", self.lora.rank),
            ("length_groups", self.length_groups),
            ("model.max_length", self.model.max_length),
            ("loss.scale", self.loss.scale),
        ):
            if value <= 0:
                problems.append(f"{key} is {value}, expected more than 0")
        if not 0 < self.merge_share <= 1:
            problems.append(f"merge_share is {self.merge_share}, expected more than 0 and at most 1")
        labels = [pool.label for pool in self.evaluation]
        if len(set(labels)) < len(labels):
            problems.append(f"evaluation: names must differ, got {labels}")
        if problems:
            raise ValueError("; ".join(problems))


class Sources(NamedTuple):
    """Everything that is read besides the LLM, opened and checked."""

    captions: list[CaptionPairs]
    texts: list[TextPairs]
    pools: list[CaptionData]


def parse(argv: Sequence[str] | None = None) -> StageCall[FinetuneLLMConfig]:
    """Parse the command line of `llm2clip finetune-llm`."""
    return parse_stage(
        FinetuneLLMConfig,
        argv,
        prog=f"llm2clip {STAGE}",
        training_class="llm2clip.caption_training:TeacherTrainingArguments",
    )


def inputs(call: StageCall[FinetuneLLMConfig]) -> dict[str, str]:
    """Fingerprints of the LLM and of all captions and texts."""
    return _fingerprints(call.config, _open(call.config))


def main(argv: Sequence[str] | None = None) -> None:
    """`llm2clip finetune-llm`."""
    run(parse(argv))


def run(call: StageCall[FinetuneLLMConfig]) -> None:
    """Make the teacher, unless it is there.

    Raises:
        FileNotFoundError: if the LLM, an adapter or data are missing.
        ValueError: if one of them is not as it should be.
        RuntimeError: if the loss is not finite.
    """
    sources = _open(call.config)
    with RunDir(call, stage=STAGE, inputs=_fingerprints(call.config, sources)) as run_dir:
        if run_dir.complete:
            logger.info("%s: already complete, %s", STAGE, run_dir.path)
            return
        _make_teacher(call, run_dir, sources)


def _make_teacher(call: StageCall[FinetuneLLMConfig], run_dir: RunDir, sources: Sources) -> None:
    import transformers
    from accelerate import PartialState

    from llm2clip.caption_training import tune_encoder
    from llm2clip.llm import merge_adapter
    from llm2clip.mntp import train_mntp
    from llm2clip.teacher import CaptionEncoder

    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()
    config = call.config
    training: Any = call.training
    processes = PartialState()
    spec = _spec(config.model)
    load = {
        "dtype": config.model.dtype,
        "attn_implementation": config.model.attn_implementation,
        "device": training.device,
    }
    encoder = CaptionEncoder.from_llm(config.model.name, spec=spec, **load)
    for adapter in config.model.adapters:
        merge_adapter(encoder.llm, adapter)
        spec.stages.append({"stage": "adapter", "name": adapter})
    if processes.is_main_process:
        used = [*(pairs.data for pairs in sources.captions), *sources.texts, *sources.pools]
        write_skipped(run_dir.path / "skipped.jsonl", used)
        if not (run_dir.path / CRA).is_file():  # else it was measured before a kill
            _write_cra(run_dir.path, {"before": _accuracies(config, sources, encoder)})
    processes.wait_for_everyone()
    if config.mntp:
        adapter = run_dir.path / "mntp" / "adapter"
        stage = train_mntp(
            config.mntp,
            training,
            load={
                "name": config.model.name,
                "num_hidden_layers": spec.num_hidden_layers,
                "bidirectional": spec.bidirectional,
                **load,
            },
            adapters=config.model.adapters,
            lora=asdict(config.lora),
            data=[pairs.data for pairs in sources.captions],
            output_dir=adapter.parent,
        )
        training = replace(training)  # accelerate takes DeepSpeed's settings for a second Trainer from new ones only
        merge_adapter(encoder.llm, adapter)
        spec.stages.append(stage)
    trainer = None
    if config.tune:
        pairs = [*sources.captions, *sources.texts]
        trainer = tune_encoder(
            encoder,
            training,
            pairs,
            source_weights([*config.captions, *config.texts], [len(source) for source in pairs]),
            batches=config.batches,
            lora=asdict(config.lora),
            merge_share=config.merge_share,
            loss=asdict(config.loss),
            length_groups=config.length_groups,
        )
    if processes.is_main_process:
        outputs = _save(encoder, run_dir.path)
        cra = json.loads((run_dir.path / CRA).read_text(encoding="utf-8"))
        cra["after"] = _accuracies(config, sources, encoder) if spec.stages else cra["before"]
        _write_cra(run_dir.path, cra)
        run_dir.finish(outputs=outputs, teacher=asdict(spec), cra=cra)
    if trainer is not None:
        trainer.remove_checkpoints()
    processes.wait_for_everyone()


def _open(config: FinetuneLLMConfig) -> Sources:
    """Open and check all captions and texts."""
    from llm2clip.caption_data import CaptionData

    def data(source: CaptionSource | EvaluationPool) -> CaptionData:
        return CaptionData.open(source.path, source.fields, max_bad_fraction=config.max_bad_fraction)

    return Sources(
        captions=[CaptionPairs(data(source), source) for source in config.captions],
        texts=[TextPairs(source, max_bad_fraction=config.max_bad_fraction) for source in config.texts],
        pools=[data(pool) for pool in config.evaluation],
    )


def _fingerprints(config: FinetuneLLMConfig, sources: Sources) -> dict[str, str]:
    found = {"model": model_fingerprint(config.model.name)}
    for number, adapter in enumerate(config.model.adapters):
        found[f"adapters.{number}"] = model_fingerprint(adapter)
    for number, pairs in enumerate(sources.captions):
        found[f"captions.{number}"] = pairs.data.fingerprint
    for number, source in enumerate(config.texts):
        found[f"texts.{number}"] = fingerprint(source.path)
    for number, pool in enumerate(sources.pools):
        found[f"evaluation.{number}"] = pool.fingerprint
    for number, path in enumerate(config.mntp.text_files if config.mntp else ()):
        found[f"mntp.text_files.{number}"] = fingerprint(path)
    return found


def _spec(settings: LLMSettings) -> TeacherSpec:
    from transformers import AutoTokenizer

    from llm2clip.llm import load_llm_config
    from llm2clip.teacher import TeacherSpec, derive_chat_wrapper

    num_hidden_layers = load_llm_config(settings.name, settings.num_hidden_layers).num_hidden_layers
    prefix, suffix = settings.chat_prefix, settings.chat_suffix
    if settings.chat == "template":
        prefix, suffix = derive_chat_wrapper(AutoTokenizer.from_pretrained(settings.name))
    return TeacherSpec(
        base_model=settings.name,
        num_hidden_layers=num_hidden_layers,
        bidirectional=settings.bidirectional,
        pooling=settings.pooling,
        max_length=settings.max_length,
        chat_prefix=prefix,
        chat_suffix=suffix,
    )


def _accuracies(config: FinetuneLLMConfig, sources: Sources, encoder: CaptionEncoder) -> dict[str, dict[str, float]]:
    """Caption retrieval accuracy on each evaluation pool."""
    from llm2clip.caption_retrieval import caption_pool, caption_retrieval_accuracy

    results = {}
    for pool, data in zip(config.evaluation, sources.pools, strict=True):
        queries, positives = caption_pool(data, pool.query, pool.positive)
        result = results[pool.label] = caption_retrieval_accuracy(encoder, queries, positives)
        logger.info(
            "caption retrieval, %s: %.3f / %.3f of %d",
            *(pool.label, result["query_to_positive"], result["positive_to_query"], result["num_images"]),
        )
    return results


def _write_cra(path: Path, cra: dict[str, Any]) -> None:
    atomic_write(path / CRA, json.dumps(cra, indent=2) + "\n")


def _save(encoder: CaptionEncoder, path: Path) -> list[str]:
    """Write the teacher's files into the run directory; returns their names."""
    with TemporaryDirectory(dir=path, prefix=".teacher-") as temporary:
        encoder.save_pretrained(temporary)
        names = sorted(os.listdir(temporary))
        for name in names:
            os.replace(Path(temporary) / name, path / name)
    return names
