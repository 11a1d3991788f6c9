"""A run from its configuration to its last checkpoint: start or resume, steps, logs, evaluation, saving, the end.

What: `train_llm(config)` trains as a composed configuration says and returns the run's record.
Peculiar: every number of a step follows from (seed, step, process): data from their own state, dropout from a seed per
micro-step. A run killed at any step and started again goes on with the same losses to the last bit (on a CPU).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from seed_multimodal.data.stream.data_settings import read_data_settings
from seed_multimodal.data.stream.llm_batches import LlmBatches
from seed_multimodal.errors import ConfigError
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.quiet import quiet_libraries
from seed_multimodal.training.checkpoint_folders import check_shared, output_folder_lock
from seed_multimodal.training.distributed import StopRequest
from seed_multimodal.training.failures import STOPPED, TrainingError, Watchdog, translate_errors
from seed_multimodal.training.llm.checkpoint import Checkpoints, Engine, load_engine, load_weights, read_states
from seed_multimodal.training.llm.engine import PlainEngine, round_residual
from seed_multimodal.training.llm.flops import token_flops
from seed_multimodal.training.llm.fp8 import keep_out_of_ddp
from seed_multimodal.training.llm.loss import LossModule, LossWeights, find_llama
from seed_multimodal.training.llm.metrics import RunProgress
from seed_multimodal.training.llm.model import build_llm
from seed_multimodal.training.llm.model_settings import LlmModelSettings, find_folder, read_model_settings
from seed_multimodal.training.llm.optim import build_optimizer, read_optim
from seed_multimodal.training.llm.processes import Processes, start_processes
from seed_multimodal.training.llm.same_run import check_same_run
from seed_multimodal.training.llm.stepping import OptimizerStep, held_out
from seed_multimodal.training.llm.summary import join_reports, save_config, summary_lines
from seed_multimodal.training.llm.trainer_settings import RunSettings, read_run
from seed_multimodal.training.llm.zero import ZeroEngine, fill_config
from seed_multimodal.training.state import write_json


def train_llm(config: Mapping[str, Any]) -> dict[str, Any]:
    """Train as a resolved configuration says; under torchrun every process calls it.

    Returns:
        The run's record, also `output_dir/summary.json`: steps, seconds, tokens, last loss, evaluation, data, folder.

    Raises:
        SeedError: settings, data, weights or a machine with which the run cannot go on; checkpoints stay intact.
        SystemExit: 143 after SIGTERM; the step was finished and saved.
    """
    run = read_run(config)
    quiet_libraries(libraries=("transformers", "DeepSpeed", "accelerate"))
    with translate_errors("the start", "nothing was trained yet"):
        processes = start_processes(run.trainer.device, run.trainer.timeout_minutes,
                                    group_of_one=run.deepspeed is not None)
    clean = False
    try:
        with (output_folder_lock(run.output_dir, processes.peers),
              Watchdog(60 * run.trainer.timeout_minutes if processes.world > 1 else 0, "train.py") as watchdog):
            with translate_errors("the start", "nothing was trained yet"):
                trainer = Trainer(run, processes, watchdog)
            try:
                record = trainer.train()
            except SystemExit:
                clean = True
                raise
            finally:
                trainer.close()
        clean = True
        return record
    finally:
        processes.close(clean)


class Trainer:
    """One run in one process."""

    def __init__(self, run: RunSettings, processes: Processes, watchdog: Watchdog) -> None:
        """Open data, build or restore model, optimiser and logs. Raises as `train_llm`."""
        self.run, self.settings, self.processes, self.peers = run, run.trainer, processes, processes.peers
        self.device, self.watchdog = processes.device, watchdog
        if self.peers.first:
            save_config(run.output_dir, run.plain)
        check_shared(run.output_dir / "config.yaml", self.peers)
        self.optim = read_optim(run.optim)
        model_settings = self._model_settings()
        self.tokenizer = MultimodalTokenizer.from_pretrained(find_folder(run.tokenizer))
        data_settings = read_data_settings(run.data)
        by_tokens = (self.settings.loss_average or ("tokens" if data_settings.packing else "batch")) == "tokens"
        self.weights = LossWeights(self.tokenizer.vocabulary.n_text, self.settings.text_weight,
                                   self.settings.image_weight)
        self.data = LlmBatches(data_settings, self.tokenizer, rank=processes.rank, world=processes.world,
                               workers=self.settings.dataloader_num_workers, log=self._log)
        self.checkpoints = Checkpoints(run.output_dir, self.peers, limit=self.settings.save_total_limit,
                                       asynchronous=self.settings.async_save, log=self._log)
        self._held_out = held_out(run, self.tokenizer, processes, self._log)
        folder = self.checkpoints.find(self.settings.resume)
        self.step = 0
        self.smooth: dict[str, float] = {}
        self.identity = self._identity(model_settings)
        state, places = self._found(folder)
        with translate_errors("the start", self.checkpoints.left()):
            self.llm = build_llm(model_settings, self.tokenizer, self.device)
            if folder is not None:
                load_weights(folder, self.llm)
            flops = token_flops(self.llm, 1.0)  # now: ZeRO-3 takes the weights apart
            self.engine = self._engine(data_settings.rows)
            if folder is not None:
                load_engine(folder, self.step, self.engine)
        self.maker = OptimizerStep(self.engine, self.data, self.settings, self.optim, processes, self.weights,
                               by_tokens=by_tokens)
        if places:
            self.data.restore(places)
            self._log(f"goes on from {folder} (step {self.step}).")
        self.started = time.monotonic() - state.get("seconds", 0.0)
        self.progress = RunProgress(self.settings, self.step, run.output_dir, self.peers, self.device, self.smooth,
                                    lambda: self.data.wait_seconds, flops)
        self.progress.total.update(state.get("total", {}))
        self.progress.history.extend(state.get("log_history", []))
        self.evaluation: dict[str, float] = self.peers.gather(self.progress.evaluated())[0] or state.get(
            "evaluation", {})
        self._describe()

    def close(self) -> None:
        """Stop data workers and finish logs; a checkpoint under way is completed."""
        self.checkpoints.join()
        self.data.close()
        self.progress.close()

    def train(self) -> dict[str, Any]:
        """Make the steps that are left; returns the record."""
        with StopRequest() as stop:
            stopped = ended = False
            while self.step < self.settings.max_steps and not stopped and not ended:
                where = f"step {self.step + 1}"
                self.watchdog.beat(where, self.checkpoints.left())
                with translate_errors(where, self.checkpoints.left()):
                    waiting = self.checkpoints.problem or self.progress.problem
                    done = self.maker.make(self.step, broken=waiting is not None, stop=stop.asked)
                if done.problem:
                    raise self._failure(done.problem)
                stopped, ended = done.stopped, done.ended
                if done.numbers is None:
                    break
                self.step += 1
                with translate_errors(where, self.checkpoints.left()):
                    self.progress.add(self.step, done.numbers)
                begun = time.monotonic()
                if self.settings.eval_steps and self.step % self.settings.eval_steps == 0:
                    self._evaluate()
                if self.settings.save_steps and self.step % self.settings.save_steps == 0:
                    self._save()
                self.progress.pause(time.monotonic() - begun)
            with translate_errors(f"the end (step {self.step})", self.checkpoints.left()):
                self._end(stopped, ended)
        with translate_errors(f"the end (step {self.step})", self.checkpoints.left()):
            return self._record()

    def _failure(self, problem: str) -> Exception:
        """The sentence for a step that must not be made."""
        self.checkpoints.join()
        own = self.checkpoints.problem or self.progress.problem
        if own is not None:
            return own
        reason = problem or "The loss is not finite, or a file cannot be written, in another process"
        return TrainingError(f"{reason} at step {self.step + 1}; {self.checkpoints.left()}.")

    # ---------------------------------------------------------------------------------------- evaluation and saving

    def _evaluate(self) -> None:
        """Mean loss of the evaluation mixture's first micro-batches; training does not notice."""
        if self._held_out is None:
            return
        with translate_errors(f"the evaluation after step {self.step}", self.checkpoints.left()):
            total, count, text, text_count, image, image_count = self.maker.evaluate(self._held_out)
        if not text_count + image_count:
            self._log("eval_data has nothing to learn in its first micro-batches, so there is no evaluation.")
            return
        line = {"eval_loss": total / max(count, 1e-8)}
        if image_count:
            line |= {"eval_text_loss": text / max(text_count, 1), "eval_image_loss": image / image_count}
        self.evaluation = {"step": self.step, **line}
        self.progress.write(self.step, self.evaluation)

    def _save(self) -> None:
        self.watchdog.beat(f"saving step {self.step}", self.checkpoints.left())
        with translate_errors(f"saving step {self.step}", self.checkpoints.left()):
            place = self.data.state(self.step * self.settings.gradient_accumulation_steps)
            self.checkpoints.save(self.step, self.engine, self.llm, self.tokenizer, self._state(), place)

    def _state(self) -> dict[str, Any]:
        return {"global_step": self.step, **self.identity, "seconds": time.monotonic() - self.started,
                "smooth": dict(self.smooth), "total": dict(self.progress.total), "evaluation": self.evaluation,
                "log_history": self.progress.history, "config": self.run.plain}

    def _end(self, stopped: bool, ended: bool) -> None:
        """The last checkpoint and evaluation; exits if the run was stopped.

        Raises:
            TrainingError: the data ended before the first step, so there is nothing to save.
        """
        if ended and not self.step:
            raise TrainingError("No source gave a single sequence to learn from (what was passed over is named above), "
                                "so nothing was trained; `seed data check` says more.")
        if ended:
            self.progress.finish(self.step)
            self._log(f"every source is used up after step {self.step}; the run ends here.")
        if self.settings.eval_steps and not stopped and self.evaluation.get("step") != self.step:
            self._evaluate()
        self.checkpoints.finish()  # in all processes, so that they agree on what is saved
        if self.checkpoints.saved != self.step and self.step > 0:
            self._save()
        self.checkpoints.finish()
        if stopped:
            self._log(f"stopped by SIGTERM after step {self.step} of {self.settings.max_steps}; the same command goes "
                      f"on from {self.checkpoints.home / f'checkpoint-{self.step}'}.")
            raise SystemExit(STOPPED)

    def _record(self) -> dict[str, Any]:
        data = join_reports(self.peers.gather(self.data.report()))  # type: ignore[arg-type]
        history = self.progress.history
        record = {"steps": self.step, "seconds": round(time.monotonic() - self.started, 1),
                  "tokens": self.progress.total["tokens"], "positions": self.progress.total["positions"],
                  "loss": history[-1]["loss"] if history else None, "evaluation": self.evaluation, "data": data,
                  "processes": self.processes.world,
                  "checkpoint": str(self.checkpoints.place)}
        if self.peers.first:
            write_json(self.run.output_dir / "summary.json", record)
            for line in summary_lines(record):
                self._log(line)
        return record

    # ---------------------------------------------------------------------------------------------------- the start

    def _model_settings(self) -> LlmModelSettings:
        """The model's settings with what the trainer and the engine ask of them."""
        found = read_model_settings(self.run.model)
        if self.settings.gradient_checkpointing is not None:
            found = replace(found, gradient_checkpointing=self.settings.gradient_checkpointing)
        if self.settings.compile is not None:
            found = replace(found, compile=self.settings.compile)
        if self.settings.precision == "fp32":
            found = replace(found, dtype="fp32", trained_dtype="fp32")
        if self.run.deepspeed is not None and found.quantization is not None:
            raise ConfigError("A quantised base cannot be spread by DeepSpeed; use the plain engine.")
        if self.run.deepspeed is not None and found.fp8:
            raise ConfigError("DeepSpeed would cast fp8 weights back to the run's precision; use the plain engine.")
        return found

    def _engine(self, rows: int) -> Engine:
        module = LossModule(self.llm, kind=self.settings.loss_kernel, weights=self.weights)
        optimizer = build_optimizer(module, self.optim)
        if self.run.deepspeed is None:
            round_residual(module, self.settings.precision)
            keep_out_of_ddp(module)
            return PlainEngine(module, optimizer, self.settings, self.processes)
        if self.optim.name == "muon":
            raise ConfigError("optim: muon runs on the plain engine only; use adamw or adamw_hf with DeepSpeed.")
        config, remarks = fill_config(self.run.deepspeed, self.settings, world=self.processes.world, rows=rows,
                                      hidden_size=int(find_llama(self.llm).config.hidden_size))
        for remark in remarks:
            self._log(remark)
        return ZeroEngine(module, optimizer, self.settings, self.processes, config)

    def _identity(self, model: LlmModelSettings) -> dict[str, Any]:
        """What a checkpoint says of its run, so that another run does not go on from it."""
        zero = (self.run.deepspeed or {}).get("zero_optimization", {})
        return {"engine": "plain" if self.run.deepspeed is None else "deepspeed", "zero_stage": zero.get("stage", 0),
                "model": {"path": model.path, "sizes": model.sizes, "lora": model.lora,
                          "words": self.tokenizer.vocabulary.size},
                "optimizer": self.optim.name, "world_size": self.processes.world,
                "max_steps": self.settings.max_steps,
                "rows_per_step": self.processes.world * self.settings.gradient_accumulation_steps}

    def _found(self, folder: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """State and places in the data of the checkpoint to go on from, if this run can."""
        if folder is None:
            return {}, []
        state, places = read_states(folder)
        for remark in check_same_run(folder, state, self.identity, self.run.plain):
            self._log(f"{remark}.")
        self.step = int(state["global_step"])
        self.smooth.update(state["smooth"])
        return state, places

    def _describe(self) -> None:
        trained = sum(p.numel() for p in self.engine.module.parameters() if p.requires_grad)
        total = sum(getattr(p, "ds_numel", p.numel()) for p in self.engine.module.parameters())
        self._log(f"{trained:,} of {total:,} parameters are trained in {self.settings.precision}, "
                  f"{self.processes.world} process{'es' if self.processes.world > 1 else ''} on {self.device.type}, "
                  f"{self.engine.kind}; {'mean over tokens' if self.maker.by_tokens else 'mean of micro-batches'}; "
                  f"output in {self.run.output_dir}.")

    def _log(self, text: str) -> None:
        if self.peers.first:
            print(f"[train] {text}", flush=True)
