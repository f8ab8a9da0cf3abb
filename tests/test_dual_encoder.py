"""One pair of calls for every model: normalised, the same as by hand, and usable by the tools of the field."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from clip_benchmark.metrics import zeroshot_retrieval
from open_clip import build_zero_shot_classifier
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_clip_config
from tiny_dual import picture, write_clip, write_llm2clip, write_teacher

from llm2clip.images import ImageTransform
from llm2clip.metrics import recall_at_k, retrieval_ranks
from llm2clip.modeling_clip import LLM2CLIPModel
from llm2clip.teacher import CaptionEncoder, encode_texts
from llm2clip_eval.compositional_data import ImageList
from llm2clip_eval.dual_encoder import DualEncoder, encode_dataset
from llm2clip_eval.feature_cache import cached_features, feature_key

TEXTS = ["a red cat", "two taxis and one bus drive above a small house", "a dog " * 60, "a blue dog"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    teacher = write_teacher(root / "teacher")
    return {
        "clip": write_clip(root / "clip"),
        "teacher": teacher,
        "llm2clip": write_llm2clip(root / "llm2clip", teacher),
    }


def test_an_llm2clip_model_reads_texts_through_its_teacher(models):
    encoder = DualEncoder(models["llm2clip"], teacher=models["teacher"], batch_size=3)
    with torch.no_grad():
        embeddings = encode_texts(CaptionEncoder.from_pretrained(models["teacher"]), TEXTS)
        expected = LLM2CLIPModel.from_pretrained(models["llm2clip"]).eval().get_text_features(embeddings)
    torch.testing.assert_close(encoder.encode_text(TEXTS), expected, rtol=0, atol=1e-6)
    assert encoder.encode_captions(TEXTS)[1] is None


def test_a_stock_clip_model_reads_texts_itself_in_any_batches(models):
    encoder = DualEncoder(models["clip"], batch_size=3)
    model = transformers.CLIPModel.from_pretrained(models["clip"]).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(models["clip"])
    cut = {"truncation": True, "max_length": 64, "return_tensors": "pt"}
    with torch.no_grad():
        singly = [model.get_text_features(**tokenizer(text, **cut)).pooler_output for text in TEXTS]
    features, num_truncated = encoder.encode_captions(TEXTS)
    torch.testing.assert_close(features, F.normalize(torch.cat(singly), dim=-1), rtol=0, atol=1e-6)
    assert num_truncated == 1


def test_images_as_pictures_and_as_pixels_are_the_same_and_normalised(models):
    encoder = DualEncoder(models["clip"], batch_size=2)
    pictures = [picture(seed) for seed in range(5)]
    features = encoder.encode_image(pictures)
    pixels = torch.stack([encoder.transform(image) for image in pictures])
    torch.testing.assert_close(encoder.encode_image(pixels), features)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))
    grey = pictures[0].convert("L")
    torch.testing.assert_close(encoder.encode_image([grey]), encoder.encode_image([grey.convert("RGB")]))


@pytest.mark.parametrize("kind", ["clip", "llm2clip"])
def test_open_clip_builds_its_classifier_with_it_as_clip_benchmark_does(models, kind):
    encoder = DualEncoder(models[kind], teacher=models["teacher"] if kind == "llm2clip" else None)
    classes, templates = ["cat", "dog", "taxi"], ["a photo of a {}.", "the {}"]
    found = build_zero_shot_classifier(encoder, encoder.tokenizer, classes, templates, num_classes_per_batch=2)
    assert found.shape == (16, 3)
    by_hand = torch.stack([encoder.encode_text([t.format(c) for t in templates]).mean(dim=0) for c in classes])
    torch.testing.assert_close(found.T, F.normalize(by_hand, dim=-1))


@pytest.mark.parametrize("kind", ["clip", "llm2clip"])
def test_clip_benchmark_evaluates_it_and_finds_our_recall(models, kind):
    encoder = DualEncoder(models[kind], teacher=models["teacher"] if kind == "llm2clip" else None)
    captions = [TEXTS[:2], TEXTS[2:3], ["a cat", "a bus", "a tree"], TEXTS[3:]]
    pixels = torch.stack([encoder.transform(picture(seed)) for seed in range(4)])
    batches = [(pixels[start : start + 2], captions[start : start + 2]) for start in (0, 2)]
    theirs = zeroshot_retrieval.evaluate(encoder, batches, encoder.tokenizer, "cpu", amp=False, recall_k_list=[1, 2])
    owner = torch.tensor([image for image, texts in enumerate(captions) for _ in texts])
    texts = encoder.encode_text([text for texts in captions for text in texts])
    ranks = retrieval_ranks(encoder.encode_image(pixels), texts, owner)
    ours = {"text": recall_at_k(ranks.i2t_ranks, (1, 2)), "image": recall_at_k(ranks.t2i_ranks, (1, 2))}
    expected = {f"{side}_retrieval_recall@{k}": ours[side][f"R@{k}"] / 100 for side in ours for k in (1, 2)}
    assert theirs == pytest.approx(expected)


def test_encode_is_that_of_sentence_transformers(models):
    encoder = DualEncoder(models["clip"])
    texts = encoder.encode(TEXTS, batch_size=2, show_progress_bar=False)
    assert isinstance(texts, np.ndarray) and texts.shape == (4, 16) and texts.dtype == np.float32
    assert np.allclose(encoder.encode(TEXTS[0]), texts[0], atol=1e-6)
    images = encoder.encode([picture(0), picture(1)], convert_to_tensor=True)
    assert isinstance(images, torch.Tensor) and images.shape == (2, 16)


def test_what_does_not_belong_together_is_refused(models, tmp_path):
    other = write_teacher(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="was trained on teacher .* but .*other is"):
        DualEncoder(models["llm2clip"], teacher=other)
    with pytest.raises(ValueError, match="reads captions itself"):
        DualEncoder(models["clip"], teacher=models["teacher"])
    with pytest.raises(ValueError, match="give the directory of its teacher"):
        DualEncoder(models["llm2clip"]).encode_text("a cat")
    transformers.CLIPVisionModel(tiny_clip_config().vision_config).save_pretrained(tmp_path / "tower")
    with pytest.raises(ValueError, match="clip_vision_model, which has no features"):
        DualEncoder(tmp_path / "tower")


def write_pictures(root, seeds) -> ImageList:
    root.mkdir()
    for seed in seeds:
        picture(seed).save(root / f"{seed}.png")
    return ImageList(root, [f"{seed}.png" for seed in seeds])


def test_features_are_cached_by_content_never_by_path(models, tmp_path):
    images = write_pictures(tmp_path / "images", range(4))
    calls = []

    def features(clip) -> torch.Tensor:
        encoder = DualEncoder(clip)

        def compute() -> torch.Tensor:
            calls.append(1)
            return encode_dataset(images, encoder.image_transform, encoder.encode_image, batch_size=3)

        return cached_features(
            tmp_path / "cache",
            compute,
            model=encoder.model,
            output="projected",
            transform=encoder.image_transform,
            images=images,
        )

    first = features(models["clip"])
    assert torch.equal(features(models["clip"]), first) and len(calls) == 1
    copy = write_clip(tmp_path / "copy")  # the same weights elsewhere are the same model
    assert torch.equal(features(copy), first) and len(calls) == 1
    weights = load_file(copy / "model.safetensors")
    weights["visual_projection.weight"][0, 0] += 0.5
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    changed = features(copy)
    assert len(calls) == 2 and not torch.equal(changed, first)
    picture(99).save(tmp_path / "images" / "2.png")  # another image at the same path
    redrawn = features(models["clip"])
    assert len(calls) == 3 and torch.equal(redrawn[:2], first[:2]) and not torch.equal(redrawn[2], first[2])


def test_the_key_depends_on_transform_and_output(models, tmp_path):
    images = write_pictures(tmp_path / "images", range(2))
    model = DualEncoder(models["clip"]).model
    keys = {
        feature_key(model, output, ImageTransform(size=size), images)
        for output in ("projected", "pooled")
        for size in (32, 48)
    }
    assert len(keys) == 4


def test_an_unreadable_image_is_named(models, tmp_path):
    images = write_pictures(tmp_path / "images", range(2))
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    encoder = DualEncoder(models["clip"])
    with pytest.raises(ValueError, match=r"image 1\.png.*unreadable image"):
        encode_dataset(images, encoder.image_transform, encoder.encode_image, batch_size=2)


@pytest.mark.parametrize("stage", ["zeroshot", "probe", "cra", "compositional", "benchmark"])
def test_help_needs_no_torch(stage):
    code = (
        f"import sys, llm2clip_eval.{stage} as stage\n"
        "try: stage.main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_image_mode_of_a_picture_does_not_matter(models):
    encoder = DualEncoder(models["clip"])
    assert encoder.transform(Image.new("P", (50, 40))).shape == (3, 32, 32)
