"""SEED-X's pretraining as configurations of the tuning's program: they are read, and say what the paper says."""

from __future__ import annotations

from pathlib import Path

from seed_multimodal.data.stream.config import read_data_settings
from seed_multimodal.training.llm.cli import compose
from seed_multimodal.training.llm.config import for_run, read_run
from seed_multimodal.training.seed_x.tuning import read_agent, read_encoder

CONFIGS = Path(__file__).resolve().parents[4] / "MultiModalLLM" / "configs"


def test_the_recipe_is_read() -> None:
    run = read_run(compose(["output_dir=x"], CONFIGS, "train_seed_x_pretrain"))
    tuning = read_run(compose(["output_dir=x"], CONFIGS, "train_seed_x_sft"))
    assert run.agent is not None and tuning.agent is not None and run.visual_encoder is not None
    agent, tuned = read_agent(run.agent), read_agent(tuning.agent)
    assert agent.path is None and tuned.path and agent.losses == tuned.losses
    assert agent.input_resampler == tuned.input_resampler and agent.output_resampler == tuned.output_resampler
    assert read_encoder(run.visual_encoder) == read_encoder(tuning.visual_encoder or {})
    model, base = (for_run(one.model, one.trainer, True) for one in (run, tuning))
    assert model.path.endswith("llama-2-13b-chat") and model.lora == base.lora and model.lora is not None
    assert (run.optim["learning_rate"], run.optim["lr_scheduler_type"]) == (1e-4, "cosine")
    data = read_data_settings(run.data)
    assert {source.name for source in data.sources} == {
        "laion_coco", "sam", "unsplash", "laion_aesthetics", "journeydb", "capsfusion"}
    for source in data.sources:
        assert source.decoder == "seed_x.caption" and source.options["img_first_ratio"] == 0.5
        assert "[INST]" not in source.options["instruction_prompt"] and not source.options.get("add_gen_prompt")
