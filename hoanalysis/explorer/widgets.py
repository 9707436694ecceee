"""The explorer in a notebook: controls around pictures, and nothing but wiring.

Two outputs are displayed: the widgets, and behind them the same view as a picture. A live explorer hides the picture
that follows it; where there are no widgets (a saved notebook, nbviewer, a page, an untrusted notebook, a restarted
kernel) the picture is what one sees. Where nobody can move a slider, as under papermill, no widget is made at all.
"""

from __future__ import annotations

import asyncio
import base64
import html
import traceback
import uuid
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import pandas as pd
from matplotlib.figure import Figure

from hoanalysis.errors import HoError
from hoanalysis.explorer import figures, readout, words
from hoanalysis.explorer.controls import Controls
from hoanalysis.explorer.frontend import live
from hoanalysis.explorer.session import Session, View, told
from hoanalysis.explorer.state import State

if TYPE_CHECKING:
    from hoanalysis.explorer.background import Filling

IDLE, POLL = 1.5, 1.0  # seconds: until the static picture follows the widgets, and between two looks at a store
SETTLED, AT_ONCE = 0.3, 1024  # seconds until the cells of a picture with more cells than this have their values


class Explorer:
    """A view of a run and its controls; made by `hoanalysis.explore`.

    >>> from hoanalysis.analysis.example import example
    >>> from hoanalysis.explorer import explore
    >>> explorer = explore(example(layers=2, steps=3), state={"grouping": "layer"})
    >>> explorer.state = {**explorer.state, "step": 10, "matrix": "scale_free"}
    >>> explorer.sentence.split(".")[0]
    'Step 10: scale-free pseudo-Hessian of 2 groups, by layer'
    """

    def __init__(self, session: Session, state: State, filling: Filling | None = None, source: str = "") -> None:
        self.session, self.filling, self._source = session, filling, source
        self._choose(state)
        self._controls: Controls | None = None
        self._timers: dict[str, Any] = {}
        self._drawn: dict[str, Any] = {}
        self._display_id = ""
        self._exported_as: State | None = None
        if filling is not None:
            filling.start()

    # ---- without widgets -------------------------------------------------------------------------------------------

    def _choose(self, asked: State) -> None:
        """Ask for a view. What of it cannot be shown stays asked for, so that every view of it says so.

        Without a step the last computed checkpoint is shown, and stays shown once there is one.
        """
        state, offer, _ = self.session.fitted(asked)
        pinned = asked.step is not None or (self.filling is not None and not offer.computed)
        self._asked = asked if pinned else asked.but(step=state.step)

    @property
    def state(self) -> dict[str, Any]:
        """What is chosen and can be shown, as JSON values; assign such a mapping to choose."""
        state = self.session.fitted(self._asked)[0]
        return (state if self._asked.step is not None else state.but(step=None)).chosen()

    @state.setter
    def state(self, choices: Mapping[str, Any] | State) -> None:
        self._choose(State.of(choices))
        if self._controls is not None:
            self._show()

    @property
    def view(self) -> View:
        """The numbers that are drawn: ``view.shown.values`` with ``errors``, ``rows`` and ``columns``."""
        return self.session.view(self._asked)

    @property
    def sentence(self) -> str:
        """What the picture shows."""
        return words.sentence(self.view)

    def table(self, top: int = 12) -> pd.DataFrame:
        """The selected entries with value, error and significance; without a selection the ``top`` strongest."""
        return words.table(self.view, top)

    def figure(self) -> Figure:
        """All panels as a matplotlib Figure."""
        return figures.whole(self.session, self._asked)

    @property
    def code(self) -> str:
        """The line that makes the same figure, with the names that the Datasets have in this notebook."""
        import sys

        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        names = dict(getattr(shell, "user_ns", {}))
        if self.filling is not None:
            source = f"ho.open_store({str(self.filling.store)!r}, {self.filling.name!r})"
        else:
            source = self._source or words.name_of(self.session.given, names)
        run = self._asked.compare_run
        others = (
            {run: words.name_of(self.session.given_others[run], names, run)} if run in self.session.given_others else {}
        )
        return words.code(self._asked, source, others)

    def export(self) -> tuple[bytes, str]:
        """The figure as PNG, and the line of code that makes it."""
        return self._png(), self.code

    def _png(self) -> bytes:
        figure = self.figure()
        return figures.png(figure, Description=self.sentence, Code=self.code)

    def wait(self) -> Explorer:
        """Until a store that is filled in the background is as full as it can be; raises what went wrong."""
        if self.filling is not None:
            self.filling.finish()
            self.session.update(self.filling.dataset())
            self._choose(self._asked)
        return self

    # ---- in a notebook ---------------------------------------------------------------------------------------------

    @property
    def controls(self) -> Controls:
        """The widgets by name: ``explorer.controls.step.value = 120`` moves the slider. Made on first use."""
        if self._controls is None:
            state, offer, _ = self.session.fitted(self._asked)
            self._controls = Controls(state, offer, self.filling is not None)
            self._connect(self._controls)
            if self.filling is not None:
                self._controls.progress_of(self.session.ds, self.filling.running, False, "")
            self._show()
        return self._controls

    def _ipython_display_(self) -> None:
        from IPython.display import display

        self._display_id = uuid.uuid4().hex
        if not live():
            self.wait()  # nobody is there to look again
        else:
            box = self.controls.box
            model = {"application/vnd.jupyter.widget-view+json": {"version_major": 2, "version_minor": 0,
                                                                  "model_id": box.model_id}}  # fmt: skip
            display({"text/plain": self.sentence, **model}, raw=True)
            self.controls.pulse.start()
        bundle, metadata = self._static()
        display(bundle, metadata=metadata, raw=True, display_id=self._display_id)
        if live() and self.filling is not None:
            self._poll_on()

    def _static(self) -> tuple[dict[str, str], dict[str, Any]]:
        picture = base64.b64encode(self._png()).decode()
        return {"image/png": picture, "text/plain": self.sentence}, {"image/png": {"alt": self.sentence}}

    def keep(self) -> None:
        """Let the static picture behind the widgets be that of the present view, for when the notebook is saved."""
        if self._display_id:
            from IPython.display import update_display

            bundle, metadata = self._static()
            update_display(bundle, metadata=metadata, raw=True, display_id=self._display_id)

    # ---- wiring ----------------------------------------------------------------------------------------------------

    def _connect(self, controls: Controls) -> None:
        controls.on_change(self._guarded(self._changed))
        controls.export.on_click(self._guarded(lambda _: self._exported()))
        controls.stop.on_click(self._guarded(lambda _: self._stop_or_go()))

    def _guarded(self, callback: Callable[..., None], asked: bool = True) -> Callable[..., None]:
        """A callback whose errors reach the user: the kernel would only log them.

        What the user ``asked`` for takes the last message away; what a clock does leaves it to be read.
        """

        @wraps(callback)
        def guarded(*arguments: Any) -> None:
            assert self._controls is not None
            try:
                if asked:
                    self._controls.message.value = ""
                callback(*arguments)
            except HoError as error:
                self._controls.say(told(error))
            except Exception as error:
                self._controls.say(f"This view failed: {type(error).__name__}: {error}", traceback.format_exc())

        return guarded

    def _changed(self, chosen: State) -> None:
        self.session.grouping(chosen)  # a pattern that matches nothing is said, and stays to be corrected
        self._choose(chosen)
        self._show()

    def _show(self) -> None:
        """Draw what has changed, and let the controls offer what can be chosen now."""
        controls = self._controls
        assert controls is not None
        state, offer, _ = self.session.fitted(self._asked)
        view = self.view
        controls.update(state, offer, words.choices(view))
        controls.sentence.value = html.escape(words.sentence(view))
        for name, image in controls.images.items():
            if name in ("matrix", state.panel) and self._draw(name, state, image) and name == "matrix":
                self._read_out(view)
        if self._exported_as != self._asked:
            controls.exported.value = ""  # a line of another view
        controls.values.value = self.table().to_html(index=False, border=0, float_format=lambda v: f"{v:.4g}")
        self._later(IDLE, self.keep)

    def _draw(self, name: str, state: State, image: Any) -> bool:
        """A panel, where what it depends on has changed; whether it had."""
        key = (id(self.session.ds), state.but(panel="rates"))
        if self._drawn.get(name) == key:
            return False
        image.value = figures.panel(self.session, state, name, Description=words.sentence(self.session.view(state)))
        self._drawn[name] = key
        return True

    def _read_out(self, view: View) -> None:
        """Values for the cells of a new picture; those of the last one go at once, many new ones when it is settled."""
        controls = self._controls
        assert controls is not None
        if view.whole is not None and view.whole.values.size > AT_ONCE and self._later(SETTLED, self.read_out):
            controls.cells.value = ""
        else:
            self.read_out()

    def read_out(self) -> None:
        """Let the cells of the picture tell their values when pointed at."""
        controls = self.controls
        controls.cells.value = readout.cells(self.view, controls.images["matrix"].value)

    def _exported(self) -> None:
        picture, code = self.export()
        assert self._controls is not None
        data, self._exported_as = base64.b64encode(picture).decode(), self._asked
        self._controls.exported.value = (
            f"<pre class='ho-code'>{html.escape(code)}</pre>"
            f"<a download='explorer.png' href='data:image/png;base64,{data}'>Save the picture</a>"
        )
        self.keep()

    def _later(self, seconds: float, callback: Callable[[], None]) -> bool:
        """Once nothing has happened for a while; not at all, and False, where no event loop runs."""
        if not self._display_id:
            return False
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        name = callback.__name__
        if name in self._timers:
            self._timers[name].cancel()
        self._timers[name] = loop.call_later(seconds, self._guarded(callback, asked=False))
        return True

    # ---- a store that is being filled --------------------------------------------------------------------------------

    def _stop_or_go(self) -> None:
        assert self.filling is not None
        if self.filling.running:
            self.filling.stop()
        else:
            self.filling.start()
            self._poll_on()
        self.poll()

    def poll(self) -> None:
        """Take in what the store holds by now, and say how far it is."""
        filling, controls = self.filling, self.controls
        assert filling is not None
        running = filling.running  # first: what ends now is read once more
        ds = filling.grown()
        if ds is not None:
            self.session.update(ds)
            self._choose(self._asked)
            self._show()
        controls.progress_of(self.session.ds, running, filling.stopping, _why(filling.error))

    def _poll_on(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return

        async def watch() -> None:
            while True:
                running = self.filling is not None and self.filling.running
                self._guarded(self.poll, asked=False)()
                if not running:
                    return
                await asyncio.sleep(POLL)

        self._watch = loop.create_task(watch())


def _why(error: BaseException | None) -> str:
    if error is None:
        return ""
    return told(error) if isinstance(error, HoError) else f"{type(error).__name__}: {error}"
