"""The whole nano line at toy size, as a real second process, ending in a system that loads and answers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(400)
def test_the_line_ends_in_a_system_that_answers(tmp_path: Path) -> None:
    out = tmp_path / "system"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "seed_multimodal.training.nano", "--config", str(ROOT / "configs/nano/test.yaml"),
               "--data", str(ROOT / "data/nano64"), "--work", str(tmp_path / "work"), "--out", str(out)]
    first = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=380)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    index = json.loads((out / "seed_tokenizer/diffusion_model/model_index.json").read_text())
    assert index["_class_name"] == "StableUnCLIPImg2ImgPipeline"

    again = subprocess.run([*command, "--only", "vae,clip,stage2,unet2,sft"], env=environment, capture_output=True,
                           text=True, timeout=120)
    assert again.returncode == 0 and again.stdout.count("already done") == 5, again.stdout[-2000:]

    from seed_multimodal import SeedLlama
    seed = SeedLlama.from_pretrained(out)
    picture = Image.new("RGB", (80, 50), (200, 30, 30))
    codes = seed.tokenize([picture])
    assert codes.shape == (1, 32) and (codes[0] // 2).tolist() == list(range(32))  # 64 codes: two a position
    rebuilt = seed.reconstruct([picture], num_inference_steps=2)
    assert len(rebuilt) == 1 and rebuilt[0].size == (64, 64)
    assert isinstance(seed.describe(picture, max_new_tokens=8), str)
    assert seed.draw("a red square", num_inference_steps=2).size == (64, 64)
