"""Real tokens per second of a LLaVA training step, beside the stock model on randomly ordered, padded batches.

    python scripts/bench_llava.py [--root runs/demo] [--rounds 6]

Both do the same number of real samples with the demo's tower, LLM and dialogues (run scripts/llava_finetune.sh first),
forward and backward, in turns within one process, so that both see the same machine. The peer is what transformers'
Trainer does by default: random order, padding to the longest of the batch, logits and loss at every position.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

from llava_bridge.compose import compose
from llava_bridge.dataset import DialogueCollator, DialogueEncoder, DialogueStream, training_order
from llava_bridge.dialogues import DialogueData
from llava_bridge.export_files import image_processor_for
from llava_bridge.modeling import LlavaForTraining
from llava_bridge.tuning import LoraConfig, TuneConfig, set_trainable


def batches(data: DialogueData, parts, template: str, *, grouped: bool, size: int, count: int) -> list[dict]:
    """`count` batches, ordered as ours are or at random."""
    order = training_order(
        data, parts.tokenizer, num_steps=-(-len(data) // size), batch_size=size, window=1, seed=0, grouped=grouped,
        compat=False,
    )  # fmt: skip
    processor = image_processor_for(parts.image_processor, "square")
    system = None if template == "plain" else ""
    encoder = DialogueEncoder(template, system, parts.tokenizer, processor, parts.spec.num_image_tokens, 2048)
    stream = DialogueStream(data, encoder, order, skipped_file=Path("/dev/null"), max_bad_fraction=0.1)
    collate = DialogueCollator(parts.tokenizer.pad_token_id)
    made: list[dict] = []
    start = 0
    while len(made) < count:
        batch = collate([stream[start + i] for i in range(size)])
        start += size
        if "pixel_values" in batch:  # the stock model cannot train on a batch without images under ZeRO-3
            made.append(batch)
    return made


def seconds(model, batch: dict, ours: bool) -> float:
    """One forward and backward pass."""
    begun = time.perf_counter()
    output = model(**batch)
    loss = output.token_losses.mean() if ours else output.loss
    loss.backward()
    model.zero_grad()
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("runs/demo"))
    parser.add_argument("--rounds", type=int, default=6)
    args = parser.parse_args()
    tower, llm = str(args.root / "tower-llm2clip/seed-0/vision_tower"), "runs/assets/smollm2-135m-instruct"
    for stage, template, size in (("pretrain", "plain", 32), ("finetune", "chat", 8)):
        data = DialogueData.open(args.root / "llava/questions" / f"{stage}.json")
        sides = {}
        for ours, model_class in ((True, LlavaForTraining), (False, LlavaForConditionalGeneration)):
            parts = compose(tower, llm, model_class=model_class)
            if ours:
                parts.model.prepare_for_training(parts.spec)
                set_trainable(parts.model, TuneConfig(llm="full" if stage == "finetune" else "frozen"), LoraConfig())
            else:
                for name, parameter in parts.model.named_parameters():
                    trained = "projector" in name or (stage == "finetune" and "vision_tower" not in name)
                    parameter.requires_grad_(trained)
            sides[ours] = parts.model, batches(data, parts, template, grouped=ours, size=size, count=args.rounds + 1)
        rates: dict[bool, list[float]] = {True: [], False: []}
        for number in range(args.rounds + 1):
            for ours, (model, made) in sides.items():
                took = seconds(model, made[number], ours)
                if number:  # the first warms up
                    rates[ours].append(float(made[number]["attention_mask"].sum()) / took)
        mean = {ours: statistics.harmonic_mean(values) for ours, values in rates.items()}
        padding = {
            ours: 1 - sum(b["attention_mask"].sum() for b in made) / sum(b["attention_mask"].numel() for b in made)
            for ours, (_, made) in sides.items()
        }
        print(
            f"{stage}: ours {mean[True]:.0f} real tokens/s ({padding[True]:.0%} padding), stock {mean[False]:.0f} "
            f"({padding[False]:.0%}); ratio {mean[True] / mean[False]:.2f}; torch {torch.__version__}"
        )


if __name__ == "__main__":
    main()
