"""``awares-bench app``: a page on which a picture is asked about, two or three methods side by side.

    awares-bench app                                                         # nano, on this machine only
    awares-bench app --pretrained Qwen/Qwen2.5-VL-7B-Instruct
    awares-bench app --engine openai --base-url http://localhost:8000/v1 --model NAME --pretrained CHECKPOINT

One model is loaded, in a process of its own while this one makes the page, and questions wait for it in a queue. What a visitor may
say is less than what the command line may: a method or an option that names a file or a hub's checkpoint is refused. Gradio draws the
page (extra ``app``) and is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import html
import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from . import card
from .app_model import NOTHING, QUESTION_CHARACTERS, serve
from .errors import AwaresError, OptionError, RunError
from .evaluation.run_options import OF_CHECKPOINT
from .methods import registry
from .methods.images import as_rgb

COLUMNS = ("awares", "visionzip", "full")
"""What the three columns show at first."""

FIRST_OPTIONS = ("", "retention=0.25", "")
UPLOAD_BYTES = 20 * 2**20
WAITING = 64
"""Questions in the queue, over all pages."""

EXAMPLE_SEED = 40
"""Of suite number 1, which nobody trains on; the shipped suite is number 0."""

STYLE = """
.awares-card{max-width:none!important;margin:0!important} footer{display:none!important}
.awares-card .turns{gap:.8rem} .awares-card td,.awares-card th{border:0!important;border-top:1px solid #eef1f4!important;padding:.1rem .6rem!important}
.refused{color:#8c1d18;background:#fde2e1;border-radius:6px;padding:.5rem .8rem} .asked table{border-collapse:collapse;font-size:.85rem}
.asked td,.asked th{padding:.1rem .6rem;text-align:left;border-top:1px solid #d8dee4} .asked td{white-space:pre-wrap;overflow-wrap:anywhere}
"""


def examples() -> list[tuple[Image.Image, str]]:
    """Six pictures of our own rendering, one of each kind, with a question to each. Nothing is read from a file."""
    from awares_bench.tasks.nano import suite, world

    seed = suite.suite_seeds(1, EXAMPLE_SEED + 1)[EXAMPLE_SEED]
    documents = [world.document(family, seed) for family in world.FAMILIES]
    return [(d.image, world.prompt(d.family, d.question, d.options)) for d in documents]


def picture_of(path: str | None) -> tuple[Image.Image | None, str]:
    """An uploaded file -> (the picture, or None; why not, as HTML)."""
    if path is None:
        return None, ""
    try:
        size = Path(path).stat().st_size
        if size > UPLOAD_BYTES:
            raise OptionError(f"the file has {size / 2**20:.0f} MiB; at most {UPLOAD_BYTES // 2**20} are taken. Make it smaller")
        return as_rgb(Path(path).read_bytes())[0], ""
    except (ValueError, OSError) as error:
        return None, refused(str(error))


def refused(sentence: str) -> str:
    """A sentence for the visitor, as HTML."""
    return f'<div class="refused">{html.escape(sentence)}</div>'


def log(lines: list[tuple[str, str, list[card.Answer]]]) -> str:
    """What a page has asked so far, newest last, as HTML."""
    rows = []
    for number, (question, sentence, given) in enumerate(lines, 1):
        told = [("", sentence)] if sentence else [(a.method, str(a)) for a in given]
        cells = "".join(f"<td><b>{html.escape(m)}</b> {html.escape(text)}</td>" for m, text in told)
        rows.append(f'<tr><td class="number">{number}</td><td>{html.escape(question)}</td>{cells}</tr>')
    if not rows:
        return ""
    return f'<details class="asked"><summary>asked so far: {len(rows)}</summary><table>{"".join(rows)}</table></details>'


class ModelProcess:
    """The model in a process of its own: it loads while this one imports Gradio and the page is opened."""

    def __init__(self, args: argparse.Namespace):
        context = multiprocessing.get_context("spawn")  # nothing of this process goes along
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, args), daemon=True)
        self._process.start()
        theirs.close()
        self._loading = threading.Lock()
        self._said: Any = None

    def ready(self) -> str:
        """Where the model is, once it is loaded. Raises what it could not be loaded for."""
        with self._loading:
            if self._said is None:
                self._said = self._receive()
        if isinstance(self._said, Exception):
            raise self._said
        return self._said

    def answers(self, *asked: Any) -> Iterator[tuple[str, card.Answer]]:
        """A picture, a question, and methods and options of the columns -> each answer as HTML, and without its pictures.

        Waits for the model. Raises OptionError for what cannot be asked, RunError when the process has ended.
        """
        self.ready()
        try:
            self._connection.send(asked)
        except OSError as error:
            raise RunError(self._ended()) from error
        said = self._receive()
        try:
            while isinstance(said, tuple):
                yield said
                said = self._receive()
        finally:
            while isinstance(said, tuple):  # the visitor has left: what is still said is nobody's
                said = self._receive()
        if said is not None:
            raise said

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise RunError(self._ended()) from error

    def _ended(self) -> str:
        self._process.join(5)
        return f"the model's process has ended with status {self._process.exitcode} (-9: the machine had no more memory); start the page again"


def page(model: ModelProcess, title: str, methods: list[str]) -> Any:
    """The page as ``gradio.Blocks``, its queue set."""
    import gradio as gr

    shown, every = examples(), [NOTHING, *methods]
    with gr.Blocks(title="awares-bench", analytics_enabled=False) as blocks:
        gr.Markdown(f"### awares-bench: how few visual tokens does an answer need?\n{title}")
        picture, asked = gr.State(None), gr.State([])
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                upload = gr.File(
                    label="a picture, at most 20 MiB", file_types=None, type="filepath", elem_id="upload", height=120
                )
                preview = gr.HTML(elem_id="preview")
            with gr.Column(scale=3, min_width=420):
                gallery = gr.Gallery(
                    [(image, None) for image, _ in shown], label="or an example", columns=6, height=150, allow_preview=False,
                    interactive=False, buttons=[], elem_id="examples",
                )  # fmt: skip
                question = gr.Textbox(label="question", lines=3, max_lines=6, max_length=QUESTION_CHARACTERS, elem_id="question")
                button = gr.Button("Ask", variant="primary", elem_id="ask")
        names, options, cards = [], [], []
        with gr.Row():
            for i, (name, option) in enumerate(zip(COLUMNS, FIRST_OPTIONS, strict=True), 1):
                with gr.Column(min_width=300):
                    names.append(gr.Dropdown(every, value=name, label=f"method {i}", elem_id=f"method{i}"))
                    options.append(
                        gr.Textbox(option, label="options", placeholder="retention=0.25", max_lines=1, elem_id=f"options{i}")
                    )
                    cards.append(gr.HTML(elem_id=f"card{i}"))
        history = gr.HTML(elem_id="asked")

        def take(path: str | None) -> tuple[Image.Image | None, str]:
            image, sentence = picture_of(path)
            if path is not None:
                with suppress(OSError):
                    Path(path).unlink()  # it is in memory now
            return image, sentence if image is None else card.image_tag(card.scaled(image, 1, 320))

        def example(event: gr.SelectData) -> tuple[Image.Image, str, str]:
            image, text = shown[event.index]
            return image, card.image_tag(image), text

        example.__annotations__["event"] = gr.SelectData  # read by Gradio, which does not see this function's imports

        def ask(image, text, before, *of_columns):
            chosen_names, chosen_options = of_columns[: len(names)], of_columns[len(names) :]
            given: list[card.Answer] = []
            slots = [i for i, name in enumerate(chosen_names) if name and name != NOTHING]
            drawn, sentence = [""] * len(names), ""
            try:
                for html_card, answer in model.answers(image, text, chosen_names, tuple(o or "" for o in chosen_options)):
                    drawn[slots[len(given)]] = html_card
                    given.append(answer)
                    yield [*drawn, before, gr.skip()]
            except AwaresError as error:
                sentence, drawn[0] = str(error), refused(str(error))
            now = [*before, (text or "", sentence, given)][-100:]
            yield [*drawn, now, log(now)]

        told: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        upload.change(take, upload, [picture, preview], **told)
        gallery.select(example, None, [picture, preview, question], **told)
        given = [picture, question, asked, *names, *options]
        for start in (button.click, question.submit):
            start(
                ask, given, [*cards, asked, history], concurrency_limit=1, concurrency_id="model", trigger_mode="multiple", **told
            )
    return blocks.queue(max_size=WAITING, default_concurrency_limit=1)


def title(args: argparse.Namespace) -> str:
    """What the page says of the model that answers."""
    if args.engine == "openai":
        return f"`{args.model}` at {args.base_url}, which is sent the pictures. Pruners need a model in this process."
    return f"`{args.pretrained}`. Pictures stay on the machine that runs this page."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``awares-bench app``."""
    parser.add_argument(
        "--pretrained", default="nano", help="checkpoint folder, LoRA adapters, hub name, or a name of the package"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="KEY=VALUE", help=f"of the checkpoint ({', '.join(OF_CHECKPOINT)})"
    )
    parser.add_argument(
        "--engine", choices=("transformers", "openai"), default="transformers", help="openai: ask a server instead"
    )
    parser.add_argument("--base-url", help="the server's address, for --engine openai")
    parser.add_argument("--model", help="the model's name on the server, for --engine openai")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; the default is reached from this machine only")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--share", action="store_true", help="a public address by way of Gradio's servers, for a few days")


def main(args: argparse.Namespace) -> int:
    """``awares-bench app``."""
    if find_spec("gradio") is None:
        raise RuntimeError('the page is drawn by Gradio, which is not installed: pip install "awares-bench[app]"')
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when Gradio is imported: nothing is told to anyone
    model = ModelProcess(args)
    import gradio as gr

    blocks = page(model, title(args), registry.names())
    theme = gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )  # of the browser, not fetched
    blocks.launch(
        server_name=args.host, server_port=args.port, share=args.share, max_file_size=UPLOAD_BYTES, show_error=True, quiet=True,
        footer_links=[], ssr_mode=False, theme=theme, css=STYLE, prevent_thread_lock=True,
    )  # fmt: skip
    print(f"http://{args.host}:{args.port} is there; the model is being loaded, and questions wait for it", flush=True)
    try:
        print(f"{model.ready()}; stop with Ctrl-C", flush=True)
        blocks.block_thread()
    finally:
        blocks.close(verbose=False)
    return 0
