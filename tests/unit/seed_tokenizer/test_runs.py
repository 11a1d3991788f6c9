"""Runs in one process: schedule, model options, accumulation, precision, resuming, errors."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from lavis_runs import log_of, write_text_encoder

from seed_multimodal.errors import CheckpointError
from seed_multimodal.weights import load_state_dict

# Recorded from the original's scheduler: [epoch, iteration, rate] of the original stage-1 settings.
STAGE1_RATES = [
    [0, 0, 3e-07],
    [0, 1, 3.1485e-07],
    [0, 1999, 2.9985150000000002e-05],
    [0, 2000, 3e-05],
    [0, 4999, 3e-05],
    [1, 0, 2.9339262969984572e-05],
    [1, 4999, 2.9339262969984572e-05],
    [5, 17, 1.65e-05],
    [9, 4999, 3.6607370300154272e-06],
]
RANDOM = "model.load_pretrained=False"
SHORT = ("run.max_epoch=1", "run.iters_per_epoch=1", "run.batch_size_train=2")


def built(arguments):
    import train

    return train.build(train.parser("").parse_args(arguments))


def task_of(runner):
    from seed_lavis.datasets import split_of
    from seed_lavis.task import TokenizerTask

    from seed_multimodal.data.stream.loader import StepBatches

    return TokenizerTask(runner, StepBatches(split_of(runner.datasets, ["train"]), 8, seed=0))


def record_of(folder):
    return json.loads((folder / "stage1.done.json").read_text())


def losses_of(folder):
    return {step: line["last_loss"] for step, line in log_of(folder, "stage1").items()}


def test_learning_rate_as_recorded(yaml):
    options = [
        "run.init_lr=3e-5",
        "run.min_lr=3e-6",
        "run.warmup_lr=3e-7",
        "run.max_epoch=10",
        "run.iters_per_epoch=5000",
        "run.warmup_steps=2000",
    ]
    task = task_of(built(yaml("stage1", *options)))
    for epoch, iteration, rate in STAGE1_RATES:
        assert task.learning_rate(5000 * epoch + iteration) == pytest.approx(rate, rel=1e-9)
    halved = task_of(built(yaml("stage1", *options, "run.accum_grad_iters=2")))
    assert halved.settings.max_steps == task.settings.max_steps // 2
    assert halved.learning_rate(999) == task.learning_rate(1999)  # the rate of its last iteration


def test_build_with_options_of_the_models(yaml):
    first = built(
        yaml(
            "stage1",
            "model.gather_gradient=True",
            "model.label_smoothing=0.2",
            "model.embed_dim=12",
            "model.use_grad_checkpoint=True",
        )
    ).model
    assert (
        first.gather_gradient is True
        and first.label_smoothing == 0.2
        and first.text_proj.out_features == 12
    )
    assert first.freeze_vit is False and first.visual_encoder.config.width == 32
    second = built(
        yaml(
            "stage2",
            RANDOM,
            "model.use_qformer_image=True",
            "model.reverse_depth=3",
            "model.loss_weights={embed: 7}",
            "model.corrupt=0.1",
            "model.nested=0.2",
            "model.ema_decay=0.9",
            "model.normalize_codes=True",
            "model.codebook_sections=32",
            "model.frozen_dropout=False",
        )
    ).model
    assert len(second.Reverse_Qformer.bert.encoder.layer) == 3 and second.quantize.sections == 32
    assert (second.weights.embed, second.weights.recon_s, second.corrupt, second.nested) == (
        7,
        2.0,
        0.1,
        0.2,
    )
    assert (
        second.quantize.normalize
        and second.quantize.ema_decay == 0.9
        and second.frozen_dropout is False
    )
    assert (
        second.skips_parameters and second.quantize.embedding.weight.requires_grad
    )  # saved, though without gradient


def test_train_with_accumulation_and_gradient_checkpointing(yaml, run, tmp_path):
    """Stage 2 has no loss over pairs of images, so two half batches are one whole batch."""
    plain = [
        RANDOM,
        "model.kmeans_start=False",
        "model.restart_every=0",
        "run.max_epoch=1",
        "run.warmup_steps=0",
        "run.warmup_lr=-1",
    ]
    run(yaml("stage2", *plain, "run.iters_per_epoch=3", name="whole"))
    run(
        yaml(
            "stage2",
            *plain,
            "run.iters_per_epoch=6",
            "run.batch_size_train=4",
            "run.accum_grad_iters=2",
            "model.use_grad_checkpoint=True",
            name="halves",
        )
    )
    complete, halves = (
        [line["loss"] for line in log_of(tmp_path / name, "stage2").values()]
        for name in ("whole", "halves")
    )
    assert len(complete) == 3 and complete == pytest.approx(halves, rel=1e-5)


def test_train_in_half_precision(yaml, run, tmp_path):
    plain = [RANDOM, "model.kmeans_start=False", "run.max_epoch=1", "run.iters_per_epoch=2"]
    run(yaml("stage2", *plain, name="fp32"))
    exact = log_of(tmp_path / "fp32", "stage2")[1]["loss"]
    for precision in ("bf16", "fp16"):
        arguments = yaml(
            "stage2",
            *plain,
            f"run.precision={precision}",
            "model.vit_precision=bf16",
            name=precision,
        )
        model = run(arguments).model
        assert (
            model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        )  # frozen weights
        assert (
            model.visual_encoder.pos_embed.dtype
            == model.Qformer.bert.embeddings.LayerNorm.weight.dtype
        )
        line = log_of(tmp_path / precision, "stage2")[1]
        assert line["loss"] == pytest.approx(exact, rel=0.02) and line["loss"] != exact
        assert ("loss_scale" in line) == (precision == "fp16")


def test_train_stage1_with_an_image_embedding(yaml, run, tmp_path):
    clip = "model.clip_model=pretrained/nano/seed_tokenizer/diffusion_model/image_encoder"
    run(
        yaml(
            "stage1",
            clip,
            "model.clip_precision=fp32",
            "model.embedding_weight=2.0",
            "model.itc_weight=0.2",
            "model.use_grad_checkpoint=True",
            "run.max_epoch=1",
            "run.iters_per_epoch=2",
        )
    )
    line = log_of(tmp_path / "stage1", "stage1")[1]
    assert line["loss"] == pytest.approx(
        0.2 * line["loss_itc"] + 2.0 * line["loss_embedding"], rel=1e-5
    )
    saved = torch.load(tmp_path / "stage1" / "checkpoint_0.pth", weights_only=True)
    assert not any(name.startswith("clip") for name in saved["model"])


def test_train_stage2_of_seed1(yaml, run, tmp_path):
    runner = run(
        yaml(
            "seed1",
            f"model.text_encoder={write_text_encoder(tmp_path / 'diffusion')}",
            "model.load_pretrained=False",
            "run.max_epoch=1",
            "run.init_lr=5e-3",
        )
    )
    lines = log_of(tmp_path / "seed1", "seed1-stage2")
    assert len(lines) == 4 and all(math.isfinite(line["last_loss"]) for line in lines.values())
    assert lines[4]["loss_distil_text"] < lines[1]["loss_distil_text"]
    ids = runner.model.caption_ids(["a cat"])
    assert ids.tolist() == [
        [52, 26, 2, 0, 45, 53, 53, 53, 53]
    ]  # <start> a</w> c a t</w> <end> and padding by <end>
    saved = torch.load(tmp_path / "seed1" / "checkpoint_0.pth", weights_only=True)["model"]
    assert "reverse_tokens" in saved and not any(
        name.startswith(("text_encoder", "visual_encoder")) for name in saved
    )


def test_train_again_longer_and_from_a_checkpoint(yaml, run, tmp_path, capsys):
    """A finished run is skipped.

    With more epochs it resumes; a LAVIS checkpoint starts another run.
    """
    short = "run.iters_per_epoch=2"
    run(yaml("stage1", short, "run.max_epoch=1"))
    file = tmp_path / "stage1" / "checkpoint_0.pth"
    before = file.stat().st_mtime_ns
    run(yaml("stage1", short, "run.max_epoch=1"))
    assert "already done" in capsys.readouterr().out
    run(yaml("stage1", short, "run.max_epoch=2", "run.log_freq=1", "run.num_workers=0"))
    assert "run.max_epoch: 1 -> 2." in capsys.readouterr().out
    assert (
        list(losses_of(tmp_path / "stage1")) == [1, 2, 3, 4] and file.stat().st_mtime_ns == before
    )
    run(yaml("stage1", short, f"run.resume_ckpt_path={file}", name="other"))
    # The same weights, optimizer and batches: the second epoch has the same losses.
    complete = losses_of(tmp_path / "stage1")
    other = losses_of(tmp_path / "other")
    assert list(other) == [3, 4] and all(other[step] == complete[step] for step in other)
    assert record_of(tmp_path / "other")["steps"] == 4
    assert "stage1: 4 steps in" in capsys.readouterr().out
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth: a checkpoint of another model"):
        run(yaml("stage1", f"run.resume_ckpt_path={tmp_path}/other.pth", name="third"))


def test_train_with_averaged_weights(yaml, run, tmp_path):
    run(
        yaml(
            "stage1",
            "run.ema=0.5",
            "run.keep_checkpoints=1",
            "run.max_epoch=3",
            "run.iters_per_epoch=2",
        )
    )
    folder = tmp_path / "stage1"
    assert sorted(file.name for file in folder.glob("checkpoint_*")) == [
        "checkpoint_0.pth",
        "checkpoint_2.pth",
    ]
    saved = torch.load(folder / "checkpoint_2.pth", weights_only=True)
    averaged, trained = (
        load_state_dict(folder / "stage1.checkpoints" / "checkpoint-6" / f"{name}.safetensors")
        for name in ("ema", "model")
    )
    assert torch.equal(saved["model"]["text_proj.weight"], averaged["text_proj.weight"])
    assert not torch.equal(saved["model"]["text_proj.weight"], trained["text_proj.weight"])
    assert saved["epoch"] == 2 and saved["config"]["run"]["max_epoch"] == 3


@pytest.mark.parametrize(
    "health",
    [
        ["model.kmeans_start=True", "model.codebook_warmup=2", "model.restart_every=2"],
        ["model.ema_decay=0.8", "model.kmeans_start=True", "model.restart_every=2"],
        [
            "model.normalize_codes=True",
            "model.codebook_sections=32",
            "model.corrupt=0.3",
            "model.nested=0.5",
        ],
    ],
)
def test_train_with_codebook_options(yaml, run, tmp_path, health):
    runner = run(
        yaml(
            "stage2",
            RANDOM,
            "model.kmeans_start=False",
            "model.restart_every=0",
            "run.max_epoch=1",
            *health,
        )
    )
    line = log_of(tmp_path / "stage2", "stage2")[4]
    assert 0 < line["codebook_used"] <= 1 and 1 <= line["perplexity"] <= 64
    saved = torch.load(tmp_path / "stage2" / "checkpoint_0.pth", weights_only=True)["model"]
    assert torch.equal(saved["quantize.embedding.weight"], runner.model.quantize.embedding.weight)
    assert not any(name.startswith(("visual_encoder", "clip_model")) for name in saved)


def test_train_on_a_torn_image_and_resume(yaml, run, images, tmp_path, capsys):
    """The first part reads the torn image; the count of bad samples stays after resuming."""
    from seed_multimodal.data.stream.sampler import EpochOrder

    folder = shutil.copytree(images, tmp_path / "copied")
    items = json.loads((folder / "pairs.json").read_text())
    torn = items[int(EpochOrder(24, 42).parts(0, 12)[0][1][0])]["image"]
    (folder / torn).write_bytes(b"not an image")
    pairs = f"{{train: {{storage: [{folder}/pairs.json]}}}}"
    info = (
        f"datasets.coco_caption.build_info={{annotations: {pairs}, images: {{storage: {folder}}}}}"
    )
    for epochs in (1, 2):
        run(
            yaml(
                "stage1",
                info,
                "run.iters_per_epoch=1",
                "run.batch_size_train=12",
                f"run.max_epoch={epochs}",
            )
        )
        lines = log_of(tmp_path / "stage1", "stage1").values()
        assert (
            record_of(tmp_path / "stage1")["bad_samples"] == 1
            and [n["bad_samples"] for n in lines] == [1] * epochs
        )
    assert capsys.readouterr().out.count("skipped: ") == 1


def test_main_with_wrong_settings_or_files(yaml, run, tmp_path, capsys):
    """Exit code 2, one line on stderr, no checkpoint."""
    import train

    run(yaml("stage1", *SHORT))
    checkpoint = f"{tmp_path}/stage1/checkpoint_0.pth"
    capsys.readouterr()
    wide = (
        "model.qformer={width: 48, depth: 2, heads: 2, mlp_width: 64, max_positions: 64, "
        "dropout: 0.0}"
    )
    cases = {
        "no such stage-1 checkpoint": yaml("stage2", "model.pretrained=log/nothing.pth", name="a"),
        "did you mean 'n_embed'": yaml("stage2", "model.n_embd=3", name="b"),
        "/nowhere/*.tar": yaml(
            "stage1", "datasets.coco_caption.build_info.storage=/nowhere/*.tar", name="c"
        ),
        "tensors have another size": yaml(
            "stage2", f"model.pretrained={checkpoint}", wide, name="d"
        ),
    }
    for sentence, arguments in cases.items():
        assert train.main(arguments) == 2, sentence
        error = capsys.readouterr().err
        assert sentence in error and error.startswith("train.py: ") and error.count("\n") == 1, (
            error
        )
    assert not list(tmp_path.glob("[a-d]/*.pt*"))
