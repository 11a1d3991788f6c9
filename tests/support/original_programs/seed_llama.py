"""A user's program for SEED-LLaMA: the originals' objects and calls, built by hydra from YAML files
in `configs/`.

python seed_llama.py DEVICE    writes rebuilt.png and drawn.png, prints codes and an answer
"""

import sys

import hydra
import pyrootutils
import torch
from omegaconf import OmegaConf
from PIL import Image

pyrootutils.setup_root(__file__, indicator=".project-root", pythonpath=True)

DEVICE = sys.argv[1]
GREEDY = {"num_beams": 1, "max_new_tokens": 80, "do_sample": False}


def build(file, **options):
    return hydra.utils.instantiate(OmegaConf.load(f"configs/{file}.yaml"), **options)


def image_text(tokenizer, codes):
    return "<img>" + "".join(f"<img_{int(code):05d}>" for code in codes) + "</img>"


def answer_ids(model, tokenizer, text):
    """New token ids after a prompt."""
    prompt = tokenizer(
        tokenizer.bos_token + text, add_special_tokens=False, return_tensors="pt"
    ).input_ids.to(DEVICE)
    return model.generate(input_ids=prompt, **GREEDY)[0][prompt.shape[1] :]


def save_image(tokenizer, ids, file):
    """Decode the codes between the first <img> and the first </img>."""
    begin, end = (
        tokenizer(token, add_special_tokens=False).input_ids[0] for token in ("<img>", "</img>")
    )
    first, last = (int(torch.where(ids == id)[0][0]) for id in (begin, end))
    shift = tokenizer.convert_tokens_to_ids("<img_00000>")
    tokenizer.decode_image((ids[first + 1 : last] - shift).reshape(1, -1))[0].save(file)


tokenizer = build("tokenizer/seed_llama_tokenizer_hf", device=DEVICE, load_diffusion=True)
transform = build("transform/clip_transform")
model = build("llm/seed_llama_8b", torch_dtype=torch.float32).eval().to(DEVICE)

# An image as codes, and drawn again from them.
pixels = transform(Image.open("images/fox.png").convert("RGB")).to(DEVICE)
codes = tokenizer.encode_image(image_torch=pixels)
print(*codes[0].tolist())
tokenizer.decode_image(codes)[0].save("rebuilt.png")

# Image to text, then text to image.
question = "Please provide an accurate and concise description of the given image."
ids = answer_ids(model, tokenizer, f"USER: {image_text(tokenizer, codes[0])}{question}\nASSISTANT:")
print(tokenizer.decode(ids, skip_special_tokens=True))
ids = answer_ids(model, tokenizer, "USER: Please draw a noto fox in a meadow.\nASSISTANT:")
save_image(tokenizer, ids, "drawn.png")
