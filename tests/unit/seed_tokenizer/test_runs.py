"""Runs of the stages in one process: schedule, optimizer, options of the models, precision, more
epochs, bad images, errors (killed runs: e2e/test_trainers.py)."""

import json
import math
from operator import attrgetter

import pytest
import torch
from lavis_runs import build, log_of, program
from torch.testing import assert_close
from yaml_tables import read_tables

from seed_multimodal.errors import CheckpointError
from seed_multimodal.models.seed.modeling import Seed2Tokenizer
from seed_multimodal.recipes.seed.export import export_tokenizer
from seed_multimodal.state_dicts import load_state_dict

RANDOM = ("model.load_pretrained=False", "model.kmeans_start=False")
TWO_STEPS = ("run.max_epoch=1", "run.iters_per_epoch=2")


def test_learning_rate_with_accumulation(yaml):
    # Schedules count iterations, as the original's (golden/lr_schedule); a step has the rate of its
    # last one.
    from seed_lavis.datasets import joined_splits
    from seed_lavis.runner import TokenizerTask

    from seed_multimodal.data.stream.step_batches import StepBatches

    rates = []
    for count in (1, 2):
        runner = build(yaml("stage1", "run.iters_per_epoch=8", f"run.accum_grad_iters={count}"))
        data, _ = joined_splits(runner.datasets, ["train"], {})
        task = TokenizerTask(runner, StepBatches(data, 8, seed=0))
        rates.append([task.learning_rate(step) for step in range(task.settings.max_steps)])
    assert rates[0][1::2] == rates[1]
    assert len(set(rates[0])) > 3


def test_build_with_muon(yaml):
    # Every trained parameter once; the matrices of the tables by AdamW.
    from seed_multimodal.training.optimizers import MuonWithAdamW

    options = ("run.optimizer=muon", "run.init_lr=0.02", "run.beta2=0.9", "run.weight_decay=0.3")
    runner = build(yaml("stage1", *options))
    optimizer = runner.optimizer
    assert isinstance(optimizer, MuonWithAdamW)
    muon, *others = optimizer.param_groups
    assert (muon["lr"], muon["betas"][1], muon["weight_decay"]) == (0.02, 0.9, 0.3)
    names = {parameter: name for name, parameter in runner.model.named_parameters()}
    trained = {name for parameter, name in names.items() if parameter.requires_grad}
    by_muon = {names[parameter] for parameter in muon["params"]}
    by_adamw = [names[parameter] for group in others for parameter in group["params"]]
    assert sorted([*by_muon, *by_adamw]) == sorted(trained)
    assert by_muon and not any("embeddings" in name for name in by_muon)


TABLES = read_tables(__file__)


@pytest.mark.parametrize("stage", TABLES["options"])
def test_build_with_options_of_the_models(yaml, stage):
    # An option of the YAML that reaches no network would be ignored for a whole run.
    rows = TABLES["options"][stage]
    options = [f"model.{row['option']}" for row in rows]
    model = build(yaml(stage, *(RANDOM if stage == "stage2" else ()), *options)).model
    for row in rows:
        assert attrgetter(row["attribute"])(model) == row["value"], row


@pytest.mark.slow
def test_train_in_half_precision_and_with_gradient_checkpointing(yaml, run, tmp_path):
    # Near the loss in fp32, but not equal to it.
    run(yaml("stage2", *RANDOM, *TWO_STEPS, name="fp32"))
    exact = log_of(tmp_path / "fp32", "stage2")[1]["loss"]
    checkpointing = "model.use_grad_checkpoint=True"
    run(yaml("stage2", *RANDOM, *TWO_STEPS, checkpointing, name="checkpointing"))
    loss = log_of(tmp_path / "checkpointing", "stage2")[1]["loss"]
    assert loss == pytest.approx(exact, rel=1e-6)
    for precision in ("bf16", "fp16"):
        options = (f"run.precision={precision}", "model.vit_precision=bf16")
        model = run(yaml("stage2", *RANDOM, *TWO_STEPS, *options, name=precision)).model
        # Frozen weights.
        assert model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
        line = log_of(tmp_path / precision, "stage2")[1]
        assert line["loss"] == pytest.approx(exact, rel=0.02)
        assert line["loss"] != exact
        assert ("loss_scale" in line) == (precision == "fp16")


def test_train_stage2_of_seed1(yaml, run, tmp_path):
    # SEED-1 reads texts by CLIP's encoder.
    from tiny.diffusion import write_text_encoder

    encoder = f"model.text_encoder={write_text_encoder(tmp_path / 'diffusion')}"
    runner = run(yaml("seed1", encoder, *RANDOM[:1], "run.max_epoch=1", "run.init_lr=5e-3"))
    lines = log_of(tmp_path / "seed1", "seed1-stage2")
    assert all(math.isfinite(line["last_loss"]) for line in lines.values())
    assert lines[4]["loss_distil_text"] < lines[1]["loss_distil_text"]
    # <start> a</w> c a t</w> <end> and padding by <end>
    ids = [52, 26, 2, 0, 45, 53, 53]
    assert runner.model.caption_ids(["a cat"]).tolist() == [ids]
    assert not runner.model.train().text_encoder.training
    saved = torch.load(tmp_path / "seed1" / "checkpoint_0.pth", weights_only=True)["model"]
    assert "reverse_tokens" in saved
    assert not any(name.startswith(("text_encoder", "visual_encoder")) for name in saved)


@pytest.mark.slow
def test_train_again_longer_and_from_a_checkpoint(yaml, run, tmp_path, capsys):
    # A finished run is skipped; with more epochs it resumes; a LAVIS checkpoint starts another run
    # with the same weights, optimizer and batches.
    steps = "run.iters_per_epoch=2"
    run(yaml("stage1", steps, "run.max_epoch=1"))
    file = tmp_path / "stage1" / "checkpoint_0.pth"
    before = file.stat().st_mtime_ns
    run(yaml("stage1", steps, "run.max_epoch=1"))
    assert "already done" in capsys.readouterr().out
    run(yaml("stage1", steps, "run.max_epoch=2"))
    assert file.stat().st_mtime_ns == before
    run(yaml("stage1", steps, f"run.resume_ckpt_path={file}", name="other"))
    complete, other = (
        {step: line["last_loss"] for step, line in log_of(tmp_path / name, "stage1").items()}
        for name in ("stage1", "other")
    )
    assert list(complete) == [1, 2, 3, 4]
    assert other == {step: complete[step] for step in (3, 4)}
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="other.pth"):
        run(yaml("stage1", f"run.resume_ckpt_path={tmp_path}/other.pth", name="third"))


@pytest.mark.slow
def test_train_with_averaged_weights(yaml, run, tmp_path, capsys):
    # Checkpoints have the average, and held-out losses are its. The batch contrasts 24 images,
    # not some of them twice.
    epochs = ("run.max_epoch=3", "run.iters_per_epoch=2", "run.batch_size_train=64")
    options = ("run.ema=0.5", "run.keep_checkpoints=1", "run.valid_splits=[val]")
    run(yaml("stage1", *options, *epochs))
    assert "has 24 images" in capsys.readouterr().out
    folder = tmp_path / "stage1"
    files = {file.name for file in folder.glob("checkpoint_*")}
    assert files == {"checkpoint_0.pth", "checkpoint_2.pth"}
    saved = torch.load(folder / "checkpoint_2.pth", weights_only=True)
    averaged, trained = (
        load_state_dict(folder / "stage1.checkpoints" / "checkpoint-6" / f"{name}.safetensors")
        for name in ("model", "trained")
    )
    name = "text_proj.weight"
    assert torch.equal(saved["model"][name], averaged[name])
    assert not torch.equal(saved["model"][name], trained[name])
    result = ("model.load_finetuned=True", f"model.finetuned={folder}/checkpoint_2.pth")
    assert program("evaluate").main(yaml("stage1", *result, "run.test_splits=[val]")) == 0
    means = json.loads(capsys.readouterr().out.splitlines()[-1])["val"]
    stage2 = yaml("stage2", f"model.pretrained={folder}/checkpoint_2.pth", "model.qformer.heads=4")
    assert program("train").main(stage2) == 2  # shapes do not show the number of heads
    assert means["samples"] == 24
    assert means["loss"] == log_of(folder, "stage1")[6]["valid/val/loss"]


def test_train_with_one_pair_a_batch_says_that_nothing_is_contrasted(yaml, run, capsys, tmp_path):
    # Its loss is 0, which looks like success. The epoch's losses are written once.
    run(yaml("stage1", "run.batch_size_train=1", *TWO_STEPS))
    output = capsys.readouterr().out
    assert "batch of one pair" in output and "exactly 0 in 2 steps" in output
    assert (tmp_path / "stage1" / "log.txt").read_text().count('"train_epoch"') == 1


@pytest.mark.slow
def test_train_with_codebook_options(yaml, run, tmp_path):
    # The saved codebook is the one in use, whatever moved it.
    options = "kmeans_start=True codebook_warmup=1 restart_every=2 ema_decay=0.8 nested=0.5"
    options += " normalize_codes=True codebook_sections=32"
    changes = [f"model.{option}" for option in options.split()]
    runner = run(yaml("stage2", *RANDOM, "run.max_epoch=1", *changes))
    line = log_of(tmp_path / "stage2", "stage2")[4]
    assert 0 < line["codebook_used"] <= 1
    assert 1 <= line["perplexity"] <= 64
    saved = torch.load(tmp_path / "stage2" / "checkpoint_0.pth", weights_only=True)["model"]
    assert torch.equal(saved["quantize.embedding.weight"], runner.model.quantize.embedding.weight)


@pytest.mark.parametrize(
    "options", ["fsq n_embed=480 fsq_levels=[5,3] codebook_embed_dim=2", "lfq n_embed=256"]
)
def test_train_with_fixed_codes_and_export(yaml, run, tmp_path, options):
    # The exported tokenizer is the trained one, with as many codes; another loads no such file.
    changes = [f"model.{option}" for option in f"quantizer={options}".split()]
    changes += ["model.qformer.causal_queries=0", "model.freeze_qformer=False"]
    changes += ["model.restart_every=0"]
    if "fsq" in options:
        changes += ["model.codebook_sections=32", "model.codebook_warmup=1"]
    runner = run(yaml("stage2", *RANDOM, "run.max_epoch=1", *changes))
    line = log_of(tmp_path / "stage2", "stage2")[4]
    assert 0 < line["codebook_used"] <= 1

    model = runner.model.eval()
    vision = tmp_path / "vision.pth"
    torch.save(model.visual_encoder.state_dict(), vision)
    checkpoint = tmp_path / "stage2" / "checkpoint_0.pth"
    report = export_tokenizer(checkpoint, tmp_path / "out", vision=vision)
    exported = Seed2Tokenizer.from_pretrained(report.folder)
    assert exported.config == model.config
    assert exported.config.qformer.causal_queries == 0
    pixels = torch.randn(4, 3, 64, 64)
    codes = model.encode(pixels)
    assert torch.equal(exported.encode(pixels), codes)
    assert_close(exported.decode(codes), model.decode(codes))


@pytest.mark.parametrize("case", TABLES["wrong"], ids=str)
def test_main_with_wrong_settings_or_files(yaml, tmp_path, capsys, case):
    # Exit code 2, one line on stderr, no checkpoint.
    option = case["option"]
    start = () if option.startswith("model.pretrained") else RANDOM[:1]
    assert program("train").main(yaml(case["stage"], *start, option, name="wrong")) == 2
    error = capsys.readouterr().err
    assert case["named"] in error
    assert error.count("\n") == 1, error
    assert not list(tmp_path.glob("wrong/*.pt*"))
