"""Runs an operation again and again, each time spoiled at another call, and looks at what is left.

Each attempt is a forked child that works in a fresh copy of a small folder: so every call can be taken, not a sample of
them. The process that forked it judges the copy.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_calls import ACTIONS, SIGNAL_TWICE, Action, Calls
from tqdm import tqdm

# tqdm's own lock is one for all forked processes: one that is killed while it holds it would stop all others for good.
tqdm.set_lock(threading.RLock())

SECONDS = 120  # after which an attempt hangs
USERS = {"notes.txt": b"a user's notes", ".0123456789ab-notes.txt": b"hidden ones"}
REPLACES = ("kill", "torn", "full")  # the short form where older files give way to new ones
_HEX = re.compile(r"\.simmp-fast-[^/]+?-\d+-[0-9a-f]{12}-")


class Lost(Exception):  # noqa: N818 - a verdict
    """What should have survived did not."""


class Scenario:
    """An operation, what it works on, and how the result is judged.

    Attributes:
        name: for the command line and the report.
        users: folders (relative) in which files of the user lie, which nothing may touch.
        meanwhile: names that may be there between a failure and the next success.
        mixed: whether some files may be old and others new.
        rolls_back: whether that holds for a killed process only: a failure that is reported has changed nothing.
        ignored: names that no comparison looks at.
        actions: what is done to it.
        short: what the short form does.
        stride: of the short form; 1 takes every call.
        assets: a folder for what is only read.
    """

    name = ""
    users: tuple[str, ...] = (".",)
    meanwhile: tuple[str, ...] = ()
    mixed = False
    rolls_back = False
    ignored: tuple[str, ...] = ()
    actions: tuple[str, ...] = tuple(ACTIONS)
    short: tuple[str, ...] = ("kill",)
    stride = 1
    assets: Path
    old: dict[str, str]
    new: dict[str, str]
    reference: Path

    def set_up(self) -> None:
        """Make `assets`."""

    def fill(self, place: Path) -> None:
        """Make what is there before the operation."""

    def operate(self, place: Path) -> int | None:
        """The operation. What it returns is an exit status; None is 0."""
        raise NotImplementedError

    def again(self, place: Path) -> int | None:
        """What a user does next."""
        return self.operate(place)

    def state(self, place: Path) -> str:
        """ "old", "new" or, where that may be, "mixed": by the bytes of each file.

        Raises:
            Lost: a file is neither, or gone.
        """
        found = self.snapshot(place)
        kinds = set()
        for name in self.old.keys() | self.new.keys():
            if (before := self.old.get(name)) == (after := self.new.get(name)):
                after = before
            if found.get(name) not in (before, after):
                raise Lost(f"{name} is neither the old nor the new one")
            if before != after:
                kinds.add("old" if found.get(name) == before else "new")
        if len(kinds) < 2:
            return kinds.pop() if kinds else "new"
        if not self.mixed:
            raise Lost(f"old and new files together: {self.parted(found)}")
        return "mixed"

    def finished(self, place: Path) -> None:
        """Raise `Lost` unless `again` ended as an operation that nothing disturbed would."""
        if (state := self.state(place)) != "new":
            raise Lost(f"the next one succeeded and left {state}")

    def snapshot(self, place: Path) -> dict[str, str]:
        """What every file holds by its relative name, but for temporary and ignored ones."""
        found = {}
        for path in sorted(place.rglob("*")):
            name = str(path.relative_to(place))
            if path.is_file() and not _HEX.search(name) and not name.startswith(self.ignored or ("\0",)):
                found[name] = self.checksum(path)
        return found

    def checksum(self, path: Path) -> str:
        """What two files have in common that count as the same."""
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def parted(self, found: dict[str, str]) -> str:
        """Which files are new, for messages."""
        names = [name for name in self.new if self.new[name] != self.old.get(name)]
        return ", ".join(f"{name} {'new' if found.get(name) == self.new[name] else 'old'}" for name in names)

    def names(self, place: Path) -> set[str]:
        """All names in `place`, hidden ones and folders too."""
        every = {str(path.relative_to(place)) for path in place.rglob("*")}
        return {name for name in every if not name.startswith(self.ignored or ("\0",))}


@dataclass
class Result:
    """What one scenario made of one action.

    Attributes:
        calls: how many calls count for the action.
        attempts: how many of them were spoiled.
        record: the calls that count, in order.
        states: how often each state was found.
        losses: a line for each attempt that lost something.
    """

    scenario: str
    action: str
    calls: int
    record: list[str]
    attempts: int = 0
    states: Counter[str] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)


class Harness:
    """One scenario in a folder of its own."""

    def __init__(self, scenario: Scenario, root: Path, calls: Calls) -> None:
        self.scenario, self.calls = scenario, calls
        self.place, self.template, self.reference = root / "place", root / "template", root / "reference"
        self.said = root / "said.txt"
        scenario.assets, scenario.reference = root / "assets", self.reference
        scenario.assets.mkdir()
        self.place.mkdir()
        with _output_to(self.said):
            self._fill()
            scenario.old = scenario.snapshot(self.place)
            shutil.copytree(self.place, self.template, symlinks=True)
            _status(scenario.operate(self.place))
            scenario.new = scenario.snapshot(self.place)
            shutil.copytree(self.place, self.reference, symlinks=True)
            # In this process, so that all that is imported on first use is there before it forks.
            if (state := scenario.state(self.place)) != "new":
                raise Lost(f"undisturbed it leaves {state}")
            _status(scenario.again(self.place))
            scenario.finished(self.place)
            self._known = set().union(*map(scenario.names, (self.template, self.reference, self.place)))

    def _fill(self) -> None:
        self.scenario.set_up()
        self.scenario.fill(self.place)
        for folder in self.scenario.users:
            for name, content in USERS.items():
                (self.place / folder).mkdir(parents=True, exist_ok=True)
                (self.place / folder / name).write_bytes(content)

    def _renew(self) -> None:
        shutil.rmtree(self.place)
        shutil.copytree(self.template, self.place, symlinks=True)

    def record(self, action: Action) -> list[str]:
        """The calls that count for an action, in order."""
        self._renew()

        def work() -> list[str]:
            self.calls.arm(self.place, 0, action)
            self.scenario.operate(self.place)
            return self.calls.record()

        return [_HEX.sub("(temporary) ", line) for line in self._in_child(work)["value"]]

    def run(self, name: str, *, stride: int = 1, show: Callable[[str], None] = lambda line: None) -> Result:
        """Spoil every call of an action, or every `stride`-th."""
        action = ACTIONS[name]
        record = self.record(action)
        result = Result(self.scenario.name, name, len(record), record)
        for number in range(1, len(record) + 1, stride):
            label = f"{self.scenario.name}, {name} at call {number} of {len(record)} ({record[number - 1]})"
            state, lost = self.attempt(number, action)
            if state == "unreached":  # threads make a few calls more or fewer
                continue
            result.attempts += 1
            result.states[state] += 1
            if lost:
                result.losses.append(f"{label}: {lost}")
                show(result.losses[-1])
        show(f"{self.scenario.name}, {name}: {result.attempts} of {len(record)} calls, {dict(result.states)}")
        return result

    def attempt(self, number: int, action: Action) -> tuple[str, str]:
        """Spoil one call.

        Returns:
            the state that was found, and what was lost (empty for nothing).
        """
        self._renew()
        answer = self._in_child(lambda: self._spoiled(number, action))
        said = self.said.read_text(errors="replace")
        if trouble := _trouble(answer, action, said, str(self.place)):
            return "lost", trouble
        how = answer.get("value", {}).get("how")
        return ("unreached", "") if how == "unreached" else self._judge(how == "done", action)

    def _spoiled(self, number: int, action: Action) -> dict[str, str]:
        self.calls.arm(self.place, number, action)
        struck = False
        try:
            try:
                status = self.scenario.operate(self.place) or 0
            finally:
                struck = self.calls.struck()
                self.calls.disarm()
        except KeyboardInterrupt:
            return {"how": "interrupted"}
        except Exception as error:
            return {"how": "error", "type": type(error).__name__, "text": str(error), "named": _names_a_file(error)}
        if status in (130, 143):
            return {"how": "interrupted"}
        if not struck:
            return {"how": "unreached"}
        return {"how": "done"} if status == 0 else {"how": "status", "status": str(status)}

    def _judge(self, done: bool, action: Action) -> tuple[str, str]:
        """In this process, which is another than the one that was spoiled, as a user's next one is."""
        scenario, place = self.scenario, self.place
        state = "lost"
        try:
            with _output_to(self.said):
                self._check_users()
                litter = {name for name in self._litter() if Path(name).name not in scenario.meanwhile}
                if action.tidy and litter:
                    raise Lost(f"left behind: {', '.join(sorted(litter))}")
                state = scenario.state(place)
                if done and state != "new":
                    raise Lost(f"it reported success and left {state}")
                if scenario.rolls_back and state == "mixed" and not action.dies and action.what != SIGNAL_TWICE:
                    raise Lost(f"a failure that is reported left {scenario.parted(scenario.snapshot(place))}")
                _status(scenario.again(place))
                scenario.finished(place)
                self._check_users()
                if litter := self._litter():
                    raise Lost(f"the next one leaves {', '.join(sorted(litter))}")
        except Exception as error:
            what = str(error) if isinstance(error, Lost) else f"{type(error).__name__}: {error}"
            return "lost", f"(found {state}) {what}"
        return state, ""

    def _litter(self) -> set[str]:
        """Names that an undisturbed operation does not leave."""
        return self.scenario.names(self.place) - self._known

    def _check_users(self) -> None:
        for folder in self.scenario.users:
            for name, content in USERS.items():
                path = self.place / folder / name
                if not path.is_file() or path.read_bytes() != content:
                    raise Lost(f"the user's file {folder}/{name} was changed or removed")

    def _in_child(self, work: Callable[[], Any]) -> dict[str, Any]:
        """The value of `work` in a forked process; or the signal that ended it; or its traceback.

        What it prints goes to the file `said`.
        """
        inlet, outlet = os.pipe()
        process = os.fork()
        if process == 0:
            os.close(inlet)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(SECONDS)
            with _output_to(self.said):
                try:
                    answer = {"value": work()}
                except BaseException:
                    self.calls.disarm()
                    answer = {"traceback": traceback.format_exc()}
            os.write(outlet, json.dumps(answer).encode())
            os._exit(0)
        os.close(outlet)
        with open(inlet, "rb") as pipe:
            text = pipe.read()
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            return {"signal": os.WTERMSIG(status)}
        return json.loads(text) if text else {"status": os.WEXITSTATUS(status)}


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """All that the block prints goes to a new file."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    said = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(said)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, handle in enumerate(before, start=1):
            os.dup2(handle, number)
            os.close(handle)


def _status(status: int | None) -> None:
    if status in (130, 143):
        raise KeyboardInterrupt  # somebody stops the harness itself
    if status:
        raise Lost(f"the next one failed with status {status}: {own_words()}")


def own_words() -> str:
    """What this process printed last."""
    sys.stderr.flush()
    return Path("/proc/self/fd/2").read_text(errors="replace")[-600:]


def _names_a_file(error: Exception) -> str:
    """ "yes" for an error that a user can read: one of the package's, or of the system with the name of a file."""
    own = type(error).__name__ in ("DataError", "ConfigError", "TrainingError")
    return "yes" if own or (isinstance(error, OSError) and error.filename is not None) else ""


def _trouble(answer: dict[str, Any], action: Action, said: str, place: str) -> str:
    """What is wrong with how the operation ended; empty for nothing."""
    if "signal" in answer:
        if answer["signal"] == signal.SIGKILL and action.dies:
            return ""
        return f"ended by signal {answer['signal']}{', it hung' if answer['signal'] == signal.SIGALRM else ''}"
    if "value" not in answer:
        return f"ended without an answer: {answer}"
    ending = answer["value"]
    if "Traceback" in said:
        return f"showed a traceback: {said[-1200:]}"
    if ending["how"] == "interrupted" and action.argument not in (signal.SIGINT, signal.SIGTERM):
        return "says that it was interrupted"
    if ending["how"] == "status":
        lines = said.strip().splitlines()
        if ending["status"] not in ("1", "2") or not any("simmp-fast" in line for line in lines):
            return f"status {ending['status']} without an explanation: {said[-600:]}"
        return "" if place in said else f"the message names no file: {said[-600:]}"
    if ending["how"] == "error" and not (ending["named"] and place in ending["text"]):
        return f"raised {ending['type']}: {ending['text']}, expected an error of the package that names a file"
    return ""


@contextmanager
def harness(scenario: Scenario, calls: Calls) -> Iterator[Harness]:
    """A harness in a temporary folder; in memory where that can be, as syncing to a disk takes long."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="simmp-fast-faults-", dir=memory) as folder:
        made = Harness(scenario, Path(os.path.realpath(folder)), calls)
        gc.freeze()
        yield made
