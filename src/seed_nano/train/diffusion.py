"""nano's unCLIP decoder (stages `unet`, `unet2`), and the layout decoders of nano-x and nano-lavit
(stage `layout`).

v-prediction with a cosine schedule that ends at a signal share below one: sampling starts from the
layout decoder's expected latents given the embedding, so the U-Net only adds the remaining detail.
`unet2` mixes in embeddings decoded from (partly corrupted) codes, as at inference.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.diffusion.objectives import NoisyLatents, build_objective
from seed_multimodal.disk import read_json_object
from seed_multimodal.state_dicts import load_state_dict
from seed_nano.layout import LAYOUT, LayoutConfig, LayoutDecoder
from seed_nano.train.lavit import load_reader, rebuilt_features
from seed_nano.train.task import Loss, NanoTask
from seed_nano.train.tokenizer import encode_scenes, load_tokenizer
from seed_nano.train.vae import latents
from seed_nano.train.vision import LABELS, READOUT_FILE, REDUCED, pool_features, trained_label_heads
from seed_nano.train.workspace import LavitWorkspace, SuccessorWorkspace, Workspace, XWorkspace
from seed_nano.world.scene import Scene, anchors
from seed_nano.world.targets import arrangement_anchors, scene_anchors

TRAIN_STEPS = 1000
# the initial noise is about twice the layout's error
FINAL_SIGNAL = 0.95
SUCCESSORS_SIGNAL = 0.98
LAYOUT_SHARE = 3  # layout decoder's batch relative to the U-Net's; it costs a quarter per scene
# Of unet2: shares of true embeddings, from codes, from corrupted codes.
CONDITIONS = (0.15, 0.6, 0.25)
CORRUPTED = 0.15  # maximum share of corrupted codes of an image
# Side of the grid of layout tokens; attention on the latents' own grid of 16 costs four times more.
TOKENS = 8
# One step scores as 3 (docs/experiments/few-steps.md), guidance 1 as 4: sampling starts near the
# layout.
DECODE_DEFAULTS = {"num_inference_steps": 1, "guidance_scale": 1.0}
NOISE = 0.35  # maximum noise on nano-x's unit-variance features, to imitate errors of the LLM
ITSELF = 0.15  # share of samples conditioned on the target image
KEEPS = 32  # width of the gate for unchanged regions


def new_unet(channels: Sequence[int], attends: Sequence[bool], **sizes: Any) -> Any:
    """An untrained `UNet2DConditionModel` with attention on some levels and in the middle."""
    from diffusers import UNet2DConditionModel

    kinds = ["CrossAttn" if level else "" for level in attends]
    return UNet2DConditionModel(
        down_block_types=tuple(f"{kind}DownBlock2D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        block_out_channels=tuple(channels),
        norm_num_groups=8,
        use_linear_projection=True,
        **sizes,
    )


def new_scheduler(final_signal: float) -> Any:
    """The scheduler of training and sampling; its cumulative signal share falls as cos² from 1 to
    `final_signal`."""
    from diffusers import DDIMScheduler

    last = math.acos(math.sqrt(final_signal))
    shares = [math.cos(last * (i / TRAIN_STEPS)) ** 2 for i in range(TRAIN_STEPS + 1)]
    betas = [1.0 - after / before for before, after in pairwise(shares)]
    return DDIMScheduler(
        num_train_timesteps=TRAIN_STEPS,
        trained_betas=betas,
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def write_successor_unet(space: SuccessorWorkspace, context: int, pooled: int, seed: int) -> None:
    """An untrained U-Net of SDXL's kind (`context`, `pooled`: widths of the prompt's embeddings),
    the scheduler, decoding defaults and nano's autoencoder, to `{decoder}`."""
    vae: Any = read_json_object(space.autoencoder / "config.json")
    sizes = space.config.unet
    folder = space.decoder_folder
    latent = vae["latent_channels"]
    levels = len(sizes.channels)
    torch.manual_seed(seed)
    # Attention at the second level only, or everywhere if there is only one.
    attends = [level == 1 or levels == 1 for level in range(levels)]
    new_unet(
        sizes.channels,
        attends,
        sample_size=space.config.image_size // 2 ** (len(vae["block_out_channels"]) - 1),
        in_channels=latent,
        out_channels=latent,
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=sizes.heads,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + pooled,
    ).save_pretrained(folder / "unet")
    new_scheduler(SUCCESSORS_SIGNAL).save_pretrained(folder / "scheduler")
    image_guidance = {"image_guidance_scale": 1.0} if space.system == "nano_x" else {}
    (folder / "seed_decode.json").write_text(json.dumps({**DECODE_DEFAULTS, **image_guidance}))
    shutil.copytree(space.autoencoder, folder / "vae", dirs_exist_ok=True)


class UnetTask(NanoTask):
    """Stage `unet`: train on latents and embeddings of the pool; goes to `{work}/unet`."""

    def __init__(self, space: Workspace, name: str = "unet") -> None:
        from diffusers import DDPMScheduler
        from diffusers.models.attention_processor import AttnProcessor
        from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
            StableUnCLIPImageNormalizer,
        )

        self.out = space.work / "unet"
        self.latents = latents(space)
        self.embeddings = pool_features(space)
        self.spots = scene_anchors(space.pool)
        torch.manual_seed(space.config.seed + 3)
        self.unet, self.layout = self.start(space)
        if space.device.type == "cpu":  # the fused bf16 kernel's backward is slow there
            self.unet.set_attn_processor(AttnProcessor())
        self.layout.heads.requires_grad_(False)  # labels keep the vision encoder's meaning
        self.scheduler = new_scheduler(FINAL_SIGNAL)
        self.objective = build_objective(self.scheduler)
        self.noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        embeddings = self.embeddings.float()
        self.normaliser = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1])
        self.normaliser.mean.data = embeddings.mean(0, keepdim=True)
        self.normaliser.std.data = embeddings.std(0, keepdim=True).clamp_min(1e-4)
        self.normaliser.to(space.device)
        super().__init__(space, name, nn.ModuleDict({"unet": self.unet, "layout": self.layout}))

    def start(self, space: Workspace) -> tuple[Any, LayoutDecoder]:
        """Untrained U-Net, and layout decoder whose heads and coarse image are those of stage
        `clip`."""
        sizes = space.config.unet
        (channels, grid) = self.latents.shape[1:3]
        width = self.embeddings.shape[-1]
        unet = new_unet(
            sizes.channels,
            [grid // 2**level == TOKENS for level in range(len(sizes.channels))],
            sample_size=grid,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=sizes.layers,
            cross_attention_dim=sizes.cross_dim,
            attention_head_dim=sizes.heads,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * width,
        )
        heads = trained_label_heads(space)
        readout = load_state_dict(space.work / READOUT_FILE)
        # Latents of a layout token: the largest square that divides the grid.
        patch = next(side for side in range(max(1, grid // TOKENS), 0, -1) if grid % side == 0)
        config = LayoutConfig(
            width,
            channels,
            grid,
            sizes.cross_dim,
            heads.classes,
            arrangement_anchors(),
            coarse=REDUCED,
            patch=patch,
        )
        layout = LayoutDecoder(config)
        # The heads and the coarse image are known from stage `clip`.
        layout.heads.load_state_dict(heads.state_dict())
        layout.coarse[0].load_state_dict({"weight": readout["readout"]})
        return unet, layout

    def conditions(self, chosen: Tensor) -> Tensor:
        """Embeddings `[B, E]` that the U-Net is conditioned on, of some scenes of the pool."""
        return self.embeddings[chosen].float()

    def class_labels(self, embedding: Tensor, level: Tensor) -> Tensor:
        """unCLIP's noised embedding and sinusoid of the level, `[B, 2E]`, as the pipeline makes
        them."""
        from diffusers.models.embeddings import get_timestep_embedding

        scaled = self.normaliser.scale(embedding)
        noised = self.noising.add_noise(scaled, torch.randn_like(scaled), level)
        sinusoid = get_timestep_embedding(
            level, embedding.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0
        )
        return torch.cat([self.normaliser.unscale(noised), sinusoid], 1)

    def batch(self, micro_step: int) -> Tensor:
        count = LAYOUT_SHARE * self.settings.batch_size
        return self.indices(micro_step, len(self.latents), count)

    def loss(self, model: nn.Module, chosen: Tensor) -> Loss:
        device = self.space.device
        count = self.settings.batch_size
        wanted = self.latents[chosen].float().to(device)
        embedding = self.conditions(chosen).to(device)
        # 1. The layout decoder predicts the latents of the whole batch.
        mean, tokens = self.layout(embedding, self.spots[chosen].to(device))
        layout_error = F.mse_loss(mean.float(), wanted)
        # 2. A quarter of the embeddings is noised, a tenth of the conditions dropped.
        level = torch.randint(0, 300, (count,), device=device)
        level = level * (torch.rand(count, device=device) < 0.25)
        labels = self.class_labels(embedding[:count], level)
        keep = (torch.rand(count, device=device) >= 0.1).float()
        noised = NoisyLatents.sample(self.objective, wanted[:count])
        output = self.unet(
            noised.latents,
            noised.steps,
            encoder_hidden_states=tokens[:count] * keep[:, None, None],
            class_labels=labels * keep[:, None],
        )
        error = noised.losses(output.sample)["total_loss"]
        return error + layout_error, {"v": error.detach(), "layout": layout_error.detach()}

    def save_result(self) -> None:
        self.module.cpu()
        parts = {
            "unet": self.unet,
            "scheduler": self.scheduler,
            "layout": self.layout,
            "image_noising_scheduler": self.noising,
            "image_normalizer": self.normaliser.cpu(),
        }
        for folder, part in parts.items():
            part.save_pretrained(self.out / folder)
        (self.out / "seed_decode.json").write_text(json.dumps(DECODE_DEFAULTS))


class UnetOfCodesTask(UnetTask):
    """Stage `unet2`: train further, mostly with embeddings decoded from codes; goes to
    `{decoder}`."""

    def __init__(self, space: Workspace) -> None:
        self.decoded = space.cached("decoded", "tokenizer", lambda: self.decode_codes(space))
        super().__init__(space, "unet2")
        self.out = space.decoder_folder

    @torch.no_grad()
    def decode_codes(self, space: Workspace) -> Tensor:
        """Embeddings float16 `[2, N, E]` of the pool's codes: as they are, and with up to 15 % of
        them replaced by those of another scene at the same position."""
        tokenizer = load_tokenizer(space)
        codes = encode_scenes(space, space.pool).long()
        generator = torch.Generator().manual_seed(space.config.seed)
        share = CORRUPTED * torch.rand(len(codes), 1, generator=generator)
        swap = torch.rand(codes.shape, generator=generator) < share
        swapped = torch.where(swap, codes[torch.randperm(len(codes), generator=generator)], codes)
        # Decoded in batches, each kind on its own.
        kinds = []
        for kind in (codes, swapped):
            batches = [tokenizer.decode(batch).half().cpu() for batch in kind.split(512)]
            kinds.append(torch.cat(batches))
        return torch.stack(kinds)

    def start(self, space: Workspace) -> tuple[Any, LayoutDecoder]:
        from diffusers import UNet2DConditionModel

        unet: Any = UNet2DConditionModel.from_pretrained(self.out / "unet", local_files_only=True)
        unet.register_to_config(_name_or_path="")  # else this machine's path is saved
        return unet, LayoutDecoder.from_pretrained(self.out / "layout").requires_grad_(True)

    def conditions(self, chosen: Tensor) -> Tensor:
        kind = torch.multinomial(torch.tensor(CONDITIONS), len(chosen), replacement=True)
        decoded = self.decoded[(kind - 1).clamp_min(0), chosen].float()
        return torch.where(kind[:, None] > 0, decoded, super().conditions(chosen))


class LayoutTask(NanoTask):
    """Train a layout decoder (expected latents of an image), saved to `folder`. Parts in `frozen`
    keep their weights."""

    latents: Tensor

    def __init__(
        self,
        space: Workspace,
        folder: Path,
        features: Tensor,
        frozen: Mapping[str, nn.Module],
        **sizes: Any,
    ) -> None:
        self.spots = scene_anchors(space.pool[: len(features)])
        self.folder = folder / LAYOUT
        self.features = features.flatten(1)
        config = LayoutConfig(
            self.features.shape[1],
            self.latents.shape[1],
            self.latents.shape[2],
            0,
            LABELS,
            arrangement_anchors(),
            patch=1,
            **asdict(space.config.layout),
            **sizes,
        )
        self.layout = LayoutDecoder(config)
        # Parts that an earlier stage trained keep their weights.
        for name, part in frozen.items():
            submodule = getattr(self.layout, name)
            submodule.load_state_dict(part.state_dict())
            submodule.requires_grad_(False)
        super().__init__(space, "layout", self.layout)

    def save_result(self) -> None:
        self.layout.cpu().save_pretrained(self.folder)


class XLayoutTask(LayoutTask):
    """nano-x's: from the vision encoder's features and, for edits, the latents of the image
    before."""

    def __init__(self, space: XWorkspace) -> None:
        self.latents = latents(space)
        features = pool_features(space)
        self.kept = edit_anchors(space.edits)
        torch.manual_seed(space.config.seed + 3)
        heads = {"heads": trained_label_heads(space)}
        super().__init__(space, space.out / "detokenizer", features, heads, keeps=KEEPS)

    def loss(self, model: nn.Module, rows: Tensor) -> Loss:
        """Half of the samples unconditional, half conditioned on the image before the edit."""
        device = self.space.device
        count = len(rows)
        after = rows[: count // 2] | 1  # an edit's result has the odd number
        before = torch.where(torch.rand(len(after)) < ITSELF, after, after - 1)
        rows = torch.cat([after, rows[len(after) :]])
        spots = torch.cat([self.kept[after // 2], self.spots[rows[len(after) :]]])
        features = self.features[rows].float()
        features = features + NOISE * torch.rand(count, 1) * torch.randn_like(features)
        # The image before, for the first half only.
        condition = torch.zeros(count, *self.latents.shape[1:])
        condition[: len(after)] = self.latents[before].float()
        wanted = self.latents[rows].float().to(device)
        mean = model(features.to(device), spots.to(device), condition.to(device))[0]
        errors = F.mse_loss(mean.float(), wanted, reduction="none").flatten(1).mean(1)
        edits = errors[: len(after)].mean()
        alone = errors[len(after) :].mean()
        return edits + alone, {"edits": edits.detach(), "alone": alone.detach()}


class LavitLayoutTask(LayoutTask):
    """nano-lavit's: from features decoded from codes."""

    def __init__(self, space: LavitWorkspace) -> None:
        self.latents = latents(space)
        features = rebuilt_features(space)
        torch.manual_seed(space.config.seed + 4)
        frozen = dict(load_reader(space).named_children())
        reading = (features.shape[2], *space.config.tokenizer.reading)
        super().__init__(space, space.decoder_folder, features, frozen, reading=reading)

    def loss(self, model: nn.Module, rows: Tensor) -> Loss:
        device = self.space.device
        mean = model(self.features[rows].to(device).float(), self.spots[rows].to(device))[0]
        error = F.mse_loss(mean.float(), self.latents[rows].to(device).float())
        return error, {"error": error.detach()}


def edit_anchors(edits: Sequence[tuple[Scene, Scene]]) -> Tensor:
    """`scene_anchors` of the images after an edit, `[N, K, 4]`, with unchanged things at their
    anchors, since the condition image shows their positions."""
    spots = scene_anchors([after for _, after in edits])
    for row, (before, after) in enumerate(edits):
        if before.style == after.style:
            # Slots without jitter, by thing; those of both images keep their anchor.
            unchanged = set(_named_anchors(before))
            for index, anchor in enumerate(_named_anchors(after)):
                if anchor in unchanged:
                    kind = after.things.index(anchor[0])
                    spots[row, index] = torch.tensor([kind, *anchor[1:]])
    return spots


def _named_anchors(scene: Scene) -> list[tuple[str, float, float, float]]:
    """`anchors` with the names of things."""
    rows = anchors(scene.layout, scene.counts)
    return [(scene.things[kind], x, y, side) for kind, x, y, side in rows]
