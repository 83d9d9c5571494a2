"""Options of the benchmark that are no measure."""

from __future__ import annotations

import pytest

from simmp_fast.cli import build_parser


@pytest.mark.parametrize(
    ("option", "value", "need"),
    [
        ("--seconds", "nan", "a number of at most 86400"),
        ("--seconds", "inf", "a number of at most 86400"),
        ("--seconds", "soon", "a number of at most 86400"),
        ("--batch", "1e9", "a whole number of at most 65536"),
        ("--batch", "1000000000000", "a whole number of at most 65536"),
    ],
)
def test_options_that_are_no_measure(capsys: pytest.CaptureFixture[str], option: str, value: str, need: str) -> None:
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["bench", option, value])
    assert ended.value.code == 2
    assert f"{option}: got '{value}', expected {need}" in capsys.readouterr().err
