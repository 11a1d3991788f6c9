"""The loss over packed and padded batches equals that of separate sequences.

Chunks, attention kinds, weights.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from llm_losses import packed_loss, rows
from tiny.language import random_llm
from torch.testing import assert_close

from seed_multimodal.training.llm.lora import add_lora
from seed_multimodal.training.llm.loss import LossModule, LossWeights, find_llama, head_losses

VOCAB_SIZE = 70
LENGTHS = (7, 5, 9, 1, 10)


def build(tied: bool = False, lora: bool = False, architecture: str = "llama") -> torch.nn.Module:
    torch.manual_seed(0)
    model = random_llm(architecture, VOCAB_SIZE, initializer_range=0.3, tie_word_embeddings=tied)
    if not lora:
        return model
    model = add_lora(model, {"r": 4, "lora_alpha": 32, "lora_dropout": 0.0})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def sequences() -> list[SimpleNamespace]:
    generator = torch.Generator().manual_seed(1)
    samples = []
    for length in LENGTHS:
        ids = torch.randint(3, VOCAB_SIZE, (1, length), generator=generator)
        labels = ids.clone()
        labels[:, 1 : length // 3] = -100
        samples.append(rows(ids, labels))
    return samples


def packed(count=1) -> SimpleNamespace:
    """The sequences end to end, padded at the end; further rows hold them in another order."""
    columns = ([], [], [])
    for row in range(count):
        samples = sequences()[row:] + sequences()[:row]
        pad = (0, 36 - sum(LENGTHS))
        ids = torch.cat([sample.input_ids[0] for sample in samples])
        labels = torch.cat([sample.labels[0] for sample in samples])
        positions = [torch.arange(sample.input_ids.shape[1]) for sample in samples]
        columns[0].append(F.pad(ids, pad))
        columns[1].append(F.pad(labels, pad, value=-100))
        columns[2].append(torch.cat([*positions, torch.arange(pad[1])]))
    return rows(*(torch.stack(column) for column in columns))


def padded() -> SimpleNamespace:
    length = max(LENGTHS)

    def column(name, fill: int) -> torch.Tensor:
        values = [getattr(sample, name)[0] for sample in sequences()]
        return torch.stack([F.pad(row, (0, length - len(row)), value=fill) for row in values])

    mask = torch.tensor([[1] * n + [0] * (length - n) for n in LENGTHS])
    positions = torch.arange(length).expand(len(LENGTHS), -1)
    return rows(column("input_ids", 0), column("labels", -100), positions, mask)


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def separate(model, times: int = 1) -> tuple[torch.Tensor, int]:
    parts = [packed_loss(model, s) for s in sequences()]
    return times * sum(p.sum for p in parts), times * int(sum(p.count for p in parts))


OTHERS = ("qwen3", "smollm3", "mistral", "phi3", "mistral sliding", "qwen3 sliding")


@pytest.mark.parametrize(
    "architecture, attention",
    [("llama", "eager"), ("llama", "sdpa"), *((name, "sdpa") for name in OTHERS)],
)
@pytest.mark.parametrize("count", [1, 2])
def test_packed_equals_separate_sequences(architecture, attention, count):
    # A token that sees another sequence is the fault that nobody notices in a curve.
    model = build(lora=True, architecture=architecture)
    find_llama(model).set_attn_implementation(attention)
    expected, n_tokens = separate(model, count)
    expected_gradients = gradients(model, expected)
    for chunked in (False, True):
        parts = packed_loss(model, packed(count), chunked=chunked)
        assert int(parts.count) == n_tokens
        assert_close(parts.sum, expected, atol=1e-4, rtol=1e-5)
        actual = gradients(model, parts.sum)
        assert_close(actual, expected_gradients, atol=1e-4, rtol=1e-4)
    leaking = packed(count)
    leaking.position_ids = torch.arange(36).expand_as(leaking.input_ids)
    assert abs(packed_loss(model, leaking).mean - expected / n_tokens) > 1e-3


@pytest.mark.filterwarnings(
    "ignore:_compile flag", "ignore:flex_attention called without torch.compile"
)
def test_flex_attention_separates_packed_sequences():
    # The attention of packed rows on GPUs without flash attention.
    model = build()
    expected, count = separate(model)
    model.set_attn_implementation("flex_attention")
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # the same mask, not compiled
        parts = packed_loss(model.eval(), packed())
    assert int(parts.count) == count
    assert_close(parts.sum, expected.detach(), atol=1e-3, rtol=1e-4)


def test_attention_of_packed_and_of_padded_rows():
    # As with `auto` on a GPU: flash or flex for packed rows, SDPA for padded ones.
    model = build(lora=True)
    llama = find_llama(model)
    llama.attentions = {True: "eager", False: "sdpa"}
    expected, count = separate(model)
    assert llama.config._attn_implementation == "sdpa"
    for batch, attention in ((packed(), "eager"), (padded(), "sdpa"), (packed(), "eager")):
        parts = packed_loss(model, batch)
        assert llama.config._attn_implementation == attention and int(parts.count) == count
        assert_close(parts.sum, expected, atol=1e-4, rtol=1e-5)


def test_chunked_loss_of_tied_embeddings_never_holds_all_logits():
    # Logits of all tokens at once, by a vocabulary of 40,000, would fill a GPU.
    model = build(tied=True, lora=True)
    batch = packed(3)
    full_loss = packed_loss(model, batch)
    expected = gradients(model, full_loss.sum)
    chunk_sizes = []
    find_llama(model).lm_head.register_forward_hook(
        lambda _module, args, _output: chunk_sizes.append(len(args[0]))
    )
    # The smallest chunk, and logits of 100 tokens, of which a multiple of 64 is used.
    for max_logits in (1, 100 * VOCAB_SIZE):
        module = LossModule(model, max_logits=max_logits)
        parts = module(batch.input_ids, batch.labels, batch.position_ids)
        assert_close(parts.sum, full_loss.sum, atol=1e-5, rtol=1e-6)
        assert_close(gradients(model, parts.sum), expected, atol=1e-5, rtol=1e-4)
        assert max(chunk_sizes) <= 64 < int(parts.count)


def test_head_losses_have_few_numbers_of_rows():
    # oneDNN keeps kernels for each number: a training on a CPU grew from 1.5 to 7.6 GiB.
    model = build()
    row_counts = set()
    find_llama(model).lm_head.register_forward_hook(
        lambda _module, args, _output: row_counts.add(len(args[0]))
    )
    for n_tokens in range(130):
        states = torch.randn(n_tokens, model.config.hidden_size, requires_grad=True)
        targets = torch.randint(0, VOCAB_SIZE, (n_tokens,))
        weights = torch.rand(n_tokens)
        losses = head_losses(model, states, targets)
        log_probs = (states @ find_llama(model).lm_head.weight.T).log_softmax(-1)
        expected = -log_probs[torch.arange(n_tokens), targets]
        assert_close(losses, expected)
        variables = [states, find_llama(model).lm_head.weight]
        assert_close(
            torch.autograd.grad(losses @ weights, variables),
            torch.autograd.grad(expected @ weights, variables),
            atol=1e-5,
            rtol=1e-4,
        )
    assert row_counts == {0, 64, 128, 192}


def test_loss_weights_of_text_and_image_tokens():
    # Against the losses of single tokens; the mean is that of weighted tokens.
    model = build()
    batch = packed()
    with torch.no_grad():  # the losses of single tokens, by sequences
        losses = [
            F.cross_entropy(
                model(sample.input_ids).logits[0, :-1], sample.labels[0, 1:], reduction="none"
            )
            for sample in sequences()
        ]
    values = torch.cat(losses)
    targets = torch.cat([sample.labels[0, 1:] for sample in sequences()])
    image = targets >= 50
    text = (targets != -100) & ~image
    parts = packed_loss(model, batch, weights=LossWeights(first_code=50, text=4.0, image=0.5))
    weighted = 4.0 * values[text].sum() + 0.5 * values[image].sum()
    assert_close(parts.mean, weighted / (4.0 * text.sum() + 0.5 * image.sum()))
    assert_close(parts.text_sum, values[text].sum())
    assert_close(parts.image_sum, values[image].sum())
    assert [int(parts.text_count), int(parts.image_count)] == [int(text.sum()), int(image.sum())]


def test_batch_without_learned_tokens_has_zero_gradients():
    # A mean over no token would be nan, and stop the run.
    module = LossModule(build(), LossWeights(50))
    batch = packed()
    parts = module(batch.input_ids, torch.full_like(batch.labels, -100), batch.position_ids)
    assert float(parts.count) == 0.0 and parts.mean.item() == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradients(module, parts.sum).values())
