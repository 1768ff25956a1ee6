"""From the target on the command line to the call on each rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cloudpickle
import pytest

from launcher.errors import BadRequest
from launcher.request import resolve, target
from launcher.request.spec import Target

if TYPE_CHECKING:
    from types import TracebackType

    from training.context import Context

MODULE = """
import sys
from os.path import join as imported
bound = print
if sys.platform:
    def conditional(): ...
class Class:
    def method(self): ...
def main(): ...
def _private(): ...
async def later(): ...
"""


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with module names that no other test imports."""
    folder = tmp_path / "my project"
    for name, text in {
        "tt_module.py": MODULE,
        "train.py": "print('hi')",
        "a b;$(touch pwned).py": "",
        "tt_broken.py": "x = 1\ndef main(:\n",
        "broken.py": "if True\n    pass\n",
        "nul.py": "x = '\0'\n",
        "tt_latin.py": "x = '\udce9'\n",
        "tt_star.py": "from os.path import *",
        "tt_lazy.py": "def __getattr__(name): return print",
        "tt_package/__init__.py": "def top(): ...",
        "tt_package/__main__.py": "",
        "tt_package/inner.py": "def main(): ...",
        "tt_raises.py": "raise RuntimeError('must not be imported')\ndef main(): ...",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, errors="surrogateescape")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "source"),
    [
        ("tt_module:main", "function", "tt_module.py"),
        ("tt_module:_private", "function", "tt_module.py"),
        ("tt_module:bound", "function", "tt_module.py"),
        ("tt_module:imported", "function", "tt_module.py"),
        ("tt_module:conditional", "function", "tt_module.py"),
        ("tt_module:Class.method", "function", "tt_module.py"),
        ("tt_star:join", "function", "tt_star.py"),
        ("tt_lazy:anything", "function", "tt_lazy.py"),
        ("tt_package:top", "function", "tt_package/__init__.py"),
        ("tt_package.inner:main", "function", "tt_package/inner.py"),
        ("tt_raises:main", "function", "tt_raises.py"),
        ("train.py", "script", "train.py"),
        ("./train.py", "script", "train.py"),
        ("tt_package/../train.py", "script", "train.py"),
        ("a b;$(touch pwned).py", "script", "a b;$(touch pwned).py"),
        ("-m train", "module", "train.py"),
        ("-m tt_package", "module", "tt_package/__main__.py"),
        ("-m tt_package.inner", "module", "tt_package/inner.py"),
    ],
)
def test_what_is_found(project: Path, name: str, kind: str, source: str) -> None:
    found, folder = resolve.resolve(name, ["--flag", "a b"], project)
    expected = {"script": str(project / source), "module": name.removeprefix("-m ")}.get(kind, name)
    assert (found.kind, found.name, found.args) == (kind, expected, ("--flag", "a b"))
    assert found.source == (str(project / source),)
    assert folder == project
    assert not any(module.startswith("tt_") for module in sys.modules), "found without being imported"


def test_what_is_installed_does_not_travel(project: Path) -> None:
    found, folder = resolve.resolve("-m submitit.core._submit", [], project)
    assert (found.kind, folder) == ("module", None)
    assert resolve.resolve("json:dumps", [], project)[1] is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nosuch.py", "no such script: nosuch.py (looked for"),
        ("tt_package.py/x.py", "no such script"),
        ("x" * 5000 + ".py", "no such script"),
        ("x" * 5000, "write package.module:function, path/to/script.py or -m module."),
        ("train", "target 'train': write package.module:function, path/to/script.py or -m module. Did you mean ./train.py?"),
        ("tt_package", "write package.module:function"),
        ("", "write package.module:function"),
        (":main", "write package.module:function"),
        ("tt_module:", "write package.module:function"),
        ("tt_module:main()", "write package.module:function"),
        ("tt_module:main; import os", "write package.module:function"),
        ("../tt_module:main", "write package.module:function"),
        ("a b:main", "write package.module:function"),
        ("tt_modul:main", "there is no module 'tt_modul' in"),
        ("tt_modul:main", "(did you mean 'tt_module'?)"),
        ("tt_package.iner:main", "there is no module 'tt_package.iner' in"),
        ("tt_package.iner:main", "(did you mean 'inner'?)"),
        ("tt_module.deeper:main", "there is no module 'tt_module.deeper'"),
        ("sys:exit", "there is no module 'sys'"),
        ("tt_module:mian", "has no function 'mian' (did you mean 'main'?). It has: main"),
        ("tt_module:nothing", "has no function 'nothing'. It has: "),
        ("tt_package:nothing", "It has: top (as tt_package:NAME)."),
        ("tt_broken:main", "tt_broken.py:2: the target is not valid Python: "),
        ("tt_broken:main", "\n    def main(:"),
        ("broken.py", "broken.py:1: the target is not valid Python: expected ':'\n    if True"),
        ("-m broken", "broken.py:1: the target is not valid Python"),
        ("nul.py", "nul.py: the target is not valid Python: source code string cannot contain null bytes"),
        ("tt_latin:main", "tt_latin.py:1: the target is not valid Python: "),
        ("-m nosuch", "target '-m nosuch': there is no module 'nosuch' in"),
        ("-m tt_module.x", "there is no module 'tt_module.x'"),
        ("-m ", "there is no module ''"),
        ("-m ../train", "there is no module '../train'"),
        ("-m tt_package/inner", "there is no module 'tt_package/inner'"),
    ],
)  # fmt: skip
def test_what_is_not(project: Path, name: str, words: str) -> None:
    with pytest.raises(BadRequest) as refused:
        resolve.resolve(name, [], project)
    assert words in str(refused.value)


@pytest.mark.parametrize("package", ["training", "launcher"])
@pytest.mark.parametrize("file", ["{}/__init__.py", "{}.py", "{}/code_without_init.py"])
def test_a_package_of_our_own_name_is_refused_for_a_function_and_both_are_named(
    tmp_path: Path, package: str, file: str
) -> None:
    theirs = tmp_path / file.format(package)
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("def main(): ...")
    (tmp_path / "train.py").touch()
    ours = str(Path(target.__file__).parents[2] / package / "__init__.py")
    with pytest.raises(BadRequest) as refused:
        resolve.check_shadowing(Target("function", "mine:main"), tmp_path)
    assert f"yours at {theirs} and this toolkit's at {ours}" in str(refused.value)
    with pytest.raises(BadRequest, match=f"two packages are called '{package}'"):
        resolve.resolve(f"{package}.mine:main", [], tmp_path)
    for kind in ("script", "module"):
        resolve.check_shadowing(Target(kind, "train.py"), tmp_path)


def test_a_folder_of_our_name_that_holds_no_code_is_fine(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    (tmp_path / "training/data.csv").touch()
    resolve.check_shadowing(Target("function", "mine:main"), tmp_path)


# ---- calling it -----------------------------------------------------------------------------------------------------


def call(target_: Target, pickle: Path = Path("none")) -> Any:
    """Run a target and restore ``__main__``, since this process continues."""
    argv, path, main = list(sys.argv), list(sys.path), {name: sys.modules.get(name) for name in MAIN}
    try:
        return target.call(target_, pickle, lambda: cast("Context", "ctx"))
    finally:
        if target_.kind in ("function", "value"):
            assert (sys.argv, sys.path) == (argv, path), "put back"
        sys.argv, sys.path[:] = argv, path
        sys.modules.update({name: module for name, module in main.items() if module is not None})


MAIN = ("__main__", "__mp_main__")
ECHO = "import sys, tt_beside\nprint(repr((__name__, sys.argv, sys.path[0], tt_beside.VALUE)))\n"


@pytest.mark.parametrize("kind", ["script", "module"])
def test_a_script_and_a_module_run_as_main(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: Any) -> None:
    (tmp_path / "tt_echo.py").write_text(ECHO)
    (tmp_path / "tt_beside.py").write_text("VALUE = 7")
    script = str(tmp_path / "tt_echo.py")
    name = script if kind == "script" else "tt_echo"
    assert call(Target(kind, name, ("a b", "--c=$(d)"), path=(str(tmp_path),))) is None
    assert eval(capsys.readouterr().out) == ("__main__", [script, "a b", "--c=$(d)"], str(tmp_path), 7)
    del sys.modules["tt_beside"]


def test_a_function_and_a_value_are_called(tmp_path: Path) -> None:
    (tmp_path / "tt_called.py").write_text("class A:\n    @staticmethod\n    def f(ctx): return ctx * 2\n")
    assert call(Target("function", "tt_called:A.f", path=(str(tmp_path),))) == "ctxctx"
    factor = 3
    (tmp_path / "t.pkl").write_bytes(cloudpickle.dumps(lambda ctx: ctx * factor))
    assert call(Target("value", "f"), tmp_path / "t.pkl") == "ctxctxctx"
    del sys.modules["tt_called"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tt_absent:f", "module 'tt_absent' cannot be imported:\nModuleNotFoundError"),
        ("tt_bad:f", "tt_bad.py\", line 2, in <module>"),
        ("tt_exits:f", "module 'tt_exits' cannot be imported:\nTraceback"),
        ("tt_good:fuction", "tt_good has no 'fuction' (did you mean 'function'?)"),
        ("tt_good:value", "tt_good:value is int, not a function"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    (tmp_path / "tt_bad.py").write_text("\nimport no_such_package\n")
    (tmp_path / "tt_exits.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "tt_good.py").write_text("value = 1\ndef function(): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BadRequest) as refused:
        target.load(name)
    assert words in str(refused.value)
    assert "launcher/" not in str(refused.value)
    assert "importlib" not in str(refused.value)
    sys.modules.pop("tt_good", None)


def test_a_traceback_begins_in_the_script(tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text("def f():\n    raise KeyError('x')\nf()\n")
    with pytest.raises(KeyError) as raised:
        call(Target("script", str(tmp_path / "fails.py")))
    of_test = cast("TracebackType", raised.tb.tb_next)  # this function and `call` above
    lines = target.short_traceback(raised.value.with_traceback(of_test.tb_next)).splitlines()
    assert lines[1] == f'  File "{tmp_path}/fails.py", line 3, in <module>'


# ---- the path of the ranks ------------------------------------------------------------------------------------------


def test_the_project_on_the_path_is_the_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, code = tmp_path / "project", tmp_path / "runs/r/code"
    site = root / ".venv/lib/python3/site-packages"
    monkeypatch.setattr(sys, "path", ["", str(root / "src"), "/usr/lib/python3", str(site), str(root / "src"), "lib"])
    root.mkdir()
    monkeypatch.chdir(root)
    expected = [code / "pkg", code, code / "src", code / "lib"]
    assert resolve.python_path(root, code, root / "pkg") == tuple(map(str, expected))
