"""ZeRO on CPUs: two processes make the losses of one, shards are resumed from, stages and world sizes are not mixed.

DeepSpeed compiles its shared-memory operator at the first start (under a minute; needs g++ and ninja).
"""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest

pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None,
                       reason="DeepSpeed on a CPU needs the package and g++")]


def close(found: dict[int, float], expected: dict[int, float]) -> bool:
    return found.keys() == expected.keys() and all(abs(found[step] - expected[step]) < 2e-5 for step in expected)


@pytest.mark.process
def test_zero_two_of_two_processes_is_one_process_and_resumes(runs, train, tmp_path):
    """LoRA without dropout (each process draws its own); two micro-batches in one process, one in each of two."""
    lora = {"model": {"lora": {**runs.LORA, "lora_dropout": 0.0}}}
    one = train("one", "trainer.gradient_accumulation_steps=2", "trainer.max_steps=4", **lora)
    files = runs.write_files(tmp_path / "files", **lora)
    two = tmp_path / "two"
    arguments = runs.overrides(files, two, "trainer.max_steps=4", "trainer.save_steps=2", "deepspeed=stage2_bf16",
                               "trainer.timeout_minutes=10")
    runs.run(arguments, before=runs.torchrun(), timeout=600)
    whole = runs.losses(two)
    assert close(whole, runs.losses(one))
    names = {path.relative_to(two / "checkpoint-4").as_posix() for path in (two / "checkpoint-4").rglob("*")}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.model", "trainer_state.json", "latest",
            "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
            "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt"} <= names
    assert names - set(json.loads((two / "checkpoint-4" / "manifest.json").read_text())["files"]) == {
        "manifest.json", "global_step4"}

    shutil.rmtree(two / "checkpoint-4")
    said, _ = runs.run(arguments, before=runs.torchrun(), timeout=600)
    assert "resumes from" in said and "(step 2)" in said
    assert runs.losses(two) == whole

    _, refused = runs.run(arguments, code=2)
    assert "belong to 2 processes, this run has 1" in refused and refused.count("\n") <= 3


@pytest.mark.process
def test_zero_three_with_offload_trains_and_its_adapter_is_whole(runs, train, tmp_path):
    lora = {"model": {"lora": {**runs.LORA, "lora_dropout": 0.0}}}
    plain = train("plain", "trainer.max_steps=3", **lora)
    zero = tmp_path / "zero"
    arguments = runs.overrides(runs.write_files(tmp_path / "files", **lora), zero, "deepspeed=stage3_offload_bf16",
                               "trainer.timeout_minutes=10")
    runs.run([*arguments, "trainer.max_steps=3"], timeout=600)
    assert close(runs.losses(zero), runs.losses(plain))
    from seed_multimodal.weights import load_state_dict

    own, other = (load_state_dict(folder / "checkpoint-3" / "adapter_model.safetensors") for folder in (zero, plain))
    assert own.keys() == other.keys()
    assert all(own[name].shape == value.shape and (own[name] - value).abs().max() < 1e-3
               for name, value in other.items())
