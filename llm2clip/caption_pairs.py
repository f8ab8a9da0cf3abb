"""Training pairs for the caption encoder: two captions of one image, or rows of a text-pair file.

Every example is a pure function of the seed and its position in the stream, whatever the number of workers, processes
and interruptions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from llm2clip.caption_data import CaptionData, Sample
from llm2clip.caption_sources import Problem

logger = logging.getLogger(__name__)

ANY = "any"
PAPER_INSTRUCTION = "Given a caption, retrieve a similar relevant caption"  # arXiv 2411.04997 v5
GOLDEN_RATIO = 0.6180339887498949


@dataclass(kw_only=True)
class PairKind:
    """A query caption and a positive caption of the same image."""

    query: str = ANY
    """Caption kind of the query; `any` for all kinds."""
    positive: str = ANY
    """Caption kind of the positive; never the query's own text."""
    weight: float = 1.0
    """Share among the kinds of pairs that an image has."""
    instruction: str = ""
    """Put in front of the query while training."""


@dataclass(kw_only=True)
class CaptionSource:
    """Caption data to draw pairs from."""

    path: Path
    """Caption data, see `llm2clip data check`."""
    fields: dict[str, str] | None = None
    """Caption kind -> field name, for foreign files."""
    weight: float | None = None
    """Share of the batches, relative to the other sources; default the number of rows."""
    pairs: list[PairKind] = field(default_factory=list)
    """Which captions are paired; default any two of an image, with the instruction of the paper."""
    negatives: Literal["none", "random"] = "none"
    """`random`: another image's caption, of the positive's kind, is added as a negative (the original's cc3m set)."""


@dataclass(kw_only=True)
class TextSource:
    """A JSONL file of text pairs, with `query`, `positive` and, in some or all rows, `negative`."""

    path: Path
    """The JSONL file."""
    weight: float | None = None
    """Share of the batches, relative to the other sources; default the number of rows."""
    instructions: list[str] = field(default_factory=list)
    """Put in front of the query; several take turns row by row."""


class PairExample(NamedTuple):
    """One training example; texts are without chat wrapper."""

    query: str
    positive: str
    negative: str | None
    instruction: str
    group: str
    """Image (or query) it belongs to: another example of the same group is no negative."""
    negative_group: str


class PairSource(Protocol):
    """Something to draw examples from."""

    has_negatives: bool

    def __len__(self) -> int: ...

    def example(self, index: int, rng: np.random.Generator) -> PairExample: ...


class CaptionPairs:
    """Pairs of captions of one image.

    Args:
        data: caption data.
        source: which pairs, how often.

    Raises:
        ValueError: if a kind is not in the data, or no image has such a pair.
    """

    def __init__(self, data: CaptionData, source: CaptionSource) -> None:
        self.data = data
        self.kinds = source.pairs or [PairKind(instruction=PAPER_INSTRUCTION)]
        self.has_negatives = source.negatives == "random"
        self._weights = np.array([pair.weight for pair in self.kinds])
        names = {name for pair in self.kinds for name in (pair.query, pair.positive)} - {ANY}
        if unknown := sorted(names - set(data.kind_names)):
            raise ValueError(f"captions.pairs: {source.path} has no caption kind {unknown}, only {data.kind_names}")
        texts = np.asarray(data.texts.dictionary_encode().indices)  # equal texts, equal numbers
        self._has_pair = np.stack([self._rows_with(pair, texts) for pair in self.kinds])  # (pair kinds, rows)
        self._rows = np.flatnonzero(self._has_pair[self._weights > 0].any(axis=0))
        if not len(self._rows):
            wanted = ", ".join(f"{pair.query} -> {pair.positive}" for pair in self.kinds)
            raise ValueError(
                f"captions.pairs: no image of {source.path} has two different captions for {wanted}; "
                f"it holds {dict(data.kinds)} for {len(data)} images"
            )
        if self.has_negatives:
            self._rows_of_kind = {
                name: np.flatnonzero(self._counts(self._is_kind(name)))
                for name in {pair.positive for pair in self.kinds}
            }
            if min(map(len, self._rows_of_kind.values())) < 2:
                raise ValueError(f"captions.negatives: random needs two images with the kind, in {source.path}")

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int, rng: np.random.Generator) -> PairExample:
        """Draw a pair of captions of one image."""
        row = int(self._rows[index])
        weights = self._weights * self._has_pair[:, row]
        kind = self.kinds[rng.choice(len(weights), p=weights / weights.sum())]
        sample = self.data[row]
        queries = [caption.text for caption in sample.captions if kind.query in (ANY, caption.kind)]
        positives = [caption.text for caption in sample.captions if kind.positive in (ANY, caption.kind)]
        pairs = [(query, positive) for query in queries for positive in positives if query != positive]
        query, positive = pairs[rng.integers(len(pairs))]
        negative, negative_group = self._negative(row, kind, rng) if self.has_negatives else (None, "")
        return PairExample(query, positive, negative, kind.instruction, _group(sample), negative_group)

    def _negative(self, row: int, kind: PairKind, rng: np.random.Generator) -> tuple[str, str]:
        rows = self._rows_of_kind[kind.positive]
        other = row
        while other == row:
            other = int(rows[rng.integers(len(rows))])
        sample = self.data[other]
        texts = [caption.text for caption in sample.captions if kind.positive in (ANY, caption.kind)]
        return texts[rng.integers(len(texts))], _group(sample)

    def _is_kind(self, name: str) -> np.ndarray:
        codes = self.data.kind_codes
        return np.ones(len(codes), bool) if name == ANY else codes == self.data.kind_names.index(name)

    def _counts(self, chosen: np.ndarray) -> np.ndarray:
        return np.add.reduceat(chosen, self.data.offsets[:-1], dtype=np.int64)  # (rows,)

    def _rows_with(self, pair: PairKind, texts: np.ndarray) -> np.ndarray:
        """Whether each row has both kinds, with two different texts among them."""
        query, positive = self._is_kind(pair.query), self._is_kind(pair.positive)
        either, starts = query | positive, self.data.offsets[:-1]
        lowest = np.minimum.reduceat(np.where(either, texts, len(texts)), starts)
        highest = np.maximum.reduceat(np.where(either, texts, -1), starts)
        return (self._counts(query) > 0) & (self._counts(positive) > 0) & (lowest < highest)


class TextPairs:
    """Rows of a text-pair file.

    Attributes:
        path: What was opened.
        problems: What was skipped, in file order.
    """

    def __init__(self, source: TextSource, *, max_bad_fraction: float = 0.01) -> None:
        """Read the file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if no row, or less than `1 - max_bad_fraction` of them, can be used.
        """
        if not source.path.is_file():
            raise FileNotFoundError(f"texts.path: {source.path} does not exist; expected a JSONL file of text pairs")
        self.path = source.path
        self.problems: list[Problem] = []
        self._instructions = source.instructions or [""]
        columns: dict[str, list[str | None]] = {"query": [], "positive": [], "negative": []}
        with open(source.path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = _text_pair(line)
                except ValueError as error:
                    self.problems.append(Problem(f"{source.path.name}:{number}", str(error)))
                    continue
                for name, values in columns.items():
                    values.append(row.get(name))
        self._columns = {name: pa.array(values, pa.large_string()) for name, values in columns.items()}
        total = len(self) + len(self.problems)
        if not len(self) or len(self.problems) > max_bad_fraction * total:
            first = "; ".join(f"{problem.where}: {problem.reason}" for problem in self.problems[:3])
            raise ValueError(
                f"texts.path: {len(self.problems)} of {total} rows of {source.path} cannot be used, at most "
                f"{max_bad_fraction:.1%} may be bad (max_bad_fraction). {first}"
            )
        if self.problems:
            logger.warning("%s: %d of %d rows skipped", source.path, len(self.problems), total)
        self.has_negatives = self._columns["negative"].null_count < len(self)

    def __len__(self) -> int:
        return len(self._columns["query"])

    def example(self, index: int, rng: np.random.Generator) -> PairExample:
        """The row; nothing is drawn. All rows of one query are of one group."""
        query, positive, negative = (self._columns[name][index].as_py() for name in ("query", "positive", "negative"))
        return PairExample(
            query, positive, negative, self._instructions[index % len(self._instructions)], f"text: {query}", ""
        )


class PairStream:
    """A finite stream of examples: `stream[position]`.

    A source is chosen for every batch (or every example), in proportion to its weight and spread evenly. Within a
    source examples come in a new random order on each pass.

    Args:
        sources: what to draw from.
        weights: share of each source.
        num_positions: length of the stream.
        batch_size: examples that are contrasted with each other, over all processes.
        batches: `one_source`, as in the original, or `mixed`.
        seed: of everything random.
    """

    def __init__(
        self,
        sources: Sequence[PairSource],
        weights: Sequence[float],
        *,
        num_positions: int,
        batch_size: int,
        batches: Literal["one_source", "mixed"],
        seed: int,
    ) -> None:
        self.sources = sources
        self.has_negatives = any(source.has_negatives for source in sources)
        self._seed = seed
        self._num_positions = num_positions
        self._unit = batch_size if batches == "one_source" else 1
        num_units = -(-num_positions // self._unit)
        # The golden ratio's multiples modulo 1 are spread evenly: any stretch of the stream has the weights' mix.
        spread = (np.random.default_rng((seed, 0)).random() + GOLDEN_RATIO * np.arange(num_units)) % 1.0
        edges = np.cumsum(weights) / np.sum(weights)
        self._source_of_unit = np.searchsorted(edges[:-1], spread, side="right").astype(np.int32)
        self._unit_in_source = np.empty(num_units, np.int64)
        for number in range(len(sources)):
            units = np.flatnonzero(self._source_of_unit == number)
            self._unit_in_source[units] = np.arange(len(units))
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source -> pass and its order

    def __len__(self) -> int:
        return self._num_positions

    def __getitem__(self, position: int) -> PairExample:
        if not 0 <= position < self._num_positions:
            raise IndexError(position)
        unit, within = divmod(position, self._unit)
        number = int(self._source_of_unit[unit])
        source = self.sources[number]
        epoch, place = divmod(int(self._unit_in_source[unit]) * self._unit + within, len(source))
        index = int(self._order(number, epoch)[place])
        example = source.example(index, np.random.default_rng((self._seed, 1, position)))
        return example._replace(
            group=f"{number}: {example.group}", negative_group=f"{number}: {example.negative_group}"
        )

    def _order(self, number: int, epoch: int) -> np.ndarray:
        known = self._orders.get(number)
        if known is None or known[0] != epoch:
            rng = np.random.default_rng((self._seed, 2, number, epoch))
            known = self._orders[number] = (epoch, rng.permutation(len(self.sources[number])))
        return known[1]


def source_weights(sources: Sequence[CaptionSource | TextSource], sizes: Sequence[int]) -> list[float]:
    """Share of each source: its weight, or its size if no weight is given.

    Raises:
        ValueError: if only some have a weight.
    """
    given = [source.weight for source in sources if source.weight is not None]
    if given and len(given) < len(sources):
        without = [str(source.path) for source in sources if source.weight is None]
        raise ValueError(f"weight: give one to every source or to none; {without} have none")
    return given or [float(size) for size in sizes]


def text_key(text: str) -> int:
    """A 63-bit number that stands for a text, never 0."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1 or 1


def _group(sample: Sample) -> str:
    """What stands for an image. Not its id: images with the very same captions can't be told apart by captions."""
    return "\n".join(sorted({caption.text for caption in sample.captions}))


def _text_pair(line: bytes) -> Mapping[str, str | None]:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError as error:  # also UnicodeDecodeError
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"wrong shape: expected an object, got {type(row).__name__}")
    for name in ("query", "positive", "negative"):
        value = row.get(name)
        if value is None and name == "negative":
            continue
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"wrong shape: {name!r} must be text, got {value!r}")
        value.encode()  # lone surrogates: UnicodeEncodeError is a ValueError
    return row
