"""The parts of each system, by their names in `system.json`."""

# Part → what it is; of the parts in brackets a system can do without.
PARTS: dict[str, dict[str, str]] = {
    "seed_llama": {"llm": "language model", "tokenizer": "folder that seed export-tokenizer made, with words",
                   "detokenizer": "[stable-unCLIP folder; default: the tokenizer's diffusion_model]"},
    "seed_x": {"llm": "language model", "agent": "resamplers: of a merged agent, or a checkpoint of the tuning",
               "tokenizer": "words", "vision": "vision tower", "sdxl": "[SDXL's unet/config.json, vae and scheduler]",
               "detokenizer": "[adapter of either stage]"},
    "lavit": {"llm": "[checkpoint of stage 2]", "words": "[text tokenizer; default: in the language model's folder]",
              "tokenizer": "what seed export-tokenizer --lavit made, with its decoder",
              "decoder": "[decoder of codes; default: the one trained with the pixels, else the tokenizer's]",
              "pixels": "[result of the pixel decoder's training, OUTPUT_DIR/pixels]"},
}
