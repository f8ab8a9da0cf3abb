"""Masked next token prediction (LLM2Vec, arXiv 2404.05961, section 2.2), the optional stage before caption tuning.

Tokens are masked and predicted, with bidirectional attention, from the state one position to their *left*: the head of
a causal LLM was trained to look there. The adapter is put on the inner decoder and saved with the decoder's own keys.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm2clip.run_dir import atomic_write

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llm2clip.caption_data import CaptionData
    from llm2clip.caption_training import TeacherTrainingArguments

logger = logging.getLogger(__name__)

IGNORED = -100  # label of positions without loss, as in transformers


@dataclass(kw_only=True)
class MntpConfig:
    """Defaults of LLM2CLIP `llm_caption_contrastive/train_configs/mntp/MetaLlama3_cc3m.json`, 8 processes."""

    text_files: list[Path] = field(default_factory=list)
    """Plain text, a paragraph per line, besides one caption of every image; the original takes wikitext-103."""
    max_steps: int = 10_000
    """Upper limit; the stage ends after one pass over the blocks."""
    learning_rate: float = 5e-5
    warmup_steps: int = 0
    per_device_batch_size: int = 32
    """Blocks in a batch on each device."""
    block_size: int = 512
    """Tokens in a block; texts are concatenated and cut."""
    mask_probability: float = 0.2
    """Share of the tokens to be predicted."""
    mask_token: Literal["blank", "eos", "mask"] = "blank"
    """What stands for a masked token: the text `_`, the EOS token, or the tokenizer's own mask token."""
    masking: Literal["default", "all_mask"] = "default"
    """`default`: of the chosen tokens 80 % are masked, 10 % random, 10 % kept (BERT); `all_mask`: all are masked."""


class Blocks:
    """A finite stream of masked blocks: `blocks[position]`, a pure function of the seed and the position.

    Args:
        tokens: (blocks, block_size), the text.
        config: how tokens are masked.
        mask_token_id: what stands for a masked token.
        special_ids: tokens that are never chosen.
        vocab_size: random tokens are drawn from it.
        num_positions: length of the stream.
        seed: of everything random.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        config: MntpConfig,
        *,
        mask_token_id: int,
        special_ids: Sequence[int],
        vocab_size: int,
        num_positions: int,
        seed: int,
    ) -> None:
        self._tokens = tokens
        self._config = config
        self._mask_token_id = mask_token_id
        self._special_ids = list(special_ids)
        self._vocab_size = vocab_size
        self._num_positions = num_positions
        self._seed = seed
        self._order = np.random.default_rng((seed, 3)).permutation(len(tokens))

    def __len__(self) -> int:
        return self._num_positions

    def __getitem__(self, position: int) -> dict[str, torch.Tensor]:
        """`input_ids` and `labels`, both (block_size,)."""
        import torch

        if not 0 <= position < self._num_positions:
            raise IndexError(position)
        rng = np.random.default_rng((self._seed, 4, position))
        block = self._tokens[self._order[position % len(self._order)]]
        chosen = (rng.random(len(block)) < self._config.mask_probability) & ~np.isin(block, self._special_ids)
        labels = np.where(chosen, block, IGNORED)
        fate = rng.random(len(block)) if self._config.masking == "default" else np.zeros(len(block))
        random_tokens = rng.integers(self._vocab_size, size=len(block))
        masked = np.select([fate < 0.8, fate < 0.9], [np.full_like(block, self._mask_token_id), random_tokens], block)
        return {
            "input_ids": torch.from_numpy(np.where(chosen, masked, block)),
            "labels": torch.from_numpy(labels),
        }


def tokenize_blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, block_size: int) -> np.ndarray:
    """Concatenate tokenised texts and cut them into blocks; the rest at the end is dropped.

    Returns:
        (blocks, block_size) int64.

    Raises:
        ValueError: if there is not even one block of text.
    """
    pieces, batch = [], []
    for text in texts:
        batch.append(text)
        if len(batch) == 1000:
            pieces += tokenizer(batch, return_attention_mask=False)["input_ids"]
            batch = []
    if batch:
        pieces += tokenizer(batch, return_attention_mask=False)["input_ids"]
    tokens = np.concatenate([np.asarray(piece, np.int64) for piece in pieces]) if pieces else np.empty(0, np.int64)
    num_blocks = len(tokens) // block_size
    if not num_blocks:
        raise ValueError(f"mntp.block_size is {block_size}, but all texts together have only {len(tokens)} tokens")
    return tokens[: num_blocks * block_size].reshape(num_blocks, block_size)


def read_texts(data: Sequence[CaptionData], text_files: Sequence[Path], seed: int) -> Iterable[str]:
    """One caption of every image, drawn once as in the original, then the paragraphs of the text files."""
    rng = np.random.default_rng((seed, 5))
    for source in data:
        for sample in source:
            yield sample.captions[rng.integers(len(sample.captions))].text
    for path in text_files:
        with open(path, encoding="utf-8") as file:
            yield from (line.strip() for line in file if line.strip())


def mask_token_id(tokenizer: PreTrainedTokenizerBase, mask_token: str) -> int:
    """Id of what stands for a masked token.

    Raises:
        ValueError: if the tokenizer has no such token.
    """
    if mask_token == "blank":
        ids = tokenizer.encode("_", add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"mntp.mask_token blank: '_' is {len(ids)} tokens in this tokenizer; choose eos or mask")
        return ids[0]
    token = tokenizer.eos_token_id if mask_token == "eos" else tokenizer.mask_token_id
    if not isinstance(token, int):
        raise ValueError(
            f"mntp.mask_token: the tokenizer has no {mask_token} token; choose another of blank, eos, mask"
        )
    return token


def train_mntp(
    config: MntpConfig,
    training: TeacherTrainingArguments,
    *,
    load: dict[str, Any],
    adapters: Sequence[str],
    lora: dict[str, Any],
    data: Sequence[CaptionData],
    output_dir: Path,
) -> dict[str, Any]:
    """Train an adapter by MNTP and save it, as PEFT does, for the decoder without its head.

    Args:
        config: the stage's settings.
        training: the caption stage's, for what is not in `config`: precision, seed, logging.
        load: arguments of `load_llm`.
        adapters: merged before, in order.
        lora: arguments of `add_lora`.
        data: images, one caption of each is learnt from, besides `config.text_files`.
        output_dir: gets `adapter/`, `metrics.jsonl`, `stage.json` last and, while it runs, `checkpoints/`.

    Returns:
        What is recorded about the stage.
    """
    record = output_dir / "stage.json"
    if record.is_file():  # it was trained before a kill
        return json.loads(record.read_text(encoding="utf-8"))
    from transformers import AutoModelForCausalLM, set_seed

    from llm2clip.callbacks import KeepFloat32, NoInputGradients
    from llm2clip.llm import add_lora, load_llm, merge_adapter, save_decoder_adapter
    from llm2clip.trainer import StageTrainer

    llm, tokenizer = load_llm(AutoModelForCausalLM, **load)
    for adapter in adapters:
        merge_adapter(llm.base_model, adapter)
    tokens = tokenize_blocks(read_texts(data, config.text_files, training.seed), tokenizer, config.block_size)
    args = replace(
        training,
        output_dir=str(output_dir / "checkpoints"),
        per_device_train_batch_size=config.per_device_batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type="linear",
        num_train_epochs=1,
        max_steps=-1,
    )
    args.max_steps = min(config.max_steps, args.num_steps(len(tokens)))
    blocks = Blocks(
        tokens,
        config,
        mask_token_id=mask_token_id(tokenizer, config.mask_token),
        special_ids=tokenizer.all_special_ids,
        vocab_size=len(tokenizer),
        num_positions=args.max_steps * args.global_batch_size,
        seed=args.seed,
    )
    logger.info("mntp: %d blocks of %d tokens, %d steps", len(tokens), config.block_size, args.max_steps)
    set_seed(args.seed)  # LoRA starts from random numbers
    model = add_lora(llm, llm.base_model, **lora)
    output_dir.mkdir(parents=True, exist_ok=True)
    trainer = StageTrainer(
        model=model,
        args=args,
        train_dataset=blocks,  # type: ignore[arg-type]  # map-style by its methods
        data_collator=_stack,
        objective=_objective,
        callbacks=[NoInputGradients(llm), *([KeepFloat32(model)] if args.rounds_weights else [])],
    )
    trainer.train()
    stage = {"stage": "mntp", "num_blocks": len(tokens), "num_steps": args.max_steps}
    if trainer.is_world_process_zero():
        save_decoder_adapter(model, llm, output_dir / "adapter")
        atomic_write(record, json.dumps(stage) + "\n")
    trainer.accelerator.wait_for_everyone()
    trainer.remove_checkpoints()
    return stage


def _stack(examples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


def _objective(output: Any) -> dict[str, torch.Tensor]:
    # The causal LM's own loss: its shift by one makes the state on the left predict a masked token.
    return {"loss": output.loss}
