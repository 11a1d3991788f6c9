"""From records to batches.

`config`         settings of an LLM's training data, ours or original
`order`          order of samples, how sources alternate and processes share positions
`loader`         worker processes
`stream`         usable samples of sources for one process, resumable
`source`         a source of an LLM's sequences
`packing`        packed and padded rows, splitting of long documents
`llm_batches`    batches of an LLM's data
`step_batches`   batches of images by step
`pairs_dataset`  samples of image-text pairs
`targets`        samples of pixel decoders
"""
