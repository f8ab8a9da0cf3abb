"""Caption embeddings on disk: safetensors shards that are memory-mapped, and an index from captions to their rows.

Layout of the directory that `llm2clip extract-embeddings` writes (N shards, one index per data source):

    shard-00000.safetensors   `caption_embeddings` (rows, dim); every distinct caption text is one row of one shard
    index-0.parquet           one line per sample: `id`, `kind` (list), `row` (list, counted over all shards)
    manifest.json             teacher fingerprint, dim, dtype, whether normalised, counts, digests; written last
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from llm2clip.run_dir import atomic_write, read_manifest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llm2clip.caption_data import CaptionData

TENSOR = "caption_embeddings"
METADATA = "llm2clip"
"""One metadata entry, holding JSON: safetensors writes several in random order, and shards must be reproducible."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAFETENSORS_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_NUMPY_CARRIERS = {"bfloat16": np.int16, "float16": np.int16, "float32": np.int32}  # numpy has no bfloat16: bits only


@dataclass(frozen=True)
class ShardHeader:
    """What the first bytes of a shard say."""

    num_rows: int
    dim: int
    dtype: str
    """Name of the torch dtype, such as `bfloat16`."""
    offset: int
    """Bytes before the first vector."""
    metadata: dict[str, Any]
    """What `write_shard` was given, and `vectors`, the sha256 of the vectors' bytes."""


def shard_name(number: int) -> str:
    """File name of a shard, relative to the store."""
    return f"shard-{number:05d}.safetensors"


def write_shard(path: Path, vectors: torch.Tensor, metadata: dict[str, Any]) -> None:
    """Write one shard, whole or not at all.

    Args:
        path: file to write.
        vectors: (rows, dim), in the dtype to store.
        metadata: JSON-able facts, kept in the header.

    Raises:
        OSError: if the disk is full or not writable; nothing is left behind.
    """
    vectors = vectors.contiguous()
    digest = hashlib.sha256(vectors.view(torch.uint8).numpy().data).hexdigest()
    header = json.dumps({**metadata, "vectors": digest}, sort_keys=True)
    # Not save_file: that reports a full disk as SafetensorError.
    atomic_write(path, save({TENSOR: vectors}, metadata={METADATA: header}))


def read_header(path: Path) -> ShardHeader:
    """Parse the header of a shard and check it against the size of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is cut off or no shard.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= size - 8:
            raise ValueError(f"{path} is no safetensors file or is cut off ({size} bytes)")
        try:
            header = json.loads(file.read(length))
            tensor = header[TENSOR]
            num_rows, dim = tensor["shape"]
            begin, end = tensor["data_offsets"]
            dtype = _SAFETENSORS_NAMES[tensor["dtype"]]
            metadata = json.loads(header["__metadata__"][METADATA])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no shard of caption embeddings ({type(error).__name__}: {error})") from None
    offset = 8 + length + begin
    expected = num_rows * dim * DTYPES[dtype].itemsize
    if end - begin != expected or size != offset + expected:
        raise ValueError(f"{path} is cut off: {size} bytes, expected {offset + expected}")
    return ShardHeader(num_rows=num_rows, dim=dim, dtype=dtype, offset=offset, metadata=metadata)


def map_shard(path: Path, header: ShardHeader) -> np.ndarray:
    """The vectors of a shard as a read-only memory map of integers that carry their bits: (rows, dim)."""
    carrier = _NUMPY_CARRIERS[header.dtype]
    mapped = np.memmap(path, carrier, mode="r", offset=header.offset, shape=(header.num_rows, header.dim))
    return mapped.view(np.ndarray)  # indexing np.memmap itself is five times slower


def vectors_are_intact(path: Path, header: ShardHeader) -> bool:
    """Whether the vectors of a shard still have the digest they were written with (reads the whole file)."""
    return hashlib.sha256(map_shard(path, header).data).hexdigest() == header.metadata.get("vectors")


class CaptionRows:
    """Where the captions of one data source are in the store.

    Attributes:
        offsets: (num_samples + 1,) int64; captions `offsets[i]` to `offsets[i + 1]` are those of sample `i`.
        rows: (num_captions,) integer; embedding row of every caption, sample after sample.
    """

    def __init__(self, offsets: np.ndarray, rows: np.ndarray) -> None:
        self.offsets = offsets
        self.rows = rows

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, position: tuple[int, int]) -> int:
        """Embedding row of caption `j` of sample `i`, for `rows[i, j]`.

        Raises:
            IndexError: if there is no such sample or caption.
        """
        sample, caption = position
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} of {len(self)}")
        start, end = self.offsets[sample], self.offsets[sample + 1]
        if not 0 <= caption < end - start:
            raise IndexError(f"caption {caption} of {end - start} of sample {sample}")
        return int(self.rows[start + caption])


class EmbeddingStore:
    """Read-only random access to a complete directory of caption embeddings. Cheap to pickle; processes share pages.

    Args:
        path: output directory of `llm2clip extract-embeddings`.

    Attributes:
        dim: length of a vector.
        dtype: name of the dtype on disk, such as `bfloat16`.
        normalized: whether the stored vectors are L2-normalised.
        teacher_fingerprint: content digest of the teacher that made them.
        num_rows: number of distinct texts.

    Raises:
        FileNotFoundError: if the directory is missing or not complete, or a shard is gone.
        ValueError: if it is no such directory, or a shard does not match the manifest.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest["stage"] != "extract-embeddings":
            raise ValueError(f"{path} was written by {manifest['stage']}, expected a directory of extract-embeddings")
        self.manifest = manifest
        self.dim: int = manifest["dim"]
        self.dtype: str = manifest["dtype"]
        self.normalized: bool = manifest["normalized"]
        self.teacher_fingerprint: str = manifest["teacher_fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self._rows_per_shard: int = manifest["rows_per_shard"]
        self._shards = [self._open_shard(number, facts) for number, facts in enumerate(manifest["shards"])]

    def __reduce__(self) -> tuple[type[EmbeddingStore], tuple[Path]]:
        return EmbeddingStore, (self.path,)  # a pickled memory map would carry all the vectors

    def __len__(self) -> int:
        return self.num_rows

    def _open_shard(self, number: int, facts: dict[str, Any]) -> np.ndarray:
        path = self.path / shard_name(number)
        try:
            header = read_header(path)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing; {self._how_to_repair()}") from None
        except ValueError as error:
            raise ValueError(f"{error}; {self._how_to_repair()}") from None
        got = (header.num_rows, header.dim, header.dtype, header.metadata["texts"])
        expected = (facts["num_rows"], self.dim, self.dtype, facts["texts"])
        if got != expected:
            raise ValueError(
                f"{path} is not the shard of the manifest: rows, dim, dtype and text digest are {got}, expected "
                f"{expected}; {self._how_to_repair()}"
            )
        return map_shard(path, header)

    def _how_to_repair(self) -> str:
        return f"delete {self.path / 'manifest.json'} and run the same extract-embeddings command again"

    def rows(self, data: CaptionData) -> CaptionRows:
        """Find the captions of a data source.

        Raises:
            ValueError: if its captions, as they are now, were not what this store was made from.
        """
        for source in self.manifest["data"]:
            if source["fingerprint"] == data.fingerprint:
                return read_index(self.path / source["index"])
        held = ", ".join(f"{source['path']} ({source['fingerprint'][:12]})" for source in self.manifest["data"])
        raise ValueError(
            f"{self.path} has no embeddings of these captions: their fingerprint is {data.fingerprint[:12]}, "
            f"the store holds {held}; run extract-embeddings with this data among its sources"
        )

    def gather(self, rows: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Read vectors as they are stored.

        Args:
            rows: n row numbers, in any order, repeats allowed.

        Returns:
            (n, dim) float32, on the CPU.

        Raises:
            IndexError: if a row is not in the store.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < self.num_rows:
            raise IndexError(f"rows {rows.min()} to {rows.max()} asked for, the store has {self.num_rows}")
        vectors = np.empty((len(rows), self.dim), dtype=_NUMPY_CARRIERS[self.dtype])
        shards, positions = np.divmod(rows, self._rows_per_shard)
        for target, shard, position in zip(vectors, shards.tolist(), positions.tolist(), strict=True):
            target[:] = self._shards[shard][position]
        return torch.from_numpy(vectors).view(DTYPES[self.dtype]).float()

    def moments(self, rows: Sequence[int] | np.ndarray) -> tuple[torch.Tensor, float]:
        """Mean and spread of L2-normalised vectors, for the adapter's input normalisation.

        Args:
            rows: row numbers; a row that is repeated counts as often.

        Returns:
            mean, (dim,) float32, and the root mean square, over all vectors and coordinates, of what is left when the
            mean is taken away.

        Raises:
            ValueError: if `rows` is empty.
        """
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows):
            raise ValueError("no rows to take the moments of")
        total = torch.zeros(self.dim, dtype=torch.float64)
        squares = 0.0
        for start in range(0, len(rows), 8192):
            vectors = torch.nn.functional.normalize(self.gather(rows[start : start + 8192]).double(), dim=-1)
            total += vectors.sum(dim=0)
            squares += vectors.square().sum().item()
        mean = total / len(rows)
        variance = (squares / len(rows) - mean.square().sum().item()) / self.dim
        return mean.float(), max(variance, 0.0) ** 0.5

    def require(
        self, *, needed_by: str | Path, teacher_fingerprint: str | None = None, dim: int | None = None
    ) -> None:
        """Refuse a store that does not belong to what is to be used with it.

        Args:
            needed_by: what has the expectation, for the message: a model or teacher directory.
            teacher_fingerprint: of the teacher whose vectors are expected.
            dim: expected length of a vector.

        Raises:
            ValueError: naming both sides.
        """
        if teacher_fingerprint is not None and teacher_fingerprint != self.teacher_fingerprint:
            raise ValueError(
                f"{self.path} holds embeddings of teacher {self.teacher_fingerprint[:12]}, but {needed_by} belongs to "
                f"teacher {teacher_fingerprint[:12]}; run extract-embeddings with that teacher"
            )
        if dim is not None and dim != self.dim:
            raise ValueError(
                f"embedding dim {self.dim} in {self.path} != {dim} expected by {needed_by}; "
                "run extract-embeddings with the teacher it was made for, or change its caption_embedding_dim"
            )


def write_index(
    path: Path, ids: Sequence[str] | pa.Array, kinds: Sequence[str] | pa.Array, offsets: np.ndarray, rows: np.ndarray
) -> None:
    """Write the index of one data source.

    Args:
        path: parquet file to write, whole or not at all.
        ids: of every sample.
        kinds: of every caption, sample after sample.
        offsets: (num_samples + 1,), as in `CaptionRows`.
        rows: (num_captions,), as in `CaptionRows`.
    """
    starts = pa.array(offsets, pa.int64())
    table = pa.table(
        {
            "id": ids,
            "kind": pa.LargeListArray.from_arrays(starts, pa.array(kinds)),
            "row": pa.LargeListArray.from_arrays(starts, pa.array(rows)),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    atomic_write(path, sink.getvalue().to_pybytes())


def read_index(path: Path) -> CaptionRows:
    """Read what `write_index` wrote, without ids and kinds."""
    lists = pq.read_table(path, columns=["row"])["row"].combine_chunks()
    return CaptionRows(lists.offsets.to_numpy(), lists.values.to_numpy())
