"""Tiny random models and tokenizers, built in a second without any download; shared by the tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CORPUS = (
    "a red cat sits to the left of a blue dog near the big tree",
    "two taxis and one bus drive above a small house in the snow",
    "the image shows a green apple in the top left corner and a turkey below it",
    "Given a caption, retrieve a similar relevant caption; Given a detailed sentence, retrieve a short one",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}<|start|>system\nBe helpful.<|end|>\n{% endif %}"
    "{% for message in messages %}<|start|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""ChatML with a default system turn, as SmolLM2 and Qwen2 have it."""


def tiny_tokenizer(*, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of about 400 entries that puts a BOS token in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<|start|>", "<|end|>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", mask_token="<mask>"
    )
    fast.chat_template = chat_template
    return fast


def tiny_llm(directory: Path, *, seed: int = 0, num_hidden_layers: int = 3, **config: Any) -> Path:
    """Write a random Llama of width 32 and its tokenizer as an ordinary model directory.

    Args:
        directory: where to write.
        seed: of the weights.
        num_hidden_layers: decoder layers.
        config: further `LlamaConfig` fields.

    Returns:
        `directory`.
    """
    tokenizer = tiny_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**settings, **config}))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def tiny_clip_config(**vision: Any) -> CLIPConfig:
    """CLIP of width 32: 32-pixel images, 16-pixel patches, two layers in each tower, 16 shared dimensions."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **shared, vocab_size=len(tiny_tokenizer()), max_position_embeddings=64, eos_token_id=1, projection_dim=16
    )
    tower = CLIPVisionConfig(**{**shared, "image_size": 32, "patch_size": 16, "projection_dim": 16, **vision})
    return CLIPConfig(text_config=text.to_dict(), vision_config=tower.to_dict(), projection_dim=16)


def write_captions(directory: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write `rows`, as in `CaptionData`, to `directory/captions.jsonl`; returns `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return directory


def scene_captions(num_images: int) -> list[dict[str, Any]]:
    """Text-only rows with a raw caption and two long ones, all different from image to image."""
    colours = ("red", "green", "blue", "black", "white", "pink")
    things = ("cat", "dog", "taxi", "house", "apple", "turkey", "tree")
    rows = []
    for index in range(num_images):
        colour, thing = colours[index % len(colours)], things[index // len(colours) % len(things)]
        number = index // (len(colours) * len(things)) + 1
        rows.append(
            {
                "id": f"scene-{index}",
                "captions": {
                    "raw": f"{number} {colour} {thing}",
                    "long": [
                        f"the image shows {number} {thing} that is {colour}, in the top left corner",
                        f"in the top left corner there is a {colour} {thing}, counted {number}",
                    ],
                },
            }
        )
    return rows
