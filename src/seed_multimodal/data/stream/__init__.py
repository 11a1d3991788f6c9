"""From records to batches.

`config`         settings of an LLM's training data, ours or original
`sampler`        sample order by (seed, position), also of several sets
`mixture`        sources of an LLM's data and their sequences
`packing`        packed and padded rows, splitting of long documents
`llm_batches`    batches of an LLM's data, resumable
`pairs_dataset`  samples of image-text pairs and of pixel decoders
`loader`         worker processes, batches by step
"""
