"""The function of the how-to on real ranks: it trains, stops, and goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.loop.jobs import Config, evaluations, fit_in_world
from tests.training.ranks import final, losses, spawn

pytestmark = pytest.mark.usefixtures("rank_server")


def assert_same(left: Path, right: Path) -> None:
    one, other = final(left), final(right)
    assert one.keys() == other.keys()
    for name in one:
        if name.endswith(".safetensors"):
            assert one[name].keys() == other[name].keys()
            for key in one[name]:
                assert torch.equal(one[name][key], other[name][key]), f"{name}: {key}"
        else:
            assert one[name] == other[name], name
    assert losses(left) == losses(right)
    assert evaluations(left) == evaluations(right)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_stopped_and_resumed_ends_as_if_never_stopped(tmp_path: Path, size: int) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    first = spawn(fit_in_world, size, whole, Config())
    assert first == [{"loss": losses(whole)[14], "stopped": False, "failed": []}] * size
    stopped = spawn(fit_in_world, size, parts, Config(stop_at=4))
    assert all(each["stopped"] for each in stopped)
    assert max(losses(parts)) in (4, 5)
    assert spawn(fit_in_world, size, parts, Config()) == first
    assert_same(whole, parts)
