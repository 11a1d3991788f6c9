"""Chat templates of the structure that published models have, for small tokenizers.

Each is our own text; what it shares with its model is where texts, special tokens, system messages,
white space and empty blocks of thoughts stand.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TemplateCase:
    """A template, and the special tokens of its tokenizer; `added`: tokens that are not special."""

    text: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    pad: str | None = None
    added: tuple[str, ...] = ()


# A token before the text, a default system message, headers, stripped contents.
LLAMA3 = TemplateCase(
    """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set instructions = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set instructions = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge: 2023\\n\\n' + instructions }}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}""",
    ("<|begin|>", "<|end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    eos="<|end|>",
    bos="<|begin|>",
)
# Without thoughts the last question ends in an empty block, which earlier ones have not.
QWEN3 = TemplateCase(
    """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
        {{- content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}""",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    pad="<|endoftext|>",
    added=("<think>", "</think>"),
)
# A header with the mode; without thoughts each answer begins with an empty block.
SMOLLM3 = TemplateCase(
    """{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}
{%- set mode = '/think' if enable_thinking else '/no_think' -%}
{{- '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: ' + mode + '\\n\\n' -}}
{%- if messages[0].role == 'system' -%}
    {{- messages[0].content.replace('/no_think', '').rstrip() + '\\n\\n' -}}
{%- else -%}
    {{- 'You are a small model.\\n\\n' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- if message.role == 'user' -%}
        {{ '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' -%}
        {%- generation -%}
        {{ '<|im_start|>assistant\\n' }}
        {%- if not enable_thinking -%}{{ '<think>\\n\\n</think>\\n' }}{%- endif -%}
        {{ content + '<|im_end|>\\n' }}
        {%- endgeneration -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<|im_start|>assistant\\n' }}
    {%- if not enable_thinking -%}{{ '<think>\\n\\n</think>\\n' }}{%- endif -%}
{%- endif -%}""",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    eos="<|im_end|>",
    pad="<|im_end|>",
    added=("<think>", "</think>"),
)
# The system message stands in the last question; a blank only before given answers.
MISTRAL = TemplateCase(
    """{%- if messages[0]['role'] == 'system' %}
    {%- set instructions = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('The roles must alternate.') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and instructions is defined %}
            {{- '[INST] ' + instructions + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}""",
    ("<s>", "</s>", "[INST]", "[/INST]"),
    eos="</s>",
    bos="<s>",
)
# The role's token before each content; without a question to answer it ends in the end token.
PHI = TemplateCase(
    """{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content']
+ '<|end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}
{%- else %}{{ eos_token }}{% endif %}""",
    ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    eos="<|endoftext|>",
    pad="<|endoftext|>",
)
# Contents are texts or lists of parts; an image's placeholder stands in its order.
VISION = TemplateCase(
    """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"),
    eos="<|im_end|>",
)
# Contents are lists only; images precede the texts of their message.
IMAGES_FIRST = TemplateCase(
    """{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content']
| selectattr('type', 'equalto', 'image') %}<image>
{% endfor %}{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}
{{- part['text'] | trim }}{% endfor %}</s>{% endfor %}
{%- if add_generation_prompt %}ASSISTANT:{% endif %}""",
    ("<pad>", "</s>", "<image>"),
    eos="</s>",
)
# Contents are lists of texts.
TEXT_LISTS = TemplateCase(
    """{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content']
%}{{ part['text'] }}{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}
""",
    ("<pad>", "</s>"),
    eos="</s>",
)
TEXT_TEMPLATES = {
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "mistral": MISTRAL,
    "phi3": PHI,
}
ALL_TEMPLATES = {
    **TEXT_TEMPLATES,
    "vision": VISION,
    "images first": IMAGES_FIRST,
    "lists": TEXT_LISTS,
}
