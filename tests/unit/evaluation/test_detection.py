"""Detectors of transformers, and the colours of what they find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import noise

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError
from seed_multimodal.evaluation.detection import (
    COLOURS,
    GENEVAL_LIMITS,
    ZERO_SHOT_LIMITS,
    ColourClassifier,
    Detection,
    load_detector,
)

CPU = torch.device("cpu")
ENCODER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 2,
}
IMAGE = noise(1, (60, 40))


def write_detector(folder: Path, name: str, side: int, tokenizer: Any = None, **fields: Any) -> Any:
    """A random detector of one of transformers' classes, with its processor, in a folder."""
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**fields))
    model.save_pretrained(folder)
    prefix = name.rpartition("For")[0]
    processor = getattr(transformers, f"{prefix}ImageProcessor")(
        size={"height": side, "width": side}
    )
    if tokenizer is not None:
        processor = getattr(transformers, f"{prefix}Processor")(processor, tokenizer)
    processor.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def owl_folder(clip_folder, tmp_path_factory) -> Path:
    """A zero-shot detector."""
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("owl")
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder, model_max_length=32)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**ENCODER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**ENCODER, "image_size": 32, "patch_size": 16}
    write_detector(
        folder,
        "Owlv2ForObjectDetection",
        32,
        tokenizer,
        text_config=text,
        vision_config=vision,
        projection_dim=16,
    )
    return folder


def test_zero_shot_detector_names_the_labels(owl_folder):
    detector = load_detector(owl_folder, CPU)
    assert detector.limits == ZERO_SHOT_LIMITS
    # Each image has labels of its own.
    first, second = detector.detect([IMAGE, IMAGE], [["cup", "wine glass"], ["bed"]])
    assert {item.label for item in first} <= {"cup", "wine glass"}
    assert {item.label for item in second} == {"bed"}
    assert all(0 < item.score < 1 for item in first)


def test_detector_of_phrases_is_asked_for_one_label_at_a_time(tmp_path):
    # Grounding DINO would find parts of other labels.
    from transformers import BertTokenizer

    names = "[PAD] [UNK] [CLS] [SEP] [MASK] . a cup wine glass".split()
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    write_detector(
        tmp_path,
        "GroundingDinoForObjectDetection",
        128,
        BertTokenizer(str(tmp_path / "vocab.txt")),
        backbone_config={**SWIN, "out_features": ["stage2", "stage3", "stage4"]},
        text_config={**ENCODER, "model_type": "bert", "vocab_size": len(names)},
        d_model=32,
        num_queries=5,
        max_text_len=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    [detections] = load_detector(tmp_path, CPU).detect([IMAGE], [["cup", "wine glass"]])
    assert list(dict.fromkeys(item.label for item in detections)) == ["cup", "wine glass"]


@pytest.fixture(scope="module")
def yolos_folder(tmp_path_factory) -> Path:
    """A detector of two classes, which have COCO's names."""
    folder = tmp_path_factory.mktemp("yolos")
    sizes = {**ENCODER, "image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 5}
    names = {0: "mouse", 1: "sofa"}
    write_detector(folder, "YolosForObjectDetection", 32, **sizes, id2label=names)
    return folder


def test_detector_of_fixed_classes_has_the_benchmarks_names(yolos_folder):
    # COCO calls a sofa what GenEval calls a couch.
    detector = load_detector(yolos_folder, CPU)
    labels = {"computer mouse", "couch"}
    assert (detector.labels, detector.limits) == (labels, GENEVAL_LIMITS)
    known, unknown = detector.detect([IMAGE, IMAGE], [list(labels), ["mouse", "sofa"]])
    assert len(known) == 5
    assert {item.label for item in known} <= labels
    assert unknown == []


def geneval(folder: Path, judge: Path, *more: str) -> int:
    """GenEval's command on one prompt with one drawing."""
    prompt = {"tag": "colors", "prompt": "a red cup"}
    prompt["include"] = [{"class": "cup", "count": 1, "color": "red"}]
    (folder / "p.jsonl").write_text(json.dumps(prompt))
    (folder / "00000" / "samples").mkdir(parents=True)
    IMAGE.save(folder / "00000" / "samples" / "0.png")
    flags = f"--data {folder}/p.jsonl --image-folder {folder} --out {folder}/out --device cpu"
    return main(["eval", "geneval", *flags.split(), "--judge", str(judge), *more])


def test_geneval_by_a_detector_whose_colours_clip_names(owl_folder, clip_folder, tmp_path):
    assert geneval(tmp_path, owl_folder, "--clip", str(clip_folder), "--threshold", "0.1") == 0
    line = json.loads((tmp_path / "out" / "samples-0.jsonl").read_text())
    [detections] = line["detections"]
    assert detections
    assert all(item["colour"] in COLOURS for item in detections)


def test_geneval_by_a_detector_without_a_class_of_the_prompts(yolos_folder, tmp_path, capsys):
    # All its prompts would count as wrong.
    assert geneval(tmp_path, yolos_folder) == 2
    assert "cup" in capsys.readouterr().err


def test_segmentation_gives_masks(tmp_path):
    pytest.importorskip("scipy")  # transformers imports it for the model's loss
    model = write_detector(
        tmp_path,
        "Mask2FormerForUniversalSegmentation",
        64,
        backbone_config={**SWIN, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "cup", 1: "remote"},
        encoder_layers=1,
        decoder_layers=2,
    )
    [detections] = load_detector(tmp_path, CPU).detect([IMAGE], [["cup", "tv remote"]])
    assert detections
    for item in detections:
        # The box is the smallest around the mask.
        left, top, right, bottom = map(int, item.box)
        inside = item.mask[top:bottom, left:right]
        assert item.mask.shape == (40, 60)
        assert inside.sum() == item.mask.sum()
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()

    # An image in which nothing is found.
    with torch.no_grad():
        model.class_predictor.bias[-1] = 20
    model.save_pretrained(tmp_path)
    assert load_detector(tmp_path, CPU).detect([IMAGE], [["cup"]]) == [[]]


def test_load_detector_of_a_folder_without_one(tmp_path, clip_folder):
    for folder in (tmp_path, clip_folder):
        with pytest.raises(CheckpointError, match=folder.name):
            load_detector(folder, CPU)


def test_colour_is_the_most_similar_text(clip_folder):
    classifier = ColourClassifier(clip_folder, CPU)
    image = noise(1, (32, 32))
    mask = np.zeros((32, 32), bool)
    mask[4:12, 4:10] = True
    # The same by hand: grey around the mask, the mean of the texts of each colour.
    pixels = np.array(image)
    pixels[~mask] = 0x99
    crop = Image.fromarray(pixels).crop((4, 4, 12, 12))
    texts = ("a photo of a {} cup", "a photo of a {}-colored cup", "a photo of a {} object")
    scores = {}
    for colour in COLOURS:
        mean = classifier.clip.texts([text.format(colour) for text in texts]).mean(0)
        feature = torch.nn.functional.normalize(mean, dim=0)
        scores[colour] = float(feature @ classifier.clip.images.embed([crop])[0])
    assert len(set(scores.values())) == len(COLOURS)
    item = Detection("cup", 0.9, (4, 4, 12, 12), mask=mask)
    assert classifier.with_colour(image, item).colour == max(scores, key=lambda name: scores[name])
    # CLIP looks at the centre square of a long box.
    side = classifier.clip.images.transform.image_size
    wide = Image.new("RGB", (3 * side, side), "red")
    wide.paste(noise(1, (side, side)), (side, 0))
    wide_features, features = classifier.clip.images.embed([wide, noise(1, (side, side))])
    torch.testing.assert_close(wide_features, features)
    # An empty box is a pixel.
    assert classifier.with_colour(image, Detection("cup", 0.9, (3.2, 3.2, 3.3, 3.3))).colour
