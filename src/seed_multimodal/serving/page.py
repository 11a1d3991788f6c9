"""The web page: a chat with images in both directions, and a tab for each further task of the model.

The page has no model: it sends requests to servers over HTTP. Its handlers (`visits`) are coroutines, so one thread
serves all visitors. Works offline: no analytics, share links or external fonts. Each visitor's images are in a separate
folder, removed at the end of the session or program, also on SIGTERM.

Run: `bash scripts/start_backend_nano.sh` and `bash scripts/start_frontend_nano.sh`, then open the address it prints.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError
from seed_multimodal.serving.client import Model
from seed_multimodal.serving.dialogue import Kind, kind_of
from seed_multimodal.serving.visits import IMAGES, UPLOADS, Page, Visit, examples, said

CODES = 32  # of an image of SEED-LLaMA
SAME = "The same seed gives the same image."
CSS = """
.gradio-container {padding-top: 4px !important}
#title h1 {margin: 4px 0; font-size: 1.25rem}
#chat {height: max(300px, calc(100dvh - 300px)) !important}
#chat .message img {width: 192px; max-width: 100%; object-fit: contain !important}
#chat .placeholder {padding: 0 12px; text-align: center}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none}
[id$=status] {padding: 0 !important; margin: -8px 0}
.status {min-height: 1.5em; margin: 0 8px !important; color: var(--body-text-color-subdued)}
.status[role=alert] {color: #b91c1c}
.dark .status[role=alert] {color: #fca5a5}
.strip {display: flex; flex-wrap: wrap; gap: 2px}
.strip span {flex: 1 0 34px; padding: 6px 0; border-radius: 4px; font-size: 11px; text-align: center; color: #111}
"""


def build(page: Page) -> gr.Blocks:
    """Layout and event handlers of the page."""
    kind = page.models[0].kind
    how: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
    with gr.Blocks(title="SEED Multimodal", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        visit = gr.State(Visit(), delete_callback=Visit.forget)
        with gr.Row(elem_id="top"):
            title = gr.Markdown(f"# {kind.title}", elem_id="title")
            choice = gr.Dropdown([(model.kind.title, place) for place, model in enumerate(page.models)], value=0,
                                 label="Model", visible=len(page.models) > 1, elem_id="model")
            gr.Button("Light / dark", size="sm", min_width=110, scale=0, elem_id="dark").click(
                None, js="() => { document.body.classList.toggle('dark') }")
        with gr.Tabs():  # Gradio cannot hide initial tabs
            with gr.Tab("Chat"):
                chat = gr.Chatbot(label="Conversation", show_label=False, elem_id="chat", buttons=["copy"], height=None,
                                  render_markdown=False, editable="user", group_consecutive_messages=False,
                                  examples=examples(kind), placeholder="Show it images, ask about them, let it draw. "
                                  "Or try one of these:")
                status = gr.HTML(said(""), elem_id="status")
                message = gr.MultimodalTextbox(
                    file_count="multiple", file_types=["image"], max_plain_text_length=32_000, max_lines=6,
                    label="Message", show_label=False, elem_id="message", placeholder="Message, or drop images")
                settings = settings_of(kind)
            with gr.Tab("Draw", visible=False) as draw, gr.Row():
                with gr.Column():
                    text = gr.Textbox(label="What to draw", max_lines=4, elem_id="draw-text")
                    seed = gr.Number(0, label="First seed", precision=0, minimum=0, info=SAME)
                    shape = gr.Dropdown(list(kind.ratios), label="Width : height", visible=bool(kind.ratios))
                results("draw", "Draw", page.on_draw, visit, [text, seed, shape], columns=2)
            with gr.Tab("Edit", visible=False) as edit, gr.Row():
                with gr.Column():
                    image = image_of("Image", "edit-image")
                    text = gr.Textbox(label="What to change", max_lines=4, elem_id="edit-text")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, info=SAME)
                results("edit", "Edit", page.on_change, visit, [image, text, seed])
            with gr.Tab("Codes", visible=False) as codes:
                with gr.Row():
                    for name in ("first", "second"):
                        with gr.Column():
                            image = image_of(f"The {name} image", f"codes-{name}")
                            strips, word = gr.HTML(elem_id=f"strip-{name}"), gr.HTML(said(""))
                            image.change(page.on_codes, [visit, gr.State(name), image], [strips, word], **how)
                with gr.Row():
                    with gr.Column():
                        count = gr.Slider(1, CODES, CODES, step=1, label="Codes to draw from", elem_id="count",
                                          info="An image grows with its codes.")
                        start = gr.Slider(1, CODES, 1, step=1, label="Exchange from code", info="Between two images.")
                        end = gr.Slider(0, CODES, CODES // 2, step=1, label="to code", info="0: none.")
                    results("swap", "Draw", page.on_swap, visit, [count, start, end], columns=2, on=count.release)
            with gr.Tab("Find", visible=False) as find, gr.Row():
                with gr.Column():
                    image = image_of("Image", "find-image")
                    text = gr.Textbox(label="What to find", max_lines=4, elem_id="find-text")
                results("find", "Find", page.on_find, visit, [image, text])

        talk = [chat, status, message]
        message.submit(page.on_submit, [visit, message, *settings], talk, **how)
        chat.retry(page.on_retry, [visit, *settings], talk, **how)
        chat.edit(page.on_edit, [visit, *settings], talk, **how)
        chat.example_select(page.on_example, [visit, *settings], talk, **how)
        chat.undo(page.on_undo, [visit], talk, **how)
        chat.clear(page.on_clear, [visit], talk, **how)
        message.change(page.on_choose, [visit, message], [status, message], trigger_mode="always_last", **how)
        message.stop(Visit.stop, [visit], **how)
        gr.on([choice.input, demo.load], page.on_model, [visit, choice],
              [visit, title, choice, *talk, *settings, shape, draw, edit, codes, find], **how)
        demo.unload(page.on_leave)
    return demo


def settings_of(kind: Kind) -> list[Any]:
    """Generation settings: the original demo's sliders and ranges, with the model's defaults."""
    with gr.Row():
        force = gr.Checkbox(label="Answer with an image", elem_id="force", min_width=160)
        ratio = gr.Dropdown(list(kind.ratios), label="Width : height", visible=bool(kind.ratios))
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        beams = gr.Slider(1, 4, 1, step=1, label="Beams", info="Answers followed at once; the likeliest is kept.")
        tokens = gr.Slider(64, 1024, 256, step=64, label="Most new tokens", info="Where an answer is cut; an image "
                           "takes 34 or more.")
        temperature = gr.Slider(0, 1, kind.temperature, step=0.1, label="Temperature", info="Chance in the words: 0 "
                                "takes the likeliest each time, but for Retry.")
        top_p = gr.Slider(0, 1, 0.5, step=0.1, label="Top P", info="Only the likeliest words up to this share.")
        rounds = gr.Slider(1, 10, kind.rounds, step=1, label="Most rounds of history", info="A longer conversation "
                           "is refused: undo or clear.")
    return [force, ratio, beams, tokens, temperature, top_p, rounds]


def image_of(label: str, name: str) -> Any:
    """An image input; its file is opened by `Page.take`, which reports errors."""
    image = gr.Image(type="filepath", label=label, sources=["upload", "clipboard"], height=240, elem_id=name,
                     buttons=["fullscreen"])
    image.preprocess = lambda upload: upload and upload.path  # type: ignore[method-assign]
    return image


def results(name: str, label: str, handler: Callable[..., Any], visit: Any, inputs: list[Any], *, columns: int = 1,
            on: Any = None) -> None:
    """Start button, stop button, status and output images."""
    with gr.Column():
        with gr.Row():
            run = gr.Button(label, variant="primary", elem_id=name)
            stop = gr.Button("Stop", elem_id=f"{name}-stop", min_width=80)
        word = gr.HTML(said(""), elem_id=f"{name}-status")
        images = gr.Gallery(label="Results", columns=columns, object_fit="contain", height=520,
                            elem_id=f"{name}-images", buttons=["download", "fullscreen"])
    texts = [part.submit for part in inputs if isinstance(part, gr.Textbox)]
    gr.on([run.click, *texts, *([on] if on else [])], handler, [visit, *inputs], [images, word], show_progress="hidden",
          concurrency_limit=None)
    stop.click(Visit.stop, [visit], show_progress="hidden", concurrency_limit=None)


def launch(
    *, addresses: Sequence[str] = ("http://127.0.0.1:7890/generate",), model_type: str = "nano",
    server_name: str = "127.0.0.1", server_port: int = 7860, log: Callable[[str], None] | None = print,
) -> None:
    """Serve the page until interrupted or ended by SIGTERM; the visitors' images are removed then.

    Raises:
        ConfigError: an unknown model type, or a port that is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with ended_by_sigterm(), tempfile.TemporaryDirectory(prefix="seed_chat_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        gr.set_static_paths([folder, IMAGES])  # files are served from where they are, not copied
        demo = build(Page([Model(address, kind_of(model_type)) for address in addresses]))
        theme = gr.themes.Soft(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            demo.queue(default_concurrency_limit=None).launch(
                server_name=server_name, server_port=server_port, share=False, prevent_thread_lock=True, quiet=True,
                theme=theme, css=CSS, show_error=True, footer_links=[], max_file_size=UPLOADS.max_bytes)
        except OSError as error:
            raise ConfigError(f"Cannot listen on {server_name}:{server_port}: the port is taken or not allowed; choose "
                              f"another with --server_port.") from error
        if log is not None:
            log(f"The chat is at http://{server_name}:{demo.server_port} and asks {', '.join(addresses)} (Ctrl-C "
                f"stops).")
        demo.block_thread()
