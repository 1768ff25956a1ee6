"""Real runs of programs that need more than what git tracks: they find what plain Python would show them."""

from __future__ import annotations

import _bisect
import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from launcher.request.code.outside import INSTALL
from tests.launcher.engines import Project, until

pytestmark = pytest.mark.slow

SCRIPT = """
import sys, time
from pathlib import Path

def main(*args):
    here = Path(__file__).parent
    while not Path(GO).exists():
        time.sleep(0.05)
    import beside.generated, lib.code, tt_hooked.inner, tt_path_only
    from compiled import _bisect
    from exp_version import VERSION
    code = [VERSION, beside.generated.V, lib.code.V, tt_hooked.inner.V, tt_path_only.V, _bisect.bisect_right([1, 2], 1)]
    data = [(here / "data.csv").read_text(), (here / "data/deep/x.bin").read_text(), (here.parent / "root.csv").read_text()]
    print("saw", code, data, tt_hooked.inner.DATA, flush=True)

if __name__ == "__main__":
    main()
"""
SAW = "saw [1, 1, 1, 1, 1, 1] ['new', 'new', 'new'] {hooked}"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def make_checkout(folder: Path) -> Path:
    """A checkout whose ``exp`` git ignores, with a script, code, data and a link to another checkout in it."""
    subprocess.run(["git", "init", "-q", folder], check=True)
    other = folder.parent / f"{folder.name}-other"
    write(other, {"lib/__init__.py": "", "lib/code.py": "V = 1\n"})
    subprocess.run(["git", "init", "-q", other], check=True)
    write(
        folder,
        {
            ".gitignore": "exp/\n*.csv\ngo\n",
            "tracked.py": "",
            "root.csv": "old",
            "exp/train.py": SCRIPT.replace("GO", repr(str(folder / "go"))),
            "exp/exp_version.py": "VERSION = 1\n",
            "exp/beside/generated.py": "V = 1\n",
            "exp/data.csv": "old",
            "exp/data/deep/x.bin": "old",
            "exp/compiled/__init__.py": "",
        },
    )
    library = Path(str(_bisect.__file__))
    shutil.copy(library, folder / "exp/compiled" / library.name)
    (folder / "exp/lib").symlink_to(Path("../../", other.name, "lib"))
    subprocess.run(["git", "-C", folder, "add", "--all"], check=True)
    subprocess.run(["git", "-C", folder, "commit", "-qm", "first"], check=True)
    return folder


BUILD = """
import os, sys
from setuptools.build_meta import build_editable
os.chdir(sys.argv[1])
print(build_editable(sys.argv[2]))
"""

HOOKED = """
import tt_path_only
from pathlib import Path
V = 1
DATA = (Path(__file__).parents[1] / "configs/a.yaml").read_text()
"""


@pytest.fixture(scope="session")
def editable(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project that is installed editable, and the interpreter of that environment: a hook for one package, a path for one."""
    folder = tmp_path_factory.mktemp("editable")
    environment = folder / "env"
    venv.create(environment, with_pip=False, symlinks=True)
    site = next(environment.glob("lib/python*/site-packages"))
    paths = [path for path in sys.path if "site-packages" in path] + [str(Path(__file__).parents[3])]
    (site / "tests.pth").write_text("\n".join(dict.fromkeys(paths)) + "\n")
    project = '[project]\nname = "{0}"\nversion = "1"\n[build-system]\nrequires = ["setuptools"]\n[tool.setuptools]\n'
    write(
        folder,
        {
            "hooked/pyproject.toml": project.format("tt_hooked") + 'packages = ["tt_hooked"]\n',
            "hooked/tt_hooked/__init__.py": "",
            "hooked/tt_hooked/inner.py": HOOKED,
            "hooked/configs/a.yaml": "a: 1",
            "hooked/queue.py": "raise SystemExit('the editable project hides the standard library')\n",
            "path/pyproject.toml": project.format("tt_path_only")
            + 'package-dir = {"" = "src"}\npy-modules = ["tt_path_only"]\n',
            "path/src/tt_path_only.py": "V = 1\n",
            "build.py": BUILD,
        },
    )
    for name in ("hooked", "path"):
        command = [sys.executable, str(folder / "build.py"), str(folder / name), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        with zipfile.ZipFile(folder / done.stdout.split()[-1]) as wheel:
            wheel.extractall(site)
    return folder, str(environment / "bin/python")


def edit(*folders: Path) -> None:
    """Change all code to a second version, and all data to new data."""
    for folder in folders:
        for path in [*folder.rglob("*.py"), *folder.rglob("*.yaml")]:
            if "runs" not in path.parts:
                path.write_text(path.read_text().replace("V = 1", "V = 2").replace("VERSION = 1", "VERSION = 2"))
        for path in [*folder.rglob("*.csv"), *folder.rglob("*.bin")]:
            path.write_text("new")


@pytest.fixture
def hooked(editable: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same with its own sources, as they were made."""
    for name, text in {"hooked/tt_hooked/inner.py": HOOKED, "path/src/tt_path_only.py": "V = 1\n"}.items():
        (editable[0] / name).write_text(text)
    return editable


def test_what_is_ignored_linked_or_installed_editable_is_what_was_submitted(
    project: Project, hooked: tuple[Path, str]
) -> None:
    root = make_checkout(project.folder)
    here = Project(root, project.engine, hooked[1])
    started = here.start("--backend", project.engine, "--cpus", "2", "--name", "n", "exp/train.py")
    until(lambda: (root / "runs/n/job.json").exists() or started.poll() is not None, "the run is sent")
    edit(root, root.parent / f"{root.name}-other", hooked[0] / "hooked", hooked[0] / "path")
    (root / "go").touch()
    out, err = started.communicate(timeout=240)
    assert started.returncode == 0, out + err
    for rank in (0, 1):
        assert SAW.format(hooked="a: 1") in (root / f"runs/n/logs/1/{rank}.log").read_text()


@pytest.mark.parametrize(
    ("folder", "target"),
    [("", "-m exp.train"), ("exp", "train.py"), ("exp", "-m train"), ("", "exp.train:main"), ("exp", "train:main")],
)
def test_modules_and_functions_in_an_ignored_folder(
    tmp_path: Path, hooked: tuple[Path, str], folder: str, target: str
) -> None:
    root = make_checkout(tmp_path / "checkout")
    (root / "go").touch()
    edit(root)  # data alone matters here
    for name in ("exp/exp_version.py", "exp/beside/generated.py"):
        (root / name).write_text((root / name).read_text().replace("= 2", "= 1"))
    if target.startswith(("exp", "-m exp")):
        text = (root / "exp/train.py").read_text()
        for name in ("beside.generated", "lib.code"):
            text = text.replace(f"{name},", f"exp.{name} as {name.replace('.', '_')},").replace(
                f"{name}.V", f"{name.replace('.', '_')}.V"
            )
        text = text.replace("from compiled", "from exp.compiled").replace("from exp_version", "from exp.exp_version")
        (root / "exp/train.py").write_text(text)
    here = Project(root / folder, "local", hooked[1])
    here.launch("--cpus", "1", "--name", "n", *target.split())
    assert SAW.format(hooked="a: 1") in (root / folder / "runs/n/logs/1/0.log").read_text()


def test_an_edit_of_an_editable_install_does_not_reach_a_resumed_run(tmp_path: Path, hooked: tuple[Path, str]) -> None:
    script = (
        "import os, subprocess, sys, tt_hooked.inner, tt_path_only\n"
        "child = [sys.executable, '-c', 'import queue, tt_path_only; print(tt_path_only.V)']\n"
        "printed = subprocess.run(child, stdout=subprocess.PIPE, text=True).stdout.strip()\n"
        "print('saw', tt_hooked.inner.V, tt_path_only.V, 'child', printed)\n"
    )
    write(tmp_path, {"p/train.py": script + "assert os.path.exists('second')\n"})
    here = Project(tmp_path / "p", "local", hooked[1])
    shown = here.launch("--cpus", "1", "--name", "n", "--dry-run", "train.py").stdout
    for name in ("hooked", "path"):
        assert f"  code   {tmp_path}/p/runs/n/packages/{name}, a copy of {hooked[0] / name}, from which" in shown
    here.launch("--cpus", "1", "--name", "n", "train.py", status=1)
    edit(hooked[0] / "hooked", hooked[0] / "path")
    (tmp_path / "p/second").touch()
    moved = (tmp_path / "p/runs/n").rename(tmp_path / "moved")
    here.call("resume", str(moved))
    assert "saw 1 1 child 1\n" in (moved / "logs/2/0.log").read_text()
    packages = json.loads((moved / "snapshot.json").read_text())["packages"]
    assert {Path(each["root"]).name for each in packages} == {"hooked", "path"}


def test_an_editable_install_that_cannot_be_copied_is_named(
    tmp_path: Path, hooked: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """scikit-build-core's hook comes before sys.path, so that Python never looks at a copy."""
    hook = (
        "import sys, importlib.util\n"
        "class Finder:\n"
        "    known_source_files = {'tt_first.mod': 'ROOT/tt_first/mod.py', 'tt_first': 'ROOT/tt_first/__init__.py'}\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        file = self.known_source_files.get(name)\n"
        "        return file and importlib.util.spec_from_file_location(name, file)\n"
        "sys.meta_path.insert(0, Finder())\n"
    ).replace("ROOT", str(tmp_path / "native"))
    site = next(hooked[0].glob("env/lib/python*/site-packages"))
    write(site, {"_tt_first_editable.py": hook, "_tt_first_editable.pth": "import _tt_first_editable\n"})
    write(tmp_path, {"native/tt_first/__init__.py": "", "native/tt_first/mod.py": "V = 1\n"})
    write(tmp_path, {"p/train.py": "import tt_first.mod\nprint('saw', tt_first.mod.V)\n"})
    here = Project(tmp_path / "p", "local", hooked[1])
    try:
        why = f"the import hook _tt_first_editable finds it before any copy; {INSTALL}"
        shown = here.launch("--cpus", "1", "--name", "n", "--dry-run", "train.py").stdout
        assert f"  live   {tmp_path}/native is not copied: {why}\n" in shown
        out = here.launch("--cpus", "1", "--name", "n", "train.py").stdout
        assert f"launch: not copied: {tmp_path}/native ({why})\n" in out
        assert "saw 1" in out
    finally:
        (site / "_tt_first_editable.pth").unlink()


@pytest.mark.parametrize("target", ["{site}/tt_installed/train.py", "-m tt_installed.train", "tt_installed.train:main"])
def test_a_program_in_site_packages(tmp_path: Path, editable: tuple[Path, str], target: str) -> None:
    site = next(editable[0].glob("env/lib/python*/site-packages"))
    program = (
        "from pathlib import Path\n"
        "def main():\n    print('saw', (Path(__file__).parent / 'data.csv').read_text())\n"
        "    if __name__ == '__main__' and not __spec__:\n        import beside\n"
        "    elif __name__ == '__main__':\n        import in_current_folder\n"
        "if __name__ == '__main__':\n    main()\n"
    )
    write(site / "tt_installed", {"train.py": program, "data.csv": "data", "beside.py": ""})
    write(tmp_path, {"in_current_folder.py": ""})
    here = Project(tmp_path, "local", editable[1])
    here.launch("--cpus", "1", "--name", "n", *target.format(site=site).split())
    assert "saw data" in (tmp_path / "runs/n/logs/1/0.log").read_text()


def test_the_plan_lists_what_is_not_copied_and_why(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            **{f"n{i}.csv": "" for i in range(9)},
            "train.py": "",
            ".env": "TOKEN=1",
            "cache/x": "",
            ".gitignore": "cache/\n",
            "a\x1b[31m.csv": "",
        },
    )
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    os.mkfifo(tmp_path / "pipe")
    here = Project(tmp_path, "local")
    shown = here.launch("--cpus", "1", "--name", "n", "--dry-run", "train.py").stdout
    lines = shown.splitlines()
    start = lines.index("  links  to where it lies; the nodes have to share it, and the run sees later changes:")
    assert lines[start + 1 : start + 6] == [
        "         .env (a secret)",
        "         .gitignore, 'a\\x1b[31m.csv', n0.csv, n1.csv and 7 more (data)",
        "         cache (git ignores it)",
        "  left   not copied:",
        "         pipe (neither a file, a folder nor a link; the program has to make it itself)",
    ]
    assert not (tmp_path / "runs").exists()
    found = json.loads(here.launch("--cpus", "1", "--name", "n", "--dry-run", "--json", "train.py").stdout)
    assert [line.strip() for line in found["code"]] == [line.strip() for line in lines[start : start + 6]]
    out = here.launch("--cpus", "1", "--name", "n", "train.py").stdout
    assert (
        "launch: not copied: pipe (neither a file, a folder nor a link; the program has to make it itself); --dry-run"
        in out
    )
    record = json.loads((tmp_path / "runs/n/snapshot.json").read_text())
    assert record["linked"][".env"] == "a secret"
    assert list(record["left"]) == ["pipe", "runs"]


@pytest.mark.parametrize(
    "target", ["-m exp.train", "exp.train:main", "exp/train.py", ".hidden/train.py", "env/bin/train.py"]
)
def test_a_program_behind_a_link_or_in_a_hidden_folder(tmp_path: Path, target: str) -> None:
    program = "from pathlib import Path\ndef main():\n    import WHERE\n    print('saw', WHERE.V, Path(__file__).with_name('a.bin').read_text())\n"
    program += "if __name__ == '__main__':\n    main()\n"
    where = "beside" if target.endswith(".py") else "exp.beside"
    for folder in ("scratch/exp-2", "p/.hidden", "p/env/bin"):
        write(tmp_path / folder, {"train.py": program.replace("WHERE", where), "beside.py": "V = 1\n", "a.bin": "data"})
    write(tmp_path, {"p/env/pyvenv.cfg": "", "p/env/lib/huge.py": "", "p/.gitignore": ".hidden\nenv\nexp\n"})
    (tmp_path / "p/exp").symlink_to("../scratch/exp-2")
    subprocess.run(["git", "init", "-q", tmp_path / "p"], check=True)
    Project(tmp_path / "p", "local").launch("--cpus", "1", "--name", "n", *target.split())
    assert "saw 1 data" in (tmp_path / "p/runs/n/logs/1/0.log").read_text()
    copies = [path for path in (tmp_path / "p/runs/n/code").rglob("beside.py") if not path.is_symlink()]
    assert copies


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a checkout to a second user")
def test_a_checkout_of_another_user_with_settings_that_name_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(
        tmp_path / "p", {"train.py": "print('saw', open(__file__.replace('train.py', 'a.bin')).read())\n", "a.bin": "1"}
    )
    write(tmp_path, {"command": f"#!/bin/sh\ntouch {tmp_path}/executed\ncat\n", "home/.profile": ""})
    (tmp_path / "command").chmod(0o755)
    subprocess.run(["git", "init", "-q", tmp_path / "p"], check=True)
    subprocess.run(["git", "-C", tmp_path / "p", "add", "--all"], check=True)
    for key in ("core.fsmonitor", "filter.f.clean", "diff.external", "core.pager", "core.sshCommand", "core.editor"):
        subprocess.run(["git", "-C", tmp_path / "p", "config", key, tmp_path / "command"], check=True)
    for path in [tmp_path / "p", *(tmp_path / "p").rglob("*")]:
        os.chown(path, 65534, 65534)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # without safe.directory
    out = Project(tmp_path / "p", "local").launch("--cpus", "1", "--name", "n", "train.py").stdout
    assert "saw 1" in out
    assert not (tmp_path / "p/runs/n/code/a.bin").is_symlink()
    assert not (tmp_path / "executed").exists()


def test_pythonpath_outside_of_the_project_is_copied_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {f"{name}/tt_pathed.py": f"V = '{name}'\n" for name in ("one", "two")})
    write(tmp_path, {"p/src/tt_pathed.py": "V = 'src'\n", "p/scripts/train.py": PATHED})
    subprocess.run(["git", "init", "-q", tmp_path / "p"], check=True)
    here = Project(tmp_path / "p", "local")
    own = os.environ.get("PYTHONPATH", "")
    for number, order in enumerate((["one", "p/src", "two"], ["p/src", "two", "one"], ["two", "one"])):
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*(str(tmp_path / name) for name in order), own]))
        here.launch("--cpus", "1", "--name", f"n{number}", "scripts/train.py")
        first = order[0].rpartition("/")[2]
        log = (tmp_path / f"p/runs/n{number}/logs/1/0.log").read_text()
        assert log.splitlines()[-1].split() == ["saw", first, first, "True", "True"]


PATHED = """
import subprocess, sys, tt_pathed
child = "import tt_pathed; print(tt_pathed.V, '/runs/n' in tt_pathed.__file__)"
printed = subprocess.run([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True).stdout.split()
print("saw", tt_pathed.V, printed[0], "/runs/n" in tt_pathed.__file__, printed[1])
"""


def test_without_git_the_folder_of_the_command_travels(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom pathlib import Path\nsys.path.append(str(Path(__file__).parents[1]))\nimport sibling.m\n"
        "print('saw', sibling.m.V, (Path(__file__).parents[1] / 'data/a.csv').read_text())\n"
    )
    write(tmp_path, {"scripts/train.py": script, "sibling/m.py": "V = 1\n", "data/a.csv": "data"})
    here = Project(tmp_path, "local")
    here.launch("--cpus", "1", "--name", "n", "scripts/train.py")
    assert "saw 1 data" in (tmp_path / "runs/n/logs/1/0.log").read_text()
    assert not (tmp_path / "runs/n/code/sibling/m.py").is_symlink()


def test_a_script_in_the_runs_folder(tmp_path: Path) -> None:
    """The copy that an earlier run made is a project of its own."""
    write(tmp_path, {"train.py": "import beside\nprint('saw', beside.V)\n", "beside.py": "V = 1\n"})
    here = Project(tmp_path, "local")
    here.launch("--cpus", "1", "--name", "one", "train.py")
    (tmp_path / "beside.py").write_text("V = 2\n")
    here.launch("--cpus", "1", "--name", "two", "runs/one/code/train.py")
    assert "saw 1" in (tmp_path / "runs/two/logs/1/0.log").read_text()
    write(
        tmp_path,
        {"runs/here.py": "import beside_here\nprint('saw', beside_here.V)\n", "runs/beside_here.py": "V = 3\n"},
    )
    here.launch("--cpus", "1", "--name", "three", "runs/here.py")
    assert "saw 3" in (tmp_path / "runs/three/logs/1/0.log").read_text()
    assert (tmp_path / "runs/three/code/one").is_symlink()
