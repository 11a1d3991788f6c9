"""Stage `unet`: the unCLIP decoder of nano, a latent U-Net that stock `StableUnCLIPImg2ImgPipeline` runs.

v-prediction under a cosine schedule that ends at a signal share of `FINAL_SIGNAL`: sampling starts from the latents
that the embedding already determines (detokenizers/layout.py), so the U-Net only has to add what they leave open. A
tenth of the conditions are dropped for guidance. Once the tokenizer is trained, embeddings decoded from
(partly corrupted) codes are mixed in, because those are what the decoder meets in use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.detokenizers.layout import LayoutDecoder
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.schedules import batch_indices
from seed_multimodal.weights import load_state_dict
from seed_nano.train.clip import HEADS_FILE, READOUT_FILE, REDUCED, embeddings, load_label_heads
from seed_nano.train.config import NanoConfig
from seed_nano.train.group_norm import restore_group_norm, use_fast_group_norm
from seed_nano.train.task import NanoTask
from seed_nano.train.tokenizer import load_tokenizer, pool_codes
from seed_nano.train.vae import latents
from seed_nano.train.workspace import Workspace, read_part
from seed_nano.world.targets import arranged_anchors, true_spots

TRAIN_STEPS = 1000
FINAL_SIGNAL = 0.95  # the noise that sampling starts with is about twice the layout's error, so that it covers it
LAYOUT_SHARE = 3  # scenes that the layout learns from for each that the U-Net learns from: a scene costs it a quarter
CONDITIONS = (0.15, 0.6, 0.25)  # stage unet2: share of true embeddings, of those of codes, of those of corrupted codes
TOKENS = 8  # side of the grid of layout tokens; attention on the latents' own grid of 16 costs four times as much
# 2 to 12 steps and guidance 1 to 4 draw equally well by the judge (docs/LOG.md): sampling starts near the layout.
DECODE_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0}


def cosine_betas(steps: int = TRAIN_STEPS, final_signal: float = FINAL_SIGNAL) -> list[float]:
    """Betas whose cumulative signal share falls as cos² from 1 to `final_signal`."""
    last = math.acos(math.sqrt(final_signal))
    shares = [math.cos(last * (i / steps)) ** 2 for i in range(steps + 1)]
    return [1.0 - shares[i + 1] / shares[i] for i in range(steps)]


def build_unet(config: NanoConfig, latent_channels: int, grid: int, embedding: int) -> Any:
    """An untrained `UNet2DConditionModel` that attends on the grid of the layout's tokens and in the middle;
    in such blocks `attention_head_dim` is the number of heads."""
    from diffusers import UNet2DConditionModel

    sizes = config.unet
    attends = [grid // 2**level == TOKENS for level in range(len(sizes.channels))]
    return UNet2DConditionModel(
        sample_size=grid, in_channels=latent_channels, out_channels=latent_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attends)),
        block_out_channels=tuple(sizes.channels), layers_per_block=sizes.layers, norm_num_groups=8,
        cross_attention_dim=sizes.cross_dim, attention_head_dim=sizes.heads, use_linear_projection=True,
        class_embed_type="projection", projection_class_embeddings_input_dim=2 * embedding)


def build_normaliser(embeddings: Tensor) -> Any:
    """unCLIP's image normaliser with the mean and standard deviation of `embeddings [N, E]`."""
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    normaliser = StableUnCLIPImageNormalizer(embedding_dim=embeddings.shape[1])
    with torch.no_grad():
        normaliser.mean.copy_(embeddings.mean(0, keepdim=True))
        normaliser.std.copy_(embeddings.std(0, keepdim=True).clamp_min(1e-4))
    return normaliser


def class_labels(embedding: Tensor, level: Tensor, normaliser: Any, noising: Any) -> Tensor:
    """unCLIP's noised embedding and sinusoid of the level, `[B, 2E]`, as the pipeline makes them."""
    from diffusers.models.embeddings import get_timestep_embedding

    scaled = normaliser.scale(embedding)
    noised = normaliser.unscale(noising.add_noise(scaled, torch.randn_like(scaled), level))
    sinusoid = get_timestep_embedding(level, embedding.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([noised, sinusoid], 1)


class Decoder(nn.Module):
    """U-Net and layout decoder trained together."""

    def __init__(self, unet: nn.Module, layout: LayoutDecoder) -> None:
        super().__init__()
        self.unet, self.layout = unet, layout
        layout.heads.requires_grad_(False)  # what is named has to stay what the tower means


class UnetTask(NanoTask):
    """Stage `unet`: train on latents and embeddings of the pool; goes to `work/unet`."""

    sections = (*NanoTask.sections, "pool", "unet")

    def __init__(self, space: Workspace, name: str = "unet") -> None:
        from diffusers import DDIMScheduler, DDPMScheduler

        self.out = space.work / "unet"
        self.latents, self.embeddings = latents(space), embeddings(space)
        self.spots = true_spots(space.pool)
        torch.manual_seed(space.config.seed + 3)
        unet, layout = self.start(space)
        unet = use_fast_group_norm(unet).to(memory_format=torch.channels_last)
        if space.device.type == "cpu":
            _eager_attention(unet)
        self.decoder = Decoder(unet, layout).to(space.device)
        self.scheduler = DDIMScheduler(
            num_train_timesteps=TRAIN_STEPS, trained_betas=cosine_betas(), clip_sample=False,
            prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True)
        self.noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        self.normaliser = build_normaliser(self.embeddings.float()).to(space.device)
        super().__init__(space, name, self.decoder)

    def start(self, space: Workspace) -> tuple[Any, LayoutDecoder]:
        """U-Net and layout decoder that training begins with."""
        config, (channels, grid), width = space.config, self.latents.shape[1:3], self.embeddings.shape[-1]
        unet = build_unet(config, channels, grid, width)
        return unet, self.layout_of(space, width, channels, grid)

    def layout_of(self, space: Workspace, width: int, channels: int, grid: int) -> LayoutDecoder:
        """An untrained layout decoder whose heads and coarse picture are those of stage `clip`."""
        space.need("clip", space.work / HEADS_FILE, space.work / READOUT_FILE)
        heads, readout = load_label_heads(space.work / HEADS_FILE), load_state_dict(space.work / READOUT_FILE)
        patch = next(side for side in range(max(1, grid // TOKENS), 0, -1) if grid % side == 0)
        layout = LayoutDecoder(width, channels, grid, space.config.unet.cross_dim, heads.classes, arranged_anchors(),
                               coarse=REDUCED, patch=patch)
        layout.heads.load_state_dict(heads.state_dict())
        layout.coarse[0].load_state_dict({"weight": readout["readout"]})
        return layout

    def conditions(self, chosen: Tensor) -> Tensor:
        """Embeddings `[B, E]` that the U-Net is conditioned on, of some scenes of the pool."""
        return self.embeddings[chosen].float()

    def step_loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Mapping[str, Any]]:
        settings, device = self.settings, self.space.device
        count = settings.batch_size
        chosen = batch_indices(micro_step, LAYOUT_SHARE * count, len(self.latents), settings.seed)
        wanted, embedding = self.latents[chosen].float().to(device), self.conditions(chosen).to(device)
        mean, tokens = self.decoder.layout(embedding, self.spots[chosen].to(device))
        layout_error = F.mse_loss(mean.float(), wanted)
        x0, embedding, tokens = wanted[:count], embedding[:count], tokens[:count]
        level = torch.randint(0, 300, (count,), device=device) * (torch.rand(count, device=device) < 0.25)
        labels = class_labels(embedding, level, self.normaliser, self.noising)
        keep = (torch.rand(count, device=device) >= 0.1).float()
        noise, time = torch.randn_like(x0), torch.randint(0, TRAIN_STEPS, (count,), device=device)
        noisy = self.scheduler.add_noise(x0, noise, time)
        target = self.scheduler.get_velocity(x0, noise, time)
        output = self.decoder.unet(noisy, time, encoder_hidden_states=tokens * keep[:, None, None],
                                   class_labels=labels * keep[:, None])
        error = F.mse_loss(output.sample.float(), target)
        return error + layout_error, {"v": error.detach(), "layout": layout_error.detach()}

    def made(self) -> Sequence[Path]:
        return self.out / "unet" / "diffusion_pytorch_model.safetensors", self.out / "layout" / "model.safetensors"

    def finish(self, group: ProcessGroup) -> Mapping[str, Any]:
        restore_group_norm(self.decoder.unet)
        save_decoder(self.decoder.cpu(), self.scheduler, self.noising, self.normaliser.cpu(), self.out)
        return {**super().finish(group), "parameters": self.parameter_count()}


class UnetOfCodesTask(UnetTask):
    """Stage `unet2`: train further from `work/unet`, mostly with embeddings decoded from codes; goes to
    `decoder_folder`."""

    def __init__(self, space: Workspace) -> None:
        self.decoded = decoded_embeddings(space)
        super().__init__(space, "unet2")
        self.out = space.decoder_folder

    def start(self, space: Workspace) -> tuple[Any, LayoutDecoder]:
        from diffusers import UNet2DConditionModel

        space.need("unet", *(self.out / part / "config.json" for part in ("unet", "layout")))
        unet = read_part(UNet2DConditionModel, self.out / "unet")
        return unet, LayoutDecoder.from_pretrained(self.out / "layout")

    def conditions(self, chosen: Tensor) -> Tensor:
        kind = torch.multinomial(torch.tensor(CONDITIONS), len(chosen), replacement=True)
        decoded = self.decoded[(kind - 1).clamp_min(0), chosen].float()
        return torch.where(kind[:, None] > 0, decoded, super().conditions(chosen))


def _eager_attention(unet: Any) -> None:
    """Plain matrix-product attention while training: SDPA's backward in bf16 is slow on CPUs."""
    from diffusers.models.attention_processor import AttnProcessor

    unet.set_attn_processor(AttnProcessor())


def save_decoder(decoder: Decoder, scheduler: Any, noising: Any, normaliser: Any, out: Path) -> None:
    """Write the diffusers folders `unet`, `scheduler`, `image_noising_scheduler`, `image_normalizer` and `layout`."""
    decoder.unet.save_pretrained(out / "unet")  # type: ignore[operator]
    scheduler.save_pretrained(out / "scheduler")
    noising.save_pretrained(out / "image_noising_scheduler")
    normaliser.save_pretrained(out / "image_normalizer")
    decoder.layout.save_pretrained(out / "layout")
    (out / "seed_decode.json").write_text(json.dumps(DECODE_DEFAULTS))


def decoded_embeddings(space: Workspace) -> Tensor:
    """Embeddings float16 `[2, N, E]` of the pool's codes: as they are, and with up to 15 % of them those of another
    scene."""
    return space.cached("decoded", "tokenizer", lambda: _decode(space, pool_codes(space).long()))


@torch.no_grad()
def _decode(space: Workspace, codes: Tensor, corrupt: float = 0.15) -> Tensor:
    tokenizer = load_tokenizer(space)
    generator = torch.Generator().manual_seed(space.config.seed)
    share = corrupt * torch.rand(len(codes), 1, generator=generator)
    swap = torch.rand(codes.shape, generator=generator) < share
    others = codes[torch.randperm(len(codes), generator=generator)]  # a place has codes of its own
    swapped = torch.where(swap, others, codes)
    return torch.stack([tokenizer.decode(kind, batch_size=512).half().cpu() for kind in (codes, swapped)])
