"""Tokenizers of the kinds that language models have, and random dialogues for them; shared by the tests."""

from __future__ import annotations

import functools
import json
import random

from tiny import CORPUS, tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_bridge.dialogues import Turn

PROMPT_CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "AS SIST ANT: yes. no! the answer is 12",
)
WORDS = (
    *"the a cat dog red blue image shows two? three, left-of; 'quoted' (why) 3.14 1999 /a/b?c=d USER".split(),
    *"Übergröße naïve café 你好 世界 これは мир שלום مرحبا 🦊 👩‍👩‍👧 ½ — … <b> & \\n {% %} {{ x }} % # ::".split(),
)


def _with_placeholder(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def byte_level_tokenizer(*, trim_offsets: bool = False, **kwargs: str | None) -> PreTrainedTokenizerFast:
    """GPT-2's kind, with BOS, a ChatML template, `<image>` and `<pad>`.

    Args:
        trim_offsets: Whether a token's offsets leave out the space before the word, as with Llama 3.
        kwargs: Of `tiny_tokenizer`.
    """
    tokenizer = _with_placeholder(tiny_tokenizer(**kwargs))
    if trim_offsets:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), backend.post_processor])
    return tokenizer


@functools.cache
def _sentencepiece_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(
        [*CORPUS, *PROMPT_CORPUS], trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    )
    learned = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # As in Llama's vocabulary: USER is one piece, but behind a space the two pieces "▁US", "ER".
    merges = [("U", "S"), ("E", "R"), ("▁", "US"), ("US", "ER"), *learned]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "E", "R", "U"]
    tokens += [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    tokens += [left + right for left, right in merges]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def llama_tokenizer(*, legacy: bool) -> PreTrainedTokenizerFast:
    """Llama 2's kind: SentencePiece BPE with byte fallback and BOS, with `<image>` and `<pad>`.

    Args:
        legacy: Whether text behind a special token gets a space in front, as only the beginning of a text should.
    """
    vocab, merges = _sentencepiece_bpe()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _with_placeholder(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    )


def without_bos(text: str) -> str:
    """A rendered text without its BOS and, for some tokenizers, the space behind it."""
    return text.removeprefix("<s>").removeprefix(" ")


def random_text(rng: random.Random, *, most: int = 12) -> str:
    """Words of several scripts with spaces, newlines and punctuation between them, never empty."""
    text = rng.choice(WORDS)
    for _ in range(rng.randrange(most)):
        text += rng.choice((" ", " ", " ", " ", "  ", "\n", "\n\n", ", ", "")) + rng.choice(WORDS)
    return text


def random_dialogue(seed: int) -> list[Turn]:
    """One to five exchanges; two of three have an image, in front of or behind the first question."""
    rng = random.Random(seed)
    turns = []
    for number in range(rng.choice((1, 1, 2, 3, 5))):
        question, answer = random_text(rng), random_text(rng, most=rng.choice((1, 4, 40)))
        if number == 0 and seed % 3:
            question = f"<image>\n{question}" if seed % 3 == 1 else f"{question}\n<image>"
        turns += [Turn("user", question), Turn("assistant", rng.choice(("", "", "", " ")) + answer)]
    return turns
