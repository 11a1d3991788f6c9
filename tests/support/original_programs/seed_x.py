"""A user's program for SEED-X: the originals' objects and calls, built by hydra from YAML files in
`configs/`.

python seed_x.py DEVICE    does what SEED-X's seven programs do; prints texts, and writes images
"""

import re
import sys

import hydra
import pyrootutils
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from omegaconf import OmegaConf
from PIL import Image

pyrootutils.setup_root(__file__, indicator=".project-root", pythonpath=True)

from src.data.any_res import process_anyres_image  # noqa: E402

DEVICE = sys.argv[1]
DTYPE = torch.float32
SDXL = "pretrained/stable-diffusion-xl-base-1.0"
# pixels of a view and tokens of an image: of nano-x
SIZE = 64
WORDS = 16
PLACEHOLDERS = "".join(f"<img_{index:05d}>" for index in range(WORDS))
GRIDS = [[columns * SIZE, rows * SIZE] for columns, rows in ((1, 1), (2, 2))]
FIRST = "sdxl_qwen_vit_resampler_l4_q64_pretrain_no_normalize"
DRAWING = {"num_inference_steps": 4, "guidance_scale": 1.0}
SECOND = "sdxl_qwen_vit_resampler_l4_q64_full_with_latent_image_pretrain_no_normalize"


def build(file, **options):
    return hydra.utils.instantiate(OmegaConf.load(f"configs/{file}.yaml"), **options)


tokenizer = build("tokenizer/clm_llama_tokenizer_224loc_anyres")
transform = build("processer/qwen_448_transform")
visual_encoder = build("visual_encoder/qwen_vitg_448").eval().to(DEVICE, dtype=DTYPE)
llm = build("clm_models/llm_seed_x_i", torch_dtype=DTYPE)
agent = build("clm_models/agent_seed_x_i", llm=llm).eval().to(DEVICE, dtype=DTYPE)
discrete_model = build("discrete_model/discrete_identity").to(DEVICE).eval()


def de_tokenizer(file):
    """An SDXL adapter that is ready to draw."""
    scheduler = DDIMScheduler.from_pretrained(SDXL, subfolder="scheduler")
    vae = AutoencoderKL.from_pretrained(SDXL, subfolder="vae").to(DEVICE, dtype=DTYPE)
    unet = UNet2DConditionModel.from_pretrained(SDXL, subfolder="unet").to(DEVICE, dtype=DTYPE)
    adapter = build(f"sdxl_adapter/{file}", unet=unet).to(DEVICE, dtype=DTYPE).eval()
    parts = {"discrete_model": discrete_model} if file == FIRST else {}
    adapter.init_pipe(
        vae=vae,
        scheduler=scheduler,
        visual_encoder=visual_encoder,
        image_transform=transform,
        dtype=DTYPE,
        device=DEVICE,
        **parts,
    )
    return adapter


def image_words(views):
    """The tokens of an image: each part between <patch> and </patch>, the whole between <img> and
    </img>."""
    return f"<patch>{PLACEHOLDERS}</patch>" * (views - 1) + f"<img>{PLACEHOLDERS}</img>"


def answer(prompt, image=None):
    """What the agent generates for a prompt, in which {image} stands for the image."""
    recorded = {}
    options = {"max_new_tokens": 120, "num_img_gen_tokens": WORDS}
    if image is not None:
        pixels, positions = process_anyres_image(image, transform, GRIDS, SIZE)
        prompt = prompt.format(image=image_words(len(pixels)))
        recorded = {
            "image_embeds": visual_encoder(pixels.to(DEVICE, dtype=DTYPE)),
            "patch_positions": positions,
            "embeds_cmp_mask": torch.tensor([True] * len(pixels)).to(DEVICE),
        }
    ids = torch.tensor(
        [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    ).to(DEVICE)
    if image is not None:
        placeholders = tokenizer.encode(PLACEHOLDERS, add_special_tokens=False)
        recorded["ids_cmp_mask"] = torch.isin(ids, torch.tensor(placeholders).to(DEVICE))[None]
    with torch.no_grad():
        return agent.generate(tokenizer=tokenizer, input_ids=ids[None], **recorded, **options)


first = de_tokenizer(FIRST)
second = de_tokenizer(SECOND)
fox = Image.open("images/fox.png").convert("RGB")
pair = Image.open("images/fox_and_snowman.png").convert("RGB")

# de-tokenizers, of one image and with a condition image
first.generate(image_pil=pair, seed=42, **DRAWING)[0].save("rebuilt.png")
second.generate(image_pil=pair, latent_image=pair, **DRAWING)[0].save("rebuilt_with_condition.png")

# image to text, and boxes
text = answer("[INST] {image}Describe this image briefly. [/INST]\n", pair)["text"]
print("describe:", re.sub("<[^>]*>", "", text).strip())
print(
    "find:",
    answer("[INST] {image}Where is the snowman? Show me the location. [/INST]\n", pair)["text"],
)

# text to image, forced by <img> and asked for
for name, prompt in (
    ("forced", "a noto fox in a meadow<img>"),
    ("asked", "[INST] Generate an image: a noto fox in a meadow [/INST]\n"),
):
    output = answer(prompt)
    print(f"{name}:", output["has_img_output"], output["num_gen_imgs"])
    if output["has_img_output"]:
        drawing = first.generate(image_embeds=output["img_gen_feat"].to(DEVICE), seed=1, **DRAWING)
        drawing[0].save(f"{name}.png")

# editing
output = answer("[INST] {image}Put it at night. [/INST]\n", fox)
print("edit:", output["has_img_output"], output["num_gen_imgs"])
if output["has_img_output"]:
    second.generate(image_embeds=output["img_gen_feat"], latent_image=fox, **DRAWING)[0].save(
        "edited.png"
    )
