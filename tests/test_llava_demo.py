"""The LLaVA demo's data: true answers, none to be guessed from the text, nothing held out in training."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import zipfile
from collections import Counter, defaultdict
from pathlib import Path

import demo_fakes
import pytest
from PIL import Image

from llava_bridge.demo import build, card, facts, texts
from llm2clip.demo import build as scene_build
from llm2clip.demo import concepts, packages, wording
from llm2clip.run_dir import read_manifest

SCENES = ["--num_concepts=120", "--num_scenes=120", "--num_renderings=2", "--num_singles=150", "--languages=[de]"]
SCENES += ["--num_val_scenes=16", "--num_test_scenes=16", "--num_layout_pairs=0", "--image_size=48"]
SMALL = ["--num_captions=200", "--num_dialogues=600", "--languages=[de, fr]", "--num_language_eval=10"]
NUM_EVAL = dict.fromkeys(facts.TYPES, 20)
SMALL += [f"--num_eval={json.dumps(NUM_EVAL)}"]
PACKAGES = ("openmoji", "emoji", "fluent", "twemoji", "noto", "cldr")
COLORS = ("red", "blue", "black", "green")
SHAPES = ("circle", "rectangle", "triangle")


def write_easy_vqa(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """A stand-in with as lopsided yes/no answers as the real one."""
    path = cache / packages.TABLE["easy-vqa"].file
    with zipfile.ZipFile(path, "w") as wheel:
        for part, count in (("train", 60), ("test", 80)):
            asked = []
            for number in range(count):
                color, shape = COLORS[number % 4], SHAPES[number % 3]
                asked += [["what shape is in the image?", shape, number], ["what color is the shape?", color, number]]
                for other in COLORS:
                    asked.append([f"is there a {other} shape?", "yes" if other == color else "no", number])
                png = io.BytesIO()
                Image.new("RGB", (8, 8), color).save(png, "PNG")
                wheel.writestr(zipfile.ZipInfo(f"easy_vqa/data/{part}/images/{number}.png"), png.getvalue())
            wheel.writestr(zipfile.ZipInfo(f"easy_vqa/data/{part}/questions.json"), json.dumps(asked))
    changed = dataclasses.replace(packages.TABLE["easy-vqa"], sha256=packages.sha256_of(path))
    monkeypatch.setitem(packages.TABLE, "easy-vqa", changed)


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[str]:
    demo_fakes.install(monkeypatch, folder / "cache", PACKAGES)
    write_easy_vqa(monkeypatch, folder / "cache")
    return [f"--cache_dir={folder / 'cache'}"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with `scenes`, the source, and `data`, what is built from it."""
    folder = tmp_path_factory.mktemp("llava_demo")
    with pytest.MonkeyPatch.context() as monkeypatch:
        cache = install(monkeypatch, folder)
        scene_build.main([f"--output_dir={folder / 'scenes'}", *cache, *SCENES])
        build.main([f"--output_dir={folder / 'data'}", f"--data={folder / 'scenes'}", *cache, *SMALL])
    return folder


@pytest.fixture(scope="module")
def data(root) -> Path:
    return root / "data"


@pytest.fixture(scope="module")
def known(root) -> dict[str, concepts.Concept]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        install(monkeypatch, root)
        found = packages.fetch(("emoji", "cldr"), root / "cache")
        return {concept.key: concept for concept in concepts.load_concepts(found, ["de", "fr"], 120)}


@pytest.fixture(scope="module")
def objects(root) -> dict[str, list[dict]]:
    """What each picture shows, by its id."""
    lines = [line for path in (root / "scenes").rglob("captions.jsonl") for line in path.open(encoding="utf-8")]
    return {row["id"]: row["objects"] for row in map(json.loads, lines)}


def entries(data: Path, name: str) -> list[dict]:
    return json.loads((data / f"{name}.json").read_text(encoding="utf-8"))


def exchanges(entry: dict) -> list[tuple[str, str]]:
    """(question, answer) of an entry, without the image mark."""
    turns = [turn["value"].replace("<image>", "").strip() for turn in entry["conversations"]]
    return list(zip(turns[::2], turns[1::2], strict=True))


def evaluation(data: Path) -> dict[str, list[dict]]:
    import datasets

    files = sorted((data / "eval").glob("*/*.parquet"))
    return {
        path.relative_to(data / "eval").with_suffix("").as_posix(): list(
            datasets.load_dataset("parquet", data_files=str(path), split="train")  # type: ignore[arg-type]
        )
        for path in files
    }


def english_truth(question: str, things: list[dict], known: dict[str, concepts.Concept]) -> str | None:
    """The answer to an English question in its first wording, worked out from the objects; None: another form."""
    names = {concept.key: concepts.bare(concept.name) for concept in known.values()}
    counts = Counter(names[thing["concept"]] for thing in things)
    kinds = {thing["category"] for thing in things}
    by_place = {place: thing for thing in things for place in places_of(thing["cell"])}
    if question == "How many things are in the picture?":
        return str(len(things))
    if found := re.fullmatch(r"How many (.+) are in the picture\?", question):
        matching = [c for c in known.values() if wording.takes_article(c.name) and wording.plural(c.name) == found[1]]
        assert len(matching) == 1, question
        return str(counts[concepts.bare(matching[0].name)])
    if found := re.fullmatch(r"Are there (more than )?(\d+) things in the picture\?", question):
        holds = len(things) > int(found[2]) if found[1] else len(things) == int(found[2])
        return "yes" if holds else "no"
    if found := re.fullmatch(r"Is there anything ((?:in|at) the .+)\?", question):
        return "yes" if found[1] in by_place else "no"
    if found := re.fullmatch(r"(?:Is|Are) there (?:an? |the )?(.+) in the picture\?", question):
        all_categories = {concept.category for concept in known.values()}
        assert found[1] in names.values() or found[1] in all_categories, question
        return "yes" if counts[found[1]] or found[1] in kinds else "no"
    if found := re.fullmatch(r"What (kind of thing )?is ((?:in|at) the .+)\?", question):
        thing = by_place[found[2]]
        return thing["category"] if found[1] else names[thing["concept"]]
    side = r"(to the left of|to the right of|above|below)"
    if found := re.fullmatch(rf"What is {side} (?:the )?(.+)\?", question):
        [anchor] = [thing["cell"] for thing in things if names[thing["concept"]] == found[2]]
        there = {names[thing["concept"]] for thing in things if on_side(thing["cell"], anchor, found[1])}
        assert len(there) == 1, question
        return there.pop()
    if found := re.fullmatch(rf"(?:Is|Are) (?:the )?(.+?) {side} (?:the )?(.+)\?", question):
        [one] = [thing["cell"] for thing in things if names[thing["concept"]] == found[1]]
        [two] = [thing["cell"] for thing in things if names[thing["concept"]] == found[3]]
        return "yes" if on_side(one, two, found[2]) else "no"
    return None


def places_of(cell: list[int]) -> tuple[str, str]:
    """The two ways in which a question may say where a cell is."""
    rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
    row, column = rows[cell[0]], columns[cell[1]]
    if (row, column) == ("middle", "center"):
        return "in the center", "in the middle"
    if row == "middle":
        return f"at the center {column}", f"in the middle row on the {column}"
    if column == "center":
        return f"at the {row} center", f"in the middle of the {row} row"
    return f"in the {row} {column} corner", f"at the {row} {column}"


def on_side(cell: list[int], anchor: list[int], side: str) -> bool:
    axis = 0 if side in ("above", "below") else 1
    return cell[axis] < anchor[axis] if side in ("above", "to the left of") else cell[axis] > anchor[axis]


def test_every_entry_has_the_official_form(data):
    ids = []
    for name in ("pretrain", "finetune"):
        for entry in entries(data, name):
            ids.append(entry["id"])
            turns = entry["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2) and turns
            assert all(turn["value"].strip() and "\n" not in turn["value"][8:-8] for turn in turns)
            marks = [turn["value"].count("<image>") for turn in turns]
            assert marks == [int("image" in entry), *[0] * (len(turns) - 1)]
            if "image" in entry:
                with Image.open(data / entry["image"]) as picture:
                    picture.load()
            else:
                assert entry["id"].startswith("text-dialogue-")
    assert len(set(ids)) == len(ids)
    assert len(entries(data, "pretrain")) == 200 and len(entries(data, "finetune")) == 600
    used = {entry["image"] for name in ("pretrain", "finetune") for entry in entries(data, name) if "image" in entry}
    assert {path.name for path in (data / "images").iterdir()} == {Path(file).name for file in used}


def test_shares_are_as_configured(data):
    sorts = Counter(entry["id"].rsplit("-", 1)[0] for entry in entries(data, "finetune"))
    assert sorts == {"scene-dialogue": 480, "text-dialogue": 60, "easy-vqa-dialogue": 60}
    by_language = Counter()
    for row in read_manifest(data)["finetune"]["by_subtype"]:
        by_language[row["language"]] += row["questions"]
    assert set(by_language) == {"en", "de", "fr"}
    assert 0.12 < 1 - by_language["en"] / by_language.total() < 0.35, "a quarter, less easy-VQA"


def test_answers_in_training_are_true(data, known, objects):
    checked = Counter()
    for entry in entries(data, "finetune"):
        if entry["id"].startswith("scene-dialogue"):
            for question, answer in exchanges(entry):
                truth = english_truth(question, objects[Path(entry["image"]).stem], known)
                if truth is not None:
                    assert truth == answer, (entry["id"], question)
                    checked[re.sub(r"\d", "", question).split()[0]] += 1
    assert checked.total() > 300 and {"How", "What", "Is", "Are"} <= set(checked)


def test_answers_in_evaluation_are_true(data, known, objects, datasets_cache):
    for name, rows in evaluation(data).items():
        for row in rows:
            if name.endswith("easy_vqa"):
                number = int(row["image_id"].rsplit("-", 1)[1])
                shown = {COLORS[number % 4], SHAPES[number % 3]}
                asked = re.fullmatch(r"Is there a (\w+) shape\?", row["question"])
                assert row["answer"] in (shown if not asked else {"yes" if asked[1] in shown else "no"})
            elif row["language"] == "en":
                assert english_truth(row["question"], objects[row["image_id"]], known) == row["answer"], row[
                    "question"
                ]


@pytest.mark.parametrize("tag", ["de", "fr"])
def test_other_languages_tell_the_same_facts(data, known, objects, datasets_cache, tag):
    """Their answers, from the numbers, names and categories in the objects."""
    language = texts.LANGUAGES[tag]
    quoted = re.compile(re.escape(language.quotes).replace(r"\{\}", "(.+?)"))
    checked = Counter()
    for row in evaluation(data)["val/seen"]:
        if row["language"] != tag:
            continue
        things = objects[row["image_id"]]
        names = Counter(known[thing["concept"]].translations[tag] for thing in things)
        kinds = {language.category(thing["category"]) for thing in things}
        mentioned = quoted.findall(row["question"])
        if row["subtype"] == "total":
            assert row["answer"] == str(len(things))
        elif row["subtype"] == "object":
            assert row["answer"] == str(names[mentioned[0]])
        elif row["subtype"] == "exists":
            assert row["answer"] == (language.yes if mentioned[0] in names else language.no)
        elif row["subtype"] == "exists_category":
            assert row["answer"] == (language.yes if mentioned[0] in kinds else language.no)
        elif row["subtype"] == "exists_more":
            more = len(things) > int(re.findall(r"\d+", row["question"])[0])
            assert row["answer"] == (language.yes if more else language.no)
        elif row["subtype"] in ("name", "what_side"):
            assert row["answer"] in names and row["answer"] not in mentioned
        elif row["subtype"] == "category":
            assert row["answer"] in kinds
        checked[row["type"]] += 1
    assert checked == {kind: 10 for kind in facts.TYPES}


def test_yes_is_as_likely_as_no_for_every_text(data, datasets_cache):
    """A pair of scenes shares its text, so each text about existence is answered with yes exactly as often as no."""
    answers: dict[str, Counter] = defaultdict(Counter)
    for entry in entries(data, "finetune"):
        for question, answer in exchanges(entry):
            if entry["id"].startswith("scene") and answer in ("yes", "no", "ja", "nein", "oui", "non"):
                answers[question][answer in ("yes", "ja", "oui")] += 1
    relations = Counter()
    sides = {side for tag in ("en", "de", "fr") for side in texts.LANGUAGES[tag].sides.values()}
    existence = 0
    for question, given in answers.items():
        if any(f" {side} " in question for side in sides):
            relations += given
        else:
            assert given[True] == given[False], question
            existence += given.total()
    assert existence > 250
    assert abs(relations[True] - relations[False]) <= 3 * 2, "answers in three languages, each even but for a few"
    for rows in evaluation(data).values():
        for subtype in facts.SUBTYPES["yesno"]:
            by_text: dict[str, Counter] = defaultdict(Counter)
            for row in rows:
                if row["subtype"] == subtype:
                    by_text[row["question"]][row["answer"] in ("yes", "ja", "oui")] += 1
            assert all(given[True] == given[False] for given in by_text.values()), by_text


def test_counts_and_categories_are_spread(data):
    """No answer much above its even share: greedy choice of the answer given least, as far as scenes have it."""
    bounds = {"total": 1.3, "object": 1.6, "category": 1.8}  # three of one object are rare
    for row in read_manifest(data)["finetune"]["by_subtype"]:
        if row["language"] == "en" and row["subtype"] in bounds:
            assert row["majority"] <= bounds[row["subtype"]] / row["answers"], row
    answers = Counter()
    for entry in entries(data, "finetune"):
        answers.update(answer for question, answer in exchanges(entry) if question.startswith("How many"))
    assert set(answers) == {"0", "1", "2", "3", "4"}


def test_easy_vqa_is_made_even(data):
    answers: dict[str, Counter] = defaultdict(Counter)
    for entry in entries(data, "finetune"):
        if entry["id"].startswith("easy-vqa"):
            for question, answer in exchanges(entry):
                answers[question][answer] += 1
    asked = {text: given for text, given in answers.items() if text.startswith("Is there")}
    assert len(asked) == 4
    assert all(abs(given["yes"] - given["no"]) <= 1 for given in asked.values())


def test_training_text_is_about_training_concepts_in_training_words(data, known):
    def words(text: str) -> str:
        found = re.findall(r"[^\W_]+", text.lower())
        return f" {' '.join(found)} "

    held_out_names = set()
    for concept in known.values():
        if concept.split != "train":
            held_out_names |= {concepts.bare(concept.name), *concept.translations.values()}
    train = {concept.key: concept for concept in known.values() if concept.split == "train"}
    texts_by_key: dict[str, list[str]] = defaultdict(list)
    for name in ("pretrain", "finetune"):
        for entry in entries(data, name):
            for question, answer in exchanges(entry):
                assert answer not in held_out_names
                assert not any(f'"{held_out}"' in question for held_out in held_out_names)
                both = words(f"{question} {answer}")
                for key, concept in train.items():
                    if words(concepts.bare(concept.name)) in both:
                        texts_by_key[key].append(both)
    assert len(texts_by_key) > 60
    for key, mentions in texts_by_key.items():
        held_out = [words(concepts.bare(p)) for split in ("val", "test") for p in train[key].wordings[split]]
        assert not any(phrase in text for phrase in held_out for text in mentions), key


def test_text_only_answers_are_in_the_lexicon(data, known):
    by_name = {concepts.bare(concept.name): concept for concept in known.values()}
    checked = Counter()
    for entry in entries(data, "finetune"):
        if "image" in entry:
            continue
        for question, answer in exchanges(entry):
            if found := re.fullmatch(r'What is another way to say "(.+)"\?', question):
                assert answer in {concepts.bare(phrase) for phrase in by_name[found[1]].wordings["train"]}
                checked["other"] += 1
            elif found := re.fullmatch(r'What is "(.+)" in (German|French)\?', question):
                assert answer == by_name[found[1]].translations[{"German": "de", "French": "fr"}[found[2]]]
                checked["translation"] += 1
            elif found := re.fullmatch(r"What kind of thing (?:is|are) (?:an? |the )?(.+)\?", question):
                assert answer == by_name[found[1]].category
                checked["category"] += 1
    assert min(checked.values()) > 3 and len(checked) == 3


def test_evaluation_files_hold_pictures_and_what_a_guess_gets(root, data, datasets_cache):
    files = evaluation(data)
    pools = ("compositions", "concepts", "easy_vqa", "seen")
    assert set(files) == {f"{split}/{pool}" for split in ("val", "test") for pool in pools}
    trained = {question for entry in entries(data, "finetune") for question, _ in exchanges(entry)}
    for name, rows in files.items():
        assert len({row["id"] for row in rows}) == len(rows)
        assert len({(row["image_id"], row["question"]) for row in rows}) == len(rows)
        assert {row["type"] for row in rows} == ({"yesno", "category"} if "easy" in name else set(facts.TYPES))
        assert {row["language"] for row in rows} == ({"en", "de", "fr"} if name.endswith("seen") else {"en"})
        for row in rows:
            assert not row["choices"] or row["answer"] in row["choices"]
            assert bool(row["choices"]) == (row["subtype"] not in ("name", "what_side"))
            assert row["chance"] == pytest.approx(1 / len(row["choices"])) if row["choices"] else row["chance"] <= 1
            if row["type"] == "yesno":
                assert row["chance"] == 0.5
            if not name.endswith("easy_vqa"):
                source = root / "scenes" / "pools" / name / "images" / f"{row['image_id']}.png"
                assert row["image"].tobytes() == Image.open(source).convert("RGB").tobytes()
            if row["subtype"] == "total":
                assert row["question"] in trained


def test_building_again_gives_the_same_bytes(monkeypatch, root, data, tmp_path):
    cache = install(monkeypatch, root)
    build.main([f"--output_dir={tmp_path / 'again'}", f"--data={root / 'scenes'}", *cache, *SMALL])
    assert read_manifest(tmp_path / "again")["outputs"] == read_manifest(data)["outputs"]
    assert (data / "data_card.md").read_text().count("## eval/") == 8
    assert Image.open(data / "contact_sheet.png").width == card.COLUMNS * card.COLUMN_WIDTH


def test_seed_and_missing_easy_vqa(monkeypatch, root, data, tmp_path):
    cache = install(monkeypatch, root)
    options = ["--seed=1", "--easy_vqa_share=0", "--languages=[]", "--num_dialogues=40"]
    options += [f"--num_eval={json.dumps(dict.fromkeys(facts.TYPES, 2))}"]
    weights = dict.fromkeys(facts.TYPE_OF, 1) | {"total": 1000}
    options += ["--questions_per_dialogue=1", f"--question_weights={json.dumps(weights)}", "--text_only_share=0"]
    build.main([f"--output_dir={tmp_path / 'other'}", f"--data={root / 'scenes'}", *cache, *options])
    assert not list((tmp_path / "other" / "eval").glob("*/easy_vqa.parquet"))
    assert set(json.loads((tmp_path / "other" / "sources.json").read_text())) == {"emoji", "cldr"}
    assert entries(tmp_path / "other", "pretrain")[:50] != entries(data, "pretrain")[:50]
    answers = [entry["conversations"][1]["value"] for entry in entries(tmp_path / "other", "finetune")]
    assert sum(answer.isdigit() for answer in answers) > 0.9 * len(answers)  # the weights: else a fifth


def test_bad_settings_are_named_together(tmp_path):
    with pytest.raises(
        ValueError, match="(?s)num_dialogues is 1.*num_eval is .*language_share is 2.*question_weights.*'it'"
    ):
        build.DialogueConfig(
            output_dir=tmp_path,
            data=tmp_path,
            num_dialogues=1,
            num_eval={"count": 3},
            language_share=2,
            languages=["it"],
            question_weights={"total": 1},
        )


def test_another_directory_than_scenes_is_refused(root, data, tmp_path):
    with pytest.raises(ValueError, match="written by 'data questions', expected `llm2clip data demo`"):
        build.main([f"--output_dir={tmp_path / 'out'}", f"--data={data}"])
    with pytest.raises(FileNotFoundError, match="no run directory"):
        build.main([f"--output_dir={tmp_path / 'out'}", f"--data={tmp_path}"])


def test_every_language_has_every_question_and_category():
    english = set(texts.ENGLISH.questions) - {"word_other", "word_to"}
    for tag in texts.OTHER_LANGUAGES:
        assert set(texts.LANGUAGES[tag].questions) - {"word_from"} == english
        assert all(texts.NUM_WORDINGS % len(wordings) == 0 for wordings in texts.LANGUAGES[tag].questions.values())
        for table in ("places", "sides"):
            assert set(getattr(texts.LANGUAGES[tag], table)) == set(getattr(texts.ENGLISH, table))
        cells = {texts.LANGUAGES[tag].place((row, column), 3) for row in range(3) for column in range(3)}
        assert len(cells) == 9
    assert set(texts.CATEGORIES) == set(demo_fakes.LEXICON)
    for index in range(len(texts.OTHER_LANGUAGES)):
        assert len({names[index] for names in texts.CATEGORIES.values()}) == len(texts.CATEGORIES)
