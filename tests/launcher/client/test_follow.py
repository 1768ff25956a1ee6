from __future__ import annotations

from typing import Any

import pytest

from launcher.client.follow import status_line


@pytest.mark.parametrize(
    ("loss", "shown"), [(0.12345, "loss 0.1235"), (2, "loss 2.0000"), ("NaN", "loss NaN"), (None, "loss None")]
)
def test_a_loss_of_any_kind_is_shown(loss: Any, shown: str) -> None:
    line = status_line("r", "running", [{"step": 3, "time": 1.0, "total_steps": 9, "loss": loss}])
    assert line.split("  ")[1:] == ["step 3/9", shown]
