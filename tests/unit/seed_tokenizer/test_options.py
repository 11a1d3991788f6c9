"""YAML files: the original defaults, every project and data set, wrong keys and values."""

from __future__ import annotations

from pathlib import Path

import pytest
from lavis_runs import APPLICATION

from seed_multimodal.errors import SeedError

NANO = APPLICATION / "lavis/projects/nano/pretrain_qformer.yaml"
RUN = (
    "init_lr",
    "min_lr",
    "warmup_lr",
    "warmup_steps",
    "weight_decay",
    "beta2",
    "max_epoch",
    "iters_per_epoch",
    "batch_size_train",
    "batch_size_eval",
    "num_workers",
    "seed",
    "amp",
    "resume_ckpt_path",
    "evaluate",
)
ORIGINAL = {
    "pretrain_qformer.yaml": (
        (3e-5, 3e-6, 3e-7, 2000, 0.05, 0.999, 10, 5000, 64, 16, 4, 42, True, None, False),
        {
            "pretrained": "pretrained/blip2_pretrained.pth",
            "freeze_vit": True,
            "load_finetuned": False,
            "image_size": 224,
            "vit_precision": "fp16",
            "num_query_token": 32,
            "embed_dim": 256,
            "max_txt_len": 32,
            "cross_attention_freq": 2,
            "drop_path_rate": 0,
            "temperature": 0.07,
            "label_smoothing": 0.1,
        },
    ),
    "pretrain_codebook.yaml": (
        (1e-4, 1e-5, 1e-6, 2000, 0.05, 0.999, 500, 5000, 2, 16, 4, 42, True, None, False),
        {
            "pretrained": "log/Causal_Qformer/checkpoint_0.pth",
            "n_embed": 8192,
            "codebook_embed_dim": 32,
            "decode_depth": 4,
            "image_features_dim": 1024,
            "frozen_dropout": True,
            "freeze_qformer": True,
            "use_qformer_image": False,
            "reverse_depth": 4,
        },
    ),
}


@pytest.fixture(autouse=True)
def registered():
    from seed_lavis import register

    register()


@pytest.mark.parametrize("name", ORIGINAL)
def test_load_config_of_the_original_projects(name):
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    from seed_multimodal.settings import read_settings

    config = load_config(
        f"lavis/projects/blip2/train/{name}",
        ["run.batch_size_train=2"] if "codebook" in name else [],
    )
    model = read_settings(
        registry.get_model_class(config.model_cfg.arch).options_type, config.model_cfg, "model"
    )
    run, options = ORIGINAL[name]
    assert tuple(config.run_cfg[key] for key in RUN) == run
    assert {key: getattr(model, key) for key in options} == options
    assert Path(config.run_cfg.output_dir).is_absolute() and config.run_cfg.runner == "runner_seed"
    assert config.datasets_cfg.conceptual_caption_3m.build_info.annotations.train.storage == [
        "data/cc3m/cc3m.json"
    ]


def test_load_config_of_every_project_and_data_set():
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    for file in sorted((APPLICATION / "lavis" / "projects").rglob("*/pretrain_*.yaml")):
        assert load_config(str(file), []).model_cfg.arch in registry.list_models()
    for name, builder in registry.mapping["builder_name_mapping"].items():
        assert builder().config.build_info and builder.default_config_path().startswith(
            str(APPLICATION)
        ), name


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["run.max_epok=1"], r"run: unknown key 'max_epok' \(did you mean 'max_epoch'\?\)"),
        (["run.iters_per_epoch=5", "run.accum_grad_iters=2"], "multiple of run.accum_grad_iters"),
        (["model.arch=blip2_causal"], "did you mean 'blip2_casual'"),
        (
            ["datasets.nano.vis_processor.train.name=blip2_image_trian"],
            "did you mean 'blip2_image_train'",
        ),
    ],
)
def test_load_config_with_a_wrong_option(options, sentence):
    from seed_lavis.options import load_config

    with pytest.raises(SeedError, match=sentence) as caught:
        load_config(str(NANO), options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key, sentence",
    [
        ("pretrained: nothing.pth", r"nothing\.pth.*blip2_pretrained\.pth"),
        ("text_tokenizer: /nowhere/bert", "bert-base-uncased"),
    ],
)
def test_from_config_with_a_wrong_model_key(key, sentence):
    from omegaconf import OmegaConf
    from seed_lavis.models import Blip2Casual

    tiny = OmegaConf.create(
        {
            "vit": {"width": 16, "heads": 2, "depth": 1, "mlp_width": 16},
            "qformer": {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16},
            "text_tokenizer": None,
            "vocab_size": 30,
        }
    )
    with pytest.raises(SeedError, match=sentence):
        Blip2Casual.from_config(OmegaConf.merge(tiny, OmegaConf.create(key)))
