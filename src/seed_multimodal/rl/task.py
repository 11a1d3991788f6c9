"""GRPO (Shao et al. 2024, arXiv:2402.03300) on image codes, in one process or DDP.

A step, always on-policy:

    begin_step   prompts -> groups of drawings by the engine, which shares the trained module
                 -> pixels -> rewards -> advantages: the distance from the group's mean
    loss         the answers' log-probabilities in the distribution from which they were sampled,
                 weighted by their advantages, and the distance from the start

Prompts and seeds follow from the step, so a killed and resumed run is bit-equal (on a CPU).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from seed_multimodal.data.stream.pairs_dataset import sample_seed
from seed_multimodal.data.stream.sampler import EpochOrder
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
from seed_multimodal.rl.rewards import Records, open_reward
from seed_multimodal.training.distributed import ProcessGroup, TrainingError
from seed_multimodal.training.llm.config import project_path
from seed_multimodal.training.llm.lora import add_lora
from seed_multimodal.training.llm.task import LanguageModelTask
from seed_multimodal.training.metrics import Meter, Metrics
from seed_multimodal.training.optimizers import build_optimizer
from seed_multimodal.training.run import RunSettings

SAMPLED = {"do_sample": True, "num_beams": 1, "guidance": 1, "top_p": 1.0, "top_k": 0}
DRAWN_AT_ONCE = 32
SHEET_GROUPS = 6  # of the samples
MIN_SPREAD = 1e-6


@dataclass
class ScoredAnswer:
    """A drawing with its weighted reward, and the answer's weight in the loss."""

    prompt: str
    request: GeneratedSequence
    image: Image.Image
    reward: float
    advantage: float = 0.0


class RlTask(LanguageModelTask):
    """One run in one process."""

    run: RlRunSettings
    settings: RlTrainerSettings
    plain_attention = False
    start_hint = "model.system"
    run_type: ClassVar[type[RunSettings]] = RlRunSettings

    def __init__(self, run: RlRunSettings, group: ProcessGroup, device: torch.device) -> None:
        """Read the prompts. Raises as `RunTask.train`."""
        super().__init__(run, group, device)
        if run.deepspeed is not None:
            raise ConfigError("A training by rewards has no DeepSpeed; leave deepspeed out.")
        self.records = read_prompts(run.data.prompts)
        self.eval_records: Records = ()
        if run.data.eval_prompts is not None:
            self.eval_records = read_prompts(run.data.eval_prompts)
            self.eval_steps = self.settings.eval_steps
        self.order = EpochOrder(len(self.records), run.data.seed)
        prompts_per_step = run.data.batch_size * self.settings.gradient_accumulation_steps
        self.prompts_per_step = prompts_per_step
        self.meter = Meter(prompts_per_step * run.data.group_size)
        self.answers: list[ScoredAnswer] = []  # of this process's step
        self.means: dict[str, float] = {}  # of each reward in it, and of groups without a spread

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
        if not self.system.images.has_codes:
            raise ConfigError(f"model: the images of {model.system} are no codes, as rewards need.")

        # 1. The trained weights.
        llama = self.system.llm.requires_grad_(True)
        self.start = fingerprint(llama)
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
        self.drawing = dict(drawing)
        if self.run.data.rewarded_codes is not None:
            self.drawing["codes"] = self.run.data.rewarded_codes
        records = [*self.records, *self.eval_records]
        self.rewards = {
            reward.name: (open_reward(reward, records, self.device), reward.weight)
            for reward in self.run.data.rewards
        }

    def before_training(self) -> None:
        self.log_sizes(
            f"{self.prompts_per_step} of {len(self.records):,} prompts a step, "
            f"{self.run.data.group_size} drawings of each; "
        )

    def frozen_models(self) -> Mapping[str, str]:
        decoder = self.system.images.decoder
        return {"start": self.start, "de-tokenizer": fingerprint(decoder.denoiser)}

    def identity(self, world: int) -> JsonObject:
        return {**super().identity(world), "lora": self.run.model.lora}

    # ---- a step

    def begin_step(self, step: int) -> bool:
        """Draw and score groups of answers to the step's prompts."""
        # 1. This process's prompts, each once for every answer of its group.
        group_size = self.run.data.group_size
        count = self.prompts_per_step
        first = (step * self.group.world + self.group.rank) * count
        records: list[JsonObject] = []
        for _, index in self.order.samples(first, count):
            records += [self.records[index]] * group_size
        seeds = [
            sample_seed(self.settings.seed, step, self.group.rank * len(records) + row)
            for row in range(len(records))
        ]

        # 2. Their answers and rewards.
        self.answers, means = self.draw_and_score(records, seeds, self.run.data.temperature)

        # 3. Advantages. Groups without a spread teach nothing.
        rewards = torch.tensor([answer.reward for answer in self.answers]).view(-1, group_size)
        advantages = rewards - rewards.mean(1, keepdim=True)
        spread = rewards.std(1, keepdim=True)
        if self.settings.spread:
            advantages = advantages / spread.clamp(min=MIN_SPREAD)
        for answer, advantage in zip(self.answers, advantages.flatten().tolist(), strict=True):
            answer.advantage = advantage
        self.means = {**means, "flat_groups": float((spread < MIN_SPREAD).float().mean())}
        return True

    def draw_and_score(
        self, records: Records, seeds: Sequence[int], temperature: float
    ) -> tuple[list[ScoredAnswer], dict[str, float]]:
        """A drawing for each record with its reward; the mean of each reward and of their sum.

        Raises TrainingError: a reward that is not finite.
        """
        # 1. Answers that are an image, as `draw` forces them.
        system = self.system
        conversations = [user_message(record["prompt"]) for record in records]
        opening = system.tokenizer.encode_parts([system.tasks.draw_response])
        prompts = [
            prompt.answered_with(opening) for prompt in system.family.prompts(conversations, "draw")
        ]
        length = system.tokenizer.vocabulary.tokens_per_image + 1
        settings = system.settings("draw", **SAMPLED, temperature=temperature)
        settings = replace(settings, images="forced", max_new_tokens=length)
        rows = [replace(settings, seed=seed) for seed in seeds]
        requests = system.engine.run(prompts, rows, records=True)

        # 2. Their pixels.
        inputs: list[Sequence[int]] = []
        for request in requests:
            (part,) = [part for part in request.reader.parts if isinstance(part, ImagePart)]
            inputs.append(part.codes[: self.run.data.rewarded_codes])
        drawing = {**self.drawing, "batch_size": DRAWN_AT_ONCE}
        images = system.family.draw(inputs, prompts, seeds, drawing)

        # 3. The weighted sum of the rewards.
        totals = torch.zeros(len(records))
        means: dict[str, float] = {}
        for name, (reward, weight) in self.rewards.items():
            values = torch.tensor(reward(images, records))
            if not values.isfinite().all():
                raise TrainingError(f"Reward {name} is not finite.")
            totals += weight * values
            means[name] = float(values.mean())
        means["reward"] = float(totals.mean())
        texts = [record["prompt"] for record in records]
        scored = map(ScoredAnswer, texts, requests, images, totals.tolist())
        return list(scored), means

    def loss(self, model: nn.Module, micro_step: int) -> tuple[Tensor, Metrics]:
        """The policy gradient of a micro-batch's answers, and `kl_weight` times their distance from
        the start."""
        # 1. Log-probabilities of the answers' tokens; those whose codes were not drawn do not
        #    count.
        size = self.run.data.batch_size * self.run.data.group_size
        index = micro_step % self.settings.gradient_accumulation_steps
        answers = self.answers[index * size : (index + 1) * size]
        requests = [answer.request for answer in answers]
        log_probs = token_log_probs(model, requests)  # [N, T], padded by 0
        is_used = torch.zeros_like(log_probs)
        for row, request in enumerate(requests):
            is_used[row, : len(request.ids)][: self.run.data.rewarded_codes] = 1.0
        lengths = is_used.sum(1)

        # 2. The ratio to the sampled distribution is 1; its gradient is that of the logarithm.
        advantages = log_probs.new_tensor([answer.advantage for answer in answers])
        ratios = (log_probs - log_probs.detach()).exp()
        losses = -advantages[:, None] * ratios

        # 3. The distance from the start, by the estimator of low variance that is never negative.
        kl = torch.zeros_like(log_probs)
        if self.settings.kl_weight:
            with torch.no_grad(), self.start_model() as start:
                start_log_probs = token_log_probs(start, requests)
            gap = start_log_probs - log_probs
            kl = gap.exp() - gap - 1
            losses = losses + self.settings.kl_weight * kl
        loss = ((losses * is_used).sum(1) / lengths).mean()

        # 4. What is logged; `drift`: how far the engine's probabilities are from these.
        sampled = pad_sequence(
            [torch.tensor(request.log_probs) for request in requests], batch_first=True
        )
        drift = (sampled.to(log_probs) - log_probs.detach()).abs().max()
        distance = ((kl.detach() * is_used).sum(1) / lengths).mean()
        return loss, {**self.means, "kl": distance, "drift": drift}

    @contextmanager
    def start_model(self) -> Iterator[nn.Module]:
        """The model with the weights of the start."""
        if self.reference is not None:
            yield self.reference
            return
        with self.llm.disable_adapter():  # type: ignore[operator]
            yield self.llm

    # ---- evaluation and result

    def evaluate(self, step: int) -> Mapping[str, float]:
        """Mean rewards of the evaluation's prompts, one drawing each with the same seeds."""
        rows = range(self.group.rank, len(self.eval_records), self.group.world)
        records = [self.eval_records[row] for row in rows]
        seeds = [sample_seed(0, 0, row) for row in rows]  # for any number of processes
        _, means = self.draw_and_score(records, seeds, self.run.data.temperature)
        counted = [len(records), *(value * len(records) for value in means.values())]
        total, *sums = self.group.sum(counted)
        return {f"eval_{name}": value / total for name, value in zip(means, sums, strict=True)}

    def write_samples(self, step: int) -> None:
        """Some groups of the last step with their rewards."""
        group_size = self.run.data.group_size
        rows: list[Row] = []
        for start in range(0, len(self.answers), group_size)[:SHEET_GROUPS]:
            answers = self.answers[start : start + group_size]
            cells = [Cell(answer.image, f"{answer.reward:.2f}") for answer in answers]
            rows.append(Row(answers[0].prompt, cells))
        folder = self.run.output_dir / "samples"
        folder.mkdir(exist_ok=True)
        contact_sheet(rows, f"step {step}", cell=96).save(folder / f"step-{step}.png")

    def finish(self, group: ProcessGroup) -> Mapping[str, object]:
        return {
            "rewards": self.means,
            "evaluation": self.trainer.evaluation,
            "checkpoint": str(self.trainer.store.last_folder),
        }


def read_prompts(path: str) -> Records:
    """The records of a file of prompts. Raises DataError: no file, or a line without `prompt`."""
    records: list[JsonObject] = []
    for location, record in read_items(project_path(path), "prompts"):
        if not isinstance(record, dict) or not str(record.get("prompt") or "").strip():
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
    scores = model(input_ids=ids, attention_mask=is_token, use_cache=False).logits.float()

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
