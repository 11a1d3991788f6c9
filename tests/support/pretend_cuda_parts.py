"""Moves of weights on pretended CUDA devices; each function `check_…` is a row."""

import copy
from pathlib import Path

import pretend_cuda
import torch
from torch import nn
from waiting import wait_until

from seed_multimodal import MultimodalSystem
from seed_multimodal.device import OffloadedWeights

FOX = Path(__file__).resolve().parents[2] / "images" / "fox_and_snowman.png"
GPU = torch.device("cuda:0")


class Tied(nn.Module):
    """An embedding tied to the output layer, and a buffer that is not saved."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.output = nn.Linear(8, 50, bias=False)
        self.output.weight = self.embedding.weight
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.output(self.embedding(ids) * self.scale)


def devices_of(module) -> set[str]:
    return {str(tensor.device) for tensor in (*module.parameters(), *module.buffers())}


def check_weights_come_back_without_a_copy():
    module = Tied()
    saved = copy.deepcopy(module)
    ids = torch.tensor([1, 2])
    expected = module(ids)
    n_bytes = 4 * (50 * 8 + 8)
    free = torch.cuda.memory_allocated(0)
    weights = OffloadedWeights(module, GPU)
    before = pretend_cuda.transfers()
    with torch.inference_mode():  # as the language model's thread
        for _ in range(2):
            weights.load()
            weights.load()  # without effect
            assert devices_of(module) == {"cuda:0"}
            assert module.output.weight is module.embedding.weight
            assert torch.cuda.memory_allocated(0) - free == n_bytes
            assert torch.equal(module(ids.to(GPU)).cpu(), expected)
            weights.release()
            weights.release()
    after = pretend_cuda.transfers()

    # Back on the CPU: the same numbers, and nothing on the device; only outputs were copied.
    assert devices_of(module) == {"cpu"} and module.output.weight is module.embedding.weight
    for tensor, original in zip(
        (*module.parameters(), *module.buffers()),
        (*saved.parameters(), *saved.buffers()),
        strict=True,
    ):
        assert torch.equal(tensor, original) and not tensor.is_inference()
    assert torch.cuda.memory_allocated(0) == free
    assert after.to_host - before.to_host == 2 * expected.nbytes
    assert after.to_device - before.to_device == 2 * (n_bytes + ids.nbytes)
    assert after.empty_cache - before.empty_cache == 2


def check_changes_between_moves_are_loaded():
    module = Tied()
    weights = OffloadedWeights(module, GPU)
    weights.load()
    weights.release()
    with torch.no_grad():
        module.scale.fill_(2.0)
        module.embedding.weight.zero_()
    weights.load()
    assert module.scale.tolist() == [2.0] * 8 and not module.output.weight.any()
    weights.release()


def check_a_device_without_memory():
    module = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(1000, 1000, bias=False))
    free = torch.cuda.memory_allocated(1)
    pretend_cuda.set_memory(1, free + 100_000)
    weights = OffloadedWeights(module, torch.device("cuda:1"))
    for _ in range(2):
        try:
            weights.load()
        except torch.OutOfMemoryError:
            pass
        else:
            raise AssertionError("no error")
        assert devices_of(module) == {"cpu"} and torch.cuda.memory_allocated(1) == free
    pretend_cuda.set_memory(1, 80 << 30)
    weights.load()
    assert devices_of(module) == {"cuda:1"}
    weights.release()


def check_an_offloaded_language_model_moves_once_an_answer():
    system = MultimodalSystem.from_pretrained("nano-x", offload=("llm",), log=None)
    system.images.encode([FOX])  # cached, so that only the language model moves
    system.describe(FOX)
    # The answer arrives before the weights leave; a request at once would find them there.
    wait_until(lambda: devices_of(system.llm) == {"cpu"}, 10)
    n_bytes = sum(weight.nbytes for weight in system.llm.parameters())
    before = pretend_cuda.transfers()
    system.describe(FOX, min_new_tokens=20, max_new_tokens=20, num_beams=1)
    after = pretend_cuda.transfers()
    moves = (after.to_device - before.to_device) / n_bytes
    assert 1 <= moves < 1.5, moves
    assert after.empty_cache - before.empty_cache <= 4  # of the answer before, too


def check_an_offloaded_decoder_is_not_copied_back():
    system = MultimodalSystem.from_pretrained("nano-x", offload=True, dtype="float32", log=None)
    features = list(system.images.encode([FOX]))
    system.images.draw(features, seeds=[0], num_inference_steps=1)
    before = pretend_cuda.transfers()
    system.images.draw(features, seeds=[0], num_inference_steps=1)
    after = pretend_cuda.transfers()
    decoder = system.images.decoder
    n_bytes = sum(weight.nbytes for part in decoder.parts.values() for weight in part.parameters())
    assert after.to_device - before.to_device >= n_bytes
    assert after.to_host - before.to_host < n_bytes / 10  # pixels
    assert all(devices_of(part) == {"cpu"} for part in decoder.parts.values())
