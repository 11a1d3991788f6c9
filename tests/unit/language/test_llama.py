"""Loading language models: special ids forced, and every wrong folder refused in a sentence."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from seed_multimodal.errors import CheckpointError, ConfigError, SeedWarning
from seed_multimodal.language import llama
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.tokenizer import MultimodalTokenizer
from seed_multimodal.language.vocabulary import ImageVocabulary


@pytest.fixture
def changed(llm_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the model's folder with its configuration or tensors changed."""
    def change(config: dict | None = None, tensors: Callable[[dict], dict] | None = None) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(llm_folder, folder)
        if config is not None:
            values = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**values, **config}))
        if tensors is not None:
            state = tensors(load_file(folder / "model.safetensors"))
            save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    return change


def test_special_ids_are_forced(llm_folder: Path, tokenizer: MultimodalTokenizer) -> None:
    assert json.loads((llm_folder / "config.json").read_text())["eos_token_id"] == 1  # the legacy conversion
    model = load_llm(llm_folder, vocabulary=tokenizer.vocabulary)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id, config.use_cache) == (1, 2, 0, True)
    assert model.model.embed_tokens.padding_idx == 0
    assert not model.training and model.dtype == torch.float32
    assert load_llm(llm_folder, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_weights_are_the_files(llm_folder: Path) -> None:
    state = load_file(llm_folder / "model.safetensors")
    model = load_llm(llm_folder)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, state["model.layers.1.mlp.down_proj.weight"])


def test_old_rotary_buffers_are_ignored(changed: Callable[..., Path]) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert load_llm(changed(tensors=lambda state: {**state, **extra}))


def test_missing_folders_say_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_llm(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"huggingface\.co/AILab-CVC/seed-llama-8b-sft into .*seed_llama_8b_sft"):
        load_llm(tmp_path / "pretrained" / "seed_llama_8b_sft")
    with pytest.raises(CheckpointError, match=r"huggingface\.co/AILab-CVC/seed-llama-14b-sft"):
        load_llm("pretrained/seed_llama_14b_sft")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_llm(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        load_llm(tmp_path / "empty")


def test_an_unreachable_hub_id_is_one_sentence() -> None:
    with pytest.raises(CheckpointError, match="AILab-CVC/no-such-model") as caught:
        load_llm("AILab-CVC/no-such-model")
    assert "\n" not in str(caught.value)


def test_other_models_are_refused(changed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="model_type is 'gpt2'"):
        load_llm(changed({"model_type": "gpt2"}))


def test_damaged_configuration(changed: Callable[..., Path]) -> None:
    folder = changed()
    for name in ("config.json", "generation_config.json"):
        for content in ("[]", "null"):
            whole = (folder / name).read_text()
            (folder / name).write_text(content)
            with pytest.raises(CheckpointError, match=f"{name}: must hold a json object"):
                load_llm(folder)
            (folder / name).write_text(whole)
    (folder / "config.json").write_text("{ not json")
    with pytest.raises(CheckpointError, match="configuration cannot be read"):
        load_llm(folder)


def test_another_vocabulary_is_refused(llm_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="356 words, but the tokenizer has 40194"):
        load_llm(llm_folder, vocabulary=ImageVocabulary())


def test_incomplete_and_foreign_tensors(changed: Callable[..., Path], tmp_path: Path) -> None:
    def without(state: dict) -> dict:
        return {name: value for name, value in state.items() if name != "model.norm.weight"}

    with pytest.raises(CheckpointError, match=r"1 tensors are missing from the file: 'model\.norm\.weight'"):
        load_llm(changed(tensors=without))
    shutil.rmtree(tmp_path / "changed")
    with pytest.warns(SeedWarning, match=r"changed: 1 tensor that the model does not know was left out: 'other\.w'"):
        load_llm(changed(tensors=lambda state: {**state, "other.w": torch.ones(2)}))
    shutil.rmtree(tmp_path / "changed")
    deeper = {"model.layers.2.input_layernorm.weight": torch.ones(32)}  # then config.json is another model's
    with pytest.raises(CheckpointError, match="config.json says 2 layers, but the weights have 3"):
        load_llm(changed(tensors=lambda state: state | deeper))


def test_another_size(changed: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match=r"6 tensors are of another size: .*down_proj.* model \(32, 48\)"):
        load_llm(changed({"intermediate_size": 48}))


def test_half_written_weights(changed: Callable[..., Path]) -> None:
    folder = changed()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="weights cannot be read"):
        load_llm(folder)


class Evil:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("pickle_was_run"),))


def test_unsafe_pickles_do_not_run(
    changed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = changed()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Evil()}, protocol=2))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="unsafe pickle"):
        load_llm(folder)
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="unsafe pickle"):
        load_llm(folder)
    assert not (tmp_path / "pickle_was_run").exists()


def test_old_torch_files_load(changed: Callable[..., Path], llm_folder: Path) -> None:
    folder = changed()
    (folder / "model.safetensors").unlink()
    state = load_file(llm_folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    assert torch.equal(load_llm(folder).lm_head.weight, state["lm_head.weight"])


@pytest.mark.parametrize("where", ["folder", "hub"])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_sharded_weights_with_an_unlisted_tensor(
    llm_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, where: str
) -> None:
    state = load_file(llm_folder / "model.safetensors") | {"further.weight": torch.ones(2)}
    name = "owner/llama"
    cached = tmp_path / "cache" / "models--owner--llama"
    folder = cached / "snapshots" / ("0" * 40) if where == "hub" else tmp_path / "llama"
    folder.mkdir(parents=True)
    if where == "hub":
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copy(llm_folder / "config.json", folder)
    stem, ending = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    places = {key: f"{stem}-{1 + number % 3:05d}-of-00003.{ending}" for number, key in enumerate(sorted(state))}
    for file in sorted(set(places.values())):
        part = {key: value for key, value in state.items() if places[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"}) if ending == "safetensors" else torch.save(
            part, folder / file)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    source = name if where == "hub" else folder
    with pytest.warns(SeedWarning, match="1 tensor that the model does not know was left out: 'further.weight'"):
        model = load_llm(source, dtype=torch.float16)
    found = model.state_dict()
    assert all(torch.equal(found[key], value.half()) for key, value in state.items() if "further" not in key)
    assert model.dtype == torch.float16 and not hasattr(model, "_hf_hook")
    (folder / places["lm_head.weight"]).unlink()
    with pytest.raises(CheckpointError, match="cannot be read|not in the local cache"):  # a shard of the index is lost
        load_llm(source)
    for damaged in ([1], {**places, "lm_head.weight": 3}, {}, None):
        index.write_text(json.dumps({"metadata": {}, "weight_map": damaged}))
        with pytest.raises(CheckpointError):
            load_llm(source)


def test_weights_go_straight_to_their_device(llm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No machine of the tests has a GPU: what the loader is told, and that the model is not moved afterwards."""
    from transformers import LlamaForCausalLM

    told = []
    read = LlamaForCausalLM.from_pretrained.__func__

    def watch(kind: type, *args: object, **options: object) -> object:
        told.append((options["device_map"], options["dtype"]))
        return read(kind, *args, **options)

    def refuse(model: object, *args: object) -> None:
        raise AssertionError("moved after loading")

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", classmethod(watch))
    monkeypatch.setattr(LlamaForCausalLM, "to", refuse)
    assert load_llm(llm_folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert told == [({"": "cpu"}, torch.bfloat16)]
    assert [llama._place(torch.device(name)) for name in ("cuda", "cuda:2", "mps", "cpu")] == [0, 2, "mps", "cpu"]


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights_answer_on_a_cpu(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    folder = Path(__file__).resolve().parents[3] / "pretrained/nano/seed_llama"
    ids = torch.arange(300, 320)[None]
    whole, packed = load_llm(folder), load_llm(folder, quantization=quantization)
    assert packed.model.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    with torch.no_grad():
        expected, found = whole(ids).logits, packed(ids).logits
    assert torch.nn.functional.cosine_similarity(expected.flatten(), found.flatten(), dim=0) > 0.95


def test_unknown_quantisation_or_place(llm_folder: Path) -> None:
    with pytest.raises(ConfigError, match="Unknown quantisation"):
        load_llm(llm_folder, quantization="3bit")
    with pytest.raises(ConfigError, match="need a CUDA device or a CPU, not mps"):
        load_llm(llm_folder, device="mps", quantization="8bit")
