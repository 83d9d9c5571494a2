"""Folders of saved networks, files of backbone weights, and all that can be wrong with their places and contents."""

from __future__ import annotations

import errno
import json
import socket
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from simmp_fast import folders
from simmp_fast.cli import main
from simmp_fast.config import ConfigError, ModelConfig
from simmp_fast.messages import Note
from simmp_fast.model import SimMPNet, pretrained, sealing
from simmp_fast.model.backbone import GatedBackbone
from simmp_fast.model.sealing import check_finite
from simmp_fast.model.weight_files import read_tensors

CONFIG = json.dumps({"classes": 3})
ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def safetensors_of(header: object, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(16)


DAMAGED = {
    "empty": b"",
    "random": bytes(range(7, 90)),
    "huge header": safetensors_of({"a": ENTRY}, 2**60),
    "no object": safetensors_of([1, 2]),
    "no JSON": safetensors_of(b'{"a":'),
    "no text": safetensors_of(b"\xff\xfe{}"),
    "offsets": safetensors_of({"a": ENTRY | {"data_offsets": [0, 12]}}),
    "beyond the end": safetensors_of({"a": ENTRY | {"shape": [400], "data_offsets": [0, 1600]}}),
    "dtype": safetensors_of({"a": ENTRY | {"dtype": "F99"}}),
}


def test_a_network_without_values_is_not_saved(tiny: ModelConfig, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = SimMPNet(tiny)
    with pytest.raises(ValueError, match="got a tensor on the meta device"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_safetensors(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    (tmp_path / "config.json").write_text(CONFIG)
    with pytest.raises(ConfigError, match=r"model.safetensors: cannot be read as safetensors"):
        pretrained.read(str(tmp_path), {})
    with pytest.raises(ConfigError, match=r"model.safetensors: cannot be read as safetensors"):
        read_tensors(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json: cannot be read as JSON"),
        (b"\xff\xfe", "config.json: cannot be read as JSON"),
        (b"[1]", "config.json: got"),
        (b'{"clases": 3}', "config.json: clases: unknown key"),
        (b'{"classes": 1}', "config.json: model.classes: got 1"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=message):
        pretrained.read(str(tmp_path), {})


@pytest.mark.parametrize(
    "name", ["./net", "~/net", "/nowhere/net", "a/b/c", "here/net", "net/", r"runs\net", "C:/net", "C:net", "file.bin"]
)
def test_a_folder_that_is_not_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file.bin").touch()
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the Hub"))
    for source in (name, Path("owner/name")):
        with pytest.raises(ConfigError, match="no such folder"):
            SimMPNet.from_pretrained(source)


@pytest.mark.parametrize("error", [OSError("not found"), ValueError("bad name"), ConnectionError("offline")])
@pytest.mark.parametrize("name", ["name", "owner/name"])
def test_what_the_hub_refuses(name: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(ConfigError, match=rf"^{name}: no such folder, and config.json .* \({error}\)"):
        SimMPNet.from_pretrained(name)


class Small(SimMPNet):
    """What is saved of a network, without the network."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.config = ModelConfig()
        self.heads = nn.Linear(2, 2)


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_full_disk_leaves_a_folder_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "net"
    Small().save_pretrained(saved)
    (saved / "notes.txt").write_text("mine")
    before = files_of(saved)
    assert set(before) == {"README.md", "config.json", "model.safetensors", "notes.txt"}
    monkeypatch.setattr(pretrained, "write_sealed", full_disk)
    with pytest.raises(ConfigError, match=r"net: cannot be written \(.*No space left on device\)"):
        Small().save_pretrained(saved)
    assert files_of(saved) == before
    with pytest.raises(ConfigError, match="cannot be written"):
        Small().save_pretrained(tmp_path / "new" / "net")
    assert not (tmp_path / "new").exists()


def test_saving_replaces_the_network_alone(tmp_path: Path) -> None:
    Small().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("mine")
    first = files_of(tmp_path)
    Small().save_pretrained(tmp_path)
    second = files_of(tmp_path)
    assert first.keys() == second.keys()
    assert second["README.md"] == b"mine"
    assert first["model.safetensors"] != second["model.safetensors"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    left = tmp_path / f".simmp-fast-{socket.gethostname()}-{process.pid}-0123456789ab-network"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".notes").write_text("mine")
    Small().save_pretrained(tmp_path)
    assert set(files_of(tmp_path)) == {".notes", "README.md", "config.json", "model.safetensors"}
    assert not left.exists()


def read(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    return pretrained.read(str(folder), {})


@pytest.mark.filterwarnings("error")
def test_a_flipped_bit_is_seen(tmp_path: Path) -> None:
    Small().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    for place in range(0, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :])
        with pytest.raises(
            ConfigError, match=r"model.safetensors: (damaged: .*copy it again|cannot be read as safetens)"
        ):
            read(tmp_path)
    file.write_bytes(whole)
    assert read(tmp_path)[0] == ModelConfig()


def test_a_configuration_of_other_weights_is_refused(tmp_path: Path) -> None:
    Small().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"classes": 9', '"classes": 4').replace('"variant": "paper",', ""))
    with pytest.raises(
        ConfigError, match=r"config.json: differs .*model.safetensors was saved with: classes is 4, saved"
    ):
        read(tmp_path)


def test_weights_from_elsewhere_are_read_with_a_note(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(CONFIG)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.warns(Note, match=r"model.safetensors: holds no checksum, so damage to its values cannot be noticed"):
        assert read(tmp_path)[0].classes == 3
    save_file({"a": torch.tensor([1.0, torch.inf])}, tmp_path / "model.safetensors")
    with pytest.warns(Note), pytest.raises(ConfigError, match=r"model.safetensors: a: got 1 of 2 values .* not finite"):
        read(tmp_path)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3), torch.zeros(0, 4), torch.ones(2, 3).t(), torch.ones(3, dtype=torch.bfloat16),
        torch.tensor([True]), torch.ones(2, dtype=torch.float64),
    ],
)  # fmt: skip
def test_seals_of_all_kinds_of_tensors(tensor: Tensor, tmp_path: Path) -> None:
    tensors = {"a": tensor.contiguous(), "b": torch.ones(1)}
    header = sealing.seal(tensors, {"step": "3"})
    save_file(tensors, tmp_path / "x.safetensors", header)
    found, metadata = sealing.read_sealed(tmp_path / "x.safetensors")
    assert metadata == header
    assert torch.equal(found["a"], tensor)
    save_file(tensors, tmp_path / "x.safetensors", {**header, "step": "4"})
    with pytest.raises(ConfigError, match="x.safetensors: damaged"):
        sealing.read_sealed(tmp_path / "x.safetensors")
    save_file({"b": tensors["a"], "a": tensors["b"]}, tmp_path / "x.safetensors", header)
    with pytest.raises(ConfigError, match="x.safetensors: damaged"):
        sealing.read_sealed(tmp_path / "x.safetensors")


def test_bad_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/net"):
        with pytest.raises(ConfigError, match=f"{place}: cannot be written"):
            Small().save_pretrained(tmp_path / place)
    (tmp_path / "net" / "model.safetensors").mkdir(parents=True)
    (tmp_path / "net" / "config.json").write_text("mine")
    with pytest.raises(ConfigError, match="model.safetensors: got a folder, expected a file"):
        Small().save_pretrained(tmp_path / "net")
    assert files_of(tmp_path) == {"file": b"mine", "net/config.json": b"mine"}


def test_convert_to_a_bad_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(SimMPNet, "from_released", lambda *_, **__: Small())
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/net"):
        assert main(["convert", "any.pth", "--out", str(tmp_path / place)]) == 2
        assert f"{tmp_path}/file" in capsys.readouterr().err
    assert files_of(tmp_path) == {"file": b"mine"}


@pytest.fixture(scope="module")
def backbone() -> GatedBackbone:
    torch.manual_seed(0)
    return GatedBackbone("coatnet_pico_rw_224", 64)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s | {"head.fc.weight": torch.ones(2)},
        lambda s: {"model": s, "epoch": 3, "optimizer": {"state": {}}, "losses": [1.0, None]},
        lambda s: {"state_dict": {f"module.{name}": value for name, value in s.items()}, "arch": "maxvit"},
        lambda s: {"model_state_dict": {f"_orig_mod.backbone.{name}": value for name, value in s.items()}},
        lambda s: {"state_dict_ema": s, "state_dict": None},
        lambda s: s | {"names": ["a"], "nothing": None, "epoch": 3},
    ],
)
def test_backbone_weights_in_forms_that_circulate(
    wrap: Callable[[dict[str, Tensor]], Any], backbone: GatedBackbone, tmp_path: Path
) -> None:
    wanted = {n: torch.ones_like(t) for n, t in backbone.state_dict().items() if n.startswith(("stem.", "stages."))}
    torch.save(wrap(wanted), tmp_path / "weights.pth")
    with torch.no_grad():
        for tensor in backbone.state_dict().values():
            tensor.zero_()
    backbone.load_weights(str(tmp_path / "weights.pth"))
    found = backbone.state_dict()
    assert all(bool((found[name] == 1).all()) for name in wanted)


def test_backbone_weights_that_do_not_fit(backbone: GatedBackbone, tmp_path: Path) -> None:
    state = {n: t for n, t in backbone.state_dict().items() if n.startswith(("stem.", "stages."))}
    name = next(iter(state))
    for content, message in (
        ([state], "weights.pth: got a list, without a state dict"),
        (state | {name: state[name].to(torch.int8)}, f"lacks 1 of the backbone's .* the first being {name}"),
        (state | {name: state[name][:1]}, f"lacks 1 of the backbone's .* the first being {name}"),
        (nn.Linear(1, 1), "weights.pth: .* which is code"),
        (state | {name: state[name] * torch.nan}, f"weights.pth: {name}: got values that are not finite, .*1 of"),
    ):
        torch.save(content, tmp_path / "weights.pth")
        with pytest.raises(ConfigError, match=rf"^train.backbone_weights: .*{message}"):
            backbone.load_weights(str(tmp_path / "weights.pth"))
    save_file({n: t.contiguous().clone() for n, t in state.items()}, tmp_path / "weights.safetensors")
    backbone.load_weights(str(tmp_path / "weights.safetensors"))
    with pytest.raises(ConfigError, match=r"^train.backbone_weights: .*absent.pth: no such file"):
        backbone.load_weights(str(tmp_path / "absent.pth"))


def test_values_that_are_not_finite_are_found_in_any_kind_of_number(tmp_path: Path) -> None:
    check_finite({"a": torch.ones(2).to(torch.float8_e4m3fn), "b": torch.ones(2, dtype=torch.int8)}, "here")
    with pytest.raises(ConfigError, match="here: a: got 1 of 2 values that are not finite"):
        check_finite({"a": torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)}, "here")
    with pytest.raises(ConfigError, match="here: a: got complex numbers"):
        check_finite({"a": torch.ones(2, dtype=torch.complex64)}, "here")


def test_what_was_written_but_not_moved_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = tmp_path / "net"
    saved.mkdir()
    plain = folders.sync

    def sync(path: Path) -> None:
        if (saved / folders.READY).exists():
            raise OSError(errno.EIO, "Input/output error")
        plain(path)

    monkeypatch.setattr(folders, "sync", sync)
    with pytest.raises(ConfigError, match=r"net: cannot be written \(Input/output error\); all was written; save it"):
        Small().save_pretrained(saved)
    monkeypatch.undo()
    Small().save_pretrained(saved)
    assert set(files_of(saved)) == {"README.md", "config.json", "model.safetensors"}
