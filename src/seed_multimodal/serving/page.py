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
from seed_multimodal.serving.client import Kind, Model, kind_of
from seed_multimodal.serving.visits import IMAGES, UPLOADS, Visit, examples

CODES = 32  # of an image of SEED-LLaMA
SAME = "The same seed gives the same image."
CSS = """
.gradio-container {padding-top: 4px !important}
#title h1 {margin: 4px 0; font-size: 1.25rem}
#chat {height: max(300px, calc(100dvh - 280px)) !important}
#chat .message img {width: 192px; max-width: 100%; object-fit: contain !important}
#chat .placeholder {padding: 0 12px; text-align: center}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none}
.strip {display: flex; flex-wrap: wrap; gap: 2px}
.strip span {flex: 1 0 34px; padding: 6px 0; border-radius: 4px; font-size: 11px; text-align: center; color: #111}
"""


def build(models: Sequence[Model]) -> gr.Blocks:
    """Layout and event handlers of the page."""
    kind = models[0].kind
    with gr.Blocks(title="SEED Multimodal", analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        visit = gr.State(Visit([*models], models[0]), delete_callback=Visit.forget)
        with gr.Row():
            title = gr.Markdown(f"# {kind.title}", elem_id="title")
            choice = gr.Dropdown([(model.kind.title, place) for place, model in enumerate(models)], value=0,
                                 label="Model", visible=len(models) > 1, elem_id="model")
            gr.Button("Light / dark", size="sm", min_width=110, scale=0).click(
                None, js="() => { document.body.classList.toggle('dark') }")
        with gr.Tabs():  # Gradio cannot hide initial tabs
            with gr.Tab("Chat"):
                chat = gr.Chatbot(label="Conversation", show_label=False, elem_id="chat", buttons=["copy"], height=None,
                                  render_markdown=False, editable="user", group_consecutive_messages=False,
                                  examples=examples(kind), placeholder="Show it images, ask about them, let it draw. "
                                  "Or try one of these:")
                message = gr.MultimodalTextbox(
                    file_count="multiple", file_types=["image"], max_plain_text_length=32_000, max_lines=6,
                    label="Message", show_label=False, elem_id="message", placeholder="Message, or drop images")
                settings = settings_of(kind)
            with gr.Tab("Draw", visible=False) as draw, gr.Row():
                with gr.Column():
                    words = gr.Textbox(label="What to draw", max_lines=4, elem_id="draw-text")
                    seed = gr.Number(0, label="First seed", precision=0, minimum=0, info=SAME)
                    shape = gr.Dropdown(list(kind.ratios), label="Width : height", visible=bool(kind.ratios))
                results("draw", "Draw", Visit.on_draw, [visit, words, seed, shape])
            with gr.Tab("Edit", visible=False) as edit, gr.Row():
                with gr.Column():
                    image = image_of("Image", "edit-image")
                    words = gr.Textbox(label="What to change", max_lines=4, elem_id="edit-text")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, info=SAME)
                results("edit", "Edit", Visit.on_change, [visit, image, words, seed])
            with gr.Tab("Codes", visible=False) as codes:
                rows = []
                with gr.Row():
                    for name in ("first", "second"):
                        with gr.Column():
                            image = image_of(f"The {name} image", f"codes-{name}")
                            strip, row = gr.HTML(elem_id=f"strip-{name}"), gr.State([])
                            image.change(Visit.on_codes, [visit, image], [strip, row], concurrency_limit=None)
                            rows.append(row)
                with gr.Row():
                    with gr.Column():
                        count = gr.Slider(1, CODES, CODES, step=1, label="Codes to draw from", elem_id="count",
                                          info="An image grows with its codes.")
                        start = gr.Slider(1, CODES, 1, step=1, label="Exchange from code", info="Between two images.")
                        end = gr.Slider(0, CODES, CODES // 2, step=1, label="to code", info="0: none.")
                    results("swap", "Draw", Visit.on_swap, [visit, *rows, count, start, end], count.release)
            with gr.Tab("Find", visible=False) as find, gr.Row():
                with gr.Column():
                    image = image_of("Image", "find-image")
                    words = gr.Textbox(label="What to find", max_lines=4, elem_id="find-text")
                results("find", "Find", Visit.on_find, [visit, image, words])

        how: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None}
        talk = [chat, message]
        asked = [message.submit(Visit.on_submit, [visit, message], **how), chat.retry(Visit.on_retry, [visit], **how),
                 chat.edit(Visit.on_edit, [visit], **how), chat.example_select(Visit.on_example, [visit], **how)]
        replies = [one.success(Visit.reply, [visit, *settings], talk, **how) for one in asked]
        for one in replies:
            one.then(Visit.on_end, [visit], talk, **how)
        message.stop(None, cancels=replies)
        chat.undo(Visit.on_undo, [visit], talk, **how)
        chat.clear(Visit.on_clear, [visit], talk, cancels=replies, **how)
        message.change(Visit.on_choose, [visit, message], message, trigger_mode="always_last", **how)
        _, ratio, _, _, temperature, _, rounds = settings
        gr.on([choice.input, demo.load], Visit.on_model, [visit, choice],
              [visit, title, choice, *talk, ratio, temperature, rounds, shape, draw, edit, codes, find], **how)
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
    """An image input; its file is opened by `Visit.take`, which reports errors."""
    image = gr.Image(type="filepath", label=label, sources=["upload", "clipboard"], height=240, elem_id=name,
                     buttons=["fullscreen"])
    image.preprocess = lambda upload: upload and upload.path  # type: ignore[method-assign]
    return image


def results(name: str, label: str, handler: Callable[..., Any], inputs: list[Any], *triggers: Any) -> None:
    """Start button, stop button and output images."""
    with gr.Column():
        with gr.Row():
            run, stop = gr.Button(label, variant="primary", elem_id=name), gr.Button("Stop", min_width=80)
        images = gr.Gallery(label="Results", columns=2, object_fit="contain", height=520, format="png",
                            elem_id=f"{name}-images", buttons=["download", "fullscreen"])
    texts = [part.submit for part in inputs if isinstance(part, gr.Textbox)]
    made = gr.on([run.click, *texts, *triggers], handler, inputs, images, concurrency_limit=None)
    stop.click(None, cancels=made)


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
        demo = build([Model(address, kind_of(model_type)) for address in addresses])
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
