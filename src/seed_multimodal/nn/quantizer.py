"""Vector quantizer: maps each query to the nearest of K codes. Defaults as in the original: squared Euclidean
distance in fp32, straight-through gradients, loss weights 1 (commitment) and 0.25 (codebook)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError

CODEBOOK_WEIGHT = 0.25  # of the codebook term in the loss
SCORES = 2**28  # distances held at once, 1 GB


class VectorQuantizer(nn.Module):
    """`embedding` `[K, d]` holds the codes.

    Args:
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
        self.size, self.dim, self.normalize, self.unit_rows = size, dim, normalize, unit_rows
        self.ema_decay, self.sections = ema_decay, sections
        self.embedding = nn.Embedding(size, dim)
        if unit_rows:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        else:
            nn.init.uniform_(self.embedding.weight, -1.0 / size, 1.0 / size)
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("ema_count", torch.zeros(size))
            self.register_buffer("ema_sum", torch.zeros(size, dim))

    def prepare(self, z: Tensor) -> Tensor:
        """Features `[..., d]`, normalized for comparison."""
        return F.normalize(z, dim=-1) if self.normalize or self.unit_rows else z

    def lookup(self, codes: Tensor) -> Tensor:
        """Codebook rows as decoded: `[...]` int64 → `[..., d]`."""
        rows = self.embedding(codes)
        return F.normalize(rows, dim=-1) if self.normalize else rows

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code, the first one of a tie: `[..., d]` (`[..., sections, d]`) → `[...]` int64."""
        with torch.autocast(z.device.type, enabled=False):
            points = self.prepare(z.float()).reshape(-1, self.sections, self.dim).transpose(0, 1)
            rows = self.embedding.weight.float()
            codes = (F.normalize(rows, dim=-1) if self.normalize else rows).unflatten(
                0, (self.sections, -1)
            )
            lengths = codes.square().sum(2)[:, None]
            # The squared length of a point is the same for all codes, so the order does not need it.
            matches = [
                (lengths - 2 * torch.bmm(part, codes.transpose(1, 2))).argmin(dim=2)
                for part in points.split(max(1, SCORES // self.size), dim=1)
            ]
            first = torch.arange(self.sections, device=z.device)[:, None] * (
                self.size // self.sections
            )
            return (torch.cat(matches, dim=1) + first).T.reshape(z.shape[:-1])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise `[B, Q, d]` → (straight-through codes `[B, Q, d]`, loss `[]`, indices `[B, Q]` int64)."""
        indices = self.nearest(z)
        z = self.prepare(z)
        chosen = self.lookup(indices)
        loss = F.mse_loss(z, chosen.detach())
        if self.ema_decay is None:
            loss = loss + CODEBOOK_WEIGHT * F.mse_loss(chosen, z.detach())
        elif self.training:
            self._follow(
                z.detach().reshape(-1, self.dim).float(), indices.flatten(), self.ema_decay
            )
        return z + (chosen - z).detach(), loss, indices

    @torch.no_grad()
    def _follow(self, points: Tensor, indices: Tensor, decay: float) -> None:
        """Update the moving averages and the codes."""
        count = add_counts(points.new_zeros(self.size), indices)
        total = torch.zeros_like(self.ema_sum).index_add_(0, indices, points)
        if _is_distributed():
            dist.all_reduce(count)
            dist.all_reduce(total)
        self.ema_count.lerp_(count, 1 - decay)
        self.ema_sum.lerp_(total, 1 - decay)
        means = self.ema_sum / self.ema_count.clamp_min(1e-3)[:, None]
        if self.unit_rows:
            means = F.normalize(means, dim=-1)
        rows = self.embedding.weight
        rows.copy_(torch.where((self.ema_count > 1e-3)[:, None], means.to(rows.dtype), rows))

    @torch.no_grad()
    def init_from(self, data: Tensor, iterations: int = 10) -> None:
        """Start the codebook at the k-means centres of features `[..., d]` (the same on every process)."""
        points = self._by_section(data)
        every = torch.ones(self.size, dtype=torch.bool, device=points.device)
        self._set_rows(every, self._sample(points, every))
        for _ in range(iterations):
            indices = self.nearest(points).flatten()
            count = torch.bincount(indices, minlength=self.size)
            total = torch.zeros(self.size, self.dim, device=points.device)
            rows = total.index_add_(0, indices, points.flatten(0, 1)) / count.clamp_min(1)[:, None]
            rows[count == 0] = self._sample(points, count == 0)
            self._set_rows(every, rows)

    @torch.no_grad()
    def restart(self, dead: Tensor, data: Tensor) -> None:
        """Move the codes marked in `dead` `[K]` onto random features `[..., d]`; every process must call it."""
        if bool(dead.any()):
            self._set_rows(dead, self._sample(self._by_section(data), dead))

    def _by_section(self, data: Tensor) -> Tensor:
        """Features `[..., d]` → `[N, sections, d]`, as compared."""
        return self.prepare(data.detach().float()).reshape(-1, self.sections, self.dim)

    def _sample(self, points: Tensor, which: Tensor) -> Tensor:
        """A random feature of its section for each row marked in `which` `[K]`; repeated ones with noise."""
        chosen = []
        for section, count in enumerate(which.reshape(self.sections, -1).sum(1).tolist()):
            order = torch.randperm(len(points), device=points.device).repeat(
                count // len(points) + 1
            )[:count]
            rows = points[order, section]
            noise = 0.01 * points.std() if count > len(points) else 0.0
            chosen.append(rows + noise * torch.randn_like(rows))
        return torch.cat(chosen)

    def _set_rows(self, which: Tensor, rows: Tensor) -> None:
        if self.unit_rows:
            rows = F.normalize(rows, dim=-1)
        if _is_distributed():
            dist.broadcast(rows, src=0)
        self.embedding.weight[which] = rows.to(self.embedding.weight.dtype)
        if self.ema_decay is not None:
            self.ema_count[which] = 1.0
            self.ema_sum[which] = rows


def add_counts(counts: Tensor, codes: Tensor) -> Tensor:
    """Add how often each code occurs to `counts` `[K]`; unlike `torch.bincount` without waiting for the GPU."""
    codes = codes.flatten()
    return counts.scatter_add_(0, codes, counts.new_ones(()).expand(len(codes)))


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
