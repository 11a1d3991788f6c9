"""Stages `reader`, `tokenizer` and `narrow` of nano-lavit: token selector, token merger, codebook
and decoder, on cached features.

As the published stage 1, first without codes. Differences: a loss matches a linear classifier's
(the reader's) outputs on decoded and original features, because the feature cosine hardly
distinguishes things; the codebook is smaller, with restarts of dead codes. Codes train best with
more tokens than needed; `narrow` continues with fewer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from seed_multimodal.images.transforms import normalise
from seed_multimodal.models.lavit.checkpoints import load_dynamic_tokenizer
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.recipes.lavit.losses import FLIP_EVERY, LavitLossWeights, LavitStage1
from seed_multimodal.recipes.lavit.train_tokenizer import LavitTokenizerTask
from seed_multimodal.state_dicts import assign_strictly, load_state_dict, save_state_dict
from seed_multimodal.training.codebook import CodebookHealth
from seed_nano.labels import LabelHeads, label_divergence
from seed_nano.layout import reading_layers
from seed_nano.train.task import Loss, NanoTask, map_scenes
from seed_nano.train.vision import LABELS, label_loss, labels_right
from seed_nano.train.workspace import LavitWorkspace
from seed_nano.world.scene import empty_images
from seed_nano.world.targets import label_tensor

PREFIX = "visual_encoder."  # of the vision encoder's weights in nano's tokenizer
READER_FILE = "reader.safetensors"
READ_WEIGHT = 0.3  # of the reader's loss
EMPTY = 0.05  # added share of empty scenes, which need few tokens
WITHOUT_CODES = 0.15  # share of the steps


def tokenizer_sizes(space: LavitWorkspace) -> LavitTokenizerConfig:
    """Of the dynamic tokenizer."""
    sizes = space.config.tokenizer
    return LavitTokenizerConfig(
        space.encoder_sizes,
        vit_head=0,
        merger_depth=sizes.merger_depth,
        merger_heads=sizes.heads,
        merger_mlp_width=sizes.merger_mlp,
        codebook_size=sizes.codes,
        codebook_dim=sizes.code_dim,
        llm_width=space.config.llm.width,
    )


def decoder_sizes(space: LavitWorkspace) -> LavitDecoderConfig:
    """Of the decoder of codes."""
    sizes = space.config.tokenizer
    unet = space.config.unet
    vit = space.encoder_sizes
    return LavitDecoderConfig(
        tokens=vit.grid**2,
        code_dim=sizes.code_dim,
        width=vit.width,
        depth=sizes.decoder_depth,
        heads=sizes.heads,
        mlp_width=sizes.decoder_mlp,
        feature_dim=vit.width,
        prompt_dim=unet.prompt,
        pooled_dim=unet.pooled,
    )


def new_tokenizer(space: LavitWorkspace) -> DynamicTokenizer:
    """An untrained tokenizer with nano's vision encoder, on the device."""
    torch.manual_seed(space.config.seed + 1)
    tokenizer = DynamicTokenizer(tokenizer_sizes(space))
    weights = load_state_dict(space.nano / "model.safetensors")
    encoder = {}
    for name, value in weights.items():
        if name.startswith(PREFIX):
            encoder[name.removeprefix(PREFIX)] = value.float()
    tokenizer.encoder.load_state_dict(encoder)
    return tokenizer.to(space.device)


def pool_features(space: LavitWorkspace) -> Tensor:
    """Features of the pool, float16 `[P, N, D]`; computed once."""

    def make() -> Tensor:
        see = new_tokenizer(space).eval().patch_features
        return map_scenes(
            lambda images: see(normalise(images)).half(), space.pool, space, batch=512
        )

    return space.cached("features", "start", make)


class Reader(nn.Module):
    """Features `[B, N, D]` → `[B, N · n]`, which its heads read: one small network for all
    patches."""

    def __init__(self, space: LavitWorkspace) -> None:
        super().__init__()
        vit = space.encoder_sizes
        sizes = (vit.width, *space.config.tokenizer.reading)
        self.reading = reading_layers(sizes)
        self.heads = LabelHeads(vit.grid**2 * sizes[-1], LABELS)

    def forward(self, features_BND: Tensor) -> Tensor:
        return self.reading(features_BND.float()).flatten(1)


def load_reader(space: LavitWorkspace) -> Reader:
    """The trained one, frozen, on the device."""
    reader = Reader(space)
    file = space.work / READER_FILE
    assign_strictly(reader, load_state_dict(file), file)
    return reader.to(space.device).requires_grad_(False).eval()


class ReaderTask(NanoTask):
    """Goes to `{work}/reader.safetensors`."""

    def __init__(self, space: LavitWorkspace) -> None:
        self.features = pool_features(space)
        self.labels = label_tensor(space.pool)
        torch.manual_seed(space.config.seed + 2)
        self.reader = Reader(space)
        super().__init__(space, "reader", self.reader)

    def loss(self, model: nn.Module, rows: Tensor) -> Loss:
        device = self.space.device
        labels = self.labels[rows].to(device)
        logits = self.reader.heads(model(self.features[rows].to(device)))
        right = labels_right(logits, labels).float()
        metrics = {"first": right[:, 0].mean(), "all": right.amin(1).mean()}
        return label_loss(logits, labels), metrics

    def save_result(self) -> None:
        save_state_dict(self.reader.state_dict(), self.space.work / READER_FILE)


class ReadStage1(LavitStage1):
    """With the reader's distance between rebuilt features and the encoder's in the loss.

    Attributes:
        readable_B: images with a reader's loss; excludes empty scenes, which the reader was not
            trained on.
    """

    reader: Sequence[Reader]  # in a sequence, so that it is not a submodule
    readable_B = torch.ones(1, dtype=torch.bool)

    def other_errors(self, features_BND: Tensor, rebuilt_BND: Tensor) -> Tensor:
        """See the base; without gradients a decision is tried on every `FLIP_EVERY`-th image."""
        reader = self.reader[0]
        misread_B = label_divergence(reader.heads, reader(rebuilt_BND), reader(features_BND))
        if self.training:
            every = 1 if torch.is_grad_enabled() else FLIP_EVERY
            misread_B = misread_B * self.readable_B[::every]
        return READ_WEIGHT * misread_B


class TokenizerTask(NanoTask, LavitTokenizerTask):
    """Stage `tokenizer`, from random weights; `narrow` starts from its checkpoint."""

    model: ReadStage1

    def __init__(self, space: LavitWorkspace, name: str = "tokenizer") -> None:
        self.pool = pool_features(space)
        config = space.config
        settings = getattr(config, f"train_{name}")
        health = CodebookHealth(restart_every=max(1, settings.max_steps // 80))
        keep = config.tokenizer.keep
        if name == "tokenizer":
            # The first stage begins without codes, which then start from k-means of the features.
            health.codebook_warmup = int(WITHOUT_CODES * settings.max_steps)
            health.kmeans_start = True
            health.kmeans_images = 1024
            keep = config.tokenizer.first_keep
        tokenizer = new_tokenizer(space)
        torch.manual_seed(config.seed + 3)
        reader = load_reader(space)
        decoder = CodeDecoder(decoder_sizes(space)).to(space.device)
        weights = LavitLossWeights(keep, config.tokenizer.ratio)
        model = ReadStage1(tokenizer, decoder, weights=weights)
        model.reader = (reader,)
        model.init_keep_share()
        # Features of the empty scenes, which `batch` mixes in.
        empty_pixels = torch.from_numpy(empty_images(config.image_size)).permute(0, 3, 1, 2)
        self.empty = tokenizer.patch_features(normalise(empty_pixels.to(space.device))).half().cpu()
        LavitTokenizerTask.__init__(self, name, model, settings, self.batch, health)
        self.enter(space)

    def batch(self, micro_step: int) -> tuple[Tensor, Tensor]:
        """Features of scenes of the pool and of empty ones, `[B, N, D]`; which are of the pool."""
        n_pool = len(self.pool)
        rows = self.indices(micro_step, n_pool + round(EMPTY * n_pool))
        # Rows beyond the pool are empty scenes.
        readable_B = rows < n_pool
        features = torch.where(
            readable_B[:, None, None],
            self.pool[rows.clamp(max=n_pool - 1)],
            self.empty[rows % len(self.empty)],
        )
        return features.to(self.space.device).float(), readable_B.to(self.space.device)

    def codebook_points(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().codebook_points(batch[0])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        features, self.model.readable_B = batch
        return super().loss(model, features)

    def save_result(self) -> None:
        """Nothing: `narrow` starts from the checkpoint."""


class NarrowTask(TokenizerTask):
    """Stage `narrow`, with fewer tokens; the tokenizer goes to `{out}/tokenizer`, the decoder to
    `{out}/decoder`."""

    def __init__(self, space: LavitWorkspace) -> None:
        super().__init__(space, "narrow")
        start = self.settings.start or str(space.work / "tokenizer.checkpoints")
        self.settings = replace(self.settings, start=start)

    def save_result(self) -> None:
        tokenizer, decoder = (part.cpu() for part in self.model.trained_networks())
        tokenizer.save_pretrained(self.space.out / "tokenizer")
        decoder.save_pretrained(self.space.out / "decoder")


def rebuilt_features(space: LavitWorkspace) -> Tensor:
    """Features decoded from the codes of the first `drawn` scenes of the pool, float16 `[d, N,
    D]`."""

    @torch.no_grad()
    def make() -> Tensor:
        tokenizer = load_dynamic_tokenizer(space.out / "tokenizer").to(space.device)
        decoder = CodeDecoder.from_pretrained(space.out / "decoder").to(space.device)
        parts = []
        for part in pool_features(space)[: space.config.drawn].split(1024):
            features_BND = part.to(space.device).float()
            # Select patches as in use, with a fixed seed; then merge, quantize and decode them.
            generator = torch.Generator().manual_seed(0)
            keep_BN = tokenizer.select(features_BND, generator=generator).keep_BN
            kept_BN = keep_BN > 0.5
            rows_TD = tokenizer.merge(features_BND, keep_BN)[kept_BN]
            codes = tokenizer.quantize_rows(rows_TD)[1].split(kept_BN.sum(1).tolist())
            parts.append(decoder.features(list(codes)).half().cpu())
        return torch.cat(parts)

    return space.cached("rebuilt", "narrow", make, drawn=space.config.drawn)
