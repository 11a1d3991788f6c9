"""Downloads of the originals' parts from a hub on this machine: mirrors, damaged and interrupted
files, disk space, `seed fetch`, systems that download their parts."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import loopback_hub
import pytest
import torch
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from repository import ROOT
from yaml_tables import read_tables

from seed_multimodal.cli.main import main
from seed_multimodal.errors import CheckpointError
from seed_multimodal.pipelines.config import SystemConfig
from seed_multimodal.state_dicts import load_state_dict
from seed_multimodal.weights import fetch as fetching
from seed_multimodal.weights import find
from seed_multimodal.weights.catalogue import WEIGHT_PATTERNS, Part, catalogue
from seed_multimodal.weights.fetch import fetch_parts, online

LLM = "AILab-CVC/seed-llama-8b-sft"
UNCLIP = "stabilityai/stable-diffusion-2-1-unclip"
UNCLIP_MIRROR = "sd2-community/stable-diffusion-2-1-unclip"
UNCLIP_FOLDER = Path("pretrained/stable-diffusion-2-1-unclip")
WEIGHTS = bytes(range(256)) * 40
# The one file of the URL, and one of the hub: path on the server, local path.
URL_FILE = ("/eva_vit_g.pth", Path("pretrained/seed_tokenizer/eva_vit_g.pth"))
HUB_FILE = (
    f"/{UNCLIP}/resolve/{loopback_hub.COMMIT}/unet/diffusion_pytorch_model.bin",
    UNCLIP_FOLDER / "unet/diffusion_pytorch_model.bin",
)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[LoopbackHub]:
    """A hub with parts of 8b, in place of huggingface.co; the working directory is an empty
    repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(find, "REPOSITORY", tmp_path)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 300)
    monkeypatch.setattr(fetching, "TIMEOUT", 300)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with loopback_hub.running() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        server.repositories[LLM] = {"config.json": b"{}", "pytorch_model.bin": WEIGHTS}
        server.repositories[UNCLIP] = {
            "model_index.json": b"{}",
            "unet/diffusion_pytorch_model.bin": WEIGHTS,
        }
        server.repositories["AILab-CVC/seed-tokenizer-2"] = {"seed_quantizer.pt": b"q" * 300}
        server.files["/eva_vit_g.pth"] = WEIGHTS
        mirrors = f"eva_vit_g.pth={server.url}/eva_vit_g.pth"
        monkeypatch.setenv(fetching.MIRRORS, mirrors)
        yield server


@pytest.fixture
def fetch(server, capsys):
    """`seed fetch` with arguments; returns its problems, which decide its exit code."""

    def run(*arguments: str) -> list[str]:
        capsys.readouterr()
        status = main(["fetch", *arguments, "--json"])
        problems = json.loads(capsys.readouterr().out)["problems"]
        assert status == bool(problems)
        return problems

    return run


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """Seconds of the pauses, which take no time here."""
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    return pauses


# ---- faults of a hub

LISTING = f"/api/models/{UNCLIP}"
TABLES = read_tables(__file__)
FAULTS = TABLES["faults"]
SENT = {"truncated": WEIGHTS[:-500], "tampered": WEIGHTS[:-1] + b"!"}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fetch_from_a_faulty_hub(server, fetch, pauses, fault):
    # A file that is not as listed never gets its name; another source replaces a broken one.
    path, local = HUB_FILE
    listing = fault.get("listing", [])
    file = fault.get("file", [])
    named = fault.get("named")
    server.failures = {LISTING: [*listing], path: [*file]}
    server.served[path] = SENT.get(fault.get("sent"), WEIGHTS)
    problems = fetch("unclip")
    if named:
        assert UNCLIP in problems[0] and named in problems[0] and not local.exists()
        server.failures = {LISTING: [*listing], path: [*file]}
        server.repositories[UNCLIP_MIRROR] = server.repositories[UNCLIP]
        assert fetch("unclip") == []
    assert local.read_bytes() == WEIGHTS
    assert not [*UNCLIP_FOLDER.rglob("*.unfinished*")]
    # A broken connection is continued.
    resumed = [name for name in server.downloads() if name.endswith("from bytes=5000-")]
    assert bool(resumed) == (5000 in file)


@pytest.mark.parametrize("state", ["kept", "changed on its server", "filled"])
def test_fetch_after_an_interruption(server, fetch, pauses, state):
    # The rest is downloaded, but not the rest of another file, nor what nothing proves.
    path, local = URL_FILE
    server.failures[path] = [len(WEIGHTS), 5000, (404, {})]  # the first one looks it up
    assert fetch("tokenizer")
    unfinished = local.with_name(".unfinished.eva_vit_g.pth")
    (partial,) = unfinished.iterdir()
    if state == "filled":
        partial.write_bytes(b"y" * len(WEIGHTS))
    if state == "changed on its server":
        server.files[path] = WEIGHTS[::-1]
    server.requests.clear()
    assert fetch("tokenizer") == []
    assert local.read_bytes() == server.files[path] and not unfinished.exists()
    assert (f"{local.name} from bytes=5000-" in server.downloads()) == (state == "kept")


# Of a plain address: content, whether its length is stated, next answers → what the problem names.
ADDRESSES = {
    "empty": (b"", True, [], ""),
    "web page": (WEIGHTS, True, [(200, {"Content-Type": "text/html"})], "web page"),
    "no length": (WEIGHTS, False, [], "no length"),
    "half, no length": (WEIGHTS, False, [5000, 5000], "no length"),
}


@pytest.mark.parametrize("content, is_sized, answers, named", ADDRESSES.values(), ids=ADDRESSES)
def test_fetch_from_an_address(server, fetch, monkeypatch, content, is_sized, answers, named):
    path, local = URL_FILE
    server.files[path] = content
    server.failures[path] = [*answers]
    server.unsized = set() if is_sized else {path}
    monkeypatch.setitem(catalogue().parts["tokenizer"].urls, local.name, server.url + path)
    monkeypatch.delenv(fetching.MIRRORS)
    problems = " ".join(fetch("tokenizer"))
    assert named in problems and bool(named) == bool(problems)
    assert local.exists() != bool(named)


@pytest.mark.parametrize(
    "name", ["../../../x.json", "/{}/x.json", "a/../../../x.json", "a\\..\\x.json", "a//x.json"]
)
def test_fetch_writes_nothing_outside_of_a_parts_folder(server, fetch, tmp_path, name):
    # The server chooses the names of files: another user's data could be replaced.
    name = name.format(tmp_path)
    server.repositories[UNCLIP] = {"model_index.json": b"{}", name: b"{}"}
    assert repr(name) in fetch("unclip")[0]
    assert not [*tmp_path.rglob("*x.json")]


def test_fetch_without_a_connection(fetch, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (problem,) = fetch("unclip")
    assert "127.0.0.1:9" in problem


def test_fetch_parts_with_known_checksums(server):
    # They hold instead of the hub's, and for files whose server states none.
    part = Part(
        name="8b",
        folder="pretrained/llm",
        hub=LLM,
        urls={"vision.pth": f"{server.url}/eva_vit_g.pth"},
        sha256={"pytorch_model.bin": "0" * 64, "vision.pth": "0" * 64},
    )
    with online():
        problems = fetch_parts([part], Path())
    assert "pytorch_model.bin: SHA-256" in problems[0] and "vision.pth: SHA-256" in problems[1]
    assert [file.name for file in Path("pretrained/llm").glob("[!.]*")] == ["config.json"]


def test_fetch_with_too_little_space_downloads_nothing(server, fetch, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "space" in fetch("unclip")[0]
    assert server.downloads() == []


def test_fetch_keeps_the_users_files(fetch):
    (UNCLIP_FOLDER / "unet").mkdir(parents=True)
    index = UNCLIP_FOLDER / "model_index.json"
    index.write_bytes(b'{"mine": 1}')
    assert str(index) in fetch("unclip")[0]
    assert index.read_bytes() == b'{"mine": 1}'
    # A converted file stands for the original one.
    HUB_FILE[1].with_suffix(".safetensors").touch()
    assert fetch("unclip", "--force") == []
    assert index.read_bytes() == b"{}"
    assert not HUB_FILE[1].exists()


# ---- parts of a model


def test_fetch_downloads_all_parts_once(server, capsys):
    # The publisher's repository is gone, the mirror's is in a folder.
    del server.repositories[UNCLIP]
    server.repositories["me/mine"] = {"unclip/vae/config.json": b"{}", "other.json": b"{}"}
    command = ["fetch", "8b", "--mirror", "unclip=me/mine/unclip"]
    assert main(command) == 0
    assert Path("pretrained/seed_llama_8b_sft/pytorch_model.bin").read_bytes() == WEIGHTS
    assert URL_FILE[1].read_bytes() == WEIGHTS
    assert (UNCLIP_FOLDER / "vae/config.json").is_file()
    assert SystemConfig.find("8b").has("llm", "tokenizer", "detokenizer")
    assert "me/mine/unclip" in capsys.readouterr().err  # the source
    # Presigned links and some mirrors refuse HEAD.
    assert {method for method, path, _ in server.requests if path == URL_FILE[0]} == {"GET"}
    server.requests.clear()
    assert main(command) == 0 and server.downloads() == ["eva_vit_g.pth"]  # only its headers


def test_fetch_names_what_it_does_not_get(server, fetch):
    del server.repositories[UNCLIP]
    (problem,) = fetch("8b")
    assert all(name in problem for name in ("unclip", str(UNCLIP_FOLDER), UNCLIP_MIRROR, "404"))
    assert Path("pretrained/seed_llama_8b_sft/config.json").is_file()  # the others arrive
    # SEED-1's parts, which only the user can download: the problem says how.
    problems = " ".join(fetch("seed-1"))
    assert "causal_qformer.pth" in problems and "SEED-1.md" in problems
    assert Path("pretrained/eva_vit_g.pth").is_file()


@pytest.mark.slow
def test_fetch_of_one_seed_x_takes_its_vision_encoder_out_of_qwen_vl(server, fetch):
    seed_x = {}
    for model in ("seed_x", "seed_x_i"):
        seed_x |= {f"{model}/{part}/pytorch_model.bin": WEIGHTS for part in ("llm", "agent")}
    for stage in ("first_stage", "second_stage"):
        seed_x[f"seed_detokenizer/{stage}/pytorch_model.bin"] = WEIGHTS
    seed_x["cvlm_llama2_tokenizer_100img_and_224loc_addpatch/tokenizer.model"] = b"words"
    server.repositories["stabilityai/stable-diffusion-xl-base-1.0"] = {"unet/config.json": b"{}"}
    shard = io.BytesIO()
    torch.save({"transformer.visual.proj": torch.ones(2), "lm_head.weight": torch.ones(3)}, shard)
    names = dict.fromkeys(("transformer.visual.proj", "lm_head.weight"), "pytorch_model.bin")
    server.repositories["Qwen/Qwen-VL-Chat"] = {
        "pytorch_model.bin.index.json": json.dumps({"weight_map": names}).encode(),
        "pytorch_model.bin": shard.getvalue(),
    }
    encoder = Path("pretrained/QwenViT/qwen_vit_G.pt")

    # A problem of another part does not stop the conversion.
    assert "AILab-CVC/SEED-X-17B" in " ".join(fetch("seed-x-i"))
    assert encoder.is_file()
    server.repositories["AILab-CVC/SEED-X-17B"] = seed_x
    assert fetch("seed-x-i") == []
    config = SystemConfig.find("seed-x-i")
    assert config.has("llm", "agent", "tokenizer", "vision", "sdxl", "detokenizer")
    weights = load_state_dict(encoder)
    assert weights["proj"].tolist() == [1, 1] and len(weights) == 1
    # Other models of the repository are left out, and what was made needs its source no more.
    assert not Path("pretrained/seed_x").exists()
    assert not Path("pretrained/seed_detokenizer/second_stage").exists()
    shutil.rmtree("pretrained/Qwen-VL-Chat")
    assert fetch("seed-x-i") == [] and not Path("pretrained/Qwen-VL-Chat").exists()
    # A conversion that was killed has left a partial file.
    encoder.rename(encoder.with_name(".qwen_vit_G.pt.tmp"))
    encoder.with_name(".unfinished.qwen-vit").mkdir()
    assert fetch("seed-x-i") == []
    assert encoder.is_file()


# ---- without `seed fetch`


@pytest.mark.parametrize("case", TABLES["snapshots"].values(), ids=TABLES["snapshots"])
def test_hub_fetch_of_any_repository(server, case):
    # No weights twice; later without the network.
    part = case["part"]
    patterns = catalogue().parts[part].files if part else WEIGHT_PATTERNS
    server.repositories["me/mine"] = dict.fromkeys(case["names"], b"{}")
    with online():
        folder = find.find_path("me/mine", patterns)
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    assert sorted(files) == case["expected"]
    server.repositories.clear()
    with online():
        assert find.find_path("me/mine", patterns) == folder


def test_local_folder_of_a_snapshot_without_weights(server):
    # Reading a model's configuration leaves one in the hub client's cache.
    with online():
        snapshot = Path(huggingface_hub.snapshot_download(LLM, allow_patterns=["*.json"]))
        assert find.find_path(LLM) == Path("pretrained/seed_llama_8b_sft")
    shutil.rmtree("pretrained/seed_llama_8b_sft")
    assert find.find_path(LLM) == snapshot  # downloads are off


def files_of(folder, *left_out: str) -> dict[str, bytes]:
    """A folder as a repository."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(left_out):
            files[name] = path.read_bytes()
    return files


@pytest.fixture
def small_8b(server, tiny_folder) -> LoopbackHub:
    """A small SEED-LLaMA under the names of the original 8B."""
    tokenizer = tiny_folder / "seed_tokenizer"
    server.repositories["AILab-CVC/seed-tokenizer-2"] = files_of(tokenizer, "diffusion_model")
    del server.repositories[UNCLIP]
    server.repositories[UNCLIP_MIRROR] = files_of(tokenizer / "diffusion_model")
    server.repositories[LLM] = files_of(tiny_folder / "seed_llama")
    return server


@pytest.mark.slow
def test_a_system_downloads_its_parts(small_8b):
    config = SystemConfig.find("8b")
    assert not config.has("llm")
    with pytest.raises(CheckpointError):
        config.require("llm")
    assert small_8b.requests == []
    weights = f"/{LLM}/resolve/{loopback_hub.COMMIT}/model.safetensors"
    small_8b.failures[weights] = [(404, {})]
    with online(), pytest.raises(CheckpointError, match=LLM):
        SystemConfig.find("8b").require("llm")
    assert Path("pretrained/seed_llama_8b_sft/config.json").is_file()
    # The next start continues.
    with online():
        config = SystemConfig.find("8b").require("llm", "tokenizer", "detokenizer")
    assert Path("pretrained/seed_llama_8b_sft/model.safetensors").is_file()
    assert config.llm == Path("pretrained/seed_llama_8b_sft")


@pytest.mark.slow
def test_build_model_downloads_to_a_new_path(server, tiny_lavit_folder, tmp_path):
    from seed_multimodal.compat.lavit import build_model

    server.repositories["rain1011/LaVIT-7B-v2"] = files_of(tiny_lavit_folder)
    path = tmp_path / "LaVIT_weight"
    with pytest.raises(CheckpointError, match=str(path)):
        build_model(path, model_dtype="fp32")
    with online():
        model = build_model(path, model_dtype="fp32")
    assert isinstance(model.generate({"image": str(ROOT / "images/fox.png")})[0], str)
    assert files_of(path, ".").keys() == files_of(tiny_lavit_folder).keys()
