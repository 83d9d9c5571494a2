"""Every kernel of the table has a workload, and the workload launches it."""

from __future__ import annotations

import pytest
import torch

from simmp_fast.kernels import workloads
from simmp_fast.kernels.configs import rows, widths

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.mark.parametrize("kernel", dict.fromkeys(row.kernel for row in rows()))
def test_the_workload_launches_the_kernel(kernel: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workloads, "BATCH", 1)
    monkeypatch.setattr(workloads, "SLOTS", 6)
    monkeypatch.setattr(workloads, "LARGEST", 40)
    monkeypatch.setattr(workloads, "LONG", 1040)
    monkeypatch.setattr(workloads, "LABEL", 16)
    monkeypatch.setattr(workloads, "HEADS", (2, 4))
    width = min(min(widths(kernel, row.dtype)) for row in rows(kernel))
    run = workloads.workload(kernel, width, torch.float32, torch.device("cpu"))
    launched.clear()
    assert all(bool(torch.isfinite(x).all()) for x in run() if x.is_floating_point())
    assert kernel in launched


def test_an_unknown_kernel_is_an_error() -> None:
    with pytest.raises(ValueError, match="kernel: got 'nothing'"):
        workloads.workload("nothing", 1, torch.float32, torch.device("cpu"))
