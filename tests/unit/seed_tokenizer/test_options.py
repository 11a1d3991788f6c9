"""YAML files: the released defaults, LAVIS's merging, and one sentence for a wrong key, name or value."""

from __future__ import annotations

from pathlib import Path

import pytest
from lavis_runs import APPLICATION

from seed_multimodal.errors import ConfigError, SeedError

BLIP2 = APPLICATION / "lavis/projects/blip2/train"
NANO = APPLICATION / "lavis/projects/nano/pretrain_qformer.yaml"


@pytest.fixture(autouse=True)
def registered():
    from seed_lavis import register

    register()


def test_load_config_has_the_released_values():
    from seed_lavis.options import Stage1Options, Stage2Options, load_config

    from seed_multimodal.settings import read_settings

    config = load_config(str(BLIP2 / "pretrain_qformer.yaml"), [])
    run, model = config.run_cfg, read_settings(Stage1Options, config.model_cfg, "model")
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.warmup_steps) == (3e-5, 3e-6, 3e-7, 2000)
    assert (run.weight_decay, run.beta2, run.max_epoch, run.iters_per_epoch) == (0.05, 0.999, 10, 5000)
    assert (run.batch_size_train, run.batch_size_eval, run.num_workers, run.seed) == (64, 16, 4, 42)
    assert run.amp is True and run.resume_ckpt_path is None and run.evaluate is False and run.runner == "runner_seed"
    assert run.output_dir == str(Path("log/Causal_Qformer").absolute()) and run.accum_grad_iters == 1
    assert model.pretrained == "pretrained/blip2_pretrained.pth" and model.freeze_vit and not model.load_finetuned
    assert (model.image_size, model.vit_precision, model.num_query_token, model.embed_dim) == (224, "fp16", 32, 256)
    assert (model.max_txt_len, model.cross_attention_freq, model.drop_path_rate) == (32, 2, 0)
    assert (model.temperature, model.label_smoothing, model.gather_gradient) == (0.07, 0.1, None)
    assert config.datasets_cfg.conceptual_caption_3m.build_info.annotations.train.storage == ["data/cc3m/cc3m.json"]

    config = load_config(str(BLIP2 / "pretrain_codebook.yaml"), ["run.batch_size_train=2", "model.n_embed=64"])
    run, model = config.run_cfg, read_settings(Stage2Options, config.model_cfg, "model")
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.warmup_steps) == (1e-4, 1e-5, 1e-6, 2000)
    assert (run.max_epoch, run.iters_per_epoch, run.batch_size_train) == (500, 5000, 2)
    assert model.pretrained == "log/Causal_Qformer/checkpoint_0.pth" and model.n_embed == 64
    assert (model.codebook_embed_dim, model.decode_depth, model.image_features_dim) == (32, 4, 1024)
    assert model.frozen_dropout and model.freeze_qformer and not model.use_qformer_image and model.reverse_depth == 4


def test_load_config_reads_every_project_and_data_set():
    from seed_lavis.compat import registry
    from seed_lavis.options import load_config

    for file in sorted((APPLICATION / "lavis" / "projects").rglob("*/pretrain_*.yaml")):
        assert load_config(str(file), []).model_cfg.arch in registry.list_models()
    for name, builder in registry.mapping["builder_name_mapping"].items():
        assert builder().config.build_info and builder.default_config_path().startswith(str(APPLICATION)), name
    lavit = load_config("lavis/projects/lavit/train/pretrain_tokenizer.yaml", []).run_cfg
    assert lavit.batch_size_train * lavit.accum_grad_iters * 8 == 2048  # eight processes
    assert lavit.max_epoch * lavit.iters_per_epoch // lavit.accum_grad_iters == 50_000


@pytest.mark.parametrize("options, sentence", [
    (["run.max_epok=1"], r"run: unknown key 'max_epok' \(did you mean 'max_epoch'\?\)"),
    (["rum.max_epoch=1"], "takes KEY=VALUE with a key of model, datasets or run"),
    (["run.max_epoch"], "takes KEY=VALUE"),
    (["run.max_epoch=0"], "max_epoch must be at least 1"),
    (["run.iters_per_epoch=5", "run.accum_grad_iters=2"], "multiple of run.accum_grad_iters"),
    (["run.init_lr=.nan"], "run: init_lr must be a finite number"),
    (["run.precision=int8"], "run: precision must be one of auto, fp16, bf16, fp32"),
    (["run.seed=[1"], r"--options run.seed=\[1: not KEY=VALUE in YAML"),
    (["run.seed=${nowhere}"], "Interpolation key 'nowhere' not found"),
    (["model.drop_path_rate=0.1"], "drop_path_rate must be at most 0"),
    (["datasets.nano.vis_processor.train=x"], "datasets.nano.vis_processor must be a section"),
    (["run.train_dataset_ratios={nanu: 1}"], r"train_dataset_ratios: unknown key 'nanu' \(did you mean 'nano'\?\)"),
    (["run.train_dataset_ratios={nano: 0}"], "train_dataset_ratios.nano must be a positive number"),
    (["run.task=image_text_pretain"], "did you mean 'image_text_pretrain'"),
    (["run.lr_sched=linear_warmup_cosine"], "did you mean 'linear_warmup_cosine_lr'"),
    (["run.runner=runner_base"], "run.runner must be runner_seed"),
    (["model.arch=blip2_causal"], "did you mean 'blip2_casual'"),
    (["model.model_type=pretrained"], "model_type must be pretrain"),
    (["datasets.nan.data_type=images"], "did you mean 'nano'"),
    (["datasets.nano.vis_processor.train.name=blip2_image_trian"], "did you mean 'blip2_image_train'"),
])
def test_load_config_with_a_wrong_option(options, sentence):
    from seed_lavis.options import load_config

    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(str(NANO), options)
    assert "\n" not in str(caught.value)


def test_load_config_without_a_file_or_section(tmp_path):
    from seed_lavis.options import load_config

    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config("nowhere.yaml", [])
    (tmp_path / "half.yaml").write_text("model: {arch: blip2_casual, model_type: pretrain}\ndatasets: {nano: {}}\n")
    with pytest.raises(ConfigError, match=r"half\.yaml: has no section 'run'"):
        load_config(str(tmp_path / "half.yaml"), [])


@pytest.mark.parametrize("key, sentence", [
    ("gather_gradiant: true", "did you mean 'gather_gradient'"),
    ("vit: {widht: 3}", r"model\.vit: unknown key 'widht' \(did you mean 'width'\?\)"),
    ("pretrained: nothing.pth", r"nothing\.pth.*blip2_pretrained\.pth"),
    ("text_tokenizer: /nowhere/bert", "bert-base-uncased"),
    ("embedding_weight: 1.0", "model.clip_model"),
])
def test_from_config_with_a_wrong_model_key(key, sentence):
    from omegaconf import OmegaConf
    from seed_lavis.models import Blip2Casual

    tiny = OmegaConf.create({"vit": {"width": 16, "heads": 2, "depth": 1, "mlp_width": 16},
                             "qformer": {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16},
                             "text_tokenizer": None, "vocab_size": 30})
    with pytest.raises(SeedError, match=sentence) as caught:
        Blip2Casual.from_config(OmegaConf.merge(tiny, OmegaConf.create(key)))
    assert "\n" not in str(caught.value)


def test_caption_words_of_bert_and_of_nano(tmp_path):
    from seed_lavis.processors import caption_words

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "##es"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    made = caption_words(str(tmp_path), 6)
    ids, mask = made(["a red FOXES", "a red red red red red red red"])
    assert made.size == len(words) + 1
    assert ids.tolist() == [[2, 5, 6, 7, 8, 3], [2, 5, 6, 6, 6, 3]] and mask.all()
    made = caption_words("pretrained/nano/seed_tokenizer", 6)
    ids, mask = made(["a cat", "a very long caption of many words"])
    assert ids.shape == (2, 6) and int(ids[0, 0]) == 1 and made.end in ids[0] and int(ids[1, -1]) == made.end
    assert made.size == made.end + 1 and mask.tolist() == (ids > 0).long().tolist()
