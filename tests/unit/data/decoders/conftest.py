"""A record and a tokenizer for each decoder: the table of the decoders' contract."""

import pytest
from yaml_tables import read_tables

TABLES = read_tables(__file__)
# Texts with few different words, for small vocabularies.
TEXTS = [
    "USER: red cat ASSISTANT: here [INST] make it blue [/INST] Question: What is it? Answer: a dog."
] * 30


@pytest.fixture(scope="session")
def tokenizer_of(tmp_path_factory, tokenizer, seedx_tokenizer):
    """`tokenizer_of(decoder)`: the nano tokenizer, or a tiny one of SEED-X or LaVIT."""
    from seed_multimodal.models.lavit.processing import LavitTokenizer
    from seed_nano.train.words import train_text_tokenizer

    folder = tmp_path_factory.mktemp("tokenizers")
    sizes = {"vocab_size": 320, "n_codes": 8, "tokens_per_image": 16}
    lavit = train_text_tokenizer(LavitTokenizer, TEXTS, folder, **sizes)
    families = {"seed_x": seedx_tokenizer, "lavit": lavit}
    return lambda decoder: families.get(decoder.partition(".")[0], tokenizer)


@pytest.fixture(scope="session")
def records(tokenizer, codes):
    """`records(image)`: decoder -> a record of required fields; `image`: opened, or a path."""
    named = "".join(tokenizer.tokens(tokenizer.vocabulary.image_ids(codes(0))))

    def make(image, table="required"):
        def fill(value):
            if isinstance(value, dict):
                return {key: fill(item) for key, item in value.items()}
            if isinstance(value, list):
                return [fill(item) for item in value]
            if value == "IMAGE":
                return image
            if isinstance(value, str) and value.startswith("codes of "):
                return [code for index in value.split()[2:] for code in codes(int(index))]
            return value.replace("TOKENS", named) if isinstance(value, str) else value

        return fill(TABLES[table])

    return make
