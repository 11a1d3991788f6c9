"""Memory plan: how many bytes of a GPU training a LLaMA takes, and how many packed rows of a micro-batch fit.

A count, not a measurement. Weights, gradients and optimiser states follow from the numbers of weights and the engine;
activations are the bytes that autograd keeps for a position in a layer, which were counted on small models of several
widths (tests/unit/training/llm/test_memory.py counts again): of the width, of the keys and values, of the feed-forward
width, and of each input of a LoRA matrix with dropout. Not counted: what other programs use, and fragmentation; a share
of the memory stays free for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from seed_multimodal.training.llm.lora import MODULES_TO_SAVE, TARGET_MODULES
from seed_multimodal.training.llm.loss import LARGEST_LOGITS

GIB = 2**30
FREE_SHARE, FREE_BYTES = 0.06, 1 * GIB  # stay free: fragmentation; CUDA's context and libraries
_BUCKETS = 2 * 200_000_000  # gradients on their way between processes (DeepSpeed's reduce bucket, twice)
_LIVE = 1_000_000_000  # weights that ZeRO-3 gathers at most (stage3_max_live_parameters)


@dataclass(frozen=True)
class LlamaSizes:
    """Widths and counts; `queries`, `keys`: heads times their width; `tied`: one matrix of word embeddings."""

    hidden: int
    intermediate: int
    layers: int
    queries: int
    keys: int
    words: int
    tied: bool = False

    @classmethod
    def of(cls, config: Any, words: int) -> LlamaSizes:
        """Of a `LlamaConfig`, with so many words."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(config.hidden_size, config.intermediate_size, config.num_hidden_layers, heads * width,
                   (config.num_key_value_heads or heads) * width, words, bool(config.tie_word_embeddings))

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        h, i, q, k = self.hidden, self.intermediate, self.queries, self.keys
        return {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h), "gate_proj": (h, i),
                "up_proj": (h, i), "down_proj": (i, h)}

    def weights(self, lora: Mapping[str, Any] | None) -> tuple[int, int]:
        """Numbers of frozen and of trained weights. With LoRA all of the base is frozen, and what is trained whole
        stands beside it as a copy."""
        ends = self.words * self.hidden
        norms = self.layers * self.hidden
        parts = {"embed_tokens": ends, "lm_head": 0 if self.tied else ends, "input_layernorm": norms,
                 "post_attention_layernorm": norms, "norm": self.hidden}
        base = self.layers * sum(a * b for a, b in self.matrices.values()) + sum(parts.values())
        if lora is None:
            return 0, base
        whole = _names(lora, "modules_to_save", MODULES_TO_SAVE)
        if "norm" in whole:  # part of the layers' norms' names
            whole = (*whole, "input_layernorm", "post_attention_layernorm")
        saved = sum(count for name, count in parts.items() if name in whole)
        added = sum(a + b for name, (a, b) in self.matrices.items() if name in _targets(lora))
        return base, saved + self.layers * int(lora.get("r", 16)) * added


@dataclass(frozen=True)
class Beside:
    """What a model has beside its language model: numbers of trained weights, bytes of frozen ones (which no engine
    spreads), bytes of activations that come on each position."""

    trained: int = 0
    frozen: int = 0
    position: float = 0.0


@dataclass(frozen=True)
class Spread:
    """How an engine spreads training over `world` processes.

    Attributes:
        stage: 0: every process holds all; 1: optimiser states, 2: and gradients, 3: and weights are spread (ZeRO;
            FSDP2 is 3).
        deepspeed: all weights in half precision, with fp32 copies of the trained ones among the optimiser's states.
        states_on_cpu, weights_on_cpu: offloaded.
    """

    world: int = 1
    stage: int = 0
    deepspeed: bool = False
    states_on_cpu: bool = False
    weights_on_cpu: bool = False


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one GPU. `position`: of the activations of one position of a micro-batch; `frozen`: of models beside the
    language model, that are not trained."""

    weights: float
    gradients: float
    states: float
    logits: float
    position: float
    frozen: float = 0.0

    @property
    def fixed(self) -> float:
        """What does not grow with the micro-batch."""
        return self.weights + self.gradients + self.states + self.logits + self.frozen

    def total(self, positions: float) -> float:
        """With a micro-batch of so many positions."""
        return self.fixed + positions * self.position

    def rows(self, memory: float, length: int) -> int:
        """Rows of `length` positions that fit on a GPU of so many bytes; 0: the model itself does not."""
        usable = memory * (1 - FREE_SHARE) - FREE_BYTES
        return max(0, int((usable - self.fixed) / (length * self.position)))

    def text(self, positions: float) -> str:
        """The plan in words."""
        parts = {"weights": self.weights, "gradients": self.gradients, "optimiser states": self.states,
                 **({"vision tower": self.frozen} if self.frozen else {}), "logits": self.logits,
                 f"activations of {positions:,.0f} positions": positions * self.position}
        return " + ".join(f"{size / GIB:.1f} GiB {name}" for name, size in parts.items()) + (
            f" = {self.total(positions) / GIB:.1f} GiB")


def memory_plan(sizes: LlamaSizes, spread: Spread, *, lora: Mapping[str, Any] | None, precision: str = "bf16",
                base_bytes: float = 2.0, checkpointing: bool | str = True, kernel: str = "auto",
                positions: int = 2048, beside: Beside | None = None) -> MemoryPlan:
    """The plan of one process.

    Args:
        lora: fields of `peft.LoraConfig`; None: every weight is trained.
        precision: of the products.
        base_bytes: of a frozen number (bf16 and fp16 2, 8 bit 1, 4 bit a little more than a half, FP8 2).
        checkpointing: as `LlmModelSettings.gradient_checkpointing`.
        kernel: as `trainer.loss_kernel`. positions: of a micro-batch, for the `plain` one.
        beside: parts that are not the language model's.
    """
    number = 4 if precision == "fp32" else 2
    beside = beside or Beside()
    frozen, trained = sizes.weights(lora)
    weights, gradients, states = held_bytes(frozen, trained + beside.trained, spread, number, base_bytes)
    entries = positions * sizes.words
    if kernel != "plain":
        entries = min(entries, LARGEST_LOGITS)
    logits = entries * (14 if number == 2 else 12)  # in half precision and fp32, their softmax, and gradients of both
    return MemoryPlan(weights, gradients, states, logits,
                      _position(sizes, lora, number, base_bytes < 4, checkpointing) + beside.position, beside.frozen)


def held_bytes(frozen: int, trained: int, spread: Spread, number: int, base_bytes: float
               ) -> tuple[float, float, float]:
    """Bytes of weights, gradients and Adam's states of one process, for numbers of frozen and trained weights.

    Args:
        number: bytes of a number in products. base_bytes: of a frozen one.
    """
    everywhere, spread_by = frozen + trained, [spread.world if spread.stage >= stage else 1 for stage in (1, 2, 3)]
    if spread.deepspeed:
        weights = everywhere * number / spread_by[2]
        gradients = trained * number / spread_by[1] + min(_BUCKETS, 2 * trained) * number * (spread.world > 1)
        states = trained * (8 + (4 if number == 2 else 0)) / spread_by[0]
    else:
        weights = (frozen * base_bytes + trained * 4) / spread_by[2] + (trained * 2 if number == 2 else 0)
        gradients = trained * 4 / spread_by[1] * (2 if spread.world > 1 and spread.stage == 0 else 1)  # DDP's buckets
        states = trained * 8 / spread_by[0]
    if spread.stage == 3:
        weights = (0 if spread.weights_on_cpu else weights) + min(everywhere, _LIVE) * number
    return weights, gradients, 0 if spread.states_on_cpu else states


def layer_bytes(sizes: LlamaSizes, lora: Mapping[str, Any] | None, number: int, half_base: bool) -> float:
    """What autograd keeps of one position in one layer. `number`: bytes of a number in products."""
    h, k, i = sizes.hidden, sizes.keys, sizes.intermediate
    dropout = lora is not None and float(lora.get("lora_dropout", 0.05)) > 0
    inputs = sum(self_in for name, (self_in, _) in sizes.matrices.items() if name in _targets(lora)) if dropout else 0
    if number == 4:
        return 32 * h + 8 * k + 16 * i + 6 * inputs
    return (28 if lora is not None and half_base else 32) * h + 4 * k + 8 * i + 4 * inputs


def _position(sizes: LlamaSizes, lora: Mapping[str, Any] | None, number: int, half_base: bool,
              checkpointing: bool | str) -> float:
    """Bytes of one position: what the layers keep, one layer at work (its activations again, and half as much for
    gradients), and what is around the layers."""
    layer = layer_bytes(sizes, lora, number, half_base)
    residual = sizes.hidden * (2 if number == 2 and lora is not None and half_base else 4)
    kept = layer
    if checkpointing:
        kept = (layer + residual) / 2 if checkpointing == "selective" else residual
    return sizes.layers * kept + (1.5 if checkpointing else 0.5) * layer + 14 * sizes.hidden


def _names(lora: Mapping[str, Any], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    found = lora.get(key, default)
    return tuple(found) if isinstance(found, list | tuple | set) else () if found is None else (str(found),)


def _targets(lora: Mapping[str, Any] | None) -> tuple[str, ...]:
    """LoRA's matrices by name; a pattern, or "all-linear", counts as all of them."""
    found = _names(lora or {}, "target_modules", TARGET_MODULES)
    return found if set(found) <= set(TARGET_MODULES) else TARGET_MODULES
