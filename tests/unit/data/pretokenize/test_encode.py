"""The encoder: a batch that does not fit into memory, and a machine that cannot compile."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import warm_python
from torch._inductor import config as inductor_config

from seed_multimodal.data.pretokenize.encode import Encoder, EncoderSettings, compiles
from seed_multimodal.device import is_out_of_memory

YAML = str(Path(__file__).resolve().parents[4] / "MultiModalLLM" / "configs" / "tokenizer" / "nano.yaml")


FULL = """
import json, resource, sys
from pathlib import Path
import torch
from seed_multimodal.data.pretokenize.encode import Encoder, EncoderSettings
torch.set_num_threads(1)
said = []
encoder = Encoder(EncoderSettings(sys.argv[1], device="cpu"), said.append)
pixels = torch.randint(256, (960, 3, 64, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
rows = list(pixels)
wanted = torch.cat([encoder.start(rows[at:at + 32]).result() for at in range(0, 960, 32)])
before = list(said)
pages = int(Path("/proc/self/statm").read_text().split()[0])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 120 * 2**20, hard))
codes = encoder.start(rows).result()
most = encoder.most
later = encoder.start(rows[:most + 5]).result()
print(json.dumps({"before": before, "said": said, "most": [most, encoder.most], "shape": list(codes.shape),
                  "equal": (codes == wanted).float().mean().item(),
                  "later": (later == wanted[:most + 5]).float().mean().item()}))
"""


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads /proc")
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost():
    """A process with 120 MiB left: its allocations fail as on a machine that is full."""
    done = subprocess.run([warm_python.PYTHON, "-c", FULL, YAML], capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    said, (most, still) = found["said"], found["most"]
    assert not found["before"] and said and said[0].startswith("960 pictures")
    assert all("pictures at once do not fit" in line and "nothing is lost" in line for line in said)
    # At the edge the later call may find a little less memory than the first, and halves once more.
    assert still in (most, most // 2) and still == 960 // 2**len(said) and most < 960
    assert found["shape"] == [960, 32] and min(found["equal"], found["later"]) > 0.999  # sums are rounded by batch


def test_other_errors_pass():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes")) and not is_out_of_memory(ValueError("not enough memory"))
    encoder = Encoder(EncoderSettings(YAML, device="cpu"))
    with pytest.raises(RuntimeError, match="stack"):
        encoder.start([torch.zeros(3, 64, 64).byte(), torch.zeros(3, 32, 32).byte()])


@pytest.mark.slow
@pytest.mark.process
def test_compiles_without_a_compiler_runs_uncompiled(monkeypatch, tmp_path):
    said: list[str] = []
    plain, encoder = (Encoder(EncoderSettings(YAML, device="cpu", compile=choice)) for choice in (False, True))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    encode, pixels = encoder._encode_pixels, torch.rand(2, 3, 64, 64)
    try:
        with inductor_config.patch({"cpp.cxx": (None, "/nowhere/a-compiler")}):
            assert not compiles(encode, 64, torch.device("cpu"), said.append)
            assert torch.equal(encode(pixels), plain._encode_pixels(pixels))
    finally:
        torch.compiler.set_stance("default")
    assert "--no-compile" in said[0] and "cannot be compiled here" in said[1]
