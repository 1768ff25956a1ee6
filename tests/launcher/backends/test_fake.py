"""Tests on the fake engine: requests, the life cycle of a run, and the output of each command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import launcher
from launcher import backends
from launcher.backends import Backend, Capabilities
from launcher.backends.fake import FakeBackend
from launcher.client.run import find
from launcher.config.cluster import BACKENDS, Cluster, Node, Ray
from launcher.config.profiles import choose, load
from launcher.errors import BadRequest, RunFailed, RunStopped
from launcher.lifecycle.policy import Failure
from launcher.request.placement.place import Placement
from launcher.request.spec import Plan, RunSpec, State, Target
from tests.launcher.engines import Launch

FAILURE = Failure("user error", "LookupError: no sample", 1, "node2", "correct the target", "Traceback\n  in main\n")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBackend]:
    """A registered fake backend, and a user's folder with a script and a module."""
    (tmp_path / "script.py").write_text("print('never runs')\n")
    (tmp_path / "fake_target.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    steps: int = 1  # how many\n"
        "def main(ctx, config: Config): ...\ndef broken(needs, three, things): ...\n"
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    backend = FakeBackend()
    backends.register(backend)
    yield backend
    backends.unregister(backend)


def send(launch: Launch, name: str, *argv: str) -> None:
    arguments = ("--backend", "fake", "--cpus", "2", "--name", name, "--detach", *(argv or ("script.py",)))
    assert launch(*arguments)[0] == 0


def status(launch: Launch, name: str) -> dict[str, object]:
    found: dict[str, object] = json.loads(launch("status", name, "--json")[1])
    return found


# ---- the contract of a run (test_contract.py), without an engine -------------------------------------------------------


def test_what_a_function_returns_comes_back(fake: FakeBackend) -> None:
    fake.on_submit = lambda job_id: fake.finish(job_id, {"loss": 0.25, "ranks": [0, 1]})
    run = launcher.launch("fake_target:main", "--steps", "3", backend="fake", gpus=16, name="f")
    assert run.result() == {"loss": 0.25, "ranks": [0, 1]}
    assert (run.state(), run.status()["metrics"]) == (State.SUCCEEDED, {"loss": 0.25, "ranks": [0, 1]})
    [plan] = fake.plans
    assert (plan.placement.nodes, plan.placement.world_size) == (2, 16)
    assert (plan.target.name, plan.target.args) == ("fake_target:main", ("--steps", "3"))
    kinds = [event["event"] for event in run.dir.events()]
    assert kinds == ["submitted", "started", "finished"]
    assert [(each.name, each.state()) for each in launcher.runs()] == [("f", State.SUCCEEDED)]


def test_a_function_that_travels_by_value(fake: FakeBackend) -> None:
    def local() -> None: ...

    fake.on_submit = lambda job_id: fake.finish(job_id, [1, 2])
    run = launcher.launch(local, backend="fake", cpus=2)
    assert run.result() == [1, 2]
    assert run.status()["metrics"] == {}, "only a dict is metrics"
    assert fake.plans[0].target.kind == "value"


def test_the_first_exception_is_shown_first(fake: FakeBackend, launch: Launch) -> None:
    fake.on_submit = lambda job_id: fake.finish(job_id, state=State.FAILED, failure=FAILURE)
    code, out, _ = launch("--backend", "fake", "--cpus", "2", "--name", "x", "script.py")
    failed = out[out.index("launch: failed") :]
    assert code == 1
    assert failed.startswith("launch: failed: LookupError: no sample [rank 1 on node2]")
    assert "in main\n" in failed
    found = find("x", Path("runs")).status()
    assert (found["state"], found["attempt"]) == ("failed", 1)
    assert (found["failure"]["kind"], found["failure"]["rank"]) == ("user error", 1)
    with pytest.raises(RunFailed, match="LookupError: no sample"):
        find("x", Path("runs")).result()


def test_a_run_from_another_shell(fake: FakeBackend, launch: Launch) -> None:
    """Queued, running, cancelled, resumed; each command reopens the run from its directory."""
    send(launch, "k")
    assert status(launch, "k")["state"] == "queued"
    run_dir = fake.begin("fake-1", "node3")
    run_dir.log(1, 0).write_text("step 1\n")
    run_dir.log(1, 1).write_text("step 2\n")
    assert status(launch, "k")["state"] == "running"
    assert launch("logs", "k") == (0, "[0] step 1\n[1] step 2\n", "")
    assert launch("logs", "k", "--rank", "1") == (0, "step 2\n", "")
    assert json.loads(launch("logs", "k", "--json", "--rank", "0")[1]) == ["step 1"]
    code, _, err = launch("resume", "k")
    assert (code, "is running" in err) == (2, True)
    assert launch("cancel", "k") == (0, "k: stopped\n", "")
    assert (status(launch, "k")["state"], fake.cancelled) == ("stopped", [])
    fake.on_submit = lambda job_id: fake.finish(job_id, {"first": 2})
    code, out, _ = launch("resume", "k", "--json", "--cpus", "4")
    found = json.loads(out)
    assert (code, found["state"], found["attempt"], found["job_id"]) == (0, "succeeded", 2, "fake-2")
    assert [plan.placement.world_size for plan in fake.plans] == [2, 4]
    assert {plan.target.name for plan in fake.plans} == {str(Path("runs/k/code/script.py").resolve())}
    code, _, err = launch("resume", "k")
    assert (code, "run 'k' has succeeded; there is nothing to resume" in err) == (2, True)


@pytest.mark.slow
def test_a_job_that_does_not_stop_is_killed(fake: FakeBackend, launch: Launch) -> None:
    Path("x.toml").write_text("backend = 'fake'\ngrace = 0.1")
    assert launch("--cluster", "./x.toml", "--cpus", "1", "--name", "s", "--detach", "script.py")[0] == 0
    fake.begin("fake-1")
    fake.heeds_stop = False
    assert launch("cancel", "s", "--json") == (0, '{"name": "s", "state": "stopped"}\n', "")
    assert fake.cancelled == ["fake-1"]


@pytest.mark.parametrize("argv", [(), ("--now",)])
def test_a_queued_job_is_cancelled_at_once(fake: FakeBackend, launch: Launch, argv: tuple[str, ...]) -> None:
    send(launch, "q")
    assert launch("cancel", "q", *argv) == (0, "q: stopped\n", "")
    assert fake.cancelled == ["fake-1"]
    with pytest.raises(RunStopped):
        find("q", Path("runs")).check()
    assert launch("cancel", "q") == (0, "q: stopped\n", "")
    assert fake.cancelled == ["fake-1"], "an ended run is not cancelled again"


@pytest.mark.parametrize(
    ("state", "code", "words"),
    [
        (State.SUCCEEDED, 0, "launch: succeeded in "),
        (State.FAILED, 1, "launch: failed: LookupError"),
        (State.STOPPED, 3, "launch: stopped before the end; `launch resume e` starts the program again"),
    ],
)
def test_exit_statuses(fake: FakeBackend, launch: Launch, state: State, code: int, words: str) -> None:
    failure = FAILURE if state is State.FAILED else None
    fake.on_submit = lambda job_id: fake.finish(job_id, state=state, failure=failure)
    found, out, err = launch("--backend", "fake", "--cpus", "2", "--name", "e", "script.py")
    assert (found, words in out, err) == (code, True, "")
    assert launch("status", "e")[0] == 0
    fake.jobs.clear()
    again, out, _ = launch("--backend", "fake", "--cpus", "2", "--name", "j", "--json", "script.py")
    assert (again, json.loads(out)["state"]) == (code, state.value)


def test_a_job_that_ends_without_a_word_is_lost(fake: FakeBackend, launch: Launch) -> None:
    send(launch, "l")
    fake.begin("fake-1")
    fake.jobs["fake-1"].state = State.LOST
    assert status(launch, "l")["state"] == "lost"
    with pytest.raises(RunFailed, match=r"ended without a result \(job fake-1, fake\)"):
        find("l", Path("runs")).check()


def test_an_engine_that_cannot_be_asked_is_no_end(fake: FakeBackend, launch: Launch) -> None:
    send(launch, "u")
    fake.jobs["fake-1"].state = State.UNKNOWN
    assert status(launch, "u")["state"] == "unknown"


def test_one_answer_serves_all_who_ask(fake: FakeBackend, launch: Launch) -> None:
    fake.capabilities = Capabilities(poll_seconds=3600.0)
    send(launch, "p")
    assert status(launch, "p")["state"] == "queued"
    fake.begin("fake-1")
    assert status(launch, "p")["state"] == "queued", "an answer is good for an hour here"
    fake.capabilities = Capabilities()
    assert status(launch, "p")["state"] == "running"


# ---- requests that are refused, and dry runs ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--gpus", "12", "script.py"], "--gpus 12: the nodes of cluster 'fake' have 8 GPUs each"),
        (["--gpus", "64", "script.py"], "64 GPUs on 8 nodes: cluster 'fake' has 4 nodes and 32 GPUs. Try --gpus 32."),
        (["--gpus", "1", "--gpus", "2"], "--gpus is given twice."),
        (["--spare-nodes", "1", "script.py"], "the fake backend has no allocation to keep them in (known: slurm)"),
        (["--cluster", "local", "script.py"], "--backend fake --cluster local: that cluster's backend is local."),
        (["nosuch.py"], "no such script: nosuch.py"),
        (["fake_target:mian"], "has no function 'mian' (did you mean 'main'?)"),
        (["--cpus", "2", "--name", "b", "fake_target:main", "--stepz", "3"], "--steps"),
        (["--cpus", "2", "--name", "b", "fake_target:main", "--steps", "many"], "many"),
        (
            ["--cpus", "2", "--name", "b", "fake_target:broken"],
            "the parameter 'needs' is no flag: it has no annotation",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    fake: FakeBackend, launch: Launch, argv: list[str], words: str
) -> None:
    for form in ([], ["--json"]):
        code, out, err = launch("--backend", "fake", *form, *argv)
        assert (code, words in (out if form else err)) == (2, True), (out, err)
    assert fake.jobs == {}
    assert not list(Path("runs").glob("*")) or [p.name for p in Path("runs").glob("*")] == [".gitignore"]


def test_a_refusal_of_the_engine_leaves_nothing(fake: FakeBackend, launch: Launch) -> None:
    fake.refusal = "fake: the partition is down"
    arguments = ("--backend", "fake", "--cpus", "1", "--name", "n", "--detach", "script.py")
    assert launch(*arguments) == (2, "", "launch: fake: the partition is down\n")
    assert not Path("runs/n").exists(), "the name stays free"
    fake.refusal = ""
    assert launch(*arguments)[0] == 0


def test_a_dry_run_sends_and_leaves_nothing(fake: FakeBackend, launch: Launch) -> None:
    fake.start = "tomorrow on node1"
    arguments = ("--backend", "fake", "--gpus", "16", "--name", "n", "--dry-run")
    code, out, _ = launch(*arguments, "--json", "script.py", "a b")
    fields = json.loads(out)
    assert (code, fields["plan"]["target"]["args"], fields["plan"]["start"]) == (0, ["a b"], "tomorrow on node1")
    assert fields["sent"].count("\n") == 16
    code, out, _ = launch(*arguments, "script.py", "a b")
    assert "  on     fake: 16 GPUs = 2 nodes x 8 ranks" in out
    assert "  start  tomorrow on node1\n" in out
    assert "  limit" not in out
    assert "rank 15: script " in out
    assert (fake.jobs, Path("runs").exists()) == ({}, False)


# ---- capabilities --------------------------------------------------------------------------------------------------------


def interrupt(monkeypatch: pytest.MonkeyPatch, fake: FakeBackend) -> None:
    """Interrupt the first poll of a run, as Ctrl-C does."""
    polls: list[str] = []

    def poll(job_id: str) -> State:
        polls.append(job_id)
        if len(polls) == 1:
            fake.begin(job_id)
            raise KeyboardInterrupt
        return FakeBackend.poll(fake, job_id)

    monkeypatch.setattr(fake, "poll", poll)


@pytest.mark.parametrize("stops", [True, False])
def test_what_an_interruption_does(
    fake: FakeBackend, launch: Launch, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    fake.capabilities = Capabilities(interrupt_stops=stops)
    interrupt(monkeypatch, fake)
    code, _, err = launch("--backend", "fake", "--cpus", "1", "--name", "c", "script.py")
    assert code == 3
    assert ("stopping: SIGTERM goes to every rank" in err, "no longer watching; c goes on" in err) == (stops, not stops)
    assert status(launch, "c")["state"] == ("stopped" if stops else "running")


@pytest.mark.parametrize("queue", [True, False])
def test_a_queue_is_named_where_there_is_one(fake: FakeBackend, launch: Launch, queue: bool) -> None:
    fake.capabilities = Capabilities(queue=queue)
    send(launch, "w")
    polls = FakeBackend.poll

    def poll(job_id: str) -> State:
        state = polls(fake, job_id)
        if state is State.QUEUED:
            fake.finish(job_id)
        return state

    fake.poll = poll  # type: ignore[method-assign]
    out = launch("logs", "-f", "w")[1]
    assert ("launch: waiting in the queue of fake\n" in out) is queue


@pytest.mark.parametrize("precheck", [True, False])
def test_a_target_is_imported_before_it_waits(fake: FakeBackend, launch: Launch, precheck: bool) -> None:
    fake.capabilities = Capabilities(precheck=precheck)
    Path("fails.py").write_text("import no_such_package\ndef main(): ...\n")
    arguments = ("--backend", "fake", "--cpus", "1", "--name", "i", "--detach", "fails:main")
    code, _, err = launch(*arguments)
    assert (code, "no_such_package" in err, len(fake.jobs)) == ((2, True, 0) if precheck else (0, False, 1))


def test_spare_nodes_and_a_time_limit(fake: FakeBackend, launch: Launch) -> None:
    fake.capabilities = Capabilities(spare_nodes=True, time_limit=True)
    code, out, _ = launch("--backend", "fake", "--gpus", "8", "--spare-nodes", "1", "--dry-run", "script.py")
    assert (code, "\n  limit  60 min (1h), the default\n" in out) == (0, True)
    other = FakeBackend("other")
    backends.register(other)
    try:
        _, _, err = launch("--backend", "other", "--gpus", "8", "--spare-nodes", "1", "script.py")
    finally:
        backends.unregister(other)
    assert "the other backend has no allocation to keep them in (known: slurm, fake)" in err


@pytest.mark.parametrize("multi_node", [True, False])
def test_the_doctor_probes_as_many_nodes_as_a_run_can_have(fake: FakeBackend, launch: Launch, multi_node: bool) -> None:
    fake.capabilities = Capabilities(multi_node=multi_node)
    fake.on_submit = lambda job_id: fake.finish(job_id, state=State.FAILED, failure=FAILURE)
    launch("doctor", "--backend", "fake", "--on-nodes")
    assert [plan.placement.nodes for plan in fake.plans] == [2 if multi_node else 1]


# ---- the objects -----------------------------------------------------------------------------------------------------------


SHIPPED = {
    "local": Capabilities(interrupt_stops=True, attaches=True, queue=False, precheck=False, multi_node=False),
    "slurm": Capabilities(poll_seconds=5.0, spare_nodes=True, time_limit=True, requeue=True),
    "ray": Capabilities(elastic=True),
    "ray_on_slurm": Capabilities(poll_seconds=5.0, time_limit=True, requeue=True, elastic=True),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_backend(name: str) -> None:
    backend = backends.get(name)
    assert isinstance(backend, Backend)
    assert (backend.name, backend.capabilities) == (name, SHIPPED[name])


def test_every_name_has_its_class() -> None:
    assert set(backends._CLASSES) == set(SHIPPED)
    assert backends.names() == tuple(BACKENDS) == ("local", "slurm", "ray")


@pytest.mark.parametrize(
    ("site", "engine"),
    [
        (Cluster("x", "local"), "local"),
        (Cluster("x", "ray"), "ray"),
        (Cluster("x", "ray", ray=Ray(inside="slurm")), "ray_on_slurm"),
        (Cluster("x", "slurm", ray=Ray(inside="slurm")), "slurm"),
        (Cluster("x", "local", ray=Ray(inside="slurm")), "local"),
    ],
)
def test_the_backend_of_a_cluster(site: Cluster, engine: str) -> None:
    assert backends.of(site).name == site.engine == engine


def test_a_fake_in_place_of_a_shipped_backend(fake: FakeBackend) -> None:
    padding_sample = FakeBackend("slurm")
    backends.register(padding_sample)
    padding_sample.on_submit = padding_sample.finish
    assert launcher.launch("script.py", backend="slurm", gpus=8).state() is State.SUCCEEDED
    backends.unregister(padding_sample)
    assert type(backends.get("slurm")).__name__ == "SlurmBackend"
    assert "slurm" in backends.names()


def test_a_name_that_is_not_registered_any_more(tmp_path: Path) -> None:
    backends.unregister(FakeBackend())  # has never existed
    with pytest.raises(BadRequest, match=r"--backend 'fake': no such backend\. Known: local, slurm, ray\."):
        backends.get("fake")
    with pytest.raises(BadRequest, match="--backend 'fake': no such backend"):
        choose(None, "fake", tmp_path)
    (tmp_path / "x.toml").write_text("backend = 'fake'")
    with pytest.raises(BadRequest, match="backend: 'fake' is not one of local, slurm, ray"):
        load("./x.toml", tmp_path)


def test_a_profile_of_the_fake(fake: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("backend = 'fake'\nnodes = 7\n[node]\ngpus = 2\ncpus = 4")
    site = fake.survey(load("./x.toml", tmp_path))
    assert (site.nodes, site.node) == (7, Node(2, 4))
    assert fake.survey(choose(None, "fake", tmp_path)).nodes == 4


def test_a_backend_of_ones_own_needs_five_methods(tmp_path: Path) -> None:
    class Least(Backend):
        name, capabilities = "least", Capabilities()

        def survey(self, cluster: Cluster) -> Cluster:
            return cluster

        def render(self, plan: Plan) -> str:
            return ""

        def submit(self, plan: Plan) -> str:
            return "1"

        def poll(self, job_id: str) -> State:
            return State.QUEUED

        def cancel(self, job_id: str) -> None: ...

    least = Least()
    spec, site, target = RunSpec("s.py"), Cluster("least", "least"), Target("script", "s.py")
    plan = Plan("n", tmp_path, spec, "least", site, Placement(1, 1, "cpu", why="1"), target, tmp_path, 60)
    assert (least.check(plan), list(least.diagnose(site, tmp_path)), least.at_hand()) == ("", [], False)
    with pytest.raises(BadRequest, match="--backend least: this backend does not write profiles"):
        least.new_profile()
    with pytest.raises(TypeError, match="abstract"):
        type("Incomplete", (Backend,), {})()


def test_capabilities_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Capabilities().queue = False  # type: ignore[misc]


def test_the_page_on_testing_works(tmp_path: Path) -> None:
    """The example of docs/testing.md is a test file, which passes."""
    page = (Path(__file__).parents[3] / "docs" / "testing.md").read_text()
    [block] = [part.partition("```")[0] for part in page.split("```python\n")[1:]]
    (tmp_path / "test_page.py").write_text(block)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    mode = "--import-mode=importlib"  # the other one leaves the folder in sys.path
    assert pytest.main(["-q", mode, "-p", "no:cacheprovider", "-c", str(tmp_path / "pytest.ini"), str(tmp_path)]) == 0
