"""Programs contract: every original program and every `seed` command, called in process with
recorded arguments; what it writes, prints and refuses.

A new program or command is tested by its row; the last test fails until it has one.
"""

import json
import re
import runpy
import sys
from collections.abc import Callable

import pytest
from PIL import Image
from random_images import noise
from repository import ROOT


def rows(table) -> dict[str, str]:
    """The lines `command -> text` of a table; a command may take several lines."""
    found = re.findall(r"^(\w[\s\S]+?)\s+->(.*)$", table, re.MULTILINE)
    return {" ".join(command.split()): text.strip() for command, text in found}


# {seed}, {seed_x} and {lavit} are tiny systems, image.png has 48 x 30 pixels.
# Commands that draw → the images that they write, with their sizes.
DRAWN = rows("""
# The originals.
scripts/seed_tokenizer_inference.py --model {seed} --image image.png -> cat.jpg 16x16
scripts/seed_llama_inference_8B.py --model {seed} --out results.v2
    -> results.v2/cat_sunglasses.jpg 16x16, results.v2/dog.jpg 16x16
SEED_Tokenizer/eval/seed_inference.py --model {seed} --image image.png -> recon_image.png 16x16
src/inference/eval_seed_x_detokenizer.py --model {seed_x} --image image.png
    -> vis/image_recon.jpg 16x16
src/inference/eval_seed_x_detokenizer_with_condition.py --model {seed_x} --image image.png
    -> vis/image_recon_with_condition.jpg 20x13
src/inference/eval_seed_x_detokenizer.py --model {seed} --image image.png
    -> vis/image_recon.jpg 16x16
src/inference/eval_img2edit_seed_x_edit.py --model {seed} --image image.png
    -> vis/1_Make it under the sunset.jpg 16x16
src/inference/eval_text2img_seed_x.py --model {seed_x} --prompt cat -> vis/cat.png 16x16
src/inference/eval_text2img_seed_x_i.py --model {seed_x} --prompt cat -> vis/cat.png 16x16
src/inference/eval_img2edit_seed_x_edit.py --model {seed_x} --image image.png
    -> vis/1_Make it under the sunset.jpg 20x13
src/lavit/text2image_synthesis.py --model {lavit} --prompt cat --ratio=3:2 --steps 1
    --num_return_images 2 -> output/cat.png 80x56, output/cat_2.png 80x56
src/lavit/multimodal_synthesis.py --model {lavit} image.png snow --steps 1
    -> output/image_snow.png 64x64
src/lavit/image_detokenize.py --model {lavit} --image image.png --steps 1
    -> output/image_rebuilt.png 64x64
src/lavit/inference.py --model {lavit} --image image.png --steps 1
    -> output/it2i_output.jpg 64x64, output/t2i_output.jpg 64x64
# `seed`.
seed reconstruct image.png --model {seed} --steps 1 -> outputs/image_rebuilt.png 16x16
seed reconstruct image.png --model {seed_x} --steps 1 -> outputs/image_rebuilt.png 16x16
seed draw cat --model {seed} --steps 1 --out a.jpg -> a.jpg 16x16
seed draw cat --model {lavit} --steps 1 --height 32 --width 40 -> outputs/cat.png 40x32
seed edit image.png green --model {seed} --steps 1 -> outputs/image_edited.png 16x16
seed edit image.png green --model {seed_x} --steps 1 -> outputs/image_edited.png 20x13
seed edit image.png green --model {seed_x} --ratio square -> outputs/image_edited.png 16x16
seed reconstruct image.png --model {seed_x} --condition image.png --image-guidance-scale 2
    -> outputs/image_rebuilt.png 20x13
""")
# Commands → what they print.
PRINTED = rows("""
scripts/seed_llama_inference_14B.py --model {seed} --image image.png --prompt What? ->
src/inference/eval_img2text_seed_x.py --model {seed_x} --image image.png ->
src/inference/eval_img2text_seed_x_i.py --model {seed_x} --image image.png ->
src/lavit/understanding.py --model {lavit} --image image.png --question What? -> What?
MultiModalLLM/eval/eval_vqa.py --model {seed} --image image.png --max-new-tokens 4 ->
gradio_demo/seed_llama_gradio.py --help -> --request_address
# Composed settings of the trainers.
MultiModalLLM/src/train/train.py trainer.max_steps=7 --cfg job -> max_steps: 7
MultiModalLLM/src/train/train_autoencoder.py data.batch_size=3 --cfg job -> batch_size: 3
MultiModalLLM/src/train/train_lavit.py trainer.max_steps=7 --cfg job -> max_steps: 7
MultiModalLLM/src/train/train_lavit_detokenizer.py optim.learning_rate=3 --cfg job
    -> learning_rate: 3
MultiModalLLM/src/train/train_rl.py data.group_size=3 --cfg job -> group_size: 3
MultiModalLLM/src/train/train_seed_decoder.py model.reads=embedding --cfg job -> reads: embedding
MultiModalLLM/src/train/train_seed_x_detokenizer.py model.stage=2 --cfg job -> stage: 2
MultiModalLLM/src/train/train_seed_x_sft.py trainer.max_steps=7 --cfg job -> max_steps: 7
# `seed`.
seed tokenize image.png --model {seed} --json -> "codes": [
seed tokenize image.png --model {lavit} --json -> "codes": [
seed describe image.png --model {seed} -> image.png:
seed ask image.png What? --model {seed_x} --max-new-tokens 4 -> image.png:
seed detect image.png cat --model {seed_x} -> image.png:
seed chat --message hi --model {seed} ->
seed verify {seed} --device cpu -> codes of cat.jpg
seed assemble seed-llama --llm {seed}/seed_llama --tokenizer {seed}/seed_tokenizer --out mine
    -> mine
seed init mine --like seed-llama -> train
""")
# Commands that end with exit code 2 → what the last line of stderr names.
REFUSED = rows("""
demo_recon.py --model absent -> absent
gradio_demo/seed_llama_flask.py --system absent --port 0 -> absent
# Before a model is loaded, which takes minutes.
gradio_demo/seed_llama_flask.py --system absent --port 65536 -> 65536
gradio_demo/seed_llama_flask.py --system absent --port 0 --token-file nowhere -> nowhere
gradio_demo/seed_llama_flask.py --system absent --port 0 --token-file image.png -> image.png
gradio_demo/seed_llama_flask.py --system absent --port 0 --token-file /dev/null -> null
gradio_demo/seed_llama_flask.py --system absent --port 0 --url http://127.0.0.1:1 -> --url
gradio_demo/seed_llama_flask.py --system absent --port 0 --gguf x.gguf -> --gguf
gradio_demo/seed_llama_flask.py --system absent --port 0 --model a.yaml -> --model
gradio_demo/seed_llama_flask.py --model absent --tokenizer absent.yaml
    --image_transform absent.yaml --port 0 -> absent.yaml
# The original weights, which are not on this disk.
scripts/seed_tokenizer_inference.py --device cpu -> pretrained/seed_tokenizer
scripts/seed_llama_inference_8B.py --device cpu -> pretrained/seed_llama_8b_sft
scripts/seed_llama_inference_14B.py --device cpu -> pretrained/seed_llama_14b_sft
# Flags that do not fit.
scripts/seed_llama_inference_8B.py --model {seed} --tokenizer a.yaml -> --tokenizer
scripts/seed_llama_inference_8B.py --engine openai -> --model 8b
src/inference/eval_text2img_seed_x.py --model {seed_x} --llm a.yaml -> --llm
src/inference/eval_seed_x_detokenizer_with_condition.py --model {seed} --image image.png -> SEED-X
src/lavit/evaluate.py --model_path {lavit} --annopath absent.json -> absent.json
# Data lie in the original's folders.
src/lavit/evaluate.py --model_path {lavit} --task_name caption --dataset nocaps
    -> data/nocaps/annotations/nocaps_val.json
src/tools/reload_qwen_vit.py --source absent -> absent
SEED_Tokenizer/train.py --cfg-path absent.yaml -> absent.yaml
SEED_Tokenizer/evaluate.py --cfg-path absent.yaml -> absent.yaml
MultiModalLLM/eval/eval_caption.py --captions absent.json -> absent.json
MultiModalLLM/eval/eval_caption_to_images.py --captions absent.json -> absent.json
MultiModalLLM/src/tools/merge_lora_weights.py --model_cfg absent.yaml --lora_model absent
    --save_path out -> absent.yaml
MultiModalLLM/src/tools/report_system.py --model {seed} --held_out absent.json --save_dir out
    -> absent.json
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel.py --tokenizer absent.yaml
    --data absent.yaml --save_dir out -> absent.yaml
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel_chat.py --tokenizer absent.yaml
    --data absent.yaml --save_dir out -> absent.yaml
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel_edit.py --tokenizer absent.yaml
    --data absent.yaml --save_dir out -> absent.yaml
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel_interleaved.py
    --tokenizer absent.yaml --data absent.yaml --save_dir out -> absent.yaml
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel_qa.py --tokenizer absent.yaml
    --data absent.yaml --save_dir out -> absent.yaml
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel_story.py
    --tokenizer absent.yaml --data absent.yaml --save_dir out -> absent.yaml
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel_video.py
    --tokenizer absent.yaml --data absent.yaml --save_dir out -> absent.yaml
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel.py --tokenizer absent.yaml
    --data absent.yaml --save_dir out --shard 2/2 -> --shard
MultiModalLLM/src/tools/extract_image_ids_to_torchdata_parallel.py --tokenizer absent.yaml
    --data absent.yaml --save_dir out --device cuda:1 --gpus 4 -> cuda:1
# Wrong settings of a training.
MultiModalLLM/src/train/train.py output_dir=x --learning_rat 1 -> '--learning_rate'
MultiModalLLM/src/train/train.py output_dir=x --num_train_epochs 3 -> --max_steps
MultiModalLLM/src/train/train.py output_dir=x --max_steps many -> max_steps
MultiModalLLM/src/train/train.py output_dir=x optim=pretrian -> 'pretrain'
MultiModalLLM/src/train/train.py output_dir=log/lr=1e-4 -> quotes
MultiModalLLM/src/train/train.py output_dir=x trainer.max_stepz=3 -> 'max_steps'
MultiModalLLM/src/train/train.py output_dir=x trainer.precision=fp8 -> precision
MultiModalLLM/src/train/train.py output_dir=x trainr.max_steps=3 -> 'trainer'
MultiModalLLM/src/train/train.py output_dir=x tokenizer.pretrained_model_name_or_path=null
    -> pretrained_model_name_or_path
MultiModalLLM/src/train/train.py output_dir=x model=nano_scratch model.atention=eager -> 'attention'
MultiModalLLM/src/train/train.py output_dir=x data=lavit_pretrain data.lenght=4 -> 'length'
MultiModalLLM/src/train/train.py output_dir=x data=lavit_pretrain data.too_long=splitt -> 'split'
MultiModalLLM/src/train/train.py output_dir=x data=lavit_pretrain
    data.sources=[{{name:a,files:b,decoder:pretrain.text,weight:0}}] -> sources[0] (a): weight
MultiModalLLM/src/train/train.py output_dir=x data=lavit_pretrain
    data.sources=[{{name:a,files:b,decoder:chat}},{{name:a,files:c,decoder:chat}}] -> 'a'
MultiModalLLM/src/train/train.py output_dir=x data.sample_weights=[1]
    data.datapipes=[{{_target_:os.system,data_dir:a}}]
    -> 'os.system'
MultiModalLLM/src/train/train.py output_dir=x data.sample_weights=[1]
    data.datapipes=[{{_target_:{pipes}_train.build_caption_datapipes_for_llm,reverse_ration:1}}]
    -> 'reverse_ratio'
MultiModalLLM/src/train/train.py output_dir=x data.sample_weights=[1]
    data.datapipes=[{{_target_:{pipes}_train.build_caption_datapipes_for_llm}}]
    -> 'data_dir'
# Pipes without a counterpart: what to use instead.
MultiModalLLM/src/train/train.py output_dir=x data.sample_weights=[1]
    data.datapipes=[{{_target_:{pipes}_train.build_retrieval_augmented_datapipes_for_llm}}]
    -> pretrain.interleaved
MultiModalLLM/src/train/train.py output_dir=x data.sample_weights=[1]
    data.datapipes=[{{_target_:{pipes}_train.build_caption_datapipes_with_pixels}}]
    -> extract_image_ids
MultiModalLLM/src/train/train.py output_dir=x data.sample_weights=[1]
    data.datapipes=[{{_target_:{pipes}_preprocess.build_m3it_datapipes_with_pixel_values}}]
    -> --fields plain
MultiModalLLM/src/train/train_seed_x_sft.py output_dir=x agent.losses.rec_los_scale=1
    -> rec_loss_scale
MultiModalLLM/src/train/train_seed_decoder.py output_dir=x model.student_steps=2 -> teacher
MultiModalLLM/src/train/train_seed_decoder.py output_dir=x model.teacher=any model.teacher_steps=4
    model.student_steps=3 -> student_steps
MultiModalLLM/src/train/train_seed_x_detokenizer.py output_dir=x model.sdxl=/nowhere -> /nowhere
MultiModalLLM/src/train/train_lavit_detokenizer.py output_dir=x data.sizes=[[16,4]] -> sizes
# Trainings and reports of nano.
src/seed_nano/train/__main__.py nano --preset test --work work --only vea -> 'vae'
src/seed_nano/train/__main__.py nano --preset test --work work train_vea.steps=3 -> 'train_vae'
src/seed_nano/train/__main__.py nano --preset none.yaml --work work -> none.yaml
src/seed_nano/report/__main__.py --model nano --out out --splits vol -> 'val'
src/seed_nano/report/__main__.py --model nano --out out --judge none -> none
src/seed_nano/record.py check absent -> config.yaml
src/seed_nano/record.py check absent --against absent.json -> absent.json
seed convert absent.pt -> absent.pt
seed plot absent -> absent
seed export-tokenizer --stage2 absent.pth --out out -> absent.pth
seed export-gguf --model absent --out out -> absent
seed check-llm --model absent -> absent
seed assemble seed-x --llm absent --tokenizer absent --out mine --agent absent --vision absent
    -> --llm
seed assemble seed-llama --llm absent --tokenizer {seed}/seed_tokenizer --out mine -> --llm
seed assemble seed-llama --llm {seed}/seed_llama --tokenizer {seed}/seed_tokenizer --out mine
    --settings {seed}/seed_llama/config.json -> 'architectures'
seed assemble lavit --llm absent --tokenizer absent --out mine -> --llm
seed assemble seed-glm-image --llm absent --tokenizer absent --out mine -> --llm
# Not the first listed originals.
seed fetch nano -> in pretrained/
seed fetch 8c -> '8b'
seed fetch 8b --mirror unclop=a/b -> 'unclip'
seed fetch 8b --mirror unclip=/data/unclip -> unclip
seed eval captions -> did you mean 'caption'
# Not asked about an image of ours.
seed eval vqa --images nowhere -> nowhere:
seed eval tokenizer --model {seed} --data absent --out out -> absent
seed eval prefix --model {seed} --data absent --out out -> absent
seed eval suite --model {seed} --data absent --out out -> absent
seed eval vqa --model {seed} --questions absent.json --out out -> absent.json
seed eval caption --model {seed} --captions absent.json --out out -> absent.json
seed eval bits --model {seed} --captions absent.json --out out -> absent.json
seed study absent.yaml -> absent.yaml
seed eval seedbench --model {seed} --questions absent.json --out out -> absent.json
seed eval text2image --model {seed} --captions absent.json --out out -> absent.json
seed eval geneval --model {seed} --judge absent --data absent --out out -> absent
seed eval geneval2 --model {seed} --judge absent --data absent --out out -> absent
seed eval dpg --model {seed} --judge absent --data absent --out out -> absent
seed eval dpg --model {seed} --judge absent --data absent --out out --image-folder no_drawings
    -> no_drawings
seed data check images -> seed_x.caption
seed data check absent.jsonl --decoder chats --tokenizer absent -> did you mean 'chat'
seed data convert absent.tar --out out -> absent.tar
seed data index absent.jsonl -> absent.jsonl
seed data index memory://d/none.tar -> memory://d/none.tar
seed data index nosuch://d/a.tar -> nosuch://d/a.tar
# Wrong values.
seed reconstruct image.png --model {seed} --codes 33 -> 32
seed reconstruct image.png --model {seed} --codes 8,16 --out one.png -> one.png
seed reconstruct image.png --model {seed} --codes-file nowhere.jsonl -> --codes-file
seed reconstruct image.png --model {seed} --steps 0 -> num_inference_steps
seed draw fox --model {seed} --out pic.heic -> pic.heic
seed draw fox --model {seed} --out pic.psd -> .png
seed draw fox fish --model {seed} --out - -> -
seed draw apple --model {seed} -n 2 --codes 8 -> --codes
seed chat --message fox --model {seed} --out a.png -> a.png
seed chat --image nowhere.png --message x --model {seed} -> nowhere.png
seed chat --image - --model {seed} -> --message
seed chat --image . --message x --model {seed} -> name its files
seed edit image.png green --model {seed} --max-new-tokens 20 -> 20
seed edit image.png green --model {seed} --out image.png/x -> image.png
seed edit image.png green --model {seed} --temperature -1 -> temperature
seed describe image.png --model {seed} --top-p nan -> top_p
seed describe image.png --model {seed} --kv-cache inf -> kv_cache
# Nothing can be made of these, known before a model is loaded.
seed reconstruct image.png --condition image.png --model nano -> nano-x
seed reconstruct image.png --condition {seed}/system.json --model nano-x -> text
seed init mine -> --llm
seed init mine --llm nowhere/at/all --encoder absent -> nowhere/at/all
seed init mine --llm Qwen/Qwen3-0.6B --encoder absent -> HF_HUB_OFFLINE
seed init mine --size tiny --encoder pretrained/siglip2 -> pretrained/siglip2
seed init mine --size tiny --data nowhere/pairs -> nowhere/pairs
seed init mine --size tiny --chats nowhere.json -> nowhere.json
# Classes of transformers that have no small network, or none that fits.
seed init mine --size tiny --llm bert -> bert
seed init mine --size tiny --llm qwen3_5 -> vocab_size
seed init mine --size tiny --encoder hiera -> [7, 7]
seed init mine --size tiny --encoder ijepa -> ijepa
""")


@pytest.fixture
def call(
    tiny_folder, tiny_x_folder, tiny_lavit_folder, tmp_path, monkeypatch
) -> Callable[[str], int]:
    """Calls a command in an empty working folder with image.png; returns its exit code."""
    monkeypatch.chdir(tmp_path)
    noise(1).save("image.png")

    def call(command: str) -> int:
        if "--model" in command and "{" in command:
            command += " --device cpu"
        folders = {"seed": tiny_folder, "seed_x": tiny_x_folder, "lavit": tiny_lavit_folder}
        program, *argv = command.format(**folders, pipes="src.data.torchdata").split()
        monkeypatch.setattr(sys, "argv", [program, *argv])
        try:
            if program == "seed":
                from seed_multimodal.cli.main import main

                return main(argv)
            monkeypatch.syspath_prepend(str((ROOT / program).parent))
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except SystemExit as ended:
            return int(ended.code or 0)
        return 0

    return call


@pytest.mark.parametrize("command", DRAWN)
def test_programs_draw(command, call, tmp_path, capsys):
    assert call(command) == 0
    files = [file for file in tmp_path.rglob("*.*g") if file.name != "image.png"]
    printed = capsys.readouterr().out
    drawn = []
    for file in files:
        name = str(file.relative_to(tmp_path))
        assert name in printed
        width, height = Image.open(file).size
        drawn.append(f"{name} {width}x{height}")
    assert ", ".join(sorted(drawn)) == DRAWN[command]


@pytest.mark.parametrize("command", PRINTED)
def test_programs_print(command, call, capsys):
    assert call(command) == 0
    printed = capsys.readouterr().out
    expected = PRINTED[command]
    if expected.endswith(":"):
        expected += " "  # and the answer
    assert expected in printed and printed.endswith("\n")


@pytest.mark.parametrize("command", REFUSED)
def test_programs_refuse(command, call, tmp_path, capsys):
    if (ROOT / REFUSED[command]).exists():
        pytest.skip("the original weights are on this disk")
    assert call(command) == 2
    printed = capsys.readouterr()
    assert REFUSED[command] in printed.err.splitlines()[-1]
    assert "Traceback" not in printed.err and printed.out == ""
    assert [file.name for file in tmp_path.rglob("*.*")] == ["image.png"]  # nothing is written


def test_every_program_and_command_has_a_row():
    # Of those whose flags are recorded.
    recorded = json.loads((ROOT / "tests" / "interfaces" / "interfaces.json").read_text())
    trainings = [name for name in recorded["trainings"] if name.endswith(".py")]
    programs = [*recorded["programs"], *(f"MultiModalLLM/src/train/{name}" for name in trainings)]
    for name in recorded["seed"]:
        if not any(command.startswith(f"{name} ") for command in recorded["seed"]):
            programs.append(name)
    commands = (*DRAWN, *PRINTED, *REFUSED)
    missing = [
        name for name in programs if not any(command.startswith(f"{name} ") for command in commands)
    ]
    assert len(programs) > 60 and missing == []
