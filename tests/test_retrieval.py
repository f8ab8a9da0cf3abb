"""Retrieval end to end with tiny models, against a naive loop over the model's own features."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from PIL import Image
from tiny import tiny_clip_config, tiny_tokenizer, write_captions
from tokenizers.processors import TemplateProcessing

from llm2clip.caption_data import CaptionData
from llm2clip.cli import dispatch
from llm2clip.embedding_store import EmbeddingStore, shard_name, write_index, write_shard
from llm2clip.images import ImageTransform
from llm2clip.modeling_clip import LLM2CLIPConfig, LLM2CLIPModel
from llm2clip_eval import retrieval
from llm2clip_eval.cli import COMMANDS

LONG_TEXT = "a red cat sits to the left of a blue dog " * 12


@pytest.fixture
def pool(tmp_path) -> Path:
    """Nine images with one to three raw captions; image 4 has no long caption, image 2 has one that is cut off."""
    rng = np.random.default_rng(0)
    rows = []
    (tmp_path / "pool" / "images").mkdir(parents=True)
    for index in range(9):
        pixels = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((40 + index, 48))
        pixels.save(tmp_path / "pool" / "images" / f"{index}.png")
        captions = {"raw": [f"a {word} cat {index}" for word in ("red", "blue", "green")[: 1 + index % 3]]}
        if index != 4:
            captions["long"] = [LONG_TEXT if index == 2 else f"the image shows a dog and {index} apples"]
        rows.append({"id": f"image-{index}", "image": f"images/{index}.png", "captions": captions})
    return write_captions(tmp_path / "pool", rows)


def clip_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tiny tokenizer with an end token, where CLIP's text tower reads the caption off."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return tokenizer


def save_processor(directory: Path) -> None:
    ImageTransform(size=32).to_image_processor().save_pretrained(directory)


@pytest.fixture
def vanilla(tmp_path) -> Path:
    torch.manual_seed(0)
    transformers.CLIPModel(tiny_clip_config()).save_pretrained(tmp_path / "vanilla")
    clip_tokenizer().save_pretrained(tmp_path / "vanilla")
    save_processor(tmp_path / "vanilla")
    return tmp_path / "vanilla"


@pytest.fixture
def llm2clip(tmp_path) -> Path:
    torch.manual_seed(1)
    config = LLM2CLIPConfig(
        vision_config=tiny_clip_config().vision_config.to_dict(),
        caption_embedding_dim=12,
        projection_dim=16,
        adapter_num_blocks=1,
        teacher_fingerprint="teacher-a",
    )
    LLM2CLIPModel(config).save_pretrained(tmp_path / "llm2clip")
    save_processor(tmp_path / "llm2clip")
    return tmp_path / "llm2clip"


def write_embeddings(path: Path, pool: Path, teacher: str = "teacher-a", dim: int = 12) -> Path:
    """A store of random vectors for the captions of a pool, in shuffled rows."""
    data = CaptionData.open(pool)
    vectors = torch.randn(len(data.texts), dim, generator=torch.Generator().manual_seed(2))
    rows = np.random.default_rng(3).permutation(len(data.texts))
    path.mkdir()
    write_shard(path / shard_name(0), vectors, {"texts": "t"})
    kinds = [data.kind_names[code] for code in data.kind_codes]
    write_index(path / "index-0.parquet", data.ids.to_pylist(), kinds, data.offsets, rows)
    manifest = {
        "stage": "extract-embeddings",
        "fingerprint": "embeddings",
        "dim": dim,
        "dtype": "float32",
        "normalized": False,
        "teacher_fingerprint": teacher,
        "num_rows": len(vectors),
        "rows_per_shard": len(vectors),
        "shards": [{"file": shard_name(0), "num_rows": len(vectors), "texts": "t"}],
        "data": [{"path": str(pool), "fingerprint": data.fingerprint, "index": "index-0.parquet"}],
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def evaluate(output_dir: Path, clip: Path, pool: Path, *extra: str, **settings: object) -> dict[str, dict]:
    config = {"arm": "arm", "clip": str(clip), "pools": {"held_out": {"data": str(pool)}}, **settings}
    output_dir.parent.mkdir(exist_ok=True)
    config_file = output_dir.with_suffix(".yaml")
    config_file.write_text(yaml.safe_dump({**config, "output_dir": str(output_dir)}))
    retrieval.main(["--config", str(config_file), *extra])
    return {path.stem: json.loads(path.read_text()) for path in (output_dir / "results").glob("*.json")}


def check_against_a_naive_loop(result: dict, images: torch.Tensor, texts: torch.Tensor) -> None:
    """images: (num_images, dim) and texts: (num_captions, dim), in the order of the result."""
    scores, owner = (texts @ images.T).double().numpy(), result["caption_image"]
    for caption, image in enumerate(owner):
        ahead = sum(scores[caption, other] > scores[caption, image] for other in range(len(images)) if other != image)
        assert result["t2i_ranks"][caption] == ahead
    for image in range(len(images)):
        best = max(scores[caption, image] for caption in range(len(owner)) if owner[caption] == image)
        others = [caption for caption in range(len(owner)) if owner[caption] != image]
        assert result["i2t_ranks"][image] == sum(scores[caption, image] > best for caption in others)
    hits = np.mean(np.array(result["t2i_ranks"]) < 1)
    assert result["recall"]["t2i"]["R@1"] == pytest.approx(100 * hits)


def features_of_images(model, pool: Path) -> torch.Tensor:
    data, transform = CaptionData.open(pool), ImageTransform(size=32)
    pixel_values = torch.stack([transform.evaluate(data.load_image(index)) for index in range(len(data))])
    with torch.no_grad():
        pooled = model.vision_model(pixel_values=pixel_values).pooler_output
        return torch.nn.functional.normalize(model.visual_projection(pooled), dim=-1)


def test_a_stock_clip_model_reads_captions_with_its_own_tokenizer(tmp_path, vanilla, pool):
    results = evaluate(tmp_path / "out", vanilla, pool, batch_size=4, seed=3)
    assert set(results) == {"held_out__raw", "held_out__long"}
    model = transformers.CLIPModel.from_pretrained(vanilla).eval()
    images, raw = features_of_images(model, pool), results["held_out__raw"]
    texts = [caption.text for sample in CaptionData.open(pool) for caption in sample.captions if caption.kind == "raw"]
    with torch.no_grad():
        singly = [model.get_text_features(**clip_tokenizer()(text, return_tensors="pt")) for text in texts]
    texts = torch.nn.functional.normalize(torch.cat([output.pooler_output for output in singly]), dim=-1)
    check_against_a_naive_loop(raw, images, texts)
    assert raw["caption_image"] == [index for index in range(9) for _ in range(1 + index % 3)]
    assert (raw["num_images"], raw["num_captions"], raw["num_images_without_caption"]) == (9, 18, 0)
    assert (raw["num_truncated_captions"], raw["arm"], raw["split"], raw["seed"]) == (0, "arm", "test", 3)
    long = results["held_out__long"]
    assert (long["num_images"], long["num_images_without_caption"], long["num_truncated_captions"]) == (8, 1, 1)
    assert long["image_ids"] == [f"image-{index}" for index in range(9) if index != 4]
    assert all(len(row) == 5 for row in long["top5"]["t2i"])


def test_a_siglip_model_sees_captions_padded_to_full_length(tmp_path, pool):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config={**tower, "vocab_size": 400, "max_position_embeddings": 16, "projection_size": 32},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    model.save_pretrained(tmp_path / "siglip")
    clip_tokenizer().save_pretrained(tmp_path / "siglip")
    save_processor(tmp_path / "siglip")
    raw = evaluate(tmp_path / "out", tmp_path / "siglip", pool)["held_out__raw"]
    data, transform = CaptionData.open(pool), ImageTransform(size=32)
    pixel_values = torch.stack([transform.evaluate(data.load_image(index)) for index in range(len(data))])
    texts = [caption.text for sample in data for caption in sample.captions if caption.kind == "raw"]
    tokens = clip_tokenizer()(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**tokens, pixel_values=pixel_values)
    check_against_a_naive_loop(raw, output.image_embeds, output.text_embeds)


def test_an_llm2clip_model_reads_the_store(tmp_path, llm2clip, pool):
    store = write_embeddings(tmp_path / "embeddings", pool)
    results = evaluate(tmp_path / "out", llm2clip, pool, embeddings=str(store), batch_size=5)
    model = LLM2CLIPModel.from_pretrained(llm2clip).eval()
    data, images = CaptionData.open(pool), features_of_images(model, pool)
    used = [index for index in range(9) if index != 4]
    rows = [
        EmbeddingStore(store).rows(data)[index, place]
        for index in used
        for place, caption in enumerate(data[index].captions)
        if caption.kind == "long"
    ]
    with torch.no_grad():
        texts = model.get_text_features(EmbeddingStore(store).gather(rows))
    check_against_a_naive_loop(results["held_out__long"], images[used], texts)


def test_the_images_of_a_pool_are_encoded_once_and_a_killed_run_keeps_its_results(
    tmp_path, vanilla, pool, monkeypatch
):
    encoded, encode = [], retrieval.encode_images
    monkeypatch.setattr(retrieval, "encode_images", lambda *args: encoded.append(1) or encode(*args))
    first = evaluate(tmp_path / "out", vanilla, pool)
    assert len(encoded) == 1
    (tmp_path / "out" / "manifest.json").unlink()
    (tmp_path / "out" / "results" / "held_out__long.json").unlink()
    kept = (tmp_path / "out" / "results" / "held_out__raw.json").stat().st_mtime_ns
    assert evaluate(tmp_path / "out", vanilla, pool) == first
    assert (tmp_path / "out" / "results" / "held_out__raw.json").stat().st_mtime_ns == kept
    assert len(encoded) == 2
    evaluate(tmp_path / "out", vanilla, pool)
    assert len(encoded) == 2


def test_a_teacher_embeds_captions_as_the_store_does(tmp_path, pool):
    from tiny_dual import write_llm2clip, write_teacher

    from llm2clip.extract_embeddings import main as extract

    teacher = write_teacher(tmp_path / "teacher")
    clip = write_llm2clip(tmp_path / "model", teacher)
    sources = f'[{{"path": "{pool}"}}]'
    settings = ["--dtype", "float32", "--compute_dtype", "float32", "--output_dir", str(tmp_path / "embeddings")]
    extract(["--teacher", str(teacher), "--data", sources, *settings])
    stored = evaluate(tmp_path / "stored", clip, pool, embeddings=str(tmp_path / "embeddings"))
    live = evaluate(tmp_path / "live", clip, pool, teacher=str(teacher))
    assert live == stored
    with pytest.raises(ValueError, match="give one of the two"):
        evaluate(tmp_path / "x", clip, pool, teacher=str(teacher), embeddings=str(tmp_path / "embeddings"))


def test_recall_at_any_k_and_images_from_the_cache(tmp_path, vanilla, pool):
    plain = evaluate(tmp_path / "plain", vanilla, pool)
    cache = str(tmp_path / "cache")
    first = evaluate(tmp_path / "a", vanilla, pool, ks=[1, 2, 25], feature_cache=cache)
    assert set(first["held_out__long"]["recall"]["t2i"]) == {"R@1", "R@2", "R@25"}
    assert first["held_out__long"]["recall"]["mean"]["R@25"] == 100.0
    assert first["held_out__raw"]["i2t_ranks"] == plain["held_out__raw"]["i2t_ranks"]
    (cached,) = (tmp_path / "cache").iterdir()
    assert evaluate(tmp_path / "b", vanilla, pool, ks=[1, 2, 25], feature_cache=cache) == first
    assert list((tmp_path / "cache").iterdir()) == [cached]
    with pytest.raises(ValueError, match="with 1 among them"):
        evaluate(tmp_path / "x", vanilla, pool, ks=[5])


def test_inputs_that_do_not_belong_together_are_refused(tmp_path, vanilla, llm2clip, pool):
    with pytest.raises(ValueError, match="trained on an LLM's caption embeddings"):
        evaluate(tmp_path / "a" / "out", llm2clip, pool)
    foreign = write_embeddings(tmp_path / "foreign", pool, teacher="teacher-b")
    with pytest.raises(ValueError, match="teacher-b.*teacher-a"):
        evaluate(tmp_path / "b" / "out", llm2clip, pool, embeddings=str(foreign))
    with pytest.raises(ValueError, match="reads captions itself"):
        evaluate(tmp_path / "c" / "out", vanilla, pool, embeddings=str(foreign))
    changed = write_captions(tmp_path / "changed", [{"id": "1", "captions": {"raw": "another caption"}}])
    own = write_embeddings(tmp_path / "own", changed)
    with pytest.raises(ValueError, match="no embeddings of these captions"):
        evaluate(tmp_path / "d" / "out", llm2clip, pool, embeddings=str(own))


def test_bad_pools_are_refused(tmp_path, vanilla, pool):
    with pytest.raises(ValueError, match=r"no captions of kind \['de'\]"):
        evaluate(tmp_path / "a" / "out", vanilla, pool, pools={"p": {"data": str(pool), "kinds": ["de"]}})
    with pytest.raises(ValueError, match="cannot hold / or __"):
        evaluate(tmp_path / "b" / "out", vanilla, pool, pools={"a/b": {"data": str(pool)}})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(tmp_path / "c" / "out", vanilla, tmp_path / "nowhere")
    (pool / "images" / "3.png").write_bytes(b"")
    with pytest.raises(ValueError, match="image-3.*zero-byte"):
        evaluate(tmp_path / "d" / "out", vanilla, pool)


def test_mistakes_are_exit_code_2_and_help_needs_no_torch(capsys):
    assert dispatch("llm2clip-eval", COMMANDS, ["retrieval", "--arm", "x", "--bach_size", "4"]) == 2
    assert "bach_size" in capsys.readouterr().err
    code = (
        "import sys, llm2clip_eval.retrieval as stage\n"
        "try: stage.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
