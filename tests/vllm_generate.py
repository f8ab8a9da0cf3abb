"""Answer a question about a picture with vLLM; run with the Python of test_llava_vllm.py's environment.

    python vllm_generate.py IMAGE QUESTION MODEL...

Prints a JSON list with the `token_ids` of each model's answer, and the `logprobs` of each of them.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import PIL.Image
import vllm  # pyright: ignore[reportMissingImports]

NUM_TOKENS = 8


def answer(model: str, image: PIL.Image.Image, question: str) -> dict[str, Any]:
    engine = vllm.LLM(
        model, dtype="float32", max_model_len=256, max_num_seqs=1, enforce_eager=True, limit_mm_per_prompt={"image": 1}
    )
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": question}]
    # A random model also writes tokens of the padded vocabulary, which have no text.
    sampling = vllm.SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=0, ignore_eos=True, detokenize=False)
    output = engine.chat([{"role": "user", "content": content}], sampling)[0].outputs[0]
    chosen = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
    return {"token_ids": list(output.token_ids), "logprobs": chosen}


if __name__ == "__main__":
    with PIL.Image.open(sys.argv[1]) as file:
        picture = file.convert("RGB")
    answers = [answer(model, picture, sys.argv[2]) for model in sys.argv[3:]]
    sys.stdout.write(json.dumps(answers) + "\n")
