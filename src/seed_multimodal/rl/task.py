"""GRPO (Shao et al. 2024, arXiv:2402.03300) on image codes, in one process or DDP.

A step, always on-policy:

    batches      prompts -> groups of drawings by the engine, which shares the trained module
                 -> pixels -> rewards -> advantages: the distance from the group's mean
    loss         the answers' log-probabilities in the distribution from which they were sampled,
                 weighted by their advantages, and the distance from the start (`RlTask.objective`)

Prompts and seeds follow from the step, so a killed and resumed run is bit-equal (on a CPU).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.config import project_path
from seed_multimodal.data.stream.order import sample_seed
from seed_multimodal.data.stream.step_batches import ListedSamples, StepBatches
from seed_multimodal.disk import JsonObject
from seed_multimodal.errors import ConfigError, DataError
from seed_multimodal.evaluation.annotations import read_items
from seed_multimodal.fingerprints import fingerprint
from seed_multimodal.images.sheet import Cell, Row, contact_sheet
from seed_multimodal.inference.base_engine import GeneratedSequence
from seed_multimodal.inference.sampling import Sampler
from seed_multimodal.language.answer import ImagePart
from seed_multimodal.language.messages import user_message
from seed_multimodal.pipelines.base import MultimodalSystem
from seed_multimodal.rl.config import RlRunSettings, RlTrainerSettings
from seed_multimodal.rl.rewards import Records, checked_rewards, open_reward, weighted_sum
from seed_multimodal.training.config import refuse_unread
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.llm.lora import add_lora, is_lora
from seed_multimodal.training.llm.task import LanguageModelTask
from seed_multimodal.training.meters import Meter, Metrics
from seed_multimodal.training.optimizers import build_optimizer
from seed_multimodal.training.task import Identity, RunView

SAMPLED = {"do_sample": True, "num_beams": 1, "guidance": 1, "top_p": 1.0, "top_k": 0}
DRAWN_AT_ONCE = 32
SHEET_GROUPS = 6  # of the samples
FLAT = 1e-6  # distance from a group's mean, relative to it or to 1


@dataclass
class ScoredAnswer:
    """A drawing with its weighted reward (NaN: none applies), and its weight in the loss."""

    prompt: str
    request: GeneratedSequence
    image: Image.Image
    reward: float
    advantage: float = 0.0


@dataclass
class AnswerBatch:
    """A micro-batch, with the means of its step in all processes."""

    answers: Sequence[ScoredAnswer]
    means: Mapping[str, float]


class RlTask(LanguageModelTask):
    """One run in one process."""

    run: RlRunSettings
    settings: RlTrainerSettings
    plain_attention = False
    start_hint = "model.system"
    run_type = RlRunSettings

    def __init__(self, run: RlRunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Read the prompts. Raises as `RunTask.train`."""
        super().__init__(run, group, device)
        if run.deepspeed is not None:
            raise ConfigError("A training by rewards has no DeepSpeed; leave deepspeed out.")
        if run.model.lora is None:
            refuse_unread(run.model, ["seed"], "model", "without lora")
        for key in {"batch_size", "codes"} & run.data.drawing.keys():
            raise ConfigError(f"data: drawing: {key} is not read; codes are data.rewarded_codes.")
        self.records = read_prompts(run.data.prompts)
        self.eval_records: Records = ()
        if run.data.eval_prompts is not None and self.settings.eval_steps:
            self.eval_records = read_prompts(run.data.eval_prompts)
            self.eval_steps = self.settings.eval_steps
        prompts_per_step = run.data.batch_size * self.settings.gradient_accumulation_steps
        self.prompts_per_step = prompts_per_step
        self.prompts: StepBatches[list[JsonObject]] = StepBatches(
            [ListedSamples(self.records)],
            prompts_per_step,
            seed=run.data.seed,
            rank=group.rank,
            world=group.world,
            collate=list,
        )
        self.parts = [self.prompts]
        self.meter = Meter(prompts_per_step * run.data.group_size)
        self.answers: list[ScoredAnswer] = []  # of this process's step

    # ---- the model

    def prepare(self) -> None:
        """Load the system, whose language model is trained, and the rewards."""
        super().prepare()
        model = self.run.model
        self.system = MultimodalSystem.from_pretrained(
            model.system, device=str(self.device), dtype=torch.float32, log=None
        )
        config = self.system.config
        self.family = config.system
        self.tokenizer = self.system.tokenizer
        self.tokenizer_folder = config.path("tokenizer")
        self.base_folder = config.path("llm")
        config.check_ability("draws_codes")

        # 1. The trained weights. Answers are sampled without dropout, so they are learned without.
        llama = self.system.llm.requires_grad_(True)
        for key, value in {**llama.config.to_dict(), **(model.lora or {})}.items():
            if key.endswith("dropout") and value:
                raise ConfigError(
                    f"model: {key} is {value}, but must be 0: answers are sampled without dropout."
                )
        if self.settings.kl_weight and (model.lora or {}).get("bias", "none") != "none":
            raise ConfigError(
                "model: lora: bias must be none where trainer.kl_weight is set: the start's "
                "distribution is that without the adapter."
            )
        start = fingerprint(llama)
        self.reference: nn.Module | None = None
        if model.lora is not None:
            self.llm = add_lora(llama, {"lora_dropout": 0.0, **model.lora}, model.seed)
        else:
            self.llm = llama
            if self.settings.kl_weight:
                self.reference = copy.deepcopy(llama).requires_grad_(False)
        self.module = self.llm
        self.optimizer = build_optimizer(self.module, self.run.optim, self.device)

        # 2. What scores the drawings.
        drawing = self.run.data.drawing
        self.system.images.check_drawing(**drawing)
        self.drawing = {**drawing, "batch_size": DRAWN_AT_ONCE}
        if self.run.data.rewarded_codes is not None:
            config.check_ability("first_codes")
            self.drawing["codes"] = self.run.data.rewarded_codes
        records = [*self.records, *self.eval_records]
        self.rewards = {
            reward.name: (open_reward(reward, records, self.device), reward.weight)
            for reward in self.run.data.rewards
        }

        self.saves_frozen = not is_lora(self.llm)
        decoder = self.system.images.decoder
        self.frozen_models = {"start": start, "de-tokenizer": fingerprint(decoder.denoiser)}
        self.log_sizes(
            f"{self.prompts_per_step} of {len(self.records):,} prompts a step, "
            f"{self.run.data.group_size} drawings of each; "
        )
        if self.eval_steps:
            self._log(
                f"evaluation of {len(self.eval_records):,} prompts every {self.eval_steps} steps "
                "and at the end (trainer.eval_steps=0: none)."
            )

    def identity(self, world: int) -> Identity:
        identity = super().identity(world)
        identity.fixed["lora"] = self.run.model.lora
        return identity

    # ---- a step

    def batches(self, step: int) -> Sequence[AnswerBatch]:
        """Draw and score groups of answers to the step's prompts."""
        # 1. This process's prompts, each once for every answer of its group.
        group_size = self.run.data.group_size
        records: list[JsonObject] = []
        for record in self.prompts.at(step):
            records += [record] * group_size
        seeds = [
            sample_seed(self.settings.seed, step, self.group.rank * len(records) + row)
            for row in range(len(records))
        ]

        # 2. Their answers and rewards.
        self.answers, rewards = self.draw_and_score(records, seeds)

        # 3. Advantages in the groups of all processes. Flat groups teach nothing.
        groups = rewards[:, -1].view(-1, group_size)
        values = advantages(groups, self.settings.spread).flatten().tolist()
        first_answer = self.group.rank * len(records)
        for answer, value in zip(self.answers, values[first_answer:], strict=False):
            answer.advantage = value
        flat = float(flat_groups(groups).double().mean())
        means = {**self.reward_means(rewards), "flat_groups": flat}

        # 4. The micro-batches.
        size = self.run.data.batch_size * group_size
        return [
            AnswerBatch(self.answers[start : start + size], means)
            for start in range(0, len(self.answers), size)
        ]

    def draw_and_score(
        self, records: Records, seeds: Sequence[int]
    ) -> tuple[list[ScoredAnswer], Tensor]:
        """A drawing for each record of this process; the rewards and their weighted sum
        `[N, R + 1]` of the drawings of all processes; collective.

        Raises TrainingError: as `checked_rewards`.
        """
        # 1. Answers that are an image, as `draw` forces them.
        system = self.system
        conversations = [user_message(record["prompt"]) for record in records]
        opening = system.tokenizer.encode_parts([system.tasks.draw_response])
        prompts = [
            prompt.answered_with(opening)
            for prompt in system.family.prompts(conversations, "draw", drawing=self.drawing)
        ]
        length = system.tokenizer.vocabulary.tokens_per_image + 1
        settings = system.settings("draw", **SAMPLED, temperature=self.run.data.temperature)
        settings = replace(settings, images="forced", max_new_tokens=length)
        rows = [replace(settings, seed=seed) for seed in seeds]
        requests = system.engine.run(prompts, rows, records=True)

        # 2. Their pixels.
        inputs: list[Any] = []
        for request in requests:
            (part,) = [part for part in request.reader.parts if isinstance(part, ImagePart)]
            image_input: Any
            (image_input,) = system.family.image_inputs([part], request)
            inputs.append(image_input[: self.run.data.rewarded_codes])
        images = system.family.draw(inputs, prompts, seeds, self.drawing)

        # 3. The rewards, which need not be able to judge no images, and their weighted sum.
        columns: list[Tensor] = []
        for name, (reward, _) in self.rewards.items():
            try:
                # Its own lists: what a function does to them is not the run's.
                values = reward([*images], copy.deepcopy([*records])) if records else []
            except Exception as error:
                error.add_note(f"Reward {name} of data.rewards raised this.")
                raise
            columns.append(checked_rewards(name, values, len(records)))
        totals = weighted_sum(columns, [weight for _, weight in self.rewards.values()])
        texts = [record["prompt"] for record in records]
        answers = map(ScoredAnswer, texts, requests, images, totals.tolist())

        # 4. Those of all processes.
        rows = torch.stack([*columns, totals], dim=1).tolist()
        all_rows = [row for part in self.group.gather({"rows": rows}) for row in part["rows"]]
        return list(answers), torch.tensor(all_rows, dtype=torch.float64)

    def reward_means(self, rewards: Tensor) -> dict[str, float]:
        """Mean and standard deviation (`NAME_std`) of each column of `draw_and_score` over the
        drawings to which the reward applies, if any."""
        line: dict[str, float] = {}
        for name, column in zip([*self.rewards, "reward"], rewards.T, strict=True):
            values = column[column.isfinite()]
            if len(values):
                line[name] = float(values.mean())
                line[f"{name}_std"] = float(values.std()) if len(values) > 1 else 0.0
        return line

    def loss(self, model: nn.Module, batch: AnswerBatch) -> tuple[Tensor, Metrics]:
        """The policy gradient of a micro-batch's answers, and `kl_weight` times their distance from
        the start."""
        # 1. Log-probabilities of the answers' tokens, now and at the start.
        requests = [answer.request for answer in batch.answers]
        log_probs = token_log_probs(model, requests)
        start_log_probs = None
        if self.settings.kl_weight:
            with torch.no_grad(), self.start_model() as start:
                start_log_probs = token_log_probs(start, requests)

        # 2. The loss; tokens whose codes were not drawn do not count.
        losses, distances = self.objective(
            log_probs,
            start_log_probs,
            [answer.advantage for answer in batch.answers],
            [len(request.ids[: self.run.data.rewarded_codes]) for request in requests],
        )

        # 3. What is logged; `drift`: how far the engine's probabilities are from these.
        sampled = pad_sequence(
            [torch.tensor(request.log_probs) for request in requests], batch_first=True
        )
        drift = (sampled.to(log_probs) - log_probs.detach()).abs().max()
        return losses.mean(), {**batch.means, "kl": distances.detach().mean(), "drift": drift}

    def objective(
        self,
        log_probs: Tensor,
        start_log_probs: Tensor | None,
        advantages: Sequence[float],
        lengths: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Loss and distance from the start of each answer `[N]`, means over its first `lengths`
        tokens; a subclass may define another objective.

        log_probs, start_log_probs: `[N, T]`, of the model and of the start (None: no distance).
        """
        # 1. The ratio to the sampled distribution is 1; its gradient is that of the logarithm.
        ratios = (log_probs - log_probs.detach()).exp()
        losses = -log_probs.new_tensor(advantages)[:, None] * ratios

        # 2. The distance from the start, by the estimator of low variance that is never negative.
        distances = torch.zeros_like(log_probs)
        if start_log_probs is not None:
            gaps = start_log_probs - log_probs
            distances = gaps.exp() - gaps - 1
            losses = losses + self.settings.kl_weight * distances

        # 3. Means over the tokens that count.
        counts = log_probs.new_tensor(lengths)
        is_used = torch.arange(log_probs.shape[1], device=log_probs.device) < counts[:, None]
        return (losses * is_used).sum(1) / counts, (distances * is_used).sum(1) / counts

    @contextmanager
    def start_model(self) -> Iterator[nn.Module]:
        """The model with the weights of the start."""
        if self.reference is not None:
            yield self.reference
            return
        with self.llm.disable_adapter():  # type: ignore[operator]
            yield self.llm

    # ---- evaluation and result

    def evaluate(self, run: RunView) -> Mapping[str, float]:
        """Rewards of the evaluation's prompts, one drawing each with the same seeds; empty if the
        run is stopped."""
        n_prompts = len(self.eval_records)
        n_drawn = DRAWN_AT_ONCE * self.group.world
        rewards: list[Tensor] = []
        for start in range(0, n_prompts, n_drawn):
            self._log(f"evaluation after step {run.step}: {start:,} of {n_prompts:,} prompts.")
            if run.stop_requested():
                return {}
            # The same seeds for any number of processes.
            end = min(n_prompts, start + n_drawn)
            rows = range(start + self.group.rank, end, self.group.world)
            records = [self.eval_records[row] for row in rows]
            seeds = [sample_seed(0, 0, row) for row in rows]
            rewards.append(self.draw_and_score(records, seeds)[1])
        means = self.reward_means(torch.cat(rewards))
        return {f"eval_{name}": value for name, value in means.items()}

    def write_samples(self, run: RunView) -> None:
        """Some groups of the last step with their rewards; nothing if this run made no step."""
        if not self.answers:
            return
        group_size = self.run.data.group_size
        rows: list[Row] = []
        for start in range(0, len(self.answers), group_size)[:SHEET_GROUPS]:
            answers = self.answers[start : start + group_size]
            cells = [Cell(answer.image, f"{answer.reward:.2f}") for answer in answers]
            rows.append(Row(answers[0].prompt, cells))
        folder = self.run.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        contact_sheet(rows, f"step {run.step}", cell=96).save(folder / f"step-{run.step}.png")

    def finish(self, run: RunView) -> Mapping[str, object]:
        numbers = self.meter.metrics().items()
        return {
            "rewards": {name: value for name, value in numbers if name not in ("kl", "drift")},
            "evaluation": run.evaluation,
            "checkpoint": str(run.checkpoint),
        }


def flat_groups(rewards: Tensor) -> Tensor:
    """Which groups of rewards `[P, G]` are equal up to rounding, bool `[P]`."""
    means = rewards.nanmean(1, keepdim=True)
    is_apart = (rewards - means).abs() > FLAT * means.abs().clamp(min=1)
    return ~is_apart.any(1)


def advantages(rewards: Tensor, spread: bool) -> Tensor:
    """Distances of rewards `[P, G]` from the means of their groups; 0 in flat groups, and for
    drawings without a reward (NaN), which do not count in their group.

    spread: over the standard deviation of the group.
    """
    gaps = (rewards - rewards.nanmean(1, keepdim=True)).nan_to_num()
    if spread:
        counts = rewards.isfinite().sum(1, keepdim=True)
        gaps = gaps * ((counts - 1) / gaps.square().sum(1, keepdim=True)).sqrt()
    return gaps.masked_fill(flat_groups(rewards)[:, None], 0.0)


def read_prompts(path: str) -> Records:
    """The records of a file of prompts. Raises DataError: no file, or a line without `prompt`."""
    records: list[JsonObject] = []
    for location, record in read_items(project_path(path)):
        prompt = record.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{location}: has no prompt.")
        records.append(record)
    if not records:
        raise DataError(f"{path}: has no prompts.")
    return records


def token_log_probs(model: nn.Module, requests: Sequence[GeneratedSequence]) -> Tensor:
    """Log-probabilities `[N, T]` of the requests' tokens in the distributions from which they were
    sampled, computed anew; behind the end of an answer 0."""
    # 1. Scores after each token, of prompt and answer as one row.
    device = next(model.parameters()).device
    rows = [
        torch.tensor([*request.prompts[0].ids, *request.ids[:-1]], device=device)
        for request in requests
    ]
    ids = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    is_token = torch.arange(ids.shape[1], device=device) < lengths[:, None]
    plans: list[Any] = [request.prompts[0].position_ids for request in requests]
    axes: dict[str, Tensor] = {}
    if plans[0] is not None:
        columns = [plan[:, : len(row)].T for plan, row in zip(plans, rows, strict=True)]
        axes["position_ids"] = pad_sequence(columns, batch_first=True).permute(2, 0, 1).to(device)
    scores = model(input_ids=ids, attention_mask=is_token, use_cache=False, **axes).logits.float()

    # 2. The distributions, by the same constraints and warpers.
    sampler = Sampler()
    log_probs: list[Tensor] = []
    for request, row in zip(requests, scores, strict=True):
        first = len(request.prompts[0].ids) - 1
        prefixes = [request.prefix(length) for length in range(len(request.ids))]
        table = sampler.distributions(prefixes, row[first : first + len(prefixes)]).log_softmax(-1)
        answer = torch.tensor(request.ids, device=device)
        log_probs.append(table.gather(1, answer[:, None])[:, 0])
    return pad_sequence(log_probs, batch_first=True)
