"""An engine that generates recorded ids, for tests of what is made of answers."""

from collections.abc import Sequence

from seed_multimodal.inference.base_engine import BaseEngine, GeneratedSequence

CONTEXT = 4096
SETTINGS = ("temperature", "num_beams", "top_p", "max_new_tokens", "do_sample")


class RecordedEngine(BaseEngine):
    """Every answer is `new_ids`; `calls` has the prompt's ids and the settings of each request."""

    n_waiting = 0
    has_beams = True

    def __init__(self, tokenizer, new_ids: Sequence[int]):
        super().__init__(tokenizer, context=CONTEXT, capacity=CONTEXT, n_rows=16)
        self.new_ids = list(new_ids)
        self.calls: list[dict] = []

    def _put(self, request: GeneratedSequence):
        settings = {name: getattr(request.settings, name) for name in SETTINGS}
        ids = list(request.prompts[0].ids)
        self.calls.append({"input_ids": [ids], "generation_config": settings})
        # At once, as no model runs, and whatever the settings.
        request.budget = len(self.new_ids) + 1
        for token in self.new_ids:
            request.append(token)
        request.end("stop")
