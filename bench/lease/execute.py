"""Runs the stages of a call: bounded, apart from one another, and with everything they find kept as they find it.

What comes home lies in one folder of at most `MOST_FILES` files, which are whole whenever they are looked at:

    lease.jsonl     when each stage began and how it ended: also the record of what is done
    tests.jsonl     a line a test
    results.jsonl   a row a measurement
    log.txt         all that the stages say
    measured.txt    configurations that the tuning kept
    bundle.tar.gz   the stages' own files: logs, profiles, reports
    table.md        the short table of all that
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from . import table
from .plan import Call, Stage
from .record import Mirror, append, read

ROOT = Path(__file__).parents[2]
MOST_FILES = 8
RECORD, TESTS, RESULTS, LOG, BUNDLE, TABLE = (
    "lease.jsonl", "tests.jsonl", "results.jsonl", "log.txt", "bundle.tar.gz", "table.md",
)  # fmt: skip
OK, FAILED, CUT, MISSING, BEFORE = "ok", "failed", "cut", "passed over", "done before"
# Folders of the work that stay on the machine, and the largest file that is packed.
CACHES = ("triton", "inductor", "torch-home")
LARGEST_FILE = 4 * 2**20
# Seconds: between two looks at what stages wrote, between two bundles, for a stage to end once asked, kept for the end,
# and left for a stage to begin.
TICK, PACKED, GRACE, RESERVE, LEAST = 0.5, 5.0, 4.0, 10.0, 5.0
MEASURED = ROOT / "simmp_fast" / "kernels" / "measured.txt"


_LIBC = ctypes.CDLL(None)


def _dies_with_parent() -> None:
    """In the child: be killed when the parent is, however it ends (Linux)."""
    _LIBC.prctl(1, signal.SIGKILL)


def filled(text: str, places: Mapping[str, object]) -> str:
    """`text` with the places of the plan, such as ``{here}``, filled in; other braces stay."""
    for name, place in places.items():
        text = text.replace("{" + name + "}", str(place))
    return text


def done_before(paths: Sequence[Path]) -> set[str]:
    """The stages that ended well, by records of earlier calls."""
    return {line["stage"] for path in paths for line in read(path) if line.get("status") == OK and "stage" in line}


class Runner:
    """Runs calls into one folder.

    Args:
        out: what comes home; made where it is missing.
        work: caches and the stages' own files; stays on the machine.
        before: names of stages that are passed over, done by an earlier call.
        environment: of the stages; by default this process's.
        say: takes each line about what happens.

    Attributes:
        commit: of the code, for the record.
    """

    def __init__(
        self,
        out: Path,
        work: Path,
        before: set[str] = frozenset(),  # type: ignore[assignment]
        environment: dict[str, str] | None = None,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self.out, self.work, self.before, self.say = out.resolve(), work.resolve(), before, say
        for folder in (self.out, self.work / "stages"):
            folder.mkdir(parents=True, exist_ok=True)
        self.cache = self.work / "triton"
        self.commit: str | None = None
        self.environment = dict(os.environ if environment is None else environment)
        self.environment |= {
            "TRITON_CACHE_DIR": str(self.cache),
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "SIMMP_FAST_TEST_LOG": str(self.out / TESTS),
            "PYTHONUNBUFFERED": "1",
        }
        paths = [str(ROOT), *filter(None, [self.environment.get("PYTHONPATH")])]
        self.environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._rows = Mirror(self.out / RESULTS)
        self._watched: list[Path] = []
        self._stopping = threading.Event()
        self._over = threading.Event()
        self._log_lock = threading.Lock()

    def note(self, **line: Any) -> None:
        """A line of the record."""
        append(self.out / RECORD, {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **line})

    def run(self, call: Call, seconds: float | None = None, first: Sequence[Stage] = ()) -> int:
        """Run the stages of a call; 0 if all of them ended well, 1 otherwise.

        Args:
            call: of the plan.
            seconds: for the whole call, in place of the plan's.
            first: stages that go before it, one after the other; if one fails nothing else begins.
        """
        self._stopping.clear()
        self._over.clear()
        deadline = time.monotonic() + (seconds or call.seconds) - RESERVE
        keeper = threading.Thread(target=self._keep, daemon=True)
        keeper.start()
        well = True
        try:
            for stage in first:
                if self._wave([stage], call, deadline) != [OK]:
                    return 1
            for wave in call.waves:
                left = [stage for stage in wave if stage.name not in self.before]
                for stage in wave:
                    if stage not in left:
                        self.say(f"{stage.name}: {BEFORE}")
                if left and deadline - time.monotonic() < LEAST:
                    self.note(event="left", call=call.name, stages=[stage.name for stage in left])
                    self.say(f"no time is left for {', '.join(stage.name for stage in left)}")
                    well = False
                elif left:
                    well &= all(status == OK for status in self._wave(left, call, deadline))
        finally:
            self._over.set()
            keeper.join()
            self._collect()
            self.pack()
            self.say(self.summary())
        return 0 if well else 1

    def stop(self) -> None:
        """Ask the stages to end; `run` then returns."""
        self._stopping.set()

    def _wave(self, stages: Sequence[Stage], call: Call, deadline: float) -> list[str]:
        found: dict[str, str] = {}

        def one(stage: Stage) -> None:
            found[stage.name] = self._stage(stage, call, deadline)

        threads = [threading.Thread(target=one, args=(stage,)) for stage in stages]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._stopping.is_set():
            raise KeyboardInterrupt
        return [found.get(stage.name, FAILED) for stage in stages]

    def _stage(self, stage: Stage, call: Call, deadline: float) -> str:
        here = self.work / "stages" / stage.name
        shutil.rmtree(here, ignore_errors=True)  # what an earlier call left there came home with it
        here.mkdir(parents=True)
        places: dict[str, object] = {
            "python": sys.executable,
            "work": self.work,
            "here": here,
            "cache": self.cache,
            "out": self.out,
        }
        places["demo"] = self.environment.get("SIMMP_FAST_DEMO_CACHE") or here / "no demo"
        if stage.wants is not None and not Path(filled(stage.wants[0], places)).exists():
            self.say(f"{stage.name}: {MISSING}, it wants {stage.wants[1]}")
            self.note(event="ended", call=call.name, stage=stage.name, status=MISSING, seconds=0)
            return MISSING
        limit = min(stage.seconds, deadline - time.monotonic())
        command = [filled(part, places) for part in stage.command]
        self.note(event="started", call=call.name, stage=stage.name, limit=round(limit, 1), command=command)
        self.say(f"{stage.name}: at most {limit:.0f} s")
        if stage.rows:
            self._watched.append(here / RESULTS)
        begun, known = time.monotonic(), self._compiled()
        status, code = self._process(stage, command, here, limit)
        seconds = round(time.monotonic() - begun, 1)
        new = self._compiled() - known
        self.note(
            event="ended", call=call.name, stage=stage.name, status=status, exit=code, seconds=seconds, kernels=new,
            commit=self.commit,
        )  # fmt: skip
        more = f", {new} kernels more in the cache" if new else ""
        self.say(f"{stage.name}: {status} after {seconds:.0f} s{more}")
        if status == FAILED:
            for line in (here / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()[-12:]:
                self.say(f"    {line}")
        return status

    def _process(self, stage: Stage, command: list[str], here: Path, limit: float) -> tuple[str, int | None]:
        environment = {**self.environment, "PYTHON": sys.executable}
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_dies_with_parent,
            )  # fmt: skip
        except OSError as error:
            (here / "log.txt").write_text(f"{command[0]}: {error}\n", encoding="utf-8")
            return FAILED, None
        assert process.stdout is not None
        reader = threading.Thread(target=self._read, args=(stage.name, process.stdout, here / "log.txt"), daemon=True)
        reader.start()
        end, cut = time.monotonic() + limit, False
        while process.poll() is None:
            if time.monotonic() >= end or self._stopping.is_set():
                cut = True
                self._end(process)
                break
            time.sleep(0.1)
        reader.join(timeout=2)
        return (CUT if cut else OK if process.returncode == 0 else FAILED), process.returncode

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Stop a stage with all that it started: ask first, then kill."""
        for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
        with contextlib.suppress(ProcessLookupError):  # what outlived its leader
            os.killpg(process.pid, signal.SIGKILL)

    def _read(self, name: str, stream: IO[bytes], path: Path) -> None:
        """Everything a stage says goes to its own log and, line by line, to the common one."""
        with open(path, "wb") as own:
            for line in iter(stream.readline, b""):
                own.write(line)
                own.flush()
                with self._log_lock, open(self.out / LOG, "ab") as log:
                    log.write(f"{name} | ".encode() + line)

    def _compiled(self) -> int:
        """Kernels in Triton's cache."""
        return sum(1 for _ in self.cache.glob("*/*.cubin")) if self.cache.is_dir() else 0

    def _keep(self) -> None:
        """Until the call is over: rows come home within a moment, the bundle every few seconds."""
        packed = time.monotonic()
        while not self._over.wait(TICK):
            self._collect()
            if time.monotonic() - packed > PACKED:
                self.pack()
                packed = time.monotonic()

    def _collect(self) -> None:
        for path in list(self._watched):
            self._rows.take(path)
        if MEASURED.exists():
            kept = self.out / MEASURED.name
            if not kept.exists() or kept.read_bytes() != MEASURED.read_bytes():
                shutil.copyfile(MEASURED, self.out / "new.tmp")
                os.replace(self.out / "new.tmp", kept)

    def pack(self) -> None:
        """Write the bundle and the table anew, each in one step."""
        fresh = self.out / "new.tmp"
        with tarfile.open(fresh, "w:gz", compresslevel=3) as bundle:
            for path in sorted((self.work / "stages").rglob("*")):
                try:
                    if path.is_file() and path.stat().st_size <= LARGEST_FILE:
                        bundle.add(path, path.relative_to(self.work / "stages"))
                except OSError:  # a stage took its file away meanwhile
                    continue
        os.replace(fresh, self.out / BUNDLE)
        fresh.write_text(self.summary() + "\n", encoding="utf-8")
        os.replace(fresh, self.out / TABLE)

    def summary(self) -> str:
        """The short table of what the folder holds."""
        return table.summary(self.out, self.work / "stages")
