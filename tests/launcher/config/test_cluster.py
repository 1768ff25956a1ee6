"""Cluster profiles: search paths, parsing, and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.backends.fake import FakeBackend
from launcher.backends.ray import backend as ray_doctor
from launcher.backends.slurm import doctor as slurm_doctor
from launcher.backends.slurm.query import Partition
from launcher.cli.clusters import run_clusters
from launcher.config import profile_reference, profiles
from launcher.config.cluster import BACKENDS, NodeKind
from launcher.config.profiles import load, parse
from launcher.doctor.new_profile import create
from launcher.errors import BadRequest

SHIPPED = Path(__file__).parents[3] / "cluster_configs"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def profile(folder: Path, text: str, name: str = "mine") -> Path:
    return write(folder / "cluster_configs" / f"{name}.toml", text)


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration folder, empty."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "launch"


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.toml")), ids=lambda p: p.relative_to(SHIPPED).as_posix())
def test_every_shipped_profile_is_read_and_says_what_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("USER", "me")
    site = load(path.relative_to(SHIPPED).with_suffix("").as_posix(), tmp_path)
    assert site.backend in BACKENDS
    assert site.description
    assert site.name == path.stem


@pytest.mark.parametrize("path", sorted(SHIPPED.rglob("*.toml")), ids=lambda p: p.relative_to(SHIPPED).as_posix())
def test_what_is_commented_out_in_a_shipped_profile_can_be_used(path: Path, tmp_path: Path) -> None:
    """Uncomment all settings, so that a removed key in a shipped profile is found."""
    lines, tables = [], set()
    for line in path.read_text().splitlines():
        bare = line.removeprefix("# ")
        if bare.startswith("[") or (" = " in bare and bare.split(" = ")[0].replace("_", "").isalpha()):
            if bare in tables and not bare.startswith("[["):
                continue
            tables.add(bare)
            lines.append(bare.replace("$USER", "me"))
    load(str(write(tmp_path / path.name, "\n".join(lines))), tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("backend = 'slurm'\nparttition = 'x'", "unknown key 'parttition'"),
        ("backend = 'slurm'\nnode = {gpu = 8}", "node: unknown key 'gpu' (did you mean 'gpus'?). Known keys: gpus, cpus,"),
        ("backend = 'slurm'\n[slurm]\npartion = 'x'", "slurm: unknown key 'partion' (did you mean 'partition'?)"),
        ("backend = 'slurm'\ncolour = 1", "Known keys: name, backend, description, runs,"),
        ("description = 'x'", "the key 'backend' is missing"),
        ("backend = 'pbs'", "backend: 'pbs' is not one of local, slurm, ray"),
        ("backend = 'local'\nnodes = '4'", "nodes: expected a whole number, got '4'"),
        ("backend = 'local'\nnodes = 4.5", "nodes: expected a whole number, got 4.5"),
        ("backend = 'local'\nnodes = true", "nodes: expected a whole number, got True"),
        ("backend = 'local'\ngrace = 'long'", "grace: expected a number, got 'long'"),
        ("backend = 'local'\nruns = 3", "runs: expected a string, got 3"),
        ("backend = 'local'\nshared = '/scratch'", "shared: expected a list, got '/scratch'"),
        ("backend = 'local'\nshared = [1]", "shared: expected a string, got 1"),
        ("backend = 'local'\nnode = 8", "node: expected a table, got 8"),
        ("backend = 'local'\n[environment]\nA = 1", "environment.A: expected a string, got 1"),
        ("backend = 'slurm'\n[slurm]\nexclusive = 'yes'", "slurm: exclusive: expected true or false, got 'yes'"),
        ("backend = 'ray'\n[ray]\nplacement_strategy = 'pack'", "'pack' is not one of PACK, SPREAD, STRICT_PACK"),
        ("backend = 'ray'\n[ray]\nwait = -1", "ray.wait = -1: seconds are needed, 0 or more"),
        ("backend = 'ray'\npreflight = true\n[ray]\ninside = 'slurm'", "preflight = true: a Ray inside a job has no other"),
        ("backend = 'local'\nstart_method = 'fork'", "start_method: 'fork' is not one of auto, spawn"),
        ("backend = 'local'\nnodes = -1", "numbers of nodes, GPUs and cores and memory are 0 or more"),
        ("backend = 'local'\nnode = {gpus = -1}", "numbers of nodes, GPUs and cores and memory are 0 or more"),
        ("backend = 'local'\ngrace = 0", "grace is more than 0 seconds"),
        ("backend = 'slurm'\n[slurm]\naccount = \"a\\nb\"", "line breaks and control characters are not allowed in 'a\\nb'"),
        ("backend = 'slurm'\n[slurm]\nsetup = [\"a\\nb\"]", "slurm: setup: line breaks"),
        ("backend = 'slurm'\n[slurm.sbatch]\n\"a\\nb\" = 1", "slurm: sbatch: line breaks"),
        ("backend = 'slurm'\n[slurm.sbatch]\n\"a b\" = 1", "'a b' = 1 is not an option of sbatch and its value"),
        ("backend = 'slurm'\n[slurm.sbatch]\nbegin = 2030-01-01", "slurm.sbatch: 'begin' = datetime.date(2030, 1, 1) is not"),
        ("backend = 'slurm'\n[slurm.sbatch]\ngpus-per-task = 1", "'gpus-per-task' is decided elsewhere; use --gpus; a job has one"),
        ("backend = 'slurm'\n[slurm.sbatch]\npartition = 'x'", "'partition' is decided elsewhere; use slurm.partition."),
        ("backend = 'slurm'\n[slurm.sbatch]\njob_name = 'x'", "'job_name' is decided elsewhere; use --name."),
        ("backend = 'slurm'\nproxy = 'proxy:3128'", "proxy = 'proxy:3128': write http://host:port."),
        ("backend = 'slurm'\nhub_cache = '$NO_SUCH_VARIABLE'", "hub_cache = '$NO_SUCH_VARIABLE' names a variable that is not"),
        ("backend = 'slurm'\n[slurm]\nscratch = 'local'", "slurm.scratch = 'local': write an absolute path"),
        ("backend = 'slurm'\n[slurm]\nscratch = '/l/$(id)$SLURM_JOB_ID'", "write an absolute path"),
        ("backend = 'slurm'\n[slurm]\nscratch = '/local'", "slurm.scratch is removed after the job, so it needs $SLURM_JOB_ID"),
        ("backend = 'slurm'\n[slurm.container]\nmounts = ['/a']", "slurm: container: the key 'image' is missing"),
        ("backend = 'slurm'\n[slurm.container]\nimage = ' '", "slurm: container: image: the value ' ' is empty"),
        ("backend = 'slurm'\n[slurm.container]\nimage = 'x'\nruntime = 'docker'", "'docker' is not one of pyxis, apptainer"),
        ("backend = 'slurm'\n[slurm.container]\nimage = 'x'\nmounts = ['a:b']", "mounts: 'a:b': write /path or /on/the/node:/in"),
        ("backend = 'slurm'\n[slurm]\nsrun_args = ['--container-image=x']\n[slurm.container]\nimage = 'x'", "in one place"),
        ("backend = 'slurm'\n[[kinds]]\ncount = -1", "are 0 or more"),
        ("backend = 'slurm'\n[[kinds]]\ngpu = 1", "kinds: unknown key 'gpu' (did you mean 'gpus'?)"),
        ("backend = 'slurm'\n[slurm.sbatch]\nx = [1]", "is not an option of sbatch and its value"),
        ("backend = 'local'\n[environment]\n\"A=B\" = 'x'", "environment: 'A=B' cannot be the name of a variable"),
        ("backend = 'local'\n[environment]\nA = \"\\u0000\"", "environment: A: line breaks and control characters"),
        ("backend = 'local'\nruns = '$NO_SUCH_VARIABLE/runs'", "'$NO_SUCH_VARIABLE/runs' names a variable that is not set"),
        ("backend = 'local'\nruns = '$(touch pwned)'", "names a variable that is not set"),
        ("backend = ", "not valid TOML"),
        ("backend = 'local'\nbackend = 'ray'", "not valid TOML"),
    ],
)  # fmt: skip
def test_what_is_refused_names_the_file_and_the_key(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "site.toml", text)
    with pytest.raises(BadRequest) as refused:
        load(str(path), tmp_path)
    assert str(refused.value).startswith(f"cluster profile {path}: ")
    assert words in str(refused.value)


def test_a_project_comes_before_the_user_and_the_user_before_the_shipped(tmp_path: Path, user: Path) -> None:
    where = {p.name: p.where for p in profiles.profiles(tmp_path)}
    assert {"local", "slurm", "ray"} <= set(where)
    assert set(where.values()) == {"shipped"}
    write(user / "cluster_configs" / "slurm.toml", "backend = 'slurm'\ndescription = 'user'")
    write(user / "cluster_configs" / "ray.toml", "backend = 'ray'\ndescription = 'user'")
    profile(tmp_path, "backend = 'slurm'\ndescription = 'project'", "slurm")
    found = {p.name: p.where for p in profiles.profiles(tmp_path)}
    assert (found["slurm"], found["ray"], found["local"]) == ("project", "user", "shipped")
    assert load("slurm", tmp_path).description == "project"
    assert load("ray", tmp_path).description == "user"


def test_a_name_that_is_not_found_offers_near_and_known_ones(tmp_path: Path, user: Path) -> None:
    profile(tmp_path, "backend = 'local'", "big-cluster")
    with pytest.raises(BadRequest, match=r"'big-clutser': no such profile \(did you mean 'big-cluster'\?\)") as refused:
        load("big-clutser", tmp_path)
    assert "Known: big-cluster, " in str(refused.value)
    assert "local" in str(refused.value)


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "a b", "$(id)", "x" * 5000, "no\nsuch"])
def test_a_hostile_name_is_a_name_that_is_not_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadRequest, match="no such profile"):
        load(name, tmp_path)


def test_a_path_works_too_and_is_seen_from_the_given_folder(tmp_path: Path) -> None:
    write(tmp_path / "sites" / "a b'c.toml", "backend = 'local'\nnodes = 7")
    site = load("sites/a b'c.toml", tmp_path)
    assert (site.name, site.nodes) == ("a b'c", 7)
    with pytest.raises(BadRequest, match=r"none\.toml: No such file"):
        load("none.toml", tmp_path)
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(BadRequest, match=r"folder\.toml: Is a directory"):
        load("folder.toml", tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"description = '\xe9'")
    with pytest.raises(BadRequest, match="not valid TOML"):
        load("latin.toml", tmp_path)


def test_a_profile_builds_on_another_table_by_table(tmp_path: Path, user: Path) -> None:
    profile(tmp_path, "backend = 'slurm'\ntime = '4h'\n[node]\ngpus = 8\ncpus = 96\n[slurm]\naccount = 'a'", "base")
    profile(tmp_path, "extends = 'base'\ntime = '1h'\n[node]\ncpus = 64\n[slurm]\npartition = 'p'")
    site = load("mine", tmp_path)
    assert (site.name, site.backend, site.time) == ("mine", "slurm", "1h")
    assert (site.node.gpus, site.node.cpus) == (8, 64)
    assert (site.slurm.account, site.slurm.partition) == ("a", "p")


def test_a_profile_can_build_on_the_shipped_one_that_it_hides(tmp_path: Path, user: Path) -> None:
    profile(tmp_path, "extends = 'slurm'\n[slurm]\naccount = 'a'", "slurm")
    site = load("slurm", tmp_path)
    assert (site.backend, site.slurm.account, site.time) == ("slurm", "a", load("slurm", tmp_path.parent).time)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("'nope'", "extends 'nope': no such profile. Known: "),
        ("'slrum'", "did you mean 'slurm'?"),
        ("3", "extends '3': no such profile"),
        ("'mine'", "extends 'mine': no such profile"),
        ("'between'", "extends 'between', which itself extends another; one level is allowed"),
    ],
)
def test_a_base_that_cannot_be(tmp_path: Path, user: Path, base: str, words: str) -> None:
    profile(tmp_path, "extends = 'local'", "between")
    profile(tmp_path, f"extends = {base}")
    with pytest.raises(BadRequest) as refused:
        load("mine", tmp_path)
    assert words in str(refused.value)


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ("runs", "runs"),
        ("$SCRATCH/runs", "/scratch/me/runs"),
        ("${SCRATCH}/runs", "/scratch/me/runs"),
        ("~/runs", "/home/me/runs"),
        ("/a b/'c'", "/a b/'c'"),
    ],
)
def test_the_runs_folder_knows_variables_and_home(monkeypatch: pytest.MonkeyPatch, runs: str, expected: str) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("HOME", "/home/me")
    assert parse({"backend": "local", "runs": runs}, Path("x.toml"), Path.cwd()).runs == expected


def test_conveniences_stand_for_variables_and_yield_to_them() -> None:
    data = {"backend": "slurm", "proxy": "http://p:3128", "hub_cache": "~/hub", "offline": True}
    site = parse(data | {"environment": {"HF_HUB_OFFLINE": "0"}}, Path("x.toml"), Path.cwd())
    found = site.variables()
    assert found["https_proxy"] == found["HTTPS_PROXY"] == found["http_proxy"] == "http://p:3128"
    assert "127.0.0.1" in found["no_proxy"]
    assert found["HF_HOME"] == str(Path.home() / "hub")
    assert (found["HF_DATASETS_OFFLINE"], found["HF_HUB_OFFLINE"]) == ("1", "0")
    assert parse({"backend": "slurm"}, Path("x.toml"), Path.cwd()).variables() == {}


def test_kinds_of_nodes_can_be_written_down(tmp_path: Path) -> None:
    text = "backend = 'slurm'\n[[kinds]]\ncount = 2\ngpus = 8\naccelerator = 'h100'\n[[kinds]]\ncount = 9\ncpus = 4\n"
    site = load(str(write(tmp_path / "site.toml", text)), tmp_path)
    assert [(kind.count, kind.gpus, kind.cpus, kind.accelerator) for kind in site.node_kinds()] == [
        (2, 8, 0, "h100"),
        (9, 0, 4, None),
    ]


def test_the_reference_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "profiles.md"
    assert page.read_text() == profile_reference.page(), (
        "`python -m launcher.config.profile_reference > docs/profiles.md` writes it anew"
    )


@pytest.mark.parametrize("cls", [cls for _, cls, _ in profile_reference.TABLES])
def test_every_field_of_a_profile_is_explained(cls: type) -> None:
    assert set(profile_reference.attributes(cls)) == {field.name for field in dataclasses.fields(cls)}


def test_a_first_profile_of_slurm_can_be_read(tmp_path: Path) -> None:
    found = [Partition("a 'b'", True, max_minutes=90, max_nodes=2, accounts=("ml",)), Partition("down", state="DOWN")]
    text = slurm_doctor.profile_text(
        found, [NodeKind(2, 8, 96, 1000.0, "h100", ("ib",), "n1,n2", 1), NodeKind(1, 0, 4)]
    )
    site = load(str(write(tmp_path / "site.toml", text)), tmp_path)
    assert (site.backend, site.slurm.partition, site.time) == ("slurm", "a 'b'", "90m")
    assert "#   2 x 96 cores, 1000 GB, 8 h100 GPUs (n1,n2; 1 more down or drained; features ib)\n" in text
    assert "#   a 'b': 90 min, the default, 2 nodes a job, accounts ml\n#   down: no time limit, DOWN\n" in text
    assert load(str(write(tmp_path / "none.toml", slurm_doctor.profile_text([], []))), tmp_path).slurm.partition is None


def test_a_first_profile_of_ray_can_be_read(tmp_path: Path) -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 48.0, "GPU": 4.0, "accelerator_type:A100": 1.0}, {"CPU": 32.0, "GPU": 4.0}]
    text = ray_doctor.profile_text("10.0.0.1:6379", nodes)
    site = load(str(write(tmp_path / "site.toml", text)), tmp_path)
    assert (site.nodes, site.node.gpus, site.node.cpus, site.node.accelerator) == (2, 4, 32, "A100")
    assert site.ray.address == "10.0.0.1:6379"
    assert "# 3 nodes are up, 2 of them with GPUs; they differ" in text


def test_a_first_profile_is_not_written_over_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    profile(tmp_path, "backend = 'local'")
    with pytest.raises(BadRequest, match=r"mine\.toml exists already"):
        create("mine", "slurm", tmp_path)
    with pytest.raises(BadRequest, match="a profile is written for slurm or ray"):
        create("other", "local", tmp_path)
    with pytest.raises(BadRequest, match="a run name is up to 100 letters"):
        create("../other", "slurm", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BadRequest, match=r"no SLURM \(the command sinfo\) and no Ray \(RAY_ADDRESS\) is available"):
        create("other", None, tmp_path)
    with pytest.raises(BadRequest, match="SLURM cannot be reached from here: the command scontrol is missing"):
        create("other", "slurm", tmp_path)


@pytest.mark.slow
def test_a_first_profile_of_the_ray_at_hand(tmp_path: Path, on_ray: object, monkeypatch: pytest.MonkeyPatch) -> None:
    path = create("mine", "ray", tmp_path)
    site = load("mine", tmp_path)
    assert path == tmp_path / "cluster_configs" / "mine.toml"
    assert site.ray.address == os.environ["RAY_ADDRESS"]
    assert site.nodes > 1
    assert site.node.cpus > 0
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(BadRequest, match=r"Ray at 127\.0\.0\.1:9 cannot be reached"):
        create("other", "ray", tmp_path)


# ---- profiles of others -----------------------------------------------------------------------------------------

OTHER = 54321
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to make files of a second user")


@as_root
@pytest.mark.parametrize("whose", [".", "mine.toml", "examples", "examples/mine.toml"])
def test_a_profile_of_another_user_is_named_and_not_used(whose: str, tmp_path: Path, user: Path) -> None:
    name = "examples/mine" if "examples" in whose else "mine"
    path = profile(tmp_path, "backend = 'local'\n[slurm]\nsetup = ['touch owned']\n", name)
    assert load(name, tmp_path).backend == "local"
    os.chown(tmp_path / "cluster_configs" / whose, OTHER, -1)
    with pytest.raises(
        BadRequest, match=rf"{whose if whose != '.' else 'cluster_configs'} belongs to uid {OTHER}, and"
    ) as refused:
        load(name, tmp_path)
    assert str(refused.value).endswith(f"name it by its path: --cluster cluster_configs/{name}.toml.")
    assert load(f"cluster_configs/{name}.toml", tmp_path).backend == "local"
    assert profiles.parse({"backend": "local"}, path, tmp_path).backend == "local"


@as_root
@pytest.mark.parametrize("named", [None, "slurm"])
def test_neither_is_one_that_nobody_asked_for_or_that_another_builds_on(
    named: str | None, tmp_path: Path, user: Path
) -> None:
    os.chown(profile(tmp_path, "backend = 'local'", "local"), OTHER, -1)
    os.chown(profile(tmp_path, "backend = 'slurm'", "slurm"), OTHER, -1)
    with pytest.raises(BadRequest, match="belongs to uid"):
        profiles.choose(None, named, tmp_path)
    profile(tmp_path, "extends = 'slurm'", "mine")
    with pytest.raises(BadRequest, match="belongs to uid"):
        load("mine", tmp_path)


@as_root
def test_a_link_to_a_profile_of_another_user_is_not_followed(tmp_path: Path, user: Path) -> None:
    os.chown(write(tmp_path / "theirs.toml", "backend = 'local'"), OTHER, -1)
    (tmp_path / "cluster_configs").mkdir()
    (tmp_path / "cluster_configs/mine.toml").symlink_to(tmp_path / "theirs.toml")
    with pytest.raises(BadRequest, match="belongs to uid"):
        load("mine", tmp_path)


def test_the_list_shows_why_a_profile_is_not_used(
    tmp_path: Path, user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile(tmp_path, "backend = 'local'").chmod(0o646)
    with contextlib.chdir(tmp_path):
        assert run_clusters([]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mine "))
    assert "unusable: cluster profile" in line
    assert "other users can change" in line


@pytest.mark.parametrize(("mode", "folder", "used"), [
    (0o644, 0o755, True), (0o600, 0o700, True), (0o646, 0o755, False), (0o666, 0o755, False), (0o644, 0o757, False),
    (0o644, 0o1777, True),
])  # fmt: skip
def test_a_profile_that_all_users_can_change_is_not_used(
    mode: int, folder: int, used: bool, tmp_path: Path, user: Path
) -> None:
    profile(tmp_path, "backend = 'local'").chmod(mode)
    (tmp_path / "cluster_configs").chmod(folder)
    if used:
        assert load("mine", tmp_path).backend == "local"
    else:
        with pytest.raises(BadRequest, match=r"other users can change .*Type `chmod go-w "):
            load("mine", tmp_path)


@as_root
@pytest.mark.parametrize(("group", "used"), [("root", True), ("daemon", False), (54321, False)])
def test_a_group_may_change_a_profile_if_it_is_the_users_alone(
    group: str | int, used: bool, tmp_path: Path, user: Path
) -> None:
    path = profile(tmp_path, "backend = 'local'")
    path.chmod(0o664)
    shutil.chown(path, group=group)
    if used:
        assert load("mine", tmp_path).backend == "local"
    else:
        with pytest.raises(BadRequest, match="other users can change"):
            load("mine", tmp_path)


def test_a_new_profile_can_be_used_whatever_the_umask(
    tmp_path: Path, user: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.doctor.new_profile._choose", lambda _: FakeBackend())
    monkeypatch.setattr(FakeBackend, "new_profile", lambda _: "backend = 'local'")
    before = os.umask(0)
    try:
        create("mine", None, tmp_path)
    finally:
        os.umask(before)
    assert load("mine", tmp_path).backend == "local"


def test_a_user_without_a_home_has_profiles(tmp_path: Path) -> None:
    """As in a container with a user id that has no entry in /etc/passwd."""
    profile(tmp_path, "backend = 'local'")
    program = (
        "import os; from pathlib import Path; from launcher.config import profiles\n"
        "os.setuid(54321) if os.geteuid() == 0 else None\n"
        "print([where for where, _ in profiles.folders(Path.cwd())])"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CONFIG_HOME")}
    environment["PYTHONPATH"] = str(SHIPPED.parent)
    done = subprocess.run([sys.executable, "-c", program], cwd="/", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'project'" in done.stdout


# ---- the scratch folder -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scratch", [
    "/tmp/$SLURM_JOB_ID/../../home", "/tmp/../home/$SLURM_JOB_ID", "/tmp/${SLURM_JOB_ID}/..", "/$SLURM_JOB_ID/x/../../etc",
    "/local/$SLURM_JOB_IDS", "/local/$SLURM_JOB_ID_", "/local/${SLURM_JOB_IDX}", "/local/SLURM_JOB_ID", "/home/me",
    "local/$SLURM_JOB_ID", "/tmp/$(id)/$SLURM_JOB_ID", "/tmp/$SLURM_JOB_ID; rm x", "/tmp/${SLURM_JOB_ID:-x}", "~/$SLURM_JOB_ID",
])  # fmt: skip
def test_a_scratch_folder_that_is_not_the_jobs_own_is_refused(scratch: str) -> None:
    with pytest.raises(BadRequest, match=r"slurm\.scratch"):
        parse({"backend": "slurm", "slurm": {"scratch": scratch}}, Path("x.toml"), Path.cwd())


@pytest.mark.parametrize("scratch", [
    "/tmp/$SLURM_JOB_ID", "/local/job-${SLURM_JOB_ID}/tmp", "/local/$USER/$SLURM_JOB_ID.$SLURM_RESTART_COUNT", "/$SLURM_JOB_ID/",
    "/local/..data/$SLURM_JOB_ID", "/local/$SLURM_JOB_ID/...",
])  # fmt: skip
def test_a_scratch_folder_of_the_job(scratch: str) -> None:
    cluster = parse({"backend": "slurm", "slurm": {"scratch": scratch}}, Path("x.toml"), Path.cwd())
    assert cluster.slurm.scratch == scratch
