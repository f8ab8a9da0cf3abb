"""CLIP's tokenizer: from the byte-pair merges that open_clip ships to the files of a Hugging Face `CLIPTokenizer`."""

from __future__ import annotations

import gzip
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

CONTEXT_LENGTH = 77
NUM_MERGES = 49152 - 256 - 2  # open_clip/tokenizer.py: vocabulary less the bytes and the two special tokens


def write_clip_tokenizer(merges_gz: bytes, output_dir: Path) -> None:
    """Write the tokenizer of OpenAI's CLIP (49,408 entries).

    Args:
        merges_gz: `bpe_simple_vocab_16e6.txt.gz`: a header line, then one merge a line, more than CLIP uses.
        output_dir: directory to write.
    """
    lines = gzip.decompress(merges_gz).decode("utf-8").split("\n")
    merges = lines[1 : NUM_MERGES + 1]
    letters = sorted(ByteLevel.alphabet())  # code point order is the order of CLIP's ids
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=pairs, model_max_length=CONTEXT_LENGTH)  # pyright: ignore[reportArgumentType]
    tokenizer.save_pretrained(output_dir)
