"""What lmms-eval's entry point `lmms_eval.models` finds: `lmms-eval --model llm2clip_llava` is `LlavaAdapter`.

Imported whenever lmms-eval is, and while it is: nothing is imported here before it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "llm2clip_llava"


def manifest() -> ModelManifest:
    """Where lmms-eval finds the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="llm2clip_eval.lmms_model.LlavaAdapter")
