"""What the Ray driver makes of events that come between two of its looks; no Ray is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorUnschedulableError

from launcher.agent.protocol import Lost
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
@pytest.mark.parametrize("drained", ["", "a", "other"])
def test_a_node_that_leaves_while_workers_start_is_a_lost_node_unless_ray_took_it(
    driver: Driver, cause: Exception, lost: bool, drained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.backends.ray.driver.draining", lambda: {drained: 0.0} if drained else {})
    group = cast(Any, SimpleNamespace(cause=cause, lost_before=0))
    found = driver.groups._not_started(group, {"a", "b"})
    if drained == "a":
        assert found is None, "other workers are requested"
        return
    assert isinstance(found, tuple)
    outcome = found[1]
    assert isinstance(outcome, Outcome)
    assert (bool(outcome.lost), bool(outcome.not_started)) == (lost, not lost)


def test_the_end_of_a_drained_node_is_no_loss(driver: Driver) -> None:
    driver.node_actors.nodes |= {"a": cast(Any, "node-a"), "b": cast(Any, "node-b")}
    driver.requests.drained["a"] = 0.0
    driver.groups.note("a", Lost(), None)
    driver.groups.note("b", Lost(), None)
    assert driver.capacity.lost == ["node-b"]
