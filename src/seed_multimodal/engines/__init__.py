"""Language models that llama.cpp or a completion server computes, behind the interface of `language.engine.Engine`."""
