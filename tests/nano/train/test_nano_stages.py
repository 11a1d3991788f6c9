"""Nano's own stages on scenes: streams by step, the autoencoder's loss and latents, the tower's labels, the decoder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.vision.label_heads import LabelHeads
from seed_multimodal.weights import save_state_dict
from seed_nano.train.clip import Tower, load_label_heads, named_right, unit_scale
from seed_nano.train.config import NanoConfig, load_config
from seed_nano.train.pixels import scene_pixels, to_signed
from seed_nano.train.scenes import SceneStream, scene_batches
from seed_nano.train.unet import Decoder, build_unet
from seed_nano.train.vae import (
    build_vae,
    normalise_latents,
    reconstruction_loss,
    round_trip,
    things_psnr,
)
from seed_nano.world.scene import slots, thing_mask
from seed_nano.world.splits import scene_at
from seed_nano.world.targets import (
    ARRANGEMENTS,
    CLASSES,
    IGNORED,
    JUDGED,
    arranged_anchors,
    arrangement,
    label_ids,
    label_tensor,
    true_spots,
)

TEST = Path(__file__).resolve().parents[3] / "configs" / "nano" / "test.yaml"


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_a_step_s_scenes_are_the_same_alone_and_in_order(workers: int) -> None:
    stream = SceneStream(32, seed=3)
    with scene_batches(stream, 5, workers) as batches:
        following = [batches.at(step) for step in (0, 1, 2)]
    with scene_batches(stream, 5, 0) as batches:
        alone = batches.at(2)
    assert all(torch.equal(alone[name], following[2][name]) for name in alone)
    assert not torch.equal(following[0]["image"], following[1]["image"])
    assert torch.equal(alone["labels"], label_tensor([scene_at(3, number) for number in range(10, 15)]))
    assert alone["image"].shape == (5, 3, 32, 32) and alone["mask"].shape == (5, 1, 32, 32)


def test_labels_of_things_that_no_class_knows_are_left_out() -> None:
    scene = scene_at(0, 0, "things")
    assert label_ids(scene)["first"] == IGNORED != label_ids(scene, JUDGED)["first"]
    heads = LabelHeads(8, {name: len(found) for name, found in CLASSES.items()})
    x, labels = torch.randn(4, 8), label_tensor([scene_at(0, n, "val") for n in range(3)] + [scene])
    assert heads.loss(x, labels).isfinite() and not heads.right(x, labels)[3, 0]


def test_the_loss_weighs_things_and_sees_a_lost_colour_axis() -> None:
    target, mask = torch.zeros(1, 3, 16, 16), torch.zeros(1, 1, 16, 16)
    mask[..., :8, :] = 1
    there, elsewhere = target.clone(), target.clone()
    there[..., :8, :], elsewhere[..., 8:, :] = 0.5, 0.5
    assert reconstruction_loss(there, target, mask) > 2.5 * reconstruction_loss(elsewhere, target, mask)
    grey, green = torch.full_like(target, 0.1), target.clone()
    green[:, 1] = 0.3  # the same sum of errors
    assert reconstruction_loss(green, target, 0 * mask) > 1.2 * reconstruction_loss(grey, target, 0 * mask)
    assert reconstruction_loss(target, target, mask) == 0


def test_latents_are_normalised_without_changing_the_round_trip() -> None:
    torch.manual_seed(0)
    config = load_config(TEST)
    vae, images = build_vae(config).eval(), scene_pixels([scene_at(0, n) for n in range(16)], 64)
    before = round_trip(vae, images)
    normalise_latents(vae, to_signed(images))
    torch.testing.assert_close(round_trip(vae, images), before, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        moments = vae.encode(to_signed(images)).latent_dist.mean
    assert moments.shape == (16, 4, 16, 16)
    torch.testing.assert_close(moments.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(moments.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


def test_the_gate_looks_at_things() -> None:
    scenes = [scene_at(0, n, "val") for n in range(4)]
    images = scene_pixels(scenes, 64)
    masks = torch.stack([torch.from_numpy(thing_mask(scene)) for scene in scenes])[:, None] > 0.5
    wrong = torch.where(masks, -to_signed(images), to_signed(images))  # backgrounds perfect, things inverted
    found = things_psnr(wrong, images, scenes)
    assert found["psnr"] > found["psnr_things"] + 3 and things_psnr(to_signed(images), images, scenes)["psnr"] > 70


def test_scaling_the_tower_changes_no_reading(tmp_path: Path) -> None:
    torch.manual_seed(1)
    tower = Tower(load_config(TEST)).eval()
    scenes = [scene_at(0, n) for n in range(24)]
    images = scene_pixels(scenes, 64)
    with torch.no_grad():
        before = tower.vision(pixel_values=to_signed(images)).image_embeds
        read = tower.heads(before)["style"], tower.readout(before)
        unit_scale(tower, images)
        after = tower.vision(pixel_values=to_signed(images)).image_embeds
    torch.testing.assert_close(tower.heads(after)["style"], read[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tower.readout(after), read[1], atol=1e-4, rtol=1e-4)
    save_state_dict(tower.heads.state_dict(), tmp_path / "heads.safetensors")
    heads = load_label_heads(tmp_path / "heads.safetensors")
    assert named_right(heads, after, scenes) == named_right(tower.heads, after, scenes)


SOME = {"first": 5, "second": 6, "style": 2, "background": 3, "layout": 12}


def test_a_layout_s_tokens_stand_for_squares_of_latents(tmp_path: Path) -> None:
    layout = LayoutDecoder(6, 4, 16, 10, SOME, arranged_anchors(), width=16, coarse=8).eval()
    x = torch.randn(3, 6)
    assert layout.prompt_embeds(x).shape == (3, 64, 10) and layout.latents(x).shape == (3, 4, 16, 16)
    layout.save_pretrained(tmp_path)
    again = LayoutDecoder.from_pretrained(tmp_path)
    assert list(again.heads.classes) == list(SOME)
    torch.testing.assert_close(again.latents(x), layout.latents(x))


def test_things_are_placed_at_the_anchors_of_the_named_layout() -> None:
    layout = LayoutDecoder(12, 4, 16, 10, SOME, arranged_anchors(), width=16).eval()
    with torch.no_grad():  # the embedding is the layout's logits
        layout.heads.layers["layout"].weight.copy_(50 * torch.eye(12))
        shares = {name: logits.softmax(1) for name, logits in layout.heads(torch.eye(12)).items()}
        placed = layout._placed(torch.eye(12), shares, None).abs().sum(2) > 0  # [layouts, 2, 16, 16]
    for name, (first, second) in zip(ARRANGEMENTS, placed, strict=True):
        kinds = name.startswith(("left of", "above", "two"))
        assert first.any() and bool(second.any()) == kinds, name
    large, left, _, right, beside = (placed[ARRANGEMENTS.index(name)] for name in (
        "large", "left", "middle", "right", "left of"))
    assert large[0].sum() > 2 * left[0].sum()
    assert left[0, :, :8].any() and not left[0, :, 9:].any() and not right[0, :, :7].any()
    assert beside[0].equal(left[0]) and beside[1].equal(right[0])
    assert placed[ARRANGEMENTS.index("many 4"), 0].sum() > 2 * left[0].sum()


def test_anchors_are_where_scenes_have_their_things() -> None:
    for index in range(60):
        scene = scene_at(0, index)
        found = arranged_anchors()[ARRANGEMENTS.index(arrangement(scene))]
        for (kind, x, y, side), slot in zip(found, slots(scene), strict=True):
            assert scene.things[kind] == slot.thing and slot.side == pytest.approx(side, rel=0.08)
            assert (slot.x, slot.y) == pytest.approx((x, y), abs=0.016)


def test_things_are_placed_where_they_really_stand_if_that_is_told() -> None:
    scenes = [scene_at(0, index) for index in range(40)]
    spots = true_spots(scenes)
    layout = LayoutDecoder(6, 4, 16, 10, SOME, arranged_anchors(), width=16).eval()
    for scene, row in zip(scenes, spots, strict=True):
        found = [(scene.things[int(kind)], x, y, side) for kind, x, y, side in row.tolist() if kind >= 0]
        assert [name for name, *_ in found] == [slot.thing for slot in slots(scene)]
        assert found[0][1:] == pytest.approx((slots(scene)[0].x, slots(scene)[0].y, slots(scene)[0].side))
    x = torch.randn(1, 6).expand(len(scenes), 6)  # of one embedding, so only the spots differ
    told, untold = layout(x, spots)[0].flatten(1), layout(x)[0].flatten(1)
    alike = (spots.flatten(1)[:, None] == spots.flatten(1)).all(-1)
    assert torch.equal((told[:, None] - told).abs().amax(-1) < 1e-4, alike)  # but for rounding, which differs by row
    assert (untold - untold[0]).abs().max() < 1e-4
    assert not any(p.requires_grad for p in Decoder(torch.nn.Identity(), layout).layout.heads.parameters())


def test_some_things_are_named_less_surely_in_training() -> None:
    layout = LayoutDecoder(6, 4, 16, 10, SOME, arranged_anchors(), width=16).eval()
    x = 3 * torch.randn(200, 6)
    sure = layout._shares(x)
    unsure = layout.train()._shares(x)
    changed = (unsure["first"] != sure["first"]).any(1)
    assert 20 < changed.sum() < 90 and torch.equal(unsure["layout"], sure["layout"])
    assert (unsure["first"].amax(1) <= sure["first"].amax(1) + 1e-6).all()


def test_the_unet_attends_on_the_grid_of_the_tokens_only() -> None:
    unet = build_unet(NanoConfig(), 4, 16, 256)
    assert [type(block).__name__ for block in unet.down_blocks] == [
        "DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
