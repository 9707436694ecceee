"""The widgets: core ipywidgets, their layout, and the way between their values and a state."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets as w
import xarray as xr

from hoanalysis.explorer import figures, pulse, readout
from hoanalysis.explorer.state import GROUPINGS, MATRICES, NO_RUN, PANELS, SCALES, THIS_RUN, Offer, State

#: The picture behind a live explorer is the next output of its cell.
HIDE = "<style>.jp-OutputArea-child:has(.ho-live) + .jp-OutputArea-child:has(.jp-RenderedImage){display:none}</style>"
STYLE = """<style>
.ho-live .ho-code {white-space: pre-wrap; margin: 4px 0; padding: 6px; background: var(--jp-layout-color2, #f5f5f5)}
.ho-live .ho-message {color: #b2182b; white-space: pre-wrap}
.ho-live .widget-html-content {line-height: 1.4}
.ho-live .widget-toggle-buttons > div {display: flex}
.ho-live .widget-tab-contents {padding: 4px; overflow: hidden}
.ho-live .ho-export a {color: var(--jp-content-link-color, #1a0dab); text-decoration: underline}
.ho-live table {font-size: 12px} .ho-live table th, .ho-live table td {text-align: right; padding: 2px 8px}
.ho-live table td:first-child, .ho-live table th:first-child {text-align: left}
.ho-live .jupyter-widgets-disconnected::before {display: none}
.ho-live.jupyter-widgets-disconnected::before {
  content: "Disconnected: the kernel was restarted or is gone. Run this cell again to go on; this is the last view.";
  color: #b2182b; font-family: inherit; font-size: 13px; background: none; width: auto; height: auto}
</style>"""
SAME_STEP, BEFORE = "the same step", "the checkpoint before"
NOT = ""  # a choice of nothing: a widget shows None as no choice at all
WRAPPED = {"flex_flow": "row wrap", "align_items": "center", "grid_gap": "2px 10px"}
Choice = tuple[str, Any]


class Controls:
    """Every control by name, the pictures, and the box that holds them all."""

    def __init__(self, state: State, offer: Offer, fills: bool) -> None:
        wide = {"description_width": "initial"}

        def chooser(label: str, options: Sequence[Any], width: str = "auto") -> w.Dropdown:
            return w.Dropdown(options=options, description=label, style=wide, layout=w.Layout(width=width))

        self.play = w.Play(min=0, max=max(len(offer.steps) - 1, 0), interval=700, show_repeat=False)
        self.step = w.SelectionSlider(options=_steps(offer), description="checkpoint", style=wide,
                                      layout=w.Layout(width="60%", min_width="320px"))  # fmt: skip
        narrow = {"button_width": "44px", **wide}
        inline = w.Layout(display="flex", width="auto", flex_flow="row nowrap", align_items="center")
        self.order = w.ToggleButtons(options=_orders(offer), description="order", style=narrow, layout=inline)
        self.matrix = chooser("show", _matrices(offer, 2))
        self.slices = [chooser(f"index {d}", [(NONE, "")]) for d in range(3, max([2, *offer.orders]) + 1)]
        self.block = chooser("block", offer.blocks)
        self.grouping = chooser("groups", _titled(GROUPINGS))
        self.n_blocks = w.BoundedIntText(min=1, max=10**6, description="n", style=wide, layout=w.Layout(width="90px"))
        self.pattern = w.Text(placeholder="conv*, head=fc3.*", description="pattern", continuous_update=False,
                              style=wide, layout=w.Layout(width="260px"))  # fmt: skip
        self.scale = chooser("colours", _titled(SCALES))
        self.shared = w.Checkbox(description="the same at every checkpoint", indent=False,
                                 layout=w.Layout(width="auto"))  # fmt: skip
        self.mask = w.Checkbox(description="hide what is within 2 errors of 0", indent=False,
                               layout=w.Layout(width="auto"))  # fmt: skip
        rules: list[Choice] = [("none", NOT), ("ridge", "ridge"), ("r", "r"), ("cubic", "cubic")]
        self.regularization = chooser("regularization", rules)
        self.epsilon = w.BoundedFloatText(min=1e-12, max=1e12, step=0.1, description="epsilon", style=wide,
                                          layout=w.Layout(width="150px"))  # fmt: skip
        self.compare_run = chooser("minus", [("nothing", NO_RUN)])
        self.compare_step = chooser("at step", [(SAME_STEP, NOT)])
        self.entries = w.SelectMultiple(options=[], rows=8, layout=w.Layout(width="98%"))
        self.panel = w.Tab(children=[self._image() for _ in PANELS], titles=list(PANELS.values()))
        self.images = {"matrix": self._image(), **dict(zip(PANELS, self.panel.children, strict=True))}
        self.cells = w.HTML()
        self.cells.add_class("ho-cells")
        self.sentence = w.HTML()
        self.sentence.add_class("ho-sentence")
        self.values = w.HTML()
        self.message = w.HTML()
        self.export = w.Button(description="Export", icon="download", tooltip="The figure and the line of code for it")
        self.exported = w.HTML()
        self.exported.add_class("ho-export")
        self.progress = w.IntProgress(min=0, max=1, layout=w.Layout(width="240px"))
        self.progress_text = w.HTML()
        self.stop = w.Button(description="Stop", icon="stop", layout=w.Layout(width="100px"))
        self._chosen = [
            self.step, self.order, self.matrix, *self.slices, self.block, self.grouping, self.n_blocks, self.pattern,
            self.scale, self.shared, self.mask, self.regularization, self.epsilon, self.compare_run, self.compare_step,
            self.entries,
        ]  # fmt: skip
        self.pulse = pulse.pulse()
        self._quiet = False
        self._state = state
        self._link = w.jslink((self.play, "value"), (self.step, "index"))
        self.box = self._arranged(fills)
        self.box.add_class("ho-live")

    @staticmethod
    def _image() -> w.Image:
        blank = figures.BLANK  # a browser marks an image of nothing as broken
        return w.Image(value=blank, format="png", layout=w.Layout(max_width="100%", height="auto", margin="0"))

    def _arranged(self, fills: bool) -> w.VBox:
        def row(*children: w.Widget) -> w.HBox:
            return w.HBox(list(children), layout=WRAPPED)

        self.filling = row(self.progress, self.progress_text, self.stop)
        self.filling.layout.display = "" if fills else "none"
        picture = w.Box([self.images["matrix"], self.cells])
        picture.add_class("ho-picture")
        left = w.VBox([picture], layout=w.Layout(flex="1 1 520px", max_width="680px"))
        right = w.VBox([self.panel], layout=w.Layout(flex="1 1 420px", max_width="620px"))
        strongest = w.VBox([w.HTML("Entries to follow (several with Ctrl or Shift)"), self.entries],
                           layout=w.Layout(flex="1 1 380px", max_width="560px"))  # fmt: skip
        table = w.VBox([self.values], layout=w.Layout(flex="1 1 380px"))
        return w.VBox(
            [
                w.HTML(STYLE + HIDE + pulse.STYLE + readout.STYLE, layout=w.Layout(display="none")),
                self.pulse.line,
                self.filling,
                row(self.play, self.step),
                row(self.order, self.matrix, *self.slices, self.block),
                row(self.grouping, self.n_blocks, self.pattern, self.scale, self.shared),
                row(self.regularization, self.epsilon, self.mask, self.compare_run, self.compare_step),
                self.sentence,
                self.message,
                w.HBox([left, right], layout=w.Layout(flex_flow="row wrap", align_items="flex-start")),
                w.HBox([strongest, table], layout=w.Layout(flex_flow="row wrap", align_items="flex-start")),
                row(self.export),
                self.exported,
            ]
        )

    # ---- values ----------------------------------------------------------------------------------------------------

    def on_change(self, callback: Callable[[State], None]) -> None:
        """Call with the chosen state whenever a control is moved, by hand or by setting its value."""

        def moved(_: Any) -> None:
            if not self._quiet:
                callback(self.chosen())

        for control in self._chosen:
            control.observe(moved, "value")
        self.panel.observe(moved, "selected_index")

    def chosen(self) -> State:
        """The state that the controls show."""
        order = self.order.value or self._state.order
        slices = tuple(s.value for s in self.slices[: max(order - 2, 0)])
        matrix = self.matrix.value or self._state.matrix
        return self._state.but(
            step=_none(self.step.value), order=order, matrix=matrix, slices=slices if all(slices) else (),
            block=self.block.value or "all", grouping=self.grouping.value, n_blocks=self.n_blocks.value,
            pattern=self.pattern.value, scale=self.scale.value, shared=self.shared.value, mask=self.mask.value,
            regularization=self.regularization.value or None, epsilon=self.epsilon.value,
            compare_run=self.compare_run.value,
            compare_step=_none(self.compare_step.value) if self.compare_run.value else None,
            entries=tuple(self.entries.value),
            panel=list(PANELS)[self.panel.selected_index or 0],
        )  # fmt: skip

    def update(self, state: State, offer: Offer, entries: Sequence[Choice]) -> None:
        """Offer what can be chosen, and show the state, without calling back."""
        with self._quietly():
            self._state = state
            _offer(self.step, _steps(offer), _or_not(state.step))
            self.play.max = max(len(offer.steps) - 1, 0)
            if not self.play.playing and state.step in offer.steps:
                self.play.value = offer.steps.index(state.step)  # play goes on from here; from the last it starts over
            _offer(self.order, _orders(offer), state.order)
            _offer(self.matrix, _matrices(offer, state.order), state.matrix)
            for k, chooser in enumerate(self.slices):
                value = state.slices[k] if k < len(state.slices) else ""
                _offer(chooser, [(NONE, ""), *((g, g) for g in offer.labels)], value)
                chooser.layout.display = "" if state.order > k + 2 else "none"
            _offer(self.block, [(b, b) for b in offer.blocks], state.block)
            self.block.disabled = state.order == 1
            self.grouping.value, self.n_blocks.value, self.pattern.value = state.grouping, state.n_blocks, state.pattern
            self.n_blocks.layout.display = "" if state.grouping in ("blocks", "suggested") else "none"
            self.pattern.layout.display = "" if state.grouping == "pattern" else "none"
            self.scale.value, self.shared.value, self.mask.value = state.scale, state.shared, state.mask
            self.regularization.value, self.epsilon.value = state.regularization or NOT, state.epsilon
            self.epsilon.layout.display = "none" if state.regularization is None else ""
            runs = [("nothing", NO_RUN), *((name, name) for name in offer.runs)]
            _offer(self.compare_run, runs, state.compare_run)
            self.compare_step.layout.display = "" if state.compare_run else "none"
            steps = offer.runs.get(state.compare_run or THIS_RUN, ())
            first = BEFORE if state.compare_run == THIS_RUN else SAME_STEP
            _offer(self.compare_step, [(first, NOT), *((str(s), s) for s in steps)], _or_not(state.compare_step))
            held = {value for _, value in entries}
            _offer(self.entries, entries, tuple(e for e in state.entries if e in held))
            self.panel.selected_index = list(PANELS).index(state.panel)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    # ---- words -----------------------------------------------------------------------------------------------------

    def say(self, message: str, details: str = "") -> None:
        """An error, where the user looks."""
        more = f"<details><summary>details</summary><pre>{html.escape(details)}</pre></details>" if details else ""
        self.message.value = f"<div class='ho-message' role='alert'>{html.escape(message)}</div>{more}"

    def progress_of(self, ds: xr.Dataset, running: bool, stopping: bool, error: str) -> None:
        """How far the store is filled."""
        units = int(ds.attrs.get("units", 0))
        done = round(float(ds.attrs.get("coverage", 0.0)) * units)
        self.progress.max, self.progress.value = max(units, 1), done
        self.progress.bar_style = "danger" if error else "success" if done == units else "info"
        what = "stopping after this batch" if stopping else "computing" if running else "stopped"
        what = f"ended early: {error}" if error else "complete" if done == units and not running else what
        self.progress_text.value = html.escape(f"{done} of {units} checkpoints, {what}")
        self.stop.description, self.stop.icon = ("Stop", "stop") if running else ("Go on", "play")
        self.stop.disabled = stopping or (done == units and not running)


NONE = "the strongest"


def _offer(control: Any, options: Sequence[Choice], value: Any) -> None:
    """New options only where they differ: each change is a message, and a flicker."""
    options = list(options)
    if list(control.options) != options:
        control.options = options
    if control.value != value:
        control.value = value


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value == NOT else value


def _or_not(value: Any) -> Any:
    return NOT if value is None else value


def _titled(names: dict[str, str]) -> list[Choice]:
    return [(title, name) for name, title in names.items()]


def _steps(offer: Offer) -> list[Choice]:
    """The checkpoints; those that are not computed say so."""
    told = [(f"{s}" if s in offer.computed else f"{s} (missing)", s) for s in offer.steps]
    return told or [("no checkpoint", NOT)]


def _orders(offer: Offer) -> list[Choice]:
    return [(str(d), d) for d in offer.orders] or [("none", 0)]


def _matrices(offer: Offer, order: int) -> list[Choice]:
    plain = {1: "D1", 2: "H-bar"}.get(order, f"D{order}")
    return [(plain if m == "H" else MATRICES[m], m) for m in offer.matrices(order)]
