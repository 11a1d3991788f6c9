"""ComfyUI's nodes without ComfyUI: as it calls them, against nano's server on loopback."""

from __future__ import annotations

import importlib.util
import socket
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from repository import ROOT
from served import Running

from seed_multimodal.pipelines.base import MultimodalSystem

TOKEN = "a secret of nobody"


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    file = ROOT / "integrations" / "comfyui" / "seed_multimodal_nodes.py"
    spec = importlib.util.spec_from_file_location("seed_multimodal_nodes", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nano() -> Any:
    return MultimodalSystem.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def address(nano) -> str:
    return Running(nano, token=TOKEN).root


@pytest.fixture(autouse=True)
def token(monkeypatch) -> None:
    monkeypatch.setenv("SEED_TOKEN", TOKEN)


def run(nodes: ModuleType, name: str, **inputs: Any) -> tuple[Any, ...]:
    """A node as ComfyUI calls it: inputs by name, defaults of its widgets, outputs by type."""
    node = nodes.NODE_CLASS_MAPPINGS[f"SeedMultimodal{name}"]
    types = node.INPUT_TYPES()
    assert inputs.keys() <= {*types["required"], *types.get("optional", {})}
    for key, (_, *options) in types["required"].items():
        if options:
            inputs.setdefault(key, options[0]["default"])
    outputs = getattr(node(), node.FUNCTION)(**inputs)
    assert len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    for output, kind in zip(outputs, node.RETURN_TYPES, strict=True):
        if kind == "IMAGE":
            assert output.dtype == torch.float32 and output.ndim == 4 and output.shape[-1] == 3
            assert 0 <= output.min() and output.max() <= 1
        elif kind == "STRING":
            assert isinstance(output, str)
    return outputs


def tensor(name: str) -> torch.Tensor:
    pixels = np.asarray(Image.open(ROOT / "images" / name).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels / 255)[None]


def image(batch: torch.Tensor) -> Image.Image:
    return Image.fromarray((batch[0] * 255).round().to(torch.uint8).numpy())


def test_every_node_has_a_name_and_a_category(nodes: ModuleType):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    assert all(node.CATEGORY for node in nodes.NODE_CLASS_MAPPINGS.values())


def test_ask_describes_an_image(nodes: ModuleType, address: str):
    # As the server prints it, without a scheme.
    (server,) = run(nodes, "Server", address=f"{address.removeprefix('http://')}/generate")
    text, notes = run(nodes, "Ask", server=server, images=tensor("fox_and_snowman.png"))
    assert "fox" in text and "snowman" in text and notes == ""
    question = "Is there a fluent zebra?"
    _, notes = run(nodes, "Ask", server=server, images=tensor("fox.png"), question=question)
    assert "zebra" in notes


def test_draw_is_what_the_library_draws(nodes: ModuleType, address: str, nano):
    prompt = "a noto dog left of a tree in a meadow"
    images, notes = run(nodes, "Draw", server=address, prompt=prompt, count=2, seed=3)
    assert images.shape[0] == 2 and notes == ""
    # With several threads, a batch of two is rounded otherwise than one image.
    expected = np.asarray(nano.draw(prompt, seed=3), np.int16)
    assert np.abs(np.asarray(image(images), np.int16) - expected).max() <= 1
    _, notes = run(nodes, "Draw", server=address, prompt="a fluent zebra in a meadow")
    assert "zebra" in notes


def test_edit_changes_each_image_of_a_batch(nodes: ModuleType, address: str):
    batch = tensor("fox.png").repeat(2, 1, 1, 1)
    images, _ = run(nodes, "Edit", server=address, images=batch, prompt="Put it at night.")
    assert images.shape[0] == 2
    text, _ = run(nodes, "Ask", server=address, images=images[:1])
    assert "night" in text


def test_chat_continues_a_history_with_its_images(nodes: ModuleType, address: str):
    crabs = tensor("two_crabs.png")
    text, images, history, notes = run(
        nodes, "Chat", server=address, message="How many crabs are there?", images=crabs
    )
    assert text == "Two." and images.max() == 0 and notes == nodes.NO_IMAGE
    text, images, history, notes = run(
        nodes, "Chat", server=address, message="Put it at night.", history=history
    )
    assert "night" in text and images.max() > 0 and len(history) == 4 and notes == ""
    text, *_ = run(
        nodes, "Chat", server=address, message="What is in the picture?", history=history
    )
    assert "crabs" in text


def test_large_images_are_reduced_until_the_server_takes_them(nodes: ModuleType, address: str):
    """A batch of noise, whose files are the largest: 216 MB in base64 as it is."""
    batch = torch.rand(1, 3000, 3000, 3).expand(6, -1, -1, -1)
    run(nodes, "Ask", server=address, images=batch, max_tokens=4)
    run(nodes, "Edit", server=address, images=batch[:1], prompt="Put it at night.")


def test_errors_are_the_servers(nodes: ModuleType, address: str, nano, monkeypatch):
    with pytest.raises(RuntimeError, match=r"\(400\): The last message is empty"):
        run(nodes, "Chat", server=address, message=" ")
    small = Running(nano, token=TOKEN, max_body_bytes=1 << 20).root
    with pytest.raises(RuntimeError, match=r"\(413\): .* may have 1 MiB"):
        run(nodes, "Draw", server=small, prompt="x" * (1 << 20))
    # The server ends the connection while the request is written; its answer may come through.
    with pytest.raises(RuntimeError, match=r"too large \(3 MiB\)|Entity Too Large"):
        run(nodes, "Draw", server=small, prompt="x" * (3 << 20))
    monkeypatch.setenv("SEED_TOKEN", "wrong")
    with pytest.raises(RuntimeError, match=r"\(401\): This server asks for a token"):
        run(nodes, "Draw", server=address)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(RuntimeError, match="no SEED server answers"):
            run(nodes, "Draw", server=f"http://127.0.0.1:{free.getsockname()[1]}")
