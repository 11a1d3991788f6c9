"""Merging: as peft merges, from every layout of base and adapter, in little memory, checked, atomic."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm_python
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.language.adapters import TrainedTensors
from seed_multimodal.language.llama import load_llm
from seed_multimodal.language.merge import merge_adapter
from seed_multimodal.language.merge_check import compare_logits
from seed_multimodal.language.shards import parse_size
from seed_multimodal.language.tokenizer import MultimodalTokenizer

ROOT = Path(__file__).resolve().parents[3]
TEXT = 330
MODULES = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"]
LORA: dict[str, Any] = {
    "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "task_type": "CAUSAL_LM", "modules_to_save": MODULES,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]}


def make(folder: Path, words: int, *, tied: bool = False, width: int = 32, layers: int = 2) -> Path:
    torch.manual_seed(width)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1,
        pad_token_id=-1, use_cache=False)).save_pretrained(folder)
    return folder


def train(base: Path, words: int, folder: Path, **lora: Any) -> Any:
    """An adapter with every number moved, written to `folder` by peft; returns the model."""
    llama = LlamaForCausalLM.from_pretrained(base)
    if llama.config.vocab_size != words:
        llama.resize_token_embeddings(words, mean_resizing=False)
    model = get_peft_model(llama, LoraConfig(**copy.deepcopy({**LORA, **lora})))  # peft changes lists it is given
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.clone() for name, value in get_peft_model_state_dict(
        model, save_embedding_layers=False).items()}, folder / "adapter_model.safetensors")
    values = {**LORA, **lora, "peft_type": "LORA", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return model.eval()


@pytest.fixture(scope="module")
def words(tokenizer: MultimodalTokenizer) -> int:
    return tokenizer.vocabulary.size


@pytest.fixture(scope="module")
def made(words: int, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base without image words, an adapter with them, and what peft says of both."""
    folder = tmp_path_factory.mktemp("made")
    base, adapter = make(folder / "base", TEXT), folder / "adapter"
    model = train(base, words, adapter)
    ids = torch.randint(3, words, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        merged = model.merge_and_unload().state_dict()
    return SimpleNamespace(base=base, adapter=adapter, ids=ids, logits=logits, merged=merged)


def says(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return load_llm(folder)(input_ids=ids).logits


def test_merged_as_peft_merges(made: SimpleNamespace, tokenizer: MultimodalTokenizer, words: int, tmp_path: Path
                               ) -> None:
    out = tmp_path / "merged"
    report = merge_adapter(made.base, made.adapter, out, tokenizer=tokenizer, max_shard_size="40KB")
    assert report.words == words and report.difference is not None and report.difference < 1e-5
    assert len(report.files) > 3 and (out / "model.safetensors.index.json").is_file()
    state = {name: value for file in report.files for name, value in load_file(file).items()}
    assert state.keys() == made.merged.keys() and (report.tensors, report.merged) == (len(state), 14)
    for name, value in state.items():
        torch.testing.assert_close(value, made.merged[name], atol=1e-6, rtol=1e-6, msg=name)
    torch.testing.assert_close(says(out, made.ids), made.logits, atol=1e-4, rtol=1e-4)
    config = json.loads((out / "config.json").read_text())
    assert [config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "use_cache")] == [
        1, 2, 0, words, True]
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 2
    assert len(MultimodalTokenizer.from_pretrained(out)) == words
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged"]


def test_old_files_and_precisions(made: SimpleNamespace, tmp_path: Path) -> None:
    """Base in two .bin shards with rotary buffers, adapter as peft 0.4 wrote it; the result in bf16."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(made.base, base)
    state = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = list(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
    for file, part in shards.items():
        extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)} if "00001-of" in file else {}
        torch.save({**{name: state[name] for name in part}, **extra}, base / file)
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}))
    adapter.mkdir()
    torch.save(load_file(made.adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    shutil.copy(made.adapter / "adapter_config.json", adapter)
    report = merge_adapter(base, adapter, tmp_path / "out", dtype="bf16")
    assert 0 < report.difference < 4e-2
    assert {value.dtype for value in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    merge_adapter(base, adapter, tmp_path / "as_base", dtype="base", verify=False)
    assert {v.dtype for v in load_file(tmp_path / "as_base" / "model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("together", [True, False])
def test_tied_embeddings(words: int, together: bool, tmp_path: Path) -> None:
    base = make(tmp_path / "base", words, tied=True)
    model = train(base, words, tmp_path / "adapter", ensure_weight_tying=together)
    ids = torch.randint(3, words, (1, 9))
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "out")
    state = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # Trained apart they cannot be one matrix any more.
    assert ("lm_head.weight" not in state) == config["tie_word_embeddings"] == together
    assert report.difference < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(says(tmp_path / "out", ids), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_runs_of_zero_to_fp32_and_whole_models(made: SimpleNamespace, words: int, tmp_path: Path) -> None:
    model = train(made.base, words, tmp_path / "again")
    zero = tmp_path / "zero"
    zero.mkdir()
    trained = {f"llm.{name}": p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    torch.save(trained, zero / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="nothing says their r and lora_alpha"):
        merge_adapter(made.base, zero, tmp_path / "out")
    report = merge_adapter(made.base, zero, tmp_path / "out", lora=LORA)
    assert report.difference < 1e-5 and report.merged == 14
    with torch.no_grad():
        wanted = model(input_ids=made.ids).logits
    torch.testing.assert_close(says(tmp_path / "out", made.ids), wanted, atol=1e-4, rtol=1e-4)
    passed = merge_adapter(None, tmp_path / "out", tmp_path / "passed", dtype="bf16")  # a whole model
    assert passed.merged == passed.replaced == 0 and passed.difference == 0.0
    assert "There was nothing to merge" in str(passed) and "nothing to merge" not in str(report)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "passed"))
    assert all(torch.equal(one[name].bfloat16(), two[name]) for name in one)
    whole = tmp_path / "whole"
    whole.mkdir()
    save_file({f"module.llm.{name}": value for name, value in one.items()}, whole / "model.safetensors")
    merge_adapter(made.base, whole, tmp_path / "full")
    three = load_file(tmp_path / "full" / "model.safetensors")
    assert all(torch.equal(one[name], three[name]) for name in one)


def test_the_comparison_sees_a_wrong_merge(made: SimpleNamespace, tmp_path: Path) -> None:
    merge_adapter(made.base, made.adapter, tmp_path / "out", verify=False)
    assert compare_logits(made.base, TrainedTensors(made.adapter), tmp_path / "out") < 1e-5
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    state["model.layers.1.self_attn.v_proj.weight"] *= 1.01
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="differs from base and adapter: its logits"):
        compare_logits(made.base, TrainedTensors(made.adapter), tmp_path / "out")


MEASURE = """
import resource, sys
from pathlib import Path
from seed_multimodal.language.merge import merge_adapter
from seed_multimodal.language import merge as _
import transformers.models.llama.modeling_llama
def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024
import threading, time
peak, stop = [0.0], []
def watch():
    while not stop:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
base, adapter, out = sys.argv[1:]
merge_adapter(base, adapter, out + ".warm", max_shard_size="10MB", verify=False)
start = anonymous()
thread = threading.Thread(target=watch)
thread.start()
merge_adapter(base, adapter, out, max_shard_size="10MB", verify=False)
stop.append(1)
thread.join()
print(peak[0] - start)
"""


@pytest.mark.process
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_stays_far_below_the_model(words: int, tmp_path: Path) -> None:
    """A model of 60 MiB merges in the room of a few of its tensors (2 MiB each)."""
    base = tmp_path / "base"
    LlamaForCausalLM(LlamaConfig(vocab_size=words, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
                                 num_attention_heads=4, max_position_embeddings=64)).save_pretrained(base)
    train(base, words, tmp_path / "adapter")
    size = (base / "model.safetensors").stat().st_size / 2**20
    done = subprocess.run([sys.executable, "-c", MEASURE, str(base), str(tmp_path / "adapter"), str(tmp_path / "out")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert size > 55 and float(done.stdout) < 20, f"{done.stdout} MiB for a model of {size:.0f} MiB"


def spoilt(made: SimpleNamespace, folder: Path, change: Any) -> Path:
    shutil.copytree(made.adapter, folder)
    state = load_file(folder / "adapter_model.safetensors")
    save_file(change(state), folder / "adapter_model.safetensors")
    return folder


A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda s: {k: v for k, v in s.items() if k != A}, "has lora_B but no lora_A"),
    (lambda s: {**s, A: torch.zeros(3, 32)}, "do not multiply"),
    (lambda s: {**s, "base_model.model.model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)}, "belongs to no tensor"),
    (lambda s: {**s, A.replace("lora_A.weight", "lora_magnitude_vector.weight"): torch.zeros(2)}, "no part of plain"),
    (lambda s: {k: v for k, v in s.items() if "lm_head" not in k}, "'lm_head.weight' is .* but the model needs"),
    (lambda s: {k: v for k, v in s.items() if "_head" not in k and "embed" not in k}, "has 330 words, but the token")])
def test_foreign_adapters_leave_nothing(made: SimpleNamespace, tokenizer: MultimodalTokenizer, change: Any,
                                        sentence: str, tmp_path: Path) -> None:
    adapter = spoilt(made, tmp_path / "adapter", change)
    with pytest.raises(CheckpointError, match=sentence):
        merge_adapter(made.base, adapter, tmp_path / "out", tokenizer=tokenizer)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_ranks_and_starts_that_a_merge_cannot_follow(made: SimpleNamespace, tmp_path: Path) -> None:
    other = A.replace("q_proj", "v_proj")
    adapter = spoilt(made, tmp_path / "rank", lambda s: {
        **s, other: torch.zeros(2, 32), other.replace("lora_A", "lora_B"): torch.zeros(32, 2)})
    with pytest.raises(CheckpointError, match=r"lora_A of '.*v_proj.weight' has 2 rows, but r is 4"):
        merge_adapter(made.base, adapter, tmp_path / "out")
    adapter = spoilt(made, tmp_path / "start", dict)
    values = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**values, "init_lora_weights": "pissa_niter_4"}))
    with pytest.raises(CheckpointError, match="init_lora_weights 'pissa_niter_4'"):
        merge_adapter(made.base, adapter, tmp_path / "out", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rank", "start"]


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_merged(words: int, bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, attention_bias=True)).save_pretrained(tmp_path / "base")
    model = train(tmp_path / "base", words, tmp_path / "adapter", bias=bias)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    ids = torch.randint(3, words, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(says(tmp_path / "out", ids), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_places_that_cannot_be_written(made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--force` never takes away what is read; a file in the way is one sentence; the current folder is a place."""
    run = tmp_path / "run"
    shutil.copytree(made.adapter, run / "checkpoint-1")
    for base, adapter in ((made.base, run / "checkpoint-1"), (run, None)):
        with pytest.raises(ConfigError, match="run: holds what is to be merged"):
            merge_adapter(base, adapter, run, force=True)
    assert (run / "checkpoint-1" / "adapter_config.json").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: is a file; the merged model needs a folder"):
        merge_adapter(made.base, made.adapter, tmp_path / "file", force=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        merge_adapter(made.base, made.adapter, tmp_path / "file" / "out", verify=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    merge_adapter(made.base, made.adapter, ".", verify=False)
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "here", "run"]


def test_a_linked_folder_stays_a_link(made: SimpleNamespace, tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / "old.txt").write_text("old")
    link.symlink_to(real)
    merge_adapter(made.base, made.adapter, link, verify=False, force=True)
    assert link.is_symlink() and (real / "model.safetensors").is_file() and not (real / "old.txt").exists()
    (tmp_path / "ahead").symlink_to(tmp_path / "later")
    merge_adapter(made.base, made.adapter, tmp_path / "ahead", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ahead", "later", "link", "real"]


def test_numbers_that_fp16_cannot_hold(made: SimpleNamespace, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(made.base, base)
    state = load_file(base / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight' holds numbers that fp16 cannot hold"):
        merge_adapter(base, made.adapter, tmp_path / "out", dtype="fp16", verify=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_wrong_bases_leave_nothing(made: SimpleNamespace, words: int, tmp_path: Path) -> None:
    wide = make(tmp_path / "wide", words, width=64)
    with pytest.raises(CheckpointError, match=r"is \(\d+, 32\), but the model needs|an adapter for another model"):
        merge_adapter(wide, made.adapter, tmp_path / "out")
    broken = tmp_path / "broken"
    shutil.copytree(made.base, broken)
    state = load_file(broken / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the tensor 'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        merge_adapter(broken, made.adapter, tmp_path / "out")
    cut = (made.base / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(cut[:len(cut) // 2])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        merge_adapter(broken, made.adapter, tmp_path / "out")
    with pytest.raises(CheckpointError, match="there is no config.json"):
        merge_adapter(tmp_path, made.adapter, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already and is not empty"):
        merge_adapter(made.base, made.adapter, wide)
    with pytest.raises(ConfigError, match="Unknown precision 'int8'"):
        merge_adapter(made.base, made.adapter, tmp_path / "out", dtype="int8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "wide"]


def test_sizes() -> None:
    assert [parse_size(s) for s in ("5GB", "1.5 MiB", 7, "100")] == [5 * 10**9, 3 * 2**19, 7, 100]
    for wrong in ("5XB", "GB", "0", "-1GB", "1.2.3GB"):
        with pytest.raises(ConfigError, match="is not a size"):
            parse_size(wrong)


@pytest.mark.process
def test_command_line(made: SimpleNamespace, tokenizer_folder: Path, tmp_path: Path) -> None:
    tool = ROOT / "MultiModalLLM" / "src" / "tools" / "merge_lora_weights.py"
    configuration = ROOT / "MultiModalLLM" / "configs" / "model" / "vicuna_7b_lora_pretrained.yaml"
    words = tmp_path / "tokenizer.yaml"
    words.write_text("_target_: src.tokenizer.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
                     f"pretrained_model_name_or_path: {tokenizer_folder}\n")
    command = [warm_python.PYTHON, str(tool), "--model_cfg", str(configuration), "--tokenizer_cfg", str(words),
               "--base_model", str(made.base), "--lora_model", str(made.adapter)]
    done = subprocess.run([*command, "--save_path", str(tmp_path / "merged")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "tensors in 1 file, 14 with LoRA merged in" in done.stderr and "logits as before" in done.stderr
    torch.testing.assert_close(says(tmp_path / "merged", made.ids), made.logits, atol=1e-4, rtol=1e-4)
    again = subprocess.run([*command, "--save_path", str(tmp_path / "merged")], capture_output=True, text=True)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert "not empty (--force replaces it)." in again.stderr
