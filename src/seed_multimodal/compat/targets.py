"""The originals' dotted names in YAML files."""

from __future__ import annotations

# The original's names → ours (`module:attribute`). Their YAML files work unchanged.
ALIASES = {
    "models.model_tools.get_pretrained_llama_causal_model": (
        "seed_multimodal.compat.seed_llama_yaml:language_model"
    ),
    "transformers.LlamaForCausalLM.from_pretrained": (
        "seed_multimodal.compat.seed_llama_yaml:language_model"
    ),
    "models.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained": (
        "seed_multimodal.compat.seed_llama:SeedLlamaTokenizer.from_pretrained"
    ),
    "src.tokenizer.seed_llama_tokenizer.SeedLlamaTokenizer.from_pretrained": (
        "seed_multimodal.compat.seed_llama:SeedLlamaTokenizer.from_pretrained"
    ),
    "models.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    "src.processer.transforms.get_transform": "seed_multimodal.images.transforms:get_transform",
    "src.model.llama_xformer.LlamaForCausalLM.from_pretrained": (
        "seed_multimodal.compat.seed_x:LlamaForCausalLM.from_pretrained"
    ),
    "src.model.peft_model.get_peft_model_with_resize_embedding": (
        "seed_multimodal.compat.lora:seed_llama_lora"
    ),
    # SEED-X's (its programs read the same files as descriptions: `seed_x_yaml.TARGETS`)
    "transformers.LlamaTokenizer.from_pretrained": (
        "seed_multimodal.language.llama_tokenizer:LlamaTokenizer.from_pretrained"
    ),
    "src.models.tokenizer.qwen_visual.VisionTransformerWithAttnPool.from_pretrained": (
        "seed_multimodal.compat.seed_x:VisionTransformerWithAttnPool.from_pretrained"
    ),
    "src.models.tokenizer.qwen_visual.Resampler": "seed_multimodal.compat.seed_x:Resampler",
    "src.models.tokenizer.discrete_models.DiscreteModleIdentity": (
        "seed_multimodal.compat.seed_x:DiscreteModleIdentity"
    ),
    "src.models.mllm.modeling_llama_xformer.LlamaForCausalLM.from_pretrained": (
        "seed_multimodal.compat.seed_x:LlamaForCausalLM.from_pretrained"
    ),
    "src.models.mllm.peft_models.get_peft_model_with_resize_embedding": (
        "seed_multimodal.compat.lora:seed_x_lora"
    ),
    "peft.LoraConfig": "seed_multimodal.compat.lora:lora_config",
    "src.models.mllm.seed_x.ContinuousLVLM": "seed_multimodal.compat.seed_x:ContinuousLVLM",
    "src.models.mllm.seed_x.ContinuousLVLM.from_pretrained": (
        "seed_multimodal.compat.seed_x:ContinuousLVLM.from_pretrained"
    ),
    "src.models.detokenizer.resampler.ResamplerXLV2": (
        "seed_multimodal.compat.detokenizer:ResamplerXLV2"
    ),
    "src.models.detokenizer.adapter_modules.SDXLAdapter.from_pretrained": (
        "seed_multimodal.compat.detokenizer:SDXLAdapter.from_pretrained"
    ),
    "src.models.detokenizer.adapter_modules.SDXLAdapterWithLatentImage.from_pretrained": (
        "seed_multimodal.compat.detokenizer:SDXLAdapterWithLatentImage.from_pretrained"
    ),
}
