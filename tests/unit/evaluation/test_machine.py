"""Hardware and versions in reports and benchmarks."""

from __future__ import annotations

import pytest
import torch

from seed_multimodal.evaluation import machine


@pytest.mark.process
def test_hardware_versions_and_commit(tmp_path):
    # Reports name what they were measured on.
    facts = machine.hardware()
    assert facts["cpu"] and facts["cores"] >= 1 and facts["memory_gib"] > 0 and "gpu" not in facts
    assert machine.versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert machine.commit(tmp_path) == "unknown"
