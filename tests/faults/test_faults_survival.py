"""Killed, interrupted or failed at any call, the program loses nothing: the short form of ``python tests/faults``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fault_calls import HERE, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="needs Linux and a C compiler (cc)")

# Each group is one process: importing takes as long as dozens of attempts.
GROUPS = {
    "checkpoints": ("checkpoint", "checkpoint, the first", "best weights"),
    "networks": ("save_pretrained", "save_pretrained, new folder", "convert"),
    "caches": ("prepare, new folder", "prepare, empty folder", "prepare --force"),
    "results": ("evaluate", "evaluate, new folder", "predict --overwrite", "predict, new folder"),
    "runs": ("training run",),
}


def faults(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(HERE), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("group", GROUPS)
def test_nothing_is_lost_at_any_call(tmp_path: Path, group: str) -> None:
    done = faults("--short", "--json", str(tmp_path / "results.json"), "--scenario", *GROUPS[group])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["scenario"] for result in results} == set(GROUPS[group])
    for result in results:
        assert result["calls"] > 0, result
        assert group == "runs" or result["attempts"] == result["calls"], result
        assert result["states"].keys() <= {"old", "new", "mixed", "resumed"}, result
    if group == "checkpoints":
        check_writers(results[0]["record"])


def check_writers(calls: list[str]) -> None:
    """Fail unless the calls of Python and of PyTorch's C++ are seen in those of a checkpoint."""
    assert [call for call in calls if call.startswith("writev") and call.endswith("last.state.pt")], calls
    assert [call for call in calls if call.startswith("write ") and "state" not in call], calls
    assert [call for call in calls if call.startswith("fsync") and call.endswith("last.state.pt")], calls
    assert "rename /run/last.safetensors" in calls


def test_every_scenario_is_in_a_group() -> None:
    sources = "".join((HERE / name).read_text() for name in ("fault_results.py", "fault_training.py"))
    assert sorted(re.findall('^    name = "(.+)"$', sources, re.MULTILINE)) == sorted(sum(GROUPS.values(), ()))


def test_planted_defects_are_seen(tmp_path: Path) -> None:
    seen = {
        ("in place", "kill"): "file is neither the old nor the new one",
        ("in place", "torn"): "file is neither the old nor the new one",
        ("silent", "enospc"): "it reported success and left old",
        ("nameless", "enospc"): "raised RuntimeError: oh",
        ("untidy", "kill"): "the next one leaves .new0",
        ("greedy", "enospc"): "the user's file ./.0123456789ab-notes.txt was changed or removed",
    }
    defects = dict.fromkeys(f"planted: {defect}" for defect, _ in seen)
    words = ["--json", str(tmp_path / "results.json"), "--action", "kill", "torn", "enospc"]
    done = faults(*words, "--scenario", *defects)
    assert done.returncode == 1, done.stdout + done.stderr
    losses = {
        (result["scenario"], result["action"]): " ".join(result["losses"])
        for result in json.loads((tmp_path / "results.json").read_text())
    }
    for (defect, action), words in seen.items():
        assert words in losses[f"planted: {defect}", action], (defect, action)
