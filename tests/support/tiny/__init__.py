"""The one factory of tiny random parts: real classes of the library, transformers and diffusers in
the smallest sizes, with fixed seeds.

| module | what it makes |
| --- | --- |
| `language` | language models of several architectures, a hub tokenizer |
| `vision` | vision encoders of transformers, as their publishers write them |
| `diffusion` | parts and folders of diffusers: SDXL, Stable Diffusion 1, stable-unCLIP, flows |
| `seed` | `build_seed_llama`: a system folder; SEED-1, SEED-2, their decoders |
| `seed_x` | `build_seed_x`: a system folder; the original layout |
| `lavit` | `build_lavit`: a system folder; LaVIT's tokenizers and pixel decoders |
| `training` | data and configurations of the trainers of pixel decoders |
"""

import json


def spread(model, std: float = 0.3, parts: tuple[str, ...] = ("",)):
    """Larger weights: with the usual initial values, outputs hardly depend on the input.

    parts: of the names of the weights that change; each by default.
    """
    from torch.nn.init import normal_

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and parameter.requires_grad and any(part in name for part in parts):
            normal_(parameter, std=std)
    return model


def write_json(file, value):
    file.write_text(json.dumps(value))


def read_json(file):
    return json.loads(file.read_text())
