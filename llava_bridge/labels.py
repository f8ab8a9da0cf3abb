"""Turn a rendered dialogue into `input_ids` and `labels`.

The text is tokenized once and whole, as the exported processor does it at inference; the character spans of
`templates.Rendered` say which tokens are trained on. Text that looks like a control token never becomes one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from llava_bridge.templates import IMAGE_TOKEN, Rendered, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
"""The label that `torch.nn.functional.cross_entropy` leaves out."""


class Encoded(NamedTuple):
    """One dialogue for the model; both lists have the same length."""

    input_ids: list[int]
    labels: list[int]
    """`input_ids` where supervised, else `IGNORE`; not shifted."""


def encode(
    rendered: Rendered,
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
) -> Encoded:
    """Tokenize a dialogue and label its supervised tokens.

    A token is supervised if its last character lies in a supervised span: the answer's first word counts, whether its
    token includes the space before it (SentencePiece, some byte-level BPE) or not. Image tokens never are.

    Args:
        rendered: The text, with one `IMAGE_TOKEN` per image.
        tokenizer: A fast one, in which `IMAGE_TOKEN` is one special token.
        image_token_id: Its id.
        num_image_tokens: How many of it stand for one image.
        max_length: Tokens behind this one are cut off, after image tokens have been multiplied.

    Raises:
        ValueError: "too long: ..." if image tokens would be cut off; a slow tokenizer; a tokenizer that does not keep
            the placeholders, or that cannot write a control token found in somebody's text as ordinary text.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"labels need character offsets, which only fast tokenizers have, got {type(tokenizer).__name__}; load "
            "it with AutoTokenizer.from_pretrained(..., use_fast=True), or convert it to a tokenizer.json"
        )
    text = rendered.text
    is_supervised = _mark(len(text), rendered.supervised)
    is_control = _mark(len(text), rendered.controls)
    specials = special_tokens(tokenizer)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    input_ids: list[int] = []
    labels: list[int] = []
    for token_id, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True):
        ids = [token_id]
        learned = bool(is_supervised[max(start, end - 1)])
        if token_id in specials and 1 in is_control[start:end]:
            if token_id == image_token_id:
                ids, learned = [image_token_id] * num_image_tokens, False
        elif token_id in specials and start < end and not _is_unknown(token_id, text[start:end], tokenizer):
            ids = _as_ordinary_text(text[start:end], tokenizer, specials)
        input_ids += ids
        labels += ids if learned else [IGNORE] * len(ids)
    _check_images(rendered, input_ids, image_token_id, num_image_tokens)
    if image_token_id in input_ids[max_length:]:
        raise ValueError(
            f"too long: {len(input_ids)} tokens, and max_length {max_length} would cut off image tokens; raise "
            "max_length, or shorten or split the dialogue"
        )
    return Encoded(input_ids[:max_length], labels[:max_length])


def _mark(length: int, spans: Iterable[tuple[int, int]]) -> bytearray:
    """1 for each character in a span; one more entry for tokens at the very end."""
    marks = bytearray(length + 1)
    for start, end in spans:
        marks[start:end] = b"\1" * (end - start)
    return marks


def _is_unknown(token_id: int, piece: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the token stands for text outside of the vocabulary, rather than for a literal `<unk>`."""
    return token_id == tokenizer.unk_token_id and piece.strip() != tokenizer.unk_token


def _as_ordinary_text(literal: str, tokenizer: PreTrainedTokenizerBase, specials: dict[int, str]) -> list[int]:
    """The pieces of a control token that somebody wrote in a text, such as `</s>` in a question about HTML."""
    # Behind a newline: at the beginning of a text, SentencePiece tokenizers add a space.
    encoding = tokenizer(
        f"\n{literal}", add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    ids = [i for i, (_, end) in zip(encoding["input_ids"], encoding["offset_mapping"], strict=True) if end > 1]
    if any(i in specials and not _is_unknown(i, literal, tokenizer) for i in ids):
        raise ValueError(f"control token in text: this tokenizer cannot write {literal!r} as ordinary text; remove it")
    return ids


def _check_images(rendered: Rendered, input_ids: list[int], image_token_id: int, num_image_tokens: int) -> None:
    num_images = sum(rendered.text[start:end] == IMAGE_TOKEN for start, end in rendered.controls)
    if input_ids.count(image_token_id) != num_images * num_image_tokens:
        raise ValueError(
            f"{num_images} placeholders became {input_ids.count(image_token_id)} tokens of id {image_token_id}, "
            f"expected {num_image_tokens} each; add {IMAGE_TOKEN!r} to the tokenizer as a special token"
        )
