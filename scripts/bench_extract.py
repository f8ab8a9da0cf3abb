"""Captions per second of extract-embeddings beside sentence-transformers and a plain batch-32 loop, in one run.

    python scripts/bench_extract.py [--data PATH ...] [--num_captions 500] [--threads 1] [--output bench_extract.json]

A random Llama of SmolLM2-135M's width (8 layers, bidirectional, mean pooling) encodes distinct captions in file order:
some of `--data`, or made up ones, of which an image has an alt-text, two short and two dense captions. The contestants
get the same tokens and weights in the same dtype and tokenise as part of the work; sentence-transformers sorts by
length itself. They are interleaved over the rounds and the median of each is reported. Captions that the data repeats
are an additional factor, `repeats`: only extract-embeddings encodes them once.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

from llm2clip.caption_data import CaptionData
from llm2clip.embedding_writer import Progress, encode, tokenize
from llm2clip.teacher import CaptionEncoder, TeacherSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_captions(paths: list[Path]) -> list[str]:
    """All captions of caption data, repeats included."""
    return [text for path in paths for text in CaptionData.open(path).texts.to_pylist()]


def made_up_captions(num_captions: int) -> list[str]:
    """Five captions an image, in words: alt-text about 10 (very spread), short about 12, dense about 60."""
    rng = np.random.default_rng(0)
    vocabulary = ["".join(rng.choice(list("aeiourstlnmdpckgbh"), size=rng.integers(2, 9))) for _ in range(3000)]
    frequency = 1 / np.arange(10, len(vocabulary) + 10)
    frequency /= frequency.sum()
    texts = []
    while len(texts) < num_captions:
        lengths = [rng.lognormal(2.1, 0.6), *rng.normal(12, 3, size=2), *rng.lognormal(4.0, 0.35, size=2)]
        texts += [" ".join(rng.choice(vocabulary, size=max(2, int(length)), p=frequency)) for length in lengths]
    return texts


def write_teacher(directory: Path, texts: list[str], args: argparse.Namespace) -> None:
    """Write a random Llama with a tokenizer trained on the texts."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=args.width,
        intermediate_size=args.width * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 192 or 1,
        is_causal=False,
    )
    spec = TeacherSpec(base_model="random", num_hidden_layers=args.layers)
    CaptionEncoder(LlamaModel(config), fast, spec).save_pretrained(directory)


def extract(encoder: CaptionEncoder, texts: list[str], batch_tokens: int) -> torch.Tensor:
    """What the stage does with the texts of one shard."""
    shard = tokenize(encoder, pa.array(texts, pa.large_string()))
    return encode(encoder, shard, batch_tokens, torch.float32, Progress(len(texts)))


def batch_32_loop(encoder: CaptionEncoder, texts: list[str]) -> torch.Tensor:
    """What LLM2CLIP's data/extract_embedding.py does: batches of 32 as they come, padded to the longest."""
    vectors = []
    with torch.inference_mode():
        for start in range(0, len(texts), 32):
            batch = encoder.tokenize(texts[start : start + 32])
            vectors.append(encoder(**{name: tensor.to(encoder.device) for name, tensor in batch.items()}).cpu())
    return torch.cat(vectors)


def compare(encoder: CaptionEncoder, peer: SentenceTransformer, texts: list[str], args: argparse.Namespace) -> dict:
    """Time the contestants on the same texts."""
    contestants: dict[str, Callable[[], torch.Tensor]] = {
        "extract-embeddings": lambda: extract(encoder, texts, args.batch_tokens),
        "sentence-transformers": lambda: peer.encode(texts, convert_to_tensor=True, show_progress_bar=False).cpu(),
        "batch-32 loop": lambda: batch_32_loop(encoder, texts),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    vectors = {}
    for number in range(args.rounds + 1):
        for name, contestant in contestants.items():
            start = args.clock()
            vectors[name] = contestant().float()
            if number:  # the first round warms up
                seconds[name].append(args.clock() - start)
    ours = vectors["extract-embeddings"]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "captions": len(texts),
        "tokens": sum(len(ids) for ids, _ in encoder.tokenize.encode(texts)),
        "captions_per_second": {name: round(len(texts) / value, 1) for name, value in median.items()},
        "speedup_over": {name: round(value / median["extract-embeddings"], 2) for name, value in median.items()},
        "largest_relative_difference": {
            name: float(((other - ours).norm(dim=1) / ours.norm(dim=1)).max()) for name, other in vectors.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, nargs="+", default=[], help="caption data; default made up captions")
    parser.add_argument("--num_captions", type=int, default=500, help="that are timed, evenly spaced in the data")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch_tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--cpu_time", action="store_true", help="time processor seconds: on a machine that is shared")
    parser.add_argument("--output", type=Path, default=Path("bench_extract.json"))
    args = parser.parse_args()
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    logging.disable(logging.INFO)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[args.dtype]
    captions = read_captions(args.data) if args.data else made_up_captions(args.num_captions)
    distinct = list(dict.fromkeys(captions))
    chosen = np.linspace(0, len(distinct) - 1, min(len(distinct), args.num_captions)).astype(int)
    texts = [distinct[index] for index in chosen]
    with tempfile.TemporaryDirectory() as directory:
        write_teacher(Path(directory), texts, args)
        encoder = CaptionEncoder.from_pretrained(directory, dtype=dtype).to(device)
        transformer = Transformer(directory, model_kwargs={"dtype": dtype}, max_seq_length=512)
        peer = SentenceTransformer(modules=[transformer, Pooling(args.width, "mean")], device=device)
    keys = ("dtype", "width", "layers", "threads", "batch_tokens", "rounds", "cpu_time")
    result = {
        "data": [str(path) for path in args.data] or "made up",
        "repeats": round(len(captions) / len(distinct), 2),
        **compare(encoder, peer, texts, args),
        **{key: getattr(args, key) for key in keys},
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
