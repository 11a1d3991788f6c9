"""GenEval: prompts, rules, detectors, colours, and the command on nano's scenes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from random_images import noise

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError, DataError
from seed_multimodal.evaluation.detection import (
    GENEVAL_LIMITS,
    ZERO_SHOT_LIMITS,
    ColourClassifier,
    Detection,
    load_detector,
)
from seed_multimodal.evaluation.geneval import (
    kept_detections,
    read_object_prompts,
    rule_faults,
    spatial_relations,
)
from seed_multimodal.evaluation.metrics import Estimate, mean_of_means

CPU = torch.device("cpu")
RECORDED = Path(__file__).with_name("geneval_detections.json")
CASES = json.loads(RECORDED.read_text())


def write_lines(path: Path, *items: object) -> Path:
    path.write_text("\n".join(json.dumps(item) for item in items))
    return path


def recorded(rows: list) -> list[Detection]:
    """Detections from [class, score, box, colour if there is one]."""
    return [Detection(label, score, tuple(box), *colour) for label, score, box, *colour in rows]


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_rules_on_recorded_detections(case, tmp_path):
    [prompt] = read_object_prompts(write_lines(tmp_path / "p.jsonl", case["line"]))
    limit = GENEVAL_LIMITS.threshold
    if prompt.tag == "counting":
        limit = GENEVAL_LIMITS.counting_threshold
    assert (
        rule_faults(prompt, kept_detections(recorded(case["detections"]), limit))
        == (case["faults"])
    )


def test_spatial_relations_of_a_diagonal_offset():
    corner = Detection("a", 1.0, (0, 0, 10, 10))
    middle = Detection("b", 1.0, (100, 100, 110, 110))
    assert spatial_relations(corner, middle) == {"left of", "above"}
    assert spatial_relations(middle, corner) == {"right of", "below"}
    assert spatial_relations(corner, corner) == set()


def test_kept_detections_drops_overlapping_and_surplus_ones():
    boxes = [Detection("a", 0.9 - index / 100, (0, index, 50, 50 + index)) for index in range(20)]
    assert len(kept_detections(boxes, 0.1)) == 16
    assert kept_detections(boxes, 0.1, max_overlap=0.5) == boxes[:1]
    other = Detection("b", 0.5, (0, 0, 50, 50))
    assert kept_detections([boxes[0], other], 0.1, max_overlap=0.5) == [boxes[0], other]


LINE = {"tag": "single_object", "include": [{"class": "cup", "count": 1}], "prompt": "a cup"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": None}, "item 0: has no text 'prompt'"),
        ({"tag": None}, "item 0: has no 'tag'"),
        ({"include": {"class": "cup"}}, "'include' is no list"),
        ({"include": [{"count": 1}]}, "an object has no 'class'"),
        ({"include": [{"class": "cup", "count": 0}]}, "the count of 'cup' is no positive number"),
        ({"include": [{"class": "cup", "count": 1, "position": "left"}]}, "is no pair"),
        ({"include": [{"class": "cup", "count": 1, "position": ["left of", 0]}]}, "earlier object"),
    ],
)
def test_read_object_prompts_names_the_faulty_item(change, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_object_prompts(write_lines(tmp_path / "p.jsonl", {**LINE, **change}))


def test_mean_of_means_is_narrower_than_its_parts():
    mean = mean_of_means([Estimate(0.2, 0.1, 0.4, 10), Estimate(0.6, 0.5, 0.6, 30)])
    assert mean.value == pytest.approx(0.4) and mean.n == 40
    assert mean.low == pytest.approx(0.4 - np.hypot(0.1, 0.1) / 2)
    assert mean.high == pytest.approx(0.4 + 0.1)


# ---- detectors of transformers


@pytest.fixture(scope="module")
def owl_folder(clip_folder, tmp_path_factory) -> Path:
    """A tiny OWLv2 with random weights and a tokenizer of letters."""
    from transformers import (
        CLIPTokenizer,
        Owlv2Config,
        Owlv2ForObjectDetection,
        Owlv2ImageProcessor,
        Owlv2Processor,
    )

    folder = tmp_path_factory.mktemp("owl")
    torch.manual_seed(0)
    encoder = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    encoder["num_attention_heads"] = 2
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder, model_max_length=32)
    config = Owlv2Config(
        projection_dim=16,
        text_config={
            **encoder,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 32,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**encoder, "image_size": 32, "patch_size": 16},
    )
    Owlv2ForObjectDetection(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    Owlv2Processor(Owlv2ImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return folder


def test_zero_shot_detector_names_the_labels(owl_folder):
    detector = load_detector(owl_folder, CPU)
    assert detector.limits == ZERO_SHOT_LIMITS
    image = noise(1, (60, 40))
    [found, other] = detector.detect([image, image], [["cup", "wine glass"], ["bed"]])
    assert found and {item.label for item in found} <= {"cup", "wine glass"}
    assert other and {item.label for item in other} == {"bed"}
    assert all(0 < item.score < 1 for item in found)


def test_detector_of_phrases_is_asked_for_one_label_at_a_time(tmp_path):
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
        SwinConfig,
    )

    names = "[PAD] [UNK] [CLS] [SEP] [MASK] . a cup wine glass".split()
    (tmp_path / "vocab.txt").write_text("\n".join(names))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    torch.manual_seed(0)
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            image_size=128,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=2,
            out_features=["stage2", "stage3", "stage4"],
        ),
        text_config=BertConfig(
            vocab_size=len(names),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=5,
        max_text_len=32,
    )
    GroundingDinoForObjectDetection(config).save_pretrained(tmp_path)
    images = GroundingDinoImageProcessor(size={"height": 128, "width": 128})
    GroundingDinoProcessor(images, tokenizer).save_pretrained(tmp_path)
    [found] = load_detector(tmp_path, CPU).detect([noise(1, (60, 40))], [["cup", "wine glass"]])
    assert [item.label for item in found] == ["cup"] * 5 + ["wine glass"] * 5


@pytest.fixture(scope="module")
def yolos_folder(tmp_path_factory) -> Path:
    """A tiny YOLOS with random weights and two classes by COCO's names."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=5,
        id2label={0: "mouse", 1: "sofa"},
    )
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(0)
    YolosForObjectDetection(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    YolosImageProcessor(size=size).save_pretrained(folder)
    return folder


def test_detector_of_fixed_classes_has_the_benchmarks_names(yolos_folder):
    detector = load_detector(yolos_folder, CPU)
    labels = ["computer mouse", "couch"]
    [found, nothing] = detector.detect([noise(1), noise(1)], [labels, ["mouse", "sofa"]])
    assert len(found) == 5 and not nothing and {item.label for item in found} <= set(labels)
    assert detector.labels == set(labels) and detector.limits == GENEVAL_LIMITS


def test_detr_is_a_detector_of_boxes(tmp_path):
    from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor, ResNetConfig

    config = DetrConfig(
        backbone_config=ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 8, 8, 8],
            depths=[1, 1, 1, 1],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=5,
        id2label={0: "cup"},
    )
    torch.manual_seed(0)
    model = DetrForObjectDetection(config)
    model.save_pretrained(tmp_path)
    size = {"shortest_edge": 64, "longest_edge": 64}
    DetrImageProcessor(size=size).save_pretrained(tmp_path)
    detector = load_detector(tmp_path, CPU)
    torch.testing.assert_close(detector.model.state_dict(), model.state_dict())
    [found] = detector.detect([noise(1, (60, 40))], [["cup"]])
    assert found and all(item.mask is None for item in found)


def test_segmentation_gives_masks(tmp_path):
    pytest.importorskip("scipy")  # transformers imports it for the model's loss
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=6,
        id2label={0: "cup", 1: "remote"},
    )
    model = Mask2FormerForUniversalSegmentation(config)
    model.save_pretrained(tmp_path)
    size = {"height": 64, "width": 64}
    Mask2FormerImageProcessor(size=size, num_labels=2).save_pretrained(tmp_path)
    [found] = load_detector(tmp_path, CPU).detect([noise(1, (60, 40))], [["cup", "tv remote"]])
    assert found
    for item in found:
        assert item.mask is not None and item.mask.shape == (40, 60)
        left, top, right, bottom = map(int, item.box)
        inside = item.mask[top:bottom, left:right]
        assert inside.sum() == item.mask.sum() and item.label in ("cup", "tv remote")
        assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()

    # An image in which nothing is found.
    with torch.no_grad():
        model.class_predictor.bias[-1] = 20
    model.save_pretrained(tmp_path)
    assert load_detector(tmp_path, CPU).detect([noise(1, (60, 40))], [["cup"]]) == [[]]


def test_load_detector_of_no_detector(tmp_path, clip_folder):
    with pytest.raises(CheckpointError, match="no folder of a detector"):
        load_detector(tmp_path, CPU)
    with pytest.raises(CheckpointError, match="clip is no model for zero-shot object detection"):
        load_detector(clip_folder, CPU)


def test_colour_is_the_most_similar_text(clip_folder):
    classifier = ColourClassifier(clip_folder, CPU)
    image = noise(1, (32, 32))
    mask = np.zeros((32, 32), bool)
    mask[4:12, 4:12] = True
    item = Detection("cup", 0.9, (4, 4, 12, 12), mask=mask)
    coloured = classifier.with_colour(image, item)
    # The same by hand: grey around the mask, the mean of the texts of each colour.
    pixels = np.array(image)
    pixels[~mask] = 0x99
    crop = Image.fromarray(pixels).crop((4, 4, 12, 12))
    texts = ("a photo of a {} cup", "a photo of a {}-colored cup", "a photo of a {} object")
    best = max(
        ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"),
        key=lambda colour: float(
            torch.nn.functional.normalize(
                classifier.clip.texts([text.format(colour) for text in texts]).mean(0), dim=0
            )
            @ classifier.clip.images.embed([crop])[0]
        ),
    )
    assert coloured.colour == best
    # CLIP looks at the centre square of a long box.
    side = classifier.clip.images.transform.image_size
    centre = noise(1, (side, side))
    wide = Image.new("RGB", (3 * side, side), "red")
    wide.paste(centre, (side, 0))
    wide_features, features = classifier.clip.images.embed([wide, centre])
    torch.testing.assert_close(wide_features, features)
    # An empty box is a pixel.
    assert classifier.with_colour(image, Detection("cup", 0.9, (3.2, 3.2, 3.3, 3.3))).colour


# ---- the command


@pytest.fixture
def nano_set(tmp_path) -> Path:
    """A prompt of each kind in nano's words with drawings of scenes, the second of them wrong."""
    from seed_nano.report.prompts import KINDS, make_prompts
    from seed_nano.world.scene import Scene, render

    prompts = {prompt.tag: prompt for prompt in make_prompts(0)}
    assert list(prompts) == list(KINDS) and len(make_prompts(0)) == 553
    write_lines(
        tmp_path / "evaluation_metadata.jsonl",
        *(prompt.metadata() for prompt in prompts.values()),
    )
    for index, (tag, prompt) in enumerate(prompts.items()):
        items = prompt.include
        names = tuple(item["class"] for item in items)
        counts = tuple(item["count"] for item in items)
        style = items[0].get("color", "noto")
        layout = {1: "large", 2: "two kinds"}[len(items)]
        if tag == "counting":
            layout = "many"
        elif tag == "position":
            relation = items[1]["position"][0]
            layout = {"left of": "left of", "right of": "left of"}.get(relation, "above")
            if relation in ("left of", "above"):
                names = names[::-1]
        images = [
            Scene(style, "meadow", layout, names, counts),
            Scene("noto", "sea", "large", ("ufo",)),
        ]
        folder = tmp_path / "drawings" / f"{index:05d}" / "samples"
        folder.mkdir(parents=True)
        for number, scene in enumerate(images):
            Image.fromarray(render(scene)).save(folder / f"{number:04d}.png")
    return tmp_path


def geneval(folder: Path, *more: str) -> int:
    argv = f"eval geneval --data {folder} --judge nano --device cpu --out {folder / 'out'}".split()
    return main([*argv, "--num-images", "2", *more])


def test_geneval_judges_a_folder_of_drawings(nano_set, capsys):
    drawings = ["--image-folder", str(nano_set / "drawings")]
    assert geneval(nano_set, *drawings, "--limit", "2") == 0
    assert geneval(nano_set, *drawings) == 0  # resumes
    summary = json.loads((nano_set / "out" / "summary.json").read_text())
    kinds = ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert list(summary["kinds"]) == kinds
    # The first drawing of each prompt shows it, the second does not.
    assert {kind["value"] for kind in summary["kinds"].values()} == {0.5}
    assert summary["score"]["value"] == 0.5 and summary["score"]["n"] == summary["images"] == 12
    assert summary["prompts_correct"] == 1.0
    results = json.loads((nano_set / "out" / "results.json").read_text())
    assert [result["correct"] for result in results] == [True, False] * 6
    assert (nano_set / "out" / "sheet.png").is_file()


def test_geneval_judges_replaced_drawings_again(nano_set, capsys):
    folder = nano_set / "drawings"
    more = ("--image-folder", str(folder), "--limit", "2")
    assert geneval(nano_set, *more) == 0
    (right, wrong), (first, second) = [
        sorted((folder / f"{index:05d}" / "samples").iterdir()) for index in range(2)
    ]
    right.write_bytes(wrong.read_bytes())
    first.unlink()
    second.unlink()
    assert geneval(nano_set, *more) == 1
    results = json.loads((nano_set / "out" / "results.json").read_text())
    assert [result["correct"] for result in results] == [False] * 4
    assert json.loads((nano_set / "out" / "summary.json").read_text())["bad"] == 1
    lines = (nano_set / "out" / "samples-0.jsonl").read_text().split("\n")
    assert len([line for line in lines if line]) == 4
    assert geneval(nano_set, *more) == 1
    lines = (nano_set / "out" / "samples-0.jsonl").read_text().split("\n")
    assert len([line for line in lines if line]) == 5, "the missing one alone was tried again"


def test_drawings_that_are_gone_are_drawn_again(nano_set, capsys):
    run = ("--model", "nano", "--limit", "1")
    assert geneval(nano_set, *run) == 0
    [first, _] = (nano_set / "out/images").rglob("*.png")
    shutil.rmtree(nano_set / "out/images")
    assert geneval(nano_set, *run) == 0
    assert first.is_file() and (nano_set / "out/summary.json").is_file()


def test_geneval_counts_a_missing_drawing_as_wrong(nano_set, capsys):
    for file in (nano_set / "drawings" / "00001" / "samples").iterdir():
        file.unlink()
    drawings = ["--image-folder", str(nano_set / "drawings")]
    assert geneval(nano_set, *drawings, "--threshold", "0.2") == 1
    summary = json.loads((nano_set / "out" / "summary.json").read_text())
    assert summary["bad"] == 1 and "there is no image in" in summary["bad_first"][0]
    assert summary["kinds"]["two_object"]["value"] == 0
    assert summary["images"] == 12, "as many wrong ones as the others have"
    with pytest.raises(SystemExit):
        geneval(nano_set, *drawings, "--threshold", "high")


def test_a_detector_without_a_class_of_the_prompts_is_no_run(nano_set, yolos_folder, capsys):
    drawings = ["--image-folder", str(nano_set / "drawings")]
    assert geneval(nano_set, *drawings, "--judge", str(yolos_folder)) == 2
    assert "The detector has no class for " in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_no_run(nano_set, tmp_path, capsys):
    folder = str(tmp_path / "nothing")
    assert geneval(nano_set, "--image-folder", folder) == 2
    assert main(["eval", "suite", "--data", folder]) == 2
    assert capsys.readouterr().err.count(f"{folder}: no such folder.") == 2
    assert not (nano_set / "out").exists()
