from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess

import pytest
import torch
from training_stubs import TinyModel, tiny_config

from simmp_fast.config import Config, ConfigError, from_mapping, read_yaml, to_mapping
from simmp_fast.data.errors import DataError
from simmp_fast.training import run_folder
from simmp_fast.training.checkpoint import Metadata, TrainingState, save_last
from simmp_fast.training.environment import environment
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.log import RunLog
from simmp_fast.training.run_folder import Resume, RunFolder, saved_config

DATA = {"data.json": {"name": "shapes", "classes": ["background", "disc"]}}


def with_train(config: Config, **changes) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def begin(path, config: Config, *, resume: Resume = False, records=DATA, step: int = 1) -> list[str]:
    """Record a run and write a checkpoint; returns what a resumed run says."""
    with RunFolder(path, config, records, resume=resume) as folder:
        folder.record()
        model = TinyModel(config.model)
        state = TrainingState(
            step=step, epoch=0, batch=1, loss_sum=0.1, best=None, metrics_bytes=0, metrics_sha256="", optimizer={},
            rng={}, config=to_mapping(config), records=folder.records, environment=folder.environment,
        )  # fmt: skip
        save_last(folder.path, model, Metadata(config.model, ("background", "disc"), step, 0), state)
        return folder.notes


def test_a_new_folder_records_the_run(tmp_path):
    config = tiny_config()
    with RunFolder(tmp_path / "a" / "run", config, DATA) as folder:
        folder.record()
        assert from_mapping(Config, read_yaml(folder.path / "config.yaml")) == config
        assert json.loads((folder.path / "data.json").read_text()) == DATA["data.json"]
        environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["python"]
    assert environment["platform"]


def test_an_existing_run_is_not_overwritten(tmp_path):
    begin(tmp_path / "run", tiny_config())
    with pytest.raises(ConfigError, match=r"run: run folder exists; resume it"):
        RunFolder(tmp_path / "run", tiny_config(), DATA)
    begin(tmp_path / "run", tiny_config(), resume=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        RunFolder(tmp_path / "typo", tiny_config(), DATA, resume=True)
    assert not (tmp_path / "typo").exists()


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    begin(tmp_path, tiny_config())


def leftover_in(folder, name: str = "last.state.pt"):
    """A temporary file of a process of this machine that runs no more."""
    process = subprocess.Popen(["true"])
    process.wait()
    return folder / f".simmp-fast-{socket.gethostname()}-{process.pid}-0123456789ab-{name}"


@pytest.mark.parametrize("resume", [False, True])
def test_killed_before_the_first_checkpoint(tmp_path, resume):
    """Such a folder holds no run yet: it may be started with other settings, with --resume or without."""
    with RunFolder(tmp_path, tiny_config(), DATA) as folder:
        folder.record()
    (tmp_path / "train.log").write_text("started")
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1, "epoch": 0}\n')
    (tmp_path / "last.pending.safetensors").write_bytes(b"")
    leftover_in(tmp_path, "config.yaml").write_text("mod")
    begin(tmp_path, with_train(tiny_config(), lr=0.25), resume=resume)
    assert not leftover_in(tmp_path, "config.yaml").exists()
    assert read_yaml(tmp_path / "config.yaml")["train"]["lr"] == 0.25


def test_somebody_elses_records_are_not_written_over(tmp_path):
    (tmp_path / "config.yaml").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"got a folder with config.yaml, which is no run to resume"):
            RunFolder(tmp_path, tiny_config(), DATA, resume=resume)
    assert (tmp_path / "config.yaml").read_text() == "mine"


def test_records_beside_somebody_elses_environment_are_not_written_over(tmp_path):
    for mine in ("[1]", '{"versions": 3}', "no JSON"):
        (tmp_path / "environment.json").write_text(mine)
        (tmp_path / "config.yaml").write_text("mine")
        with pytest.raises(ConfigError, match=r"got a folder with config.yaml, environment.json, which is no run"):
            RunFolder(tmp_path, tiny_config(), DATA)
        assert (tmp_path / "environment.json").read_text() == mine
        assert (tmp_path / "config.yaml").read_text() == "mine"


@pytest.mark.parametrize("row", ['{"k', '{"kind": "train", "st'])
def test_a_row_half_written_before_the_first_checkpoint(tmp_path, row):
    (tmp_path / "metrics.jsonl").write_text(row)
    begin(tmp_path, tiny_config())


@pytest.mark.parametrize(
    "text", ["my notes", "[" * 100_000, '{"kind": "train", "st\n'], ids=["notes", "deep", "broken"]
)
def test_metrics_that_are_no_rows_are_left_alone(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"metrics.jsonl: a line is no JSON"):
        RunFolder(tmp_path, tiny_config(), DATA)
    assert (tmp_path / "metrics.jsonl").read_text() == text


@pytest.mark.parametrize("resume", [False, True])
def test_hidden_files_stay(tmp_path, resume):
    if resume:
        begin(tmp_path, tiny_config())
    (tmp_path / ".experiment12-notes.txt").write_text("mine")
    (tmp_path / ".0123456789ab-old").mkdir()
    leftover_in(tmp_path).mkdir()
    begin(tmp_path, tiny_config(), resume=resume)
    assert (tmp_path / ".experiment12-notes.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".0123456789ab-old", ".experiment12-notes.txt"]


@pytest.mark.parametrize("resume", [False, True, "previous"])
@pytest.mark.parametrize("name", ["last.safetensors", "previous.state.pt", "best.safetensors", "epoch_003.safetensors"])
def test_a_run_without_its_state_is_not_begun_anew(tmp_path, name, resume):
    (tmp_path / "run.lock").touch()
    (tmp_path / name).write_text("precious")
    message = (
        "run folder exists" if not resume else rf"(last.state.pt: missing, while {name} of|previous.safetensors: )"
    )
    with pytest.raises((ConfigError, DataError), match=message):
        RunFolder(tmp_path, tiny_config(), DATA, resume=resume)
    assert (tmp_path / name).read_text() == "precious"


def test_metrics_without_a_checkpoint_are_not_cut_off(tmp_path):
    begin(tmp_path, tiny_config())
    for name in ("last.state.pt", "last.safetensors"):
        (tmp_path / name).unlink()
    rows = '{"kind": "train", "step": 200, "epoch": 7}\n'
    (tmp_path / "metrics.jsonl").write_text(rows)
    with pytest.raises(ConfigError, match="run folder exists"):
        RunFolder(tmp_path, tiny_config(), DATA)
    with pytest.raises(DataError, match=r"last.state.pt: missing, .*metrics.jsonl has rows of a run"):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    for resume in (False, True):
        with pytest.raises(ConfigError):
            RunFolder(tmp_path, tiny_config(), DATA, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("x" * 4000, r"x{50}.*: cannot be used as a run folder \(File name too long\)"),
        ("a\0b", r"cannot be used as a run folder \(embedded null|no run to resume there"),
        ("dangling", r"dangling: got a link to nothing, expected a folder"),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_places_that_cannot_be_a_folder(tmp_path, place, message, resume):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=message):
        RunFolder(tmp_path / place, tiny_config(), DATA, resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == ["dangling"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match="got a file, expected a folder"):
        RunFolder(tmp_path / "run", tiny_config(), DATA)


def test_resume_lists_the_settings_that_differ(tmp_path):
    begin(tmp_path, tiny_config())
    with pytest.raises(ConfigError, match=r"train\.lr is 0\.5, saved as 0\.001; train\.seed is 1, saved as 2222"):
        RunFolder(tmp_path, with_train(tiny_config(), lr=0.5, seed=1), DATA, resume=True)
    begin(tmp_path, tiny_config(), resume=True)  # the failed attempt left the lock free


def test_resume_may_change_what_does_no_harm(tmp_path):
    begin(tmp_path, tiny_config())
    longer = with_train(tiny_config(), epochs=9, workers=2)
    with RunFolder(tmp_path, longer, DATA, resume=True) as folder:
        folder.record()
    said = "settings: train.epochs is 9, saved as 3; train.workers is 2, saved as 0"
    assert begin(tmp_path, longer, resume=True) == [said]  # also where the run before reached no checkpoint
    assert read_yaml(tmp_path / "config.yaml")["train"]["epochs"] == 9
    assert begin(tmp_path, longer, resume=True) == []
    with pytest.raises(ConfigError, match=r"train\.epochs: got 3, expected at least 9"):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "lr: 0.001",
            "lr: 0.01",
            r"train\.lr is 0\.01, saved as 0\.001; restore it, or remove it, and --resume writes",
        ),
        ("lr: 0.001\n", "lr: much\n", r"train\.lr: got 'much'.*; restore it, or remove it"),
        ("  epochs: 3\n", "", r"train\.epochs is missing, saved as 3"),
        ("variant: paper", "variant: released", r"model\.variant is 'released', saved as 'paper'"),
        ("model:", "model: [", r"cannot be read as YAML.*; restore it, or remove it"),
    ],
)
def test_an_edited_configuration_is_refused(tmp_path, old, new, message):
    begin(tmp_path, tiny_config())
    path = tmp_path / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(
        ConfigError, match=rf"config\.yaml: (differs from what the checkpoint was made with: )?{message}"
    ):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)
    path.unlink()
    assert begin(tmp_path, tiny_config(), resume=True) == [f"{path}: missing; written again from the checkpoint"]
    assert path.read_text() == text


def test_a_configuration_cut_at_any_line_is_refused(tmp_path):
    begin(tmp_path, tiny_config())
    path = tmp_path / "config.yaml"
    lines = path.read_text().splitlines(keepends=True)
    for count in range(len(lines)):
        path.write_text("".join(lines[:count]))
        with pytest.raises(ConfigError, match=r"config\.yaml: .*restore it, or remove it"):
            RunFolder(tmp_path, tiny_config(), DATA, resume=True)


def test_a_number_may_be_written_in_another_way(tmp_path):
    begin(tmp_path, tiny_config())
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.001", "lr: 1e-3"))
    assert begin(tmp_path, tiny_config(), resume=True) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": "others", "classes": ["background", "disc"]}', r"name is 'others', saved as 'shapes'"),
        ('{"name": "shapes"}', r"classes is missing, saved as \['background', 'disc'\]"),
        ('["shapes"]', r"got \['shapes'\], expected a mapping"),
        ('{"name": "sha', r"cannot be read as JSON"),
    ],
)
def test_a_record_of_another_run_is_refused(tmp_path, content, message):
    begin(tmp_path, tiny_config())
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"data\.json: .*{message}.*; restore it, or remove it"):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)
    (tmp_path / "data.json").unlink()
    assert begin(tmp_path, tiny_config(), resume=True) == [
        f"{tmp_path}/data.json: missing; written again from the checkpoint"
    ]


def test_another_number_of_threads_is_said(tmp_path):
    begin(tmp_path, tiny_config())
    torch.set_num_threads(2)  # the fixture sets it back
    said = "environment: cpu_threads is 2, saved as 1; the last bits of the results may differ"
    assert begin(tmp_path, tiny_config(), resume=True) == [said]


def test_another_number_of_processes_is_said(tmp_path, monkeypatch):
    begin(tmp_path, tiny_config())
    monkeypatch.setattr(run_folder, "environment", lambda processes: environment(2 * processes))
    said = "environment: processes is 2, saved as 1; the last bits of the results may differ"
    assert begin(tmp_path, tiny_config(), resume=True) == [said]


def test_going_back_to_the_checkpoint_before(tmp_path):
    for step in (1, 4, 6):
        begin(tmp_path, tiny_config(), resume=step > 1, step=step)
    with RunFolder(tmp_path, tiny_config(), DATA, resume="previous") as folder:
        assert folder.take_checkpoint()[2].step == 4
    with RunFolder(tmp_path, tiny_config(), DATA, resume="last") as folder:
        assert folder.take_checkpoint()[2].step == 4
    with pytest.raises(ConfigError, match="resume: got 'first', expected True, False, 'last' or 'previous'"):
        RunFolder(tmp_path, tiny_config(), DATA, resume="first")


def test_resume_refuses_other_data(tmp_path):
    begin(tmp_path, tiny_config())
    other = {"data.json": {"name": "others", "classes": ["background", "disc"]}}
    with pytest.raises(ConfigError, match=r"other data \(data\.json\): name is 'others', saved as 'shapes'"):
        RunFolder(tmp_path, tiny_config(), other, resume=True)


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    begin(tmp_path, tiny_config())
    leftover = leftover_in(tmp_path)
    leftover.write_text("half")
    begin(tmp_path, tiny_config(), resume=True)
    assert not leftover.exists()


def test_a_folder_that_is_elsewhere_now(tmp_path):
    with RunFolder(tmp_path / "run", tiny_config(), DATA) as folder:
        folder.check_in_place()
        (tmp_path / "run").rename(tmp_path / "moved")
        for _ in range(2):  # also if there is another one in its place
            with pytest.raises(TrainingError, match=r"run: the folder was moved or removed while the run wrote there"):
                folder.check_in_place()
            (tmp_path / "run").mkdir(exist_ok=True)


def test_a_lock_or_log_that_cannot_be_written(tmp_path):
    (tmp_path / "a" / "run.lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/a/run.lock: cannot be written \(Is a directory\)"):
        RunFolder(tmp_path / "a", tiny_config(), DATA)
    for name in ("metrics.jsonl", "train.log"):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(TrainingError, match=rf"{tmp_path}/{name}/{name}: cannot be written \(Is a directory\)"):
            RunLog(tmp_path / name, total_steps=1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_pipes_in_the_folder_are_not_waited_for(tmp_path):
    for name in ("metrics.jsonl", "train.log"):
        (tmp_path / name).mkdir()
        os.mkfifo(tmp_path / name / name)
        with pytest.raises(TrainingError, match=rf"{tmp_path}/{name}/{name}: cannot be written"):
            RunLog(tmp_path / name, total_steps=1)
    with pytest.raises(DataError, match=r"metrics.jsonl: got a pipe or a device, expected a file"):
        RunFolder(tmp_path / "metrics.jsonl", tiny_config(), DATA)
    begin(tmp_path / "run", tiny_config())
    (tmp_path / "run" / "last.state.pt").unlink()
    os.mkfifo(tmp_path / "run" / "last.state.pt")
    assert saved_config(tmp_path / "run") == to_mapping(tiny_config())


def test_a_file_above_the_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=rf"{tmp_path}/file/run: cannot be used as a run folder \("):
        RunFolder(tmp_path / "file" / "run", tiny_config(), DATA)


def test_records_with_a_key_twice_are_not_compared(tmp_path):
    begin(tmp_path, tiny_config())
    (tmp_path / "data.json").write_text('{"name": "others",\n "name": "shapes", "classes": ["background", "disc"]}')
    with pytest.raises(ConfigError, match=r"data.json: cannot be read as JSON: name: got this key twice, see line"):
        RunFolder(tmp_path, tiny_config(), DATA, resume=True)


def test_a_new_volume_is_an_empty_folder(tmp_path):
    (tmp_path / "lost+found").mkdir()
    begin(tmp_path, tiny_config())
    assert (tmp_path / "lost+found").is_dir()
