"""`train.compile` on a machine without a compiler."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from training_stubs import tiny_config

from simmp_fast.config import ConfigError
from simmp_fast.training.compiling import check_compiler, compile_errors
from simmp_fast.training.errors import TrainingError
from simmp_fast.training.loop import train


def test_without_a_compiler_nothing_starts(cache, tmp_path, monkeypatch):
    inductor = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    message = r"train.compile: got true without a C\+\+ compiler, .*no-such-compiler.* train.compile=false does without"
    with pytest.raises(ConfigError, match=message):
        check_compiler(torch.device("cpu"))
    with pytest.raises(ConfigError, match=message):
        train(tiny_config(compile=True), cache, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_without_triton_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="train.compile: got true without Triton"):
        check_compiler(torch.device("cuda"))


def test_an_error_of_the_compiler_is_a_sentence():
    message = r"step 7: train.compile: .* cannot be compiled \(no gcc\); it needs"
    with pytest.raises(TrainingError, match=message), compile_errors(7):
        raise TorchDynamoException("no gcc\nand much more")
    with pytest.raises(RuntimeError, match="another mistake"), compile_errors(7):
        raise RuntimeError("another mistake")
