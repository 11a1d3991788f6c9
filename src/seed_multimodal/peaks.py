"""Peak rates of GPUs: dense matrix products by the makers' data sheets, for model-FLOP utilisation (MFU).

Rates are TFLOP/s without sparsity, with float32 accumulation. `fp32` is the plain rate, `tf32` that of products which
torch may round to TF32 (`torch.set_float32_matmul_precision`). A name that is not here has no known peak.
"""

from __future__ import annotations

import re

import torch

# First match counts, so longer names come first. A16 stands for bf16 and fp16, which tensor cores compute alike.
_TABLE: tuple[tuple[str, dict[str, float]], ...] = (
    (r"B200", {"a16": 2250.0, "tf32": 1125.0, "fp32": 75.0}),
    (r"H200|GH200|H800", {"a16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"H100 NVL", {"a16": 835.0, "tf32": 417.5, "fp32": 60.0}),
    (r"H100 PCIe", {"a16": 756.0, "tf32": 378.0, "fp32": 51.0}),
    (r"H100", {"a16": 989.4, "tf32": 494.7, "fp32": 66.9}),
    (r"H20", {"a16": 148.0, "tf32": 74.0, "fp32": 44.0}),
    (r"A100|A800", {"a16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (r"A40", {"a16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (r"A30", {"a16": 165.0, "tf32": 82.0, "fp32": 10.3}),
    (r"A10", {"a16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    (r"L40S", {"a16": 362.0, "tf32": 183.0, "fp32": 91.6}),
    (r"L40", {"a16": 181.0, "tf32": 90.5, "fp32": 90.5}),
    (r"L4", {"a16": 121.0, "tf32": 60.0, "fp32": 30.3}),
    (r"RTX 5090", {"a16": 209.5, "tf32": 104.8, "fp32": 104.8}),
    (r"RTX 4090", {"a16": 165.2, "tf32": 82.6, "fp32": 82.6}),
    (r"RTX 3090", {"a16": 71.0, "tf32": 35.6, "fp32": 35.6}),
    (r"V100.*SXM\d", {"fp16": 125.0, "fp32": 15.7}),
    (r"V100", {"fp16": 112.0, "fp32": 14.0}),
    (r"T4", {"fp16": 65.0, "fp32": 8.1}),
)


def peak_of(name: str, dtype: torch.dtype, tf32: bool = False) -> float | None:
    """TFLOP/s of the GPU that its driver calls `name`, at most; None if unknown or a slice of a GPU (MIG)."""
    if "MIG" in name:
        return None
    for pattern, rates in _TABLE:
        if re.search(rf"\b(?:{pattern})\b", name):
            if dtype == torch.float32:
                return rates.get("tf32", rates["fp32"]) if tf32 else rates["fp32"]
            return rates.get("a16") or (rates.get("fp16") if dtype == torch.float16 else None)
    return None


def known_peak(device: torch.device, dtype: torch.dtype) -> float | None:
    """TFLOP/s that `device` reaches at most on matrix products in `dtype`; None for a CPU and for unknown devices."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest")
