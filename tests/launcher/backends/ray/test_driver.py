"""What the Ray driver makes of events that come between two of its looks; no Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnschedulableError

from launcher.backends.ray.driver import Driver
from launcher.lifecycle.policy import Outcome
from tests.launcher.plans import planned_run


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    return Driver(planned_run(tmp_path / "n", "ray"))


def test_ranks_that_saw_a_request_to_cancel_first_are_not_started_again(driver: Driver) -> None:
    assert driver.fate() == "preempting"
    driver.run_dir.request_stop("cancelled")
    assert driver.fate() == ""


@pytest.mark.parametrize(
    ("cause", "lost"),
    [(ActorUnschedulableError("the node doesn't exist any more"), True), (RuntimeError("no room"), False)],
)
def test_a_node_that_leaves_while_workers_start_is_a_lost_node(driver: Driver, cause: Exception, lost: bool) -> None:
    group = cast(Any, SimpleNamespace(cause=cause, lost_before=0))
    found = driver.groups._not_started(group)
    assert isinstance(found, tuple)
    outcome = found[1]
    assert isinstance(outcome, Outcome)
    assert (bool(outcome.lost), bool(outcome.not_started)) == (lost, not lost)
