"""Encode distinct texts with a teacher, shard by shard, into the files of `llm2clip.embedding_store`."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from tqdm import tqdm

from llm2clip.embedding_store import (
    DTYPES,
    EmbeddingStore,
    read_header,
    shard_name,
    vectors_are_intact,
    write_index,
    write_shard,
)
from llm2clip.run_dir import MANIFEST, fingerprint, read_manifest
from llm2clip.teacher import CaptionEncoder, CaptionTokenizer, TeacherSpec, encode_texts, length_buckets

if TYPE_CHECKING:
    from llm2clip.caption_data import CaptionData

logger = logging.getLogger(__name__)

LOG_SECONDS = 10.0
NUM_CHECKED = 64
TOLERANCE = {"float32": 0.01, "float16": 0.02, "bfloat16": 0.05}
"""By compute dtype, largest relative error of a vector that is encoded again, in a batch of another shape."""


class UniqueTexts:
    """The distinct caption texts of several sources, in order of first appearance: text i is row i of the store.

    Attributes:
        texts: (rows,) Arrow strings.
        rows: for every source, (captions,) int32, the row of each caption.
    """

    def __init__(self, sources: Sequence[CaptionData]) -> None:
        encoded = pa.chunked_array([source.texts for source in sources]).dictionary_encode().unify_dictionaries()
        self.texts: pa.LargeStringArray = encoded.chunk(0).dictionary
        self.rows = [np.asarray(chunk.indices) for chunk in encoded.chunks]

    def __len__(self) -> int:
        return len(self.texts)


class EmbeddingWriter:
    """Makes the files of a store. All of its state is on disk: one file for each finished shard.

    Args:
        path: directory to write to.
        texts: what is encoded.
        teacher: teacher directory; loaded when it is needed.
        teacher_fingerprint: its content digest.
        compute_dtype: of the teacher's weights and activations.
        dtype: of the stored vectors.
        batch_tokens: padded tokens in a batch, at most.
        rows_per_shard: texts in one file.
    """

    def __init__(
        self,
        path: Path,
        texts: UniqueTexts,
        *,
        teacher: Path,
        teacher_fingerprint: str,
        compute_dtype: str,
        dtype: str,
        batch_tokens: int,
        rows_per_shard: int,
    ) -> None:
        self.path = path
        self.texts = texts
        self.teacher = teacher
        self.compute_dtype = compute_dtype
        self.dtype = dtype
        self.batch_tokens = batch_tokens
        self.rows_per_shard = rows_per_shard
        self.num_shards = -(-len(texts) // rows_per_shard)
        self._identity = {
            "teacher_fingerprint": teacher_fingerprint,
            "compute_dtype": compute_dtype,
            "batch_tokens": batch_tokens,
        }

    def write_shards(self, rank: int, world_size: int) -> None:
        """Make shards `rank`, `rank + world_size`, ..., those that are not there yet.

        Raises:
            RuntimeError: if a vector is NaN or infinite; names the text.
            OSError: if a shard cannot be written; nothing half-written is left.
        """
        mine = range(rank, self.num_shards, world_size)
        missing = [number for number in mine if not self.is_written(number)]
        logger.info(
            "%d captions, %d distinct texts in %d shards; of %d shards for this process %d are there",
            sum(map(len, self.texts.rows)), len(self.texts), self.num_shards, len(mine), len(mine) - len(missing),
        )  # fmt: skip
        if not missing:
            return
        encoder = self._load_encoder()
        progress = Progress(sum(len(self.shard_texts(number)) for number in missing))
        # One shard ahead in a thread: else a GPU would be idle for about a fifth of the time.
        with ThreadPoolExecutor(max_workers=1) as pool:
            upcoming = pool.submit(tokenize, encoder, self.shard_texts(missing[0]))
            for number, following in zip(missing, [*missing[1:], None], strict=True):
                shard = upcoming.result()
                if following is not None:
                    upcoming = pool.submit(tokenize, encoder, self.shard_texts(following))
                vectors = encode(encoder, shard, self.batch_tokens, DTYPES[self.dtype], progress)
                metadata = {
                    **self._identity,
                    "texts": text_digest(shard.texts),
                    "num_tokens": sum(shard.lengths),
                    "num_truncated": shard.num_truncated,
                }
                write_shard(self.path / shard_name(number), vectors, metadata)
        progress.close()

    def is_written(self, number: int) -> bool:
        """Whether a shard is there, intact, of these texts and made in this way."""
        path = self.path / shard_name(number)
        try:
            header = read_header(path)
        except FileNotFoundError:
            return False
        except ValueError as error:
            logger.warning("%s; making it again", error)
            return False
        identity = {**self._identity, "texts": text_digest(self.shard_texts(number).to_pylist())}
        if header.dtype != self.dtype or not identity.items() <= header.metadata.items():
            logger.warning("%s was made from other texts or in another way; making it again", path)
            return False
        if not vectors_are_intact(path, header):
            logger.warning("%s is corrupted; making it again", path)
            return False
        return True

    def shard_texts(self, number: int) -> pa.LargeStringArray:
        """Texts of a shard, in row order."""
        return self.texts.texts.slice(number * self.rows_per_shard, self.rows_per_shard)

    def write_indices(self, sources: Sequence[CaptionData]) -> tuple[list[str], dict[str, Any]]:
        """Write the index of every source, once all shards are there.

        Returns:
            the files of the store and the facts of its manifest.

        Raises:
            FileNotFoundError: if a shard is missing.
        """
        spec = TeacherSpec.load(self.teacher)
        headers = [read_header(self.path / shard_name(number)) for number in range(self.num_shards)]
        shards = [
            {"file": shard_name(number), "num_rows": header.num_rows, "texts": header.metadata["texts"]}
            for number, header in enumerate(headers)
        ]
        num_truncated = sum(header.metadata["num_truncated"] for header in headers)
        if num_truncated:
            logger.warning(
                "%d of %d texts have more than the teacher's %d tokens and were cut",
                num_truncated, len(self.texts), spec.max_length,
            )  # fmt: skip
        data = []
        for number, (source, rows) in enumerate(zip(sources, self.texts.rows, strict=True)):
            name = f"index-{number}.parquet"
            kinds = pa.DictionaryArray.from_arrays(source.kind_codes, source.kind_names)
            write_index(self.path / name, source.ids, kinds, source.offsets, rows)
            origin = {"path": str(source.path), "fingerprint": source.fingerprint, "index": name}
            counts = {"num_samples": len(source), "num_captions": len(rows), "num_skipped": source.num_skipped}
            data.append({**origin, **counts, "kinds": dict(source.kinds)})
        facts = {
            "teacher": str(self.teacher),
            "teacher_fingerprint": self._identity["teacher_fingerprint"],
            "dim": headers[0].dim,
            "dtype": self.dtype,
            "normalized": spec.normalized,
            "max_length": spec.max_length,
            "num_rows": len(self.texts),
            "num_tokens": sum(header.metadata["num_tokens"] for header in headers),
            "num_truncated": num_truncated,
            "rows_per_shard": self.rows_per_shard,
            "shards": shards,
            "data": data,
        }
        return [entry["file"] for entry in shards] + [entry["index"] for entry in data], facts

    def verify(self) -> None:
        """Check the digest of every file of the complete store, and encode texts from all over it again.

        Raises:
            ValueError: naming what does not agree.
        """
        manifest = self.path / MANIFEST
        digests = read_manifest(self.path)["outputs"]
        damaged = [name for name, digest in digests.items() if not _has_digest(self.path / name, digest)]
        if damaged:
            raise ValueError(
                f"{self.path}: {', '.join(damaged)} missing or changed since {manifest} was written; delete "
                f"{manifest} and run the same extract-embeddings command again: shards that are intact are kept"
            )
        rows = np.unique(np.linspace(0, len(self.texts) - 1, NUM_CHECKED).astype(np.int64))
        texts: list[str] = self.texts.texts.take(pa.array(rows)).to_pylist()
        stored = EmbeddingStore(self.path).gather(rows)
        again = encode_texts(self._load_encoder(), texts, self.batch_tokens)
        errors = (stored - again).norm(dim=1) / again.norm(dim=1)
        worst = int(errors.argmax())
        tolerance = TOLERANCE[self.compute_dtype]
        if not errors[worst] <= tolerance:
            raise ValueError(
                f"{self.path}: row {rows[worst]} differs by {errors[worst]:.1%} from the vector {self.teacher} gives "
                f"now for {texts[worst][:200]!r}, rounding makes {tolerance:.0%} at most; compare "
                f"{self.path / 'environment.json'} with this machine, or extract again with --overwrite true"
            )
        logger.info(
            "verified: digests of %d files, %d texts encoded again with relative errors up to %.1e",
            len(digests), len(rows), errors[worst],
        )  # fmt: skip

    def _load_encoder(self) -> CaptionEncoder:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
        encoder = CaptionEncoder.from_pretrained(self.teacher, dtype=DTYPES[self.compute_dtype], device=device)
        return encoder.eval()


def text_digest(texts: list[str]) -> str:
    """sha256 of the texts, written as a JSON list."""
    return hashlib.sha256(json.dumps(texts, ensure_ascii=False).encode()).hexdigest()


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and fingerprint(path) == digest


@dataclass(frozen=True)
class TokenizedTexts:
    """Texts as the teacher reads them."""

    texts: list[str]
    encoded: list[tuple[list[int], int]]
    """Token ids of each text and how many of them are pooled."""
    num_truncated: int
    """Texts that were longer than the teacher reads."""

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each text."""
        return [len(ids) for ids, _ in self.encoded]


def tokenize(encoder: CaptionEncoder, texts: pa.LargeStringArray) -> TokenizedTexts:
    """Tokenise texts, cut to the teacher's length, and count those that were cut."""
    texts_list: list[str] = texts.to_pylist()
    encoded = encoder.tokenize.encode(texts_list)
    limit = encoder.spec.max_length
    at_limit = [text for text, (ids, _) in zip(texts_list, encoded, strict=True) if len(ids) == limit]
    one_longer = CaptionTokenizer(encoder.tokenizer, replace(encoder.spec, max_length=limit + 1)).encode(at_limit)
    return TokenizedTexts(texts_list, encoded, num_truncated=sum(len(ids) > limit for ids, _ in one_longer))


@torch.inference_mode()
def encode(
    encoder: CaptionEncoder, shard: TokenizedTexts, batch_tokens: int, dtype: torch.dtype, progress: Progress
) -> torch.Tensor:
    """Encode texts in batches of similar length.

    Args:
        encoder: the teacher.
        shard: what to encode.
        batch_tokens: padded tokens in a batch, at most.
        dtype: of the result.
        progress: told of every batch.

    Returns:
        (texts, dim), on the CPU.

    Raises:
        RuntimeError: if a vector is NaN or infinite in `dtype`; names the text.
    """
    vectors = torch.empty(len(shard.texts), encoder.embedding_dim, dtype=dtype)
    for batch in length_buckets(shard.lengths, batch_tokens):
        inputs = encoder.tokenize.pad([shard.encoded[index] for index in batch])
        outputs = encoder(**{name: tensor.to(encoder.device) for name, tensor in inputs.items()}).to(dtype).cpu()
        is_finite = outputs.isfinite().all(dim=1)
        if not is_finite.all():
            text = shard.texts[batch[int(is_finite.int().argmin())]]
            raise RuntimeError(
                f"the teacher's vector is NaN or infinite in {dtype}: {text[:200]!r}; "
                "try compute_dtype and dtype bfloat16 or float32, or remove the text"
            )
        vectors[batch] = outputs
        progress.advance(len(batch))
    return vectors


class Progress:
    """Captions per second, time left and memory: a bar on a terminal, else a log line every few seconds."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._started = self._logged = time.monotonic()
        self._bar = tqdm(total=total, unit="caption", disable=None)  # None: only on a terminal

    def advance(self, number: int) -> None:
        """Count `number` more captions as encoded."""
        self.done += number
        self._bar.update(number)
        now = time.monotonic()
        if now - self._logged < LOG_SECONDS and self.done < self.total:
            return
        self._logged = now
        rate = self.done / (now - self._started)
        memory = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB RAM"
        if torch.cuda.is_available():
            memory += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB GPU"
        if self._bar.disable:
            left = timedelta(seconds=round((self.total - self.done) / rate))
            logger.info("%d of %d captions, %.0f captions/s, %s left, %s", self.done, self.total, rate, left, memory)
        else:
            self._bar.set_postfix_str(memory)

    def close(self) -> None:
        """Finish the bar."""
        self._bar.close()
