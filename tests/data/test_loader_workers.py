"""Trouble in loading processes ends in a sentence: too little shared memory, a killed process, an error in one."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from simmp_fast.data import loader
from simmp_fast.data.cache import Cache, CacheWriter
from simmp_fast.data.errors import DataError
from simmp_fast.data.preprocess import Geometry, Intensity, Recipe

COUNT, SIDE = 40, 32
BATCH_BYTES = 4 * SIDE * SIDE * (4 + 8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = tmp_path_factory.mktemp("cache")
    recipe = Recipe("x", ("a", "b"), 1, SIDE, Intensity("range", 0, 255))
    rng = np.random.default_rng(0)
    with CacheWriter(folder, recipe, COUNT, "uint8") as writer:
        images = rng.random((COUNT, 1, SIDE, SIDE), dtype=np.float32)
        labels = rng.integers(0, 2, (COUNT, SIDE, SIDE)).astype(np.uint8)
        writer.add("one", "one", images, labels, labels, Geometry((COUNT, SIDE, SIDE)))
        writer.finish({"train": ["one"], "validation": [], "test": []})
    return Cache.open(folder)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading processes inherit what a test changed."""
    if torch.multiprocessing.get_start_method() != "fork":
        pytest.skip("needs loading processes that are forked")


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=size))


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="shared memory has no folder here")
def test_too_little_shared_memory_is_refused_before_processes_start(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = (2 * 2 + 2) * BATCH_BYTES * 17 // 16
    free(monkeypatch, need - 1)
    message = (
        r"^/dev/shm: got 0\.3 MiB free, expected 0\.3 MiB for 2 processes that load batches of 4 slices \(0\.0 MiB each"
        r"\): set train\.workers to 0 .*--shm-size"
    )
    with pytest.raises(DataError, match=message):
        loader.slice_loader(cache, "train", 4, workers=2)
    loader.slice_loader(cache, "train", 4, workers=0)
    loader.slice_loader(cache, "train", 4, workers=1)
    # The last three batches need less than six.
    loader.slice_loader(cache, "train", 4, workers=2, start_batch=7)
    free(monkeypatch, need)
    loader.slice_loader(cache, "train", 4, workers=2)
    # Processes that train on one machine share its memory.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    loader.slice_loader(cache, "train", 4, workers=2)
    with pytest.raises(DataError, match=r"expected 0\.5 MiB for 2 x 2 processes"):
        loader.slice_loader(cache, "train", 4, workers=2, ranks=2)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGBUS"])
def test_a_killed_process_is_named(cache: Cache, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def die(*_: object) -> None:
        assert get_worker_info() is not None
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(loader, "augment_sample", die)
    with pytest.raises(DataError, match=r"train\.workers: a loading process was lost \(DataLoader worker .*train\.wor"):
        list(loader.slice_loader(cache, "train", 4, workers=1))


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.ENOSPC])
def test_processes_that_cannot_start(cache: Cache, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", refuse)
    with pytest.raises(DataError, match=rf"train\.workers: got 1, which cannot be started \({os.strerror(code)}\)"):
        list(loader.slice_loader(cache, "train", 4, workers=1))


def test_the_loss_of_a_process_is_seen_wherever_the_main_thread_is() -> None:
    with pytest.raises(DataError, match="was lost .DataLoader worker .pid 7. is killed"), loader.worker_errors():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    with pytest.raises(RuntimeError, match="^CUDA"), loader.worker_errors():
        raise RuntimeError("CUDA error")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_process_keeps_its_words(cache: Cache, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    def damaged(*_: object) -> None:
        raise DataError("images.npy: damaged cache; run prepare again")

    monkeypatch.setattr(loader, "augment_sample", damaged)
    with pytest.raises(DataError, match=r"^images\.npy: damaged cache; run prepare again$"):
        list(loader.slice_loader(cache, "train", 4, workers=workers))


@pytest.mark.usefixtures("forked")
def test_shared_memory_that_runs_out_later_does_not_hang(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to resize file </torch_1_2_0> to the right size: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"^/dev/shm: a loading process cannot hand on its batch .*No space left"):
        list(loader.slice_loader(cache, "train", 4, workers=1))


def test_a_loader_draws_its_seed_as_it_starts(cache: Cache) -> None:
    state = torch.get_rng_state()
    batches = iter(loader.slice_loader(cache, "train", 4, workers=0))
    drawn = torch.get_rng_state()
    assert len(list(batches)) == COUNT // 4
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.set_rng_state(state)


ABANDONED = """
import sys, time
from simmp_fast.data import loader
from simmp_fast.data.cache import Cache
loader.augment_sample = lambda *_: time.sleep(600)
batches = iter(loader.slice_loader(Cache.open(sys.argv[1]), "train", 4, workers=2))
raise RuntimeError("a defect of a script")
"""


def test_python_ends_with_processes_that_are_stuck(cache: Cache) -> None:
    root = str(Path(__file__).resolve().parents[2])
    found = subprocess.run(
        [sys.executable, "-c", ABANDONED, str(cache.folder)],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": root}, check=False,
    )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == "RuntimeError: a defect of a script"


@pytest.mark.usefixtures("forked")
def test_loading_processes_ignore_what_asks_to_end(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent as early as they can be."""

    def signalled(_: int) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)
        plain(_)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)

    plain = loader._begin
    monkeypatch.setattr(loader, "_begin", signalled)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert len(list(loader.slice_loader(cache, "train", 4, workers=2))) == COUNT // 4
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


def test_a_loading_process_that_the_main_process_hangs_up_on_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loader, "ignore", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    loader._begin(0)
    sys.excepthook(ConnectionResetError, ConnectionResetError(), None)
    assert not capsys.readouterr().err
    sys.excepthook(KeyError, KeyError("all else is said"), None)
    assert "all else is said" in capsys.readouterr().err


@pytest.mark.usefixtures("forked")
def test_a_process_that_is_killed_as_the_batches_are_given_up_is_no_trouble(
    cache: Cache, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batches = iter(loader.slice_loader(cache, "train", 4, workers=2))
    next(batches)
    workers = [process for process in multiprocessing.active_children() if isinstance(process, loader._Process)]
    assert len(workers) == 2
    plain = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._mark_worker_as_unavailable

    def killed(*arguments: object, **keywords: object) -> None:
        os.kill(workers[0].pid, signal.SIGKILL)
        time.sleep(0.2)
        plain(*arguments, **keywords)

    monkeypatch.setattr(
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_mark_worker_as_unavailable", killed
    )
    batches.close()
    assert capsys.readouterr().err == ""
    assert not any(worker.is_alive() for worker in workers)
