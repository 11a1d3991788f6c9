"""`seed eval bits`: the language model's loss on the codes of held-out images."""

import math

import pytest
import torch
from random_images import noise
from tiny import read_json, write_json

from seed_multimodal.cli.main import main
from seed_multimodal.errors import ConfigError
from seed_multimodal.evaluation.benchmark import open_benchmark, run
from seed_multimodal.language.messages import user_message

CAPTIONS = ["a fox", "a cat and a dog", "a tree"]


@pytest.fixture
def file(tmp_path):
    """Three images with captions."""
    items = []
    for index, caption in enumerate(CAPTIONS):
        noise(index).save(tmp_path / f"{index}.png")
        items.append({"image": f"{index}.png", "caption": caption})
    write_json(tmp_path / "captions.json", items)
    return tmp_path / "captions.json"


@pytest.mark.parametrize("family", ["tiny", "tiny_lavit"])
def test_bits_equal_those_of_one_pass(request, family, file, tmp_path):
    # By the ids of a prompt and of an image, one after the other, without the engine.
    system = request.getfixturevalue(family)
    summary = run(
        open_benchmark("bits", file=file, out=tmp_path / "out", images=file.parent, batch_size=2),
        lambda: system,
    )
    results = read_json(tmp_path / "out" / "results.json")
    expected = []
    for caption, result in zip(CAPTIONS, results, strict=True):
        vocabulary = system.tokenizer.vocabulary
        answer = [*vocabulary.code_to_id(result["codes"]), vocabulary.eoi_id]
        request_text = system.tasks.draw_request(caption) if system.config.tuned else caption
        text = prompt_text(system, request_text)
        ids = [*text, vocabulary.boi_id, *answer]
        with torch.no_grad():
            logits = system.llm(torch.tensor([ids])).logits[0].double()
        chosen = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])
        expected.append(-float(chosen[len(text) :].sum()) / math.log(2))
    assert [result["bits"] for result in results] == pytest.approx(expected, rel=1e-4)
    assert summary["bits"]["value"] == pytest.approx(sum(expected) / 3, rel=1e-4)
    assert summary["codes"] == sum(len(result["codes"]) for result in results) / 3


def prompt_text(system, request: str) -> list[int]:
    """The ids of a request up to its image."""
    [prompt] = system.family.prompts([user_message([request])], "draw")
    return [*prompt.ids, *system.tokenizer.encode_parts([system.tasks.draw_response])]


def test_bits_of_a_model_of_known_probabilities(tiny_folder, file, tmp_path, monkeypatch, capsys):
    # All tokens are equally likely: 32 codes and the end of the image cost log2 of their number.
    from seed_multimodal.pipelines.family import Family

    load = Family.of_parts.__func__

    def with_equal_scores(cls, *parts):
        family = load(cls, *parts)
        family.llm.lm_head.weight.data.zero_()
        return family

    monkeypatch.setattr(Family, "of_parts", classmethod(with_equal_scores))
    out = tmp_path / "out"
    argv = f"eval bits --model {tiny_folder} --captions {file} --images {file.parent} --out {out}"
    assert main([*argv.split(), "--device", "cpu"]) == 0
    summary = read_json(out / "summary.json")
    n_tokens = 32 + 1
    scores = read_json(tiny_folder / "seed_llama" / "config.json")["vocab_size"]
    assert summary["bits"]["value"] == pytest.approx(n_tokens * math.log2(scores), rel=1e-4)
    assert summary["codes"] == 32
    codes = [result["codes"] for result in read_json(out / "results.json")]
    in_use = [len(set(column)) for column in zip(*codes, strict=True)]
    assert summary["code_bits"] == pytest.approx(sum(map(math.log2, in_use)), abs=1e-3)


def test_bits_of_features_are_refused(tiny_x, file, tmp_path):
    with pytest.raises(ConfigError, match="features"):
        run(
            open_benchmark("bits", file=file, out=tmp_path / "out", images=file.parent),
            lambda: tiny_x,
        )
