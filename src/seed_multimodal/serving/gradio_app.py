"""The chat in the browser: images and text in, text and images out, over the backend's `/generate`.

The page holds no model; `Dialogue` keeps the conversation, `chat_page` does the work, this file shows it. Works without
internet: no analytics, no share link, no fonts from elsewhere. Images are kept in one temporary folder, removed at
the program's end, by SIGTERM too. Up to `VISITORS` wait for the model at the same time, each in a thread of his own.

Run: `bash scripts/start_backend_nano.sh` and `bash scripts/start_frontend_nano.sh`, then open the address it prints.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError
from seed_multimodal.serving.chat_page import UPLOADS, ChatPage, Kind, kind_of
from seed_multimodal.serving.dialogue import Dialogue

if TYPE_CHECKING:
    import gradio as gr

WRITING, DRAWING = "Waiting for the model …", "Drawing …"
VISITORS = 64
CSS = """
#title h1 {margin-bottom: 0}
#status {min-height: 1.6em}
#status p {margin: 0; color: var(--body-text-color-subdued)}
#chat .message img {width: 192px; height: 192px; object-fit: contain; border-radius: 8px}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none}
"""


def build_demo(page: ChatPage) -> gr.Blocks:
    """The page's layout and its wiring."""
    import gradio as gr

    with gr.Blocks(title=page.kind.title, analytics_enabled=False, delete_cache=(3600, 86400)) as demo:
        state = gr.State(page.new_dialogue())
        gr.Markdown(f"# {page.kind.title}\nShow it an image, ask about it, let it draw. "
                    f"{page.kind.remark}", elem_id="title")
        with gr.Row(equal_height=False):
            with gr.Column(scale=3, min_width=300):
                image = gr.Image(type="filepath", label="Image", sources=["upload", "clipboard"], height=220,
                                 elem_id="picture")
                # Gradio would decode the file whole, and show an error of its own in place of our sentence.
                image.preprocess = lambda upload: upload and upload.path  # type: ignore[method-assign]
                text = gr.Textbox(label="Message", lines=2, max_lines=6, elem_id="message", submit_btn=False,
                                  placeholder="Ask, or say what to draw (Shift+Enter sends)")
                with gr.Row():
                    add = gr.Button("Add", elem_id="add")
                    submit = gr.Button("Submit", variant="primary", elem_id="submit")
                settings = _settings(page.kind)
                if page.kind.examples:
                    gr.Examples([[example] for example in page.kind.examples], [text], label="Try")
            with gr.Column(scale=7, min_width=400):
                chat = gr.Chatbot(height=560, label="Conversation", show_label=False, elem_id="chat", buttons=["copy"],
                                  render_markdown=False, placeholder="The conversation appears here.")
                status = gr.Markdown("", elem_id="status")
                with gr.Row():
                    regenerate = gr.Button("Regenerate", elem_id="regenerate", interactive=False)
                    clear = gr.Button("Clear history", elem_id="clear")
        _wire(page, state, image, text, settings, chat, status, add, submit, regenerate, clear)
    return demo


def _settings(kind: Kind) -> list[Any]:
    """The released demo's sliders, with its ranges and the model's own defaults; last what only some kinds have."""
    import gradio as gr

    force = gr.Radio([("Yes", True), ("No", False)], value=False, label="Force an image", elem_id="force")
    ratio = [gr.Radio(list(kind.ratios), value=kind.ratios[0], label="Its shape (width : height)", elem_id="ratio")
             ] if kind.ratios else []
    with gr.Accordion("Settings", open=False, elem_id="settings", visible=not kind.ratios):
        beams = gr.Slider(1, 4, value=1, step=1, label="Beams")
        tokens = gr.Slider(64, 1024, value=256, step=64, label="Most new tokens")
        temperature = gr.Slider(0.0, 1.0, value=kind.temperature, step=0.1, label="Temperature (0: the likeliest)")
        top_p = gr.Slider(0.0, 1.0, value=0.5, step=0.1, label="Top P")
        turns = gr.Slider(1, 5, value=kind.rounds, step=1, label="Most rounds of history")
    return [beams, tokens, temperature, top_p, turns, force, *ratio]


def _wire(page: ChatPage, state: Any, image: Any, text: Any, settings: list[Any], chat: Any, status: Any, add: Any,
          submit: Any, regenerate: Any, clear: Any) -> None:
    import gradio as gr

    def buttons(active: bool) -> tuple[Any, Any]:
        return gr.update(interactive=active), gr.update(interactive=active)

    def on_add(dialogue: Dialogue, path: str | None, said: str | None) -> tuple[Any, ...]:
        trouble = page.add(dialogue, path, said)
        # An image is in the message by now, or refused. And an update of its box would make a new one, see build_demo.
        left = gr.skip() if dialogue.asking else None
        return dialogue, page.messages(dialogue), as_it_is(trouble), left, gr.update() if trouble else ""

    def asking(ask: Callable[..., Generator[list[str], None, str]], dialogue: Dialogue,
               values: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
        beams, tokens, temperature, top_p, turns, force, *ratio = values
        made = ask(dialogue, max_turns=turns, force_boi=bool(force), ratio=next(iter(ratio), None),
                   num_beams=int(beams), max_new_tokens=int(tokens), temperature=temperature, top_p=top_p)
        while True:
            try:
                previews = next(made)
            except StopIteration as end:
                yield dialogue, page.messages(dialogue), as_it_is(end.value), *buttons(True)
                return
            yield gr.skip(), page.messages(dialogue, previews), DRAWING, *buttons(False)

    def on_submit(dialogue: Dialogue, trouble: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        if trouble:
            yield gr.skip(), gr.skip(), gr.skip(), *buttons(not dialogue.asking)
            return
        yield gr.skip(), gr.skip(), WRITING, *buttons(False)
        yield from asking(page.answer, dialogue, values)

    def on_regenerate(dialogue: Dialogue, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield gr.skip(), gr.skip(), WRITING, *buttons(False)
        yield from asking(page.regenerate, dialogue, values)

    def on_clear(dialogue: Dialogue) -> tuple[Any, ...]:
        dialogue.clear()
        # An answer that is awaited is no longer of interest: a new message need not wait for it.
        return dialogue, [], "", None, "", gr.update(interactive=True), gr.update(interactive=False)

    shown = [state, chat, status]
    add.click(on_add, [state, image, text], [*shown, image, text], show_progress="hidden")
    asks: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": VISITORS, "concurrency_id": "ask",
                            "trigger_mode": "multiple"}
    added = gr.on([submit.click, text.submit], on_add, [state, image, text], [*shown, image, text],
                  show_progress="hidden", api_visibility="private")
    awaited = [added.then(on_submit, [state, status, *settings], [*shown, submit, regenerate], **asks),
               regenerate.click(on_regenerate, [state, *settings], [*shown, submit, regenerate], **asks)]
    gr.on([clear.click, chat.clear], on_clear, [state], [*shown, image, text, submit, regenerate],
          show_progress="hidden", cancels=awaited)


def as_it_is(sentence: str) -> str:
    """A sentence in Markdown, in which a file's name and `<image>` stay what they are."""
    return re.sub(r"([\\`*_\[\]<>#~|&$])", r"\\\1", sentence)


def launch(
    *, request_address: str = "http://127.0.0.1:7890/generate", model_type: str = "nano",
    server_name: str = "127.0.0.1", server_port: int = 7860, log: Callable[[str], None] | None = print,
) -> None:
    """Serve the page until interrupted or ended by SIGTERM; the visitors' images are removed then.

    Raises:
        ConfigError: an unknown model type, or a port that is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="seed_chat_", ignore_cleanup_errors=True) as folder:
        os.environ.setdefault("GRADIO_TEMP_DIR", str(Path(folder) / "uploads"))
        import gradio as gr

        demo = build_demo(ChatPage(request_address, kind_of(model_type), Path(folder)))
        theme = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            demo.queue(default_concurrency_limit=VISITORS).launch(
                server_name=server_name, server_port=server_port, share=False, prevent_thread_lock=True, quiet=True,
                theme=theme, css=CSS, allowed_paths=[folder], show_error=True, footer_links=[],
                max_threads=VISITORS + 16, max_file_size=UPLOADS.max_bytes)
        except OSError as error:
            raise ConfigError(f"Cannot listen on {server_name}:{server_port}: the port is taken or not allowed; choose "
                              f"another with --server_port.") from error
        if log is not None:
            log(f"The chat is at http://{server_name}:{demo.server_port} and asks {request_address} (Ctrl-C stops).")
        demo.block_thread()
