"""Changed weights are noticed: by caches of one process, and when a run resumes."""

import copy

import pytest
import torch
from torch import nn

from seed_multimodal.errors import SeedWarning
from seed_multimodal.fingerprints import fingerprint, same_fingerprint
from seed_multimodal.inference.batching import weights_state
from seed_multimodal.pipelines.images import open_images


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(2048, 96), nn.Linear(96, 200), nn.BatchNorm1d(200))


def in_precisions(model) -> list[str]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [fingerprint(copy.deepcopy(model).to(dtype)) for dtype in dtypes]


ROWS = {
    "some rows": lambda rows: rows[5:1500].copy_(rows[5:1500].flip(0)),
    "two rows": lambda rows: rows.__setitem__([3, 2000], rows[[2000, 3]]),
    "one row": lambda rows: rows[7].normal_(),
    "one column": lambda rows: rows[:, 50].neg_(),
    "a block": lambda rows: rows[1:80, 1:80].neg_(),
    "mask": lambda rows: rows.mul_(torch.rand_like(rows) > 0.05),
}


@pytest.mark.parametrize("change", ROWS.values(), ids=ROWS)
def test_changes_that_torch_does_not_count_are_noticed(change):
    # One number, or four, of each tensor stood for all: other weights were taken for the same.
    model = network()
    state = weights_state(model)
    stored = in_precisions(model)
    assert all(same_fingerprint(before, now) for before in stored for now in stored)
    change(model[0].weight.data)
    assert weights_state(model) != state
    changed = in_precisions(model)
    assert not any(same_fingerprint(before, now) for before in stored for now in changed)


def test_what_torch_counts_is_noticed():
    model = network()
    for change in (
        lambda: model.load_state_dict(network().state_dict(), assign=True),
        lambda: model[1].register_forward_hook(print),
        lambda: model[2].running_mean[3].add_(1),
        lambda: setattr(model[1], "forward", lambda *inputs: inputs),
        lambda: setattr(model[1], "__class__", type("Other", (type(model[1]),), {})),
    ):
        before = weights_state(model)
        change()
        assert before != weights_state(model) == weights_state(model)
    assert not same_fingerprint(fingerprint(network()), fingerprint(model))
    with pytest.warns(SeedWarning, match="earlier version"):
        assert same_fingerprint([0.5], fingerprint(model))


@pytest.mark.parametrize("name", ["nano", "nano-x"])
@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.load_state_dict({k: v.flip(0) for k, v in model.state_dict().items()}),
        lambda model: [weight.data[1:].neg_() for weight in model.parameters()],
    ],
)
def test_encoded_images_are_those_of_the_present_encoder(name, change):
    # Training a tokenizer, one looks at the codes of the same images between steps.
    used, fresh = open_images(name), open_images(name)
    before = used.encode(["images/fox.png"])
    change(used.model)
    change(fresh.model)
    now = used.encode(["images/fox.png"])
    assert torch.equal(now, fresh.encode(["images/fox.png"]))
    assert not torch.equal(now, before)
