"""Which parameters of a LLaVA model are trained, how fast, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llm2clip.run_dir import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import nn

    from llava_bridge.modeling import LlavaForTraining

Part = Literal["vision", "projector", "llm"]
PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "llm": ("model.language_model.", "lm_head."),
}
WEIGHTS = "trained.safetensors"
"""Of a stage's output and of its checkpoints: every tensor that is not the tower's or the LLM's own."""
NEVER_USED = ("mask_token",)
"""Parameters of some towers (DINOv2) that only their own pretraining uses."""


@dataclass(kw_only=True)
class TuneConfig:
    """What is trained of each part."""

    vision: Literal["frozen", "full", "lora"] = "frozen"
    """The vision tower, up to the feature layer."""
    projector: Literal["frozen", "full"] = "full"
    """The projector between the two."""
    llm: Literal["frozen", "full", "lora", "qlora"] = "full"
    """The LLM; qlora holds it in 4 bits (needs bitsandbytes)."""
    vision_last_layers: int | None = None
    """With vision `full`: only this many layers before the feature layer; None is all of the tower."""


@dataclass(kw_only=True)
class LoraConfig:
    """Adapters on every linear layer of a part; defaults are LLaVA's scripts/v1_5/finetune_lora.sh."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05


def part_of(name: str) -> Part:
    """The part that a parameter of the model belongs to."""
    for part, prefixes in PREFIXES.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"parameter {name!r} belongs to no part of a LLaVA model")


def set_trainable(model: LlavaForTraining, tune: TuneConfig, lora: LoraConfig) -> None:
    """Freeze, unfreeze and put in adapters, in place.

    Args:
        model: after `prepare_for_training`.
        tune: what is trained.
        lora: size of the adapters, where `tune` asks for any.

    Raises:
        ValueError: if more tower layers are asked for than there are up to the feature layer.
    """
    add_lora(model, parts_with_lora(tune.vision, tune.llm), lora)
    vision_names = _vision_names(model, tune.vision_last_layers) if tune.vision == "full" else set()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        part = part_of(name)
        wanted = name in vision_names if part == "vision" else getattr(tune, part) == "full"
        parameter.requires_grad_(wanted)


def parts_with_lora(vision: str, llm: str) -> list[Part]:
    """The parts that have adapters, of how each is tuned."""
    tuned: dict[Part, str] = {"vision": vision, "llm": llm}
    return [part for part, how in tuned.items() if how in ("lora", "qlora")]


def _vision_names(model: LlavaForTraining, last_layers: int | None) -> set[str]:
    """Names of the tower's parameters to train in full."""
    from llava_bridge.tower import layers_of

    tower, kept = model.model.vision_tower, model.tower_spec.num_kept_layers
    chosen: Any = [tower]
    if last_layers is not None:
        if not 0 < last_layers <= kept:
            raise ValueError(f"tune.vision_last_layers is {last_layers}; expected 1 to {kept}, the layers in use")
        chosen = layers_of(tower, kept)[kept - last_layers :]
    wanted = {id(parameter) for module in chosen for parameter in module.parameters()}
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in wanted and not name.endswith(NEVER_USED)
    }


def linear_layers(model: nn.Module, parts: Iterable[Part]) -> list[str]:
    """Full names of the linear layers of these parts; the head is left out, as in QLoRA and LLaVA."""
    from torch import nn

    prefixes = tuple(prefix for part in parts for prefix in PREFIXES[part] if prefix != "lm_head.")
    return [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(prefixes)
    ]


def add_lora(model: nn.Module, parts: Sequence[Part], lora: LoraConfig) -> None:
    """Put adapters of PEFT on every linear layer of these parts, in place; everything else is frozen by it."""
    import peft

    if parts:
        names = linear_layers(model, parts)
        settings = peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
        peft.inject_adapter_in_model(settings, model)


def names_with_adapters(names: Iterable[str], model: nn.Module) -> set[str]:
    """Names of tensors of a model as they are since adapters were put around some of its layers."""
    own = model.state_dict().keys()
    wrapped = {name: "{0}.base_layer.{2}".format(*name.rpartition(".")) for name in names}
    return {name if name in own else inner for name, inner in wrapped.items()}


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _take_out(model: nn.Module, name: str, layer: Any) -> None:
    """Put the layer that an adapter wraps back in its place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer.get_base_layer())


def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the weights they belong to and take them out, in place."""
    for name, layer in _lora_layers(model):
        layer.merge(safe_merge=True)
        _take_out(model, name, layer)


def take_out_lora(model: nn.Module, directory: Path, base: str) -> None:
    """Write the adapters as PEFT's `PeftModel.from_pretrained` reads them, and take them out unmerged, in place.

    Args:
        model: with adapters of one size.
        directory: to write.
        base: what the adapters' configuration names as their base model.
    """
    import peft
    from safetensors.torch import save_file

    tensors, names, settings = {}, [], {}
    for name, layer in _lora_layers(model):
        names.append(name)
        settings = {"r": layer.r["default"], "lora_alpha": layer.lora_alpha["default"]}
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)["default"].weight
            tensors[f"base_model.model.{name}.{matrix}.weight"] = weight.detach().contiguous()
        _take_out(model, name, layer)
    directory.mkdir(parents=True, exist_ok=True)
    config = peft.LoraConfig(**settings, target_modules=names, base_model_name_or_path=base, inference_mode=True)
    config.save_pretrained(str(directory))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def learning_rate_scale(base: float, rates: Mapping[Part, float | None]) -> Callable[[str], float]:
    """Parameter name -> factor on the learning rate `base`; a part without a rate of its own has 1."""
    factors = {part: 1.0 if (rate := rates.get(part)) is None else rate / base for part in PREFIXES}
    return lambda name: factors[part_of(name)]


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Trained and frozen parameters of each part."""
    counts = {part: {"trained": 0, "frozen": 0} for part in PREFIXES}
    for name, parameter in model.named_parameters():
        counts[part_of(name)]["trained" if parameter.requires_grad else "frozen"] += parameter.numel()
    return counts


def trained_names(model: nn.Module) -> set[str]:
    """Names of the parameters that are trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_tensors(
    path: Path, model: nn.Module, names: Iterable[str], metadata: Mapping[str, str], state_dict: Any = None
) -> None:
    """Write these tensors of a model as one safetensors file, whole or not at all.

    Args:
        path: the file.
        model: whose tensors they are.
        names: which.
        metadata: texts for the header.
        state_dict: what to take them from, if the model's own are sharded over processes.
    """
    from safetensors.torch import save_file

    tensors = model.state_dict() if state_dict is None else state_dict
    chosen = {name: tensors[name].detach().cpu().contiguous() for name in sorted(names)}
    with atomic_path(path) as temporary:
        # one entry: safetensors writes several in any order, and a resumed run must end with the same bytes
        save_file(chosen, temporary, metadata={"llava_bridge": json.dumps(dict(metadata))})


def load_tensors(path: Path, model: nn.Module) -> set[str]:
    """Write the tensors of a file into a model that has all of them.

    Returns:
        Their names.

    Raises:
        ValueError: if the model has no such tensor, or one of another shape.
    """
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = load_file(path)
    own = model.state_dict()
    for name, tensor in tensors.items():
        if name not in own or own[name].shape != tensor.shape:
            found = tuple(own[name].shape) if name in own else "nothing"
            raise ValueError(f"{path}: {name} is {tuple(tensor.shape)}, the model has {found}; another tower or LLM?")
    model.load_state_dict(tensors, strict=False)
    return set(tensors)
