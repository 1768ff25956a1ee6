"""Rewrite the golden files."""

import tempfile
from pathlib import Path

from tests.golden import CASES, FOLDER, render

for name, case in CASES.items():
    with tempfile.TemporaryDirectory() as folder:
        (FOLDER / f"{name}.txt").write_text(render(case, Path(folder)))
