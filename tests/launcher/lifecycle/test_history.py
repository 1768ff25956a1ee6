from __future__ import annotations

from typing import Any

from launcher.lifecycle.history import FailedAttempt, History, read


def failed(step: int | None, kind: str = "killed", rank: int | None = 1, host: str | None = "node1") -> dict[str, Any]:
    return {"event": "failed", "attempt": 1, "kind": kind, "rank": rank, "host": host, "step": step}


def test_a_submission_starts_a_new_count_but_bad_nodes_are_remembered() -> None:
    events: list[dict[str, Any]] = [
        {"event": "submitted"},
        failed(3),
        {"event": "requeued", "reason": "device", "exclude": ["node7"]},
        {"event": "requeued", "reason": "preempted", "step": 4},
    ]
    assert read(events) == History((FailedAttempt("killed", 1, "node1", 3),), 4, ("node7",))
    assert read([*events, {"event": "submitted"}]) == History(excluded=("node7",))
    struck = {"event": "excluded", "attempt": 2, "exclude": ["node8", "node7"]}
    assert read([*events, struck]) == History((FailedAttempt("killed", 1, "node1", 3),), 4, ("node7", "node8"))


def test_nodes_of_one_cluster_are_none_of_another() -> None:
    events: list[dict[str, Any]] = [{"event": "submitted", "cluster": "a"}, {"event": "excluded", "exclude": ["node7"]}]
    assert read([*events, {"event": "submitted", "cluster": "a"}]).excluded == ("node7",)
    assert read([*events, {"event": "submitted", "cluster": "b"}]).excluded == ()


def test_nodes_that_are_needed_are_forgiven() -> None:
    events: list[dict[str, Any]] = [failed(3), {"event": "excluded", "exclude": ["node7"]}, {"event": "readmitted"}]
    assert read(events) == History((FailedAttempt("killed", 1, "node1", 3),))


def test_the_same_failure_at_the_same_step_repeats() -> None:
    history = read([failed(3)])
    assert history.repeats("killed", 1, 3)
    assert not history.repeats("killed", 1, 4), "it got on"
    assert not history.repeats("killed", 0, 3), "another rank"
    assert not history.repeats("hung", 1, 3)
    assert not read([failed(None)]).repeats("killed", 1, None), "a script does not say its steps"
    assert not History().repeats("killed", 1, 3)


def test_fruitless_counts_setbacks_without_a_step_of_progress_after_them() -> None:
    assert History().failures_without_progress(3) == 0
    history = read([failed(2), failed(5), failed(5, host="node2")])
    assert history.failures_without_progress(5) == 2
    assert history.failures_without_progress(6) == 0
    assert history.failures_without_progress(None) == 3, "who does not say its steps gets no credit for them"
    assert read([failed(5), failed(5)]).failures_without_progress_on("node1", 5) == 2
    assert history.failures_without_progress_on("node2", 5) == 0, "the other setback was elsewhere"
    assert history.failures_without_progress_on(None, 5) == 0


def test_a_run_is_stuck_when_it_did_no_step_between_two_preemptions() -> None:
    history = read([{"event": "requeued", "reason": "preempted", "step": 4}])
    assert history.stuck(4)
    assert not history.stuck(5)
    assert not history.stuck(None)
    assert not History().stuck(4), "the first time it may have had no time at all"
