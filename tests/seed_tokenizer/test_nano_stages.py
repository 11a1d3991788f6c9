"""The nano speed run's part of the application: YAML files, schedule, loss by labels, both stages and the join."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.tokenizers.seed2 import Seed2Tokenizer
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.schedules import learning_rate
from seed_multimodal.weights import save_state_dict
from seed_nano.train.clip import HEADS_FILE, READOUT_FILE, Tower
from seed_nano.train.config import NanoConfig, load_config, save_config
from seed_nano.train.pixels import scene_pixels, to_clip
from seed_nano.train.tokenizer import PREFIXES, encode_scenes, pool_codes, tokenizer_config
from seed_nano.train.tokenizer_recipe import join_stages, write_recipes
from seed_nano.train.workspace import Workspace
from seed_nano.world.splits import scene_at
from seed_nano.world.targets import CLASSES

ROOT = Path(__file__).resolve().parents[2]
WORDS = ROOT / "pretrained" / "nano" / "seed_tokenizer"


def test_the_schedule_is_the_library_s() -> None:
    from seed_lavis.compat import registry
    from seed_lavis.schedules import LinearWarmupCosineSteps

    settings = StageSettings(steps=12, lr=2e-3, warmup=5, min_lr_ratio=0.02)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    registry.register("configuration", OmegaConf.create({"run_cfg": {"iters_per_epoch": 4}}))
    schedule = LinearWarmupCosineSteps(optimizer, max_epoch=3, min_lr=4e-5, init_lr=2e-3, warmup_steps=5,
                                       warmup_start_lr=-1, decay_rate=None)
    for step in range(12):
        schedule.step(*divmod(step, 4))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(learning_rate(step, settings), rel=1e-12)


def space(folder: Path, **changes: Any) -> Workspace:
    """A work folder after stage `clip`, with untrained weights; word pieces are the shipped system's."""
    config = load_config(ROOT / "configs" / "nano" / "test.yaml",
                         [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])
    place = Workspace(config, folder, folder / "system")
    torch.manual_seed(0)
    tower = Tower(config)
    tower.vision.save_pretrained(place.decoder_folder / "image_encoder")
    for file in ("tokenizer.model", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        (place.tokenizer_folder / file).write_bytes((WORDS / file).read_bytes())
    save_state_dict(tower.heads.state_dict(), folder / HEADS_FILE)
    save_state_dict({"readout": tower.readout.weight}, folder / READOUT_FILE)
    save_config(config, folder / "config.yaml")
    return place


def models(place: Workspace) -> tuple[Any, Any]:
    """Both stages' models with the weights that their YAML files name; stage 1 is untrained."""
    from seed_lavis.models import Blip2Casual, Blip2CodebookAllImage

    one, two = (OmegaConf.load(file) for file in write_recipes(place))
    torch.manual_seed(1)
    first = Blip2Casual.from_config(one.model)
    (place.work / "stage1").mkdir()
    trained = {name: value for name, value in first.state_dict().items() if "visual_encoder" not in name}
    torch.save({"model": trained}, two.model.pretrained)
    return first, Blip2CodebookAllImage.from_config(two.model)


def test_the_recipes_hold_the_run_s_sizes(tmp_path: Path) -> None:
    from seed_lavis.options import RunOptions

    from seed_multimodal.settings import read_settings

    place = space(tmp_path, train_stage1__accumulate=3)
    first, second = models(place)
    wanted = tokenizer_config(place.config)
    assert second.config == wanted and (first.config.vit, first.config.qformer) == (wanted.vit, wanted.qformer)
    one, two = (OmegaConf.load(place.work / f"{name}.yaml") for name in ("stage1", "stage2"))
    run = read_settings(RunOptions, one.run, "run")
    assert (run.iters_per_epoch * run.max_epoch, run.accum_grad_iters, run.warmup_steps) == (12, 3, 6)
    assert one.datasets.nano.build_info.number == 4 * 3 * 8 and two.datasets.nano.build_info.number == 10 * 8


def test_targets_are_the_frozen_tower_s_and_its_heads_teach_the_codes(tmp_path: Path) -> None:
    first, second = models(space(tmp_path, train_stage1__precision="fp32", train_stage2__precision="fp32"))
    scenes = [scene_at(0, number) for number in range(6)]
    samples = {"image": to_clip(scene_pixels(scenes, 64)), "caption": ["a cat"] * 6}
    embeds = second.clip_model(samples["image"]).image_embeds
    assert first.shares_tower and second.shares_tower  # one forward pass for features and target:
    second.clip_model.vision_model.encoder = None
    told = {name: value.detach() for name, value in first(samples).items()}
    assert float(told["loss"]) == pytest.approx(0.2 * float(told["loss_itc"]) + 2.0 * float(told["loss_embedding"]),
                                                rel=1e-5)
    out = {name: value.detach() for name, value in second.eval()(samples).items()}
    parts = sum(float(out[name]) for name in ("loss_embed", "loss_distil_image", "loss_readout"))
    weight = second.options.label_weight
    assert weight > 0 and float(out["loss"]) == pytest.approx(parts + weight * float(out["loss_labels"]), rel=1e-5)
    decoded = second.decode_embeddings(second.quantize.lookup(second.codes)).detach()
    error = (decoded - embeds).square().mean()
    assert float(out["loss_distil_image"]) == pytest.approx(float(error), rel=1e-4)
    logs = [[heads(rows)[name].log_softmax(1) for name in CLASSES] for heads, rows in
            ((second.label_heads, embeds), (second.label_heads, decoded))]
    apart = [(a.exp() * (a - b)).sum(1).mean() for a, b in zip(*logs, strict=True)]
    assert float(out["loss_labels"]) == pytest.approx(float(torch.stack(apart).mean()), rel=1e-4)
    assert not any("label_heads" in name for name in second.state_dict())


def test_a_tower_of_other_weights_is_not_taken_for_the_target_s(tmp_path: Path) -> None:
    from seed_lavis.initial_weights import is_tower_of

    first, _ = models(space(tmp_path))
    assert is_tower_of(first.visual_encoder, first.clip)
    with torch.no_grad():
        first.visual_encoder.blocks[1].mlp.fc2.bias[3] += 1e-3
    assert not is_tower_of(first.visual_encoder, first.clip) and not is_tower_of(first.visual_encoder, None)


def test_heads_that_are_missing_or_of_another_width_are_refused(tmp_path: Path) -> None:
    from seed_lavis.models import Blip2CodebookAllImage

    two = OmegaConf.load(write_recipes(space(tmp_path))[1]).model
    with pytest.raises(ConfigError, match="give their safetensors file as model.label_heads"):
        Blip2CodebookAllImage.from_config({**two, "label_heads": None})
    save_state_dict({"layers.style.weight": torch.zeros(3, 7), "layers.style.bias": torch.zeros(3)},
                    tmp_path / "narrow.safetensors")
    with pytest.raises(CheckpointError, match="narrow.safetensors: its heads read embeddings 7 wide"):
        Blip2CodebookAllImage.from_config({**two, "label_heads": str(tmp_path / "narrow.safetensors")})


def test_start_is_another_run_s_checkpoint_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train_stage2.start: .*nothing.pth is no file"):
        write_recipes(space(tmp_path, train_stage2__start="nothing.pth"))
    earlier = tmp_path / "checkpoint_0.pth"
    earlier.write_bytes(b"weights")
    two = OmegaConf.load(write_recipes(space(tmp_path, train_stage2__start=earlier))[1])
    assert two.model.finetuned == str(earlier) and two.model.load_finetuned
    assert two.model.codebook_warmup == 0 and not two.model.kmeans_start  # its codebook is a start
    assert NanoConfig().train_stage2.start == ""


def test_the_weights_of_the_start_are_those_that_training_begins_with(tmp_path: Path) -> None:
    from seed_lavis.initial_weights import load_finetuned
    from seed_lavis.models import Blip2Casual
    from seed_lavis.options import Stage1Options

    from seed_multimodal.settings import read_settings

    one = OmegaConf.load(write_recipes(space(tmp_path))[0])
    earlier = Blip2Casual(read_settings(Stage1Options, one.model, "model"))
    torch.save({"model": earlier.state_dict(), "optimizer": {}, "epoch": 0}, tmp_path / "checkpoint_0.pth")
    one = OmegaConf.load(write_recipes(space(tmp_path, train_stage1__start=tmp_path / "checkpoint_0.pth"))[0])
    torch.manual_seed(1)
    model = Blip2Casual(read_settings(Stage1Options, one.model, "model"))
    assert not torch.equal(model.query_tokens, earlier.query_tokens)
    load_finetuned(model)
    assert all(torch.equal(value, earlier.state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_both_stages_on_scenes_and_the_joined_tokenizer(tmp_path: Path, run: Any, capsys: Any) -> None:
    place = space(tmp_path)
    write_recipes(place)
    for stage in ("stage1", "stage2"):
        run(["--cfg-path", str(tmp_path / f"{stage}.yaml")])
    told = capsys.readouterr().out
    assert "Next: python SEED_Tokenizer/train.py" in told and "Next: --only tokenizer,codes" in told
    record = join_stages(place)
    tokenizer = Seed2Tokenizer.from_pretrained(place.tokenizer_folder)
    assert tokenizer.config == tokenizer_config(place.config) and tokenizer.config.vit.pre_norm
    for split in ("val", "pairs"):
        assert set(record[split]) == {"true", "codes", *(f"first {first}" for first in PREFIXES)}
        assert set(record[split]["codes"]) == {*CLASSES, "all"}
    assert 0 < record["codes_used"] <= record["codebook"] == 64 and record["held_out"] == 16
    codes = pool_codes(place)
    assert codes.dtype == torch.int16 and codes.shape == (48, 32)
    assert torch.equal(codes[5:9], encode_scenes(tokenizer, place.pool[5:9], 64, batch=3))
    sections = codes.long() // 2  # each place chooses from its own two codes
    assert torch.equal(sections, torch.arange(32).expand(48, -1))
