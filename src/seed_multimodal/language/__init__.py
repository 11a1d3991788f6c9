"""The language side: vocabulary and tokenizers, messages and prompts, LLaMA and LoRA, answers.

vocabulary       ids of image tokens
tokenizer        text and images → ids; llama_tokenizer: the same by transformers' interface
prompts          templates, and the request sentences of the tasks
messages         conversations and answers as callers see them
answer           ids → texts and images, also while they are generated
llm, lora        loading of the language model, and merging of adapters
known_words      the words of a system's training data
"""
