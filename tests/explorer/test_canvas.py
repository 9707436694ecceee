"""The canvas of the live pictures against matplotlib's own, and what a picture holds."""

import io

import numpy as np
import pytest
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.font_manager import FontProperties
from PIL import Image

from hoanalysis.analysis.example import example
from hoanalysis.explorer import canvas, figures
from hoanalysis.explorer.session import Session
from hoanalysis.explorer.state import State


def drawn(renderer, text, size, angle, weight="normal"):
    gc = renderer.new_gc()
    gc.set_foreground("#D55E00")
    renderer.draw_text(gc, 60, 70, text, FontProperties(size=size, weight=weight), angle)
    return np.asarray(renderer.buffer_rgba()).astype(int)


@pytest.mark.parametrize("angle", [0, 90, 30])
def test_a_text_is_that_of_matplotlib_also_when_it_is_written_again(angle):
    pictures = []
    for text, size, weight in (
        ("Ag ± 0.5, jy", 10, "normal"),
        ("Ag ± 0.5, jy", 7, "normal"),
        ("Ag ± 0.5, jy", 10, "bold"),
    ):
        own = RendererAgg(160, 120, 100)
        expected = drawn(own, text, size, angle, weight)
        for _ in range(2):
            kept = canvas._Renderer(160, 120, 100)
            found = drawn(kept, text, size, angle, weight)
            shown = [p[..., :3] * p[..., 3:] + 255 * (255 - p[..., 3:]) for p in (found, expected)]
            assert np.abs(shown[0] - shown[1]).max() <= 6 * 255
        font = FontProperties(size=size, weight=weight)
        lengths = [r.get_text_width_height_descent(text, font, False) for r in (kept, own)]
        assert lengths[0] == lengths[1]
        pictures.append(found)
    assert not any((pictures[0] == other).all() for other in pictures[1:])


def test_a_font_that_was_changed_is_not_taken_for_the_one_before():
    renderer, font = canvas._Renderer(10, 10, 100), FontProperties(size=8)
    before = renderer.get_text_width_height_descent("group", font, False)
    font.set_size(16)
    assert renderer.get_text_width_height_descent("group", font, False)[0] > 1.5 * before[0]


@pytest.mark.parametrize("panel", ["matrix", "rates"])
def test_names_are_where_labels_of_ticks_would_be(panel, monkeypatch):
    session, state = Session(example(layers=21, size=2, steps=2)), State(order=3)
    live = figures.panel(session, state, panel)
    place = figures.Place
    monkeypatch.setattr(figures, "Place", lambda *at, live: place(*at))
    dark = [
        np.asarray(Image.open(io.BytesIO(p)).convert("L")) < 140 for p in (live, figures.panel(session, state, panel))
    ]
    cells = [float(x) for x in Image.open(io.BytesIO(live)).info["Cells"].split()]
    left, bottom = (int(cells[0]), int(cells[3])) if cells else (100, 450)
    for cut in (np.s_[:, : left - 2], np.s_[bottom + 2 :, left:]):
        for axis in (0, 1):
            a, b = (np.flatnonzero(d[cut].any(axis)) for d in dark)
            assert len(a) > 15
            assert np.abs(a[:, None] - b).min(0).max() <= 1
            assert np.abs(a[:, None] - b).min(1).max() <= 1


def test_a_picture_holds_what_the_canvas_drew_with_texts_ahead_of_its_pixels():
    figure = figures._empty(3, 2)
    figure.text(0.2, 0.5, "conv1.weight")
    image = Image.open(io.BytesIO(figures.png(figure, Description="a \N{MULTIPLICATION SIGN} b, \u4e2d")))
    assert dict(image.info) == {"Description": "a \N{MULTIPLICATION SIGN} b, \u4e2d", "Cells": ""}
    np.testing.assert_array_equal(np.asarray(image), np.asarray(figure.canvas.buffer_rgba())[..., :3])
