"""What we write for InternLM is what it writes: the shards cut by hand, to the bit."""

import pytest
import torch

from internlm_mm.checkpoint.internlm_shards import import_internlm
from internlm_mm.checkpoint.internlm_writer import write_internlm_shards
from tests.internlm_oracle import FAMILIES, GROUPED, SIZES, full_state, write_shards


def same_files(folder, expected):
    names = sorted(path.name for path in expected.glob('model_tp*.pt'))
    assert sorted(path.name for path in folder.glob('model_tp*.pt')) == names
    for name in names:
        ours, theirs = (torch.load(f / name, weights_only=True) for f in (folder, expected))
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), (name, key)


@pytest.mark.parametrize('kind', list(FAMILIES))
@pytest.mark.parametrize(('tp', 'pp', 'chunks'), [(1, 1, 1), (2, 2, 1), (1, 4, 1), (2, 2, 2)])
@pytest.mark.parametrize('other', [True, False])
def test_shards_are_those_of_the_oracle(tmp_path, kind, tp, pp, chunks, other):
    first = kind == 'INTERNLM'
    sizes = SIZES if first else GROUPED
    state = full_state(sizes, biases=first)
    split = {'w2_up': other} if first else {'adapt_hf': other}
    write_shards(
        tmp_path / 'x', state, sizes, kind=kind, tp=tp, pp=pp, chunks=chunks, split_hidden=other,
        **split,
    )  # fmt: skip
    config = {'type': FAMILIES[kind], **sizes}
    write_internlm_shards(
        config, state, tmp_path / 'y', tp=tp, pp=pp, num_chunks=chunks, embed_split_hidden=other,
        format='internlm-2023' if first and other else 'internevo', adapt_hf=first or other,
    )  # fmt: skip
    same = tmp_path / 'x'
    if not first and not other:  # the oracle names every row-split embedding as InternLM did
        for path in same.glob('model_tp*_pp0.pt'):
            shard = torch.load(path, weights_only=True)
            torch.save({k.replace('.word_embeddings', ''): v for k, v in shard.items()}, path)
    same_files(tmp_path / 'y', same)
    again, weights = import_internlm(tmp_path / 'y')
    assert again == config
    assert all(torch.equal(weights[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize('longest', [2048, 8192])
def test_stretched_positions_and_no_biases_come_back(tmp_path, longest):
    scaling = {'rope_type': 'dynamic', 'factor': 1.0, 'original_max_position_embeddings': 2048}
    config = {'type': 'InternLM', **SIZES, 'attention_bias': False, 'rope_scaling': scaling}
    config['max_seq_len'] = longest
    state = full_state(SIZES, biases=False)
    write_internlm_shards(config, state, tmp_path / 'y', tp=2)
    again, weights = import_internlm(tmp_path / 'y')
    # The format has one number for both lengths, as Hugging Face's.
    assert again == config | {'max_seq_len': 2048}
    assert set(weights) == set(state)
    said = torch.load(tmp_path / 'y' / 'model_config.pt', weights_only=True)
    assert said['no_bias'] and said['use_dynamic_ntk_rope']


@pytest.mark.parametrize(
    ('changes', 'options', 'message'),
    [
        ({}, {'tp': 3}, 'tp=3 does not divide num_heads=4'),
        ({}, {'pp': 5}, '4 layers do not divide into 5 x 1'),
        ({}, {'format': 'internvo'}, "Did you mean 'internevo'"),
        ({'type': 'Qwen2'}, {}, "Qwen2 has no form in InternLM's checkpoints"),
        ({'type': 'Llama'}, {}, "format='internlm-2023' has no Llama; internevo has"),
        ({'rope_scaling': {'rope_type': 'yarn'}}, {}, 'has no place in the format'),
        (
            {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}},
            {},
            "'factor': 2.0} has no place in the format",
        ),
        (
            {'type': 'Llama', 'tie_word_embeddings': True},
            {'format': 'internevo'},
            'tie_word_embeddings=True has no place in the format',
        ),
    ],
)
def test_what_cannot_be_written(tmp_path, changes, options, message):
    config = {'type': 'InternLM', **SIZES, **changes}
    with pytest.raises(ValueError, match=message):
        write_internlm_shards(config, full_state(SIZES, True), tmp_path / 'x', **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_kept(tmp_path):
    config = {'type': 'InternLM', **SIZES}
    write_internlm_shards(config, full_state(SIZES, True), tmp_path / 'x')
    with pytest.raises(FileExistsError):
        write_internlm_shards(config, full_state(SIZES, True, seed=1), tmp_path / 'x')
    write_internlm_shards(config, full_state(SIZES, True, 1), tmp_path / 'x', overwrite=True)
