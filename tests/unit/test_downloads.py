"""Downloads of the originals' parts from a hub on this machine: mirrors, damaged and interrupted
files, disk space; `seed fetch`; and the originals' programs that download at their start."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import loopback_hub
import pytest
import torch
from loopback_hub import LoopbackHub
from repository import ROOT

from seed_multimodal import downloads, hub
from seed_multimodal.cli.main import main
from seed_multimodal.cli.weights import wanted_parts
from seed_multimodal.compat.lavit import build_model
from seed_multimodal.compat.seed_llama_programs import llama_script, tokenizer_script
from seed_multimodal.downloads import WantedPart, choose_files, fetch_parts, online
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.originals import OriginalPart, origin, original_parts, part_of
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.weights import load_state_dict

LLM = "AILab-CVC/seed-llama-8b-sft"
FILE = f"/{LLM}/resolve/{loopback_hub.COMMIT}/pytorch_model.bin"
WEIGHTS = bytes(range(256)) * 40
PART = OriginalPart(name="8b", folder="pretrained/llm", hub=LLM, mirrors=("mirror/b",))


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[LoopbackHub]:
    """A hub with the language model of 8b, in place of huggingface.co; the working directory is an
    empty repository."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "src" / "seed_multimodal" / "hub.py"))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 300)
    monkeypatch.setattr(downloads, "TIMEOUT", 300)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with loopback_hub.running() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repositories[LLM] = {"config.json": b"{}", "pytorch_model.bin": WEIGHTS}
        server.files["/eva_vit_g.pth"] = WEIGHTS
        mirrors = f"eva_vit_g.pth={server.url}/eva_vit_g.pth"
        monkeypatch.setenv(downloads.MIRRORS, mirrors)
        yield server


def fetch(part: OriginalPart = PART, **options: bool) -> list[str]:
    """Problems of a download into the working directory."""
    with online():
        return fetch_parts([WantedPart(part)], Path(), **options)


def interrupt_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the third chunk of a file."""

    def update(progress: downloads.DownloadProgress, amount: float) -> None:
        progress.n += amount
        if progress.n > 2000:
            raise KeyboardInterrupt

    monkeypatch.setattr(downloads.DownloadProgress, "update", update)


def test_parts_of_all_families_have_one_source():
    for part in original_parts().values():
        assert part.folder.startswith("pretrained")
        assert part.hub or part.urls or part.convert


def test_part_of_a_path():
    for name in ("pretrained/QwenViT", "/data/pretrained/QwenViT"):
        assert part_of(name) == original_parts()["qwen-vit"]
    assert part_of(LLM) == original_parts()["8b"]
    assert not part_of("") and not part_of("/data/my_pretrained") and not part_of("pretrained")
    part, inner = origin(Path("pretrained/seed_x_i/llm"))
    assert (part.name, inner) == ("seed-x", "seed_x_i/llm")
    for path in ("pretrained/seed_llama_13b", "elsewhere"):
        with pytest.raises(ConfigError, match=f"{path}: no part of a weights.yaml holds it"):
            origin(Path(path))


def test_a_snapshot_without_weights_is_downloaded(server, monkeypatch):
    """It is what reading a model's configuration leaves in the hub client's cache."""
    with online():
        snapshot = hub.fetch(LLM, ["*.json"])
        assert hub.local_folder(LLM) == Path("pretrained/seed_llama_8b_sft")
    shutil.rmtree("pretrained/seed_llama_8b_sft")
    assert hub.local_folder(LLM) == snapshot  # downloads are off


def test_choose_files_of_a_diffusers_folder():
    names = [
        "model_index.json",
        "model.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "image_normalizer/diffusion_pytorch_model.bin",
    ]
    chosen = choose_files(names, original_parts()["unclip"].files)
    assert chosen == [names[0], names[3], names[5]]
    assert choose_files(names, ("*.json", "*.bin")) == [names[0]]  # of the root folder only


@pytest.mark.parametrize(
    ("names", "patterns", "expected"),
    [
        (
            ["config.json", "model.safetensors", "pytorch_model.bin", "original/model.safetensors"],
            hub.WEIGHT_PATTERNS,
            ["config.json", "model.safetensors"],
        ),
        (["pytorch_model.bin"], hub.WEIGHT_PATTERNS, ["pytorch_model.bin"]),
        (["unet/config.json", "vae/config.json"], ["vae", "vae/*"], ["vae/config.json"]),
    ],
)
def test_snapshot_of_any_repository(server, names, patterns, expected):
    """By the rules of `choose_files`; later without the network."""
    server.repositories["me/mine"] = dict.fromkeys(names, b"{}")
    with online():
        folder = hub.fetch("me/mine", patterns)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    assert sorted(files) == expected
    server.repositories.clear()
    with online():
        assert hub.fetch("me/mine", patterns) == folder


def test_fetch_command_downloads_all_parts_and_keeps_them(server, capsys):
    server.repositories["AILab-CVC/seed-tokenizer-2"] = {"seed_quantizer.pt": b"q" * 300}
    # The publisher's repository is gone, the mirror's is in a folder.
    server.repositories["me/mine"] = {"unclip/vae/config.json": b"{}", "other.json": b"{}"}
    command = ["fetch", "8b", "--json", "--mirror", "unclip=me/mine/unclip"]
    assert main(command) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["problems"] == []
    weights = Path("pretrained")
    assert (weights / "seed_llama_8b_sft/pytorch_model.bin").read_bytes() == WEIGHTS
    assert (weights / "seed_tokenizer/eva_vit_g.pth").read_bytes() == WEIGHTS
    assert (weights / "seed_tokenizer/seed_quantizer.pt").is_file()
    assert (weights / "stable-diffusion-2-1-unclip/vae/config.json").is_file()
    assert SystemConfig.find("8b").has("llm", "tokenizer", "detokenizer")
    assert " GB to download, " in output.err
    # Once more: nothing.
    server.requests.clear()
    assert main(command) == 0 and server.downloads() == []
    assert "0 files of me/mine/unclip downloaded, 1 kept" in capsys.readouterr().err


def test_fetch_command_names_what_it_does_not_get(server, capsys):
    assert main(["fetch", "8b", "--json"]) == 1
    output = capsys.readouterr()
    error = output.err
    assert json.loads(output.out)["folders"] == ["pretrained/seed_llama_8b_sft"]
    assert (
        "unclip: not downloaded into pretrained/stable-diffusion-2-1-unclip (stabilityai" in error
    )
    assert "sd2-community/stable-diffusion-2-1-unclip: Client error '404" in error
    assert Path("pretrained/seed_llama_8b_sft/config.json").is_file()  # the others are there
    assert main(["fetch", "seed-1"]) == 1
    error = capsys.readouterr().err
    assert "causal_qformer.pth: download it by hand (the links in SEED-1.md" in error
    assert Path("pretrained/eva_vit_g.pth").is_file()


def test_problems_of_other_parts_do_not_stop_a_conversion(server, tmp_path):
    by_hand = OriginalPart(name="hand", folder="pretrained", by_hand={"x.pth": "a link"})
    gone = OriginalPart(name="gone", folder="pretrained", hub="me/gone")
    made = OriginalPart(name="made", folder="pretrained/made", convert="os:listdir")
    with online():
        problems = fetch_parts([WantedPart(part) for part in (by_hand, gone, made)], tmp_path)
    assert problems[0].startswith("gone: not downloaded")
    assert problems[1] == f"{tmp_path}/pretrained/x.pth: download it by hand (a link)."
    assert (tmp_path / "pretrained/made").is_dir()


def test_files_of_a_whole_repository_are_wanted_once():
    assert [part.files for part in wanted_parts("lavit")] == [original_parts()["lavit"].files]


def test_fetch_command_of_one_seed_x_takes_its_vision_encoder_out_of_qwen_vl(server, capsys):
    seed_x = {}
    for model in ("seed_x", "seed_x_i"):
        seed_x |= {f"{model}/{part}/pytorch_model.bin": WEIGHTS for part in ("llm", "agent")}
    for stage in ("first_stage", "second_stage"):
        seed_x[f"seed_detokenizer/{stage}/pytorch_model.bin"] = WEIGHTS
    seed_x["cvlm_llama2_tokenizer_100img_and_224loc_addpatch/tokenizer.model"] = b"words"
    server.repositories["AILab-CVC/SEED-X-17B"] = seed_x
    server.repositories["stabilityai/stable-diffusion-xl-base-1.0"] = {"unet/config.json": b"{}"}
    shard = io.BytesIO()
    torch.save({"transformer.visual.proj": torch.ones(2), "lm_head.weight": torch.ones(3)}, shard)
    names = dict.fromkeys(("transformer.visual.proj", "lm_head.weight"), "pytorch_model.bin")
    server.repositories["Qwen/Qwen-VL-Chat"] = {
        "pytorch_model.bin.index.json": json.dumps({"weight_map": names}).encode(),
        "pytorch_model.bin": shard.getvalue(),
    }
    assert main(["fetch", "seed-x-i"]) == 0, capsys.readouterr().err
    config = SystemConfig.find("seed-x-i")
    assert config.has("llm", "agent", "tokenizer", "vision", "sdxl", "detokenizer")
    encoder = load_state_dict("pretrained/QwenViT/qwen_vit_G.pt")
    assert encoder["proj"].tolist() == [1, 1] and len(encoder) == 1
    # Other models of the repository are left out, and what was made needs its source no more.
    assert not Path("pretrained/seed_x").exists()
    assert not Path("pretrained/seed_detokenizer/second_stage").exists()
    shutil.rmtree("pretrained/Qwen-VL-Chat")
    assert main(["fetch", "seed-x-i"]) == 0 and not Path("pretrained/Qwen-VL-Chat").exists()
    # A conversion that was killed has left a partial file.
    Path("pretrained/QwenViT/qwen_vit_G.pt").rename("pretrained/QwenViT/.qwen_vit_G.pt.tmp")
    Path("pretrained/QwenViT/.unfinished.qwen-vit").touch()
    assert main(["fetch", "seed-x-i"]) == 0
    assert Path("pretrained/QwenViT/qwen_vit_G.pt").is_file()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["8c"], r"did you mean '8b'\?"),
        (["8b", "--mirror", "unclop=a/b"], r"no part 'unclop' \(did you mean 'unclip'\?\)"),
        (["8b", "--mirror", "unclip=https://x.org"], r"unclip needs a hub repository"),
        (["8b", "--mirror", "unclip=/data/unclip"], r"unclip needs a hub repository"),
        (["8b", "--mirror", "eva_vit_g.pth=a/b"], r"eva_vit_g.pth needs a URL"),
    ],
)
def test_fetch_command_with_unknown_names(server, capsys, command, message):
    assert main(["fetch", *command]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert server.requests == []


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        (
            WEIGHTS[:-500],
            "Consistency check failed: file should be of size 10240 but has size 9740",
        ),
        (WEIGHTS[:-1] + b"!", "pytorch_model.bin: SHA-256"),
    ],
    ids=["truncated", "tampered"],
)
def test_damaged_files_are_refused_and_the_mirror_is_tried(server, served, reason):
    server.served[FILE] = served
    (problem,) = fetch()
    assert reason in problem and "mirror/b: Client error '404" in problem
    file = Path("pretrained/llm/pytorch_model.bin")
    assert not file.exists()
    server.repositories["mirror/b"] = dict(server.repositories[LLM])
    assert fetch() == [] and file.read_bytes() == WEIGHTS


def test_a_known_checksum_replaces_the_hubs(server):
    part = OriginalPart(
        name="8b", folder="pretrained/llm", hub=LLM, sha256={"pytorch_model.bin": "0" * 64}
    )
    assert "instead of 000000000000…" in fetch(part)[0]
    assert not Path("pretrained/llm/pytorch_model.bin").exists()


def test_an_interrupted_download_continues(server, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_downloads(patch)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    server.requests.clear()
    assert fetch() == []
    assert server.downloads() == [f"{LLM}/pytorch_model.bin from bytes=2000-"]
    assert Path("pretrained/llm/pytorch_model.bin").read_bytes() == WEIGHTS
    assert not list(Path("pretrained/llm").glob("*.part"))


def test_a_dropped_connection_is_continued(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.dropped_after[FILE] = 5000
    assert fetch() == []
    assert server.downloads()[-1].startswith(f"{LLM}/pytorch_model.bin from bytes=")
    assert Path("pretrained/llm/pytorch_model.bin").read_bytes() == WEIGHTS


def test_a_busy_hub_is_asked_again(server, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    server.failures[f"/api/models/{LLM}"] = [(429, {"Retry-After": "40"}), (503, {})]
    server.failures[FILE] = [(502, {})] * 4
    assert fetch() == []
    assert pauses == [40, 2, 1, 2, 4, 8]
    assert Path("pretrained/llm/pytorch_model.bin").read_bytes() == WEIGHTS
    # Not without end.
    server.failures[f"/api/models/{LLM}"] = [(503, {})] * 9
    assert "503 Service Unavailable" in fetch()[0]


@pytest.mark.parametrize(
    ("status", "headers", "reason"),
    [
        (403, {"X-Error-Code": "GatedRepo"}, "its page on the hub grants access; then set"),
        (401, {"X-Error-Code": "RepoNotFound"}, "no such repository, or a private one"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "not accepted"),
        (200, {}, "not the answer of a hub, but perhaps that of a proxy"),
    ],
    ids=["gated", "private", "token", "proxy"],
)
def test_refused_downloads_say_what_helps(server, status, headers, reason):
    server.failures[f"/api/models/{LLM}"] = [(status, headers)]
    (problem,) = fetch()
    assert f"({LLM}: {reason}" in problem or f"({LLM}: HF_TOKEN is {reason}" in problem


def fetch_vision(monkeypatch: pytest.MonkeyPatch, server: LoopbackHub, **fields: Any) -> Path:
    """The file with a URL, of the tokenizer with these fields."""
    part = original_parts()["tokenizer"]
    urls = {"eva_vit_g.pth": f"{server.url}/eva_vit_g.pth"}
    monkeypatch.setitem(original_parts(), "tokenizer", replace(part, urls=urls, **fields))
    monkeypatch.delenv(downloads.MIRRORS)
    with online():
        return downloads.fetch_file("eva_vit_g.pth", Path("cache"))


def test_a_web_page_is_no_file(server, monkeypatch):
    server.failures["/eva_vit_g.pth"] = [(200, {"Content-Type": "text/html"})]
    with pytest.raises(CheckpointError, match="a web page instead of a file"):
        fetch_vision(monkeypatch, server)


def test_a_known_checksum_holds_for_a_file_with_a_url(server, monkeypatch):
    with pytest.raises(CheckpointError, match=r"SHA-256 \w+… instead of 0000"):
        fetch_vision(monkeypatch, server, sha256={"eva_vit_g.pth": "0" * 64})


def test_a_hub_that_is_not_there_is_named(server, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert f"({LLM}: no connection to 127.0.0.1:9 (" in fetch()[0]


def test_a_proxy_without_its_package(server, monkeypatch):
    import huggingface_hub

    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setitem(sys.modules, "socksio", None)
    huggingface_hub.close_session()
    assert "SOCKS" in fetch()[0]
    huggingface_hub.close_session()


@pytest.mark.parametrize("changed", [False, True], ids=["same", "changed"])
def test_an_interrupted_url_continues_if_it_is_the_same_file(server, monkeypatch, changed):
    with monkeypatch.context() as patch:
        interrupt_downloads(patch)
        with pytest.raises(KeyboardInterrupt):
            fetch_vision(patch, server)
    server.requests.clear()
    if changed:
        server.files["/eva_vit_g.pth"] = WEIGHTS[::-1]
    file = fetch_vision(monkeypatch, server)
    assert file.read_bytes() == server.files["/eva_vit_g.pth"]
    start = "" if changed else " from bytes=2000-"
    assert server.downloads() == [f"eva_vit_g.pth{start}"]


def test_too_little_space_is_reported_before_the_download(server, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0.0 GB, but its disk has 0.0 GB free"):
        fetch()
    assert server.downloads() == []


def test_other_files_are_kept(server):
    folder = Path("pretrained/llm")
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "config.json").write_bytes(b'{"mine": 1}')
    assert "config.json is another file (11 bytes instead of 2)" in fetch()[0]
    assert (folder / "config.json").read_bytes() == b'{"mine": 1}'
    # A converted file stands for the original one.
    (folder / "pytorch_model.safetensors").touch()
    assert fetch(force=True) == []
    assert (folder / "config.json").read_bytes() == b"{}"
    assert not (folder / "pytorch_model.bin").exists()


# ---- without `seed fetch`


def files_of(folder: Path, *left_out: str) -> dict[str, bytes]:
    """A folder as a repository."""
    files: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(left_out):
            files[name] = path.read_bytes()
    return files


@pytest.fixture
def small_8b(server, tiny_folder, tmp_path) -> LoopbackHub:
    """A small SEED-LLaMA under the names of the original 8B, and a checkout without weights."""
    tokenizer = tiny_folder / "seed_tokenizer"
    server.repositories["AILab-CVC/seed-tokenizer-2"] = files_of(tokenizer, "diffusion_model")
    mirror = "sd2-community/stable-diffusion-2-1-unclip"
    server.repositories[mirror] = files_of(tokenizer / "diffusion_model")
    server.repositories[LLM] = files_of(tiny_folder / "seed_llama")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / ".project-root").touch()
    transform = tmp_path / "configs/transform/clip_transform.yaml"
    transform.write_text(transform.read_text().replace("224", "32"))
    return server


def test_programs_of_seed_llama_download_at_their_start(small_8b, capsys):
    command = ["--device", "cpu", "--image", str(ROOT / "images/fox.png")]
    assert tokenizer_script(command) == 2 and small_8b.requests == []
    assert "the original weights are not on this disk" in capsys.readouterr().err
    with online():
        assert tokenizer_script(command) == 0
        assert llama_script("8b", [*command, "--prompt", "What is it?"]) == 0
    assert Path("cat.jpg").is_file()
    # Everything has arrived.
    small_8b.requests.clear()
    assert llama_script("8b", [*command, "--prompt", "What is it?"]) == 0
    assert small_8b.requests == []


def test_a_system_downloads_its_parts(small_8b, monkeypatch):
    assert not SystemConfig.find("8b").has("llm")
    with pytest.raises(CheckpointError, match="not on this disk"):
        SystemConfig.find("8b").require("llm")
    assert small_8b.requests == []
    with monkeypatch.context() as patch, online():
        interrupt_downloads(patch)
        with pytest.raises(KeyboardInterrupt):
            SystemConfig.find("8b").require("llm")
    assert Path("pretrained/seed_llama_8b_sft/config.json").is_file()
    # The next start continues.
    with online():
        config = SystemConfig.find("8b").require("llm", "tokenizer", "detokenizer")
    assert Path("pretrained/seed_llama_8b_sft/model.safetensors").is_file()
    assert config.llm == Path("pretrained/seed_llama_8b_sft")


def test_build_model_downloads_to_a_new_path(server, tiny_lavit_folder, tmp_path):
    server.repositories["rain1011/LaVIT-7B-v2"] = files_of(tiny_lavit_folder)
    path = tmp_path / "LaVIT_weight"
    with pytest.raises(CheckpointError, match="no such folder"):
        build_model(path, model_dtype="fp32")
    with online():
        model = build_model(path, model_dtype="fp32")
    assert isinstance(model.generate({"image": str(ROOT / "images/fox.png")})[0], str)
    assert files_of(path, ".").keys() == files_of(tiny_lavit_folder).keys()
