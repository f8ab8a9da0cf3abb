"""Tiny LLaVA models exported, with the references of the models they were exported from; shared by tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from tiny_llava import IMAGE_TOKENS, llava_model, llava_tokenizer, tower_processor

from llava_bridge import export_check, export_verify
from llava_bridge.dialogues import Turn
from llava_bridge.export_files import image_processor_for, write_llava
from llava_bridge.templates import export_chat_template, generation_prompt, token_ids

TURNS = [Turn(message["role"], message["content"]) for message in export_verify.CONVERSATION]  # type: ignore[arg-type]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLMS: dict[str, dict[str, Any]] = {
    "llama3": {"llm": "llama", "rope_parameters": LLAMA3},
    "qwen2": {"llm": "qwen2", "rope_parameters": {"rope_theta": 1e6}, "tie_word_embeddings": True},
    "mistral": {"llm": "mistral"},
    "mixtral": {"llm": "mixtral", "num_local_experts": 4},
}


class Export:
    """An exported model, and the reference of the model it was exported from."""

    def __init__(
        self, directory: Path, kind: str = "clip", *, template: Any = "chat", aspect: Any = "pad", **llm: Any
    ):
        self.directory = directory / "llava"
        self.file = directory / "reference.safetensors"
        self.tokenizer = llm.pop("tokenizer", None) or llava_tokenizer()
        self.model = llava_model(kind, self.tokenizer, **llm)
        processor = tower_processor(kind)
        write_llava(
            self.directory,
            self.model,
            self.tokenizer,
            processor,
            image_aspect=aspect,
            chat_template=export_chat_template(template, self.tokenizer),
        )
        prompt = generation_prompt(template, TURNS, self.tokenizer).replace("<image>", "<image>" * IMAGE_TOKENS[kind])
        self.reference = export_verify.make_reference(
            self.model, self.tokenizer, image_processor_for(processor, aspect), token_ids(prompt, self.tokenizer)
        )
        save_file(self.reference.tensors, self.file, metadata=self.reference.metadata)

    def problems(self) -> list[str]:
        report = export_check.check(str(self.directory), str(self.file))
        return export_verify.find_problems(report)


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def sentencepiece_tokenizer() -> transformers.LlamaTokenizer:
    """A tokenizer of Llama's class, whose 4.x form rebuilds it by other rules than 5.x's."""
    words = ["▁a", "▁red", "▁cat", "▁is", "▁in", "▁the", "▁image", "▁USER", "▁ASSISTANT"]
    pieces: dict[str, None] = dict.fromkeys(["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))])
    pieces |= dict.fromkeys("▁.?:, ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz'")
    merges = {(word[:end], word[end]): None for word in words for end in range(1, len(word))}
    pieces |= dict.fromkeys("".join(pair) for pair in merges)
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = transformers.LlamaTokenizer(vocab=vocabulary, merges=list(merges))
    tokenizer.add_tokens([transformers.AddedToken("<image>", normalized=False, special=True)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer
