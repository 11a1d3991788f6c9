"""SEED-X's pretraining as configurations of the tuning's program: they are read, and say what the paper says."""

from __future__ import annotations

from pathlib import Path

from seed_multimodal.training.llm.cli import compose
from seed_multimodal.training.seed_x.tuning import TuningTask

CONFIGS = Path(__file__).resolve().parents[4] / "MultiModalLLM" / "configs"


def test_the_recipe_is_read() -> None:
    run = TuningTask.read(compose(["output_dir=x"], CONFIGS, "train_seed_x_pretrain"))
    tuning = TuningTask.read(compose(["output_dir=x"], CONFIGS, "train_seed_x_sft"))
    agent, tuned, model, base = run.agent, tuning.agent, run.model, tuning.model
    assert agent.path is None and tuned.path and agent.losses == tuned.losses
    assert agent.input_resampler == tuned.input_resampler and agent.output_resampler == tuned.output_resampler
    assert run.visual_encoder == tuning.visual_encoder
    assert model.path.endswith("llama-2-13b-chat") and model.lora == base.lora and model.lora is not None
    assert (run.optim.learning_rate, run.optim.lr_scheduler_type) == (1e-4, "cosine")
    data = run.data
    assert {source.name for source in data.sources} == {
        "laion_coco", "sam", "unsplash", "laion_aesthetics", "journeydb", "capsfusion"}
    for source in data.sources:
        assert source.decoder == "seed_x.caption" and source.options["img_first_ratio"] == 0.5
        assert "[INST]" not in source.options["instruction_prompt"] and not source.options.get("add_gen_prompt")
