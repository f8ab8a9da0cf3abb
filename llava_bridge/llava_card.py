"""The README.md of an exported LLaVA: what it is, how to use it, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm2clip import __version__
from llm2clip.model_card import provenance, stage_row
from llm2clip.run_dir import atomic_write

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

TEMPLATE = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, llm2clip]
---

# LLaVA with a {tower_type} tower

A plain `LlavaForConditionalGeneration`: {num_parameters:.0f} M parameters, {num_image_tokens} tokens for an image of
{image_size} px, LLM of type {llm_type}. Trained by {training} of LLaVA-1.5 (Liu et al. 2023, arXiv
2310.03744).{adapters}

## Use

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained("model", dtype="auto")
processor = AutoProcessor.from_pretrained("model")
content = [{{"type": "image"}}, {{"type": "text", "text": "What is in the picture?"}}]
messages = [{{"role": "user", "content": content}}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=Image.open("picture.png"), text=prompt, return_tensors="pt").to(model.dtype)
ids = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

Tensors are named as transformers 4.50 names them, which 4.57, 5.x and vLLM read as well. A fresh process with
transformers {transformers} and without the training code found the same logits.

## Where it comes from

Each line is one stage; its fingerprint is a digest of everything that it wrote.

| stage | fingerprint | read |
|---|---|---|
{stages}

Made by llm2clip {version}.

## Licence

The weights carry no licence of their own. What may be done with them follows from the licences of the LLM, the vision
tower, the images and the dialogues above.
"""


ADAPTERS = """

**The LLM's adapters are apart**, in `../adapter`: this model is the one before they were trained, and so is what was
verified. `peft.PeftModel.from_pretrained(model, "../adapter")` puts them in."""


def write_model_card(
    directory: Path,
    trained: str,
    model: LlavaForConditionalGeneration,
    verification: Mapping[str, Any],
    *,
    has_adapters: bool,
) -> None:
    """Write `directory/README.md`.

    Args:
        directory: exported model.
        trained: run directory it was made from.
        model: the exported model.
        verification: report of `export_check.check`.
        has_adapters: whether adapters were written beside it.
    """
    config: Any = model.config
    history = list(provenance(Path(trained)))
    stages = [name for name in ("pretrain", "finetune") if name in {manifest["stage"] for _, manifest in history}]
    card = TEMPLATE.format(
        tower_type=config.vision_config.model_type,
        llm_type=config.text_config.model_type,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        num_image_tokens=config.image_seq_length,
        image_size=config.vision_config.image_size,
        transformers=verification["transformers"],
        training="both stages" if len(stages) == 2 else f"one stage, {stages[0]},",
        adapters=ADAPTERS if has_adapters else "",
        stages="\n".join(stage_row(path, manifest) for path, manifest in history),
        version=__version__,
    )
    atomic_write(directory / "README.md", card)
