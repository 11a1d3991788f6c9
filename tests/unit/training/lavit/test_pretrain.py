"""LaVIT's unified pre-training on the one loop: rows and losses, rates, resume, and checkpoints that are loaded."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

from seed_multimodal.cli.tools import merge_script
from seed_multimodal.data.formats.sources import open_records
from seed_multimodal.data.pretokenize.run import RunSettings, run
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.transforms import normalise
from seed_multimodal.lavit.checkpoints import load_both, load_dynamic_tokenizer, save_dynamic_tokenizer, with_merger
from seed_multimodal.lavit.modeling import DynamicTokenizer
from seed_multimodal.lavit.pipeline import Lavit
from seed_multimodal.training.distributed import ProcessGroup
from seed_multimodal.training.lavit.pretrain import PretrainTask
from seed_multimodal.training.llm.cli import compose
from seed_multimodal.weights import load_state_dict, save_state_dict

ROOT = Path(__file__).resolve().parents[4]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "modules_to_save": ["embed_tokens", "lm_head", "norm"]}


def task_of(config: dict[str, Any]) -> PretrainTask:
    return PretrainTask(PretrainTask.read(config), ProcessGroup(), torch.device("cpu"))


def test_rows_hold_what_the_tokenizer_gives(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """Codes are those of the frozen tokenizer by each sample's seed; the losses of packed rows are those of each
    sequence alone, whose images the trained merger and projector read; image start and prompts are not learned."""
    task = task_of(parts.config_of(home, tmp_path, data={"length": 240}))
    task.prepare()
    state = {name: value.clone() for name, value in task.weights().items()}
    with torch.no_grad():  # trained and frozen merger differ
        for value in task.module.causal_encoder.parameters():
            value.add_(0.05 * torch.randn_like(value))
    trained = {name: value for name, value in task.weights().items() if name.startswith(("causal_", "vit_proj"))}
    frozen = load_dynamic_tokenizer(home / "visual")
    reader, words = with_merger(frozen, trained, "here"), task.tokenizer.vocabulary
    batch = next(one for one in itertools.islice(task.data, 9) if {True, False} == set(one.views.written.tolist()))
    ready = task.ready(batch)
    with torch.no_grad():
        found = task.losses(task.module, ready)
    one = {"generator": None, "mode": "draw"}
    pictures = []
    for pixels, seed, written in zip(batch.views.pixels, batch.views.seeds, batch.views.written, strict=True):
        one["generator"] = [torch.Generator().manual_seed(int(seed))]
        shown = normalise(pixels[None])
        pictures.append(frozen.encode(shown, **one)[0] if written else reader.continuous(shown, **one)[0])
    total, image, learned = reference(task, ready, pictures, batch.views.written.tolist())
    assert float(found.sum) == pytest.approx(total, rel=1e-5) and int(found.text_count + found.image_count) == learned
    assert float(found.image_sum) == pytest.approx(image, rel=1e-5) and ready.learned == learned
    assert not (ready.labels == words.boi_id).any() and (ready.labels == words.eoi_id).any()
    assert len({len(one) for one in pictures}) > 1 and all(torch.equal(value, state[name]) for name, value in
                                                           task.weights().items() if name.startswith("model."))


def reference(task: PretrainTask, ready: Any, pictures: list[Tensor], written: list[bool]) -> tuple[float, float, int]:
    """Loss of all tokens and of image tokens, and their number: sequence by sequence, by a stock LLaMA."""
    words, embed = task.tokenizer.vocabulary, task.llm.get_input_embeddings()
    total = image = 0.0
    learned, picture = 0, 0
    for ids, labels, positions in zip(ready.input_ids, ready.labels, ready.position_ids, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in zip(starts, starts[1:], strict=False):
            own, wanted = ids[start:end], labels[start:end].clone()
            if (wanted == -100).all():  # padding
                continue
            embeds = embed(own).detach().clone()
            at = (own == words.boi_id).nonzero().flatten()
            given_codes = len(at) and int(own[at[0] + 1]) >= words.code_start and int(own[0]) != words.boi_id and (
                not same(own[at[0] + 1:-1] - words.code_start, pictures[picture:picture + 1]))
            if len(at) and not given_codes:  # else a record of codes
                inside = slice(int(at[0]) + 1, int((own == words.eoi_id).nonzero()[0]))
                if written[picture]:
                    assert (own[inside] - words.code_start).tolist() == pictures[picture].tolist()
                else:
                    embeds[inside] = pictures[picture].detach()
                picture += 1
            wanted[0] = -100
            with torch.no_grad():
                logits = task.llm(inputs_embeds=embeds[None]).logits[0]
            losses = cross_entropy(logits[:-1], wanted[1:], reduction="none")
            total, image = total + float(losses.sum()), image + float(losses[wanted[1:] >= words.n_text].sum())
            learned += int((wanted[1:] != -100).sum())
    assert picture == len(pictures)
    return total, image, learned


def same(codes: Tensor, pictures: list[Tensor]) -> bool:
    return bool(pictures) and pictures[0].ndim == 1 and codes.tolist() == pictures[0].tolist()


def test_a_run_does_not_continue_with_other_codes(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """Another visual tokenizer in the same folder; the same one in another may."""
    shutil.copytree(home / "visual", tmp_path / "visual")

    def train(steps: int, place: Path) -> Any:
        return PretrainTask.train(parts.config_of(home, tmp_path / "run", trainer={"max_steps": steps},
                                         visual_encoder={"path": str(place)}))

    train(1, tmp_path / "visual")
    assert train(2, home / "visual")["steps"] == 2
    torch.manual_seed(9)
    save_dynamic_tokenizer(DynamicTokenizer(parts.SIZES), tmp_path / "visual")
    with pytest.raises(CheckpointError, match="was trained with another visual tokenizer"):
        train(3, tmp_path / "visual")


def test_a_checkpoint_is_a_language_model_folder(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """Beside the visual tokenizer of stage 1 it is a LaVIT: another merger for reading, the same for codes."""
    PretrainTask.train(parts.config_of(home, tmp_path / "out", trainer={"max_steps": 2}))
    folder = tmp_path / "out" / "checkpoint-2"
    shutil.copytree(home / "visual", tmp_path / "visual")
    shutil.copy(folder / "visual_weight.safetensors", tmp_path / "visual")
    one, other = load_both(tmp_path / "visual")
    before, saved = load_dynamic_tokenizer(home / "visual"), load_state_dict(folder / "visual_weight.safetensors")
    assert {name.partition(".")[0] for name in saved} == {"causal_encoder", "vit_proj"}
    for name, value in other.state_dict().items():
        assert torch.equal(value, saved.get(name, before.state_dict()[name])), name
    assert torch.equal(one.causal_encoder.blocks[0].norm0.bias, before.causal_encoder.blocks[0].norm0.bias)
    assert not torch.equal(other.causal_encoder.blocks[0].norm0.bias, before.causal_encoder.blocks[0].norm0.bias)
    llm = LlamaForCausalLM.from_pretrained(folder)
    assert llm.config.vocab_size == 300 + 2 + parts.CODES
    config = parts.config_of(home, tmp_path / "new", model={"path": str(folder)}, trainer={"max_steps": 1},
                             visual_encoder={"start": str(folder)})
    task = task_of(config)
    task.prepare()
    assert all(torch.equal(value, saved[name]) for name, value in task.weights().items() if name in saved)
    with pytest.raises(CheckpointError, match="no visual_weight.safetensors"):
        task_of(parts.config_of(home, tmp_path, visual_encoder={"start": str(home / "words")})).prepare()


@pytest.mark.slow
def test_an_adapter_becomes_a_system(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """Merged by the tool, and put next to the visual tokenizer of stage 1 as `language_model`."""
    PretrainTask.train(parts.config_of(home, tmp_path / "out", model={"lora": {**LORA, "lora_dropout": 0.0}},
                              trainer={"max_steps": 2}))
    (tmp_path / "model.yaml").write_text(f"path: {home / 'llm'}\nlora: {{r: 4, lora_alpha: 8}}\n")
    (tmp_path / "words.yaml").write_text(f"pretrained_model_name_or_path: {home / 'words'}\n")
    system = tmp_path / "system"
    assert merge_script("merge_lora_weights.py", "", [
        "--model_cfg", str(tmp_path / "model.yaml"), "--tokenizer_cfg", str(tmp_path / "words.yaml"), "--lora_model",
        str(tmp_path / "out" / "checkpoint-2"), "--save_path", str(system / "language_model")]) == 0
    state, visual = load_state_dict(home / "visual" / "model.safetensors"), system / "visual_tokenizer"
    visual.mkdir()
    shutil.copy(home / "visual" / "config.json", visual)
    tower = {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    save_state_dict(tower, visual / "eva_vitg_psz14.safetensors")
    save_state_dict({name: value for name, value in state.items() if not name.startswith(("encoder.", "vit_proj."))},
                    visual / "tokenizer_encoder.safetensors")
    lavit = Lavit.from_pretrained(system, device="cpu", dtype="fp32", load_decoder=False, log=None)
    assert isinstance(lavit.describe(Image.new("RGB", (20, 20))), str)


def test_codes_of_shards_are_the_tokenizers(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """As many as each image keeps, the same however often they are made, and read by the decoder."""
    shards = {"_target_": "seed_multimodal.data.pretokenize.lavit_codes.lavit_codes",
              "pretrained_model_name_or_path": str(home / "visual")}
    for name in ("one", "other"):
        assert run(RunSettings("caption", {"files": str(home / "captions.tar")}, str(tmp_path / name), shards,
                               device="cpu", workers=0, batch_size=3 if name == "one" else 1)) == 0
    opened = [open_records(str(tmp_path / name)) for name in ("one", "other")]
    found = [[records.read(number).fields for number in range(len(records))] for records in opened]
    codes = [fields["image_ids"] for fields in found[0]]
    assert found[0] == found[1] and len(codes) == 4 and len({len(one) for one in codes}) > 1
    assert all(0 <= code < parts.CODES for one in codes for code in one)
    source = {"name": "made", "files": str(tmp_path / "one"), "decoder": "lavit.caption", "options": {
        "text_dropout": 1.0, "base_resolution": parts.SIDE}}
    task = task_of(parts.config_of(home, tmp_path / "out", data={"sources": [source]}))
    rows, start = next(task.data).input_ids, task.tokenizer.vocabulary.code_start
    assert all(any(torch.equal(row[at:at + len(one)], torch.tensor(one) + start) for row in rows
                   for at in range(len(row))) for one in codes)


def test_rates_of_both_groups(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    task = task_of(parts.config_of(home, tmp_path, optim={"learning_rate": 1.0e-5, "part_rates": {
        "causal_encoder": 1.0e-4, "vit_proj": 1.0e-4}}))
    task.prepare()
    names = {id(value): name.partition(".")[0] for name, value in task.module.named_parameters()}
    found = {frozenset(names[id(one)] for one in group["params"]): group.get("lr_scale", 1.0)
             for group in task.optimizer.param_groups}
    assert found == {frozenset({"causal_encoder"}): pytest.approx(10.0), frozenset({"vit_proj"}): pytest.approx(10.0),
                     frozenset({"llm"}): 1.0}
    new = task.llm.get_input_embeddings().weight[300:].detach()
    assert len(new) == 10 and float(new.std()) == pytest.approx(0.02, rel=0.15)  # as LLaMA's own words
    with pytest.raises(ConfigError, match="optim: part_rates.*named vit_prj"):
        task_of(parts.config_of(home, tmp_path, optim={"part_rates": {"vit_prj": 1e-4}})).prepare()


def test_what_cannot_be_used(parts: ModuleType, home: Path, tmp_path: Path) -> None:
    """Records: left out and counted. Parts that do not belong together: one sentence."""
    bad = home / "bad.jsonl"
    bad.write_text("".join(f"{line}\n" for line in (
        '{"text": "a cat", "image_ids": [99]}', '{"text": "", "image_ids": [1]}',
        '{"text": "%s", "image_ids": [1]}' % ("word " * 120), '{"text": "a red cat", "image_ids": [1, 2]}')))
    data = parts.data_of(home)
    sources = [{**data["sources"][1], "files": str(bad), "name": "bad", "cycles": 1, "options": {
        "text_dropout": 0.0, "base_resolution": parts.SIDE}}]
    record = PretrainTask.train(parts.config_of(home, tmp_path / "out", data={"sources": sources},
                                                trainer={"max_steps": 3}))
    left = record["data"]["sources"]["bad"]
    reasons = {reason: entry["count"] for reason, entry in left["skipped"].items()}
    assert left["sequences"] == 1 and sorted(reasons.values()) == [1, 1, 1], left
    assert {"codes out of range", "empty text"} < set(reasons)
    assert any("do not fit" in reason for reason in reasons)
    for changes, sentence in (
            ({"visual_encoder": None}, "visual_encoder is required"),
            ({"tokenizer": {"pretrained_model_name_or_path": str(ROOT / "pretrained" / "nano" / "seed_tokenizer")}},
             "has 8 codes, but tokenizer"),
            ({"visual_encoder": {"selection": "top"}}, "selection"),
            ({"model": {"quantization": "8bit"}}, "cannot be trained; set lora")):
        config = parts.config_of(home, tmp_path, **{key: value for key, value in changes.items() if value is not None})
        with pytest.raises(ConfigError, match=sentence):
            task_of({key: value for key, value in config.items() if changes.get(key, "") is not None})
    data["sources"][0]["options"] = {}
    with pytest.raises(ConfigError, match="captions is 224, but the vision encoder's input is 16"):
        task_of(parts.config_of(home, tmp_path, data={"sources": data["sources"][:1]}))


def test_the_recipe_is_read() -> None:
    given = ["output_dir=x", "deepspeed=configs/deepspeed/stage2_bf16.json"]
    settings = PretrainTask.read(compose(given, ROOT / "MultiModalLLM" / "configs", "train_lavit"))
    assert settings.visual_encoder.selection == "draw" and settings.agent is None and settings.deepspeed is not None
    optim = settings.optim
    assert optim.learning_rate == 1e-5 and set(optim.part_rates.values()) == {1e-4}
    data = settings.data
    weights = {source.name: source.weight for source in data.sources}
    assert weights["text"] == 2 * (weights["read"] + weights["drawn"])
    ratios = {source.name: source.options.get("img_first_ratio") for source in data.sources}
    assert (ratios["read"], ratios["drawn"]) == (1.0, 0.0)
