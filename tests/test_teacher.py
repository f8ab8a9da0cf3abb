from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import CHAT_TEMPLATE, tiny_llm, tiny_tokenizer
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaModel

from llm2clip.llm import add_lora, check_bidirectional, load_llm, merge_adapter, save_decoder_adapter
from llm2clip.run_dir import fingerprint
from llm2clip.teacher import (
    CaptionEncoder,
    CaptionTokenizer,
    TeacherSpec,
    derive_chat_wrapper,
    encode_texts,
    length_buckets,
    pool,
)

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"], "num_layers": None}
CAPTIONS = [
    "a red cat",
    "two taxis and one bus drive above a small house in the snow",
    "dog",
    "a blue dog near the tree",
]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_llm(tmp_path_factory.mktemp("llm") / "llm"))


def spec(llm: str, **settings) -> TeacherSpec:
    return TeacherSpec(**{"base_model": llm, "num_hidden_layers": 3, "max_length": 64, **settings})


def encoder(llm: str, **settings) -> CaptionEncoder:
    return CaptionEncoder.from_llm(llm, spec=spec(llm, **settings))


@torch.no_grad()
def test_every_token_sees_every_other_one(llm: str) -> None:
    model = encoder(llm).llm
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, 6, 7, 9]])
    moved = model(first).last_hidden_state[0, 0] - model(second).last_hidden_state[0, 0]
    assert moved.abs().max() > 1e-3
    causal, _ = load_llm(AutoModel, llm, bidirectional=False)
    assert torch.equal(causal(first).last_hidden_state[0, 0], causal(second).last_hidden_state[0, 0])


def test_a_family_that_ignores_is_causal_is_refused(monkeypatch: pytest.MonkeyPatch, llm: str) -> None:
    model, _ = load_llm(AutoModel, llm, bidirectional=False)
    with pytest.raises(ValueError, match=r"LlamaModel ignores is_causal=False \(without padding\)"):
        check_bidirectional(model)
    # The trap: a mask is followed only while there is padding, the kernel's own default rules otherwise.
    model.config.is_causal = False
    forward = LlamaModel.forward

    def forgetful(self, input_ids, attention_mask=None, **kwargs):
        self.config.is_causal = bool(attention_mask is None or attention_mask.all())
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", forgetful)
    with pytest.raises(ValueError, match="without padding"):
        check_bidirectional(model)


def test_padding_that_leaks_is_refused(monkeypatch: pytest.MonkeyPatch, llm: str) -> None:
    model, _ = load_llm(AutoModel, llm)
    forward = LlamaModel.forward
    monkeypatch.setattr(
        LlamaModel, "forward", lambda self, attention_mask=None, **kwargs: forward(self, attention_mask=None, **kwargs)
    )
    with pytest.raises(ValueError, match="padding changes the states"):
        check_bidirectional(model)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "gpt_neox", "opt"])
def test_decoder_families_become_bidirectional(family: str) -> None:
    shared = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    extra = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32}}.get(family, {})
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **shared, num_attention_heads=4, num_key_value_heads=4, **tokens, **extra)
    config.is_causal = False
    check_bidirectional(AutoModel.from_config(config).eval())


def test_a_model_without_attention_is_refused() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2)
    config.is_causal = False
    with pytest.raises(ValueError, match="MambaModel ignores is_causal"):
        check_bidirectional(AutoModel.from_config(config).eval())


@pytest.mark.parametrize("pooling", ["mean", "last", "weighted_mean"])
def test_pooling_equals_naive_loop(pooling) -> None:
    torch.manual_seed(0)
    states = torch.randn(4, 7, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0], [1] * 7, [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 1]])
    for row, vector in enumerate(pool(states, mask, pooling)):
        chosen = [states[row, t] for t in range(7) if mask[row, t]]
        weights = {"mean": [1] * len(chosen), "weighted_mean": range(1, len(chosen) + 1)}.get(pooling)
        weights = weights or [0] * (len(chosen) - 1) + [1]
        expected = sum(w * state for w, state in zip(weights, chosen, strict=True)) / sum(weights)
        torch.testing.assert_close(vector, expected)


@pytest.mark.parametrize("instruction", ["", "Given a caption, retrieve a similar relevant caption"])
@pytest.mark.parametrize("chat", [("", ""), ("<|start|>user\n", "<|end|>")])
@pytest.mark.parametrize("max_length", [64, 16])
def test_instruction_skipping_is_the_reference_rule(instruction: str, chat: tuple[str, str], max_length: int) -> None:
    """reference 1.4, written out: left-padded, the last N positions, N tokens in caption and suffix alone."""
    tokenizer = tiny_tokenizer()
    settings = {"base_model": "", "num_hidden_layers": 1, "max_length": max_length}
    batch = CaptionTokenizer(tokenizer, TeacherSpec(**settings, chat_prefix=chat[0], chat_suffix=chat[1]))(
        [f"  {caption}" for caption in CAPTIONS], [instruction] * len(CAPTIONS)
    )
    for row, caption in enumerate(CAPTIONS):
        header = f"{instruction}; " if instruction else ""
        joined = tokenizer(chat[0] + header + caption + chat[1], truncation=True, max_length=max_length)["input_ids"]
        body = tokenizer(caption + chat[1], add_special_tokens=False, truncation=True, max_length=max_length)
        num_pooled = min(len(body["input_ids"]), len(joined))
        expected = [0] * (len(joined) - num_pooled) + [1] * num_pooled
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == joined
        assert batch["pooling_mask"][row][real].tolist() == expected
        assert not batch["pooling_mask"][row][~real].any()
        assert joined[0] == tokenizer.bos_token_id


@torch.no_grad()
def test_prefix_and_instruction_act_but_are_not_pooled(llm: str) -> None:
    model = encoder(llm, chat_prefix="<|start|>user\n", chat_suffix="<|end|>")
    batch = model.tokenize(["a red cat"], ["Given a caption"])
    states = model.llm(input_ids=batch["input_ids"]).last_hidden_state[0]
    num_pooled = len(model.tokenizer("a red cat<|end|>", add_special_tokens=False)["input_ids"])
    torch.testing.assert_close(model(**batch)[0], states[-num_pooled:].mean(dim=0))
    assert not torch.allclose(model(**batch), model(**model.tokenize(["a red cat"], [""])), atol=1e-3)


@torch.no_grad()
def test_padding_and_batching_do_not_matter(llm: str) -> None:
    model = encoder(llm)
    together = encode_texts(model, CAPTIONS, batch_tokens=1000)
    alone = torch.cat([model(**model.tokenize([caption])) for caption in CAPTIONS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encode_texts(model, CAPTIONS, batch_tokens=1), alone, atol=1e-5, rtol=1e-5)
    assert together.dtype == torch.float32
    assert encode_texts(model, []).shape == (0, 32)


def test_length_buckets_hold_every_item_once_within_the_limit() -> None:
    lengths = [3, 50, 1, 7, 7, 20, 2]
    batches = length_buckets(lengths, batch_tokens=21)
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 21 for batch in batches if len(batch) > 1)
    assert len(batches) < 7


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_empty_caption_is_refused(llm: str, text: str) -> None:
    with pytest.raises(ValueError, match="text 1 is empty"):
        encode_texts(encoder(llm), ["a cat", text])


def test_long_and_foreign_captions_are_encoded(llm: str) -> None:
    texts = ["word " * 10_000, "猫 が 座っている 🐱", "кошка", "a\x00b", "‮قطة"]
    vectors = encode_texts(encoder(llm), texts)
    assert vectors.isfinite().all()
    assert len(vectors.unique(dim=0)) == len(texts)


LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "wrapper"),
    [
        (LLAMA_3, ("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>")),
        (MISTRAL, ("[INST] ", " [/INST]")),
        (LLAMA_2, ("[INST] ", " [/INST]")),  # has a BOS token in front of every turn
        (GEMMA, ("<start_of_turn>user\n", "<end_of_turn>")),
        (CHAT_TEMPLATE, ("<|start|>user\n", "<|end|>")),  # has a default system turn
    ],
)
def test_chat_wrapper_is_the_lone_user_turn(template: str, wrapper: tuple[str, str]) -> None:
    assert derive_chat_wrapper(tiny_tokenizer(chat_template=template)) == wrapper


def test_no_chat_template_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(ValueError, match="set model.chat to none"):
        derive_chat_wrapper(tiny_tokenizer(chat_template=None))


def test_only_the_lowest_layers_are_kept(llm: str) -> None:
    whole, kept = encoder(llm), encoder(llm, num_hidden_layers=2)
    assert len(kept.llm.layers) == kept.llm.config.num_hidden_layers == 2
    for layer in range(2):
        assert torch.equal(kept.llm.layers[layer].mlp.up_proj.weight, whole.llm.layers[layer].mlp.up_proj.weight)
    with pytest.raises(ValueError, match="num_hidden_layers is 4, but .* has 1 to 3 layers"):
        encoder(llm, num_hidden_layers=4)


def test_lists_with_an_entry_for_each_layer_are_cut_too(tmp_path: Path) -> None:
    shared = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    config = AutoConfig.for_model("qwen3", **shared, num_attention_heads=4, num_key_value_heads=2)
    assert len(config.layer_types) == 4
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    kept = CaptionEncoder.from_llm(str(tmp_path), spec=spec(str(tmp_path), num_hidden_layers=2))
    assert len(kept.llm.config.layer_types) == len(kept.llm.layers) == 2


def test_reload_gives_the_same_vectors_also_in_plain_transformers(llm: str, tmp_path: Path) -> None:
    made = encoder(llm, num_hidden_layers=2, chat_suffix="<|end|>", pooling="weighted_mean")
    expected = encode_texts(made, CAPTIONS)
    made.save_pretrained(tmp_path)
    again = CaptionEncoder.from_pretrained(tmp_path)
    assert torch.equal(encode_texts(again, CAPTIONS), expected)
    assert again.spec == made.spec
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    code = (
        "import sys, torch\nfrom transformers import AutoModel, AutoTokenizer\n"
        "model = AutoModel.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor([[0, 5, 6, 7]])\n"
        "torch.save(model(ids).last_hidden_state.detach(), sys.argv[1] + '/states.pt')\n"
        "assert 'llm2clip' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True)
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    torch.testing.assert_close(states, made.llm(torch.tensor([[0, 5, 6, 7]])).last_hidden_state)


def test_what_is_written_does_not_depend_on_what_was_encoded_before(llm: str, tmp_path: Path) -> None:
    used = encoder(llm)
    encode_texts(used, CAPTIONS)
    used.save_pretrained(tmp_path / "used")
    encoder(llm).save_pretrained(tmp_path / "unused")
    assert fingerprint(tmp_path / "used") == fingerprint(tmp_path / "unused")


def test_a_teacher_whose_llm_lost_its_setting_is_refused(llm: str, tmp_path: Path) -> None:
    encoder(llm).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "is_causal": True}))
    with pytest.raises(ValueError, match="ignores is_causal"):
        CaptionEncoder.from_pretrained(tmp_path)


def test_missing_teacher_and_llm_are_told(llm: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no teacher: it has no teacher.json"):
        CaptionEncoder.from_pretrained(llm)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        CaptionEncoder.from_pretrained(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="model.name: no LLM at"):
        CaptionEncoder.from_llm(str(tmp_path / "nothing"), spec=spec(llm))


def test_teacher_json_of_another_shape_is_refused(llm: str, tmp_path: Path) -> None:
    encoder(llm).save_pretrained(tmp_path)
    (tmp_path / "teacher.json").write_text('{"base_model": "x", "num_hidden_layers": 3, "poling": "mean"}')
    with pytest.raises(ValueError, match="poling"):
        CaptionEncoder.from_pretrained(tmp_path)


def test_lora_on_the_top_layers_needs_no_gradient_below(llm: str) -> None:
    made = encoder(llm)
    model = add_lora(made, made.llm, **{**LORA, "num_layers": 1})
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".layers.2." in name and "lora_" in name for name in trainable)
    seen: list[bool] = []
    for layer in made.llm.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].requires_grad))
    output = model(**made.tokenize(CAPTIONS))
    assert output.requires_grad
    assert seen == [False, False, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 4}, "lora.num_layers is 4, but the model has 1 to 3 layers"),
        ({"target_modules": ["q_proj", "c_attn"]}, r"lora.target_modules: \['c_attn'\] not in LlamaModel"),
    ],
)
def test_lora_that_does_not_fit_is_refused(llm: str, change: dict, message: str) -> None:
    made = encoder(llm)
    with pytest.raises(ValueError, match=message):
        add_lora(made, made.llm, **{**LORA, **change})


def randomized_lora(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


def test_adapter_of_the_model_with_head_takes_effect_on_the_decoder(llm: str, tmp_path: Path) -> None:
    """The original attaches decoder adapters to the model with its head, where they change nothing."""
    head, _ = load_llm(AutoModelForCausalLM, llm)
    model = add_lora(head, head.base_model, **LORA)
    randomized_lora(model)
    ids = torch.tensor([[0, 5, 6, 7]])
    expected = head.base_model(ids).last_hidden_state
    save_decoder_adapter(model, head, tmp_path / "adapter")

    plain, _ = load_llm(AutoModel, llm)
    before = plain(ids).last_hidden_state
    merged = merge_adapter(plain, tmp_path / "adapter")
    assert not torch.allclose(merged(ids).last_hidden_state, before, atol=1e-2)
    torch.testing.assert_close(merged(ids).last_hidden_state, expected, atol=1e-4, rtol=1e-4)


def test_adapter_with_other_keys_is_refused_not_ignored(llm: str, tmp_path: Path) -> None:
    head, _ = load_llm(AutoModelForCausalLM, llm)
    add_lora(head, head.base_model, **LORA).save_pretrained(str(tmp_path / "adapter"))  # keys of the outer model
    plain, _ = load_llm(AutoModel, llm)
    with pytest.raises(ValueError, match="does not fit LlamaModel: 12 keys are not in the model"):
        merge_adapter(plain, tmp_path / "adapter")
    with pytest.raises(FileNotFoundError, match="no PEFT adapter"):
        merge_adapter(plain, tmp_path / "nothing")


def test_weights_that_are_missing_are_told(tmp_path: Path) -> None:
    tiny_llm(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path)
    config.num_hidden_layers = 4
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights for .*layers.3"):
        CaptionEncoder.from_llm(str(tmp_path), spec=spec(str(tmp_path), num_hidden_layers=4))
