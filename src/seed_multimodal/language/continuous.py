"""`ContinuousLVLM`: a stock LLaMA that reads pictures as features and writes them as features (SEED-X's "agent").

                 features [256, 4096] ─► input resampler + place of the view ─► 64 embeddings ─┐
    words ─► embeddings ───────────────────────────────────────────────────────────────────────┴► LLaMA ─► words
                                                  states at 64 image words ─► output resampler ─► features [64, 4096]

Training: cross-entropy of the words, and the distance of the written features to those of the picture, averaged over
each 4 neighbours. Note: the states are those AT the image words, after the final norm, not those that predict them; and
½ · [x, y, 1-x, 1-y] weighs the four vectors of a view's place (the paper leaves out the ½). Source: SEED-X (arXiv
2404.14396) and its released code (`seed_x.py`); parameter names are the released ones.

Both resamplers take part in every step, once and at the same place, with numbers that count for nothing where the batch
has no picture for them: all processes compute gradients of the same parameters, and ZeRO-3 gathers them in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from seed_multimodal.errors import ConfigError, DataError, GenerationError, RequestError
from seed_multimodal.language.agent_weights import load_agent
from seed_multimodal.language.answer import AnswerPart, ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings, ImageStates, generate_ids
from seed_multimodal.language.seed_x import answer_text, seed_x_words
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.settings import check_settings, setting

IGNORED = -100
POOLED = 4  # neighbours that are averaged to one target


@dataclass(frozen=True)
class AgentSettings:
    """Weights of the two losses; whether views have a place; targets averaged over 4 neighbours (`vit_down`); squared
    distance (`mse`) or 1 - cosine. The defaults are the released values."""

    lm_loss_scale: float = setting(1.0, least=0)
    rec_loss_scale: float = setting(6.0, least=0)
    add_patch_pos: bool = True
    vit_down: bool = True
    mse: bool = True

    def __post_init__(self) -> None:
        check_settings(self, "agent")


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
        ids: words, `<s>` first; pictures as `SeedXVocabulary.read_ids` gives them.
        features: [views, N, K] of the tower, of all views of all pictures in order; None without pictures.
        positions: [views, 2], the centre of each view, x and y in 0..1.
        places: indices of `ids` where the features are put (`SeedXPrompts.places`); None: in all pictures' words.
    """

    ids: Sequence[int]
    features: Tensor | None = None
    positions: Tensor | None = None
    places: Sequence[int] | None = None


@dataclass
class Answer:
    """What the model wrote.

    Attributes:
        ids: new words up to `</s>`; a forced `<img>` comes first.
        parts: texts, whole pictures and broken ones in order.
        features: [n, 64, K], of each whole picture.
    """

    ids: list[int]
    parts: list[AnswerPart]
    features: Tensor
    text: str = field(default="")  # as `seed_x.answer_text`


class ContinuousLVLM(nn.Module):
    """The language model with its two resamplers.

    Args:
        llm: a stock `LlamaForCausalLM`, or one with a LoRA around it.
        input_resampler: features [B, N, K] → [B, 64, D], D the width of the language model.
        output_resampler: states [B, 64, D] → [B, 64, K].
    """

    def __init__(self, llm: Any, input_resampler: nn.Module, output_resampler: nn.Module,
                 settings: AgentSettings | None = None) -> None:
        super().__init__()
        self.settings = settings or AgentSettings()
        self.llm = llm
        self.input_resampler, self.output_resampler = input_resampler, output_resampler
        if self.settings.add_patch_pos:
            width = llm.config.hidden_size
            self.patch_pos_embed = nn.Parameter(width**-0.5 * torch.randn(4, width))

    @classmethod
    def from_pretrained(cls, llm: Any, input_resampler: nn.Module, output_resampler: nn.Module,
                        pretrained_model_path: str | Path | None = None, **settings: Any) -> ContinuousLVLM:
        """The model with the weights of a file or folder (`agent_weights.load_agent`); `settings`: `AgentSettings`.

        Raises:
            CheckpointError: weights of another model.
        """
        model = cls(llm, input_resampler, output_resampler, AgentSettings(**settings))
        if pretrained_model_path is not None:
            load_agent(model, pretrained_model_path)
        return model

    # ------------------------------------------------------------------------------------------ training

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, image_embeds: Tensor | None,
                embeds_gen_mask: Tensor | None, embeds_cmp_mask: Tensor | None, ids_gen_mask: Tensor,
                ids_cmp_mask: Tensor, patch_positions: Tensor | None = None, position_ids: Tensor | None = None,
                ) -> dict[str, Tensor]:
        """A batch → `total_loss`, `lm_loss`, `rec_loss`.

        Args:
            input_ids, attention_mask, labels: [B, L]; label -100 is not learned; padding on the right.
            image_embeds: [N, places, K], features of all views of the batch, in the order of their words.
            embeds_gen_mask, embeds_cmp_mask: bool [N], views that are written and read; others are left out.
            ids_gen_mask, ids_cmp_mask: bool [B, L], the image words where they stand.
            patch_positions: [N, 2].
            position_ids: [B, L], of packed sequences.

        Raises:
            DataError: another number of image words than views.
        """
        read, drawn = _chosen(image_embeds, embeds_cmp_mask), _chosen(image_embeds, embeds_gen_mask)
        places = _chosen(patch_positions, embeds_cmp_mask)
        embeds = self.embed(input_ids, ids_cmp_mask, read, places)
        if read is None:
            sizes: Any = self.input_resampler.config
            nothing = self._zeros(1, 1, sizes.kv_dim or sizes.embed_dim)
            embeds = embeds + 0.0 * self._read(nothing, self._zeros(1, 2)).sum().to(embeds)
        states = self.states(embeds, attention_mask, position_ids)
        lm_loss = self.language_loss(states, labels)
        if drawn is None:
            _check_count(int(ids_gen_mask.sum()), 0, "written")
            rec_loss = 0.0 * self._write(states[:1, :1]).float().sum()
        else:
            rec_loss = self.regression_loss(states[ids_gen_mask], drawn)
        total = self.settings.lm_loss_scale * lm_loss + self.settings.rec_loss_scale * rec_loss
        return {"total_loss": total, "lm_loss": lm_loss, "rec_loss": rec_loss}

    def states(self, embeds: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None = None) -> Tensor:
        """Embeddings [B, L, D] → the last states after the final norm [B, L, D]."""
        states: Tensor = self.llm.get_decoder()(inputs_embeds=embeds, attention_mask=attention_mask,
                                                position_ids=position_ids, use_cache=False).last_hidden_state
        return states

    def language_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """States and labels [B, L] → cross-entropy of each next word; 0 where nothing is learned."""
        learned = labels[:, 1:] != IGNORED  # of a row of SEED-X a tenth or less
        logits = self.llm.get_output_embeddings()(states[:, :-1][learned]).float()
        total = functional.cross_entropy(logits, labels[:, 1:][learned], reduction="sum")
        return total / learned.sum().clamp(min=1)

    def regression_loss(self, states: Tensor, features: Tensor) -> Tensor:
        """States at the image words [n · 64, D], features of those pictures [n, N, K] → their distance."""
        if not len(states) or len(states) % len(features):
            raise DataError(f"The batch has {len(features)} pictures to write, but {len(states)} image words for them.")
        target = features.detach().to(states.device)
        if self.settings.vit_down:
            target = functional.avg_pool1d(target.transpose(1, 2), POOLED, POOLED).transpose(1, 2)
        written = self._write(states.unflatten(0, (len(features), -1)))
        if written.shape != target.shape:
            raise ConfigError(f"The output resampler gives {list(written.shape)}, but the features to be written are "
                              f"{list(target.shape)}.")
        if self.settings.mse:
            return functional.mse_loss(written.float(), target.float())
        return (1 - functional.cosine_similarity(written.float(), target.float(), dim=-1)).mean()

    # ------------------------------------------------------------------------------------------ reading

    def embed(self, ids: Tensor, mask: Tensor, features: Tensor | None, positions: Tensor | None) -> Tensor:
        """Words [B, L] → embeddings [B, L, D], with features in the places of `mask` (bool [B, L]), in order.

        Raises:
            DataError: another number of places than the features fill; views without their places.
        """
        embeds: Tensor = self.llm.get_input_embeddings()(ids)
        if features is None:
            _check_count(int(mask.sum()), 0, "read")
            return embeds
        if self.settings.add_patch_pos and (positions is None or len(positions) != len(features)):
            raise DataError(f"{len(features)} views need the place of each, not "
                            f"{'none' if positions is None else len(positions)}.")
        found = self._read(features, positions).flatten(0, 1)
        _check_count(int(mask.sum()), len(found), "read")
        return embeds.masked_scatter(mask[..., None], found.to(embeds))

    def _read(self, features: Tensor, positions: Tensor | None) -> Tensor:
        """Features [n, N, K] and centres [n, 2] → embeddings [n, 64, D]."""
        read: Tensor = self.input_resampler(features.to(next(self.input_resampler.parameters())))
        if not self.settings.add_patch_pos:
            return read
        assert positions is not None
        centre = positions.to(self.patch_pos_embed)
        place = torch.cat([centre, 1 - centre], dim=-1) / 2 @ self.patch_pos_embed
        return read + place[:, None].to(read)

    def _write(self, states: Tensor) -> Tensor:
        """States [n, 64, D] → features [n, 64, K]."""
        written: Tensor = self.output_resampler(states.to(next(self.output_resampler.parameters())))
        return written

    def _zeros(self, *size: int) -> Tensor:
        return next(self.output_resampler.parameters()).new_zeros(size)

    # ------------------------------------------------------------------------------------------ writing

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings, tokenizer: MultimodalTokenizer,
                 streamer: Any = None, watch: Callable[[], None] | None = None, *, released: bool = False,
                 seeds: Sequence[int] | None = None) -> list[Answer]:
        """Answer every prompt; each gets what it would get alone.

        Args:
            streamer, watch, released, seeds: as of `generation.generate_ids`.

        Raises:
            RequestError: another number of features than the prompt has places. GenerationError: as `generate_ids`.
        """
        states = ImageStates()
        answers = generate_ids(self.llm, [prompt.ids for prompt in prompts], settings, tokenizer, streamer, watch,
                               embed=self.reader(prompts, tokenizer), states=states, released=released, seeds=seeds)
        return [self._answer(ids, row, states, tokenizer, prompts[row].ids[-1:]) for row, ids in enumerate(answers)]

    def reader(self, prompts: Sequence[Prompt], tokenizer: MultimodalTokenizer) -> Callable[[Tensor], Tensor]:
        """What `generate_ids` embeds these prompts with (`embed`); all may be followed by as many further words.

        Raises:
            RequestError: as `generate`.
        """
        masks = [self._mask(number, prompt, tokenizer) for number, prompt in enumerate(prompts)]
        longest = max(map(len, masks))

        def embed(ids: Tensor) -> Tensor:
            mask = torch.zeros_like(ids, dtype=torch.bool)
            for line, places in zip(mask, masks, strict=True):
                line[longest - len(places):longest] = torch.tensor(places)
            shown = [prompt for prompt in prompts if prompt.features is not None]
            features = torch.cat([prompt.features for prompt in shown]) if shown else None
            centres = [prompt.positions for prompt in shown if prompt.positions is not None]
            return self.embed(ids, mask, features, torch.cat(centres) if centres else None)

        return embed

    @torch.inference_mode()
    def written(self, states: ImageStates, runs: Sequence[Sequence[int]], row: int = 0) -> Tensor:
        """Features [n, 64, K] of pictures whose words are at these places of an answer; `GenerationError` for NaN."""
        features = self._write(torch.stack([states.at(row, places) for places in runs]))
        if not torch.isfinite(features).all():
            raise GenerationError("The features of a picture that the model wrote are not numbers.")
        return features

    def _answer(self, ids: list[int], row: int, states: ImageStates, tokenizer: MultimodalTokenizer,
                end: Sequence[int]) -> Answer:
        opening = [id for id in end if id == tokenizer.vocabulary.boi_id]  # the prompt began the first picture
        parts = split_answer([*opening, *ids], tokenizer)
        drawn = [part for part in parts if isinstance(part, ImagePart)]
        runs = [range(at := part.place - len(opening), at + len(part.codes)) for part in drawn]
        features = self.written(states, runs, row) if runs else self._zeros(0, 0, 0)
        return Answer(ids, parts, features, answer_text(ids, tokenizer))

    def _mask(self, number: int, prompt: Prompt, tokenizer: MultimodalTokenizer) -> list[bool]:
        """Which words of a prompt are places of features."""
        places = seed_x_words(tokenizer).places(ids := [int(id) for id in prompt.ids])
        places = places if prompt.places is None else sorted(set(places) & set(prompt.places))
        views = 0 if prompt.features is None else len(prompt.features)
        wanted = len(places) // tokenizer.vocabulary.tokens_per_image
        if views != wanted:
            raise RequestError(f"Prompt {number} has places for {wanted} views of pictures, but there are features of "
                               f"{views}.")
        if views and self.settings.add_patch_pos and (prompt.positions is None or len(prompt.positions) != views):
            raise RequestError(f"Prompt {number} has {views} views of pictures and needs the place of each.")
        there = set(places)
        return [place in there for place in range(len(ids))]


def _chosen(values: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """The rows of `mask`; None where it has none."""
    if values is None or mask is None or not bool(mask.any()):
        return None
    return values[mask.to(values.device)]


def _check_count(places: int, features: int, what: str) -> None:
    if places != features:
        raise DataError(f"The batch has {places} image words of pictures that are {what}, but features for {features}.")
