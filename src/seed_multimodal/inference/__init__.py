"""Generation by a language model.

engines            which engine: our own with torch or llama.cpp, or a completion server
prompt             what a caller asks: `Prompt`, `GenerationSettings`
base_engine        `BaseEngine`: `submit` and `generate`, from any thread; `GeneratedSequence`
engine             `Engine`: continuous batching, in one thread
sampling           the choice of next tokens in a batch; ends at stop texts
backends           what computes scores, in rows of keys and values of a size that is fixed at load
batching           `InboxThread`: the thread of an engine or of the image networks' `DynamicBatcher`
gguf               export for llama.cpp
"""
