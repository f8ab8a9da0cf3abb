"""Decoder LLMs as bidirectional encoders: loading, checking, LoRA adapters."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

PADDING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2.5e-1}
"""Largest relative change of a hidden state that padding may cause by rounding."""


def load_llm(
    model_class: Any,
    name: str,
    *,
    num_hidden_layers: int | None = None,
    bidirectional: bool = True,
    dtype: torch.dtype | str = "auto",
    attn_implementation: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a decoder LLM, in evaluation mode, and its tokenizer.

    Args:
        model_class: `AutoModel` for the decoder alone, `AutoModelForCausalLM` for the one with its head.
        name: directory or hub id.
        num_hidden_layers: keep only that many of the lowest layers; None keeps all.
        bidirectional: set `is_causal=False` and check that the model follows it.
        dtype: of the weights.
        attn_implementation: default transformers' choice.
        device: where it is put, and checked: FlashAttention runs on GPUs only.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has fewer layers, or ignores `is_causal`.
    """
    config = load_llm_config(name, num_hidden_layers)
    config.is_causal = not bidirectional
    config.use_cache = False
    with _errors_only():  # else it reports every weight of the layers that are left out
        llm, report = model_class.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    if report["missing_keys"]:
        raise ValueError(f"{name} has no weights for {sorted(report['missing_keys'])[:3]}; is its download complete?")
    llm.eval().to(device)
    if bidirectional:
        check_bidirectional(llm.base_model)
    return llm, AutoTokenizer.from_pretrained(name)


def load_llm_config(name: str, num_hidden_layers: int | None = None) -> Any:
    """Configuration of an LLM of which only the lowest layers are kept.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it has fewer layers than asked for.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise FileNotFoundError(f"model.name: no LLM at {name}: {error}") from error
    total = config.num_hidden_layers
    if num_hidden_layers is None or num_hidden_layers == total:
        return config
    if not 0 < num_hidden_layers <= total:
        raise ValueError(f"model.num_hidden_layers is {num_hidden_layers}, but {name} has 1 to {total} layers")
    for key, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:  # layer_types and the like: one entry for each layer
            setattr(config, key, value[:num_hidden_layers])
    config.num_hidden_layers = num_hidden_layers
    return config


@torch.inference_mode()
def check_bidirectional(llm: nn.Module) -> None:
    """Run tiny batches: every token must see every other one, padding none.

    Checked by behaviour, because `is_causal=False` is a mere wish: families and attention kernels may ignore it.

    Args:
        llm: decoder without head, in evaluation mode.

    Raises:
        ValueError: if the first state doesn't move with the last token, or moves with padding.
    """
    model: Any = llm
    device = next(llm.parameters()).device
    size = model.get_input_embeddings().num_embeddings
    tokens = [size * k // 11 for k in range(1, 10)]  # any tokens do; spread, to miss the special ones mostly
    first, second = tokens[:5], [*tokens[:4], tokens[5]]
    padded = torch.tensor([first + tokens[6:8], second + tokens[7:9]], device=device)
    mask = (torch.arange(7, device=device) < 5).long().expand(2, 7)

    def states(ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = model(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return hidden[:, :5].float()

    whole = torch.cat([states(padded[i : i + 1, :5], mask[i : i + 1, :5]) for i in range(2)])
    with_padding = states(padded, mask)
    name = type(llm).__name__
    for result, how in ((whole, "without padding"), (with_padding, "with padding")):
        if torch.equal(result[0, 0], result[1, 0]):
            raise ValueError(
                f"{name} ignores is_causal=False ({how}): changing the last token leaves the first state unchanged. "
                "Choose an LLM with ordinary attention, another model.attn_implementation (eager, sdpa), or "
                "model.bidirectional=false"
            )
    error = ((with_padding - whole).norm(dim=-1) / whole.norm(dim=-1)).max().item()
    if not error <= PADDING_TOLERANCE[model.dtype]:
        raise ValueError(
            f"{name}: padding changes the states of real tokens by {error:.1%}; "
            "try another model.attn_implementation (eager, sdpa)"
        )


def decoder_layers(llm: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers of an LLM."""
    model: Any = llm
    for name, module in llm.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise ValueError(f"{type(llm).__name__} has no list of {model.config.num_hidden_layers} decoder layers")


def check_layers(llm: nn.Module, num_hidden_layers: int) -> None:
    """Assert that an LLM has the recorded number of layers and no adapter left on it."""
    _, layers = decoder_layers(llm)
    assert len(layers) == num_hidden_layers
    assert not any("lora_" in name for name, _ in llm.named_parameters()), "merge the adapter first"


def add_lora(
    model: nn.Module,
    llm: nn.Module,
    *,
    rank: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
    num_layers: int | None,
) -> PeftModel:
    """Freeze a model and put trainable LoRA matrices into the linear layers of its decoder, in place.

    Args:
        model: the decoder, or what it is a part of.
        llm: decoder without head.
        rank: of the adapters.
        alpha: their scale is `alpha / rank`.
        dropout: on their inputs.
        target_modules: last parts of the names of the linear layers.
        num_layers: only the topmost ones; None for all. No gradient is computed below them.

    Returns:
        The PEFT model around `model`.

    Raises:
        ValueError: if a target is not in the model, or it has fewer layers.
    """
    prefix, layers = decoder_layers(llm)
    linear = [name for name, module in llm.named_modules() if hasattr(module, "weight") and _is_linear(module)]
    leaves = {name.rpartition(".")[2] for name in linear}
    if missing := sorted(set(target_modules) - leaves):
        raise ValueError(f"lora.target_modules: {missing} not in {type(llm).__name__}, which has {sorted(leaves)}")
    if num_layers is not None and not 0 < num_layers <= len(layers):
        raise ValueError(f"lora.num_layers is {num_layers}, but the model has 1 to {len(layers)} layers")
    lowest = 0 if num_layers is None else len(layers) - num_layers
    numbered = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    chosen = [
        name
        for name in linear
        if name.rpartition(".")[2] in target_modules
        and (match := numbered.match(name))
        and int(match.group(1)) >= lowest
    ]
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, bias="none", target_modules=chosen)
    return _with_adapter(model, config)


def merge_adapter(llm: Any, directory: str | Path) -> Any:
    """Merge a saved PEFT adapter into an LLM.

    The original attaches adapters of the inner decoder to the model with a head, where no key fits: PEFT then loads
    nothing, with a warning, and the merge changes no weight. Here every key must fit.

    Args:
        llm: decoder without head.
        directory: what `save_pretrained` of a PEFT model of the same decoder wrote.

    Returns:
        The plain LLM with changed weights.

    Raises:
        FileNotFoundError: if there is no adapter.
        ValueError: if a key of the adapter does not fit the model, or one is missing.
    """
    try:
        config = PeftConfig.from_pretrained(str(directory))
        weights = load_peft_weights(str(directory), device="cpu")
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"model.adapters: no PEFT adapter at {directory}: {error}") from error
    model = _with_adapter(llm, config)
    expected = set(get_peft_model_state_dict(model))
    if set(weights) != expected:
        unexpected, missing = sorted(set(weights) - expected), sorted(expected - set(weights))
        raise ValueError(
            f"adapter {directory} does not fit {type(llm).__name__}: {len(unexpected)} keys are not in the model "
            f"({unexpected[:1]}), {len(missing)} of the model are not in the adapter ({missing[:1]}). "
            "It must come from the decoder without its head, and from the same LLM with as many layers"
        )
    set_peft_model_state_dict(model, weights)
    return model.merge_and_unload()  # type: ignore[operator]


def save_decoder_adapter(model: PeftModel, llm: nn.Module, directory: Path) -> None:
    """Save an adapter as if it had been put on the decoder alone, so that `merge_adapter` can use it.

    Args:
        model: what `add_lora` returned for `llm`.
        llm: model with a head, around the decoder.
        directory: where to write.
    """
    head: Any = llm
    prefix = f"base_model.model.{head.base_model_prefix}."
    weights = get_peft_model_state_dict(model)
    assert all(key.startswith(prefix) for key in weights)
    directory.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(str(directory))
    inner = {
        f"base_model.model.{key.removeprefix(prefix)}": value.contiguous().cpu() for key, value in weights.items()
    }
    save_file(inner, directory / "adapter_model.safetensors", metadata={"format": "pt"})


@contextmanager
def _errors_only() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _with_adapter(model: Any, config: PeftConfig) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT 0.21 asks transformers 5.23 by a deprecated name
        return get_peft_model(model, config)  # type: ignore[return-value]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # Conv1D: GPT-2's linear layer
