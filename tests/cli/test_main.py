"""What the command line says of itself and of errors, whatever the command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simmp_fast import cli
from simmp_fast.cli import COMMANDS, build_parser, main


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_a_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli.info, "run", run)
    assert main(["info"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("simmp-fast info: not enough memory (")


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: object) -> None:
        raise RuntimeError("a mistake of the program")

    monkeypatch.setattr(cli.info, "run", run)
    with pytest.raises(RuntimeError, match="a mistake of the program"):
        main(["info"])


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_batch_sizes_that_are_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "run", "--data", "cache", f"--batch-size={value}"])
    assert stopped.value.code == 2
    assert f"--batch-size: got {value!r}, expected a whole number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", [module.__name__.rsplit(".", 1)[-1] for module in COMMANDS])
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([name, "--help"])
    assert stopped.value.code == 0
    assert f"simmp-fast {name}" in capsys.readouterr().out.split("example:")[1]


def examples() -> list[str]:
    """Every command line that a command's help shows."""
    actions = next(action for action in build_parser()._actions if hasattr(action, "choices") and action.choices)
    lines = [line.strip() for parser in actions.choices.values() for line in (parser.epilog or "").splitlines()]
    return [line for line in lines if line.startswith(("simmp-fast ", "torchrun "))]


def test_examples_of_the_help_can_be_run() -> None:
    shown = examples()
    assert {line.split()[1] for line in shown if line.startswith("simmp-fast")} == {
        module.__name__.rsplit(".", 1)[-1] for module in COMMANDS
    }
    for line in shown:
        words = shlex.split(line, comments=True)
        arguments = words[words.index("simmp_fast.cli") + 1 :] if words[0] == "torchrun" else words[1:]
        assert build_parser().parse_args(arguments).command == arguments[0], line


PRINTS = """
import sys
from simmp_fast import cli
cli.info.run = lambda arguments: print("x" * {letters})
sys.exit(cli.main(sys.argv[1:]))
"""


def info_that_prints(letters: int, redirected: str) -> subprocess.CompletedProcess[str]:
    """A command that only prints, its streams redirected by a shell, which prints its status."""
    script = PRINTS.format(letters=letters)
    line = '{ "$0" -c "$1" info; echo "status $?" >&3; } 3>&1 ' + redirected
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    return subprocess.run(
        ["bash", "-c", line, sys.executable, script], capture_output=True, text=True, timeout=60, env=environment
    )


@pytest.mark.skipif(os.name != "posix", reason="pipes of a shell")
def test_output_that_nobody_reads_ends_quietly() -> None:
    found = info_that_prints(100000, ">&1 | exec true")
    assert found.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("letters", [10, 100000], ids=["buffered", "written at once"])
def test_a_full_disk_behind_the_output_is_a_sentence(letters: int) -> None:
    found = info_that_prints(letters, "> /dev/full")
    assert found.stdout == "status 2\n"
    (line,) = found.stderr.splitlines()
    assert line.startswith("simmp-fast")
    assert "No space left on device" in line


@pytest.mark.skipif(os.name != "posix", reason="redirections of a shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_end_no_command(closed: str) -> None:
    found = info_that_prints(10, closed)
    assert found.stdout.endswith("status 0\n")
    assert found.stderr == ""


@pytest.mark.parametrize("command", ["info", "evaluate --data cache", "predict scan.png --out labels.png"])
def test_a_name_that_the_system_refuses_is_a_sentence(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name = "x" * 300
    first, *more = command.split()
    assert main([first, name, *more, *([] if first == "info" else ["--device", "cpu"])]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"simmp-fast {first}: ")
