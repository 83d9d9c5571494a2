"""Interrupted in every way, a run ends bitwise as if it had not been."""

from __future__ import annotations

import os
import signal
import time

import pytest
from training_stubs import assert_equal_runs, fingerprint, start_child, tiny_config, wait_for

from simmp_fast.training import loop
from simmp_fast.training.checkpoint import load_last
from simmp_fast.training.loop import train

STEPS = 5


@pytest.fixture
def straight(cache, tmp_path, stub):
    """A finished run that nothing interrupted."""
    train(tiny_config(), cache, tmp_path / "straight", device="cpu")
    return tmp_path / "straight"


class StoppedError(Exception):
    """Ends a run without any chance to save."""


def stop_before_step(monkeypatch, step: int) -> None:
    plain = loop.TrainStep.__call__

    def stopping(self, images, labels, number, *, wld):
        if number == step:
            raise StoppedError
        return plain(self, images, labels, number, wld=wld)

    monkeypatch.setattr(loop.TrainStep, "__call__", stopping)


@pytest.mark.parametrize("step", [0, 1, STEPS - 1, STEPS, STEPS + 3, 3 * STEPS - 1])
@pytest.mark.parametrize("minutes", [1e-9, 60.0], ids=["every step saved", "every epoch saved"])
def test_a_crash_at_any_step(cache, tmp_path, monkeypatch, straight, step, minutes):
    run = tmp_path / "run"
    config = tiny_config(checkpoint_minutes=minutes)
    with monkeypatch.context() as patch:
        stop_before_step(patch, step)
        with pytest.raises(StoppedError):
            train(config, cache, run, device="cpu")
    saved = load_last(run)
    expected = step if minutes < 1 else max(step - step % STEPS, min(step, 1))
    assert (saved is None) if expected == 0 else (saved is not None and saved[2].step == expected)
    train(config, cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)


@pytest.mark.parametrize("where", ["case_dice", "save_weights", "save_last"])
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_crash_at_the_end_of_an_epoch(cache, tmp_path, monkeypatch, straight, where, epoch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        plain, calls = getattr(loop, where), []

        def failing(*arguments, **keywords):
            calls.append(1)
            if where == "save_weights" or len(calls) == epoch + 1:
                raise StoppedError
            return plain(*arguments, **keywords)

        patch.setattr(loop, where, failing)
        with pytest.raises(StoppedError):
            train(tiny_config(), cache, run, device="cpu")
    train(tiny_config(), cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)
    best = [(folder / "best.safetensors").stat().st_size for folder in (run, straight)]
    assert best[0] == best[1]


def test_resumed_with_more_epochs(cache, tmp_path, straight, stub):
    run = tmp_path / "run"
    train(tiny_config(epochs=2), cache, run, device="cpu")
    train(tiny_config(), cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)


def test_resumed_with_loading_processes(cache, tmp_path, monkeypatch, straight):
    run = tmp_path / "run"
    config = tiny_config(workers=1, checkpoint_minutes=1e-9)
    with monkeypatch.context() as patch:
        stop_before_step(patch, STEPS + 2)
        with pytest.raises(StoppedError):
            train(config, cache, run, device="cpu")
    train(tiny_config(), cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_finishes_the_step_and_saves(cache, tmp_path, monkeypatch, straight, number):
    run = tmp_path / "run"
    plain = loop.TrainStep.__call__

    def signalled(self, images, labels, step, *, wld):
        if step == STEPS + 1:
            os.kill(os.getpid(), number)
        return plain(self, images, labels, step, wld=wld)

    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainStep, "__call__", signalled)
        result = train(tiny_config(), cache, run, device="cpu")
    assert signal.getsignal(number) is handler
    assert (result.interrupted, result.step, result.epoch) == (True, STEPS + 2, 1)
    assert load_last(run)[2].step == STEPS + 2
    assert "interrupted at step 7, epoch 1" in (run / "train.log").read_text()
    assert "--resume" in (run / "train.log").read_text()
    train(tiny_config(), cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)


def test_a_signal_ends_validation_at_once(cache, tmp_path, monkeypatch, straight):
    run = tmp_path / "run"

    def long_validation(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(loop, "case_dice", long_validation)
        result = train(tiny_config(), cache, run, device="cpu")
    assert time.monotonic() - start < 30
    assert (result.interrupted, result.step, result.epoch) == (True, STEPS, 0)
    train(tiny_config(), cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)


@pytest.fixture
def interruptible():
    """SIGINT as Python has it: a shell lets jobs in the background ignore it, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_acts_at_once(cache, tmp_path, monkeypatch, stub):
    def twice(self, *_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(loop.TrainStep, "__call__", twice)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(), cache, tmp_path / "run", device="cpu")


def test_killed_again_and_again(cache, tmp_path, straight):
    """SIGKILL at arbitrary moments, often within a checkpoint: one is written at every step."""
    run = tmp_path / "run"
    config = tiny_config(checkpoint_minutes=1e-9)
    metrics = run / "metrics.jsonl"
    for rows in (2, 6):
        child = start_child(cache.folder, run, config, resume=(run / "config.yaml").exists(), stub=True, pause=0.05)
        wait_for(lambda rows=rows: metrics.exists() and metrics.read_bytes().count(b"\n") >= rows, child)
        time.sleep(0.013 * rows)
        os.killpg(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    train(config, cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") or "pending" in path.name]


def test_ctrl_c_with_loading_processes(cache, tmp_path, straight):
    """The terminal sends SIGINT to the loading processes as well."""
    run = tmp_path / "run"
    child = start_child(cache.folder, run, tiny_config(workers=2), stub=True, pause=0.2)
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, child)
    os.killpg(child.pid, signal.SIGINT)
    assert child.wait(60) == 130
    said = child.stderr.read()
    assert "Traceback" not in said
    assert "interrupted at step" in said
    train(tiny_config(), cache, run, resume=True, device="cpu")
    assert_equal_runs(run, straight)


def test_the_real_network_killed_and_resumed(cache, tmp_path):
    """Killed within the warm-up of its memory, and resumed through structuring, W-LD and validation."""
    config = tiny_config(epochs=2)
    straight, run = tmp_path / "straight", tmp_path / "run"
    first = start_child(cache.folder, straight, config)
    killed = start_child(cache.folder, run, tiny_config(epochs=2, checkpoint_minutes=1e-9))
    metrics = run / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.stat().st_size > 0, killed)
    time.sleep(0.4)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    again = start_child(cache.folder, run, config, resume=(run / "config.yaml").exists())
    for child in (first, again):
        assert child.wait(120) == 0, child.stderr.read()
    assert_equal_runs(run, straight)
    rows = fingerprint(run)["rows"]
    assert {row.get("memory") for row in rows if row["kind"] == "train"} == {"warmup", "structured"}
