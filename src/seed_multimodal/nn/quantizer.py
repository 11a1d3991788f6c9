"""Vector quantizer: maps each query to the nearest of K codes.

Defaults as in the original: squared Euclidean distance in fp32, straight-through gradients, loss
weights 1 (commitment) and 0.25 (codebook).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError

CODEBOOK_WEIGHT = 0.25  # of the codebook term in the loss
MAX_DISTANCES = 2**28  # computed at once, 1 GB


class VectorQuantizer(nn.Module):
    """`embedding` `[K, d]` holds the codes.

    normalize: compare and decode codes on the unit sphere.
    unit_rows: the stored rows are on the unit sphere; only features are normalised (LaVIT).
    ema_decay: codes follow a moving average of their features instead of the gradient.
    sections: position q chooses among rows `[q · K/sections, (q + 1) · K/sections)` only.
    """

    ema_count: Tensor
    ema_sum: Tensor

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
        self.ema_decay = ema_decay
        self.sections = sections

        # The codes start small, as in the original, or as unit vectors.
        self.embedding = nn.Embedding(size, dim)
        if unit_rows:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        else:
            nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)

        # Moving averages of the number and of the sum of each code's features.
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_count", torch.zeros(size))
            self.register_buffer("ema_sum", torch.zeros(size, dim))

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
        z = self.prepare(z)
        rows = self.lookup(indices)

        # Commitment draws features to codes; the codebook term, or the average, codes to features.
        loss = F.mse_loss(z, rows.detach())
        if self.ema_decay is None:
            loss = loss + CODEBOOK_WEIGHT * F.mse_loss(rows, z.detach())
        elif self.training:
            points = z.detach().reshape(-1, self.dim).float()
            self._update_codes(points, indices.flatten(), self.ema_decay)

        straight_through = z + (rows - z).detach()
        return straight_through, loss, indices

    @torch.no_grad()
    def _update_codes(self, points: Tensor, indices: Tensor, decay: float) -> None:
        """Update the moving averages and the codes from points `[P, d]` of all processes."""
        # 1. Moving averages of the points of each code.
        count = add_counts(points.new_zeros(self.size), indices)
        total = torch.zeros_like(self.ema_sum).index_add_(0, indices, points)
        if dist.is_initialized():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.ema_count.lerp_(count, 1 - decay)
        self.ema_sum.lerp_(total, 1 - decay)

        # 2. Their means are the new codes; a code that no point has used stays.
        means = self.ema_sum / self.ema_count.clamp_min(1e-3)[:, None]
        if self.unit_rows:
            means = F.normalize(means, dim=-1)
        rows = self.embedding.weight
        is_used = (self.ema_count > 1e-3)[:, None]  # [K, 1]
        rows.copy_(torch.where(is_used, means.to(rows.dtype), rows))

    @torch.no_grad()
    def init_from(self, data: Tensor, iterations: int = 10) -> None:
        """Start the codebook at the k-means centres of features `[..., d]`.

        They are the same on every process.
        """
        # 1. The first centres are random features.
        points = self._by_section(data)  # [N, S, d]
        all_rows = torch.ones(self.size, dtype=torch.bool, device=points.device)
        self._set_rows(all_rows, self._sample(points, all_rows))

        # 2. Means of the features nearest to each; a centre without any moves to a random feature.
        for _ in range(iterations):
            indices = self.nearest(points).flatten()
            count = torch.bincount(indices, minlength=self.size)  # [K]
            total = torch.zeros(self.size, self.dim, device=points.device)
            total.index_add_(0, indices, points.flatten(0, 1))
            means = total / count.clamp_min(1)[:, None]
            is_empty = count == 0
            means[is_empty] = self._sample(points, is_empty)
            self._set_rows(all_rows, means)

    @torch.no_grad()
    def restart(self, dead: Tensor, data: Tensor) -> None:
        """Move the codes marked in `dead` `[K]` onto random features `[..., d]`.

        Every process must call it.
        """
        if bool(dead.any()):
            self._set_rows(dead, self._sample(self._by_section(data), dead))

    def _by_section(self, data: Tensor) -> Tensor:
        """Features `[..., d]` → `[N, sections, d]`, as compared."""
        return self.prepare(data.detach().float()).reshape(-1, self.sections, self.dim)

    def _sample(self, points: Tensor, which: Tensor) -> Tensor:
        """A random feature of its section for each row marked in `which` `[K]`."""
        samples = []
        n_points = len(points)
        counts = which.reshape(self.sections, -1).sum(1).tolist()  # marked rows of each section
        for section, count in enumerate(counts):
            permutation = torch.randperm(n_points, device=points.device)
            order = permutation.repeat(count // n_points + 1)[:count]
            rows = points[order, section]
            # Features that are used more than once get noise, so that their codes differ.
            noise = 0.01 * points.std() if count > n_points else 0.0
            samples.append(rows + noise * torch.randn_like(rows))
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


def add_counts(counts: Tensor, codes: Tensor) -> Tensor:
    """Add how often each code occurs to `counts` `[K]`.

    Unlike `torch.bincount` without waiting for the GPU.
    """
    codes = codes.flatten()
    return counts.scatter_add_(0, codes, counts.new_ones(()).expand(len(codes)))
