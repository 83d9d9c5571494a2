import pytest
from small_demo import needs_template

from simmp_fast.config import ConfigError
from simmp_fast.data import open_source
from simmp_fast.data.demo import DemoSource
from simmp_fast.data.folder import FolderSource


@needs_template
def test_names_and_files(volumes):
    assert isinstance(open_source("demo"), DemoSource)
    assert isinstance(open_source(volumes), FolderSource)
    assert isinstance(open_source(str(volumes)), FolderSource)


def test_unknown_names_say_which_exist():
    with pytest.raises(ConfigError, match=r"got 'brains', expected one of demo, or the path of a \.yaml file"):
        open_source("brains")
