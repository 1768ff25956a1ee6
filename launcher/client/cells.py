"""Functions of notebook cells: pickled by value, with the source of the cells."""

from __future__ import annotations

import io
import linecache
import os
import types
from typing import Any

import cloudpickle


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """Notes the files that the code of the pickled functions names."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.files: set[str] = set()

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.FunctionType):
            self.files.add(obj.__code__.co_filename)
        return super().reducer_override(obj)


def pickle_with_sources(function: Any) -> tuple[bytes, dict[str, str]]:
    """Return the pickled function, and the source by file name of the code in it that lies in no file.

    IPython keeps the source of each cell in `linecache` under a name of its own. Raises the errors of cloudpickle.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(function)
    missing = sorted(file for file in pickler.files if not os.path.exists(file))
    sources = {file: "".join(linecache.getlines(file)) for file in missing}
    return buffer.getvalue(), {file: text for file, text in sources.items() if text}
