"""YAML files: the original defaults, every project and data set, wrong keys and values."""

from pathlib import Path

import pytest
import yaml
from lavis_runs import APPLICATION

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
