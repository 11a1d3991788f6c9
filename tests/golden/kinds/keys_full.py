"""Full-size models on the meta device: names and shapes of the state dict in order, trained
parameters, buffers.

Not compared: dtypes after the originals' partial conversion to half precision (here a model has one
dtype); the CLIP vision encoder of stage 2 (`clip_model.*`, of transformers); the file of each
tensor of SEED-1; in SEED-X the order of the language model's keys (of transformers) and its rotary
buffers, which transformers no longer saves.
"""

import torch
from runner import assert_same

import seed_multimodal  # noqa: F401  (before diffusers)
from seed_multimodal.models.lavit.decoder import CodeDecoder, LavitDecoderConfig
from seed_multimodal.models.lavit.modeling import DynamicTokenizer, LavitTokenizerConfig
from seed_multimodal.models.seed.configuration import Seed1Config, Seed2Config
from seed_multimodal.models.seed.modeling import Seed1Tokenizer, Seed2Tokenizer
from seed_multimodal.models.seed_x.adapter import ResamplerXLV2, SDXLAdapter
from seed_multimodal.models.seed_x.modeling import ContinuousLVLM
from seed_multimodal.nn.vision.qwen import (
    INPUT_RESAMPLER,
    OUTPUT_RESAMPLER,
    QwenVit,
    QwenVitConfig,
    Resampler,
)
from seed_multimodal.recipes.seed.losses import Stage1Model, Stage2Model


def lavit_tokenizer() -> DynamicTokenizer:
    model = DynamicTokenizer(LavitTokenizerConfig())
    model.encoder.requires_grad_(False)
    return model


def seed_x_agent() -> ContinuousLVLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32330,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
    )
    reads, writes = Resampler(INPUT_RESAMPLER), Resampler(OUTPUT_RESAMPLER)
    return ContinuousLVLM(LlamaForCausalLM(config), reads, writes)


def sdxl_adapter() -> SDXLAdapter:
    """The resampler's part is recorded; the U-Net is only as wide as it needs."""
    from diffusers import UNet2DConditionModel

    return SDXLAdapter(UNet2DConditionModel(cross_attention_dim=2048), ResamplerXLV2())


# Recorded table → model.
MODELS = {
    "inference_tokenizer.json": lambda: Seed1Tokenizer(Seed1Config()),
    "inference_quantizer.default.json": lambda: Seed2Tokenizer(Seed2Config()),
    "inference_quantizer.use_qformer_image.json": lambda: Seed2Tokenizer(
        Seed2Config(use_qformer_image=True)
    ),
    "stage1_training_model.json": lambda: Stage1Model(Seed2Config()),
    "stage2_training_model.json": lambda: Stage2Model(
        Seed2Config(use_qformer_image=True, reverse_depth=4)
    ),
    "visual_tokenizer.json": lavit_tokenizer,
    "decoder_highres.json": lambda: CodeDecoder(LavitDecoderConfig(head="highres")),
    "decoder_lowres.json": lambda: CodeDecoder(LavitDecoderConfig(head="lowres")),
    "visual_encoder.json": lambda: QwenVit(QwenVitConfig()),
    "multimodal_model_with_llm.json": seed_x_agent,
    "detokenizer_resampler.json": sdxl_adapter,
}
# Beginnings of names of other libraries' parts, whose order is not compared.
OTHERS = ("clip_model.", "llm.", "unet.")
NOT_TRAINED = ("inference_quantizer.default.json", "inference_quantizer.use_qformer_image.json")


def check(recording):
    for file in recording.files("*.json"):
        if file.name == "summary.json":  # sums over the table of SEED-1
            continue
        with torch.device("meta"):  # without memory for billions of weights
            model = MODELS[file.name]()
        check_keys(file.name, model, recording.json(file.name))


def check_keys(name, model, table: dict[str, dict]):
    def ours(keys) -> list[str]:
        return [key for key in keys if not key.startswith(OTHERS)]

    # The order of keys, and the shape of each.
    state = model.state_dict()
    table = {key: row for key, row in table.items() if not key.startswith("clip_model.")}
    assert_same(ours(state), ours(table), f"{name}: keys in order")
    buffers = {key for key, _ in model.named_buffers()} & set(state)
    recorded = [key for key, row in table.items() if row.get("buffer")]
    assert_same(sorted(ours(buffers)), sorted(ours(recorded)), f"{name}: buffers")
    for key, row in table.items():
        if key in state or not row.get("buffer"):
            assert_same(list(state[key].shape), row["shape"], f"{name}: shape of {key}")
    if name == "multimodal_model_with_llm.json":
        assert_same(sorted(state), sorted(table.keys() - set(recorded)), f"{name}: all keys")
    # What the original trains is what requires gradients here; tied weights are listed once.
    if name not in NOT_TRAINED:
        parameters = dict(model.named_parameters())
        aliases = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
        assert_same(
            [key for key in table if key in parameters and parameters[key].requires_grad],
            [key for key in table if table[key].get("trainable") and key not in aliases],
            f"{name}: trained",
        )


KINDS = dict.fromkeys(
    ("seed1_keys_full", "seed2_keys_full", "seedx_keys_full", "lavit_keys_full"), check
)
