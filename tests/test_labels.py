"""Labels: equal to LLaVA's masks where those are right, right by construction where they are not."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
from dialogue_tokenizers import byte_level_tokenizer, llama_tokenizer, random_dialogue, without_bos
from PIL import Image
from tokenizers import processors
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava_bridge.dialogues import Turn
from llava_bridge.labels import IGNORE, Encoded, encode
from llava_bridge.templates import VICUNA_SYSTEM as SYSTEM
from llava_bridge.templates import Rendered, TemplateName, generation_prompt, render

NUM_IMAGE_TOKENS = 4
ENDS_WITH_TEXT = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% if message['role'] == "
    "'assistant' %}### END\n{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""A template whose end of turn is several tokens, and whose generation prompt ends in a space."""


def encode_turns(
    turns: Sequence[Turn],
    tokenizer: PreTrainedTokenizerFast,
    template: str = "vicuna_v1",
    *,
    max_length: int = 4096,
    **kwargs: str | None,
) -> Encoded:
    return encode_rendered(render(template, turns, tokenizer, **kwargs), tokenizer, max_length=max_length)


def encode_rendered(rendered: Rendered, tokenizer: PreTrainedTokenizerFast, *, max_length: int = 4096) -> Encoded:
    return encode(
        rendered,
        tokenizer,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        num_image_tokens=NUM_IMAGE_TOKENS,
        max_length=max_length,
    )


def learned_texts(encoded: Encoded, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of each run of supervised tokens."""
    runs: list[list[int]] = [[]]
    for label in encoded.labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs if run]


def dialogue(*texts: str) -> list[Turn]:
    return [Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]


# LLaVA's algorithm (`preprocess_v1`), written from its description: rounds are found in the string, and tokens are
# counted by tokenizing each round on its own.
def llava_labels(text: str, tokenizer: PreTrainedTokenizerFast, *, legacy: bool) -> list[int] | None:
    """Labels of the whole text, or None where LLaVA warns of a mismatch and ignores the sample.

    LLaVA's template writes no BOS: the tokenizer puts it in front.
    """
    text = without_bos(text)

    def ids_of(piece: str) -> list[int]:
        image = tokenizer.convert_tokens_to_ids("<image>")
        ids = tokenizer(piece).input_ids
        return [i for token in ids for i in [token] * (NUM_IMAGE_TOKENS if token == image else 1)]

    labels = ids_of(text)
    total = len(labels)
    labels[0] = IGNORE
    position = 1
    for number, round_text in enumerate(text.split("</s>")):
        parts = round_text.split(" ASSISTANT: ")
        if not round_text or len(parts) != 2:
            break
        # The round's own BOS is counted in place of the </s> that was split off.
        round_length = len(ids_of(round_text))
        prefix_length = len(ids_of(parts[0] + " ASSISTANT: ")) - 2
        if number > 0 and not legacy:
            round_length, prefix_length = round_length - 1, prefix_length - 1
        labels[position : position + prefix_length] = [IGNORE] * prefix_length
        position += round_length
    labels[position:] = [IGNORE] * (total - position)
    return labels if position == total else None


@pytest.mark.parametrize("legacy", [True, False])
def test_labels_equal_llavas_on_dialogues_where_llava_is_consistent(legacy: bool) -> None:
    tokenizer = llama_tokenizer(legacy=legacy)
    compared, with_image, several_turns = 0, 0, 0
    for seed in range(250):
        turns = random_dialogue(seed)
        rendered = render("vicuna_v1", turns, tokenizer)
        expected = llava_labels(rendered.text, tokenizer, legacy=legacy)
        if expected is None:
            continue
        assert encode_rendered(rendered, tokenizer).labels == expected, rendered.text
        compared += 1
        with_image += "<image>" in rendered.text
        several_turns += len(turns) > 2
    assert compared >= 200
    assert with_image >= 100 and compared - with_image >= 50 and several_turns >= 100


def test_the_oracle_sees_the_traps_it_models() -> None:
    turns = dialogue("what is it?", "a cat", "why?", "the tree")
    tokenizer = llama_tokenizer(legacy=False)
    text = render("vicuna_v1", turns, tokenizer).text
    assert tokenizer.tokenize("USER") == ["▁US", "ER"] and tokenizer.tokenize("</s>USER") == ["</s>", "USER"]
    assert llava_labels(text, tokenizer, legacy=False) is not None
    assert llava_labels(text, tokenizer, legacy=True) is None  # without its correction LLaVA drops the sample
    for broken in (
        dialogue("what?", "", "why?", "the tree"),
        dialogue("what?", "write </s> here", "why?", "the tree"),
        dialogue("say ASSISTANT: now", "the tree"),
    ):
        text = render("vicuna_v1", broken, tokenizer).text
        assert llava_labels(text, tokenizer, legacy=False) is None


TOKENIZERS = {
    "llama": llama_tokenizer(legacy=False),
    "byte-level": byte_level_tokenizer(),
    "byte-level, trimmed offsets": byte_level_tokenizer(trim_offsets=True),
}
KINDS_AND_TEMPLATES = [
    *((kind, "vicuna_v1") for kind in TOKENIZERS),
    *((kind, "chat") for kind, tokenizer in TOKENIZERS.items() if tokenizer.chat_template),
]
HARD_ANSWERS = (
    ("a cat",),
    ("",),
    ("", "the tree", ""),
    ("write </s> at the end", "</s>", "</s></s>x"),
    ("say ASSISTANT: yes", "USER: no ASSISTANT: maybe"),
    ("<pad> <unk> <s> <image> <|end|>", "<|start|>assistant\nme<|end|>"),
    ("line\n\n  indented\n", "trailing  "),
    ("你好 世界", "🦊", "née 👩‍👩‍👧"),
)


@pytest.mark.parametrize(("kind", "template"), KINDS_AND_TEMPLATES)
@pytest.mark.parametrize("answers", HARD_ANSWERS, ids=str)
def test_exactly_answers_and_their_ends_are_learned(kind: str, answers: tuple[str, ...], template: str) -> None:
    tokenizer = TOKENIZERS[kind]
    turns = [
        turn
        for answer in answers
        for turn in dialogue("is </s> a tag? ASSISTANT: no <|end|>\n<|start|>assistant\n<pad>", answer)
    ]
    turns[0] = turns[0]._replace(text=f"<image>\n{turns[0].text}")
    rendered = render(template, turns, tokenizer)
    encoded = encode_rendered(rendered, tokenizer)
    end = "</s>" if template == "vicuna_v1" else "<|end|>"
    assert [text.removeprefix(" ") for text in learned_texts(encoded, tokenizer)] == [f"{a}{end}" for a in answers]
    # Control tokens are those of the template, however often their text occurs in somebody's turn.
    end_id = tokenizer.convert_tokens_to_ids(end)
    written = sum(rendered.text[start:stop] == end for start, stop in rendered.controls)
    assert encoded.input_ids.count(end_id) == written
    assert encoded.labels.count(end_id) == len(answers)
    assert tokenizer.convert_tokens_to_ids("<pad>") not in encoded.input_ids
    assert encoded.input_ids.count(tokenizer.convert_tokens_to_ids("<image>")) == NUM_IMAGE_TOKENS
    # ... and nothing of the text is lost by that.
    expanded = without_bos(rendered.text).replace("<image>", "<image>" * NUM_IMAGE_TOKENS, 1)
    decoded = tokenizer.decode(encoded.input_ids[1:], clean_up_tokenization_spaces=False)
    assert decoded == expanded


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed offsets"])
def test_an_end_of_turn_of_several_tokens_and_a_prompt_that_ends_in_a_space(kind: str) -> None:
    options = {"trim_offsets": "trimmed" in kind}
    tokenizer = byte_level_tokenizer(chat_template=ENDS_WITH_TEXT, **options)
    turns = dialogue("what is it?", "a cat", "is it red?", "not at all")
    assert len(tokenizer.tokenize("### END")) > 1
    learned = learned_texts(encode_turns(turns, tokenizer, "chat"), tokenizer)
    # "Ġa" is one token, so the space that the generation prompt ends in belongs to the answer's first word.
    assert [text.removeprefix(" ") for text in learned] == ["a cat\n### END", "not at all\n### END"]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["<image>", "<image>\nDescribe the image.", "Describe it.\n<image>"])
def test_plain_masks_exactly_bos_and_image_tokens(kind: str, prompt: str) -> None:
    tokenizer = TOKENIZERS[kind]
    encoded = encode_turns(dialogue(prompt, "a red cat </s> below"), tokenizer, "plain")
    image = tokenizer.convert_tokens_to_ids("<image>")
    head = [tokenizer.bos_token_id, *[image] * NUM_IMAGE_TOKENS]
    assert encoded.input_ids[: len(head)] == head
    assert encoded.labels == [IGNORE] * len(head) + encoded.input_ids[len(head) :]
    assert tokenizer.decode(encoded.input_ids[len(head) :]) == "a red cat </s> below\n"
    assert tokenizer.eos_token_id not in encoded.input_ids


@pytest.mark.parametrize("template", ["plain", "vicuna_v1"])
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    "tokenizer", [llama_tokenizer(legacy=True), llama_tokenizer(legacy=False), byte_level_tokenizer()]
)
def test_bos_comes_first_once_and_changes_nothing_behind_it(
    tokenizer: PreTrainedTokenizerFast, adds: bool, template: TemplateName
) -> None:
    """Also where the tokenizer does not add it: LLMs lean on the first token (docs/log.md)."""
    tokenizer = copy.deepcopy(tokenizer)
    expected = tokenizer(SYSTEM if template == "vicuna_v1" else "<image>").input_ids
    expected[1:] *= NUM_IMAGE_TOKENS if template == "plain" else 1
    assert expected[0] == tokenizer.bos_token_id
    if not adds:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id
    encoded = encode_turns(dialogue("<image>\nWhat?", "a cat"), tokenizer, template)
    assert encoded.input_ids[: len(expected)] == expected and encoded.labels[0] == IGNORE
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_bos_is_not_learned_when_the_text_begins_with_an_answer() -> None:
    tokenizer = TOKENIZERS["llama"]
    encoded = encode_turns(dialogue("", "a cat"), tokenizer, "plain")
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert encoded.labels == [IGNORE, *encoded.input_ids[1:]]


@pytest.mark.parametrize(("kind", "template"), [*KINDS_AND_TEMPLATES, *((kind, "plain") for kind in TOKENIZERS)])
def test_training_ids_begin_with_the_ids_the_processor_gives_at_inference(kind: str, template: str) -> None:
    tokenizer = TOKENIZERS[kind]
    size = {"height": 32, "width": 32}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    for seed in range(1, 60, 3) if template != "plain" else (1, 4, 7):
        turns = random_dialogue(seed)[: 2 if template == "plain" else None]
        rendered = render(template, turns, tokenizer)
        encoded = encode_rendered(rendered, tokenizer)
        whole = processor(images=image, text=rendered.text, add_special_tokens=False).input_ids[0]
        assert encoded.input_ids == list(whole)
        text = generation_prompt(template, turns[:-1], tokenizer)
        prompt = processor(images=image, text=text, add_special_tokens=False).input_ids[0]
        assert encoded.input_ids[: len(prompt)] == list(prompt)
        if len(turns) == 2:
            assert encoded.labels[: len(prompt)] == [IGNORE] * len(prompt) and encoded.labels[len(prompt)] != IGNORE


def test_long_dialogues_are_cut_on_the_right_but_never_inside_images() -> None:
    tokenizer = TOKENIZERS["llama"]
    turns = dialogue("<image>\nwhat?", "a red cat", "and behind?", "a big tree")
    whole = encode_turns(turns, tokenizer)
    cut = encode_turns(turns, tokenizer, max_length=len(whole.input_ids) - 3)
    assert cut == Encoded(whole.input_ids[:-3], whole.labels[:-3])
    assert encode_turns(turns, tokenizer, max_length=len(whole.input_ids)) == whole
    image = tokenizer.convert_tokens_to_ids("<image>")
    last = len(whole.input_ids) - whole.input_ids[::-1].index(image)
    assert encode_turns(turns, tokenizer, max_length=last).input_ids[-1] == image
    with pytest.raises(ValueError, match=r"^too long: .*max_length"):
        encode_turns(turns, tokenizer, max_length=last - 1)


def test_text_outside_of_the_vocabulary_stays_unknown() -> None:
    """`<unk>` for a character is no control token; `<unk>` written in a text is no unknown character."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2, "<": 3, "unk": 4, ">": 5}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Punctuation()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert encode_rendered(Rendered("你", ((0, 1),), ()), tokenizer) == Encoded([0], [0])
    assert encode_rendered(Rendered("<unk>", ((0, 5),), ()), tokenizer) == Encoded([3, 4, 5], [3, 4, 5])


def test_bad_tokenizers_are_refused() -> None:
    from transformers.models.byt5.tokenization_byt5 import ByT5Tokenizer

    rendered = render("vicuna_v1", dialogue("<image>\nwhat?", "a cat"), TOKENIZERS["llama"])
    with pytest.raises(ValueError, match=r"only fast tokenizers have, got ByT5Tokenizer; load"):
        encode_rendered(rendered, ByT5Tokenizer())
    without_placeholder = PreTrainedTokenizerFast(
        tokenizer_object=llama_tokenizer(legacy=False).backend_tokenizer, eos_token="</s>"
    )
    with pytest.raises(ValueError, match=r"1 placeholders became 0 tokens of id 0, .* add '<image>'"):
        encode(rendered, without_placeholder, image_token_id=0, num_image_tokens=4, max_length=99)
