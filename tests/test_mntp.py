from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import scene_captions, tiny_llm, tiny_tokenizer, write_captions
from transformers import AutoModel, AutoModelForCausalLM

from llm2clip.caption_data import CaptionData
from llm2clip.caption_training import TeacherTrainingArguments
from llm2clip.llm import load_llm, merge_adapter
from llm2clip.mntp import IGNORED, Blocks, MntpConfig, mask_token_id, read_texts, tokenize_blocks, train_mntp

MASK = 399
LORA = {"rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["q_proj", "down_proj"], "num_layers": None}


def blocks(**config) -> Blocks:
    tokens = np.arange(200 * 50).reshape(200, 50) % 300 + 5
    tokens[:, 7] = 0
    settings = {"mask_token_id": MASK, "special_ids": [0], "vocab_size": 390, "num_positions": 200, "seed": 0}
    return Blocks(tokens, MntpConfig(**config), **settings)


@pytest.mark.parametrize(("masking", "shares"), [("default", (0.8, 0.1, 0.1)), ("all_mask", (1.0, 0.0, 0.0))])
def test_a_fifth_is_chosen_and_masked_by_the_collators_shares(masking, shares: tuple[float, float, float]) -> None:
    stream = blocks(masking=masking)
    examples = [stream[position] for position in range(len(stream))]
    ids, labels = (torch.stack([example[name] for example in examples]) for name in ("input_ids", "labels"))
    chosen = labels != IGNORED
    eligible = 200 * 49
    assert chosen.sum().item() / eligible == pytest.approx(0.2, abs=4 * (0.16 / eligible) ** 0.5)
    assert not chosen[:, 7].any()  # special tokens never
    masked = ids[chosen] == MASK
    kept = ids[chosen] == labels[chosen]
    observed = (masked.float().mean(), (~masked & ~kept).float().mean(), kept.float().mean())
    np.testing.assert_allclose(observed, shares, atol=0.03)
    original = torch.stack([torch.from_numpy(stream._tokens[i]) for i in stream._order])
    assert torch.equal(torch.where(chosen, labels, ids), original)  # nothing else is changed


def test_blocks_depend_on_seed_and_position_only() -> None:
    first, second = blocks(), blocks()
    assert torch.equal(first[150]["input_ids"], second[150]["input_ids"])
    assert not torch.equal(first[150]["input_ids"], first[151]["input_ids"])
    with pytest.raises(IndexError):
        first[200]


def test_texts_are_concatenated_and_cut() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["a red cat", "two taxis", "the image shows a dog"] * 500
    tokens = tokenize_blocks(texts, tokenizer, 16)
    flat = [token for text in texts for token in tokenizer(text)["input_ids"]]
    assert tokens.reshape(-1).tolist() == flat[: len(flat) // 16 * 16]
    with pytest.raises(ValueError, match="mntp.block_size is 512, but all texts together have only"):
        tokenize_blocks(["short"], tokenizer, 512)


def test_one_caption_of_each_image_then_the_text_files(tmp_path: Path) -> None:
    data = CaptionData.open(write_captions(tmp_path, scene_captions(4)))
    (tmp_path / "wiki.txt").write_text("first line\n\n  second line \n", encoding="utf-8")
    texts = list(read_texts([data], [tmp_path / "wiki.txt"], seed=0))
    assert texts[4:] == ["first line", "second line"]
    assert all(text in {caption.text for caption in data[i].captions} for i, text in enumerate(texts[:4]))


def test_mask_token() -> None:
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode([mask_token_id(tokenizer, "blank")]) == "_"
    assert mask_token_id(tokenizer, "eos") == tokenizer.eos_token_id
    assert mask_token_id(tokenizer, "mask") == tokenizer.mask_token_id
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="mntp.mask_token: the tokenizer has no mask token"):
        mask_token_id(tokenizer, "mask")


def test_masked_token_is_predicted_from_the_state_on_its_left(tmp_path: Path) -> None:
    llm, _ = load_llm(AutoModelForCausalLM, str(tiny_llm(tmp_path)))
    ids = torch.tensor([[0, 5, 4, 7, 8, 4]])  # 4 is the mask token
    labels = torch.tensor([[IGNORED, IGNORED, 6, IGNORED, IGNORED, 9]])
    output = llm(input_ids=ids, labels=labels)
    expected = F.cross_entropy(output.logits[0, [1, 4]], torch.tensor([6, 9]))
    torch.testing.assert_close(output.loss, expected)
    changed = llm(input_ids=torch.tensor([[0, 5, 4, 7, 8, 9]])).logits
    assert not torch.allclose(changed[0, 1], output.logits[0, 1])  # it sees what is on its right


def test_training_lowers_the_loss_and_the_adapter_takes_effect(tmp_path: Path) -> None:
    name = str(tiny_llm(tmp_path / "llm"))
    data = CaptionData.open(write_captions(tmp_path / "data", scene_captions(200)))
    training = TeacherTrainingArguments(
        output_dir=str(tmp_path / "checkpoints"), bf16=False, use_cpu=True, save_steps=10, report_to="none"
    )
    config = MntpConfig(block_size=32, per_device_batch_size=4, learning_rate=1e-2, max_steps=30)
    arguments = {
        "load": {"name": name, "dtype": "float32"},
        "adapters": [],
        "lora": LORA,
        "data": [data],
        "output_dir": tmp_path / "mntp",
    }
    stage = train_mntp(config, training, **arguments)
    assert stage["stage"] == "mntp"
    losses = [json.loads(line)["loss"] for line in (tmp_path / "mntp" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.3

    ids = torch.tensor([[0, 5, 6, 7]])
    plain, _ = load_llm(AutoModel, name)
    before = plain(ids).last_hidden_state
    after = merge_adapter(plain, tmp_path / "mntp" / "adapter")(ids).last_hidden_state
    assert (after - before).abs().max() > 1e-2

    written = (tmp_path / "mntp" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    assert train_mntp(config, training, **arguments) == stage  # what is there is not trained again
    assert (tmp_path / "mntp" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == written
