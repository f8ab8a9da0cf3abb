"""`llava-bridge data questions`: captions and dialogues to train on and questions to evaluate with.

Reads the run directory of `llm2clip data demo`. Writes `pretrain.json` and `finetune.json` (official LLaVA JSON; the
image root is the output directory), `images/`, `eval/{val,test}/<pool>.parquet`, `contact_sheet.png`, `data_card.md`,
`sources.json`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from llava_bridge.demo.facts import TYPE_OF, TYPES
from llava_bridge.demo.texts import OTHER_LANGUAGES
from llm2clip.config import StageCall, parse_stage
from llm2clip.demo import packages
from llm2clip.run_dir import RunDir, atomic_write, fingerprint, read_manifest

if TYPE_CHECKING:
    from llava_bridge.demo.dialogues import Sample
    from llava_bridge.demo.evaluation import Asked
    from llm2clip.demo.concepts import Concept
    from llm2clip.demo.packages import Fetched

logger = logging.getLogger(__name__)

SHAPES = "easy-vqa"
OUTPUTS = ("pretrain.json", "finetune.json", "images", "eval", "contact_sheet.png", "data_card.md", packages.SOURCES)


@dataclass(kw_only=True)
class DialogueConfig(packages.PackageConfig):
    """Build captions, dialogues and evaluation questions from the exact facts of `llm2clip data demo`."""

    data: Path
    """Run directory of `llm2clip data demo`."""
    num_captions: int = 6000
    """Pictures with a caption in pretrain.json."""
    num_dialogues: int = 6000
    """Dialogues in finetune.json, of all sorts together."""
    questions_per_dialogue: int = 4
    """Questions in each dialogue, where the picture allows as many."""
    question_weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(TYPE_OF, 1.0))
    """How likely each subtype of question about a scene is asked in training, relative to the others."""
    languages: list[str] = field(default_factory=lambda: list(OTHER_LANGUAGES))
    """Languages other than English."""
    language_share: float = 0.25
    """Share of the dialogues about scenes, and of those without a picture, in these languages."""
    easy_vqa_share: float = 0.1
    """Share of dialogues about easy-VQA's pictures; 0 does not fetch it."""
    text_only_share: float = 0.1
    """Share of dialogues without a picture."""
    num_eval: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TYPES, 200))
    """English questions of each type in each evaluation file; even, for they are asked of pairs of scenes."""
    num_language_eval: int = 50
    """Questions of each type and other language about the seen scenes; even."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}, expected at least {least}"
            for name, least in (("num_captions", 1), ("num_dialogues", 2), ("questions_per_dialogue", 1))
            if getattr(self, name) < least
        ]
        if self.num_language_eval < 0 or self.num_language_eval % 2:
            problems.append(f"num_language_eval is {self.num_language_eval}, expected an even number, or 0")
        if set(self.num_eval) != set(TYPES) or any(number < 2 or number % 2 for number in self.num_eval.values()):
            problems.append(f"num_eval is {self.num_eval}, expected an even number of at least 2 for each of {TYPES}")
        shares = ("language_share", "easy_vqa_share", "text_only_share")
        problems += [
            f"{name} is {getattr(self, name)}, expected a share from 0 to 1"
            for name in shares
            if not 0 <= getattr(self, name) <= 1
        ]
        if set(self.question_weights) != set(TYPE_OF) or min(self.question_weights.values(), default=0) <= 0:
            expected = f"a positive weight for each of {tuple(TYPE_OF)}"
            problems.append(f"question_weights is {self.question_weights}, expected {expected}")
        if self.easy_vqa_share + self.text_only_share > 1:
            problems.append("easy_vqa_share and text_only_share are more than 1 together")
        if unknown := [tag for tag in self.languages if tag not in OTHER_LANGUAGES]:
            problems.append(f"languages: no wordings in {unknown}; use some of {list(OTHER_LANGUAGES)}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def own_packages(self) -> list[str]:
        """easy-VQA comes with pip like what is needed, so `optional_packages` (npm) has no say in it."""
        return [*packages.wanted(self, ("emoji", "cldr")), *([SHAPES] if self.easy_vqa_share else [])]


def parse(argv: Sequence[str] | None = None) -> StageCall[DialogueConfig]:
    return parse_stage(DialogueConfig, argv, prog="llava-bridge data questions")


def inputs(call: StageCall[DialogueConfig]) -> dict[str, str]:
    """Digests of the scenes and of the packages that can be had, fetching those that are not cached."""
    stage = read_manifest(call.config.data)["stage"]
    if stage != "data demo":
        raise ValueError(f"data: {call.config.data} was written by {stage!r}, expected `llm2clip data demo`")
    found = packages.fetch(call.config.own_packages, call.config.cache_dir)
    digests = {name: fetched.package.sha256 for name, fetched in found.items()}
    return {"data": fingerprint(call.config.data), **digests}


def run(call: StageCall[DialogueConfig]) -> None:
    """Build everything below the output directory."""
    with RunDir(call, stage="data questions", inputs=inputs(call)) as run:
        if run.complete:
            logger.info("data questions: already complete, %s", run.path)
            return
        facts = _build(call.config, run.path)
        run.finish(outputs=OUTPUTS, **facts)


def main(argv: Sequence[str] | None = None) -> None:
    run(parse(argv))


def _build(config: DialogueConfig, folder: Path) -> dict[str, Any]:
    from llava_bridge.demo import card, evaluation
    from llm2clip.demo.concepts import load_concepts

    start = time.monotonic()
    found = packages.fetch(config.own_packages, config.cache_dir)
    packages.write_sources(folder, found)
    scenes = read_manifest(config.data)["settings"]
    known = load_concepts(found, config.languages, seed=scenes["seed"])
    concepts, grid = {concept.key: concept for concept in known}, scenes["grid"]
    pretrain, finetune = _training(config, found, concepts, grid)
    _write_training(folder, pretrain, finetune)
    logger.info("data questions: %d training samples, %.1f s", len(pretrain + finetune), time.monotonic() - start)
    tables = {}
    for name, asked in _evaluation(config, found, concepts, grid).items():
        tables[name] = evaluation.rows(name, asked)
        evaluation.write(folder / "eval" / f"{name}.parquet", tables[name])
    facts = card.facts(pretrain, finetune, tables)
    card.data_card(folder, facts, found)
    card.contact_sheet(folder, finetune, tables)
    logger.info(
        "data questions: %d evaluation questions, %.1f s", sum(map(len, tables.values())), time.monotonic() - start
    )
    return facts


def _training(
    config: DialogueConfig, found: Mapping[str, Fetched], concepts: Mapping[str, Concept], grid: int
) -> tuple[list[Sample], list[Sample]]:
    from llava_bridge.demo import dialogues
    from llava_bridge.demo.easy_vqa import read_shapes
    from llava_bridge.demo.facts import read_scenes

    scenes = read_scenes(config.data / "train" / "scenes", concepts)
    singles = read_scenes(config.data / "train" / "singles", concepts)
    pretrain = list(dialogues.caption_samples(scenes, singles, config.num_captions, config.seed))
    shown = sorted({key for scene in scenes + singles for key in scene.keys})
    num_shapes = round(config.num_dialogues * config.easy_vqa_share) if SHAPES in found else 0
    num_texts = round(config.num_dialogues * config.text_only_share)
    finetune = list(
        dialogues.scene_samples(
            scenes,
            config.num_dialogues - num_shapes - num_texts,
            config.questions_per_dialogue,
            config.question_weights,
            config.languages,
            config.language_share,
            grid,
            config.seed,
        )
    )
    finetune += dialogues.text_samples(
        [concepts[key] for key in shown],
        num_texts,
        config.questions_per_dialogue,
        config.languages,
        config.language_share,
        config.seed,
    )
    if num_shapes:
        shapes = read_shapes(found[SHAPES], "train")
        finetune += dialogues.shape_samples(shapes, num_shapes, config.questions_per_dialogue, config.seed)
    Random(f"{config.seed}:order").shuffle(finetune)
    return pretrain, finetune


def _write_training(folder: Path, pretrain: Sequence[Sample], finetune: Sequence[Sample]) -> None:
    (folder / "images").mkdir(exist_ok=True)
    pictures = {sample.picture.file: sample.picture for sample in (*pretrain, *finetune) if sample.picture}
    for file, picture in pictures.items():
        (folder / file).write_bytes(picture.read())
    for name, samples in (("pretrain", pretrain), ("finetune", finetune)):
        atomic_write(folder / f"{name}.json", _json([sample.official() for sample in samples]))


def _json(entries: Iterable[dict]) -> str:
    """A JSON list with one entry to a line."""
    return "[\n" + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]\n"


def _evaluation(
    config: DialogueConfig, found: Mapping[str, Fetched], concepts: Mapping[str, Concept], grid: int
) -> dict[str, list[Asked]]:
    """Questions by `split/pool`; pools that the data lacks are left out."""
    from llava_bridge.demo.easy_vqa import read_shapes
    from llava_bridge.demo.evaluation import SCENE_POOLS, SHAPE_POOL, scene_questions, shape_questions
    from llava_bridge.demo.facts import read_scenes

    made: dict[str, list[Asked]] = {}
    shapes = read_shapes(found[SHAPES], "test") if SHAPES in found else []
    for number, split in enumerate(("val", "test")):
        for pool in SCENE_POOLS:
            name = f"{split}/{pool}"
            if not (config.data / "pools" / name).is_dir():
                logger.warning("data questions: %s has no pool %s, it is left out", config.data, name)
                continue
            scenes = read_scenes(config.data / "pools" / name, concepts)
            made[name] = scene_questions(scenes, "en", config.num_eval, grid, name, config.seed)
            if pool == "seen":
                of_language = dict.fromkeys(TYPES, config.num_language_eval)
                for tag in config.languages:
                    made[name] += scene_questions(scenes, tag, of_language, grid, name, config.seed)
        if shapes:
            made[f"{split}/{SHAPE_POOL}"] = shape_questions(shapes[number::2], config.num_eval, config.seed, split)
    return made
