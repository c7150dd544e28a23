"""The reader against MMEngine's own, and where ours goes further."""

import datetime
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mmengine.config import Config, ConfigDict

from internlm_mm.utils.config import to_plain
from internlm_mm.utils.config_reader import ConfigError, ConfigReader, shipped_configs

Write = Callable[[str, str], Path]

BASE = """
    from torch.nn import Linear
    from torch import nn
    import torch.optim
    import torch.optim as optim

    width = 4
    model = dict(type=Linear, in_features=width, inner=dict(a=1, b=[dict(c=2), (3,)]))
    other = dict(type=nn.ReLU, optimizer=torch.optim.AdamW, second=optim.SGD)
    """


def read(path: Path) -> dict:
    names = ConfigReader().read(path)
    plain = to_plain(names.values)
    return {key: value for key, value in plain.items() if key not in names.imported}


def test_reads_what_mmengine_reads(write: Write) -> None:
    write('_base_/model.py', BASE)
    write('_base_/data.py', 'data = dict(size=1)\nother_data = [1, 2]\n')
    write(
        'middle.py',
        """
        from mmengine.config import read_base

        with read_base():
            from ._base_.data import data as corpus
            from ._base_.model import *

        from torch.nn import GELU

        model.update(inner=dict(b=[5]), out_features=7)
        other['type'] = GELU
        corpus.size = 10 * width
        """,
    )
    leaf = write(
        'leaf.py',
        """
        from mmengine.config import read_base

        with read_base():
            from .middle import *

        model.merge(dict(inner=dict(a=2)))
        lines = [dict(type=Linear, in_features=n) for n in (1, 2)]
        for step in range(3):
            corpus['size'] += step
        label = f'{width} wide'
        """,
    )
    theirs = Config.fromfile(str(leaf)).to_dict()
    assert read(leaf) == theirs
    assert theirs['model']['inner'] == {'a': 2, 'b': [5]}  # so that the test tests something


def test_parsing_imports_no_class(write: Write) -> None:
    path = write('a.py', 'from no_such_package.models import Model\nmodel = dict(type=Model)\n')
    assert read(path) == {'model': {'type': 'no_such_package.models.Model'}}


def test_the_standard_library_is_usable(write: Write) -> None:
    path = write(
        'a.py',
        """
        import os.path
        from datetime import timedelta
        from math import ceil

        steps = ceil(2.5)
        name = os.path.join('a', 'b')
        hour = timedelta(hours=1)
        """,
    )
    assert read(path) == {'steps': 3, 'name': 'a/b', 'hour': datetime.timedelta(hours=1)}


def test_a_config_elsewhere_inherits_ours(write: Write) -> None:
    path = write(
        'a.py',
        """
        from mmengine.config import read_base

        with read_base():
            from internlm_mm.configs._base_.models.internlm_7b import *

        model.update(num_layers=2)
        """,
    )
    model = read(path)['model']
    assert (model['num_layers'], model['hidden_size']) == (2, 4096)


def test_a_config_inherits_another_packages(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write('other_package/__init__.py', 'raise RuntimeError("reading a config imports nothing")')
    write('other_package/configs/base.py', 'model = dict(a=1)\n')
    path = write(
        'run/a.py',
        """
        from mmengine.config import read_base

        with read_base():
            from other_package.configs.base import model
        """,
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert read(path) == {'model': {'a': 1}}


def test_reading_leaves_mmengine_as_it_was(write: Write) -> None:
    path = write('a.py', 'from torch.nn import ReLU\nmodel = dict(type=ReLU)\nbroken = missing\n')
    with pytest.raises(ConfigError):
        ConfigReader().read(path)
    assert ConfigDict.lazy is False


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('a = (', 'not valid Python'),
        ('depth = 1\nb = dept + 1', r"line 2: name 'dept' is not defined\. Did you mean 'depth'"),
        ('a = 1\nb = {}["x"]', "line 2: KeyError: 'x'"),
        ('from torch.nn import ReLU\nmodel = ReLU()', r'line 2: .*dict\(type=Name'),
        ('from torch import *', r'line 1: `import \*`'),
        ('from .base import *', r'line 1: inherit from another config inside'),
        ('_base_ = ["a.py"]', 'line 1: text bases'),
        ('with open("x"):\n    pass', 'line 1: the only `with`'),
        ('with read_base():\n    import base', 'line 2: inside read_base'),
        ('with read_base():\n    from .bsae import *', r"line 2: .*Did you mean 'base'"),
        ('with read_base():\n    from .base import modle', r"no 'modle'\. Did you mean 'model'"),
        ('with read_base():\n    from . import base', 'line 2: name the config'),
        ('with read_base():\n    from nowhere_at_all.x import *', "no package 'nowhere_at_all'"),
        ('with read_base():\n    from .a import *', r'in a circle: a\.py -> a\.py'),
        ('with read_base():\n    from internlm_mm.configs._base_.models.internlm_7 import *', '7b'),
    ],
)
def test_errors_name_file_and_line(write: Write, text: str, message: str) -> None:
    write('base.py', 'model = dict(a=1)\n')
    path = write('a.py', text)
    with pytest.raises(ConfigError, match=message) as caught:
        ConfigReader().read(path)
    assert str(path) in str(caught.value)


def test_a_fault_in_a_base_names_the_base(write: Write) -> None:
    base = write('base.py', 'a = 1\n\nb = a / 0\n')
    path = write('a.py', 'with read_base():\n    from .base import *\n')
    with pytest.raises(ConfigError, match=f'{base}, line 3: ZeroDivisionError'):
        ConfigReader().read(path)


def test_our_configs_are_found_from_a_checkout_and_from_a_wheel(tmp_path: Path) -> None:
    assert (shipped_configs() / '_base_').is_dir()
    code = Path(shipped_configs().parent / 'internlm_mm/utils/config_reader.py').read_text()
    package = tmp_path / 'internlm_mm'
    (package / 'configs').mkdir(parents=True)
    (package / 'utils').mkdir()
    for name in ('__init__.py', 'utils/__init__.py'):
        (package / name).touch()
    (package / 'utils/config_reader.py').write_text(code)
    (package / 'utils/suggest.py').write_text('def did_you_mean(*_): return ""\n')
    program = 'from internlm_mm.utils.config_reader import *; print(shipped_configs())'
    printed = subprocess.run(
        [sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert printed == str(package / 'configs')


def test_files_that_windows_editors_write(tmp_path: Path) -> None:
    """Python reads them, too."""
    (tmp_path / 'base.py').write_bytes(b'\xef\xbb\xbfwidth = 4\r\n')
    file = tmp_path / 'a.py'
    file.write_bytes(
        b'\xef\xbb\xbfwith read_base():\r\n    from .base import *\r\nmodel = dict(n=width)\r\n'
    )
    assert read(file)['model'] == {'n': 4}
