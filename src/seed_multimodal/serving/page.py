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

FOLDER = Path(__file__).parent  # of the page's styles and scripts
SAMPLES = {str(file) for file in IMAGES.glob("*.png")}
MAX_SEED = 2**31 - 1
LOG_NOTICE = "The operator of this page keeps chats, their images and votes."
TO_END = "() => document.querySelector('#chat .bubble-wrap').scrollTo(0, 1e9)"


# ---- what strangers send


class Page(gr.Blocks):
    """Gradio's page, whose events take uploaded files only; Gradio reads and downloads others."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        super().validate_inputs(block_fn, inputs)
        traverse(inputs, check_upload, is_file_obj)


def check_upload(file: JsonObject) -> None:
    """Raise Gradio's error: a file of the machine that is no sample of the page, or an address."""
    path = file["path"]
    if path not in SAMPLES and not is_in_or_equal(path, get_upload_folder()):
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
        # Gradio cannot hide tabs that are visible at first: `on_model` shows those of the model,
        # and the style sheet hides the chat of one that writes no text.
        with gr.Tabs() as tabs:
            with gr.Tab("Chat", elem_id="chat-tab"):
                chat, known, settings, replies = chat_tab(session)
            with gr.Tab("Draw", visible=False, id="draw") as draw, gr.Row():
                draw_ratio = draw_tab(session)
            with gr.Tab("Edit", visible=False) as edit, gr.Row():
                edit_tab(session)
            with gr.Tab("Codes", visible=False) as codes:
                code_sliders = codes_tab(session, codes)
            with gr.Tab("Find", visible=False) as find, gr.Row():
                find_tab(session)

        # 2. A choice of the model, which ends its answers, changes what depends on it.
        conversations, chatbot, message = chat
        if log is not None:
            chatbot.like(ChatSession.on_vote, [session], show_progress="hidden")
        gr.on(
            [model_choice.input, conversations.select],
            ChatSession.on_model,
            [session, model_choice, conversations],
            [
                session,
                title,
                model_choice,
                chatbot,
                message,
                known,
                *settings,
                draw_ratio,
                *code_sliders,
                tabs,
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
) -> tuple[list[gr.Component], gr.HTML, list[gr.Component], list[gr.events.Dependency]]:
    """The conversations, the box of the next message, and the settings.

    Returns the outputs of events (as `chat_session.Updates`), the panel of what the model knows,
    the settings (in the order of the arguments of `ChatSession.reply`) and the events of running
    answers, which others cancel.
    """
    # 1. The layout.
    with gr.Sidebar(open=False, width=260, elem_id="chats"):
        new = gr.Button("New chat", size="sm", elem_id="new")
        conversations = gr.HTML(
            html_template='<p role="status"></p><ul aria-label="Chats"></ul>',
            js_on_load=(FOLDER / "conversations.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="conversations",
        )
    chatbot = gr.Chatbot(
        label="Conversation",
        show_label=False,
        elem_id="chat",
        buttons=["copy"],
        height=None,
        render_markdown=False,
        editable="user",
        placeholder="Show it images, ask about them, let it draw. Or try one of these:",
    )
    known = gr.HTML(
        js_on_load=(FOLDER / "known.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        visible=False,
        elem_id="known",
    )
    message = gr.MultimodalTextbox(
        autofocus=True,
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
    outputs = [conversations, chatbot, message]
    settings = [force_image, *generation_inputs()]

    hidden = {"show_progress": "hidden"}
    conversation = [session, conversations]

    # 2. Each of these begins an answer.
    starts = [
        message.submit(ChatSession.on_submit, [session, message, conversations], **hidden),
        chatbot.retry(ChatSession.on_retry, conversation, **hidden),
        chatbot.edit(ChatSession.on_edit, conversation, **hidden),
        chatbot.example_select(ChatSession.on_example, [session], **hidden),
        chatbot.option_select(ChatSession.on_option, conversation, **hidden),
    ]

    # A message returns to the conversation's end.
    message.submit(None, js=TO_END)

    # 3. It is made, until one of the other buttons.
    replies = [
        start.success(ChatSession.reply, [session, *settings], outputs, **hidden)
        for start in starts
    ]
    message.stop(ChatSession.on_stop, conversation, outputs, cancels=replies, **hidden)
    chatbot.undo(ChatSession.on_undo, conversation, outputs, cancels=replies, **hidden)
    new.click(ChatSession.on_new, [session], outputs, cancels=replies, **hidden)
    message.change(
        ChatSession.on_choose, [session, message], message, trigger_mode="always_last", **hidden
    )
    return outputs, known, settings, replies


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
        image = image_input("Image", "edit-image", "fox.png")
        text = gr.Textbox(
            "Put it at night.", label="What to change", max_lines=4, elem_id="edit-text"
        )
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
    results("edit", "Edit", ChatSession.on_change, [session, image, text, seed])


def codes_tab(session: gr.State, tab: gr.Tab) -> tuple[gr.Slider, gr.Slider]:
    """The codes of two images; images of parts of them, and of codes exchanged between the two.

    Returns the two choices of a number of codes, whose range is the model's.
    """
    rows = []
    # Two images with their codes.
    with gr.Row():
        for name, sample in (("first", "fox.png"), ("second", "whale.png")):
            with gr.Column():
                image = image_input(f"The {name} image", f"codes-{name}", sample)
                strip = gr.HTML(elem_id=f"strip-{name}")
                row = gr.State([])
                # A sample is no change; its codes are those of the model that is chosen then.
                gr.on(
                    [image.change, tab.select], ChatSession.on_codes, [session, image], [strip, row]
                )
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
        image = image_input("Image", "find-image", "fox_and_snowman.png")
        text = gr.Textbox("the snowman", label="What to find", max_lines=4, elem_id="find-text")
    results("find", "Find", ChatSession.on_find, [session, image, text])


def image_input(label: str, element_id: str, sample: str) -> gr.Image:
    """An image input; its file is opened by `ChatSession.store_upload`, which reports errors.

    sample: name of the image that it begins with, if it is installed.
    """
    file = IMAGES / sample
    image = gr.Image(
        file if file.is_file() else None,
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
                    css_paths=FOLDER / "page.css",
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
