"""Many requests at once: common batches of images; language models of llama.cpp and of completion servers."""
