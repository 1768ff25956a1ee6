from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from training.data.prefetch import prefetch
from training.files import append_line
from training.reporting.curve import draw_curve


def test_items_come_in_order_and_are_made_ahead() -> None:
    made: list[int] = []
    third = threading.Event()

    def items() -> Iterator[int]:
        for number in range(5):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    stream = prefetch(items(), depth=2)
    assert next(stream) == 0
    assert third.wait(5)
    assert [0, *stream] == made == [0, 1, 2, 3, 4]


def test_an_error_comes_in_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    stream = prefetch(items())
    assert next(stream) == 1
    with pytest.raises(KeyError, match="two"):
        next(stream)


def test_a_stream_that_is_left_ends_its_thread() -> None:
    stream = prefetch(iter(range(100)))
    next(stream)
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "batches-ahead"]


def test_the_learning_curve_is_a_picture(tmp_path: Path) -> None:
    draw_curve(tmp_path, "nothing yet")
    for step in range(1, 6):
        append_line(tmp_path / "metrics.jsonl", {"step": step, "loss": 1 / step})
    append_line(tmp_path / "metrics.jsonl", {"step": 6, "loss": "NaN", "eval": {"accuracy": "Infinity"}})
    append_line(tmp_path / "metrics.jsonl", {"step": 5, "eval": {"accuracy": 0.8, "f1": 0.9, "samples": 3}})
    path = draw_curve(tmp_path, "a <model> & data")
    root = ElementTree.fromstring(path.read_text())
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [5, 1, 1]
    assert "a <model> & data" in {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
