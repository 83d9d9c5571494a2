from __future__ import annotations

import os
import threading

import pytest

from simmp_fast.training.errors import TrainingError
from simmp_fast.training.log import RunLog


def test_the_log_takes_names_that_are_not_utf8(tmp_path, capsys):
    with RunLog(tmp_path, total_steps=1) as log:
        log.say("caf\udce9: saved")
    assert (tmp_path / "train.log").read_text(encoding="utf-8").endswith(" caf\\xe9: saved\n")
    assert capsys.readouterr().err == "caf\\xe9: saved\n"


def test_a_thread_of_tensorboard_that_cannot_write_is_a_line(tmp_path, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread

    def fails():
        raise OSError(28, "No space left on device")

    hook = threading.excepthook
    with RunLog(tmp_path, total_steps=1):
        thread = _AsyncWriterThread.__new__(_AsyncWriterThread)
        threading.Thread.__init__(thread, target=fails)
        thread.run = fails
        thread.start()
        thread.join()
    assert threading.excepthook is hook
    said = capsys.readouterr().err.strip()
    assert said == f"{tmp_path}/tensorboard: cannot be written (No space left on device); metrics.jsonl has all rows"


@pytest.mark.parametrize("other", [False, True])
def test_rows_that_cannot_be_written_in_the_end_are_named(tmp_path, other):
    def use():
        with RunLog(tmp_path, total_steps=1) as log:
            os.close(log._metrics.fileno())  # so that closing it fails
            if other:
                raise KeyError("another error")

    with pytest.raises(KeyError if other else TrainingError, match="another" if other else r"metrics.jsonl: cannot be"):
        use()
