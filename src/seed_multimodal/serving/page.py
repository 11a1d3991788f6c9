"""The web page: a chat with images in both directions, and a tab for each further task.

The page has no model: it sends requests to servers over HTTP. It works offline: no analytics, share
links or external fonts. A visitor's images are removed at the end of the session or program, also
on SIGTERM; what is logged (`ConversationLog`) stays.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi.datastructures import Headers
from fastapi.middleware import Middleware
from fastapi.responses import JSONResponse
from gradio.utils import get_upload_folder, is_in_or_equal

from seed_multimodal.disk import JsonObject
from seed_multimodal.entry import ended_by_sigterm
from seed_multimodal.errors import ConfigError
from seed_multimodal.models.registry import ModelCard
from seed_multimodal.proxies import without_proxy
from seed_multimodal.serving.chat import IMAGES
from seed_multimodal.serving.chat_session import (
    DRAWN_AT_ONCE,
    UPLOADS,
    VISITS,
    ChatSession,
    page_title,
)
from seed_multimodal.serving.client import ModelClient
from seed_multimodal.serving.conversation_log import ConversationLog
from seed_multimodal.serving.origin import problem

App = Callable[..., Awaitable[None]]  # of ASGI

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent  # of the page's styles and scripts
SAMPLES = {str(file) for file in IMAGES.glob("*.png")}
MAX_SEED = 2**31 - 1
LOG_NOTICE = "The operator of this page keeps chats, their images and votes."
# What a browser asks for; Gradio has further routes, which download or tell more.
ROUTES = re.compile(
    r"/|/(?:config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)/?|/(?:assets|static|svelte)/.*+"
    r"|/gradio_api/(?:file=(?!\w++:/).*+|heartbeat/\w++|(?:queue/(?:join|data)|upload|upload_progress"
    r"|cancel|reset|startup-events|theme\.css)/?)"
)
# Gradio's own scripts and styles are inline, and compile templates.
POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; img-src 'self' data: blob:"
LIST = """<input type="search" placeholder="Search chats" aria-label="Search chats">
<p role="status"></p><ul aria-label="Chats"></ul>"""
BROWSER = "(...values) => document.querySelector('#conversations').page.{}(...values)"


# ---- what strangers send


class Page(gr.Blocks):
    """Gradio's page, whose events take uploaded files only; Gradio reads and downloads others."""

    def validate_inputs(self, block_fn: Any, inputs: list[Any]) -> None:
        super().validate_inputs(block_fn, inputs)
        values: list[Any] = [inputs]
        while values:
            value = values.pop()
            if isinstance(value, dict):
                check_file(value)
                values += value.values()
            elif isinstance(value, list):
                values += value


def check_file(value: JsonObject) -> None:
    """Raise Gradio's error for a file of the machine that is no sample of the page, or an address.

    value: an object of an event, at any depth; Gradio takes those with a path for files.
    """
    path = value.get("path")
    is_file = isinstance(path, str) and path not in SAMPLES
    if is_file and not is_in_or_equal(path, get_upload_folder()):
        raise gr.Error("This file was not uploaded here.", print_exception=False)


class Door:
    """ASGI middleware: requests of other hosts and web pages, and for what no visitor needs, are
    refused, and browsers load nothing from other hosts."""

    def __init__(self, app: App, bound_host: str, origins: Collection[str]) -> None:
        self.app = app
        self.bound_host = bound_host
        self.origins = origins

    async def __call__(self, scope: Any, receive: Any, send: App) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # 1. The request.
        sentence = problem(self.bound_host, Headers(scope=scope), self.origins)
        status = 403
        if not ROUTES.fullmatch(scope["path"]):
            sentence = "There is no such page."
            status = 404
        if sentence:
            await JSONResponse({"error": sentence}, status)(scope, receive, send)
            return

        # 2. Its answer.
        async def send_with_policy(message: JsonObject) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"content-security-policy", POLICY))
            await send(message)

        try:
            await self.app(scope, receive, send_with_policy)
        except (LookupError, TypeError, ValueError):  # Gradio's, of what browsers do not send
            logger.exception("A request of the page cannot be read")
            await JSONResponse({"error": "It cannot be read."}, 400)(scope, receive, send)


# ---- the page


def build(models: Sequence[ModelClient], log: ConversationLog | None = None) -> gr.Blocks:
    """Layout and event handlers of the page; `ChatSession.on_model` adapts it to the model.

    log: of conversations and votes; None: no log, and no buttons to vote.
    """
    with Page(title="SEED Multimodal", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        session = gr.State(
            ChatSession([*models], models[0], log), delete_callback=ChatSession.close
        )
        # 1. The layout.
        title, model_choice = header(models)
        if log is not None:
            gr.Markdown(LOG_NOTICE)
        # Gradio cannot hide tabs that are visible at first: `on_model` shows those of the model,
        # and the style sheet hides the chat of one that writes no text.
        with gr.Tabs() as tabs:
            with gr.Tab("Chat", elem_id="chat-tab"):
                conversations, chatbot, known, settings = chat_tab(session)
            with gr.Tab("Draw", visible=False, id="draw") as draw, gr.Row():
                draw_ratio = draw_tab(session)
            with gr.Tab("Edit", visible=False) as edit, gr.Row():
                edit_tab(session)
            with gr.Tab("Codes", visible=False) as codes:
                code_sliders = codes_tab(session, codes)
            with gr.Tab("Find", visible=False) as find, gr.Row():
                find_tab(session)

        # 2. A choice of the model changes what depends on it.
        if log is not None:
            chatbot.like(ChatSession.on_vote, [session, conversations], show_progress="hidden")
        gr.on(
            [model_choice.input, conversations.input],
            ChatSession.on_model,
            [session, model_choice, conversations],
            [
                conversations,
                title,
                model_choice,
                chatbot,
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
            trigger_mode="always_last",
            show_progress="hidden",
        )
    return page


def header(models: Sequence[ModelClient]) -> tuple[gr.HTML, gr.Dropdown]:
    """The title and the choice among several models."""
    with gr.Row(elem_id="header"):
        title = gr.HTML(page_title(models[0].card.title, ""), elem_id="title")
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
) -> tuple[gr.HTML, gr.Chatbot, gr.HTML, list[gr.Component]]:
    """The conversations, the box of the next message, and the settings.

    Returns the list of conversations, which gets all updates, the open one, the panel of what the
    model knows, and the settings (in the order of the arguments of `Chat.request`).
    """
    # 1. The layout.
    with gr.Sidebar(open=False, width=260, elem_id="chats"):
        gr.Button("New chat", size="sm", elem_id="new")
        conversations = gr.HTML(
            html_template=LIST,
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
    settings = [force_image, *generation_inputs()]
    outgoing = gr.MultimodalTextbox(visible=False)
    refused = gr.HTML(visible=False)

    # 2. What the browser does by itself (`conversations.js`): a message leaves its box, the open
    #    conversation of an update is shown, and refused files leave the box.
    sent = message.submit(
        None, message, [outgoing, message], js=BROWSER.format("take"), show_progress="hidden"
    )
    conversations.apply(None, message, [chatbot, message], js=BROWSER.format("show"))
    changed = message.change(None, message, js=BROWSER.format("choose"), show_progress="hidden")
    chosen = changed.success(
        ChatSession.on_choose,
        [session, message],
        refused,
        trigger_mode="always_last",
        show_progress="hidden",
    )
    chosen.then(None, [refused, message], message, js=BROWSER.format("refuse"))

    # 3. Events of conversations, each of which is answered though others are.
    conversation = [session, conversations]
    options = {"outputs": conversations, "trigger_mode": "multiple", "show_progress": "hidden"}
    inputs = [*conversation, *settings]
    sent.success(ChatSession.on_submit, [session, outgoing, conversations, *settings], **options)
    chatbot.retry(ChatSession.on_retry, inputs, **options)
    chatbot.edit(ChatSession.on_edit, inputs, **options)
    chatbot.example_select(ChatSession.on_example, inputs, **options)
    chatbot.option_select(ChatSession.on_option, inputs, **options)
    message.stop(ChatSession.on_stop, conversation, **options)
    chatbot.undo(ChatSession.on_undo, conversation, **options)
    conversations.select(ChatSession.on_select, conversation, **options)
    return conversations, chatbot, known, settings


def generation_inputs() -> list[gr.Component]:
    """The original demo's sliders and ranges, and ours, behind `force_image`."""
    with gr.Sidebar(open=False, position="right"):
        gr.HTML("<h2>Settings</h2>")
        dark = gr.Button("Light / dark", size="sm")
        dark.click(None, js=BROWSER.format("dark"))
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
        notes = gr.HTML(elem_id=f"{name}-notes")
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
        ).set(  # dark enough to be read
            block_label_text_color="*body_text_color",
            block_title_background_fill="transparent",
            block_title_text_color="*body_text_color",
            button_primary_background_fill="*primary_600",
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
                    app_kwargs={"middleware": [Middleware(Door, server_name, origins)]},
                    _frontend=False,  # the first answer is awaited, however long it takes
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
