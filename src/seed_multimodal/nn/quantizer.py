"""Quantizers: each query becomes the nearest of K codes, learned (`VectorQuantizer`) or fixed.

Defaults as in the original: squared Euclidean distance in fp32, straight-through gradients, loss
weights 1 (commitment) and 0.25 (codebook).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError

CODEBOOK_WEIGHT = 0.25  # of the codebook term in the loss
ENTROPY_WEIGHT = 0.1  # of the entropy of bits in the loss
MAX_DISTANCES = 2**28  # computed at once, 1 GB

QuantizerKind = Literal["vq", "fsq", "lfq"]


class VectorQuantizer(nn.Module):
    """`embedding` `[K, d]` holds the codes.

    normalize: compare and decode codes on the unit sphere.
    unit_rows: the stored rows are on the unit sphere; only features are normalised (LaVIT).
    ema_decay: codes follow a moving average of their features instead of the gradient.
    sections: position q chooses among rows `[q · K/sections, (q + 1) · K/sections)` only.

    In training, `forward` collects what it has quantized. Codes change between steps only, by
    `update`, `restart` and `init_from`, which all processes call together.
    """

    is_fixed = False  # whether the codes are not learned
    ema_count: Tensor
    ema_sum: Tensor
    features: Tensor  # of the last training batch, `[..., d]`

    def __init__(
        self,
        size: int,
        dim: int,
        *,
        normalize: bool = False,
        ema_decay: float | None = None,
        sections: int = 1,
        unit_rows: bool = False,
    ) -> None:
        super().__init__()
        if size % sections:
            raise ConfigError(
                f"A codebook of {size} codes cannot be divided into {sections} equal sections."
            )
        self.size = size
        self.dim = dim
        self.normalize = normalize
        self.unit_rows = unit_rows
        self.ema_decay: float | None = None
        self.sections = sections

        # The codes start small, as in the original, or as unit vectors.
        self.embedding = nn.Embedding(size, dim)
        if unit_rows:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        else:
            nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

        if ema_decay is not None:
            self.start_averages(ema_decay)

        # Uses of each code since the last `update`, and the sum of its features: `[K, 1 + d]`.
        self.collected: Tensor | None = None

    def start_averages(self, decay: float) -> None:
        """Codes follow a moving average of their features instead of the gradient."""
        rows = self.embedding.weight.requires_grad_(False)
        self.ema_decay = decay
        # Moving averages of the number and of the sum of each code's features.
        self.register_buffer("ema_count", torch.zeros_like(rows[:, 0]))
        self.register_buffer("ema_sum", torch.zeros_like(rows))

    def prepare(self, z: Tensor) -> Tensor:
        """Features `[..., d]`, normalized for comparison."""
        if self.normalize or self.unit_rows:
            return F.normalize(z, dim=-1)
        return z

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook rows as decoded: `[...]` int64 → `[..., d]`."""
        rows = self.embedding(codes)
        return F.normalize(rows, dim=-1) if self.normalize else rows

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code, the first one of a tie.

        `[..., d]` (`[..., sections, d]`) → `[...]` int64.
        """
        with torch.autocast(z.device.type, enabled=False):
            # 1. P points and K/S codes of each of the S sections.
            points = self._by_section(z).transpose(0, 1)  # [S, P, d]
            rows = self.embedding.weight.float()
            if self.normalize:
                rows = F.normalize(rows, dim=-1)
            codes = rows.unflatten(0, (self.sections, -1))  # [S, K/S, d]
            norms = codes.square().sum(2)[:, None]  # [S, 1, K/S]

            # 2. |p - c|² = |p|² - 2 p·c + |c|²; |p|² is the same for all codes of a point and left
            #    out.
            matches = []
            batch_size = max(1, MAX_DISTANCES // self.size)
            for batch in points.split(batch_size, dim=1):
                products = torch.bmm(batch, codes.transpose(1, 2))  # [S, P', K/S]
                distances = norms - 2 * products
                matches.append(distances.argmin(dim=2))

            # 3. Indices in the codebook.
            section_size = self.size // self.sections
            first_code = section_size * torch.arange(self.sections, device=z.device)
            indices = torch.cat(matches, dim=1) + first_code[:, None]  # [S, P]
            return indices.T.reshape(z.shape[:-1])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features `[B, Q, d]` → codes `[B, Q, d]`, loss `[]`, indices `[B, Q]` int64.

        The codes have the features' gradient (straight through).
        """
        indices = self.nearest(z)
        features = self.prepare(z)
        rows = self.lookup(indices)

        # Activation checkpointing repeats `forward` in the backward pass.
        in_backward = torch._C._current_graph_task_id() != -1
        if self.training and not in_backward:
            self.features = z.detach()
            points = F.pad(features.detach().float(), (1, 0), value=1.0).flatten(0, -2)
            if self.collected is None:
                self.collected = points.new_zeros(self.size, 1 + self.dim)
            self.collected.index_add_(0, indices.flatten(), points)

        straight_through = features + (rows - features).detach()
        return straight_through, self.loss(features, rows), indices

    def loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """Loss of prepared features and their codes, both `[B, Q, d]`.

        Commitment draws features to codes; the codebook term, or the average, codes to features.
        """
        loss = F.mse_loss(features, rows.detach())
        if self.ema_decay is None:
            loss = loss + CODEBOOK_WEIGHT * F.mse_loss(rows, features.detach())
        return loss

    @torch.no_grad()
    def update(self) -> Tensor:
        """End a step: returns how often all processes have used each code in it, int64 `[K]`.

        A codebook with moving averages takes over the means of its features.
        """
        if self.collected is None:
            return torch.zeros_like(self.embedding.weight[:, 0], dtype=torch.long)
        collected = self.collected
        self.collected = None
        if dist.is_initialized():
            dist.all_reduce(collected)
        count, total = collected[:, 0], collected[:, 1:]

        if self.ema_decay is not None:
            self.ema_count.lerp_(count, 1 - self.ema_decay)
            self.ema_sum.lerp_(total, 1 - self.ema_decay)
            means = self.ema_sum / self.ema_count.clamp_min(1e-3)[:, None]
            if self.unit_rows:
                means = F.normalize(means, dim=-1)
            # A code that no feature has used stays.
            rows = self.embedding.weight
            is_used = (self.ema_count > 1e-3)[:, None]  # [K, 1]
            rows.copy_(torch.where(is_used, means.to(rows.dtype), rows))
        return count.long()

    @torch.no_grad()
    def init_from(self, data: Tensor, iterations: int = 10) -> None:
        """Start the codebook at the k-means centres of features `[..., d]`.

        They are the same on every process.
        """
        # 1. The first centres are random features.
        points = self._by_section(data)  # [N, S, d]
        all_rows = torch.ones(self.size, dtype=torch.bool, device=points.device)
        self._set_rows(all_rows, self._sample(self.embedding.weight, all_rows, points))

        # 2. Means of the features nearest to each; a centre without any moves to a random feature.
        for _ in range(iterations):
            indices = self.nearest(points).flatten()
            count = torch.bincount(indices, minlength=self.size)  # [K]
            total = points.new_zeros(self.size, self.dim)
            total.index_add_(0, indices, points.flatten(0, 1))
            means = total / count.clamp_min(1)[:, None]
            is_empty = count == 0
            means[is_empty] = self._sample(means, is_empty, points)
            self._set_rows(all_rows, means)

    @torch.no_grad()
    def restart(self, dead: Tensor, data: Tensor) -> None:
        """Move the codes marked in `dead` `[K]` onto random features `[..., d]`."""
        if bool(dead.any()):
            rows = self._sample(self.embedding.weight, dead, self._by_section(data))
            self._set_rows(dead, rows)

    def _by_section(self, data: Tensor) -> Tensor:
        """Features `[..., d]` → `[N, sections, d]`, as compared."""
        return self.prepare(data.detach().float()).reshape(-1, self.sections, self.dim)

    def _sample(self, rows: Tensor, which: Tensor, points: Tensor) -> Tensor:
        """A random feature of its section for each row marked in `which` `[K]`.

        No other row has it, as long as there are enough features `[N, S, d]`.
        """
        samples = [points[:0, 0]]
        for section, is_marked in enumerate(which.unflatten(0, (self.sections, -1))):
            count = int(is_marked.sum())
            if not count:
                continue

            # 1. Features in random order, the first of equal ones, without those of other rows.
            permutation = torch.randperm(len(points), device=points.device)
            shuffled = points[permutation, section]
            kept = rows.unflatten(0, (self.sections, -1))[section][~is_marked]
            candidates = torch.cat([kept, shuffled])
            _, groups = candidates.unique(dim=0, return_inverse=True)
            order = groups.argsort(stable=True)
            is_first = groups[order].diff(prepend=groups.new_tensor([-1])) != 0
            firsts = order[is_first].sort().values
            distinct = candidates[firsts[firsts >= len(kept)]][:count]

            # 2. The rest are features with noise, so that codes differ.
            repeats = shuffled.repeat(count // len(points) + 1, 1)[: count - len(distinct)]
            noise = 0.01 * points.std() * torch.randn_like(repeats)
            samples += [distinct, repeats + noise]
        return torch.cat(samples)

    def _set_rows(self, which: Tensor, rows: Tensor) -> None:
        """Replace the rows marked in `which` `[K]` by those of the first process."""
        if self.unit_rows:
            rows = F.normalize(rows, dim=-1)
        if dist.is_initialized():
            dist.broadcast(rows, src=0)
        self.embedding.weight[which] = rows.to(self.embedding.weight.dtype)
        if self.ema_decay is not None:
            self.ema_count[which] = 1.0  # as if one feature had been there
            self.ema_sum[which] = rows


class FixedQuantizer(VectorQuantizer):
    """Codes that are not learned: every combination of some values in each dimension.

    values: those of each of the d dimensions; the last one changes fastest from code to code. Each
        section has all combinations.
    """

    is_fixed = True

    def __init__(
        self, size: int, values: Sequence[Tensor], *, normalize: bool = False, sections: int = 1
    ) -> None:
        super().__init__(size, len(values), normalize=normalize, sections=sections)
        self.levels = list(map(len, values))
        n_codes = math.prod(self.levels) * sections
        if n_codes != size:
            raise ConfigError(
                f"codebook_size is {size}, but {self.levels} values in the dimensions of a code "
                f"and {sections} sections make {n_codes} codes."
            )
        grid = torch.cartesian_prod(*values).reshape(-1, self.dim)
        self.embedding = nn.Embedding.from_pretrained(grid.repeat(sections, 1))


class FiniteScalarQuantizer(FixedQuantizer):
    """FSQ (Mentzer et al. 2023): each dimension is bounded and rounded to one of its values."""

    def prepare(self, z: Tensor) -> Tensor:
        """Features `[..., d]` within the outermost values; 0 stays 0."""
        levels = torch.tensor(self.levels, dtype=torch.float32, device=z.device)
        half_width = (levels - 1) * 1.001 / 2
        # The values of an even number of levels are not symmetric.
        offset = 0.5 * (levels % 2 == 0)
        shift = (offset / half_width).atanh()
        bounded = (z.float() + shift).tanh() * half_width - offset
        return (bounded / (levels // 2)).to(z.dtype)

    def loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """None: bounded features are near their codes."""
        return features.new_zeros(())


class LookupFreeQuantizer(FixedQuantizer):
    """LFQ (Yu et al. 2023): the sign of each dimension is a bit of the code.

    normalize: on the unit sphere, as BSQ (Zhao et al. 2024).
    """

    def loss(self, features: Tensor, rows: Tensor) -> Tensor:
        """Commitment, and entropies of the bits: low for each feature, high for all of a section.

        A bit is 1 with the probability that distances to both of its values give, at a temperature
        of the squared value; bits count as independent, as in BSQ.
        """
        commitment = F.mse_loss(features, rows.detach())
        probabilities = torch.sigmoid(4 * features.float() / rows.detach().abs())
        mean = probabilities.reshape(-1, self.sections, self.dim).mean(0)  # [S, d]
        entropy = bit_entropy(probabilities) - bit_entropy(mean)
        return CODEBOOK_WEIGHT * commitment + ENTROPY_WEIGHT * entropy


def bit_entropy(probabilities: Tensor) -> Tensor:
    """Mean entropy in nats of codes of independent bits, `[..., d]` → `[]`."""
    p = probabilities.clamp(1e-6, 1 - 1e-6)
    return (torch.special.entr(p) + torch.special.entr(1 - p)).sum(-1).mean()


def build_quantizer(
    kind: QuantizerKind,
    size: int,
    dim: int,
    *,
    levels: Sequence[int] = (),
    normalize: bool = False,
    sections: int = 1,
) -> VectorQuantizer:
    """The quantizer of a tokenizer's settings; levels: of fsq, for each dimension.

    Raises ConfigError: settings that do not fit.
    """
    if len(levels) != (dim if kind == "fsq" else 0) or (normalize and kind == "fsq"):
        raise ConfigError(
            f"quantizer {kind}: only fsq reads fsq_levels, one for each of the codebook_dim ({dim})"
            " dimensions, and then no normalize_codes."
        )
    if kind == "vq":
        return VectorQuantizer(size, dim, normalize=normalize, sections=sections)
    if kind == "fsq":
        steps = [torch.arange(level, device="cpu") - level // 2 for level in levels]
        values = [row / (len(row) // 2) for row in steps]
        return FiniteScalarQuantizer(size, values, sections=sections)
    bit = torch.tensor([-1.0, 1.0], dtype=torch.float32, device="cpu")
    return LookupFreeQuantizer(size, [bit] * dim, normalize=normalize, sections=sections)
