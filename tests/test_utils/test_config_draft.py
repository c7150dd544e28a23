"""`internlm_mm/utils/config_draft.py`."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_mm.utils.config import load_config, to_plain
from internlm_mm.utils.config_draft import Code, Draft, Row, literal, table
from internlm_mm.utils.internlm_reader import InternLMConfig

VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**9), 10**9),
        st.floats(allow_nan=False),
        st.text('ab "\'\\\n{}#', max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(['a', 'b_c', 'D']), inner, max_size=3),
    ),
    max_leaves=6,
)


def draft(used: tuple[str, ...] = (), **values: Any) -> Draft:
    return Draft(InternLMConfig(Path('run.py'), values, set(used)))


@given(value=VALUES)
def test_what_is_written_reads_back(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    made = draft()
    made.bases = ['_base_.models.internlm_tiny']
    made.put('', 'thing', value)
    made.put('model', 'objective', value)
    made.put('other =', 'first', value)
    made.put('other =', 'second', 1)
    path = tmp_path_factory.mktemp('draft') / 'made.py'
    path.write_text(made.text('A heading.'), encoding='utf-8')
    found = to_plain(load_config(path)._cfg_dict)
    assert found['thing'] == found['model']['objective'] == found['other']['first'] == value
    assert type(found['thing']) is type(value)


def test_literals() -> None:
    assert literal(dict(a=Code('x * y'), b=[10_000, (1,)])) == 'dict(a=x * y, b=[10_000, (1,)])'
    assert literal(math.inf) == "float('inf')"
    assert literal(True) == 'True'


def test_values_are_taken_with_their_kind() -> None:
    made = draft(a=dict(x=1, y=True, z='1'))
    assert made.take('a.x', int) == made.take('a.x', float) == 1
    assert made.take('a.y', bool) is True
    assert made.take('b.x', int, 5) == 5
    for key, kind, message in (
        ('a.y', int, 'run.py: a.y=True: expected int'),
        ('a.y', float, 'run.py: a.y=True: expected float'),
        ('a.z', int, "a.z='1': expected int"),
        ('a.xx', int, 'run.py has no a.xx, which it needs. Did you mean .x'),
        ('b.x', int, 'run.py has no b.x, which it needs'),
    ):
        with pytest.raises(ValueError, match=message):
            made.take(key, kind)


def test_rows_say_where_values_went() -> None:
    made = draft(a=dict(x=1, y=2))
    made.put('strategy', 'recompute', 0.5, 'a.x', 'a.z', note='of layers')
    made.put('', 'resume', True, 'a.y', changed=True)
    made.say('a.z', 'not there')
    assert made.rows == {
        'a.x': Row('a.x', 1, 'mapped', 'strategy.recompute=0.5; of layers'),
        'a.y': Row('a.y', 2, 'changed', 'resume=True'),
    }


def test_what_nobody_took_is_explained() -> None:
    made = draft(
        used=('SIZE', 'shared'),
        SIZE=3,
        SEQ_LEN=5,
        VOCAB_SIZE=7,
        shared=dict(a=1),
        DO_ALERT=True,
        data=dict(seq_len=5, packed_length=9, sequence_len=1, type='streaming'),
        model=dict(vocab_size=8, moe_type='GShard', drop_rate=0.1),
        monitor=dict(alert=dict(x=1)),
        _own=1,
    )
    made.put('model', 'max_seq_len', 5, 'data.seq_len')
    made.put('model', 'vocab_size', 8, 'model.vocab_size')
    made.look('model.num_layers')
    made.finish()
    found = {key: row.status for key, row in made.rows.items()}
    assert found == {
        'SIZE': 'dropped',
        'SEQ_LEN': 'dropped',
        'VOCAB_SIZE': 'changed',  # says 7 where the model has 8
        'shared': 'dropped',
        'DO_ALERT': 'dropped',
        'data.seq_len': 'mapped',
        'data.packed_length': 'dropped',
        'data.sequence_len': 'unknown',
        'data.type': 'changed',
        'model.vocab_size': 'mapped',
        'model.moe_type': 'dropped',
        'model.drop_rate': 'changed',
        'monitor.alert': 'dropped',
    }
    assert made.rows['data.sequence_len'].became.endswith("Did you mean 'data.seq_len'?")


def test_another_model_is_refused() -> None:
    made = draft(model=dict(norm_type='layernorm'))
    message = "run.py: model.norm_type='layernorm' cannot be had: every family here has RMSNorm"
    with pytest.raises(ValueError, match=message):
        made.finish()


def test_table() -> None:
    rows = [Row('a.b', 'x' * 50, 'mapped', 'c=1'), Row('d', 2, 'unknown', 'what')]
    first, second = table(rows).splitlines()
    assert first.startswith("mapped   a.b='xxx") and first.endswith('...  c=1')
    assert second.split() == ['unknown', 'd=2', 'what'] and second.index('what') == first.index(
        'c=1'
    )
    assert table([]) == ''
