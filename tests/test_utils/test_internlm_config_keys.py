"""`internlm_mm/utils/internlm_config_keys.py`: the tables are whole and say something."""

import re
from pathlib import Path

from internlm_mm.utils.device import dtype_of
from internlm_mm.utils.internlm_config_keys import ALWAYS, CONSTANTS, DROPPED, DTYPES, FAMILIES

DOCUMENT = Path(__file__).parents[2] / 'docs' / 'en' / 'migration.md'


def test_every_key_has_a_reason() -> None:
    for key, rule in DROPPED.items():
        assert rule.reason and not rule.reason.endswith('.'), key
        assert bool(rule.only) == bool(rule.otherwise), key
    assert all(CONSTANTS.values()) and all(FAMILIES.values()) and all(ALWAYS)


def test_dtypes_are_ours() -> None:
    for name in DTYPES.values():
        dtype_of(name, 'model.dtype')


def test_every_key_is_in_the_documentation() -> None:
    text = DOCUMENT.read_text(encoding='utf-8')
    for key in DROPPED:
        assert re.search(rf'\b{key.rpartition(".")[2]}\b', text), key
