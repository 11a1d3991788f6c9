"""Decoders, agent and prompts together: a tiny model learns to read two pictures, to draw them and to change one into
the other, and answers so when it is asked through the prompts of inference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.data.decoders.pictured import PictureSequence, batch_rows
from seed_multimodal.data.decoders.registry import get_decoder
from seed_multimodal.data.decoders.sequence import SeededDraws
from seed_multimodal.language.answer import ImagePart, split_answer
from seed_multimodal.language.generation import GenerationSettings, HiddenStates, Prompt, generate
from seed_multimodal.language.llama import force_special_ids
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.seed_x.modeling import ContinuousLVLM
from seed_multimodal.seed_x.processing import Box, SeedXPrompts, answer_text, place_images, read_boxes
from seed_multimodal.seed_x.vision import Resampler, ResamplerConfig

TEXTS = ["[INST] Generate an image: a cat [/INST]\n", "It is a dog.", "Swap it. What is it? Where is it? A cat."] * 20
K, PLACES = 16, 16
WORDS = {"cat": Box(4, 5, 6, 7), "dog": Box(9, 9, 3, 2)}


@dataclass
class Opened:
    """Stands for an opened picture, by its name."""

    name: str
    size: tuple[int, int] = (448, 448)


def features_of(names: list[str]) -> torch.Tensor:
    """Two views of each picture, the same for each of 4 neighbours."""
    made = {name: torch.randn(PLACES // 4, K, generator=torch.Generator().manual_seed(seed))
            for seed, name in enumerate(WORDS)}
    return torch.stack([made[name].repeat_interleave(4, 0) for name in names for _ in range(2)])


def sequences_of(words: MultimodalTokenizer) -> list[PictureSequence]:
    cat, dog = Opened("cat"), Opened("dog")
    ask = get_decoder("seed_x.conversation", words)
    edit = get_decoder("seed_x.edit", words, {"use_polite_response": False})
    draw = get_decoder("seed_x.chat", words)
    records: list[tuple[Any, Any]] = []
    for one, other in ((cat, dog), (dog, cat)):
        boxed = words.decode(WORDS[one.name].ids(words.vocabulary)).replace(" ", "")  # type: ignore[arg-type]
        records += [
            (ask, {"image": one, "data": ["What is it?", f"It is a {one.name}."]}),
            (ask, {"image": one, "data": ["Where is it?", boxed]}),
            (edit, {"source_image": one, "target_image": other, "instruction": "Swap it."}),
            (draw, {"messages": [{"role": "user", "content": f"Generate an image: a {one.name}"},
                                 {"role": "assistant", "content": [{"image": one}]}]})]
    found = [decoder.decode(fields, SeededDraws(3)) for decoder, fields in records]
    return [sequence for sequence in found if isinstance(sequence, PictureSequence)]


def tensors_of(sequences: list[PictureSequence]) -> dict[str, Any]:
    rows = batch_rows(sequences, max(map(len, sequences)), 0)
    names = [picture.picture.name for sequence in sequences for picture in sequence.pictures]
    batch = {name: torch.tensor(rows[name]) for name in (
        "input_ids", "attention_mask", "labels", "ids_gen_mask", "ids_cmp_mask", "embeds_gen_mask", "embeds_cmp_mask")}
    return {**batch, "patch_positions": torch.tensor(rows["patch_position"]), "image_embeds": features_of(names)}


@pytest.mark.slow
def test_what_is_learned_is_answered(tmp_path: Path) -> None:
    words = MultimodalTokenizer.train(TEXTS, tmp_path, vocab_size=300, n_codes=4, tokens_per_image=4, n_locations=16)
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), hidden_size=48, intermediate_size=96,
                                       num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128))
    force_special_ids(llm)
    agent = ContinuousLVLM(llm, Resampler(ResamplerConfig(2, 48, 4, K)), Resampler(ResamplerConfig(2, K, 4, 48)))
    batch = tensors_of(sequences_of(words))
    optimizer = torch.optim.AdamW([p for p in agent.parameters() if p.requires_grad], lr=4e-3)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = agent(**batch)["total_loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(agent.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.05 < losses[0]
    asks, settings = SeedXPrompts(words), GenerationSettings(max_new_tokens=30, do_sample=False)
    positions = torch.full((2, 2), 0.5)
    for name, other in (("cat", "dog"), ("dog", "cat")):
        shown = (features_of([name]), positions)
        # The seed's pictures stand behind or before the words; what was trained is asked.
        texts = [("What is it?", True), ("Where is it?", True), ("Swap it.", True),
                 (f"Generate an image: a {name}", False)]
        trained = {tuple(sequence.ids[:n]) for sequence in sequences_of(words) for n in range(len(sequence))}
        prompts = []
        for text, picture in texts:
            both = [place_images(f"<image>{text}", [2]), place_images(f"{text}<image>", [2])] if picture else [[text]]
            ids = next(ids for ids in (asks.dialogue([("user", one)]) for one in both) if tuple(ids) in trained)
            mask = torch.zeros(1, len(ids), dtype=torch.bool)
            mask[0, words.vocabulary.places(ids)] = True
            with torch.no_grad():
                embeds = agent.eval().embed(torch.tensor([ids]), mask, *(shown if picture else (None, None)))[0]
            prompts.append(Prompt(ids, embeds))
        states = HiddenStates()
        answers = generate(agent.llm, words, prompts, settings, states=states)
        said, where = (answer_text(ids, words) for ids in answers[:2])
        assert said.removesuffix("</s>").strip() == f"It is a {name}."
        assert read_boxes(where, grid=16) == ([WORDS[name]], [])
        for row, wanted in ((2, other), (3, name)):
            image = next(part for part in split_answer(answers[row], words) if isinstance(part, ImagePart))
            seen = states.at(row, range(image.place, image.place + len(image.codes)))
            with torch.no_grad():
                features = agent.written_features(seen[None])
            assert torch.nn.functional.mse_loss(features, features_of([wanted])[:1, ::4]) < 0.05
