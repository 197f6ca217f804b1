"""The page: its gradio components and the functions that run when a button is pressed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.components import Component

from lumos.demo import views
from lumos.demo.answers import watch
from lumos.demo.api import field_value
from lumos.demo.gallery import LISTEN, Gallery
from lumos.demo.limits import Limits
from lumos.demo.service import Service
from lumos.demo.store import Store
from lumos.demo.worker import ClipJob
from lumos.errors import RunError, UserError
from lumos.pipeline.base import VideoPipeline
from lumos.pipeline.options import CHOICE, FLAG, Option
from lumos.pipeline.request import Request

SHAPE = ("width", "height", "num_frames")
CSS = Path(__file__).with_name("page.css")
NO_UPLOAD = "the file is not there any more; upload it again"
NOT_REUSED = ("given", "last_image", "interpolate", "views")
"""The controls that the button of a result leaves as they are."""
EXAMPLE_FPS = 8
HELLO = "Say what the clip shows, then press Generate."


def build_page(service: Service, examples: Mapping[str, np.ndarray | None]) -> gr.Blocks:
    """Return the page of a service; `examples` are prompts, each with the frames of its thumbnail or None."""
    longest = service.limits.max_prompt_length
    with gr.Blocks(title="Lumos", analytics_enabled=False) as page:
        gr.Markdown("# Lumos\nVideo from words and pictures.", elem_id="title")
        with gr.Row():
            with gr.Column(scale=4, min_width=300, elem_id="left"):
                with gr.Column(elem_id="ask"):
                    # Of a box with one line, Enter submits; it grows with its text.
                    prompt = gr.Textbox(
                        "", label="Prompt", lines=1, max_lines=6, max_length=longest, autofocus=True, elem_id="prompt"
                    )
                    with gr.Row():
                        start = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate")
                        cancel = gr.Button("Cancel", min_width=120, interactive=False, elem_id="cancel")
                with gr.Column(elem_id="more"):
                    show_examples(examples, prompt)
                    given = gr.File(label="Picture or clip to begin with", height=140, elem_id="upload")
                    given.preprocess = path_of
                    thumbnail = gr.HTML("", elem_id="thumbnail")
                    if service.pipe.trained_on is not None:
                        with gr.Accordion("What this model knows", open=False, elem_id="knows"):
                            gr.HTML(views.known(service.pipe.trained_on))
                    with gr.Accordion("Size, length and sampling", open=False, elem_id="settings"):
                        asked = {"prompt": prompt, "given": given, **uses(service), **sampling_controls(service)}
                    uploads = [asked[name] for name in ("given", "last_image") if name in asked]
            with gr.Column(scale=6, min_width=300, elem_id="right"):
                stage = gr.HTML(views.stage_text(HELLO), elem_id="stage")
                line = gr.HTML(views.status(""), elem_id="line")
        gallery = Gallery()

        async def generate(values: dict[Component, Any], session: gr.Request) -> AsyncIterator[dict[Component, Any]]:
            try:
                files = [values[part] for part in uploads if values[part]]
                if not all(map(service.store.holds_upload, files)):
                    raise UserError(NO_UPLOAD)
                answers = {name: values[part] for name, part in asked.items()}
                given_as = await given_as_what(service, answers["given"])
                request = request_of(answers, service.defaults, service.pipe, given_as)
                job = ClipJob(request, owner=session.session_hash)
                service.submit(job)
            except (UserError, RunError) as error:
                yield {line: views.wrong(str(error))}
                return
            # Every update holds the buttons, because a busy browser may show only the last of several updates.
            working = {start: gr.Button(interactive=False), cancel: gr.Button(interactive=True)}
            try:
                with contextlib.ExitStack() as needed:
                    for file in files:
                        needed.enter_context(service.store.needing(Path(file)))
                    yield working
                    async for update in shown_progress(service, job):
                        yield working | {part: update[name] for name, part in (("stage", stage), ("line", line)) if name in update}
            finally:
                service.worker.cancel(job)  # has an effect only if the visitor has left
            ended = {start: gr.Button(interactive=True), cancel: gr.Button(interactive=False), line: outcome(job)}
            if job.record is not None:
                ended |= {stage: views.stage_result(job.record), **gallery.add(values[gallery.made], job.record)}
            yield ended

        def give_up(session: gr.Request) -> None:
            service.worker.cancel_of(session.session_hash)

        gr.on(
            [start.click, prompt.submit], generate, {gallery.made, *asked.values()}, [stage, line, start, cancel, *gallery.parts],
            show_progress="hidden", concurrency_limit=None, api_visibility="private",
        )  # fmt: skip
        cancel.click(give_up, None, None, queue=False, api_visibility="private")
        given.change(partial(look, service), given, thumbnail, show_progress="hidden", concurrency_limit=1,
                     api_visibility="private")  # fmt: skip
        filled = {name: part for name, part in asked.items() if name not in NOT_REUSED}
        gallery.on_reuse(
            [*filled.values()], lambda record: {filled[name]: value for name, value in answers_of(record, filled).items()}
        )
    allow_uploads_only(page, service.store)
    return page


def show_examples(examples: Mapping[str, np.ndarray | None], prompt: Component) -> None:
    """Add a button for each example that has a thumbnail, and a table of the others; both put the example into the prompt."""
    pictures = {example: frames for example, frames in examples.items() if frames is not None}
    if pictures:
        gr.HTML("<h3>Examples</h3>")
        with gr.Row(elem_id="examples"):
            for example, frames in pictures.items():
                slot = gr.HTML(views.example(example, frames, EXAMPLE_FPS), js_on_load=LISTEN, min_width=0)
                slot.click(partial(str, example), None, prompt, queue=False, show_progress="hidden", api_visibility="private")
    if plain := [[example] for example in examples if example not in pictures]:
        gr.Examples(plain, [prompt], label="Examples", examples_per_page=20)


async def given_as_what(service: Service, file: str | None) -> str:
    """Return "image" or "video", the argument that takes an upload; "image" also if there is none."""
    if file is None:
        return "image"
    with service.store.needing(Path(file)):
        return await asyncio.to_thread(service.kind_of, Path(file))


async def look(service: Service, file: str | None) -> str:
    """Return the HTML of what an upload shows, or of the message why it cannot be read."""
    if file is None:
        return ""
    path = Path(file)
    try:
        if not service.store.holds_upload(path):
            raise UserError(NO_UPLOAD)
        with service.store.needing(path):
            frame = await asyncio.to_thread(service.look, path)
        return views.thumbnail(frame)
    except (UserError, RunError) as error:
        return views.wrong(str(error))


def answers_of(record: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return the values of the controls of these names that ask for the result of a record; uploads stay as they are."""
    known = {**record["settings"], "prompt": record["prompt"], "negative_prompt": record.get("negative_prompt") or "",
             "seed": str(record["seed"])}  # fmt: skip
    return {name: known[name] for name in names if name in known}


def allow_uploads_only(page: gr.Blocks, store: Store) -> None:
    """Let the components of a page read only files that visitors have uploaded.

    gradio, mounted in another app, would otherwise read any file of this machine, and fetch any
    address, that a request names.
    """

    async def same_path(path: str | Path | None) -> str | None:
        if path is not None and not store.holds_upload(path):
            raise gr.Error(NO_UPLOAD, print_exception=False)
        return None if path is None else str(path)

    for block in page.blocks.values():
        if not hasattr(block, "async_move_resource_to_block_cache"):  # a private name of gradio, which may change
            raise RunError(
                f"gradio {gr.__version__} reads files in a way that the demo cannot check; install the version in constraints.txt"
            )
        block.async_move_resource_to_block_cache = same_path


def sampling_controls(service: Service) -> dict[str, Component]:
    """Return the controls of the folded section, by the names of the pipeline's arguments."""
    limits, own, pipe = service.limits, service.pipe.clip, service.pipe
    negative = gr.Textbox("", label="Negative prompt", max_length=limits.max_prompt_length)
    with gr.Row():
        width = gr.Slider(pipe.size_unit, limits.max_side, own.width, step=pipe.size_unit, label="Width", min_width=140)
        height = gr.Slider(pipe.size_unit, limits.max_side, own.height, step=pipe.size_unit, label="Height", min_width=140)
    label = f"Frames, {own.fps} a second, given frames included; 1 makes a picture"
    frames = gr.Slider(1, limits.max_frames, own.num_frames, step=pipe.temporal_compression, label=label, elem_id="frames")
    options = {option.name: sampling_control(option, getattr(pipe.settings, option.name), limits)
               for option in pipe.sampling.declared().values() if option.has_control}  # fmt: skip
    return {
        "negative_prompt": negative, "width": width, "height": height, "num_frames": frames, **options,
        # A Textbox, because gradio turns an empty Number into 0.
        "seed": gr.Textbox("", label="Seed; empty: random", max_length=20, elem_id="seed"),
    }  # fmt: skip


def uses(service: Service) -> dict[str, Component]:
    """Return the controls of what only some generators take, by the names of the pipeline's arguments."""
    takes, controls = service.pipe.takes, {}
    if "last_image" in takes:
        controls["last_image"] = gr.File(label="Picture to end with", height=140, elem_id="last_image")
        controls["last_image"].preprocess = path_of
    if "interpolate" in takes:
        controls["interpolate"] = gr.Checkbox(False, label="Double the frame rate of the clip", elem_id="interpolate")
    if "views" in takes:
        controls["views"] = gr.Checkbox(False, label="Views of the object in the picture, from all sides", elem_id="views")
    return controls


def path_of(file: Any) -> str | None:
    """Return the path of an uploaded file; gradio's own conversion leaves an empty file behind at each call."""
    return file and file.path


def sampling_control(option: Option, own: Any, limits: Limits) -> Component:
    """Return the control of a sampling option. It starts at the model's default `own`."""
    if option.kind == FLAG:
        return gr.Checkbox(own, label=option.label, elem_id=option.name)
    if option.kind == CHOICE:
        return gr.Dropdown(list(option.choices), value=own, label=option.label, elem_id=option.name)
    if option.is_optional:  # a slider has no place for None
        usual = "off" if own is None else f"{own:g}"
        return gr.Textbox("", label=f"{option.label}; empty: {usual}", max_length=20, elem_id=option.name)
    low, high, step = option.slider
    high = limits.max_steps if option.name == "num_inference_steps" else max(high, own)
    return gr.Slider(low, high, own, step=step, label=option.label, elem_id=option.name)


def request_of(
    answers: Mapping[str, Any], defaults: Mapping[str, Any], pipe: VideoPipeline, given_as: str = "image"
) -> Request:  # fmt: skip
    """Return the request that the values of the controls describe.

    given_as: the argument that takes the upload. A value that equals the model's default is left
    out of the request. UserError for a seed that is not a number.
    """
    options = pipe.sampling.declared()
    numbers = {name: number_of(name, answers[name], pipe) for name in options if name in answers and options[name].is_optional}
    values = {**answers, **numbers}
    chosen = {name: values[name] for name in (*SHAPE, *options) if name in answers and values[name] != defaults[name]}
    if given := answers["given"]:
        chosen[given_as] = given
    if last := answers.get("last_image"):
        chosen["last_image"] = last
    if answers.get("interpolate"):
        chosen["interpolate"] = 2
    if answers.get("views"):
        chosen["views"] = True
    if seed := answers["seed"].strip():
        chosen["seed"] = field_value("seed", seed, pipe)
    return Request.of(answers["prompt"], negative_prompt=answers["negative_prompt"], **chosen)


def number_of(name: str, text: Any, pipe: VideoPipeline) -> Any:
    """Return the value of an optional option from the text of its control; None, the model's default, for an empty one."""
    text = "" if text is None else str(text).strip()
    return field_value(name, text, pipe) if text else None


async def shown_progress(service: Service, job: ClipJob) -> AsyncIterator[dict[str, str]]:
    """Yield the HTML of the parts of the page that have changed, by name ("stage", "line"), until the job has ended."""
    frames, said = 0, ""
    async for _ in watch(job):
        update = {}
        text = progress_line(service, job)
        if text != said:
            said = update["line"] = text
        made = job.frames  # a job that ends gets another, empty list
        if job.state == "working" and len(made) > frames:
            frames = len(made)
            update["stage"] = await asyncio.to_thread(views.stage_preview, made[:frames], job.fps)
        if update:
            yield update


def progress_line(service: Service, job: ClipJob) -> str:
    if job.state == "waiting":
        return views.status(f"Waiting, {service.worker.ahead(job)} before you")
    return views.status(f"{len(job.frames)} frames, {job.progress:.0%}", job.progress)


def outcome(job: ClipJob) -> str:
    """Return the HTML of the line under the stage after the job has ended."""
    if job.error is not None:
        return views.wrong(str(job.error))
    if job.record is None:
        return views.status("Cancelled.")
    notes = "".join(f" Note: {note}." for note in job.notes)
    return views.status(f"Seed {job.record['seed']}, {job.record['seconds']:.1f} s.{notes}")
