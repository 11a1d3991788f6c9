"""What exists only for the originals: their Python objects, files and command lines.

Objects with the names, arguments and results of the originals' classes, around ours:

* `seed_llama`: `SeedLlamaTokenizer`, `ImageTokenizer`; `seed_1`: `SEEDVisualTokenizer`
* `seed_x`: vision encoder, resamplers, language model and agent
* `detokenizer`: `SDXLAdapter` of both stages, `ResamplerXLV2`
* `lavit`: LaVIT's classes
* `lora`: `get_peft_model_with_resize_embedding` of either repository

Files:

* `part_files`: models and parts, of a training or a SEED-X; `seed_llama_yaml`: a SEED-LLaMA
* `data_files`: data of a training
* `targets`: names of `_target_`s; `pickled_shards`: the restricted reader of pickles

Command lines:

* `seed_llama_programs`, `seed_x_programs`, `lavit_programs`: inference and evaluation
* `part_flags`: their flags for YAML files; `training_flags`: flags of the trainings

The folders `models/`, `src/models`, `src/processer`, `src/data` and those of the same names in
`MultiModalLLM/src` give these objects the originals' import paths, for programs that start with
`pyrootutils.setup_root(…, pythonpath=True)`.
"""
