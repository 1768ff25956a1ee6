"""The options of a run are the fields of RunSpec: on the command line, in Python, and in the documentation."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

import launcher
from launcher.cli.launch import parse_request
from launcher.cli.main import main
from launcher.cli.parser import launch_parser
from launcher.errors import BadRequest
from launcher.request.spec import NOT_RESUMED, RunSpec, flag_of, options

FIELDS = {f.name: f for f in fields(RunSpec) if f.name not in ("target", "args")}


def test_every_field_is_an_option_with_help_and_a_default() -> None:
    assert list(options()) == list(FIELDS)
    assert all(option.help and option.metavar for option in options().values())
    assert all(f.default is not MISSING for f in FIELDS.values())


def test_help_documentation_and_signatures_have_each_option() -> None:
    text = launch_parser().format_help()
    for function, known in ((launcher.launch, options()), (launcher.resume, options(NOT_RESUMED))):
        signature = inspect.signature(function)
        keywords = {n: p.default for n, p in signature.parameters.items() if n in known}
        assert keywords == {name: FIELDS[name].default for name in known}
        for name, option in known.items():
            assert re.search(rf"^    {name}: {re.escape(option.help.rstrip('.'))}\.$", function.__doc__ or "", re.M)
            assert f"{flag_of(name)} {option.metavar}" in text
            assert option.help in text
        assert "{options}" not in (function.__doc__ or "")


def test_resume_takes_all_but_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadRequest, match=r"resume\(\) has no option 'gpu' \(did you mean 'gpus'\?\)"):
        launcher.resume("x", gpu=1)
    with pytest.raises(BadRequest, match=r"launch\(\) has no option 'node' \(did you mean 'nodes'\?\)"):
        launcher.launch("m:f", node=1)
    with pytest.raises(SystemExit):
        main(["resume", "x", "--name", "y"])
    assert "unrecognized arguments: --name y" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, option in options().items() if option.least is not None])
def test_a_number_is_a_number_within_its_bounds(name: str) -> None:
    flag, option = f"--{name.replace('_', '-')}", options()[name]
    assert option.least is not None
    for number in (option.least, option.most):
        assert getattr(parse_request([flag, str(number)])[0], name) == number
    wrong: list[tuple[str, str]] = [
        (str(option.least - 1), "is needed"),
        (str(option.most + 1), f"at most {option.most} is allowed"),
        ("9" * 20, f"at most {option.most} is allowed"),
        ("9" * 5000, "a whole number is needed, not 5000 characters"),
        ("٣", "invalid whole value"),
        ("1e3", "invalid whole value"),
        ("nan", "invalid whole value"),
    ]
    for text, words in wrong:
        with pytest.raises(BadRequest, match=words) as refused:
            parse_request([flag, text])
        assert len(str(refused.value)) < 200
    odd: list[Any] = ["1", 1.0, True, 10**6000, -(10**6000)]
    for value in odd:
        with pytest.raises(BadRequest, match=r"whole number is needed|at most|at least|0 or more"):
            RunSpec(**{name: value})
