"""The encoder: equal codes however images are batched, and a batch that does not fit into memory."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import warm_python

YAML = str(Path(__file__).resolve().parents[4] / "MultiModalLLM" / "configs" / "tokenizer" / "nano.yaml")
FULL = """
import json, resource, sys
from pathlib import Path
import torch
from seed_multimodal.data.pretokenize.encode import Encoder, EncoderSettings
from seed_multimodal.errors import ConfigError
torch.set_num_threads(1)
encoder = Encoder(EncoderSettings(sys.argv[1], device="cpu"))
pixels = torch.randint(256, (960, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
codes = encoder(pixels[:32])
pages = int(Path("/proc/self/statm").read_text().split()[0])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 120 * 2**20, hard))
try:
    encoder(pixels)
except ConfigError as error:
    print(json.dumps({"said": str(error), "equal": encoder(pixels[:32]) == codes, "size": [len(codes), len(codes[0])]}))
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_encoder_out_of_memory_names_the_batch_size():
    """A process with 120 MiB left: its allocations fail as on a machine that is full."""
    done = subprocess.run([warm_python.PYTHON, "-c", FULL, YAML], capture_output=True, text=True, timeout=120)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["said"].startswith("960 images at once do not fit into the memory of cpu (")
    assert found["said"].endswith("give a smaller --batch_size.") and found["equal"] and found["size"] == [32, 32]
