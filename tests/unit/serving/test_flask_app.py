"""The HTTP backend over the tiny system, through Flask's test client and over a real socket."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import warm_python
from PIL import Image

from seed_multimodal.configured import system_from_configs
from seed_multimodal.errors import CheckpointError, ConfigError
from seed_multimodal.images.io import image_to_base64
from seed_multimodal.serving.codes_backend import CodesSystem
from seed_multimodal.serving.flask_app import check_address, create_app, serve
from seed_multimodal.serving.schema import JSON_LINES, Limits
from seed_multimodal.systems.seed_llama import SeedLlama

ROOT = Path(__file__).resolve().parents[3]

ASK = "USER: <image>What is it?\nASSISTANT:"


@pytest.fixture(scope="module")
def client(tiny):
    return create_app(tiny).test_client()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def ask(client: Any, **body: Any) -> tuple[int, dict[str, Any]]:
    response = client.post("/generate", json=body)
    return response.status_code, response.get_json()


def test_a_question_about_a_picture(client, tiny, png, picture) -> None:
    status, answer = ask(client, text=ASK, images=[b64(png)], max_new_tokens=8, temperature=0)
    assert status == 200 and set(answer) == {"text", "images", "images_ids", "error_msg"}
    assert answer["images_ids"] == tiny.tokenize(picture).tolist() and answer["images"] == []
    again = ask(client, text=ASK, images=answer["images_ids"], max_new_tokens=8, temperature=0)[1]
    assert again["text"] == answer["text"]  # codes say the same as the picture


def test_words_that_nanos_world_does_not_have_are_reported(tiny) -> None:
    spec = replace(tiny.spec, known_words=ROOT / "pretrained/nano/known_words.json")
    nano = create_app(SeedLlama(spec, tiny.tokenizer, tiny.llm, tiny.pictures)).test_client()
    told = [ask(nano, text=f"USER: Is there {what}?\nASSISTANT:", images=[], max_new_tokens=2, temperature=0)[1]
            for what in ("a zebra", "a panda")]
    assert "'zebra'" in told[0]["error_msg"][0] and "150 things" in told[0]["error_msg"][0]
    assert told[1]["error_msg"] == []


def test_previews_come_before_the_answer_if_they_are_asked_for(client, tiny) -> None:
    body = {"text": "USER: Please draw a fish.\nASSISTANT:", "images": [], "force_boi": True, "max_new_tokens": 34,
            "seed": 1, "temperature": 0}
    plain = ask(client, **body)[1]
    response = client.post("/generate", json={**body, "previews": True})
    *previews, answer = map(json.loads, response.get_data(as_text=True).splitlines())
    assert response.status_code == 200 and response.mimetype == JSON_LINES and answer == plain
    assert [(one["picture"], one["codes"]) for one in previews][:2] == [(0, 8), (0, 16)]
    for one in previews[:2]:
        codes = plain["images_ids"][0][:one["codes"]]
        assert one["preview"] == image_to_base64(tiny.pictures.preview(codes, 1)) != plain["images"][0]
    words = ask(client, text=ASK.replace("<image>", ""), images=[], max_new_tokens=2, temperature=0, previews=True)
    assert words[0] == 200 and set(words[1]) == {"text", "images", "images_ids", "error_msg"}  # nothing to preview
    assert ask(client, text="x", images=[], previews=1)[1]["error"] == "'previews' must be true or false, not a number."
    assert ask(client, text="<image>", images=[[99]], previews=True)[0] == 400  # before anything is sent


def test_a_fault_after_a_preview_is_the_last_line(tiny) -> None:
    class Failing(CodesSystem):
        def decode(self, codes: list[int], request: Any) -> Image.Image:
            raise ValueError("a bug")

    response = create_app(Failing(tiny)).test_client().post("/generate", json={
        "text": "USER: Draw.\nASSISTANT:", "images": [], "force_boi": True, "previews": True, "temperature": 0})
    last = json.loads(response.get_data(as_text=True).splitlines()[-1])
    assert last["error"] == "The server failed inside; its log has the details."


def test_a_forced_picture_is_drawn(client, tiny, png) -> None:
    status, answer = ask(client, text="USER: Please draw a fish.\nASSISTANT:", images=[], force_boi=True,
                         max_new_tokens=1, seed=1)
    assert status == 200 and answer["text"] == "Here is the picture. <image>" and answer["error_msg"] == []
    image = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
    assert image.format == "PNG" and image.size == (16, 16)
    assert np.array_equal(np.asarray(image), np.asarray(tiny.reconstruct(answer["images_ids"], seed=1)[0]))
    assert not np.array_equal(np.asarray(image), np.asarray(tiny.reconstruct(answer["images_ids"], seed=0)[0]))
    edited = ask(client, text="USER: <image>Make it green.\nASSISTANT:", images=[b64(png)], force_boi=True,
                 max_new_tokens=33)[1]
    assert edited["text"] == "Here it is. <image>" and len(edited["images_ids"]) == 2


def test_a_picture_that_is_sent_again_is_not_encoded_again(client, tiny, png) -> None:
    passes: list[int] = []
    hook = tiny.pictures.model.visual_encoder.register_forward_hook(lambda *_: passes.append(1))
    other = io.BytesIO()
    Image.new("RGB", (33, 44), (9, 200, 77)).save(other, format="PNG")
    body = {"text": ASK, "images": [b64(other.getvalue())], "max_new_tokens": 3}
    try:
        first = ask(client, **body)[1]
        again = {**body, "text": f"{ASK} a cat.\n{ASK}", "images": [b64(other.getvalue()), b64(png)]}
        assert ask(client, **again)[1]["images_ids"] == [first["images_ids"][0], *tiny.tokenize(png).tolist()]
        passes.clear()
        assert ask(client, **again)[1]["images_ids"][0] == first["images_ids"][0] and not passes
    finally:
        hook.remove()


def test_the_prompt_is_the_one_of_tuning(tiny, png) -> None:
    """A client's single string and the library's turns give the same ids, pictures in answers included."""
    seen: list[list[int]] = []

    class Watched(CodesSystem):
        """The tiny system, its language model replaced by a recorder."""

        def generate(self, asked: Any, request: Any) -> list[int]:
            seen.append(asked.prompt)
            return [self.tokenizer.eos_id]

    codes = tiny.tokenize(png)[0].tolist()
    client = create_app(Watched(tiny)).test_client()
    text = ("USER: <image>What is it?\nASSISTANT:  a cat.\nUSER: Draw it.\nASSISTANT:  Here it is. <image>\n"
            "USER: Thanks\nASSISTANT:")
    assert ask(client, text=text, images=[codes, codes])[0] == 200
    turns = [("user", [codes, "What is it?"]), ("assistant", ["a cat."]), ("user", ["Draw it."]),
             ("assistant", ["Here it is.", codes]), ("user", ["Thanks"])]
    assert seen[0] == tiny.prompt_ids(turns)


def test_a_picture_that_broke_off_does_not_end_the_conversation(client) -> None:
    """The page sends back what it was given; that is shorter where the tokens of an answer were used up."""
    whole = list(range(16)) * 2
    status, answer = ask(client, text="<image><image> and <image> What is it?", images=[whole, whole[:23], []])
    assert status == 200 and answer["images_ids"][:3] == [whole, whole[:23], []]
    assert answer["error_msg"][:2] == [
        "images[1] broke off after 23 of 32 codes and was left out.",
        "images[2] broke off after 0 of 32 codes and was left out."]


@pytest.mark.parametrize(("body", "words"), [
    ({"images": []}, "lacks 'text'"), ({"text": "x"}, "lacks 'images'"), ({"text": 3, "images": []}, "'text' must be"),
    ({"text": "x", "images": {}}, "'images' must be a list"), ({"text": "x", "images": [4]}, r"images\[0\]"),
    ({"text": "<image>", "images": []}, "1 <image> placeholders"), ({"text": "x", "images": [[0] * 32]}, "0 <image>"),
    ({"text": "<image>", "images": [[0] * 33]}, "33 codes"), ({"text": "<image>", "images": [[16] * 32]}, "code 16"),
    ({"text": "<image>", "images": [[-1] * 32]}, "code -1"),
    ({"text": "<image>", "images": [[True] * 32]}, "whole numbers"),
    ({"text": "<image>", "images": [[10**30] * 32]}, "codes lie between"),
    ({"text": "<image>", "images": ["@@@"]}, "base64"), ({"text": "<image>", "images": [""]}, r"images\[0\]"),
    ({"text": "<image>", "images": [b64(b"not a picture at all")]}, r"images\[0\]"),
    ({"text": "x", "images": [], "temperature": "hot"}, "'temperature'"),
    ({"text": "x", "images": [], "temperature": -1}, "'temperature'"),
    ({"text": "x", "images": [], "top_p": 1.5}, "'top_p'"),
    ({"text": "x", "images": [], "num_beams": 0}, "'num_beams'"),
    ({"text": "x", "images": [], "num_beams": 1.5}, "'num_beams'"),
    ({"text": "x", "images": [], "max_new_tokens": 10**9}, "'max_new_tokens'"),
    ({"text": "x", "images": [], "force_boi": "yes"}, "'force_boi'"),
    ({"text": "x", "images": [], "seed": -3}, "'seed'"),
    ({"text": "x" * 40_000, "images": []}, "characters"),
    ({"text": "<image>" * 17, "images": [[0] * 32] * 17}, "17 entries"),
])
def test_bad_requests_get_400_and_one_sentence(client, body, words) -> None:
    status, answer = ask(client, **body)
    assert status == 400
    assert answer["error_msg"] == [answer["error"]] and answer["images"] == [] and "\n" not in answer["error"]
    assert re.search(words, answer["error"]), answer["error"]


def test_a_body_that_is_no_object(client) -> None:
    assert client.post("/generate", json=[1]).status_code == 400
    assert client.post("/generate", data="{", content_type="application/json").status_code == 400
    assert client.post("/generate", data="x").status_code == 415
    assert client.get("/elsewhere").status_code == 404 and client.put("/generate", json={}).status_code == 405


def test_a_body_too_large_is_refused_unread(tiny) -> None:
    client = create_app(tiny, limits=Limits(max_body_bytes=1 << 20)).test_client()
    response = client.post("/generate", json={"text": "x" * (2 << 20), "images": []})
    assert response.status_code == 413 and "1 MiB" in response.get_json()["error"]


def test_a_picture_too_large_is_refused_from_its_header(tiny) -> None:
    client = create_app(tiny, limits=Limits(max_image_pixels=10_000)).test_client()
    buffer = io.BytesIO()
    Image.new("L", (200, 200)).save(buffer, format="PNG")
    status, answer = ask(client, text=ASK, images=[b64(buffer.getvalue())])
    assert status == 400 and "images[0]" in answer["error"]


def test_a_conversation_too_long_for_the_model(client) -> None:
    status, answer = ask(client, text="word " * 3000, images=[])
    assert status == 400 and "context" in answer["error"]


def test_a_fault_inside_is_500_without_details(tiny, caplog) -> None:
    class Broken(CodesSystem):
        def spans(self, text: str) -> list[str]:
            raise RuntimeError("secret path /home/me")

    status, answer = ask(create_app(Broken(tiny)).test_client(), text="x", images=[])
    assert status == 500 and "secret" not in str(answer) and "secret" in caplog.text


def test_zero_temperature_and_zero_top_p_mean_greedy(client) -> None:
    bodies = [{"temperature": 0}, {"top_p": 0, "temperature": 1.0}, {"temperature": 0, "seed": 9}]
    usual = {"text": "USER: hi\nASSISTANT:", "images": [], "max_new_tokens": 10}
    texts = {ask(client, **usual, **body)[1]["text"] for body in bodies}
    assert len(texts) == 1


def test_a_seed_repeats_an_answer(client) -> None:
    body = {"text": "USER: hi\nASSISTANT:", "images": [], "max_new_tokens": 30, "temperature": 5.0, "top_p": 1.0}
    answers = [ask(client, seed=seed, **body)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_concurrent_requests_take_turns_and_health_does_not_wait(tiny) -> None:
    """Two requests are never inside the model together, and /health answers meanwhile."""
    inside, most, gate = [0], [0], threading.Event()

    class Slow(CodesSystem):
        def generate(self, asked: Any, request: Any) -> list[int]:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            gate.wait(10)
            time.sleep(0.01)
            inside[0] -= 1
            return [self.tokenizer.eos_id]

    app = create_app(Slow(tiny))
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(lambda: ask(app.test_client(), text="x", images=[])) for _ in range(4)]
        while not inside[0]:
            time.sleep(0.01)
        health = app.test_client().get("/health").get_json()
        gate.set()
        assert [future.result()[0] for future in waiting] == [200] * 4
    assert most[0] == 1 and health["busy"] is True and health["answered"] == 0
    assert app.test_client().get("/health").get_json()["answered"] == 4


@pytest.mark.process
def test_a_real_socket_on_the_loopback_address(tiny, png) -> None:
    said: list[str] = []
    threading.Thread(target=serve, args=(create_app(tiny),), kwargs={"port": 0, "log": said.append},
                     daemon=True).start()
    for _ in range(500):
        if said:
            break
        time.sleep(0.02)
    address = said[-1].split("answering at ")[1].split()[0]
    assert address.startswith("http://127.0.0.1:")
    answer = requests.post(address, json={"text": ASK, "images": [b64(png)], "max_new_tokens": 4}, timeout=60).json()
    assert len(answer["images_ids"]) == 1
    port = int(address.split(":")[2].split("/")[0])
    with pytest.raises(ConfigError, match=f"127.0.0.1:{port}"):
        serve(create_app(tiny), port=port, log=None)
    started = subprocess.run(
        [warm_python.PYTHON, str(ROOT / "gradio_demo" / "seed_llama_flask.py"), "--system", "/no/such/model", "--port",
         str(port)], capture_output=True, text=True, timeout=120)
    assert started.returncode == 2  # the port is looked at before the model, which is not there either
    assert started.stderr == (f"seed_llama_flask: Cannot listen on 127.0.0.1:{port}: the port is taken or not allowed; "
                              "choose another with --port.\n")


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 65536), ("192.0.2.1", 0), ("no.such.host.invalid", 0)])
def test_an_address_where_nothing_can_listen_is_refused(host, port) -> None:
    with pytest.raises(ConfigError, match=f"{host}:{port}"):
        check_address(host, port)


def test_a_socket_file_is_an_address(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # such names may have about 100 letters
    host, lines = "unix://server.sock", []
    thread = threading.Thread(target=lambda: serve(create_app(tiny), host=host, port=0, log=lines.append), daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while thread.is_alive() and not (lines and Path("server.sock").is_socket()) and time.monotonic() < deadline:
        time.sleep(0.01)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("server.sock")
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert b" 200 " in client.makefile("rb").readline()
    assert lines == ["Init Done... answering at unix://server.sock (Ctrl-C stops)."]


def test_a_server_of_three_files_names_every_missing_part_at_once(tmp_path) -> None:
    (tmp_path / "words.yaml").write_text(
        "_target_: models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
        f"pretrained_model_name_or_path: {tmp_path}/words\ndiffusion_path: {tmp_path}/drawing\n")
    (tmp_path / "llm.yaml").write_text("_target_: transformers.LlamaForCausalLM.from_pretrained\n"
                                       f"pretrained_model_name_or_path: {tmp_path}/llama_14b\n")
    (tmp_path / "drawing").mkdir()
    files = {"model": tmp_path / "llm.yaml", "tokenizer": tmp_path / "words.yaml",
             "image_transform": ROOT / "configs" / "transform" / "clip_transform.yaml"}
    with pytest.raises(CheckpointError) as caught:
        system_from_configs(**files)
    said = str(caught.value)
    assert f"seed-tokenizer-2 and eva_vit_g.pth into {tmp_path}/words, AILab-CVC/seed-llama-14b-sft into " in said
    assert said.endswith("or start scripts/start_backend_nano.sh (--system nano), which runs now.")
    assert "--model" not in said and "unclip" not in said
    (tmp_path / "drawing").rmdir()
    with pytest.raises(CheckpointError, match=f"unclip .* into {tmp_path}/drawing"):
        system_from_configs(**files)


@pytest.mark.process
@pytest.mark.parametrize("offline", ["0", "1"])
def test_folders_named_like_those_of_the_hub_are_looked_into(tmp_path, offline) -> None:
    (tmp_path / "mine" / "words" / "diffusion_model").mkdir(parents=True)
    (tmp_path / "mine" / "llama").mkdir()
    (tmp_path / "words.yaml").write_text(
        "_target_: models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained\n"
        "pretrained_model_name_or_path: mine/words\n")
    (tmp_path / "llm.yaml").write_text("_target_: transformers.LlamaForCausalLM.from_pretrained\n"
                                       "pretrained_model_name_or_path: mine/llama\n")
    started = subprocess.run(
        [warm_python.PYTHON, str(ROOT / "gradio_demo" / "seed_llama_flask.py"), "--port", "0", "--model", "llm.yaml",
         "--tokenizer", "words.yaml", "--image_transform", str(ROOT / "configs" / "transform" / "clip_transform.yaml")],
        cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": offline}, capture_output=True, text=True, timeout=120)
    assert started.returncode == 2 and "mine/words: holds no tokenizer weights" in started.stderr


def test_a_file_that_names_nothing_to_build_is_refused(tmp_path) -> None:
    (tmp_path / "words.yaml").write_text("pretrained_model_name_or_path: mine/words\n")
    with pytest.raises(ConfigError, match=r"words\.yaml: must name what to build by '_target_'\."):
        system_from_configs(model=tmp_path / "words.yaml", tokenizer=tmp_path / "words.yaml",
                            image_transform=tmp_path / "words.yaml")
