"""Models and examples -> the page: what is chosen or dropped goes in, pictures come out row by row.

Nothing is kept between two calls, so users see nothing of each other: what a call needs comes from its page.
"""

import html
import random
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr  # an extra: this module is imported where the page is wanted

from delvm.demo.examples import Example
from delvm.demo.prompt import (
    Model,
    Prompt,
    Settings,
    Upload,
    draw,
    python_code,
    read_prompt,
    read_uploads,
    shell_code,
    write_zip,
)

CSS = """
.gradio-container { width: 100%; max-width: 60rem !important; margin: 0 auto !important; }
.picture img { image-rendering: pixelated; object-fit: contain; }
.pair { flex: 2 1 18rem; }
.query { flex: 1 1 9rem; }
.settings > * { min-width: min(100%, 10rem) !important; }
.caption p { margin: 0; }
"""
FONT, MONOSPACE = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")
TEMPERATURE, TOP_P = 1.0, 0.9  # most likely codes alone make one colour of what a young model draws
LARGEST_FILE = "64mb"
HOUR = 3600  # seconds

INTRODUCTION = """
# delvm
Solved pairs show a task; the annotation of the query is drawn. Drop pictures of your own, or press a task for
other examples.
"""


def build(models: Mapping[str, Model], examples: Mapping[str, list[Example]], shots: int) -> gr.Blocks:
    """The page, with the first task's example on it.

    Args:
        models: by name, in the order that they are shown; code is given for the last.
        examples: solved pairs by task, at least two of each.
        shots: pairs that it has room for.
    """
    start = _choose(next(iter(examples.values())), shots)
    described = {name: f"**{name}** · {model.size}" for name, model in models.items()}

    # analytics also by its variable: see __main__
    with gr.Blocks(title="delvm", analytics_enabled=False, delete_cache=(HOUR, 24 * HOUR)) as page:
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            choices = {task: gr.Button(task, size="sm", min_width=80) for task in examples}
        slots: list[gr.Image] = []
        with gr.Row():
            for number in range(1, shots + 1):
                with gr.Row(elem_classes="pair"):
                    for kind in ("image", "annotation"):
                        slots.append(_slot(f"{kind} {number}" if shots > 1 else kind, start[len(slots)]))
            with gr.Row(elem_classes="query"):
                query = _slot("query", start[-1])
        with gr.Row(equal_height=True, elem_classes="settings"):
            temperature = gr.Number(TEMPERATURE, label="temperature", minimum=0, step=0.1, min_width=110)
            top_p = gr.Number(TOP_P, label="top_p", minimum=0, maximum=1, step=0.05, min_width=110)
            seed = gr.Number(0, label="seed", minimum=0, precision=0, min_width=110)
            nearest = gr.Checkbox(False, label="colours are labels", min_width=110)
            button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
        pictures, captions = {}, {}
        with gr.Row():
            for name in models:
                with gr.Column(min_width=220):
                    pictures[name] = gr.Image(
                        label=name, height=300, format="png", buttons=["download"], interactive=False,
                        elem_id=f"drawn-{name}", elem_classes="picture", alt_text=f"drawn by {name}",
                    )  # fmt: skip
                    captions[name] = gr.Markdown(described[name], elem_classes="caption")
        last = [*models][-1]
        with gr.Accordion(f"The same in code ({last})", open=False, visible=False) as code:
            python, shell = (
                gr.Code(
                    language=language, label=language, lines=3, wrap_lines=True, show_line_numbers=False,
                    interactive=False,
                )
                for language in ("python", "shell")
            )  # fmt: skip
            files = gr.DownloadButton("Download its pictures", size="sm")

        def restart() -> dict[Any, Any]:
            return {
                **{pictures[name]: None for name in models},
                **{captions[name]: described[name] for name in models},
                code: gr.Accordion(visible=False),
            }

        def run(*values: Any) -> Iterator[dict[Any, Any]]:
            sent, settings = values[: len(slots) + 1], values[len(slots) + 1 :]
            *shown, asked = map(_upload, sent)
            try:
                prompt = read_prompt(shown, asked, Settings(*settings))
                yield restart()
                whole: dict[Any, Any] = {}
                for drawing in draw(models, prompt):
                    said = f"{described[drawing.model]} · {drawing.seconds:.2f}\N{NO-BREAK SPACE}s"
                    row = {pictures[drawing.model]: drawing.picture, captions[drawing.model]: said}
                    whole |= row
                    yield row
                for code_of in again(prompt):  # with all pictures: a busy browser may have missed a row
                    yield whole | code_of
            except ValueError as error:
                raise gr.Error(html.escape(str(error)), print_exception=False) from None

        def again(prompt: Prompt) -> Iterator[dict[Any, Any]]:
            with TemporaryDirectory() as folder:  # gradio has its copy when it asks for the next
                archive = Path(folder) / "pictures.zip"
                write_zip(archive, prompt)
                yield {
                    code: gr.Accordion(visible=True),
                    python: python_code(models[last], prompt),
                    shell: shell_code(models[last], prompt),
                    files: str(archive),
                }

        results = [*pictures.values(), *captions.values(), code]
        # what is uploaded comes as a file: a bad one is named here, not by the page's own reader
        button.click(
            run, [*slots, query, temperature, top_p, seed, nearest], [*results, python, shell, files],
            preprocess=False, concurrency_limit=1, show_progress="minimal", api_visibility="private",
        )  # fmt: skip
        for slot in (*slots, query):
            slot.upload(
                _check, slot, slot,
                preprocess=False, concurrency_limit=None, show_progress="hidden", api_visibility="private",
            )  # fmt: skip
        for task, choice in choices.items():
            choice.click(
                partial(_choose, examples[task], shots), None, [*slots, query],
                concurrency_limit=None, show_progress="hidden", api_visibility="private",
            ).then(restart, None, results, show_progress="hidden", api_visibility="private")  # fmt: skip
    return page


def launch(page: gr.Blocks, host: str, port: int) -> None:
    """Serve a page until it is closed; returns at once. It asks nothing of any other machine."""
    page.launch(
        server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False,
        inbrowser=False, run_history=False, footer_links=[], max_file_size=LARGEST_FILE,
        theme=gr.themes.Default(primary_hue="slate", font=FONT, font_mono=MONOSPACE), css=CSS,
    )  # fmt: skip


def _slot(label: str, value: str | None) -> gr.Image:
    return gr.Image(
        value, label=label, height=200, sources=["upload", "clipboard"], buttons=[], min_width=120,
        interactive=True, elem_id=label.replace(" ", "-"), elem_classes="picture",
    )  # fmt: skip


def _choose(samples: list[Example], shots: int) -> list[str | None]:
    """Files for every slot and the query: different samples of a task; too few leave slots empty."""
    *shown, last = random.sample(samples, min(shots + 1, len(samples)))
    files: list[str | None] = [str(file) for pair in shown for file in pair]
    return [*files, *[None] * (2 * shots - len(files)), str(last[0])]


def _upload(sent: dict[str, Any] | None) -> Upload | None:
    """What a slot holds; the server has made sure that the file is one that was uploaded."""
    if not sent or not sent["path"]:
        return None
    path = Path(sent["path"])
    return Upload(path, Path(sent["orig_name"] or path.name).name)


def _check(sent: dict[str, Any] | None) -> Any:
    """Leaves a slot as it is; with a bad file, empties it and says why."""
    try:
        if upload := _upload(sent):
            read_uploads([upload])
    except ValueError as error:
        gr.Warning(html.escape(str(error)))
        return None
    return gr.skip()
