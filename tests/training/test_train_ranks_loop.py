"""Whole runs in several processes: files, resuming, signals and errors."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import yaml
from torch import Tensor
from training_stubs import ROOT, TinyModel, assert_equal_runs, make_cache, tiny_config

from simmp_fast.config import Config, from_mapping, to_mapping
from simmp_fast.data.cache import Cache
from simmp_fast.data.errors import DataError
from simmp_fast.training import loop
from simmp_fast.training.checkpoint import load_last
from simmp_fast.training.distributed import join_ranks
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.log import read_metrics

STEPS = 5  # an epoch of the fixture's ten slices at batch size 2


class PreciseModel(TinyModel):
    """The stub in float64 and without dropout, whose masks several processes draw for their own images."""

    dropout = 0.0

    def __init__(self, config: Any, backend: str = "auto") -> None:
        super().__init__(config, backend)
        self.double()

    def forward(self, image: Tensor, *, native_heads: bool = False) -> list[Tensor]:
        return super().forward(image.double(), native_heads=native_heads)


def job(folder: Path, run: Path, config: Config, options: dict[str, Any]) -> tuple[Any, ...]:
    """`train` in one process. Options: at a (rank, step), `signal`, `fail`, `freeze` or `poison`; `resume`; `timeout`.

    An error that the command line explains is returned as its kind and text.
    """
    loop.SimMPNet = PreciseModel  # type: ignore[assignment,misc]
    rank, plain, validate = int(os.environ.get("RANK", "0")), loop.TrainStep.__call__, loop.case_dice

    def eventful(self: Any, images: Tensor, labels: Tensor, step: int, *, wld: bool) -> Tensor:
        if (rank, step) == options.get("signal"):
            os.kill(os.getpid(), signal.SIGTERM)
        if (rank, step) == options.get("fail"):
            raise RuntimeError("a defect on one rank")
        if (rank, step) == options.get("freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if (rank, step) == options.get("poison"):
            images = images * torch.nan
        return plain(self, images, labels, step, wld=wld)

    def signalled(*arguments: Any, **keywords: Any) -> list[float]:
        if rank == options.get("signal in validation"):
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*arguments, **keywords)

    loop.TrainStep.__call__, loop.case_dice = eventful, signalled  # type: ignore[method-assign]
    if minutes := options.get("timeout"):
        loop.join_ranks = lambda device, *_: join_ranks(device, minutes)  # type: ignore[assignment]
    try:
        result = loop.train(config, Cache.open(folder), run, resume=options.get("resume", False), device="cpu")
        found: tuple[Any, ...] = (result.step, result.epoch, result.interrupted, result.best)
    except (ValueError, DataError, TrainingError) as error:
        found = (type(error).__name__, str(error))
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert not any("gloo" in name for name in names), "no thread of the process group may outlive Python"
    return found


def train(size: int, cache: Cache, run: Path, config: Config | None = None, **options: Any) -> tuple[Any, ...]:
    """What all of `size` processes return, checked to be the same."""
    started = processes.start(job, size, cache.folder, run, config or tiny_config(), options)
    first, *others = processes.finish(started)
    assert all(other == first for other in others)
    assert isinstance(first, tuple), first
    return first


def losses(run: Path) -> list[float]:
    return [row.get("loss", row.get("mean_loss")) for row in read_metrics(run / "metrics.jsonl") if "dice" not in row]


@pytest.fixture(scope="module")
def runs(cache: Cache, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one` and `two`: the same run, finished without interruption by as many processes."""
    folder = tmp_path_factory.mktemp("runs")
    one, two = (train(size, cache, folder / name) for name, size in (("one", 1), ("two", 2)))
    assert one[:3] == two[:3] == (3 * STEPS, 3, False)
    assert one[3] == pytest.approx(two[3], rel=1e-9)
    return folder


def test_two_processes_make_the_run_of_one(runs: Path) -> None:
    assert len(losses(runs / "one")) == 3 * STEPS // 2 + 3
    assert losses(runs / "two") == pytest.approx(losses(runs / "one"), rel=1e-9)
    assert {path.name for path in (runs / "two").iterdir()} == {path.name for path in (runs / "one").iterdir()}
    said = (runs / "two" / "train.log").read_text().splitlines()
    assert len(said) == 4
    assert "on cpu, the first of 2 processes" in said[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_on_one_rank_stops_all_at_the_same_step(cache: Cache, tmp_path: Path, runs: Path, rank: int) -> None:
    run = tmp_path / "run"
    assert train(2, cache, run, signal=(rank, STEPS + 1))[:3] == (STEPS + 2, 1, True)
    assert load_last(run)[2].step == STEPS + 2
    assert train(2, cache, run, resume=True)[:3] == (3 * STEPS, 3, False)
    assert_equal_runs(run, runs / "two")


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_resumed_by_another_number_of_processes(
    cache: Cache, tmp_path: Path, runs: Path, before: int, after: int
) -> None:
    run = tmp_path / "run"
    assert train(before, cache, run, signal=(0, STEPS + 2))[:3] == (STEPS + 3, 1, True)
    assert train(after, cache, run, resume=True)[:3] == (3 * STEPS, 3, False)
    assert losses(run) == pytest.approx(losses(runs / "one"), rel=1e-9)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_in_the_validation_of_one_rank(cache: Cache, tmp_path: Path, rank: int) -> None:
    run = tmp_path / "run"
    assert train(2, cache, run, **{"signal in validation": rank}) == (STEPS, 0, True, None)
    assert load_last(run)[2].batch == STEPS


def test_a_bad_loss_on_one_rank_stops_all(cache: Cache, tmp_path: Path) -> None:
    kind, text = train(2, cache, tmp_path / "run", poison=(1, 7))
    assert kind == "TrainingError"
    assert "step 7, epoch 1: the loss is nan" in text
    assert load_last(tmp_path / "run")[2].step == STEPS


def test_a_defect_on_one_rank_ends_all(cache: Cache, tmp_path: Path) -> None:
    started = processes.start(job, 2, cache.folder, tmp_path / "run", tiny_config(), {"fail": (1, 3)})
    (kind, text), failed = processes.finish(started, seconds=60)
    assert "a defect on one rank" in failed
    assert kind == "TrainingError"
    assert text.startswith(
        "the connection to another process broke: it ended, and its own messages say why (Connection"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_does_not_answer_is_not_waited_for_without_end(cache: Cache, tmp_path: Path, rank: int) -> None:
    options = {"freeze": (rank, 3), "timeout": 0.1}
    started = processes.start(job, 2, cache.folder, tmp_path / "run", tiny_config(), options)
    try:
        kind, text = processes.finish([started[1 - rank]], seconds=60)[0]
    finally:
        started[rank][0].kill()
    assert kind == "TrainingError"
    assert re.match(r"another process did not answer for [\d.]+ minutes: it is stuck, .* train\.rank_timeout_m", text)


def first_alone(folder: Path, run: Path, port: int) -> tuple[Any, ...]:
    os.environ.update(WORLD_SIZE="2", MASTER_PORT=str(port))
    return job(folder, run, tiny_config(), {"timeout": 0.02})


def test_processes_that_do_not_meet(cache: Cache, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken, free = int(listener.getsockname()[1]), processes.free_port()
        for port in (free, taken):
            kind, text = processes.finish(processes.start(first_alone, 1, cache.folder, tmp_path / "run", port))[0]
            assert kind == "TrainingError"
            assert (
                f"process 0 (from 0) of 2 cannot meet the others at MASTER_ADDR:MASTER_PORT = 127.0.0.1:{port}" in text
            )
    assert not (tmp_path / "run").exists()


def test_what_several_processes_cannot_train(cache: Cache, tmp_path: Path, runs: Path) -> None:
    kind, text = train(2, cache, tmp_path / "run", tiny_config(batch_size=3))
    assert kind == "ConfigError"
    assert text == "train.batch_size: got 3, expected a multiple of 2: it is shared by that many processes"
    mapping = to_mapping(tiny_config())
    released = from_mapping(Config, mapping | {"model": mapping["model"] | {"variant": "released"}})
    assert "model.variant: got 'released', expected 'paper' on several" in train(2, cache, tmp_path / "r", released)[1]
    for key in ("compile", "cuda_graph"):
        text = train(2, cache, tmp_path / key, tiny_config(**{key: True}))[1]
        assert f"train.{key}: got true" in text
    assert "run folder exists; resume it (--resume)" in train(2, cache, runs / "two")[1]
    assert "expected at least 20" in train(2, cache, tmp_path / "few", tiny_config(batch_size=20))[1]
    assert not (tmp_path / "run").exists()


def other_data(folders: list[Path], run: Path) -> tuple[Any, ...]:
    return job(folders[int(os.environ["RANK"])], run, tiny_config(), {})


def test_different_data_on_the_ranks_are_refused(cache: Cache, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", validation=2)
    started = processes.start(other_data, 2, [cache.folder, other.folder], tmp_path / "run")
    for kind, text in processes.finish(started):
        assert kind == "DataError"
        assert "got caches of different content on the processes" in text


def test_torchrun_trains_the_real_network(cache: Cache, tmp_path: Path) -> None:
    """The command of the documentation: one epoch by two processes, through warm-up and structuring; one more alone."""
    run, settings = tmp_path / "run", tmp_path / "run.yaml"
    settings.write_text(yaml.safe_dump(to_mapping(tiny_config(epochs=1, backend="portable"))))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(processes.free_port())]
    command = [
        "-m",
        "simmp_fast.cli",
        "train",
        "--data",
        str(cache.folder),
        "--run-folder",
        str(run),
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.run(
        [sys.executable, *launch, *command, "--config", str(settings)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr
    assert first.stdout.count(f"1 epochs, {STEPS} steps, best validation Dice") == 1
    again = subprocess.run(
        [sys.executable, *command, "--resume", "--set", "train.epochs=2"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert f"2 epochs, {2 * STEPS} steps" in again.stdout
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["kind"] == "train"]
    assert {row["memory"] for row in rows} == {"warmup", "structured"}
