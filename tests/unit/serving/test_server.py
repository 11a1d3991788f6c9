"""The server under waitress and as a program: clients that leave, too many requests, SIGTERM, wrong
flags.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
import warm_python
from real_processes import run_process
from repository import ROOT
from served import ON_CPU, PROGRAM, Running
from waiting import wait_until

from seed_multimodal.compat.seed_llama_yaml import system_from_configs
from seed_multimodal.entry import run_program
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.serving.app import create_app, listen

HI = "USER: hi\nASSISTANT:"
pytestmark = pytest.mark.process


class Gate:
    """Holds the language model before each of its passes until `open` is set."""

    def __init__(self, llm: Any) -> None:
        self.open = threading.Event()
        self.passes = 0
        self.hook = llm.get_decoder().register_forward_pre_hook(lambda *_: self.hold())

    def hold(self) -> None:
        self.passes += 1
        self.open.wait(30)


@pytest.fixture()
def gate(tiny) -> Iterator[Gate]:
    closed_gate = Gate(tiny.llm)
    yield closed_gate
    closed_gate.open.set()
    closed_gate.hook.remove()


def test_serve_drops_clients_that_left(tiny, gate: Gate):
    running = Running(tiny, max_running=1, max_waiting=3)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.ask)
        wait_until(lambda: gate.passes == 1)
        for _ in range(3):
            running.send_and_leave()
        wait_until(lambda: running.health()["waiting"] == 0)  # they left while they waited
        gate.open.set()
        assert first.result().status_code == 200
    gate.open.clear()
    gate.passes = 0
    running.send_and_leave()
    wait_until(lambda: gate.passes == 1)
    time.sleep(0.2)
    gate.open.set()
    wait_until(lambda: running.health()["running"] == 0)
    assert gate.passes < 100  # 400 tokens were asked for
    assert running.ask().status_code == 200 and running.health()["answered"] == 2


def test_serve_refuses_too_many_requests(tiny, gate: Gate):
    running = Running(tiny, max_running=1, max_waiting=3)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(running.ask) for _ in range(4)]
        wait_until(lambda: running.health()["waiting"] == 3)
        refused = running.ask()
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
        assert "3 requests wait already" in refused.json()["error"]
        assert running.health() == {"status": "ok", "running": 1, "waiting": 3, "answered": 0}
        gate.open.set()
        assert [ended.result().status_code for ended in waiting] == [200] * 4


def test_serve_survives_half_sent_and_oversized_requests(tiny):
    running = Running(tiny, max_body_bytes=1 << 20)
    sockets = [running.connect() for _ in range(40)]
    for index, sock in enumerate(sockets):
        sock.sendall(
            [
                b"POST /generate HTTP/1.1\r\nContent-Length: 50000\r\n\r\n" + b"x" * 20_000,
                b"GET / HT",
                b"POST /generate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
                b"",
            ][index % 4]
        )
    headers = {"Content-Type": "application/json"}

    def chunks(count: int) -> Iterator[bytes]:
        yield b'{"text": "USER: hi\\nASSISTANT:", "images": [], "max_new_tokens": 3'
        for _ in range(count):
            yield b" " * 65_536
        yield b"}"

    for count, status in ((0, 200), (3, 200), (20, 413)):
        answer = requests.post(running.address, data=chunks(count), headers=headers, timeout=60)
        assert answer.status_code == status
    assert running.ask().status_code == 200
    for sock in sockets:
        sock.close()


def test_listen_refuses_where_nothing_can_listen(tiny):
    port = Running(tiny).port
    for host, bad_port in (
        ("127.0.0.1", port),
        ("127.0.0.1", 65536),
        ("192.0.2.1", 0),
        ("no.such.host.invalid", 0),
    ):
        with pytest.raises(ConfigError, match=f"{host}:{bad_port}"):
            listen(host, bad_port, "token")
    started = run_process(
        f"{warm_python.PYTHON} {PROGRAM} --system /no/such/model --port {port}".split(),
        timeout=120,
    )
    assert (
        started.returncode == 2
    )  # the port is checked before the model, which is not there either
    assert started.stderr == (
        f"seed_llama_flask: Cannot listen on 127.0.0.1:{port}: the port is taken or not allowed; "
        "choose another with --port.\n"
    )


def test_listen_needs_a_token_beyond_loopback(tmp_path):
    with pytest.raises(ConfigError, match="0.0.0.0 is reachable from other machines"):
        listen("0.0.0.0", 0)
    listen("0.0.0.0", 0, "secret").close()


@pytest.mark.slow
def test_program_ends_by_sigterm_while_it_works(tiny_folder):
    program = subprocess.Popen(
        [warm_python.PYTHON, PROGRAM, "--system", str(tiny_folder), *ON_CPU],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert program.stdout is not None
    line = next(line for line in program.stdout if "answering at" in line)
    address = line.split("answering at ")[1].split()[0]
    body = {
        "text": "x",
        "images": [],
        "max_new_tokens": 2048,
        "num_beams": 8,
        "temperature": 5.0,
        "top_p": 1.0,
    }
    with ThreadPoolExecutor(3) as pool:
        pending = [pool.submit(requests.post, address, json=body, timeout=60) for _ in range(3)]
        time.sleep(0.5)
        program.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert program.wait(20) == 0 and time.monotonic() - start < 6
        for ended in pending:
            assert ended.exception() is not None or ended.result().status_code in (200, 503)


@pytest.mark.slow
def test_server_withstands_hostile_traffic(tiny_folder):
    done = run_process(
        (
            f"{warm_python.PYTHON} {ROOT / 'benchmarks' / 'hostile.py'} "
            f"--model {tiny_folder} --megapixels 1 --examples 15"
        ).split(),
        timeout=280,
    )
    results = json.loads(done.stdout)["results"]
    assert results["faults"] == [] and results["requests"] > 100
    assert done.returncode == 0, done.stderr
    assert results["peak_mb_above_idle"] < 600


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_serve_returns_freed_memory_between_blocks_in_use(tiny, monkeypatch):
    def anonymous_mb() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0]) / 1000

    monkeypatch.setattr("seed_multimodal.serving.app.TRIM_SECONDS", 0.1)
    Running(tiny)
    blocks = [b"x" * 100_000 for _ in range(2000)]  # 200 MB
    full = anonymous_mb()
    lasting = blocks[::50]
    del blocks
    wait_until(lambda: anonymous_mb() < full - 100)
    assert len(lasting) == 40


def test_serve_starts_full_collections_before_a_quarter_is_new(tiny):
    """Circles of old objects are freed by full collections alone."""
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    gc.collect()
    try:
        Running(tiny)
        before = gc.get_stats()[2]["collections"]
        _lasting = [[] for _ in range(100_000)]
        assert gc.get_stats()[2]["collections"] > before
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)


def test_program_refuses_a_system_with_a_part_of_it(tiny_folder: Path):
    program = runpy.run_path(PROGRAM)
    args = program["build_parser"]().parse_args(
        f"--system {tiny_folder} --model a.yaml --port 0".split()
    )
    args.debug = False
    with pytest.raises(
        ConfigError, match="--system names all that is served, --model a part of it"
    ):
        program["run"](args)


def test_program_refuses_flags_before_it_loads_or_listens(tmp_path, capsys):
    """A password file without a password, and flags of an engine that is not used."""
    program = runpy.run_path(PROGRAM)
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for flags, sentence in (
        (
            ["--token-file", f"{tmp_path}/absent"],
            f"--token-file {tmp_path}/absent: cannot be read ",
        ),
        (
            ["--token-file", f"{tmp_path}/binary"],
            f"--token-file {tmp_path}/binary: cannot be read ",
        ),
        (
            ["--token-file", f"{tmp_path}/empty"],
            f"--token-file {tmp_path}/empty is empty: write a password",
        ),
        (["--url", "http://127.0.0.1:1"], "--url is for --engine openai, not for torch."),
        (["--gguf", "x.gguf"], "--gguf is for --engine llama.cpp, not for torch."),
    ):
        argv = [*"--system /no/such/model --port 65536".split(), *flags]
        assert run_program(program["build_parser"](), program["run"], argv, name="flask") == 2
        assert capsys.readouterr().err.startswith(f"flask: {sentence}")
    (tmp_path / "token").write_text("secret\n")
    assert program["read_token"](tmp_path / "token") == "secret"


def test_models_of_three_files_is_the_stem(tiny_folder: Path, tmp_path):
    target = (
        "_target_: transformers.LlamaForCausalLM.from_pretrained\npretrained_model_name_or_path:"
    )
    (tmp_path / "seed_llama_8b.yaml").write_text(f"{target} {tiny_folder}/seed_llama\n")
    copy = tmp_path / "llama-v1.5"
    copy.symlink_to(tiny_folder / "seed_llama")
    for model, name in ((tmp_path / "seed_llama_8b.yaml", "seed_llama_8b"), (copy, "llama-v1.5")):
        system = system_from_configs(
            model=model,
            tokenizer=tiny_folder / "seed_tokenizer",
            llm_device="cpu",
            tokenizer_device="cpu",
        )
        listed = create_app(system).test_client().get("/v1/models").json["data"]
        assert [ended["id"] for ended in listed] == [name]


def test_program_names_a_missing_part_of_three_files(tmp_path):
    (tmp_path / "words.yaml").write_text(
        "_target_: models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
        f"pretrained_model_name_or_path: {tmp_path}/words\n"
    )
    files = {
        "model": ROOT / "configs" / "llm" / "seed_llama_8b.yaml",
        "tokenizer": tmp_path / "words.yaml",
        "image_transform": ROOT / "configs" / "transform" / "clip_transform.yaml",
    }
    with pytest.raises(
        CheckpointError, match=f"seed-tokenizer-2 and eva_vit_g.pth into {tmp_path}/words"
    ):
        system_from_configs(**files)
    (tmp_path / "words" / "diffusion_model").mkdir(parents=True)
    flags = [f"--{name}={file}" for name, file in files.items()]
    started = run_process(
        [warm_python.PYTHON, PROGRAM, "--port", "0", *flags],
        env={**os.environ, "HF_HUB_OFFLINE": "0"},
        timeout=120,
    )
    assert (
        started.returncode == 2 and f"{tmp_path}/words: holds no SEED-2 tokenizer" in started.stderr
    )
