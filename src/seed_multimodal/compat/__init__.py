"""What exists only for the originals: their Python objects, files and command lines.

Objects with the names, arguments and results of the originals' classes, around ours:

* `seed_llama`: `SeedLlamaTokenizer`, `ImageTokenizer`; `seed_1`: `SEEDVisualTokenizer`
* `seed_x`: vision encoder, resamplers, language model and agent
* `detokenizer`: `SDXLAdapter` of both stages, `ResamplerXLV2`
* `lavit`: LaVIT's classes
* `lora`: `get_peft_model_with_resize_embedding` of either repository

Files:

* `part_files`: models and parts, of a training, a SEED-X or a SEED-LLaMA
* `data_files`: data of a training
* `targets`: names of `_target_`s; `pickled_shards`: the restricted reader of pickles

Command lines:

* `programs`: a row for each program that loads a system
* `demo_recon`, `lavit_evaluate`, `weight_programs`: programs with flags of their own
* `training_flags`: flags of the trainings

The folders `models/`, `src/models`, `src/processer`, `src/data` and those of the same names in
`MultiModalLLM/src` give these objects the originals' import paths, for programs that start with
`pyrootutils.setup_root(…, pythonpath=True)`.
"""
