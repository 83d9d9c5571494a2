"""Released checkpoints: what their counters and widths mean, and the forms in which they circulate."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_data import released_state_dict
from torch import Tensor, nn

from simmp_fast.config import ConfigError
from simmp_fast.model import SimMPNet
from simmp_fast.model.released import read_released
from simmp_fast.model.weight_files import network_tensors, read_tensors

State = dict[str, Tensor]


def state_with(counters: float | None = None, **others: float) -> State:
    """The golden checkpoint with other numbers: of all counters, and of single tensors by name."""
    state = dict(released_state_dict())
    for name in state:
        if counters is not None and name.endswith("warmup_iter_counter"):
            state[name] = torch.full_like(state[name], counters)
    return state | {name: torch.full_like(state[name], value) for name, value in others.items()}


@functools.cache
def network() -> SimMPNet:
    return SimMPNet.from_released(released_state_dict())


def loaded(state: State) -> SimMPNet:
    """The network of a checkpoint; made once, since only its state differs."""
    model = network()
    model.load_state_dict(read_released(state, "released", 1)[1])
    return model


def test_real_checkpoints_never_set_the_flag() -> None:
    flags = [tensor for name, tensor in released_state_dict().items() if name.endswith("pool_structured")]
    assert len(flags) == 16
    assert not any(bool(flag) for flag in flags)


@pytest.mark.parametrize(
    ("counter", "step", "phase"),
    [
        (0, 0, "warmup"),
        (1999, 1999, "warmup"),
        (2000, 1999, "warmup"),
        (2001, 2001, "structured"),
        (9000, 9000, "structured"),
    ],
)
@pytest.mark.parametrize("flag", [0.0, 1.0])
def test_the_counter_says_the_phase(counter: int, step: int, phase: str, flag: float) -> None:
    state = state_with(counter)
    flags = {name: torch.full_like(value, flag) for name, value in state.items() if name.endswith("pool_structured")}
    model = loaded(state | flags)
    assert (model.memory_step, model.memory_phase) == (step, phase)
    assert {block.bank.step for block in model.memory_blocks()} == {step}
    assert {float(block.bank.structured) for block in model.memory_blocks()} == {float(phase == "structured")}


@pytest.mark.parametrize(
    ("counter", "step"),
    [
        (torch.tensor(2001.0, dtype=torch.float16), 2001),
        (torch.tensor([1e5], dtype=torch.float16), 2001),
        (torch.tensor([2000.5]), 2001),
        (torch.tensor([[2000]], dtype=torch.int16), 1999),
        (torch.tensor([-1.0]), 0),
    ],
)
def test_counters_of_other_kinds(counter: Tensor, step: int) -> None:
    name = "DMWLA_3.4.warmup_iter_counter"
    _, state = read_released(state_with(2001) | {name: counter}, "released", 1)
    assert int(state["encoder.stages.2.blocks.4.bank._extra_state"]) == step
    assert float(state["encoder.stages.2.blocks.4.bank.structured"]) == (step > 1999)


def test_every_bank_has_its_own_phase() -> None:
    state = state_with(2001) | {"DMWLA_3.4.warmup_iter_counter": torch.tensor([2000.0])}
    model = loaded(state)
    warm = [block.bank.name for block in model.memory_blocks() if block.bank.warming]
    assert warm == ["encoder.2.4"]
    assert (model.memory_step, model.memory_phase) == (1999, "warmup")


def test_the_width_is_the_encoders() -> None:
    state = dict(released_state_dict())
    widths = {name: torch.full_like(value, 37.0) for name, value in state.items() if re.match(r"DMWLA_.*\.k$", name)}
    assert len(widths) > 1
    assert int(loaded(state | widths).wld.k) == 37
    without = {name: value for name, value in (state | widths).items() if name != "DMWLA_1.0.k"}
    assert int(read_released(without, "released", 1)[1]["wld.k"]) == 37
    bare = {name: value for name, value in state.items() if not name.endswith(".k")}
    assert int(read_released(bare, "released", 1)[1]["wld.k"]) == 50


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {f"module.{name}": value for name, value in s.items()},
        lambda s: {f"module.module.{name}": value for name, value in s.items()},
        lambda s: {f"_orig_mod.module.{name}": value for name, value in s.items()},
        lambda s: {f"model.{name}": value for name, value in s.items()} | {"n_averaged": torch.tensor(3)},
        lambda s: {"state_dict": s, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]}, "epoch": 7},
        lambda s: {"net": {f"module.{name}": value for name, value in s.items()}, "best": None, "history": [1.0]},
        lambda s: {"model": {"state_dict": s}},
        lambda s: s | {"epoch": 7, "names": ["a"], "nothing": None, "lr": 0.1},
    ],
)
def test_forms_that_circulate(wrap: Callable[[State], dict[str, Any]]) -> None:
    state = released_state_dict()
    config, tensors = read_released(wrap(state), "released", 1)
    expected_config, expected = read_released(state, "released", 1)
    assert config == expected_config
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DMWLA_1.0.concept_pool": torch.zeros(3)}, r"DMWLA_1.0.concept_pool: got shape \[3\], expected 2 axes"),
        ({"DMWLA_1.0.concept_proto": torch.zeros(256)}, r"concept_proto: got shape \[256\], expected 2 axes"),
        ({"DMWLA_2.0.concept_pool": torch.zeros(256, 901)}, "got 901 columns of concept_pool for 9 prototypes"),
        ({"DMWLA_1.0.concept_proto": torch.zeros(256, 0)}, "model.clusters: got 0"),
        ({"DMWLA_2.0.warmup_iter_counter": torch.zeros(2)}, r"counter: got shape \[2\], expected one number"),
        ({"out_head1.weight": torch.tensor(1.0)}, r"out_head1.weight: got shape \[\], expected 4 axes"),
        (
            {"DMWLA_2.0.warmup_iter_counter": torch.tensor([torch.nan])},
            "warmup_iter_counter: got nan, expected a count",
        ),
        ({"DMWLA_1.0.k": torch.tensor(torch.nan)}, "k: got nan, expected a count"),
        ({"decoder.DMWLA_1.k": torch.tensor(2 + 3j)}, "k: got a tensor of complex64, expected one of plain numbers"),
    ],
)
def test_tensors_of_another_form(change: State, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_released(dict(released_state_dict()) | change, "released", 1)


SMALL = {"a.weight": torch.ones(2), "b": torch.zeros(())}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([SMALL], "got a list, without a state dict"),
        (None, "got a NoneType, without a state dict"),
        (torch.ones(3), "got a Tensor, without a state dict"),
        ({"epoch": 3, "names": ["a"]}, "got a mapping of 'epoch', 'names', without a state dict"),
        ({"model": SMALL, "model_ema": SMALL}, "got several networks, under model, model_ema"),
        ({"module.a": torch.ones(1), "a": torch.ones(1)}, "got 'a' twice, under several prefixes"),
    ],
)
def test_files_without_one_networks_tensors(content: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save(content, file)
    with pytest.raises(ConfigError, match=f"weights.pth: {message}"):
        read_tensors(file)


@pytest.mark.parametrize(
    "beside",
    [
        {"args": argparse.Namespace(lr=1e-3, names=["a"]), "epoch": 3},
        {"best": np.float64(0.5), "epoch": np.int64(3), "loss": np.float32(0.25), "done": np.bool_(True)},
    ],
)
def test_what_scripts_save_beside_the_tensors(beside: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    torch.save({"model_state_dict": {f"module.{name}": value for name, value in SMALL.items()}, **beside}, file)
    found = read_tensors(file)
    assert found.keys() == SMALL.keys()
    assert all(torch.equal(found[name], SMALL[name]) for name in SMALL)


def test_pickled_modules_and_folders_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(ConfigError, match=r"module.pth: .* it needs torch.nn.modules.linear.Linear, which is code"):
        read_tensors(tmp_path / "module.pth")
    with pytest.raises(ConfigError, match="got a folder, expected a file"):
        read_tensors(tmp_path)
    with pytest.raises(ConfigError, match="absent.pth: no such file"):
        read_tensors(tmp_path / "absent.pth")
    assert network_tensors({1: torch.ones(1), "a": torch.ones(1)}, "here").keys() == {"a"}
