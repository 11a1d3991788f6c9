"""A tiny GLM-Image, as a folder and loaded."""

from pathlib import Path

import pytest

from seed_multimodal import MultimodalSystem


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers.models.glm_image.modeling_glm_image")
    pytest.importorskip("diffusers.pipelines.glm_image.pipeline_glm_image")
    from seed_glm_image.tiny import write_tiny

    path = tmp_path_factory.mktemp("glm") / "system"
    write_tiny(path, path)
    return path


@pytest.fixture(scope="module")
def system(folder: Path) -> MultimodalSystem:
    return MultimodalSystem.from_pretrained(folder, device="cpu", log=None)
