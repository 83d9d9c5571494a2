import pytest
from small_demo import needs_template

from simmp_fast.config import PRESETS, ConfigError
from simmp_fast.data import open_source
from simmp_fast.data.demo import DemoSource
from simmp_fast.data.folder import FolderSource
from simmp_fast.data.registry import DOWNLOADS


@needs_template
def test_names_and_files(volumes):
    assert isinstance(open_source("demo"), DemoSource)
    assert isinstance(open_source(volumes), FolderSource)
    assert isinstance(open_source(str(volumes)), FolderSource)


def test_unknown_names_say_which_exist():
    known = "acdc, demo, isic2018, segpc2021, synapse"
    with pytest.raises(ConfigError, match=rf"got 'brains', expected one of {known}, or the path of a \.yaml file"):
        open_source("brains")


@pytest.mark.parametrize("name", DOWNLOADS)
def test_published_sets_have_a_preset_and_need_a_folder(name):
    assert name in PRESETS
    with pytest.raises(ConfigError, match=rf"source: missing, expected the folder of the {name} download \(--source\)"):
        open_source(name)


def test_a_folder_or_split_that_makes_no_sense(volumes):
    for name in ("demo", volumes):
        with pytest.raises(ConfigError, match="source: got 'here', expected none: only acdc, isic2018, segpc2021, syn"):
            open_source(name, "here")
    for name in ("demo", volumes, "synapse"):
        with pytest.raises(ConfigError, match="split: got 'released', expected none: only 'acdc' has several"):
            open_source(name, None, "released")
