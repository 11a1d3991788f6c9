"""Kind `llm_sequences`: exact ids of training sequences.

Checked: `tokenization.json` (every string -> ids, pieces, both decodings) with the fixture's own tokenizer folder.
Not covered yet: `cases.jsonl` and `pipeline.json`, the training sequences themselves; they belong to the LLM data room.
"""

from __future__ import annotations

from pathlib import Path

from runner import assert_same, read_json

from seed_multimodal.language.tokenizer import MultimodalTokenizer

KIND = "llm_sequences"


def check(folder: Path) -> None:
    expected = read_json(folder / "tokenization.json")
    tokenizer = MultimodalTokenizer.from_pretrained(folder / "tokenizer")
    vocabulary = tokenizer.vocabulary
    assert_same(len(tokenizer), expected["length"], "length")
    assert_same((tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id),
                (expected["bos"], expected["eos"], expected["pad"], expected["unk"]), "special ids")
    assert_same((vocabulary.n_text, vocabulary.boi_id, vocabulary.eoi_id),
                (expected["first_image_id"], expected["img_open"], expected["img_close"]), "image ids")
    assert expected["cases"], "the fixture holds no strings"
    for case in expected["cases"]:
        text = case["text"]
        ids = tokenizer.encode(text)
        assert_same(ids, case["ids"], f"ids of {text!r}")
        assert_same(tokenizer.encode(text, add_bos=True), case["ids_with_special_tokens"], f"ids with bos of {text!r}")
        assert_same(tokenizer.tokens(ids), case["tokens"], f"pieces of {text!r}")
        assert_same(tokenizer.decode(ids), case["decoded"], f"decoding of {text!r}")
        assert_same(tokenizer.decode(ids, skip_special_tokens=True), case["decoded_skip_special"],
                    f"decoding of {text!r} without special tokens")
