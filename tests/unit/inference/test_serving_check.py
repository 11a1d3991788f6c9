"""`seed check-llm`: what a completion server reads of a language model's folder."""

from tiny import write_json
from tiny.language import random_llm, write_hub_tokenizer

from seed_multimodal.cli.main import main
from seed_multimodal.language.hub_tokenizer import HubTokenizer


def test_image_tokens_of_a_hub_tokenizer_are_written_for_the_server(tmp_path, capsys):
    """vLLM refuses ids beyond its tokenizer's length, and these are in a file of ours."""
    from transformers import AutoTokenizer

    hub = write_hub_tokenizer(tmp_path / "hub", ["a fox in a meadow"])
    tokenizer = HubTokenizer.create(hub, n_codes=16, tokens_per_image=4)
    tokenizer.save_pretrained(tmp_path / "system" / "seed_tokenizer")
    llm = random_llm("qwen3", tokenizer.vocabulary.size, tie_word_embeddings=True)
    llm.save_pretrained(tmp_path / "system" / "llm")
    system = {"llm": "llm", "tokenizer": "seed_tokenizer"}
    write_json(tmp_path / "system" / "system.json", system)
    command = ["check-llm", "--model", str(tmp_path / "system")]
    served = tmp_path / "served"
    assert main([*command, "--tokenizer-out", str(served)]) == 0
    assert f"--tokenizer {served} " in capsys.readouterr().out
    plain = AutoTokenizer.from_pretrained(served)
    assert len(plain) == tokenizer.vocabulary.size
    assert plain.decode(tokenizer.encode("a fox <img></img>")) == "a fox <img></img>"
