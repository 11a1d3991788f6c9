"""The table of GPUs: names as drivers give them, precisions, and what has no known peak."""

from __future__ import annotations

import pytest
import torch

from seed_multimodal.device import known_peak, peak_of


@pytest.mark.parametrize(("name", "dtype", "peak"), [
    ("NVIDIA H200", torch.bfloat16, 989.4), ("NVIDIA H100 80GB HBM3", torch.float16, 989.4),
    ("NVIDIA H100 PCIe", torch.bfloat16, 756.0), ("NVIDIA H100 NVL", torch.bfloat16, 835.0),
    ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312.0), ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5),
    ("NVIDIA A10", torch.float16, 125.0), ("NVIDIA L40S", torch.bfloat16, 362.0), ("NVIDIA L4", torch.bfloat16, 121.0),
    ("NVIDIA A10G", torch.bfloat16, None), ("NVIDIA H200 MIG 1g.18gb", torch.bfloat16, None),
    ("AMD Instinct MI300X", torch.bfloat16, None)])
def test_names(name: str, dtype: torch.dtype, peak: float | None) -> None:
    assert peak_of(name, dtype) == peak


def test_float32_products_that_may_be_rounded_have_another_peak() -> None:
    assert peak_of("NVIDIA H200", torch.float32, tf32=True) == 494.7


def test_a_cpu_has_no_known_peak() -> None:
    assert known_peak(torch.device("cpu"), torch.float32) is None
