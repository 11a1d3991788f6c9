"""What exists only for the originals' Python objects: names, arguments and results of their classes
around ours.

* `seed_1`: `SEEDVisualTokenizer`
* `seed_x`: vision encoder, resamplers, language model and agent
* `detokenizer`: `SDXLAdapter` of both stages, `ResamplerXLV2`
* `lora`: `get_peft_model_with_resize_embedding` of either repository

The folders `models/`, `src/models`, `src/processer`, `src/data` and those of the same names in
`MultiModalLLM/src` give these objects the originals' import paths, for programs that start with
`pyrootutils.setup_root(…, pythonpath=True)`.
"""
