"""Detectors of transformers, and the colours of what they find."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import noise
from tiny import read_json, write_json
from tiny.vision import SIZES
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation.detection import (
    COLOURS,
    GENEVAL_LIMITS,
    ZERO_SHOT_LIMITS,
    ColourClassifier,
    Detection,
    load_detector,
)

CPU = torch.device("cpu")
ENCODER = {**SIZES, "intermediate_size": 32}
IMAGE = noise(1, (60, 40))


def write_detector(folder, name, side, tokenizer=None, **fields):
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


def write_owl(folder, clip_folder):
    """A zero-shot detector."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(clip_folder, model_max_length=32)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**ENCODER, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 32}
    vision = {**ENCODER, "image_size": 32, "patch_size": 16}
    sizes = {"text_config": text, "vision_config": vision, "projection_dim": 16}
    write_detector(folder, "Owlv2ForObjectDetection", 32, tokenizer, **sizes)


def write_yolos(folder, _: Path):
    """A detector of two classes of COCO, which GenEval calls a TV remote and a couch."""
    sizes = {**ENCODER, "image_size": [32, 32], "patch_size": 16, "num_detection_tokens": 5}
    write_detector(
        folder, "YolosForObjectDetection", 32, **sizes, id2label={0: "remote", 1: "sofa"}
    )


def write_mask2former(folder, _: Path):
    """A segmentation model, whose detections have masks."""
    pytest.importorskip("scipy")  # transformers imports it for the model's loss
    write_detector(folder, "Mask2FormerForUniversalSegmentation", 64, **read_tables(__file__))


DETECTORS = {
    # What writes it, its thresholds, what it finds if asked for a bed.
    "zero-shot": (write_owl, ZERO_SHOT_LIMITS, {"bed"}),
    "of classes": (write_yolos, GENEVAL_LIMITS, set()),
    "segmentation": (write_mask2former, GENEVAL_LIMITS, set()),
}


@pytest.mark.parametrize("write, limits, beds", DETECTORS.values(), ids=DETECTORS)
def test_detect_returns_the_labels_of_each_image(write, limits, beds, clip_folder, tmp_path):
    # Every detector of transformers can judge: each kind has other outputs.
    write(tmp_path / "model", clip_folder)
    detector = load_detector(str(tmp_path / "model"), CPU)
    assert detector.limits == limits
    first, second = detector.detect([IMAGE, IMAGE], [["tv remote", "couch"], ["bed"]])
    assert first
    assert {item.label for item in first} <= {"tv remote", "couch"}
    assert {item.label for item in second} == beds
    for weight in detector.pipeline.model.parameters():
        weight.detach().fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):  # not: it finds nothing
        detector.detect([IMAGE], [["bed"]])
    for item in first:
        assert 0 < item.score < 1
        if write is write_mask2former:
            # The box is the smallest around the mask.
            left, top, right, bottom = map(int, item.box)
            mask = np.array(item.mask)
            inside = mask[top:bottom, left:right]
            assert mask.shape == (40, 60)
            assert inside.sum() == mask.sum()
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)


def geneval(folder, judge: Path, *more: str) -> int:
    """GenEval's command on one prompt with one drawing."""
    prompt = {"tag": "colors", "prompt": "a red cup"}
    prompt["include"] = [{"class": "cup", "count": 1, "color": "red"}]
    write_json(folder / "p.jsonl", prompt)
    (folder / "00000" / "samples").mkdir(parents=True)
    IMAGE.save(folder / "00000" / "samples" / "0.png")
    flags = f"--data {folder}/p.jsonl --image-folder {folder} --out {folder}/out --device cpu"
    return main(["eval", "geneval", *flags.split(), "--judge", str(judge), *more])


def test_geneval_by_a_detector_whose_colours_clip_names(clip_folder, tmp_path):
    # GenEval's colours need a second model, which sees each object alone.
    write_owl(tmp_path / "owl", clip_folder)
    assert (
        geneval(tmp_path, tmp_path / "owl", "--clip", str(clip_folder), "--threshold", "0.1") == 0
    )
    line = read_json(tmp_path / "out" / "samples-0.jsonl")
    [detections] = line["detections"]
    assert detections
    assert all(item["colour"] in COLOURS for item in detections)


def test_geneval_by_a_detector_without_a_class_of_the_prompts(clip_folder, tmp_path, capsys):
    # All its prompts would count as wrong.
    write_yolos(tmp_path / "yolos", clip_folder)
    assert geneval(tmp_path, tmp_path / "yolos") == 2
    assert "cup" in capsys.readouterr().err


def test_load_detector_of_a_folder_without_one(tmp_path, clip_folder):
    for folder in (tmp_path, clip_folder):
        with pytest.raises(CheckpointError, match=folder.name):
            load_detector(str(folder), CPU)


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
        scores[colour] = float(feature @ classifier.clip.images([crop])[0])
    assert len(set(scores.values())) == len(COLOURS)
    item = Detection("cup", 0.9, (4, 4, 12, 12), mask=Image.fromarray(mask))
    assert classifier.with_colour(image, item).colour == max(scores, key=lambda name: scores[name])
    # An empty box is a pixel.
    assert classifier.with_colour(image, Detection("cup", 0.9, (3.2, 3.2, 3.3, 3.3))).colour
