"""The page: a form on the left, and four ways to look at what it asks for on the right."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import gradio as gr

from eval.ablation import points
from eval.ablation.forms import FORMS, fraction
from eval.attention_look import Look, cells, look
from model.attention import concatenated, decoupled
from sampling.command_line import command_line
from sampling.device import check_device
from sampling.fields import Preset, paths
from sampling.form import EXAMPLES, ROOT, Desk, collect_notes
from sampling.layer_weights import attention_layers
from sampling.request import STRENGTH, Model, Request, SamplerName
from sampling.sheets.strip import LAMBDAS, strip
from train.world import BACKGROUND_NAMES, CONCEPT_NAMES, caption

FUSES = {"decoupled": decoupled, "concatenated": concatenated}
TITLE = "# Image prompts\nChoose a picture and write a text: the picture is the subject, the text its scene."
ABOUT = {
    "decoupled": "**Decoupled**, as in the paper: two softmaxes, and λ weighs the second. "
    r"$$Z = \mathrm{softmax}(QK^T/\sqrt d)\,V + λ\,\mathrm{softmax}(QK'^T/\sqrt d)\,V'$$",
    "concatenated": "**Concatenated**: one softmax over all keys, so text and picture compete. λ multiplies the exponentials of K'. "
    r"The adapter is the same; it was trained decoupled. $$Z = \mathrm{softmax}(Q[K; K']^T/\sqrt d)\,[V; V']$$",
}
CSS = """.image-frame img, .media-button img {width: 100% !important; height: 100% !important; object-fit: contain}
.flat, .flat .grid-wrap, .flat .gallery-container {height: auto !important; min-height: 0 !important; max-height: none !important}
.flat .grid-container {grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important}
.flat .caption-label {font-size: 11px; padding: 1px 5px; max-width: 100%; white-space: normal} .note p {font-weight: 600}
@media (max-width: 600px) {.flat .grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important} .katex {font-size: 1em}}"""
FLAT: dict[str, Any] = {"format": "png", "height": "auto", "object_fit": "contain", "elem_classes": "flat"}
FLAT |= {"fit_columns": False, "buttons": []}
stopped_sessions: set[str | None] = set()  # sessions that have pressed Stop


def form_of(desk: Desk) -> dict[str, Any]:
    """Lay out the form. Returns its parts by the names that `Desk.request` reads."""
    form: dict[str, Any] = {}
    form["image"] = gr.Image(str(EXAMPLES[7]), label="Image prompt", type="filepath", sources=["upload", "clipboard"], height=200)
    gr.Examples([[str(path)] for path in EXAMPLES], form["image"], label="Examples", examples_per_page=12)
    form["prompt"] = gr.Textbox("on a pink background", label="Text", max_lines=3)
    if desk.mini:
        with gr.Accordion("Words that the mini world knows", open=False), gr.Row():
            kinds = (("Concept", CONCEPT_NAMES), ("Background", BACKGROUND_NAMES))
            words = [gr.Dropdown([("none", ""), *names], value="", label=label, min_width=120) for label, names in kinds]
        for word in words:
            word.input(lambda what, where: caption(what or None, background=where or None), words, form["prompt"])
    form["scale"] = gr.Slider(0, 1.5, 1.0, step=0.05, label="λ, the weight of the picture")
    with gr.Accordion("Settings", open=False):
        form["guidance"] = gr.Slider(1, 15, 4 if desk.mini else Request.guidance, step=0.5, label="Guidance")
        about = "If it is not 0, the guidance above is by the text alone. A smaller number here makes drawings follow the text more."
        form["image_guidance"] = gr.Slider(0, 15, 0, step=0.5, label="Guidance by the picture (0: the same)", info=about)
        form["steps"] = gr.Slider(1, 100, 20 if desk.mini else Request.steps, step=1, label="Steps")
        form["seed"] = gr.Number(0, precision=0, label="Seed")
        form["num"] = gr.Slider(1, 8, 1, step=1, label="Number of pictures")
        form["sampler"] = gr.Radio(get_args(SamplerName), value=Request.sampler, label="Sampler")
        form["layers"] = gr.Radio(["all", *get_args(Preset)], value="all", label="Layers in which the picture acts")
        form["negative_prompt"] = gr.Textbox("", label="Negative text prompt")
        if desk.model.controls:
            form["hint"] = gr.Image(label="Hint for the control", type="filepath", sources=["upload", "clipboard"])
    with gr.Accordion("Change a picture", open=False):
        gr.Markdown("Draw starts from this picture. Paint in white what to draw anew; the rest then stays as it is.")
        white = gr.Brush(desk.config.sample_size // 2, colors=["#ffffff"], color_mode="fixed")
        form["edit"] = gr.ImageEditor(
            type="filepath", format="png", brush=white, sources=("upload", "clipboard"), transforms=(), layers=False, height=360,
            show_label=False,
        )  # fmt: skip
        form["strength"] = gr.Slider(0.05, 1, STRENGTH, step=0.05, label="How much to change")
    picture: Any = gr.Image
    picture.preprocess = lambda _, payload: payload and payload.path  # the library opens it, and says what is wrong
    return form


def resume(session: gr.Request) -> None:
    """Forget an earlier Stop. This runs at the click, so that a Stop before the drawing has begun is not forgotten."""
    stopped_sessions.discard(session.session_hash)


def stop(session: gr.Request) -> None:
    stopped_sessions.add(session.session_hash)


def row(label: str) -> list[Any]:
    """Lay out a button, Stop, and a note in which the library says what is wrong."""
    with gr.Row():
        buttons = [gr.Button(label, variant="primary", min_width=120), gr.Button("Stop", min_width=120)]
    return [*buttons, gr.Markdown(elem_classes="note")]


def wire(row: list[Any], form: dict[str, Any], do: Callable[..., Iterator[list[Any]]], outputs: list[Any], *more: Any) -> Any:
    """Let the button of a row run `do`, which yields values for the outputs, with progress and Stop."""
    def run(values: dict[Any, Any], session: gr.Request, progress: Any = gr.Progress()) -> Iterator[list[Any]]:  # noqa: B008
        notes: list[str] = []
        def watch(state: Any) -> None:
            if session.session_hash in stopped_sessions:
                raise ValueError("stopped; nothing more was drawn")
            progress((state.index + 1, values[form["steps"]]), unit="steps")

        with tempfile.TemporaryDirectory() as folder:
            with collect_notes(notes):
                for update in do({name: values[part] for name, part in form.items()}, values, watch, Path(folder)):
                    yield [*update, ""]
            yield [*[gr.skip()] * len(outputs), "  \n".join(notes)]

    row[0].click(resume, queue=False, api_visibility="private")
    row[1].click(stop, queue=False, api_visibility="private")
    return row[0].click(run, {*form.values(), *more}, [*outputs, row[2]], concurrency_id="draw", api_visibility="private")


def draw_tab(desk: Desk, form: dict[str, Any]) -> None:
    parts = row("Draw")
    pictures = gr.Gallery(label="Drawn", columns=2, **FLAT)
    with gr.Accordion("Keep it", open=False):
        command = gr.Textbox(label="As a command", interactive=False, lines=2, buttons=["copy"], elem_id="command")
        files = gr.File(label="Pictures with their settings, and what they were drawn from", file_count="multiple")
        upload = gr.File(label="Drop a picture that was drawn here, to get its settings back", file_types=[".png"])

    def draw(values: dict[str, Any], _: Any, watch: Any, folder: Path) -> Iterator[list[Any]]:
        drawings, request = desk.draw(folder, values, watch)
        yield [drawings, [str(one) for one in [*drawings, *dict.fromkeys(paths(request))]], command_line(request, desk.model)]

    def restore(path: str) -> list[Any]:
        notes: list[str] = []
        values: dict[str, Any] = {}
        with collect_notes(notes):
            values = desk.form(path)
            notes.append("The form has the settings of this picture.")
        return [*[values.get(name, gr.skip()) for name in form], "  \n".join(notes)]

    wire(parts, form, draw, [pictures, files, command])
    upload.upload(restore, upload, [*form.values(), parts[2]], api_visibility="private")


def lambda_tab(desk: Desk, form: dict[str, Any]) -> None:
    gr.Markdown("One seed, and λ from 0 to 1.5. The same picture and the same text, read in two ways.")
    parts, strips = row("Compare"), []
    for about in ABOUT.values():
        gr.Markdown(about, latex_delimiters=[{"left": "$$", "right": "$$", "display": True}])
        strips.append(gr.Gallery(show_label=False, columns=4, allow_preview=False, **FLAT))

    def compare(values: dict[str, Any], _: Any, watch: Any, folder: Path) -> Iterator[list[Any]]:
        request, galleries = desk.request(values), [gr.skip(), gr.skip()]
        for i, fuse in enumerate(FUSES.values()):
            pictures = strip(desk.pipeline, request, fuse, watch)
            galleries[i] = [(one, f"λ = {scale:g}") for one, scale in zip(pictures, LAMBDAS, strict=True)]
            yield galleries

    wire(parts, form, compare, strips)


def look_tab(desk: Desk, form: dict[str, Any]) -> None:
    gr.Markdown("Draws once, and shows where the drawing looks: at each word, and at each token of the picture.")
    fuse, parts, state = gr.Radio([*FUSES], value="decoupled", label="Attention"), row("Look inside"), gr.State(time_to_live=900)
    layers = len(attention_layers(desk.config))
    with gr.Row():
        step = gr.Slider(1, 20, 10, step=1, label="Step", min_width=120)
        layer = gr.Slider(1, layers, layers, step=1, label="Layer", min_width=120)
        head = gr.Slider(0, max(desk.config.heads), 0, step=1, label="Head (0: their mean)", min_width=120)
    mass = gr.Markdown()
    maps = gr.Gallery(show_label=False, columns=4, allow_preview=False, **FLAT)

    def draw(values: dict[str, Any], every: dict[Any, Any], watch: Any, folder: Path) -> Iterator[list[Any]]:
        result = look(desk.pipeline, desk.request(values), FUSES[every[fuse]], watch)
        yield [result, gr.Slider(maximum=len(result.maps), value=-(-len(result.maps) // 2))]

    def show(result: Look | None, *at: int) -> Any:
        notes: list[str] = []
        with collect_notes(notes):
            return cells(desk.pipeline.text, result, *at) if result else [gr.skip(), gr.skip()]
        return [gr.skip(), notes[-1]]

    wire(parts, form, draw, [state, step], fuse).then(show, [state, step, layer, head], [maps, mass], api_visibility="private")
    for part in (step, layer, head):
        part.input(show, [state, step, layer, head], [maps, mass], show_progress="hidden", api_visibility="private")


def study_tab() -> None:
    """Show RESULTS.md as it is, and the pictures that it names; draw the points of its curves."""
    text, link = (ROOT / "RESULTS.md").read_text(), r"!\[(.*?)\]\((.*?)\)"
    gr.Markdown(re.sub(link, "", text))
    if pictures := [(ROOT / path, about) for about, path in re.findall(link, text) if (ROOT / path).is_file()]:
        gr.Gallery(pictures, show_label=False, columns=2, **FLAT)
    choices = {name: [(fraction(lam), lam) for lam in grid] for name, grid in points.grids().items()}
    gr.Markdown("## Points\nThe drawings behind a point of the curves: one form at one λ, with seed 0 and the first prompts.")
    with gr.Row():
        form = gr.Dropdown([(FORMS[name].name, name) for name in choices], value="ip_adapter", label="Form")
        lam = gr.Dropdown(choices["ip_adapter"], value=1.0, label="λ")
    button, gallery = gr.Button("Draw this point"), gr.Gallery(show_label=False, columns=4, **FLAT)
    form.change(lambda name: gr.Dropdown(choices[name], value=1.0), form, lam, api_visibility="private")
    button.click(points.point, [form, lam], gallery, concurrency_id="draw", api_visibility="private")


def build(desk: Desk) -> gr.Blocks:
    """Lay out the page."""
    page = gr.Blocks(title="Image prompts", analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        gr.Markdown(TITLE)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                form = form_of(desk)
            with gr.Column(scale=3, min_width=320), gr.Tabs():
                for name, tab in {"Draw": draw_tab, "Lambda": lambda_tab, "Look inside": look_tab}.items():
                    with gr.Tab(name):
                        tab(desk, form)
                with gr.Tab("The study"):
                    study_tab()
    return page


def serve(model: Model, device: str, port: int, folder: Path) -> None:
    """Serve the page on this computer alone until Ctrl-C, and load the model meanwhile. Raises ValueError or OSError for bad input."""
    check_device(device)
    desk = Desk(model, folder)
    page = build(desk)
    page.launch(
        server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, max_file_size="20mb",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]), css=CSS, footer_links=[], ssr_mode=False,
        allowed_paths=[str(ROOT / "sampling"), str(ROOT / "results")],
    )  # fmt: skip
    print(f"http://localhost:{port} is ready, for this computer alone; Ctrl-C stops it", flush=True)
    desk.load(device)
    page.block_thread()
