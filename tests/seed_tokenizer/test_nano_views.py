"""The nano speed run's part of the application: its batches, its schedule, its extra losses, its YAML files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.training.loop_settings import StageSettings
from seed_multimodal.training.nano.config import NanoConfig, load_config, save_config
from seed_multimodal.training.nano.tokenizer import tokenizer_config
from seed_multimodal.training.nano.tokenizer_recipe import write_recipes
from seed_multimodal.training.nano.views import to_clip
from seed_multimodal.training.nano.workspace import Workspace
from seed_multimodal.training.schedules import learning_rate

ROOT = Path(__file__).resolve().parents[2]
WORDS = ROOT / "pretrained" / "nano" / "seed_tokenizer"


def views(**more: Any) -> Any:
    from seed_lavis.nano_views import NanoViews

    pictures = torch.arange(6 * 3).view(6, 3, 1, 1, 1).expand(6, 3, 3, 4, 4).to(torch.uint8)
    embeddings = torch.arange(6 * 3, dtype=torch.float16).view(6, 3, 1).expand(6, 3, 5)
    captions = [[f"picture {i}, text {c}" for c in range(i + 1)] for i in range(6)]
    return NanoViews(pictures, embeddings, captions, [1, 3, 5], **more)


def seen(batch: dict[str, Any]) -> torch.Tensor:
    every = to_clip(torch.arange(18).view(18, 1, 1, 1).expand(18, 3, 4, 4).to(torch.uint8))
    return torch.tensor([int((every - image).abs().sum((1, 2, 3)).argmin()) for image in batch["image"]])


def test_choices_are_functions_of_seed_epoch_and_index() -> None:
    one, other = views(seed=3), views(seed=3)
    batches = [one.get_batch(np.array([0, 1, 2]), epoch) for epoch in range(12)]
    later = other.get_batch(np.array([2, 0]), 7)
    assert torch.equal(later["image"], batches[7]["image"][[2, 0]])
    assert later["caption"] == [batches[7]["caption"][2], batches[7]["caption"][0]]
    assert torch.equal(other.get(1, 4)["target"], batches[4]["target"][1])
    for batch in batches:
        assert torch.equal(seen(batch).float(), batch["target"][:, 0]) and batch["target"].dtype == torch.float32
        assert [text.split(",")[0] for text in batch["caption"]] == ["picture 1", "picture 3", "picture 5"]
    assert {int(place) for batch in batches for place in seen(batch)} == {3, 4, 5, 9, 10, 11, 15, 16, 17}
    assert len({text for batch in batches for text in batch["caption"]}) > 6
    assert any(not torch.equal(a["image"], views(seed=4).get_batch(np.arange(3), e)["image"])
               for e, a in enumerate(batches))


def test_canonical_target_is_the_picture_itself() -> None:
    canonical = views(canonical_target=True)
    for epoch in range(5):
        assert canonical.get_batch(np.arange(3), epoch)["target"][:, 0].tolist() == [3.0, 9.0, 15.0]


def test_cached_tower_output_goes_with_the_view() -> None:
    cached, plain = views(seed=3), views(seed=3)
    cached.cache_tower(lambda images: images.mean(3), torch.device("cpu"), batch=2)
    for epoch in range(4):
        batch = cached.get_batch(np.array([2, 0]), epoch)
        expected = plain.get_batch(np.array([2, 0]), epoch)["image"].mean(3)
        assert torch.allclose(batch["vit_features"], expected, atol=2e-3)


def test_a_work_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    from seed_lavis.nano_views import read_work

    save_config(load_config(ROOT / "configs" / "nano" / "test.yaml"), tmp_path / "config.yaml")
    with pytest.raises(DataError, match="holds no views.u8"):
        read_work(tmp_path, None)
    (tmp_path / "views.u8").write_bytes(b"few")
    (tmp_path / "embeddings.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="views.u8: is not"):
        read_work(tmp_path, None)


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
    config = load_config(ROOT / "configs" / "nano" / "test.yaml",
                         [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])
    return Workspace(config, None, folder, ROOT / "pretrained" / "nano")


def test_the_recipes_hold_the_run_s_sizes(tmp_path: Path) -> None:
    from seed_lavis.models import Blip2Casual, Blip2CodebookAllImage
    from seed_lavis.options import RunOptions, Stage1Options, Stage2Options

    from seed_multimodal.settings import read_settings
    from seed_multimodal.training.nano.clip import TEXT_FILE
    from seed_multimodal.vision.clip_towers import text_tower
    from seed_multimodal.weights import save_state_dict

    place = space(tmp_path, train_stage1__accumulate=3, clip__embedding=32)
    words = 2000
    save_config(place.config, tmp_path / "config.yaml")
    save_state_dict({"readout": torch.randn(7, 32)}, tmp_path / "readout.safetensors")
    sizes = place.config.clip
    tower = text_tower(words, width=sizes.text_width, layers=sizes.text_layers, embedding=sizes.embedding)
    save_state_dict(tower.state_dict(), tmp_path / TEXT_FILE)
    one, two = (OmegaConf.load(file) for file in write_recipes(place))
    first = Blip2Casual(read_settings(Stage1Options, one.model, "model"))
    second = Blip2CodebookAllImage(read_settings(Stage2Options, two.model, "model"))
    wanted = tokenizer_config(place.config)
    assert second.config == wanted and (first.config.vit, first.config.qformer) == (wanted.vit, wanted.qformer)
    run = read_settings(RunOptions, one.run, "run")
    assert (run.iters_per_epoch * run.max_epoch, run.accum_grad_iters, run.warmup_steps) == (12, 3, 6)

    torch.manual_seed(0)
    samples = {"image": torch.randn(4, 3, 64, 64), "caption": ["a red car", "a dog", "a blue hat", "two cats"],
               "target": torch.randn(4, 32)}
    told = {name: value.detach() for name, value in first(samples).items()}
    assert float(told["loss"]) == pytest.approx(0.2 * float(told["loss_itc"]) + 2.0 * float(told["loss_embedding"]),
                                                rel=1e-5)
    with pytest.raises(ConfigError, match="needs a target"):
        first({name: samples[name] for name in ("image", "caption")})
    told = {name: value.detach() for name, value in second.eval()(samples).items()}
    parts = sum(float(told[name]) for name in ("loss_embed", "loss_distil_image", "loss_readout"))
    assert float(told["loss"]) == pytest.approx(parts + 0.1 * float(told["loss_naming"]), rel=1e-5)
    second.zero_grad()  # what the naming term alone teaches:
    second.naming(second.decode_embeddings(second.quantize.lookup(second.codes)), samples).backward()
    assert float(second.distill_image_proj.weight.grad.abs().sum()) > 0
    assert not any("naming" in name for name in second.state_dict())


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
    model = Blip2Casual(read_settings(Stage1Options, one.model, "model"))
    assert not torch.equal(model.query_tokens, earlier.query_tokens)
    load_finetuned(model)
    assert all(torch.equal(value, earlier.state_dict()[name]) for name, value in model.state_dict().items())
