"""What lmms-eval's entry point `lmms_eval.models` finds: `lmms-eval --model llm2clip_llava` is `LlavaAdapter`.

Imported whenever lmms-eval is, so nothing heavy is imported here.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MODEL_ID = "llm2clip_llava"
MANIFEST = ModelManifest(model_id=MODEL_ID, chat_class_path="llm2clip_eval.lmms_model.LlavaAdapter")
