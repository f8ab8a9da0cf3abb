"""Stage `train-clip`: train a CLIP vision encoder against captions.

With `model.text: adapter` (LLM2CLIP) the text side is a small adapter on caption embeddings of a frozen LLM: reads
caption data and a directory of extract-embeddings. With `model.text: clip` (vanilla CLIP, the control) it is CLIP's
own text tower: reads caption data. Writes a model directory for `from_pretrained` with its image processor (and
tokenizer), metrics.jsonl and speed.jsonl.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip.caption_sources import write_skipped
from llm2clip.clip_config import TrainClipConfig
from llm2clip.config import StageCall, parse_stage
from llm2clip.run_dir import RunDir, is_main_process, model_fingerprint

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from llm2clip.caption_data import CaptionData
    from llm2clip.clip_dataset import CaptionSource, ClipStream
    from llm2clip.embedding_store import EmbeddingStore
    from llm2clip.images import ImageTransform
    from llm2clip.training_arguments import ClipTrainingArguments

logger = logging.getLogger(__name__)

STAGE = "train-clip"
MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    *("config.json", "*processor_config.json"),
    "*token*.json",
    "vocab.json",
    "merges.txt",
)
NUM_PCA_IMAGES = 1000
MAX_MOMENT_CAPTIONS = 65_536  # the mean of 65k unit vectors is known to 0.4 % of their spread


def parse(argv: Sequence[str] | None = None) -> StageCall[TrainClipConfig]:
    """Parse the command line of `llm2clip train-clip`.

    Raises:
        ValueError: for mistakes in the configuration.
    """
    training = "llm2clip.training_arguments:ClipTrainingArguments"
    call = parse_stage(TrainClipConfig, argv, prog=f"llm2clip {STAGE}", training_class=training)
    args: Any = call.training
    if call.config.ema_decay is not None and args.rounds_weights:
        raise ValueError(
            f"llm2clip {STAGE}: ema_decay averages float32 weights, but DeepSpeed with training.bf16 or training.fp16 "
            "leaves rounded ones in the model; train without training.deepspeed, in float32, or without ema_decay"
        )
    data = {key: value for key, value in call.resolved["data"].items() if key != "cache_images"}
    return replace(call, resolved={**call.resolved, "data": data})  # a cache does not make it another run


def inputs(call: StageCall[TrainClipConfig]) -> dict[str, str]:
    """Fingerprints of captions, embeddings, the model to start from and the tokenizer."""
    return _fingerprints(call.config, _open_data(call.config))


def _open_data(config: TrainClipConfig) -> list[CaptionData]:
    from llm2clip.caption_data import CaptionData

    bad = config.data.max_bad_fraction
    return [CaptionData.open(source.path, source.fields, max_bad_fraction=bad) for source in config.data.sources]


def _fingerprints(config: TrainClipConfig, data: Sequence[CaptionData]) -> dict[str, str]:
    found = {f"data.{number}": source.fingerprint for number, source in enumerate(data)}
    for name, path in (
        ("embeddings", config.embeddings),
        ("init_from", config.model.init_from),
        ("tokenizer", config.model.tokenizer),
    ):
        if path is not None:
            found[name] = model_fingerprint(path)
    return found


def run(call: StageCall[TrainClipConfig]) -> None:
    """Train, or continue a killed run, and write the model.

    Raises:
        FileNotFoundError: if data, embeddings or a model are missing.
        ValueError: if they do not belong together, or the output directory is another run's.
        RuntimeError: if the loss is not finite; names the step.
    """
    data = _open_data(call.config)
    sources, store = _open_sources(call.config, data)  # what does not fit together shows before anything is written
    with RunDir(call, stage=STAGE, inputs=_fingerprints(call.config, data)) as run_dir:
        if run_dir.complete:
            logger.info("%s: already complete, %s", STAGE, run_dir.path)
            return
        _train(call, sources, store, run_dir)


def _train(
    call: StageCall[TrainClipConfig], sources: Sequence[CaptionSource], store: EmbeddingStore | None, run_dir: RunDir
) -> None:
    import torch
    from transformers import set_seed

    from llm2clip import clip_init
    from llm2clip.callbacks import KeepFloat32
    from llm2clip.clip_dataset import CheckSkipped, EmbeddingCollator, TextCollator
    from llm2clip.losses import ClipObjective
    from llm2clip.patch_pca import init_patch_embedding
    from llm2clip.trainer import ClampLogitScale, StageTrainer
    from llm2clip.training_arguments import ClipTrainingArguments

    config, args = call.config, call.training
    assert isinstance(args, ClipTrainingArguments)
    set_seed(args.seed)
    model, tokenizer = _build_model(config, sources, store)
    clip_init.freeze(model, config.freeze)
    size = model.config.vision_config.image_size
    transform, processor = clip_init.image_transform(config.model.init_from, size, config.data.crop_scale)

    num_samples = sum(map(len, sources))
    args.max_steps = args.num_steps(num_samples)
    stream = _build_stream(config, args, sources, transform, skipped_file=run_dir.path / "skipped.jsonl")
    if config.model.patch_init == "pca":
        positions = range(0, len(stream), math.ceil(len(stream) / NUM_PCA_IMAGES))
        init_patch_embedding(model, torch.stack([stream[i]["pixel_values"] for i in positions]))
    if store is not None:
        collator = EmbeddingCollator(store)
    else:
        collator = TextCollator(tokenizer, model.config.text_config.max_position_embeddings)
    parameters = clip_init.count_parameters(model)
    for part, counts in parameters.items():
        logger.info("%s: %s: %d parameters trained, %d frozen", STAGE, part, counts["trained"], counts["frozen"])
    logger.info(
        "%s: %d images in %d sources, %d steps of %d", STAGE, num_samples, len(sources), args.max_steps,
        args.global_batch_size,
    )  # fmt: skip
    args.warn_of_accumulation("captions")
    callbacks: list[TrainerCallback] = [CheckSkipped(stream)]
    if model.logit_scale.requires_grad:
        callbacks.append(ClampLogitScale(model.logit_scale))
    if args.rounds_weights:
        callbacks.append(KeepFloat32(model))
    trainer = StageTrainer(
        model=model,
        args=args,
        train_dataset=stream,
        data_collator=collator,
        objective=ClipObjective(model, config.losses),
        lr_scale=clip_init.learning_rate_scale(
            _learning_rates(config, args.learning_rate),
            base=args.learning_rate,
            layer_decay=config.layer_decay,
            num_layers=model.config.vision_config.num_hidden_layers,
        ),
        ema_decay=config.ema_decay,
        callbacks=callbacks,
    )
    trainer.train()
    trainer.save_final(run_dir.path)
    if is_main_process():
        processor.save_pretrained(run_dir.path)
        if tokenizer is not None:
            tokenizer.save_pretrained(run_dir.path)
        num_skipped = write_skipped(run_dir.path / "skipped.jsonl", [source.data for source in sources])
        if num_skipped:
            logger.warning("%s: %d rows or captions were skipped, see skipped.jsonl", STAGE, num_skipped)
        run_dir.finish(
            sorted({path.name for pattern in MODEL_FILES for path in run_dir.path.glob(pattern)}),
            model_type=model.config.model_type,
            init_from=config.model.init_from,
            teacher_fingerprint=store.teacher_fingerprint if store else None,
            num_steps=args.max_steps,
            global_batch_size=args.global_batch_size,
            contrast_batch_size=args.contrast_batch_size,
            num_images=num_samples,
            num_skipped=num_skipped,
            parameters=parameters,
            metrics={name: value for name, value in trainer.state.log_history[-1].items() if name != "step"},
        )
    trainer.remove_checkpoints()


def _open_sources(
    config: TrainClipConfig, data: Sequence[CaptionData]
) -> tuple[list[CaptionSource], EmbeddingStore | None]:
    """Captions with their embeddings, checked against each other and the model that is continued."""
    from llm2clip.clip_dataset import CaptionSource
    from llm2clip.clip_init import read_config
    from llm2clip.embedding_store import EmbeddingStore

    kinds = {kind: probability for kind, probability in config.data.caption_kinds.items() if probability > 0}
    there = {kind for source in data for kind in source.kind_names}
    if unknown := kinds.keys() - there:
        raise ValueError(
            f"data.caption_kinds: no source has captions of kind {', '.join(sorted(unknown))}; "
            f"there are {', '.join(sorted(there))}"
        )
    if config.embeddings is None:
        return [CaptionSource(source, kinds) for source in data], None
    store = EmbeddingStore(config.embeddings)
    if config.model.init_from is not None:
        found = read_config(config.model.init_from)
        if found.model_type == "llm2clip":
            store.require(needed_by=config.model.init_from, dim=found.caption_embedding_dim)
            store.require(needed_by=config.model.init_from, teacher_fingerprint=found.teacher_fingerprint)
    return [CaptionSource(source, kinds, store.rows(source)) for source in data], store


def _build_model(
    config: TrainClipConfig, sources: Sequence[CaptionSource], store: EmbeddingStore | None
) -> tuple[Any, PreTrainedTokenizerBase | None]:
    """The model to train, and for `text: clip` its tokenizer."""
    from llm2clip import clip_init
    from llm2clip.modeling_clip import LLM2CLIPConfig

    settings = config.model
    logit_scale = math.log(settings.logit_scale_init)
    if store is None:
        tokenizer = clip_init.load_tokenizer(str(settings.init_from or settings.tokenizer))
        model = clip_init.init_clip(
            settings.init_from,
            tokenizer,
            settings.vision_config,
            settings.text_config,
            projection_dim=settings.projection_dim,
            logit_scale_init_value=logit_scale,
        )
        return model, tokenizer
    wanted = LLM2CLIPConfig(
        vision_config=settings.vision_config,
        caption_embedding_dim=store.dim,
        projection_dim=settings.projection_dim,
        adapter_num_blocks=settings.adapter_num_blocks,
        adapter_expansion=settings.adapter_expansion,
        caption_normalization=settings.caption_normalization,
        logit_scale_init_value=logit_scale,
        logit_bias_init_value=clip_init.SIGLIP_BIAS if config.losses.get("sigmoid") else None,
        teacher_fingerprint=store.teacher_fingerprint,
    )
    model = clip_init.init_llm2clip(settings.init_from, wanted)
    if model.config is wanted and settings.caption_normalization == "l2_standardize":  # continued ones have theirs
        model.text_adapter.set_moments(*store.moments(_sample_rows(sources)))
    return model, None


def _sample_rows(sources: Sequence[CaptionSource]) -> np.ndarray:
    """Embedding rows of captions that are trained on: all, or an even selection of many."""
    import numpy as np

    rows = [source.rows.rows[source.trained_captions()] for source in sources if source.rows is not None]
    joined = np.concatenate(rows)
    return joined[:: math.ceil(len(joined) / MAX_MOMENT_CAPTIONS)]


def _build_stream(
    config: TrainClipConfig,
    args: ClipTrainingArguments,
    sources: Sequence[CaptionSource],
    transform: ImageTransform,
    skipped_file: Path,
) -> ClipStream:
    from llm2clip.clip_dataset import ClipStream

    pairs = list(zip(sources, config.data.sources, strict=True))
    return ClipStream(
        sources,
        # by default the shares are the sizes, as in the original
        weights=[len(source) if (weight := s.weight) is None else weight for source, s in pairs],
        final_weights=[len(source) if (weight := s.last_weight) is None else weight for source, s in pairs],
        transform=transform,
        num_steps=args.max_steps,
        batch_size=args.global_batch_size,
        seed=args.seed,
        cache_images=config.data.cache_images,
        skipped_file=skipped_file,
        max_bad_fraction=config.data.max_bad_fraction,
    )


def _learning_rates(config: TrainClipConfig, base: float) -> dict[str, float]:
    given = {
        "vision": config.vision_learning_rate,
        "projection": config.projection_learning_rate,
        "text": config.text_learning_rate,
        "logit_scale": None,
    }
    return {part: base if rate is None else rate for part, rate in given.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """`llm2clip train-clip`."""
    run(parse(argv))
