"""The language side: vocabulary and tokenizers, messages and prompts, LLaMA and LoRA, answers.

vocabulary       ids of image tokens
text_tokenizer   `TextTokenizer`: texts and images ⇄ ids; tokenizer (the originals'), hub_tokenizer
llama_tokenizer  a text tokenizer by transformers' interface
prompts          templates, and the request sentences of the tasks
messages         conversations and answers as callers see them
answer           ids → texts and images, also while they are generated
llm, lora        loading of the language model, and merging of adapters
"""
