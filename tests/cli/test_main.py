"""What the command line says of itself and of errors, whatever the command."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from simmp_fast import cli
from simmp_fast.cli import COMMANDS, build_parser, main
from simmp_fast.cli.explain import explained
from simmp_fast.messages import Note


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


def test_short_memory_is_explained_without_importing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ops", "training.errors", "evaluation.inference"):
        monkeypatch.setitem(sys.modules, f"simmp_fast.{name}", None)  # an import of it fails
    assert explained(MemoryError()) == ("not enough memory (MemoryError); a smaller batch may fit", 1)


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Exit status and lines of a command that raises `error`."""

    def run(arguments: object) -> None:
        raise error

    monkeypatch.setattr(cli.info, "run", run)
    return [str(main(["info"])), *capsys.readouterr().err.splitlines()]


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, first, *_, error, last = failing(RuntimeError("a mistake of the program"), monkeypatch, capsys)
    assert (status, first) == ("1", "Traceback (most recent call last):")
    assert error == "RuntimeError: a mistake of the program"
    assert last.startswith("simmp-fast info: this is a defect of the program. Please report it")
    assert f"simmp_fast {cli.__version__}, torch {torch.__version__}, Python" in last


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (OSError(errno.ENOSPC, "No space", "a.npy"), 2, "a.npy: No space; free some space and run the command again"),
        (OSError(errno.ENOSPC, "No space", b"a\x1b"), 2, r"a\x1b: No space; free some space and run the command again"),
        (OSError(errno.EXDEV, "Odd device", "a", None, "b"), 2, "a -> b: Odd device; mend that and run the command"),
        (OSError(errno.EMFILE, "Too many"), 2, "a file or a connection, HERE: Too many; raise the limit on open files"),
        (OSError("it\nis odd"), 2, "a file or a connection, HERE: it is odd; mend that and run the command again"),
        (TimeoutError(), 2, "a file or a connection, HERE: TimeoutError; mend that and run the command again"),
        (OSError(errno.ENOMEM, "No memory"), 1, "not enough memory ([Errno 12] No memory); a smaller batch may fit"),
        (RuntimeError("can't start new thread"), 1, "no thread can be started; raise the limit on processes (ulimit"),
        (
            UnicodeEncodeError("ascii", "\u00e9t\u00e9", 0, 1, ""),
            2,
            "'\u00e9t\u00e9': cannot be written as ascii; run the",
        ),
    ],
)
def test_errors_of_the_system_are_a_line(
    error: Exception, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    got, *lines = failing(error, monkeypatch, capsys)
    assert (got, len(lines)) == (str(status), 1)
    said = re.sub(r"in simmp_fast/cli/__init__\.py, line \d+", "HERE", lines[0])
    assert said.startswith(f"simmp-fast info: {line}")


def test_a_note_is_one_line_and_other_warnings_are_as_always(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(arguments: object) -> None:
        for _ in range(2):
            warnings.warn(Note("a\x1b.npy: odd"), stacklevel=2)
        warnings.warn("of a library", stacklevel=2)

    monkeypatch.setattr(cli.info, "run", run)
    before = warnings.showwarning
    with pytest.warns(UserWarning, match="of a library"):
        assert main(["info"]) == 0
    assert warnings.showwarning is before
    assert capsys.readouterr().err.splitlines() == [r"simmp-fast info: note: a\x1b.npy: odd"] * 2


def test_results_hold_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli.info, "run", lambda arguments: print("a\x1b]0;title\x07\r.png\u202e", "b", sep="\n"))
    assert main(["info"]) == 0
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\\r.png\\u202e\nb\n"


@pytest.mark.parametrize("argument", ["x" * 10000, "--odd=\x1b]0;t\x07\nnext", "\x1b[2J"])
def test_errors_in_arguments_are_one_line(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        [argument],
        ["info", "run", argument],
        ["train", "--data", "a", "--run", "b", "--backend", argument],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert len(said[said.index(": error: ") :]) < 400
        assert said[said.index(": error: ") :].count("\n") == 1
        assert all(character.isprintable() or character == "\n" for character in said)


@pytest.mark.parametrize("value", ["0", "-1", "x", "1.5"])
def test_batch_sizes_that_are_none(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "run", "--data", "cache", f"--batch-size={value}"])
    assert stopped.value.code == 2
    assert f"--batch-size: got {value!r}, expected a whole number from 1 to 65536" in capsys.readouterr().err


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
