"""YAML files: the original defaults, every project and data set, wrong keys and values."""

from pathlib import Path

import pytest
import yaml
from lavis_runs import APPLICATION

from seed_multimodal.errors import ConfigError

# Values of the original's YAML files: run, model.
ORIGINAL = yaml.safe_load("""
pretrain_qformer.yaml:
- init_lr: 3.0e-5
  min_lr: 3.0e-6
  warmup_lr: 3.0e-7
  warmup_steps: 2000
  max_epoch: 10
  iters_per_epoch: 5000
  batch_size_train: 64
- pretrained: pretrained/blip2_pretrained.pth
  freeze_vit: true
  vit_precision: fp16
  num_query_token: 32
  embed_dim: 256
  max_txt_len: 32
  cross_attention_freq: 2
  temperature: 0.07
  label_smoothing: 0.1
pretrain_codebook.yaml:
- init_lr: 1.0e-4
  min_lr: 1.0e-5
  warmup_lr: 1.0e-6
  max_epoch: 500
- pretrained: log/Causal_Qformer/checkpoint_0.pth
  n_embed: 8192
  codebook_embed_dim: 32
  decode_depth: 4
  image_features_dim: 1024
  frozen_dropout: true
  freeze_qformer: true
  reverse_depth: 4
""")
OF_BOTH = {"weight_decay": 0.05, "beta2": 0.999, "num_workers": 4, "seed": 42, "amp": True}


@pytest.mark.parametrize("name", ORIGINAL)
def test_load_config_of_the_original_projects(name):
    # The published recipes of both stages.
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    from seed_multimodal.settings import read_settings

    config = load_config(f"lavis/projects/blip2/train/{name}", [])
    options_type = registry.get_model_class(config.model_cfg.arch).options_type
    model = read_settings(options_type, config.model_cfg, "model")
    run, options = ORIGINAL[name]
    expected = {**run, **OF_BOTH}
    assert {key: config.run_cfg[key] for key in expected} == expected
    assert {key: getattr(model, key) for key in options} == options
    assert Path(config.run_cfg.output_dir).is_absolute()


def test_load_config_of_every_project_and_data_set():
    # No shipped file has a key that its reader does not know.
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    for file in sorted((APPLICATION / "lavis" / "projects").rglob("*/pretrain_*.yaml")):
        assert load_config(str(file), []).model_cfg.arch in registry.list_models()
    for name, builder in registry.mapping["builder_name_mapping"].items():
        assert builder().config.build_info, name


STEADY = ["run.warmup_steps=0", "run.min_lr=1e-5", "run.warmup_lr=-1"]


@pytest.mark.parametrize(
    "schedule, unread",
    [
        ("constant", ["warmup_steps=3", "min_lr=1e-6", "warmup_lr=1e-6", "lr_decay_rate=0.9"]),
        ("constant_with_warmup", ["min_lr=1e-6", "warmup_lr=1e-6", "lr_decay_rate=0.9"]),
        ("inverse_sqrt", ["min_lr=1e-6", "warmup_lr=1e-6", "lr_decay_rate=0.9"]),
        ("linear_warmup_cosine_steps", ["warmup_lr=1e-6", "lr_decay_rate=0.9"]),
        ("linear_warmup_cosine_lr", ["lr_decay_rate=0.9"]),
        ("linear_warmup_step_lr", []),
    ],
)
def test_keys_that_a_schedule_does_not_read_are_refused(schedule, unread):
    # A warm-up that is ignored shows in the loss only.
    from seed_lavis.options import load_config

    options = [f"run.lr_sched={schedule}", *STEADY]
    file = "lavis/projects/blip2/train/pretrain_qformer.yaml"
    every = ["warmup_steps=3", "min_lr=1e-6", "warmup_lr=1e-6", "lr_decay_rate=0.9"]
    load_config(file, [*options, *(f"run.{option}" for option in every if option not in unread)])
    for option in unread:
        with pytest.raises(ConfigError, match=f"{option.partition('=')[0]} .*{schedule}"):
            load_config(file, [*options, f"run.{option}"])
