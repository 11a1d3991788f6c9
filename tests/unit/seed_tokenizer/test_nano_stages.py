"""nano's two stages of the LAVIS application: rendered templates, the loss of the label heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from seed_multimodal.images.transforms import normalise
from seed_multimodal.state_dicts import save_state_dict
from seed_multimodal.training.checkpoint import frozen_names
from seed_nano.train.pipeline import render
from seed_nano.train.task import scene_pixels
from seed_nano.train.tokenizer import tokenizer_config
from seed_nano.train.vision import HEADS_FILE, READOUT_FILE, ClipTask
from seed_nano.train.workspace import Workspace, load_settings
from seed_nano.world.splits import scene_at


def workspace(folder: Path, *changes: str) -> Workspace:
    return Workspace(load_settings("nano", "test", changes), folder, folder / "system")


def rendered(space: Workspace, name: str) -> Any:
    return OmegaConf.load(render(space, name, f"train_{name}"))


@pytest.mark.slow
def test_render_and_the_loss_of_the_label_heads(tmp_path):
    # nano's loss has a part that the originals have not; its heads are not saved.
    from seed_lavis import models, register
    from seed_lavis.compat import registry

    register()

    fp32 = ("train_stage1.precision=fp32", "train_stage2.precision=fp32")
    space = workspace(tmp_path, *fp32, "train_stage1.accumulate=3")
    task = ClipTask(space)  # not trained
    task.scenes.close()
    task.vision.save_pretrained(space.decoder_folder / "image_encoder")
    save_state_dict(task.heads.state_dict(), tmp_path / HEADS_FILE)
    save_state_dict({"readout": task.readout.weight}, tmp_path / READOUT_FILE)
    space.train_text_tokenizer()
    config1, config2 = (rendered(space, name) for name in ("stage1", "stage2"))
    assert (config1.run.iters_per_epoch, config1.run.accum_grad_iters) == (12, 3)
    first = models.Blip2Casual.from_config(config1.model)
    (tmp_path / "stage1").mkdir()
    weights = first.state_dict()
    trained = {name: weights[name] for name in weights if "visual_encoder" not in name}
    torch.save({"model": trained}, config2.model.pretrained)
    second = registry.get_model_class(config2.model.arch).from_config(config2.model)
    assert second.config == tokenizer_config(space.config)
    samples = {
        "image": normalise(scene_pixels([scene_at(0, n) for n in range(6)], 64)),
        "caption": ["a cat"] * 6,
    }
    out = {name: value.item() for name, value in second.eval()(samples).items()}
    parts = sum(out[name] for name in ("loss_embed", "loss_distil_image", "loss_readout"))
    assert out["loss"] == pytest.approx(parts + out["loss_labels"], rel=1e-5)
    saved = second.state_dict().keys() - set(frozen_names(second))
    assert not any("label_heads" in name or "readout" in name for name in saved)
