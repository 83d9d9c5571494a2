"""What `tests/gpu/sanitize.sh` says, with a stand-in for compute-sanitizer, and the choice of cases."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from sanitized import CASES, FINISHED, chosen, main

SCRIPT = Path(__file__).parent / "gpu" / "sanitize.sh"
# memcheck is clean, racecheck finds something, synccheck says that it is and ends early, initcheck has no end.
TOOL = f"""#!/bin/sh
echo "$@" >> "$CALLS"
echo "context_attention dim_96 half"
case $2 in
memcheck) echo "{FINISHED}" ;;
racecheck) echo "========= Error: Race reported between Write access and Read access" && exit 1 ;;
initcheck) echo "========= Uninitialized __global__ memory read of size 4 bytes" && exec sleep 60 ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL, encoding="utf-8")
    tool.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls")}


def sanitize(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("beside", [(), ("-j",)], ids=["in turn", "at once"])
def test_a_verdict_a_tool(environment: dict[str, str], tmp_path: Path, beside: tuple[str, ...]) -> None:
    logs = tmp_path / "logs"
    done = sanitize(environment, "-o", str(logs), *beside, "memcheck", "racecheck", "synccheck")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "memcheck: clean, 1 cases",
        f"racecheck: FAILED in case 1, exit status 1, see {logs}/racecheck.log",
        f"synccheck: FAILED in case 1, exit status 0, see {logs}/synccheck.log",
    ]
    assert "Race reported" in (logs / "racecheck.log").read_text()


def test_without_a_folder_the_log_is_shown(environment: dict[str, str]) -> None:
    done = sanitize(environment)
    assert done.stdout.splitlines() == [
        "memcheck: clean, 1 cases",
        "racecheck: FAILED in case 1, exit status 1, see below",
    ]
    assert "Race reported" in done.stderr
    assert sanitize(environment, "memcheck").returncode == 0


def test_chosen_cases(environment: dict[str, str], tmp_path: Path) -> None:
    sanitize(environment, "-c", "powerset_loss:odd split_attention", "-k", "half", "memcheck")
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.endswith("tests/gpu/sanitized.py powerset_loss:odd split_attention --class half")
    assert "--report-api-errors no" in call


def test_a_tool_that_is_cut_has_a_verdict(environment: dict[str, str], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    command = ["sh", str(SCRIPT), "-o", str(logs), "-j", "memcheck", "initcheck"]
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    assert running.stdout.readline() == "memcheck: clean, 1 cases\n"
    deadline = time.monotonic() + 30
    while "Uninitialized" not in (logs / "initcheck.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    output, _ = running.communicate(timeout=20)
    assert running.returncode == 1
    assert output == "initcheck: CUT in case 1, 1 lines of findings so far\n"


@pytest.mark.parametrize("arguments", [("lint",), ("-x",)])
def test_wrong_arguments(environment: dict[str, str], tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = sanitize(environment, *arguments)
    assert done.returncode == 2
    assert "memcheck, racecheck, synccheck or initcheck" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_names_of_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert chosen([]) == list(CASES)
    assert chosen(["powerset_loss:odd", "decay_weights"]) == [
        ("decay_weights", "network_paper"),
        ("powerset_loss", "odd"),
    ]
    assert main(["powerset_loss:even"]) == 2
    assert "got 'powerset_loss:even', expected assign_clusters:past_a_tile_cosine" in capsys.readouterr().err
