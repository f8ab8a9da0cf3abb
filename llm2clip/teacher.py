"""The teacher: a decoder LLM made bidirectional and pooled, which turns captions into vectors.

A teacher directory is an ordinary Hugging Face model directory (`is_causal=false` in its config, LoRA merged) with its
tokenizer, and `teacher.json` beside them: everything that decides what vector a caption gets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm2clip.llm import check_bidirectional, check_layers, load_llm
from llm2clip.run_dir import atomic_write

Pooling = Literal["mean", "last", "weighted_mean"]
SPEC_FILE = "teacher.json"
INSTRUCTION_SEPARATOR = "; "  # LLM2CLIP llm_caption_contrastive/dataset/E5_cc3m.py: instruction + "; " + text


@dataclass(kw_only=True)
class TeacherSpec:
    """What, besides the weights, decides a caption's vector; stored as `teacher.json`."""

    base_model: str
    """Directory or hub id of the LLM it was made from."""
    num_hidden_layers: int
    """Lowest layers of that LLM that were kept."""
    bidirectional: bool = True
    """Whether every token sees every other one."""
    pooling: Pooling = "mean"
    """Over the tokens of caption and suffix: their mean, the last one, or a mean with weights 1, 2, 3 ..."""
    instruction: str = ""
    """Put in front of captions when they are embedded; the recipe trains queries with one and embeds without."""
    max_length: int = 512
    """Tokens, all included; longer captions are cut at the end."""
    chat_prefix: str = ""
    """In front of instruction and caption."""
    chat_suffix: str = ""
    """Behind the caption; its tokens are pooled too."""
    normalized: bool = False
    """Whether vectors are L2-normalised."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """What was done to the LLM, in order."""

    def save(self, directory: Path) -> None:
        """Write `teacher.json` into `directory`."""
        atomic_write(directory / SPEC_FILE, json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> TeacherSpec:
        """Read `teacher.json` of a teacher directory.

        Raises:
            FileNotFoundError: if it is not there; names the command that makes it.
            ValueError: if its keys are not those of this version.
        """
        path = directory / SPEC_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{directory} is no teacher: it has no {SPEC_FILE}; make one with `llm2clip finetune-llm` "
                "(`--tune false` for an untuned LLM)"
            )
        values = json.loads(path.read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(cls)}
        if set(values) - known or not {"base_model", "num_hidden_layers"} <= set(values):
            raise ValueError(f"{path} has the keys {sorted(values)}; expected some of {sorted(known)}")
        return cls(**values)


class CaptionTokenizer:
    """Captions to token ids, with the chat wrapper around and a mask of what is pooled.

    The text `prefix + instruction + "; " + caption + suffix` is tokenised with special tokens and cut to `max_length`.
    `caption + suffix` is tokenised alone, without special tokens, and its length N marks the last N tokens as pooled:
    BOS, header and instruction act through attention only (LLM2Vec `tokenize` and `_skip_instruction`). So it is for
    texts that are not cut, tokenizers that append nothing and captions that are not merged with what is in front. Of a
    text that was cut the last tokens of the header are pooled too, as many as were cut off; an appended EOS is pooled
    in place of the caption's first token; a merge moves the border by its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: TeacherSpec) -> None:
        self.tokenizer = tokenizer
        self.spec = spec
        filler = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad_token_id: int = next(token for token in filler if isinstance(token, int))

    def encode(self, texts: Sequence[str], instructions: Sequence[str] | None = None) -> list[tuple[list[int], int]]:
        """Token ids of each text and how many of them, at the end, are pooled.

        Args:
            texts: captions.
            instructions: one per text, "" for none; default the spec's own for all.

        Raises:
            ValueError: if a text is empty or only whitespace.
        """
        if not texts:
            return []
        if instructions is None:
            instructions = [self.spec.instruction] * len(texts)
        bodies, whole = [], []
        for number, (text, instruction) in enumerate(zip(texts, instructions, strict=True)):
            text = text.strip()  # with leading whitespace the two token counts below would disagree
            if not text:
                raise ValueError(f"text {number} is empty; every caption needs at least one word")
            bodies.append(text + self.spec.chat_suffix)
            header = instruction + INSTRUCTION_SEPARATOR if instruction else ""
            whole.append(self.spec.chat_prefix + header + bodies[-1])
        cut = {"truncation": True, "max_length": self.spec.max_length, "return_attention_mask": False}
        ids = self.tokenizer(whole, **cut)["input_ids"]
        alone = self.tokenizer(bodies, add_special_tokens=False, **cut)["input_ids"]
        return [(tokens, min(len(body), len(tokens))) for tokens, body in zip(ids, alone, strict=True)]

    def pad(self, encoded: Sequence[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        """Batch what `encode` gave, padded on the right: no position moves, whatever the position embedding.

        Returns:
            `input_ids`, `attention_mask` and `pooling_mask`, each (batch, tokens).
        """
        lengths = torch.tensor([len(ids) for ids, _ in encoded])
        pooled = torch.tensor([num_pooled for _, num_pooled in encoded])
        positions = torch.arange(int(lengths.max()))
        input_ids = torch.full((len(encoded), len(positions)), self.pad_token_id)
        for row, (ids, _) in zip(input_ids, encoded, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        real = positions < lengths[:, None]
        is_pooled = real & (positions >= (lengths - pooled)[:, None])
        return {"input_ids": input_ids, "attention_mask": real.long(), "pooling_mask": is_pooled.long()}

    def __call__(self, texts: Sequence[str], instructions: Sequence[str] | None = None) -> dict[str, torch.Tensor]:
        return self.pad(self.encode(texts, instructions))


class CaptionEncoder(nn.Module):
    """LLM, tokenizer and spec: captions in, vectors out.

    Args:
        llm: decoder without a language model head, such as `LlamaModel`.
        tokenizer: its tokenizer.
        spec: how captions are wrapped and pooled.
    """

    def __init__(self, llm: nn.Module, tokenizer: PreTrainedTokenizerBase, spec: TeacherSpec) -> None:
        super().__init__()
        self.llm: Any = llm
        self.spec = spec
        self.tokenize = CaptionTokenizer(tokenizer, spec)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        device: torch.device | str = "cpu",
    ) -> CaptionEncoder:
        """Load a teacher directory, or one on the hub, and check on `device` that it behaves as its spec says.

        Raises:
            FileNotFoundError: if it is no teacher.
            ValueError: if the LLM is not bidirectional, though the spec says so.
        """
        local = _local_directory(str(directory))
        spec = TeacherSpec.load(local)
        llm = AutoModel.from_pretrained(local, dtype=dtype, attn_implementation=attn_implementation)
        llm.eval().to(device)
        if spec.bidirectional:
            check_bidirectional(llm)
        return cls(llm, AutoTokenizer.from_pretrained(local), spec)

    @classmethod
    def from_llm(
        cls,
        name: str,
        *,
        spec: TeacherSpec,
        dtype: torch.dtype | str = "auto",
        attn_implementation: str | None = None,
        device: torch.device | str = "cpu",
    ) -> CaptionEncoder:
        """Make an untuned teacher of any decoder LLM that transformers loads.

        Args:
            name: directory or hub id of the LLM.
            spec: the lowest `num_hidden_layers` are kept, the others not even read.
            dtype: of the weights.
            attn_implementation: default transformers' choice (SDPA where the family has it).
            device: where it is put and checked.

        Raises:
            FileNotFoundError: if there is no such model.
            ValueError: if the family ignores `is_causal=false`.
        """
        llm, tokenizer = load_llm(
            AutoModel,
            name,
            num_hidden_layers=spec.num_hidden_layers,
            bidirectional=spec.bidirectional,
            dtype=dtype,
            attn_implementation=attn_implementation,
            device=device,
        )
        return cls(llm, tokenizer, spec)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.tokenize.tokenizer

    @property
    def embedding_dim(self) -> int:
        return self.llm.config.hidden_size

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pooling_mask: torch.Tensor
    ) -> torch.Tensor:
        """Encode tokenised captions.

        Args:
            input_ids: (batch, tokens).
            attention_mask: (batch, tokens), 1 for real tokens.
            pooling_mask: (batch, tokens), 1 for tokens that are pooled.

        Returns:
            (batch, dim) float32; L2-normalised only if the spec says so.
        """
        states = self.llm(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        embeddings = pool(states, pooling_mask, self.spec.pooling)
        return F.normalize(embeddings, dim=-1) if self.spec.normalized else embeddings

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the teacher directory. An adapter must have been merged before."""
        directory = Path(directory)
        check_layers(self.llm, self.spec.num_hidden_layers)
        self.llm.save_pretrained(directory)
        if isinstance(self.tokenizer, PreTrainedTokenizerFast):
            backend = self.tokenizer.backend_tokenizer  # remembers, and would write, how it was called last
            backend.no_truncation()
            backend.no_padding()
        self.tokenizer.save_pretrained(directory)
        self.spec.save(directory)


def pool(states: torch.Tensor, pooling_mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Weighted mean of hidden states, in float32.

    Args:
        states: (batch, tokens, dim).
        pooling_mask: (batch, tokens), 1 for tokens that count; at least one in each row.
        pooling: see `TeacherSpec.pooling`.

    Returns:
        (batch, dim).
    """
    weights = pooling_mask.float()
    rank = weights.cumsum(dim=1)  # 1, 2, 3 ... over the pooled tokens
    if pooling == "last":
        weights = weights * (rank == rank[:, -1:])
    elif pooling == "weighted_mean":
        weights = weights * rank
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bt,btd->bd", weights, states.float())


@torch.inference_mode()
def encode_texts(
    encoder: CaptionEncoder, texts: Sequence[str], batch_tokens: int = 4096, instructions: Sequence[str] | None = None
) -> torch.Tensor:
    """Encode any number of texts in batches of similar length.

    Args:
        encoder: the teacher; put into evaluation mode.
        texts: captions.
        batch_tokens: padded tokens in a batch, at most (one text may have more).
        instructions: one per text; default the spec's own.

    Returns:
        (texts, dim) float32 on the CPU, in the order of `texts`.
    """
    encoder.eval()
    encoded = encoder.tokenize.encode(texts, instructions)
    embeddings = torch.empty(len(texts), encoder.embedding_dim)
    for batch in length_buckets([len(ids) for ids, _ in encoded], batch_tokens):
        inputs = encoder.tokenize.pad([encoded[index] for index in batch])
        vectors = encoder(**{name: tensor.to(encoder.device) for name, tensor in inputs.items()})
        embeddings[batch] = vectors.cpu()
    return embeddings


def length_buckets(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices of items in batches of similar length, longest first, of at most `batch_tokens` padded tokens."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > batch_tokens:
            batches.append([])
        batches[-1].append(index)
    return batches


def derive_chat_wrapper(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prefix and suffix of a lone user turn in the tokenizer's chat template: no system turn, no assistant header.

    The prefix is read off a second user turn, since many templates put a default system turn before the first. The
    suffix loses trailing whitespace (LLM2Vec `prepare_for_tokenization`), the prefix a BOS token, which some templates
    repeat with every turn (Llama-2): the tokenizer puts its own in front.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path} has no chat template; set model.chat to none, or to custom with "
            "model.chat_prefix and model.chat_suffix"
        )
    user, assistant, second = "first question", "first answer", "second question"
    turns = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
        {"role": "user", "content": second},
    ]
    two = str(tokenizer.apply_chat_template(turns[:2], tokenize=False))
    three = str(tokenizer.apply_chat_template(turns, tokenize=False))
    end_of_assistant = two.partition(assistant)[2].rstrip()
    between, _, suffix = three.partition(assistant)[2].partition(second)
    prefix = between.removeprefix(end_of_assistant).lstrip().removeprefix(str(tokenizer.bos_token or ""))
    return prefix, suffix.rstrip()


def _local_directory(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"teacher {name} does not exist; make one with `llm2clip finetune-llm`")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
