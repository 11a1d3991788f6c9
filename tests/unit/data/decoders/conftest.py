"""A record and a tokenizer for each decoder: the table of the decoders' contract."""

import pytest

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
    one, two, three = codes(0), codes(1), codes(2)
    named = "".join(tokenizer.tokens(tokenizer.vocabulary.image_ids(one)))
    pair = {"question": "What is it?", "answer": "a dog."}
    edit = {"source_image_ids": one, "target_image_ids": two, "instruction": "make it blue"}
    dialogue = {"question": "Question: What? Question: red?", "answer": "Answer: a cat Answer: no"}
    turns = ["What is it?", "a dog.", "red?", "blue."]
    captions = {"caption0": "a dog", "caption1": "a cat", "caption2": "here"}

    def make(image) -> dict[str, dict]:
        edited = {"source_image": image, "target_image": image, "instruction": "make it blue"}
        user = {"role": "user", "content": [{"codes": one}, "What?"]}
        shown = {"role": "user", "content": [{"image": image}, "blue"]}
        drawn = {"role": "assistant", "content": ["here.", {"image": image}]}
        return {
            "pretrain.caption": {"image_ids": one, "text": "a dog"},
            "pretrain.interleaved": {"image_ids": [one, None, two], "texts": [None, "here", None]},
            "pretrain.video": {"image_ids": (one + two) * 2, "answer": "a dog"},
            "pretrain.text": {"text": "a red dog"},
            "pretrain.edit": edit,
            "pretrain.visual_question": {"image_ids": [one], "data": turns},
            "pretrain.text_conversation": {"data": turns},
            "sft.qa": {"image_ids": one, **pair},
            "sft.edit": edit,
            "sft.multi_edit": {"image_ids": one + two, "instruction0": "make it blue"},
            "sft.story": {"image_ids": one + two + three, **captions},
            "sft.difference": {"image_ids": one + two, **pair},
            "sft.interleaved": {"instruction": f"red {named} cat", "response": f"{named} here"},
            "sft.conversation": {"image_ids": one, **dialogue},
            "sft.video": {"image_ids": one + two, **pair},
            "sft.video_conversation": {"image_ids": one + two, **dialogue},
            "sft.visual_question": {"image_ids": [one, two], "instruction": "?", "outputs": "no"},
            "sft.text_conversation": {"data": turns},
            "chat": {"messages": [user, {"role": "assistant", "content": ["a dog."]}]},
            "seed_x.conversation": {"image": image, "data": turns},
            "seed_x.caption": {"image": image, "text": "a dog"},
            "seed_x.edit": edited,
            "seed_x.chat": {"messages": [shown, drawn]},
            "lavit.caption": {"image": image, "text": "a dog"},
            "lavit.question": {"image": image, **pair},
            "lavit.compose": edited,
        }

    return make
