"""SmolLM2-135M-Instruct: from a llama.cpp GGUF file to an ordinary `LlamaForCausalLM` directory in fp32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_path: Path, output_dir: Path) -> None:
    """Write config, fp32 safetensors, fast tokenizer and chat template.

    transformers' own GGUF loader keeps the weights quantised in some versions and then refuses to save them.

    Args:
        gguf_path: a GGUF file of the Llama architecture with tied embeddings and a byte-level BPE vocabulary.
        output_dir: directory to write.

    Raises:
        ValueError: if the file is of another architecture or lacks a tensor.
    """
    reader = GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama" or fields["tokenizer.ggml.model"] != "gpt2":
        raise ValueError(
            f"{gguf_path}: architecture {fields['general.architecture']!r} with tokenizer "
            f"{fields['tokenizer.ggml.model']!r}, expected 'llama' with 'gpt2'"
        )
    config = _config(fields)
    state = {name: torch.from_numpy(values) for name, values in _tensors(reader, config)}
    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    del expected["lm_head.weight"]  # tied to the embeddings
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in expected.items()}:
        raise ValueError(f"{gguf_path}: its tensors are not those of a Llama with tied embeddings: {shapes}")
    output_dir.mkdir(parents=True, exist_ok=True)
    save_file(state, output_dir / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(output_dir)
    GenerationConfig.from_model_config(config).save_pretrained(output_dir)
    _tokenizer(fields).save_pretrained(output_dir)
    _name_tokenizer_class(output_dir)


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )


def _tensors(reader: GGUFReader, config: LlamaConfig):
    for tensor in reader.tensors:
        *block, part, suffix = tensor.name.split(".")
        name = ".".join([*(["model.layers", block[1]] if block else []), TENSOR_NAMES[part], suffix])
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if part == "attn_q":
            values = undo_rope_permutation(values, config.num_attention_heads)
        elif part == "attn_k":
            values = undo_rope_permutation(values, config.num_key_value_heads or config.num_attention_heads)
        yield name, np.ascontiguousarray(values)


def undo_rope_permutation(weight: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key projection from llama.cpp's interleaved pairs to Hugging Face's halves.

    Inverse of `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py.

    Args:
        weight: (num_heads * head_dim, hidden).
        num_heads: heads of this projection.
    """
    rows, columns = weight.shape
    paired = weight.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerFast:
    tokens = fields["tokenizer.ggml.tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # "smollm" pre-tokenisation: every digit alone, then GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [AddedToken(token, special=True, normalized=False) for token, kind in zip(tokens, types, strict=True)
               if kind == CONTROL_TOKEN]  # fmt: skip
    tokenizer.add_special_tokens(control)

    def token(name: str) -> str:
        return tokens[fields[f"tokenizer.ggml.{name}_token_id"]]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        extra_special_tokens=[added.content for added in control],
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _name_tokenizer_class(output_dir: Path) -> None:
    """transformers 5 writes the class under a new name; the old one loads in 4.x and 5.x."""
    path = output_dir / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
