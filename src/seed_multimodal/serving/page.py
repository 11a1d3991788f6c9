"""The web page: a chat with images in both directions, and a tab for each further task.

The page has no model: it sends requests to servers over HTTP. It works offline: no analytics, share
links or external fonts. A visitor's images are removed at the end of the session or program, also
on SIGTERM; what is logged (`ConversationLog`) stays.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import fastapi
import gradio as gr
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import is_file_obj, traverse

from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.registry import ModelCard
from seed_multimodal.proxies import without_proxy
from seed_multimodal.serving.chat_session import DRAWN_AT_ONCE, IMAGES, UPLOADS, VISITS, ChatSession
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.conversation_log import ConversationLog
from seed_multimodal.serving.origin import problem

MAX_SEED = 2**31 - 1
LOG_NOTICE = "The operator of this page keeps chats, their images and votes."
CSS = """
.gradio-container {padding-top: 4px !important}
.gradio-container .main {padding: 8px max(8px, min(4vw, 32px)) !important; gap: 8px}
:root:has(.dark) {color-scheme: dark}
/* Gradio's greys are too pale to be read. */
body:not(.dark) {--body-text-color-subdued: var(--neutral-500)}
.gradio-container {
    --input-placeholder-color: var(--body-text-color-subdued);
    --block-info-text-color: var(--body-text-color-subdued)
}
#header {align-items: center; gap: 8px}
#title {flex: 1 1 300px}
#title h1 {margin: 4px 0; font-size: 1.25rem}
#title p {margin: 0; font-size: .85rem; color: var(--body-text-color-subdued)}
#model {flex: 0 1 260px}
/* The page is as high as the window; the chat has the height that the rest leaves. Other tabs are
   scrolled. */
.gradio-container:has(#chat) {height: 100dvh; overflow-y: auto !important}
.gradio-container :has(#chat) {
    display: flex; flex: 1 1 auto; flex-direction: column; min-height: 0
}
#chat {flex: 1 1 240px; min-height: 240px}
#message {flex: none; border: 1px solid var(--border-color-primary); border-radius: 12px}
#chat .message img {width: 192px; max-width: 100%; object-fit: contain !important}
#chat .message :fullscreen img {width: 100vw; height: 100vh; max-height: none}
/* Gradio's bin empties the chat before the browser's copy is removed: `new` is in its place. */
#chat .icon-button-wrapper:has([aria-label="Clear"]) {display: none}
#chat button:is([title="Share"], [aria-label="Share"]) {display: none}
#chat .message-buttons-left:has(+ .bot-row) button:not(
    [aria-label="Copy message"], [aria-label="Download"]
) {display: none}
/* Read-backs and notes are no messages: small, without bubbles and buttons of their own. */
#chat .message:has([aria-label*="message: read back: "], .thought-group) {
    padding: 0 4px; border: none; background: none; box-shadow: none;
    font-size: .85rem; color: var(--body-text-color-subdued)
}
#chat .message-row:has([aria-label*="message: read back: "], .thought-group)
+ :has(+ .message-row) {display: none}
#chat .thought-group {
    padding: 0 8px; border: none; border-left: 3px solid var(--color-accent); border-radius: 0;
    background: none
}
/* Notes have a title only. */
#chat .thought-group:has([aria-busy="true"]) :is(.arrow, .content) {display: none}
/* Gradio loses the end of a conversation; the browser keeps it in view once it is. */
#chat .bubble-wrap * {overflow-anchor: none}
#chat .bubble-wrap:has(.message)::after {
    content: ""; display: block; height: 1px; overflow-anchor: auto
}
/* Gradio scrolls to the end of what is around the examples. */
#chat .placeholder-content {height: 100%; overflow-y: auto; justify-content: safe center}
#chat .examples {margin: 0 auto}
#below {flex: none; align-items: center; justify-content: space-between}
#below > * {flex: none; margin: 0 !important; min-width: 0; width: fit-content}
#below .block {background: none}
#below input {border: 1px solid var(--body-text-color-subdued)}
#chat .placeholder {flex: none; height: auto; padding: 12px 12px 0; text-align: center}
#chat .example {border: 1px solid var(--border-color-primary)}
#chat .example-image-container {width: 96px; height: 96px}
@media (max-width: 640px) {
    #chat .examples {grid-template-columns: 1fr 1fr; gap: 8px}
    .column:has(#chat .message) #title p {display: none}
    [id$="-images"], [id$="-images"] .grid-wrap {height: 400px !important}
}
.strip {display: flex; flex-wrap: wrap; gap: 2px}
.strip span {
    flex: 1 0 34px; padding: 6px 0; border-radius: 4px; font-size: 11px; text-align: center;
    color: #111
}
"""
TO_END = "() => document.querySelector('#chat .bubble-wrap').scrollTo(0, 1e9)"


# ---- what strangers send


class Page(gr.Blocks):
    """Gradio's page, whose events take uploaded files only; Gradio reads and downloads others."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        super().validate_inputs(block_fn, inputs)
        traverse(inputs, check_upload, is_file_obj)


def check_upload(file: JsonObject) -> None:
    """Raise Gradio's error: a file of the machine, or an address."""
    if not is_in_or_equal(file["path"], get_upload_folder()):
        raise gr.Error("This file was not uploaded here.", print_exception=False)


# ---- the page


def build(models: Sequence[ModelClient], log: ConversationLog | None = None) -> gr.Blocks:
    """Layout and event handlers of the page; `ChatSession.on_model` adapts it to the model.

    log: of conversations and votes; None: no log, and no buttons to vote.
    """
    with Page(title="SEED Multimodal", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        session = gr.State(
            ChatSession([*models], models[0], log), delete_callback=ChatSession.reset
        )
        # 1. The layout.
        title, model_choice = header(models)
        if log is not None:
            gr.Markdown(LOG_NOTICE)
        # Gradio cannot hide tabs that are visible at first: `on_model` shows those of the model.
        with gr.Tabs():
            with gr.Tab("Chat"):
                chat, settings, replies = chat_tab(session)
            with gr.Tab("Draw", visible=False) as draw, gr.Row():
                draw_ratio = draw_tab(session)
            with gr.Tab("Edit", visible=False) as edit, gr.Row():
                edit_tab(session)
            with gr.Tab("Codes", visible=False) as codes:
                code_sliders = codes_tab(session)
            with gr.Tab("Find", visible=False) as find, gr.Row():
                find_tab(session)

        # 2. A choice of the model, which ends its answers, changes what depends on it.
        browser, chatbot, message = chat
        if log is not None:
            chatbot.like(ChatSession.on_vote, [session], show_progress="hidden")
        gr.on(
            [model_choice.input, page.load],
            ChatSession.on_model,
            [session, model_choice, browser],
            [
                session,
                title,
                model_choice,
                chatbot,
                message,
                *settings,
                draw_ratio,
                *code_sliders,
                draw,
                edit,
                codes,
                find,
            ],
            cancels=replies,
            show_progress="hidden",
        )
    return page


def header(models: Sequence[ModelClient]) -> tuple[gr.Markdown, gr.Dropdown]:
    """The title and the choice among several models."""
    with gr.Row(elem_id="header"):
        title = gr.Markdown(f"# {models[0].card.title}", elem_id="title")
        choice = gr.Dropdown(
            [*range(len(models))],
            value=0,
            label="Model",
            container=False,
            visible=len(models) > 1,
            elem_id="model",
        )
    return title, choice


# ---- chat


def chat_tab(
    session: gr.State,
) -> tuple[list[gr.Component], list[gr.Component], list[gr.events.Dependency]]:
    """The conversation, the box of the next message, and the settings.

    Returns the outputs of events (as `chat_session.Updates`), the settings (in the order of the
    arguments of `ChatSession.reply`) and the events of running answers, which others cancel.
    """
    # 1. The layout.
    chatbot = gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="chat",
        buttons=["copy"],
        height=None,
        render_markdown=False,
        editable="user",
        group_consecutive_messages=False,  # Gradio cannot edit grouped texts and images
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
    with gr.Row(elem_id="below"):
        force_image = gr.Checkbox(label="Answer with an image", container=False)
        new = gr.Button("New chat", size="sm", elem_id="new")
    # Neither is random: conversations also survive a new start of the page.
    browser = gr.BrowserState(storage_key="seed-conversation", secret="of the visitor")
    outputs = [browser, chatbot, message]
    settings = [force_image, *generation_inputs()]

    hidden = {"show_progress": "hidden"}

    # 2. Each of these begins an answer.
    starts = [
        message.submit(ChatSession.on_submit, [session, message], **hidden),
        chatbot.retry(ChatSession.on_retry, [session], **hidden),
        chatbot.edit(ChatSession.on_edit, [session], **hidden),
        chatbot.example_select(ChatSession.on_example, [session], **hidden),
        chatbot.option_select(ChatSession.on_option, [session], **hidden),
    ]

    # A message returns to the conversation's end.
    message.submit(None, js=TO_END)

    # 3. It is made, until one of the other buttons.
    replies = [
        start.success(ChatSession.reply, [session, *settings], outputs, **hidden)
        for start in starts
    ]
    message.stop(ChatSession.on_stop, [session], outputs, cancels=replies, **hidden)
    chatbot.undo(ChatSession.on_undo, [session], outputs, cancels=replies, **hidden)
    new.click(ChatSession.on_new, [session], outputs, cancels=replies, **hidden)
    message.change(
        ChatSession.on_choose, [session, message], message, trigger_mode="always_last", **hidden
    )
    return outputs, settings, replies


def generation_inputs() -> list[gr.Component]:
    """The original demo's sliders and ranges, and ours, behind `force_image`."""
    with gr.Sidebar(open=False, position="right"):
        dark = gr.Button("Light / dark", size="sm")
        dark.click(None, js="() => { document.body.classList.toggle('dark') }")
        ratio = gr.Dropdown([], label="Width : height", visible=False)
        beams = gr.Slider(
            1, 4, 1, step=1, label="Beams", info="Answers followed at once; the likeliest is kept."
        )
        max_new_tokens = gr.Slider(
            64, 1024, 256, step=64, label="Most new tokens", info="An image takes 34 or more."
        )
        temperature = gr.Slider(
            0, 1, 1, step=0.1, label="Temperature", info="0: the likeliest words, but for Retry."
        )
        top_p = gr.Slider(
            0, 1, 0.5, step=0.1, label="Top P", info="Only the likeliest words up to this share."
        )
        max_rounds = gr.Slider(
            0,
            10,
            0,
            step=1,
            label="Most rounds of history",
            info="Longer conversations are refused; 0: no limit.",
        )
    return [ratio, beams, max_new_tokens, temperature, top_p, max_rounds]


# ---- one tab for each further task


def draw_tab(session: gr.State) -> gr.Dropdown:
    """Images of a text; returns the choice of their ratio, for models that have several."""
    with gr.Column():
        text = gr.Textbox(label="What to draw", max_lines=4, elem_id="draw-text")
        seed = gr.Number(
            0,
            label="First seed",
            precision=0,
            minimum=0,
            maximum=MAX_SEED + 1 - DRAWN_AT_ONCE,
            info="The same seed gives the same image.",
        )
        ratio = gr.Dropdown([], label="Width : height", visible=False)
    results("draw", "Draw", ChatSession.on_draw, [session, text, seed, ratio])
    return ratio


def edit_tab(session: gr.State) -> None:
    """An image changed as a text says."""
    with gr.Column():
        image = image_input("Image", "edit-image")
        text = gr.Textbox(label="What to change", max_lines=4, elem_id="edit-text")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
    results("edit", "Edit", ChatSession.on_change, [session, image, text, seed])


def codes_tab(session: gr.State) -> tuple[gr.Slider, gr.Slider]:
    """The codes of two images; images of parts of them, and of codes exchanged between the two.

    Returns the two choices of a number of codes, whose range is the model's.
    """
    rows = []
    # Two images with their codes.
    with gr.Row():
        for name in ("first", "second"):
            with gr.Column():
                image = image_input(f"The {name} image", f"codes-{name}")
                strip = gr.HTML(elem_id=f"strip-{name}")
                row = gr.State([])
                image.change(ChatSession.on_codes, [session, image], [strip, row])
                rows.append(row)
    # What is drawn of them.
    with gr.Row():
        with gr.Column():
            count = gr.Slider(
                1,
                step=1,
                label="Codes to draw from",
                elem_id="count",
                info="An image grows with its codes.",
            )
            exchanged = gr.Slider(
                0,
                step=1,
                label="Codes to exchange",
                info="The first so many of two images change places.",
            )
        inputs = [session, *rows, count, exchanged]
        results("swap", "Draw", ChatSession.on_swap, inputs, count.release)
    return count, exchanged


def find_tab(session: gr.State) -> None:
    """A box around what a text names."""
    with gr.Column():
        image = image_input("Image", "find-image")
        text = gr.Textbox(label="What to find", max_lines=4, elem_id="find-text")
    results("find", "Find", ChatSession.on_find, [session, image, text])


def image_input(label: str, element_id: str) -> gr.Image:
    """An image input; its file is opened by `ChatSession.store_upload`, which reports errors."""
    image = gr.Image(
        type="filepath",
        label=label,
        sources=["upload", "clipboard"],
        height=240,
        elem_id=element_id,
        buttons=["fullscreen"],
    )
    # Handlers receive the path; Gradio would decode the image without our limits.
    image.preprocess = lambda upload: upload and upload.path
    return image


def results(
    name: str,
    label: str,
    handler: Callable[..., object],
    inputs: list[gr.Component],
    *triggers: gr.events.EventListener,
) -> None:
    """Start button, stop button and output images.

    triggers: events that also start `handler`, besides the button and Enter in a text of `inputs`.
    """
    with gr.Column():
        with gr.Row():
            start = gr.Button(label, variant="primary", elem_id=name)
            stop = gr.Button("Stop")
        images = gr.Gallery(
            label="Results",
            columns=2,
            object_fit="contain",
            height=620,
            format="png",
            elem_id=f"{name}-images",
            buttons=["download", "fullscreen"],
        )
        notes = gr.Markdown(elem_id=f"{name}-notes")
    # Enter in a text starts, too.
    submits = [component.submit for component in inputs if isinstance(component, gr.Textbox)]
    run = gr.on([start.click, *submits, *triggers], handler, inputs, [images, notes])
    stop.click(None, cancels=run)


# ---- the program


def launch(
    addresses: Sequence[str],
    card: ModelCard,
    server_name: str,
    server_port: int,
    *,
    root_path: str = "",
    origins: Collection[str] = (),
    log_folder: Path | None = None,
) -> None:
    """Serve the page until interrupted or ended by SIGTERM.

    root_path: path or URL of the page behind a reverse proxy.
    origins: under which browsers know the page there, see `origin.problem`.
    log_folder: for a log of conversations and votes.

    Raises:
        ConfigError: the port is taken, or the log's folder is not writable.
    """

    async def check_request(request: fastapi.Request) -> None:
        """Refuse other hosts and web pages, and downloads, which Gradio makes for visitors."""
        sentence = problem(server_name, request.headers, origins)
        if "://" in request.scope["path"]:
            sentence = "The page downloads nothing."
        if sentence:
            raise fastapi.HTTPException(403, sentence)

    log = None if log_folder is None else ConversationLog(log_folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with (
        ended_by_sigterm(),
        tempfile.TemporaryDirectory(prefix="seed_chat_", ignore_cleanup_errors=True) as folder,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder
        # Served from these folders, whatever they hold, and not copied: no uploads.
        gr.set_static_paths([f"{folder}/{VISITS}", IMAGES])
        page = build([ModelClient(address, card) for address in addresses], log)
        theme = gr.themes.Soft(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"]
        )
        try:
            # Gradio asks its own server whether it has started.
            with without_proxy():
                page.queue(api_open=False, default_concurrency_limit=None).launch(
                    server_name=server_name,
                    server_port=server_port,
                    root_path=root_path or None,
                    share=False,
                    prevent_thread_lock=True,
                    quiet=True,
                    theme=theme,
                    css=CSS,
                    enable_monitoring=False,
                    app_kwargs={
                        "dependencies": [fastapi.Depends(check_request)],
                        "openapi_url": None,  # no dependency would check it
                    },
                    footer_links=[],
                    run_history=False,  # it would keep all messages in the browser once more
                    max_file_size=UPLOADS.max_bytes,
                )
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {server_name}:{server_port}: the port is taken or not allowed; "
                f"choose another with --server_port."
            ) from error
        print(
            f"The chat is at http://{server_name}:{page.server_port} and asks "
            f"{', '.join(addresses)} (Ctrl-C stops)."
        )
        page.block_thread()
