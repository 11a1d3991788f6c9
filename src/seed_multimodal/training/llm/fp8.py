"""Frozen matrices of the language model in FP8: products with them on tensor cores at twice the rate of bf16.

`freeze_in_fp8(model)` puts an `Fp8Linear` in the place of every frozen linear layer of the decoder's layers; what
is trained (adapters, norms, embeddings, head) stays as it is, and so does what a checkpoint holds.
Numbers are e4m3 (3 mantissa bits, so at most 1/16 off), each row of an operand with a scale of its own: weights once,
activations and gradients at each product. The backward pass multiplies with a second, transposed copy, because its
scales run the other way and the hardware needs both operands stored along the summed axis: two bytes a number in all.
Without FP8 tensor cores the same numbers are computed in fp64, which holds every sum of such products exactly: slow,
the same on any machine and for any order of the sum, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seed_multimodal.errors import ConfigError
from seed_multimodal.training.llm.loss import find_llama

FP8 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
MULTIPLE = 16  # both sizes of a matrix must be multiples of it
_TINY = 2.0**-100  # stands for the largest number of a row of zeros; its inverse is still an fp32 number


def has_fp8(device: torch.device) -> bool:
    """Whether a device multiplies FP8 matrices itself: NVIDIA GPUs from Ada (8.9) and Hopper (9.0) on."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def check_fp8(device: torch.device) -> None:
    """Raises ConfigError where FP8 would only be slow; a CPU may, for tests."""
    if device.type != "cpu" and not has_fp8(device):
        raise ConfigError(f"fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper), which {device} is not; "
                          "leave it out.")


def quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[M, K]` → e4m3 `[M, K]` and fp32 scales `[M, 1]`, whose product is near the rows; NaN if a row has one."""
    scale = values.abs().amax(-1, keepdim=True).float().clamp(min=_TINY) / LARGEST
    return (values / scale).to(FP8).contiguous(), scale


def product(values: Tensor, weight: Tensor, scale: Tensor, native: bool) -> Tensor:
    """`values @ weight.T` in FP8, rounded to bf16.

    Args:
        values: `[M, K]` of any precision.
        weight: e4m3 `[N, K]`.
        scale: of its rows, fp32 `[N]`.
        native: use the device's FP8 product (see `has_fp8`), else compute the same in fp64.
    """
    rows, row_scale = quantise(values)
    if native:  # a sum in the tensor core's own precision: the row-wise kernels are slow with a better one
        return torch._scaled_mm(rows, weight.t(), scale_a=row_scale, scale_b=scale[None], out_dtype=torch.bfloat16,
                                use_fast_accum=True)
    exact = rows.double() @ weight.double().t()
    return (exact * row_scale * scale).to(torch.bfloat16)


class _Frozen(torch.autograd.Function):
    """`x @ weight.T` of a frozen weight; keeps no activations, because only the gradient of x is wanted."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, transposed: Tensor, transposed_scale: Tensor, native: bool,
                dtype: torch.dtype) -> Tensor:
        y = product(x.reshape(-1, x.shape[-1]), weight, scale, native)
        return y.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, _, transposed, transposed_scale, native, _ = inputs
        ctx.save_for_backward(transposed, transposed_scale)
        ctx.native, ctx.dtype = native, x.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        transposed, scale = ctx.saved_tensors
        grad = grads[0]
        found = product(grad.reshape(-1, grad.shape[-1]), transposed, scale, ctx.native)
        return found.to(ctx.dtype).view(*grad.shape[:-1], transposed.shape[0]), None, None, None, None, None, None


class Fp8Linear(nn.Module):
    """A linear layer with a frozen FP8 weight; see the module's docstring.

    Attributes:
        weight: e4m3 `[out, in]`; a parameter without gradient, so that counts of weights stay true.
        scale: of its rows, fp32 `[out]`.
        transposed: e4m3 `[in, out]`, with a `transposed_scale` `[in]`.
        bias: the layer's own, trained or not.
    """

    scale: Tensor
    transposed: Tensor
    transposed_scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with torch.no_grad():
            weight, scale = quantise(linear.weight)
            transposed, transposed_scale = quantise(linear.weight.t())
        self.weight = nn.Parameter(weight, requires_grad=False)
        for name, value in (("scale", scale.flatten()), ("transposed", transposed),
                            ("transposed_scale", transposed_scale.flatten())):
            self.register_buffer(name, value, persistent=False)
        self.bias = linear.bias
        self.native = has_fp8(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` → `[..., out]`, in the precision an `nn.Linear` would give here (autocast's, else x's)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        y = _Frozen.apply(x, self.weight, self.scale, self.transposed, self.transposed_scale, self.native, dtype)
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Sizes, as `nn.Linear` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def freeze_in_fp8(model: nn.Module) -> int:
    """Replace the frozen linear layers of a LLaMA's decoder layers, for good; returns how many are FP8 now.

    peft's `base_layer`s and layers without adapter; not the embeddings, the head, anything trained, the unused
    originals of modules that are trained whole, or matrices with a size that is no multiple of 16. Call it on the
    model's final device, after LoRA and before torch.compile.

    Raises:
        ConfigError: the model is on a GPU that cannot compute FP8.
    """
    layers = find_llama(model).model.layers
    check_fp8(next(layers.parameters()).device)
    for name, module in list(layers.named_modules()):
        for part, linear in list(module.named_children()):
            own = f"{name}.{part}"
            # Quantised layers of other libraries are subclasses: the type itself is asked for.
            if type(linear) is nn.Linear and not linear.weight.requires_grad and not any(
                    size % MULTIPLE for size in linear.weight.shape) and not any(
                    word in own for word in ("lora_", "original_module", "modules_to_save")):
                setattr(module, part, Fp8Linear(linear))
    return sum(isinstance(module, Fp8Linear) for module in layers.modules())


def keep_out_of_ddp(module: nn.Module) -> None:
    """Tell DistributedDataParallel, before it wraps a module, not to send FP8 weights around.

    They are the same in all processes from the start. DDP would send the transposed copies before every step, and
    gloo refuses their type.
    """
    names = [f"{name}.{part}" for name, layer in module.named_modules() if isinstance(layer, Fp8Linear)
             for part in ("weight", "scale", "transposed", "transposed_scale")]
    if names:
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
