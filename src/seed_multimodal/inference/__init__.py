"""Generation by a language model.

opening            which engine: our own with torch or llama.cpp, or a completion server
base_engine        `BaseEngine`: `submit` and `generate`, from any thread
engine             `Engine`: continuous batching, in one thread
prompt, request    what a caller asks, and what runs
kv_cache           rows of keys and values, of a size that is fixed at load
sampling, image_constraints, stopping    the choice of the next token
likelihood         log-probabilities of answers
backends           what computes scores
inbox              `InboxThread`: the thread of an engine or a batcher
batching           `DynamicBatcher` and `ResultCache` of the image networks
gguf               export for llama.cpp
"""
