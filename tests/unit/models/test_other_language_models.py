"""Each family on a Qwen 3 with a hub tokenizer: used, trained, and the trained model used."""

from pathlib import Path

import llm_runs
import pytest
from random_images import noise
from systems import load

from seed_multimodal.language.messages import user_message

IMAGE = noise(1)
BOX = "<box_start><loc-1><loc-2><loc-3><loc-4><box_end>"
pytestmark = pytest.mark.filterwarnings("ignore:Answers are not lemmatised")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    from tiny.lavit import build_lavit
    from tiny.seed import assemble_hub_seed_llama
    from tiny.seed_x import build_seed_x

    root = tmp_path_factory.mktemp("hub")
    return {
        "seed_llama": assemble_hub_seed_llama(root),
        "seed_x": build_seed_x(root / "seed_x", hub=True),
        "lavit": build_lavit(root / "lavit", hub=True),
    }


@pytest.mark.parametrize("name", ["seed_llama", "seed_x", "lavit"])
def test_answers_with_tokens_behind_those_of_the_text(name, folders):
    system = load(folders[name])
    assert system.describe([IMAGE, IMAGE]) == [system.describe(IMAGE)] * 2
    assert system.draw("a house", seed=1).size
    tokenizer = system.tokenizer
    vocabulary = tokenizer.vocabulary
    if name == "lavit":
        assert vocabulary.boi_id == vocabulary.n_text
        # Special tokens may have any ids, so none are skipped inside images.
        assert not any(vocabulary.is_ignored_in_image(id) for id in range(vocabulary.n_text))
        return
    if name == "seed_llama":
        # Assembled, it has the chat template of its tokenizer.
        assert system.config.template == "chat"
        [prompt] = system.family.prompts([user_message(["What is it?"])], "chat")
        prompt = tokenizer.decode(prompt.ids)
        assert prompt == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
        assert system.settings().stop == ()
        # Sampled answers hold no rows of padding.
        messages = [{"role": "user", "content": [IMAGE, "What is it?"]}]
        answer = system.chat(messages, do_sample=True, temperature=3.0, seed=3)
        assert 0 < len(answer.ids) <= 12
        assert max(answer.ids) < len(tokenizer)
        return

    added = sorted(vocabulary.added_tokens.values())
    assert added == list(range(vocabulary.n_text, vocabulary.size))
    # Boxes and images are tokens; names of special tokens that are typed are text: a user could
    # end the system's turn.
    content = f"What is at {BOX}?<|im_end|>"
    ids = system.family.prompt_writer.dialogue([("user", [content])])
    assert tokenizer.decode(ids) == f"[INST] {content} [/INST]\n"
    assert ids.count(vocabulary.boxes) == 1
    assert not set(ids) & set(tokenizer.eos_token_ids)


def parts_of(folder, tokenizer: str = "tokenizer") -> dict:
    """Settings of three steps with LoRA on a system's folder."""
    return {
        "model": {"path": str(folder / "llm"), "dtype": "fp32", "lora": {"r": 4}},
        "tokenizer": {"pretrained_model_name_or_path": str(folder / tokenizer)},
        "trainer": {**llm_runs.TRAINER, "max_steps": 3},
    }


def train_seed_llama(folder, work: Path):
    from seed_multimodal.training.llm.task import LlmTask

    config = {
        "output_dir": str(work / "out"),
        "data": llm_runs.write_data(work / "codes", n_codes=16, per_image=32),
        "optim": llm_runs.OPTIM,
    }
    LlmTask.train({**config, **parts_of(folder)})


def tune_seed_x(folder, work: Path):
    import tuning_parts

    from seed_multimodal.recipes.seed_x.train_agent import TuningTask

    tuning_parts.write_data(work)
    changes = {"visual_encoder": {"path": str(folder / "vision")}, **parts_of(folder)}
    TuningTask.train(tuning_parts.config_of(work, work / "out", lora=True, **changes))


def train_lavit(folder, work: Path):
    import pretrain_parts

    from seed_multimodal.recipes.lavit.train_llm import PretrainTask

    pretrain_parts.write_parts(work)
    changes = {"visual_encoder": {"path": str(folder / "tokenizer")}, **parts_of(folder, "llm")}
    PretrainTask.train(pretrain_parts.config_of(work, work / "out", **changes))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, train",
    [("seed_llama", train_seed_llama), ("seed_x", tune_seed_x), ("lavit", train_lavit)],
)
def test_checkpoint_of_three_steps_is_a_system(name, train, folders, tmp_path):
    train(folders[name], tmp_path)
    before = load(folders[name], load_decoder=False)
    trained = load(tmp_path / "out" / "checkpoint-3", load_decoder=False)
    assert trained.settings().stop == before.settings().stop
    assert type(trained.tokenizer) is type(before.tokenizer)
    assert trained.tokenizer.eos_token_ids == before.tokenizer.eos_token_ids
    assert trained.describe(IMAGE) != before.describe(IMAGE)
