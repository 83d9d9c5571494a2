"""Files of weights made to mislead: code, odd tensors, sizes that are not there; and weights that cannot be had."""

from __future__ import annotations

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simmp_fast.cli import main
from simmp_fast.config import ConfigError, ModelConfig
from simmp_fast.model import backbone, released
from simmp_fast.model.sealing import read_sealed, write_sealed
from simmp_fast.model.weight_files import network_tensors, read_tensors


class Attack:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch attacked",)


class Strange:
    """An object of a class that no other program has."""


def refused(path: Path, message: str) -> None:
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ConfigError, match=message) as raised:
        read_tensors(path)
    assert not caught
    said = str(raised.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert not any(word in said for word in ("weights_only", "trust", "allowlist", "safe_globals", "Re-running"))


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_named_and_not_loaded(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({"w": torch.ones(2), "x": Attack()}, path, _use_new_zipfile_serialization=zipped)
    refused(path, "it needs posix.system, which is code and is not loaded; expected a file of the network's state_dict")
    torch.save({"w": torch.ones(2), "x": Strange()}, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"it needs test_hostile_weights\.Strange, which is code and is not loaded")
    assert not (tmp_path / "attacked").exists()


def test_pickles_of_other_programs(tmp_path: Path) -> None:
    for content in (pickle.dumps({"w": [1.0]}), pickle.dumps(Attack()), pickle.dumps(Strange), b"\x80\x02\x95.", b""):
        (tmp_path / "a.pth").write_bytes(content)
        refused(tmp_path / "a.pth", "cannot be read as a checkpoint of tensors alone|without a state dict")


def test_programs_are_not_loaded(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "a.pt"))
    refused(tmp_path / "a.pt", "it holds something else than tensors and plain values, which is not loaded")


def test_what_is_no_file(tmp_path: Path) -> None:
    for name in ("a.pth", "a.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "got a pipe or a device, expected a file")
        with pytest.raises(ConfigError, match="got a pipe or a device"):
            read_sealed(tmp_path / name)
    for name, message in [("/dev/zero", "a pipe or a device"), ("x" * 300, "too long"), ("a\0b", "no such file .its")]:
        with pytest.raises(ConfigError, match=message):
            read_tensors(tmp_path / name)


def quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)


def repeated() -> Tensor:
    return torch.ones(1).expand(10**6, 10**6)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), "of complex64"),
        (quantised(), "of qint8"),
        (torch.ones(2, 2).to_sparse(), "that is sparse or nested"),
        (torch.ones(2, device="meta"), r"without values \(meta\)"),
        (repeated(), r"of shape \[1000000, 1000000\] that repeats 4 bytes"),
    ],
    ids=("complex", "quantised", "sparse", "meta", "repeated"),
)
def test_odd_tensors(tmp_path: Path, tensor: Tensor, message: str) -> None:
    torch.save({"module.w": tensor}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", rf"w: got a tensor {message}, expected one of plain numbers")


def test_archives_that_unpack_to_more(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2**20)}, tmp_path / "a.pth")
    with (
        zipfile.ZipFile(tmp_path / "a.pth") as plain,
        zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.namelist():
            packed.writestr(member, plain.read(member))
    refused(tmp_path / "b.pth", r"got a file of \d+ bytes that announces \d+, expected no packed one")


def test_mappings_that_hold_themselves() -> None:
    content: dict[str, Any] = {"w": torch.ones(1)}
    content["model"] = content["state_dict"] = content
    assert list(network_tensors(content, "a")) == ["w"]
    bare: dict[str, Any] = {}
    for _ in range(8):
        bare = {"model": bare, "net": bare, "ema": bare, "weights": bare}
    with pytest.raises(ConfigError, match="a: got a mapping of 'model', 'net', 'ema', 'weights', without a state dict"):
        network_tensors(bare, "a")
    full: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(8):
        full = {"model": full, "net": full, "ema": full, "weights": full}
    with pytest.raises(ConfigError, match="got several networks, under model"):
        network_tensors(full, "a")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(2, dtype=torch.bool), "got values of type bool, expected floats"),
        (torch.ones(2, dtype=torch.int32), "got values of type int32, expected floats"),
        (torch.ones(2).to(torch.float8_e4m3fn), "got values of type float8_e4m3fn, expected floats"),
        (torch.tensor([1, torch.nan, torch.inf]), "2 values are NaN or infinite, expected none"),
    ],
)
def test_weights_that_are_no_finite_floats(tensor: Tensor, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^released checkpoint: a.weight: {message}$"):
        released._check_values({"b.num_batches_tracked": torch.tensor(1), "a.weight": tensor})


def test_tensors_of_too_few_axes() -> None:
    for name, tensor, message in [
        ("DMWLA_1.0.warmup_iter_counter", torch.ones(2), r"got shape \[2\], expected one number"),
        ("DMWLA_1.0.warmup_iter_counter", torch.ones(0), r"got shape \[0\], expected one number"),
        ("DMWLA_1.0.concept_pool", torch.tensor(1.0), r"got shape \[\], expected 2 axes"),
    ]:
        with pytest.raises(ConfigError, match=f"^released checkpoint: {name}: {message}"):
            released._check_axes({name: tensor})
    for tensor in (torch.tensor(1.0), torch.ones(0), torch.ones(3)):
        with pytest.raises(ConfigError, match=r"a\.theta: got shape \[\d?\], expected two axes or more"):
            released._block_tensor("a.", "theta", tensor, {})
        with pytest.raises(ConfigError, match="a: got shape"):
            released._matrix("a", tensor)


def test_counts_beyond_measure() -> None:
    for count, step in [(1e30, 2**53), (-1e30, -1), (torch.inf, 2001), (9000.0, 9000), (3.5, 4)]:
        found = released._block_tensor("a.", "warmup_iter_counter", torch.tensor(count), {})
        assert int(found["a.bank._extra_state"]) == step
    config = ModelConfig()
    for width, expected in [(torch.inf, config.slots), (-torch.inf, 1), (1e30, config.slots), (7.0, 7)]:
        state = released._update_width({"DMWLA_1.0.k": torch.tensor(width)}, config)
        assert int(state["wld.k"]) == expected


def test_convert_answers_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"w": Attack()}, tmp_path / "a.pth")
    assert main(["convert", str(tmp_path / "a.pth"), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"simmp-fast convert: {tmp_path}/a.pth: cannot be read as a checkpoint of tensors alone: it")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_timm_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is asked once, and its client, which tries for a minute, not at all."""
    import timm

    asked = []

    def unreachable(request: Any, timeout: float) -> None:
        asked.append((request.full_url, timeout))
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(backbone, "urlopen", unreachable)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("asked the Hub's client"))
    name = "maxvit_rmlp_pico_rw_256"
    message = (
        rf"got timm's weights of '{name}', which cannot be had \(https?://\S+ cannot be reached: .*unreachable\); "
        "download them elsewhere and name the file, or train without"
    )
    with pytest.raises(ConfigError, match=message):
        backbone._downloaded(name, 256)
    assert len(asked) == 1
    assert asked[0][1] <= 10


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "local-dir:/etc", "x" * 5000, "\x1b[31m", ""])
def test_a_backbone_is_a_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^model.backbone: got .*, (expected|which)") as raised:
        backbone._create(name, 64)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value)) < 700


def test_a_flipped_bit_in_weights_of_ours_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_sealed(path, {"w": torch.ones(64)}, {})
    assert read_tensors(path)["w"].sum() == 64
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)
    refused(path, "a.safetensors: damaged: its contents differ from the checksum in it")
