"""The web page: a chat with images in both directions, and a tab for each further task of the model.

The page has no model: it sends requests to servers over HTTP. It works offline: no analytics, share links or external
fonts. A visitor's images are removed at the end of the session or program, also on SIGTERM.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError
from seed_multimodal.serving.chat_session import IMAGES, UPLOADS, ChatSession
from seed_multimodal.serving.client import ModelCard, ModelClient

CODES = 32  # of an image of SEED-LLaMA
CSS = """
.gradio-container {padding-top: 4px !important}
#title h1 {margin: 4px 0; font-size: 1.25rem}
#chat {height: max(300px, calc(100dvh - 280px)) !important}
#chat .message img {width: 192px; max-width: 100%; object-fit: contain !important}
#chat button[title="Share"], #chat button[aria-label="Share"] {display: none}
#chat .placeholder {padding: 0 12px; text-align: center}
.strip {display: flex; flex-wrap: wrap; gap: 2px}
.strip span {flex: 1 0 34px; padding: 6px 0; border-radius: 4px; font-size: 11px; text-align: center; color: #111}
"""


def build(models: Sequence[ModelClient]) -> gr.Blocks:
    """Layout and event handlers of the page; `ChatSession.on_model` fits it to the model."""
    with gr.Blocks(
        title="SEED Multimodal", analytics_enabled=False, delete_cache=(600, 3600)
    ) as demo:
        session = gr.State(ChatSession([*models], models[0]), delete_callback=ChatSession.reset)
        with gr.Row():
            title = gr.Markdown(f"# {models[0].card.title}", elem_id="title")
            choice = gr.Dropdown(
                [*range(len(models))], value=0, label="Model", visible=len(models) > 1
            )
            gr.Button("Light / dark", size="sm", min_width=110, scale=0).click(
                None, js="() => { document.body.classList.toggle('dark') }"
            )
        with gr.Tabs():  # Gradio cannot hide initial tabs
            with gr.Tab("Chat"):
                chat = gr.Chatbot(
                    label="Conversation",
                    show_label=False,
                    elem_id="chat",
                    buttons=["copy"],
                    height=None,
                    render_markdown=False,
                    editable="user",
                    group_consecutive_messages=False,
                    placeholder="Show it images, ask about them, let it draw. Or try one of these:",
                )
                message = gr.MultimodalTextbox(
                    file_count="multiple",
                    file_types=["image"],
                    max_plain_text_length=32_000,
                    max_lines=6,
                    label="Message",
                    show_label=False,
                    elem_id="message",
                    placeholder="Message, or drop images",
                )
                settings = settings_of()
            with gr.Tab("Draw", visible=False) as draw, gr.Row():
                with gr.Column():
                    words = gr.Textbox(label="What to draw", max_lines=4, elem_id="draw-text")
                    seed = gr.Number(
                        0,
                        label="First seed",
                        precision=0,
                        minimum=0,
                        maximum=2**31 - 4,
                        info="The same seed gives the same image.",
                    )
                    shape = gr.Dropdown([], label="Width : height", visible=False)
                results("draw", "Draw", ChatSession.on_draw, [session, words, seed, shape])
            with gr.Tab("Edit", visible=False) as edit, gr.Row():
                with gr.Column():
                    image = image_of("Image", "edit-image")
                    words = gr.Textbox(label="What to change", max_lines=4, elem_id="edit-text")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
                results("edit", "Edit", ChatSession.on_change, [session, image, words, seed])
            with gr.Tab("Codes", visible=False) as codes:
                rows = []
                with gr.Row():
                    for name in ("first", "second"):
                        with gr.Column():
                            image = image_of(f"The {name} image", f"codes-{name}")
                            strip, row = gr.HTML(elem_id=f"strip-{name}"), gr.State([])
                            image.change(ChatSession.on_codes, [session, image], [strip, row])
                            rows.append(row)
                with gr.Row():
                    with gr.Column():
                        count = gr.Slider(
                            1,
                            CODES,
                            CODES,
                            step=1,
                            label="Codes to draw from",
                            elem_id="count",
                            info="An image grows with its codes.",
                        )
                        exchanged = gr.Slider(
                            0,
                            CODES,
                            CODES // 2,
                            step=1,
                            label="Codes to exchange",
                            info="The first so many of two images change places.",
                        )
                    results(
                        "swap",
                        "Draw",
                        ChatSession.on_swap,
                        [session, *rows, count, exchanged],
                        count.release,
                    )
            with gr.Tab("Find", visible=False) as find, gr.Row():
                with gr.Column():
                    image = image_of("Image", "find-image")
                    words = gr.Textbox(label="What to find", max_lines=4, elem_id="find-text")
                results("find", "Find", ChatSession.on_find, [session, image, words])

        how: dict[str, Any] = {"show_progress": "hidden"}
        talk = [chat, message]
        asked = [
            message.submit(ChatSession.on_submit, [session, message], **how),
            chat.retry(ChatSession.on_retry, [session], **how),
            chat.edit(ChatSession.on_edit, [session], **how),
            chat.example_select(ChatSession.on_example, [session], **how),
        ]
        replies = [
            one.success(ChatSession.reply, [session, *settings], talk, **how) for one in asked
        ]
        for one in replies:
            one.then(ChatSession.on_end, [session], talk, **how)
        message.stop(None, cancels=replies)
        chat.undo(ChatSession.on_undo, [session], talk, **how)
        chat.clear(ChatSession.reset, [session], cancels=replies, **how).then(
            ChatSession.on_clear, None, talk, **how
        )
        message.change(
            ChatSession.on_choose, [session, message], message, trigger_mode="always_last", **how
        )
        force, ratio, _, _, temperature, _, rounds = settings
        gr.on(
            [choice.input, demo.load],
            ChatSession.on_model,
            [session, choice],
            [
                session,
                title,
                choice,
                chat,
                temperature,
                rounds,
                force,
                ratio,
                shape,
                draw,
                edit,
                codes,
                find,
            ],
            cancels=replies,
            **how,
        )
    return demo


def settings_of() -> list[Any]:
    """Generation settings: the original demo's sliders and ranges."""
    with gr.Row():
        force = gr.Checkbox(label="Answer with an image", elem_id="force", min_width=160)
        ratio = gr.Dropdown([], label="Width : height", visible=False)
    with gr.Accordion("Settings", open=False, elem_id="settings"):
        beams = gr.Slider(
            1, 4, 1, step=1, label="Beams", info="Answers followed at once; the likeliest is kept."
        )
        tokens = gr.Slider(
            64, 1024, 256, step=64, label="Most new tokens", info="An image takes 34 or more."
        )
        temperature = gr.Slider(
            0, 1, 1, step=0.1, label="Temperature", info="0: the likeliest words, but for Retry."
        )
        top_p = gr.Slider(
            0, 1, 0.5, step=0.1, label="Top P", info="Only the likeliest words up to this share."
        )
        rounds = gr.Slider(
            1,
            10,
            3,
            step=1,
            label="Most rounds of history",
            info="Longer conversations are refused.",
        )
    return [force, ratio, beams, tokens, temperature, top_p, rounds]


def image_of(label: str, name: str) -> Any:
    """An image input; its file is opened by `ChatSession.store_upload`, which reports errors."""
    image = gr.Image(
        type="filepath",
        label=label,
        sources=["upload", "clipboard"],
        height=240,
        elem_id=name,
        buttons=["fullscreen"],
    )
    image.preprocess = lambda upload: upload and upload.path  # type: ignore[method-assign]
    return image


def results(
    name: str, label: str, handler: Callable[..., Any], inputs: list[Any], *triggers: Any
) -> None:
    """Start button, stop button and output images."""
    with gr.Column():
        with gr.Row():
            run, stop = (
                gr.Button(label, variant="primary", elem_id=name),
                gr.Button("Stop", min_width=80),
            )
        images = gr.Gallery(
            label="Results",
            columns=2,
            object_fit="contain",
            height=620,
            format="png",
            elem_id=f"{name}-images",
            buttons=["download", "fullscreen"],
        )
    texts = [part.submit for part in inputs if isinstance(part, gr.Textbox)]
    made = gr.on([run.click, *texts, *triggers], handler, inputs, images)
    stop.click(None, cancels=made)


def launch(addresses: Sequence[str], kind: ModelCard, server_name: str, server_port: int) -> None:
    """Serve the page until interrupted or ended by SIGTERM. Raises ConfigError: the port is taken."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with (
        ended_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="seed_chat_", ignore_cleanup_errors=True) as folder,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder
        gr.set_static_paths([folder, IMAGES])  # files are served from where they are, not copied
        demo = build([ModelClient(address, kind) for address in addresses])
        theme = gr.themes.Soft(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        )
        try:
            demo.queue(default_concurrency_limit=None).launch(
                server_name=server_name,
                server_port=server_port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                theme=theme,
                css=CSS,
                show_error=True,
                footer_links=[],
                max_file_size=UPLOADS.max_bytes,
            )
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {server_name}:{server_port}: the port is taken or not allowed; choose "
                f"another with --server_port."
            ) from error
        print(
            f"The chat is at http://{server_name}:{demo.server_port} and asks {', '.join(addresses)} (Ctrl-C stops)."
        )
        demo.block_thread()
