"""Write a dialogue as the one string a LLaVA model is trained on, and say which characters are trained on.

Every template is Jinja source that transformers renders; training, `generation_prompt` and the exported processor use
the same source, so they cannot drift apart. Where the answers lie follows from rendering, never from searching for
separators: content that looks like a separator or a control token stays content.

Templates (LLaVA v1.2 `conversation.py`, `train.py: preprocess_plain, preprocess_v1`):
`plain`: stage 1, placeholders and caption, newline as the end. `vicuna_v1`: stage 2 of LLaVA-1.5.
`chat`: the language model's own chat template.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from llava_bridge.template_sources import CHAT_SYSTEM, FIXED_DATE, FLATTEN, PLAIN, VICUNA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llava_bridge.dialogues import Turn

IMAGE_TOKEN = "<image>"
TemplateName = Literal["plain", "vicuna_v1", "chat"]
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
"""System text of `conv_vicuna_v1` in LLaVA's `conversation.py`."""

_GENERATION_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
_CONTENT_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template writes them

Message = dict[str, str]


class Rendered(NamedTuple):
    """A dialogue as one string, with one `IMAGE_TOKEN` per image."""

    text: str
    supervised: tuple[tuple[int, int], ...]
    """[start, end) character spans that are trained on: each answer with what ends it."""
    controls: tuple[tuple[int, int], ...]
    """[start, end) spans of the special tokens the template itself wrote, image placeholders among them."""


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokenizer's control tokens: id to text."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def place_images(turns: Sequence[Turn]) -> list[Turn]:
    """Put a dialogue's only placeholder in front of its turn; several placeholders stay where they are.

    LLaVA-1.5 was trained with `<image>` and a newline before the stripped question, wherever the data has the
    placeholder (`train.py: preprocess_multimodal`). Where there are several images, their order and place carry
    meaning ("the first <image> and ..."), so nothing is moved.

    Returns:
        The turns; only the text of the user turn with the placeholder may differ.
    """
    turns = list(turns)
    asked = [index for index, turn in enumerate(turns) if turn.role == "user" and IMAGE_TOKEN in turn.text]
    if len(asked) == 1 and turns[asked[0]].text.count(IMAGE_TOKEN) == 1:
        question = turns[asked[0]].text.replace(IMAGE_TOKEN, "").strip()
        turns[asked[0]] = turns[asked[0]]._replace(text=f"{IMAGE_TOKEN}\n{question}".strip())
    return turns


def render(
    template: TemplateName, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, system: str | None = None
) -> Rendered:
    """Write a dialogue for training.

    `vicuna_v1` trains on each answer from the space after "ASSISTANT:" and on the eos token behind it (an empty answer
    has no space, so it is exactly the eos token). `plain` trains on caption and newline. `chat` trains on what the
    LLM's template writes from its generation prompt to its end-of-turn token, or on its `{% generation %}` blocks.

    Args:
        template: Which template.
        turns: user, assistant, user, assistant, ...; `<image>` in user turns marks images, see `place_images`.
        tokenizer: The LLM's, with `<image>` as a special token.
        system: System prompt; None for the template's own, "" for none (`vicuna_v1`) or an empty one (`chat`).

    Raises:
        ValueError: `plain` with several exchanges or a system prompt; a chat template that is missing, refuses the
            dialogue, writes a turn differently once the dialogue goes on, changes an answer or does not end it.
    """
    source = export_chat_template(template, tokenizer)
    messages = _messages(template, turns, system)
    text, marked = _apply(source, messages, tokenizer)
    contents = _content_spans(source, messages, text, tokenizer)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    written = marked if _GENERATION_MARKER.search(source) else _answer_spans(source, messages, text, tokenizer)
    if len(written) != len(answers):
        raise ValueError(
            f"the chat template has {len(written)} {{% generation %}} blocks for {len(answers)} answers; "
            "expected one around each answer and its end-of-turn token"
        )
    supervised = []
    for index, (start, end) in zip(answers, written, strict=True):
        answer = contents.get(index, [(start, start)] if not messages[index]["content"].strip() else [])
        if not answer or answer[0][0] < start or answer[0][1] >= end:
            raise ValueError(
                f"the chat template leaves out answer {messages[index]['content'][:80]!r} or writes nothing behind it "
                "that ends the turn; write an end-of-turn token after each answer (inside {% generation %} blocks, if "
                "there are any), or use the template vicuna_v1"
            )
        ending = text[answer[0][1] : end]
        supervised.append((start, end - (len(ending) - len(ending.rstrip()) if ending.strip() else 0)))
    controls = _control_spans(text, [span for spans in contents.values() for span in spans], tokenizer)
    return Rendered(text, tuple(supervised), controls)


def generation_prompt(
    template: TemplateName, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, system: str | None = None
) -> str:
    """What the model is given to answer the last user turn: where the rendered text of the answered dialogue begins.

    Args and errors are those of `render`; `turns` ends with a user turn.
    """
    source = export_chat_template(template, tokenizer)
    return _apply(source, _messages(template, turns, system), tokenizer, add_generation_prompt=True)[0]


def export_chat_template(
    template: TemplateName, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None
) -> str:
    """The template as Jinja source for the exported tokenizer and processor.

    A message's content may be a string, taken as it is, or a list of parts `{"type": "text", "text": ...}` and
    `{"type": "image"}`: the only image of a dialogue goes to the front of its turn with a newline behind it; of
    several, those that begin a turn get a newline behind them and the others stay in place. A system message is
    optional. The source writes every special token, BOS among them: it is tokenized with `add_special_tokens=False`,
    as by `tokenizer.apply_chat_template` and vLLM. `{% generation %}` blocks surround the answers, so transformers'
    `return_assistant_tokens_mask` works (with `chat` only if the LLM's template has them).

    Args:
        template: Which template.
        tokenizer: The LLM's.
        system: What the template writes for a dialogue without system message; None for the template's own.

    Raises:
        ValueError: The tokenizer lacks what the template needs (a chat template, an eos token), or `plain` is given a
            system prompt.
    """
    if template == "plain":
        if system is not None:
            raise ValueError(f"the template plain has no system prompt, got {system!r}; leave it out")
        return FLATTEN.lstrip() + _bos(tokenizer, IMAGE_TOKEN) + PLAIN
    if template == "vicuna_v1":
        if not tokenizer.eos_token:
            raise ValueError("the template vicuna_v1 ends answers with tokenizer.eos_token, which is not set")
        names = {"SYSTEM": VICUNA_SYSTEM if system is None else system, "EOS": str(tokenizer.eos_token)}
        return FLATTEN.lstrip() + _bos(tokenizer, VICUNA_SYSTEM) + _fill(VICUNA, names)
    if not isinstance(tokenizer.chat_template, str):
        raise ValueError(
            "the template chat is the tokenizer's own chat template, and this tokenizer has none; "
            "use the template vicuna_v1, or put a chat_template.jinja beside the tokenizer"
        )
    clock = "strftime_now" in tokenizer.chat_template
    if clock and "date_string" not in tokenizer.chat_template:
        raise ValueError(
            "the chat template writes the present time, so that training and inference differ; replace strftime_now "
            "in it by a constant, or use the template vicuna_v1"
        )
    date = FIXED_DATE if clock else ""
    system_message = "" if system is None else _fill(CHAT_SYSTEM, {"SYSTEM": system})
    # The newline after the last block is dropped by trim_blocks; the LLM's template follows unchanged.
    return f"{date}{FLATTEN.lstrip()}{system_message}\n{{%- set messages = ns.messages %}}\n{tokenizer.chat_template}"


def _bos(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Jinja that writes BOS, for a tokenizer that has one.

    LLMs send much of their attention to the first token, whatever it is. Where an image token was first, gradients of
    the projector were ten times as large and it learned more slowly (docs/log.md).

    Args:
        tokenizer: The LLM's.
        text: What may follow. Its tokens are to be those of a text of its own: some SentencePiece tokenizers put a
            space before the first word of a text, but not of one that begins with BOS, and then it is written.

    Raises:
        ValueError: The tokens are others with a space and without.
    """
    if tokenizer.bos_token is None:
        return ""
    bos = str(tokenizer.bos_token)
    alone = [tokenizer.bos_token_id, *token_ids(text, tokenizer)]
    for written in (bos, f"{bos} "):
        if token_ids(written + text, tokenizer) == alone:
            return _fill("\n{{- BOS }}", {"BOS": written})
    raise ValueError(
        f"{type(tokenizer).__name__} tokenizes {bos + text[:20]!r} otherwise than {bos!r} and {text[:20]!r} one after "
        "the other; expected a BOS token that changes nothing behind it; use the template chat"
    )


def token_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a text in which a template has written every special token."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _fill(source: str, values: dict[str, str]) -> str:
    """Replace names by Jinja string literals (Jinja reads Python's escapes)."""
    return re.sub("|".join(values), lambda match: repr(values[match[0]]), source)


def _messages(template: TemplateName, turns: Sequence[Turn], system: str | None) -> list[Message]:
    turns = place_images(turns)
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    if template != "plain":
        return messages if system is None else [{"role": "system", "content": system}, *messages]
    if system is not None:
        raise ValueError(f"the template plain has no system prompt, got {system!r}; leave it out")
    if len(turns) > 2:
        raise ValueError(
            f"the template plain takes one exchange, an image and its caption, got {len(turns)} turns; "
            "use the template vicuna_v1 or chat for dialogues"
        )
    messages[0]["content"] = IMAGE_TOKEN * turns[0].text.count(IMAGE_TOKEN)
    return messages


def _apply(
    source: str,
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    add_generation_prompt: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """Render; returns the text and the spans of its `{% generation %}` blocks."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
    try:
        rendered, blocks = render_jinja_template(
            conversations=[list(messages)],
            chat_template=source,
            return_assistant_tokens_mask=_GENERATION_MARKER.search(source) is not None,
            add_generation_prompt=add_generation_prompt,
            **variables,
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the dialogue: {error}") from error
    return rendered[0], [(int(start), int(end)) for start, end in blocks[0]] if blocks else []


def _answer_spans(
    source: str, messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """From the generation prompt of each assistant turn to where the turn ends, by rendering both."""
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(source, messages[:index], tokenizer, add_generation_prompt=True)[0]
        answered = _apply(source, messages[: index + 1], tokenizer)[0]
        if not answered.startswith(prompt) or not text.startswith(answered):
            cause = (
                "a later turn changes how earlier ones are written"
                if answered.startswith(prompt)
                else "an answered turn does not begin with its generation prompt"
            )
            raise ValueError(
                f"the chat template breaks the prefix property at turn {index}: {cause}, so the model would be "
                "trained on other text than it sees; put {% generation %} blocks around its answers, or use vicuna_v1"
            )
        spans.append((len(prompt), len(answered)))
    return spans


def _content_spans(
    source: str, messages: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase
) -> dict[int, list[tuple[int, int]]]:
    """Where in `text` each message's content is, without image placeholders; by rendering marks in its place."""
    messages = list(messages)
    for index, message in enumerate(messages):  # many templates strip content
        content = message["content"]
        for stripped in (content.strip(), content.lstrip(), content.rstrip()):
            trial = [*messages[:index], {**message, "content": stripped}, *messages[index + 1 :]]
            if stripped != content and _apply(source, trial, tokenizer)[0] == text:
                messages = trial
                break
    pieces: list[tuple[int, str]] = []
    marked = []
    for index, message in enumerate(messages):
        parts = message["content"].split(IMAGE_TOKEN) if message["role"] == "user" else [message["content"]]
        marks = []
        for part in parts:
            marks.append(f"\ue000{len(pieces)}\ue001" if part else "")
            pieces += [(index, part)] if part else []
        marked.append({**message, "content": IMAGE_TOKEN.join(marks)})
    skeleton = _apply(source, marked, tokenizer)[0]
    spans: dict[int, list[tuple[int, int]]] = {}
    rebuilt, last = "", 0
    for mark in _CONTENT_MARK.finditer(skeleton):
        index, piece = pieces[int(mark[1])]
        rebuilt += skeleton[last : mark.start()]
        spans.setdefault(index, []).append((len(rebuilt), len(rebuilt) + len(piece)))
        rebuilt, last = rebuilt + piece, mark.end()
    if rebuilt + skeleton[last:] != text:
        raise ValueError(
            "the chat template writes some contents otherwise than as they are, so it is unknown which characters are "
            "the answers; use a template that copies content, or vicuna_v1"
        )
    return spans


def _control_spans(
    text: str, contents: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[int, int], ...]:
    """Special tokens in the text outside of `contents`."""
    longest_first = sorted(special_tokens(tokenizer).values(), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, longest_first)))
    spans, last = [], 0
    for start, end in [*sorted(contents), (len(text), len(text))]:
        spans += [match.span() for match in pattern.finditer(text, last, start)]
        last = end
    return tuple(spans)
