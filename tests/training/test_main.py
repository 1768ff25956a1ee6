from __future__ import annotations

import signal
from pathlib import Path

import pytest

from training.__main__ import main
from training.files import read_lines


@pytest.mark.slow
def test_a_run_without_the_launcher(tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        flags = ["--dataset", str(small), "--max-steps", "2", "--log-with=", "--cache", str(tmp_path / "cache")]
        assert main([str(tmp_path / "run"), *flags]) == 0
        assert "'samples': 23" in capsys.readouterr().out
        (tmp_path / "run" / "stop").touch()
        assert main([str(tmp_path / "run"), *flags, "--max-steps=4"]) == 2
        assert "--max-steps is given twice" in capsys.readouterr().err
        assert main([str(tmp_path / "run"), *flags[:2], *flags[4:]]) == 3
        assert [line["step"] for line in read_lines(tmp_path / "run" / "events.jsonl")][-1] == 3
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_help_and_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--batch-size" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["run", "--dataset", "/nowhere"]) == 2
    assert "no such folder" in capsys.readouterr().err
