"""Hydra overrides and the original's command line both become one validated configuration."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import llm_runs as runs
import pytest
import yaml
from repository import ROOT

from seed_multimodal.compat.training_flags import translate
from seed_multimodal.errors import ConfigError
from seed_multimodal.settings import read_settings
from seed_multimodal.training.cli import compose, main, parse
from seed_multimodal.training.config import OptimSettings
from seed_multimodal.training.engine import resolve_deepspeed_config
from seed_multimodal.training.llm.config import LlmTrainerSettings, read_model_settings
from seed_multimodal.training.llm.task import LlmTask

CONFIGS = ROOT / "MultiModalLLM" / "configs"
JSONS = sorted((CONFIGS / "deepspeed").glob("*.json"))
# The published pretraining command, flag by flag.
PRETRAIN = """--model {model} --tokenizer {tokenizer} --train_data {data}
    --deepspeed configs/deepspeed/stage2_bf16.json --output_dir log/pretrain --max_steps 30000
    --save_steps 1000 --learning_rate 1.5e-4 --min_lr_ratio 0.05 --warmup_ratio 0.03
    --lr_scheduler_type cosine --weight_decay 0.05 --adam_beta1 0.9 --adam_beta2 0.95
    --adam_epsilon 1e-5 --max_grad_norm 1.0 --gradient_accumulation_steps 4
    --per_device_train_batch_size 128 --per_device_eval_batch_size 1 --bf16 True
    --gradient_checkpointing True --dataloader_num_workers 2
    --logging_steps 1 --report_to tensorboard --evaluation_strategy no --ignore_data_skip True
    --logging_nan_inf_filter no --log_level info"""


def trainer_settings(trainer: dict) -> LlmTrainerSettings:
    return read_settings(LlmTrainerSettings, trainer, "trainer")


@pytest.fixture
def files(tmp_path) -> dict[str, Path]:
    return runs.write_files(tmp_path)


@pytest.fixture
def published(files) -> list[str]:
    return PRETRAIN.format(**files).split()


def test_compose_the_published_command_line(published):
    run = LlmTask.read(compose(translate(published), CONFIGS))
    assert (
        run.trainer.max_steps,
        run.trainer.save_steps,
        run.trainer.gradient_accumulation_steps,
    ) == (30000, 1000, 4)
    assert (run.trainer.precision, run.trainer.gradient_checkpointing) == ("bf16", True)
    assert run.trainer.report_to == ["tensorboard"] and run.trainer.eval_steps == 0
    optim = run.optim
    assert (optim.name, optim.learning_rate, optim.adam_epsilon, optim.adam_beta2) == (
        "adamw_hf",
        1.5e-4,
        1e-5,
        0.95,
    )
    assert (optim.min_lr_ratio, optim.warmup_ratio, optim.weight_decay) == (0.05, 0.03, 0.05)
    assert run.deepspeed["zero_optimization"]["stage"] == 2
    assert run.model.sizes["hidden_size"] == 32 and len(run.data.sources) == 2
    assert translate(published).original and not translate(["--resume", "never"]).original
    assert (
        translate(published).ignored
        == (
            "--per_device_train_batch_size --per_device_eval_batch_size --ignore_data_skip "
            "--logging_nan_inf_filter --log_level"
        ).split()
    )


PUBLISHED = {  # recipes of the original's two scripts
    "pretrain": {
        "max_steps": 30000,
        "save_steps": 1000,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1.5e-4,
        "min_lr_ratio": 0.05,
        "warmup_ratio": 0.03,
    },
    "sft": {
        "max_steps": 50000,
        "save_steps": 10000,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "min_lr_ratio": 0.1,
        "warmup_ratio": 0.07,
    },
}
OF_BOTH = {
    "precision": "bf16",
    "gradient_checkpointing": True,
    "max_grad_norm": 1.0,
    "seed": 42,
    "dataloader_num_workers": 2,
    "logging_steps": 1,
    "report_to": ["tensorboard"],
    "eval_steps": 0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5,
    "weight_decay": 0.05,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0,
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("way", ["script", "groups"])
def test_compose_the_published_recipes(name, way, monkeypatch):
    monkeypatch.chdir(runs.APPLICATION)
    arguments = [
        f"optim={name}",
        f"trainer={name}",
        f"data=multi_torchdata_{name}",
        "output_dir=out",
    ]
    if way == "script":
        text = Path(f"scripts/train_a100_lora_multi_node_{name}.sh").read_text().replace("\\\n", "")
        words = shlex.split(text, comments=True)
        arguments = words[words.index("launch") + 2 : -1]  # between the port and "$@"
    run = LlmTask.read(compose(translate(arguments), CONFIGS))
    settings = {**vars(run.optim), **vars(run.trainer)}
    assert {key: settings[key] for key in (*PUBLISHED[name], *OF_BOTH)} == {
        **PUBLISHED[name],
        **OF_BOTH,
    }
    assert run.trainer.save_seconds == 1800  # ours, a limit on the work that a crash loses
    assert run.optim.name == ("adamw_hf" if way == "script" else "adamw")
    assert run.data.packing and run.data.rows == 6
    lora = run.model.lora
    assert (lora["r"], lora["lora_alpha"], lora["lora_dropout"]) == (16, 32, 0.05)
    assert lora["modules_to_save"] == [
        "embed_tokens",
        "lm_head",
        "input_layernorm",
        "post_attention_layernorm",
        "norm",
    ]
    if way == "script":
        zero = run.deepspeed["zero_optimization"]
        assert (zero["stage"], "offload_optimizer" in zero) == (2, name == "sft")


def test_compose_later_arguments_win(published):
    config = compose(
        translate(
            [
                *published,
                "--max_steps",
                "7",
                "optim.learning_rate=0.5",
                "model.sizes.hidden_size=16",
                "deepspeed=none",
            ]
        ),
        CONFIGS,
    )
    assert (config["trainer"]["max_steps"], config["optim"]["learning_rate"]) == (7, 0.5)
    assert config["model"]["sizes"]["hidden_size"] == 16 and config.get("deepspeed") is None
    # A group chosen after the flags replaces all of them; one before does not.
    trainer = compose(translate([*published, "trainer=nano"]), CONFIGS)["trainer"]
    assert trainer == yaml.safe_load((CONFIGS / "trainer" / "nano.yaml").read_text())
    assert (
        compose(translate(["trainer=nano", *published]), CONFIGS)["trainer"]["max_steps"] == 30000
    )


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        ("--bf16", ["trainer.precision=bf16"]),
        ("--bf16 False", []),
        ("--no_bf16", []),
        ("--bf16 True --fp16 False", ["trainer.precision=bf16"]),
        ("--fp16=True", ["trainer.precision=fp16"]),
        ("--mixed_precision no", ["trainer.precision=fp32"]),
        (
            "--gradient_checkpointing --max_steps 3",
            ["trainer.gradient_checkpointing=True", "trainer.max_steps=3"],
        ),
        ("--gradient-checkpointing=False", ["trainer.gradient_checkpointing=False"]),
        ("--report_to tensorboard wandb", ["trainer.report_to=[tensorboard,wandb]"]),
        ("--report_to none", ["trainer.report_to=[]"]),
        ("--report_to all", ["trainer.report_to=[tensorboard]"]),
        ("--resume_from_checkpoint log/checkpoint-3", ['trainer.resume="log/checkpoint-3"']),
        ("--resume_from_checkpoint True", ['trainer.resume="auto"']),
        ("--evaluation_strategy steps", ["trainer.eval_steps=${trainer.logging_steps}"]),
        ("--eval_strategy steps --eval_steps 5", ["trainer.eval_steps=5"]),
        ("--save_strategy no", ["trainer.save_steps=0", "trainer.save_seconds=0"]),
        ("--optim adamw_torch_fused", ["optim.name=adamw"]),
        ("--optim adamw_hf", ["optim.name=adamw_hf"]),
        (
            "--num_train_epochs 10 --max_steps 5 --push_to_hub False --do_train",
            ["trainer.max_steps=5"],
        ),
        ("--use_cpu", ["trainer.device=cpu"]),
        # A boolean needs no value, so what follows it may be an override; a path with `=` is
        # another flag's value.
        (
            "--bf16 trainer.max_steps=3 --output_dir log/lr=1",
            ["trainer.precision=bf16", "trainer.max_steps=3", 'output_dir="log/lr=1"'],
        ),
        # A group's file replaces only what flags before it set.
        (
            "--max_steps 7 optim.name=muon --seed 3 trainer=nano --seed 4",
            ["optim.name=muon", "trainer=nano", "trainer.seed=4"],
        ),
    ],
)
def test_translate_flags_of_the_original(arguments, overrides):
    assert [
        override.removeprefix("++") for override in translate(arguments.split()).overrides
    ] == overrides


def test_parse_without_the_flags_of_the_original():
    command = parse(["model=nano", "--config-name", "mine", "--cfg", "trainer.max_steps=3"])
    assert command.overrides == ["model=nano", "trainer.max_steps=3"]
    assert command.options == {"config_name": "mine", "cfg": "True"} and not command.original
    with pytest.raises(ConfigError, match="--max_steps: unknown option"):
        parse(["--max_steps", "3"])


def test_compose_values_with_an_equals_sign():
    for words in (["--output_dir", "log/lr=1e-4"], ["output_dir='log/lr=1e-4'"]):
        assert compose(translate(words), CONFIGS)["output_dir"] == "log/lr=1e-4"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--learning_rat", "1"],
            r"--learning_rat: unknown option \(did you mean '--learning_rate'\?\)",
        ),
        (["--num_train_epochs", "3"], "--num_train_epochs: not supported; use --max_steps"),
        (["--save_strategy", "epoch"], "must be one of no, steps, not 'epoch'"),
        (["optim=pretrian"], r"no such configuration in .*did you mean 'pretrain'\?"),
        (["deepspeed=stage2_bf61"], "did you mean 'stage2_bf16'"),
        (["output_dir=log/lr=1e-4"], "values with characters like = .* need inner quotes"),
    ],
)
def test_compose_with_a_wrong_argument(arguments, words, files):
    with pytest.raises(ConfigError, match=words) as caught:
        compose(
            translate([*(f"{group}={file}" for group, file in files.items()), *arguments]), CONFIGS
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("program", "lines"),
    [
        (
            "train",
            (
                "trainer: lavit_pretrain, nano",
                "trainer.max_steps=1000",
                "data.sources[].weight=1.0",
            ),
        ),
        ("train_seed_x_sft", ("agent.losses.rec_loss_scale=6.0", "visual_encoder.path=???")),
        ("train_lavit", ("visual_encoder.", "optim.learning_rate=0.00015")),
        (
            "train_seed_x_detokenizer",
            ("model: stage1, stage2, tiny", "model.resampler.", "trainer.ema=0.0"),
        ),
        ("train_lavit_detokenizer", ("model.diffusion=???", "data.encoder_size=224")),
    ],
)
def test_main_help_lists_files_and_keys_with_defaults(program, lines, capsys):
    assert main(program, CONFIGS, ["--help"]) == 0
    shown = capsys.readouterr().out
    assert "???" in shown and all(line in shown for line in lines)


def test_main_prints_the_configuration(files, capsys):
    chosen = [f"{group}={file}" for group, file in files.items()]
    assert main("train", CONFIGS, [*chosen, "trainer.max_steps=7", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["output_dir"] == "???" and shown["trainer"]["max_steps"] == 7
    with pytest.raises(ConfigError, match="output_dir is required"):
        compose(translate(chosen), CONFIGS)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["trainer.max_stepz=3"],
            r"trainer: unknown key 'max_stepz' \(did you mean 'max_steps'\?\)",
        ),
        (["trainer.max_steps=3.5"], "max_steps: input should be a valid integer"),
        (["trainer.precision=fp8"], "precision must be one of bf16, fp16, fp32"),
        (["trainr.max_steps=3"], r"unknown key 'trainr' \(did you mean 'trainer'\?\)"),
        (["model=none"], "model is required"),
        (["--max_steps", "many"], "trainer: max_steps: input should be a valid integer"),
        (
            ["tokenizer.pretrained_model_name_or_path=null"],
            "pretrained_model_name_or_path is required",
        ),
    ],
)
def test_read_with_a_wrong_setting(more, words, files, tmp_path):
    with pytest.raises(ConfigError, match=words):
        LlmTask.read(compose(translate(runs.overrides(files, tmp_path / "out", *more)), CONFIGS))


def test_read_settings_with_a_target_that_is_not_allowed(files, tmp_path):
    from seed_multimodal.data.stream.config import read_data_settings

    for group, read in (("model", read_model_settings), ("data", read_data_settings)):
        files[group].write_text("_target_: os.system\ncommand: touch /tmp/made\n")
        config = compose(translate(runs.overrides(files, tmp_path / "out")), CONFIGS)
        with pytest.raises(ConfigError, match="os.system"):
            read(config[group])
        assert not Path("/tmp/made").exists()


def test_read_settings_of_the_files_of_every_group():
    assert {path.stem for path in JSONS} == {
        "stage1_bf16",
        "stage2_bf16",
        "stage2_offload_bf16",
        "stage2_fp16",
        "stage2_offload_fp16",
        "stage2_bf16_mefft",
        "stage2_fp16_mefft",
        "stage2_fp16_offload_mefft",
        "stage3_fp16",
        "stage3_offload_fp16",
        "stage3_offload_opt_fp16",
        "stage3_offload_bf16",
    }
    for file in (CONFIGS / "trainer").glob("*.yaml"):
        read_settings(LlmTrainerSettings, yaml.safe_load(file.read_text()), "trainer")
    for file in (CONFIGS / "optim").glob("*.yaml"):
        read_settings(OptimSettings, yaml.safe_load(file.read_text()), "optim")


@pytest.mark.parametrize("file", JSONS, ids=lambda path: path.stem)
def test_fill_config_of_a_deepspeed_file(file):
    precision = "bf16" if "bf16" in file.stem else "fp16"
    micro_steps = 1 if "mefft" in file.stem else 4
    settings = trainer_settings(
        {"precision": precision, "gradient_accumulation_steps": micro_steps}
    )
    filled, remarks = resolve_deepspeed_config(
        json.loads(file.read_text()), settings, world=8, rows=3, hidden_size=64
    )
    assert '"auto"' not in json.dumps(filled) and filled[precision]["enabled"] is True
    micro = filled["train_micro_batch_size_per_gpu"]
    count = filled["gradient_accumulation_steps"]
    assert filled["train_batch_size"] == micro * count * 8 and "optimizer" not in filled
    assert bool(remarks) == (file.stem == "stage1_bf16")
    stage = int(re.search(r"stage(\d)", file.stem)[1])
    assert filled["zero_optimization"]["stage"] == stage
    offload = filled["zero_optimization"].get("offload_optimizer", {}).get("device", "none")
    assert (offload == "cpu") == ("offload" in file.stem)


def test_fill_config_that_contradicts_the_trainer():
    mefft = json.loads((CONFIGS / "deepspeed" / "stage2_bf16_mefft.json").read_text())
    with pytest.raises(ConfigError, match="gradient_accumulation_steps is 1, but 4"):
        resolve_deepspeed_config(
            mefft,
            trainer_settings({"gradient_accumulation_steps": 4}),
            world=1,
            rows=1,
            hidden_size=8,
        )
    with pytest.raises(ConfigError, match="bf16 is True, but"):
        resolve_deepspeed_config(
            mefft, trainer_settings({"precision": "fp32"}), world=1, rows=1, hidden_size=8
        )


@pytest.mark.parametrize(
    ("precision", "torch_dtype", "used"),
    [
        ("fp16", None, "fp16"),
        ("bf16", None, "bf16"),  # that of the run: the original fp16 weights stay exact
        ("bf16", "fp16", "fp16"),  # that of the file
        ("fp32", "fp16", "fp32"),
    ],
)
def test_build_llm_loads_the_base_in_the_precision_of_the_run_or_the_file(
    tmp_path, precision, torch_dtype, used
):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from seed_multimodal.language.tokenizer import MultimodalTokenizer
    from seed_multimodal.training.distributed import ProcessGroup
    from seed_multimodal.training.llm.model import build_llm

    words = MultimodalTokenizer.from_pretrained(runs.TOKENIZER).vocabulary.size
    base = LlamaForCausalLM(LlamaConfig(**runs.SIZES, vocab_size=words)).half()
    base.save_pretrained(tmp_path / "base")
    model = {
        "_target_": "src.model.peft_model.get_peft_model_with_resize_embedding",
        "model": {
            "_target_": "src.model.llama_xformer.LlamaForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": str(tmp_path / "base"),
            **({"torch_dtype": torch_dtype} if torch_dtype else {}),
        },
        "peft_config": {"_target_": "peft.LoraConfig", "r": 2, "target_modules": ["q_proj"]},
    }
    files = runs.write_files(tmp_path)
    files["model"].write_text(yaml.safe_dump(model))
    config = compose(
        translate(runs.overrides(files, tmp_path / "out", f"trainer.precision={precision}")),
        CONFIGS,
    )
    task = LlmTask(
        LlmTask.read(config), ProcessGroup(), torch.device("cuda")
    )  # fp16 is allowed; nothing is put there
    llm = build_llm(task.run.model, task.tokenizer, "cpu")
    frozen = llm.get_base_model().model.layers[0].mlp.up_proj.weight
    assert (
        frozen.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[used]
    )
    exact = torch.equal(frozen.float(), base.model.layers[0].mlp.up_proj.weight.float())
    assert exact == (used != "bf16") and all(
        p.dtype == torch.float32 for p in llm.parameters() if p.requires_grad
    )


def test_read_model_settings_of_other_builders_of_the_originals():
    """Those that no published file names."""
    base = {
        "_target_": "transformers.LlamaForCausalLM.from_pretrained",
        "pretrained_model_name_or_path": "llama",
    }
    lora = {"_target_": "peft.LoraConfig", "r": 2, "target_modules": ["q_proj"]}
    seed = "src.model.peft_model.get_"
    seed_x = "src.models.mllm.peft_models.get_"
    frozen = read_model_settings({"_target_": f"{seed}frozen_embedding_model", "model": base})
    assert frozen.freeze_embeddings and frozen.path == "llama" and frozen.lora is None
    trained = read_model_settings(
        {
            "_target_": f"{seed}peft_model_with_trainable_embedding",
            "model": base,
            "peft_config": lora,
        }
    )
    assert trained.train_embeddings and trained.lora == {"r": 2, "target_modules": ["q_proj"]}
    full = read_model_settings(
        {
            "_target_": f"{seed_x}full_model_with_resize_embedding",
            "model": base,
            "vocab_size": 32330,
        }
    )
    assert full.path == "llama" and full.lora is None and not full.freeze_embeddings
    for name in (f"{seed}learnable_image_embedding_model", f"{seed_x}model_with_resize_embedding"):
        with pytest.raises(
            ConfigError, match="has no counterpart: embeddings are not trained alone; use"
        ):
            read_model_settings({"_target_": name, "model": base})
