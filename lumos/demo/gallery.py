"""The gallery of the page: the results of a session, the newest first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gradio as gr
from gradio.components import Component

from lumos.demo import views

SHOWN_RESULTS = 24  # most results of a session that the gallery shows
LISTEN = "element.addEventListener('click', e => { if (e.target.closest('.reuse, .example')) trigger('click') })"
Made = list[dict[str, Any]]


class Gallery:
    """A heading and a component for each result.

    A new result changes one component only, so that the videos of the others go on playing and are
    not loaded again. The style `order` of a component puts the newest first.
    """

    def __init__(self) -> None:
        with gr.Column(elem_id="gallery"):
            self.heading = gr.HTML("<h3>Made in this session</h3>", visible=False)
            with gr.Column(elem_id="cards"):
                self.slots = [
                    gr.HTML("", visible=False, elem_id=f"card-{place}", js_on_load=LISTEN) for place in range(SHOWN_RESULTS)
                ]
        self.made = gr.State([])  # the records of the session's results, in order

    @property
    def parts(self) -> list[Component]:
        return [self.heading, self.made, *self.slots]

    def add(self, made: Made, record: dict[str, Any]) -> dict[Component, Any]:
        """Return the updates that add a result to those that are `made`."""
        number, place = len(made), len(made) % SHOWN_RESULTS
        style = f"<style>#card-{place} {{ order: {-number}; }}</style>"
        forgotten = [{}] * max(0, number + 1 - SHOWN_RESULTS)  # their places hold later results
        return {
            self.slots[place]: gr.update(value=style + views.card(record), visible=True),
            self.heading: gr.update(visible=True),
            self.made: [*forgotten, *made[len(forgotten) :], record],
        }

    def on_reuse(self, controls: Sequence[Component], values: Callable[[Mapping[str, Any]], dict[Component, Any]]) -> None:
        """Fill the controls with `values(record)` when the button of a result is pressed."""

        def reuse(made: Made, place: int) -> dict[Component, Any]:
            later = [number for number in range(len(made)) if number % SHOWN_RESULTS == place]
            return values(made[later[-1]]) if later and made[later[-1]] else {controls[0]: gr.update()}

        for place, slot in enumerate(self.slots):
            slot.click(partial(reuse, place=place), [self.made], [*controls], queue=False, show_progress="hidden",
                       api_visibility="private")  # fmt: skip
