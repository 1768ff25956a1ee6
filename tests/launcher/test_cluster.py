"""Cluster profiles: what is found where, what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import cluster
from launcher.cluster import BACKENDS, load, parse
from launcher.errors import BadRequest

SHIPPED = Path(__file__).parents[2] / "cluster_configs"


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
    """Take the # off every line that holds a setting; a key that no longer exists would teach what is refused."""
    lines, tables = [], set()
    for line in path.read_text().splitlines():
        bare = line.removeprefix("# ")
        if bare.startswith("[") or (" = " in bare and bare.split(" = ")[0].replace("_", "").isalpha()):
            if bare.startswith("[") and bare in tables:
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
        ("backend = 'local'\nstart_method = 'fork'", "start_method: 'fork' is not one of forkserver, spawn"),
        ("backend = 'local'\nnodes = -1", "nodes are 0 or more"),
        ("backend = 'local'\nnode = {gpus = -1}", "nodes are 0 or more"),
        ("backend = 'local'\ngrace = 0", "grace is more than 0 seconds"),
        ("backend = 'slurm'\n[slurm]\naccount = \"a\\nb\"", "line breaks and control characters are not allowed in 'a\\nb'"),
        ("backend = 'slurm'\n[slurm]\nsetup = [\"a\\nb\"]", "slurm: setup: line breaks"),
        ("backend = 'slurm'\n[slurm.sbatch]\n\"a\\nb\" = 1", "slurm: sbatch: line breaks"),
        ("backend = 'slurm'\n[slurm.sbatch]\n\"a b\" = 1", "'a b' = 1 is not an option of sbatch and its value"),
        ("backend = 'slurm'\n[slurm.sbatch]\nbegin = 2030-01-01", "slurm.sbatch: 'begin' = datetime.date(2030, 1, 1) is not"),
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
    where = {p.name: p.where for p in cluster.profiles(tmp_path)}
    assert {"local", "slurm", "ray"} <= set(where)
    assert set(where.values()) == {"shipped"}
    write(user / "cluster_configs" / "slurm.toml", "backend = 'slurm'\ndescription = 'user'")
    write(user / "cluster_configs" / "ray.toml", "backend = 'ray'\ndescription = 'user'")
    profile(tmp_path, "backend = 'slurm'\ndescription = 'project'", "slurm")
    found = {p.name: p.where for p in cluster.profiles(tmp_path)}
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
