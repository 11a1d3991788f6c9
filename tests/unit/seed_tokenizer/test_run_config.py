"""YAML files: the released defaults, LAVIS's merging, and one sentence for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

APPLICATION = Path(__file__).resolve().parents[3] / "SEED_Tokenizer"
BLIP2 = APPLICATION / "lavis/projects/blip2/train"
NANO = APPLICATION / "lavis/projects/nano/pretrain_qformer.yaml"


@pytest.fixture(autouse=True)
def registered():
    from seed_lavis import register

    register()


def test_stage1_yaml_has_the_released_values():
    from seed_lavis.options import Stage1Options
    from seed_lavis.run_config import load_config

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
    assert list(config.datasets_cfg) == ["conceptual_caption_3m"]
    assert config.datasets_cfg.conceptual_caption_3m.build_info.annotations.train.storage == ["data/cc3m/cc3m.json"]


def test_stage2_yaml_has_the_released_values():
    from seed_lavis.options import Stage2Options
    from seed_lavis.run_config import load_config

    from seed_multimodal.settings import read_settings

    config = load_config(str(BLIP2 / "pretrain_codebook.yaml"), ["run.batch_size_train=2", "model.n_embed=64"])
    run, model = config.run_cfg, read_settings(Stage2Options, config.model_cfg, "model")
    assert (run.init_lr, run.min_lr, run.warmup_lr, run.warmup_steps) == (1e-4, 1e-5, 1e-6, 2000)
    assert (run.max_epoch, run.iters_per_epoch, run.batch_size_train) == (500, 5000, 2)
    assert model.pretrained == "log/Causal_Qformer/checkpoint_0.pth" and model.n_embed == 64
    assert (model.codebook_embed_dim, model.decode_depth, model.image_features_dim) == (32, 4, 1024)
    assert model.frozen_dropout and model.freeze_qformer and not model.use_qformer_image and model.reverse_depth == 4


def test_every_project_and_data_set_yaml_is_readable():
    from seed_lavis.compat import registry
    from seed_lavis.run_config import load_config

    for file in sorted((APPLICATION / "lavis" / "projects").rglob("*/pretrain_*.yaml")):
        assert load_config(str(file), []).model_cfg.arch in registry.list_models()
    for name, builder in registry.mapping["builder_name_mapping"].items():
        assert builder().config.build_info and builder.default_config_path().startswith(str(APPLICATION)), name


@pytest.mark.parametrize("options, sentence", [
    (["run.max_epok=1"], r"run: unknown key 'max_epok' \(did you mean 'max_epoch'\?\)"),
    (["run.max_epoch=many"], "max_epoch"),
    (["rum.max_epoch=1"], r"must begin with model, datasets, run \(did you mean 'run'\?\)"),
    (["run.max_epoch"], "KEY=VALUE"),
    (["run.max_epoch=0"], "max_epoch must be at least 1"),
    (["run.iters_per_epoch=5", "run.accum_grad_iters=2"], "multiple of run.accum_grad_iters"),
    (["run.resume=maybe"], "run: resume must be one of auto, never, not 'maybe'"),
    (["run.valid_every_epochs=0"], "valid_every_epochs must be at least 1"),
    (["run.valid_batches=-1"], "valid_batches must be at least 0"),
    (["run.clip_grad=-1"], "run: clip_grad must be at least 0"),
    (["run.init_lr=.nan"], "run: init_lr must be a finite number"),
    (["run.weight_decay=-0.1"], "run: weight_decay must be at least 0"),
    (["run.beta2=1.5"], "run: beta2 must be at most 0.999999"),
    (["run.seed=4294967296"], "run: seed must be at most 4294967295"),
    (["run.precision=int8"], "run: precision must be one of auto, fp16, bf16, fp32"),
    (["run.seed=[1"], r"--options run.seed=\[1: not KEY=VALUE in YAML"),
    (["run.seed=${nowhere}"], "Interpolation key 'nowhere' not found"),
    (["model.temperature=0"], "model: temperature must be at least 1e-06"),
    (["model.label_smoothing=3"], "model: label_smoothing must be at most 1"),
    (["model.cross_attention_freq=0"], "model: cross_attention_freq must be at least 1"),
    (["model.max_txt_len=1"], "model: max_txt_len must be at least 2"),
    (["datasets.nano="], "datasets.nano must be a section of keys"),
    (["datasets.nano.vis_processor=3"], "datasets.nano.vis_processor must be a section of keys"),
    (["datasets.nano.vis_processor.train=x"], "datasets.nano.vis_processor.train must be a section of keys"),
    (["run.train_dataset_ratios={nanu: 1}"], r"train_dataset_ratios: unknown key 'nanu' \(did you mean 'nano'\?\)"),
    (["run.train_dataset_ratios={nano: 0}"], "train_dataset_ratios.nano must be a positive number"),
    (["run.train_dataset_ratios={nano: many}"], "train_dataset_ratios"),
    (["datasets.nano.sample_ratio=-1"], "datasets.nano.sample_ratio must be a positive number"),
    (["datasets.nano.sample_ratio=2", "run.train_dataset_ratios={nano: 1}"], "say the same thing"),
    (["run.device=cuda"], "no usable CUDA device"),
    (["run.task=image_text_pretain"], "did you mean 'image_text_pretrain'"),
    (["run.lr_sched=linear_warmup_cosine"], "did you mean 'linear_warmup_cosine_lr'"),
    (["run.runner=runner_sead"], "did you mean 'runner_seed'"),
    (["run.runner=runner_base"], "run.runner must be runner_seed"),
    (["model.arch=blip2_causal"], "did you mean 'blip2_casual'"),
    (["model.model_type=pretrained"], "did you mean 'pretrain'"),
    (["datasets.nan.data_type=images"], "did you mean 'nano'"),
    (["datasets.nano.vis_processor.train.name=blip2_image_trian"], "did you mean 'blip2_image_train'"),
])
def test_a_wrong_key_or_name_is_one_sentence(options, sentence, monkeypatch):
    import torch
    from seed_lavis.run_config import load_config

    from seed_multimodal.errors import ConfigError

    if "run.device=cuda" in options and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(str(NANO), options)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_section_is_named(tmp_path):
    from seed_lavis.run_config import load_config

    from seed_multimodal.errors import ConfigError

    with pytest.raises(ConfigError, match="nowhere.yaml"):
        load_config("nowhere.yaml", [])
    (tmp_path / "half.yaml").write_text("model: {arch: blip2_casual, model_type: pretrain}\ndatasets: {nano: {}}\n")
    with pytest.raises(ConfigError, match=r"half\.yaml: has no section 'run'"):
        load_config(str(tmp_path / "half.yaml"), [])


@pytest.mark.parametrize("key, sentence", [
    ("gather_gradiant: true", "did you mean 'gather_gradient'"),
    ("vit: {widht: 3}", r"model\.vit: unknown key 'widht' \(did you mean 'width'\?\)"),
    ("vit: {depth: a}", r"model\.vit: depth: input should be a valid integer"),
    ("qformer: {dropout: 2}", "dropout must be at most 1"),
    ("drop_path_rate: 0.1", "drop_path_rate must be 0"),
    ("vit_model: clip_L", "eva_clip_g"),
    ("pretrained: nothing.pth", r"nothing\.pth.*blip2_pretrained\.pth"),
    ("text_tokenizer: /nowhere/bert", "bert-base-uncased"),
    ("embedding_weight: 1.0", "model.clip_model"),
])
def test_a_wrong_model_key_is_one_sentence(key, sentence):
    from omegaconf import OmegaConf
    from seed_lavis.models import Blip2Casual

    from seed_multimodal.errors import SeedError

    tiny = OmegaConf.create({"vit": {"width": 16, "heads": 2, "depth": 1, "mlp_width": 16},
                             "qformer": {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16},
                             "text_tokenizer": None, "vocab_size": 30})
    with pytest.raises(SeedError, match=sentence) as caught:
        Blip2Casual.from_config(OmegaConf.merge(tiny, OmegaConf.create(key)))
    assert "\n" not in str(caught.value)


def test_the_tower_can_start_from_a_clip_folder():
    import torch
    from omegaconf import OmegaConf
    from seed_lavis.models import Blip2Casual

    from seed_multimodal.seed.checkpoints import load_clip_vision

    folder = "pretrained/nano/seed_tokenizer/diffusion_model/image_encoder"
    model = Blip2Casual.from_config(OmegaConf.create({
        "vit": {"patch_size": 16, "width": 192, "heads": 6, "depth": 2, "mlp_width": 768}, "image_size": 64,
        "qformer": {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16}, "text_tokenizer": None, "vocab_size": 30,
        "load_pretrained": False, "vit_weights": folder}))
    clip = load_clip_vision(APPLICATION.parent / folder, log=None).vision_model
    assert torch.equal(model.visual_encoder.blocks[1].mlp.fc1.weight, clip.encoder.layers[1].mlp.fc1.weight)
    assert not any(parameter.requires_grad for parameter in model.visual_encoder.parameters())


def test_bert_words_and_the_extra_one(tmp_path):
    from seed_lavis.text import caption_words

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fox", "##es"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    made = caption_words(str(tmp_path), 6)
    ids, mask = made(["a red FOXES", "a red red red red red red red"])
    assert made.size == len(words) + 1
    assert ids.tolist() == [[2, 5, 6, 7, 8, 3], [2, 5, 6, 6, 6, 3]] and mask.all()
    assert made(["fox"])[0].tolist() == [[2, 7, 3, 0, 0, 0]] and made(["fox"])[1].tolist() == [[1, 1, 1, 0, 0, 0]]


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    from seed_lavis.text import caption_words

    from seed_multimodal.errors import CheckpointError

    with pytest.raises(CheckpointError, match="no BERT tokenizer there"):
        caption_words(str(tmp_path), 6)


def test_nano_words_end_with_their_own_id():
    from seed_lavis.text import caption_words

    made = caption_words("pretrained/nano/seed_tokenizer", 6)
    ids, mask = made(["a cat", "a very long caption of many words"])
    assert ids.shape == (2, 6) and int(ids[0, 0]) == 1 and made.end in ids[0] and int(ids[1, -1]) == made.end
    assert made.size == made.end + 1 and mask.tolist() == (ids > 0).long().tolist()
