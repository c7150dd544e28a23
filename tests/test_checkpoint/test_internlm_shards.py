"""InternLM's own checkpoints, cut by hand, read back; and damaged ones, refused."""

import pytest
import torch

from internlm_mm.checkpoint.internlm_shards import import_internlm
from internlm_mm.registry import MODELS
from tests.internlm_oracle import FAMILIES, GROUPED, SIZES, full_state, write_shards


def check(folder, state, sizes, family, **options):
    """What is read is what was cut; shapes and dtypes are known before."""
    config, weights = import_internlm(folder, **options)
    assert config == {'type': family, **sizes}
    assert set(weights) == set(state) and len(weights) == len(state)
    for name, tensor in state.items():
        assert tuple(weights.shape(name)) == tuple(tensor.shape), name
        assert weights.dtype(name) == tensor.dtype
        assert torch.equal(weights[name], tensor), name
    weights.check_files()
    return weights


@pytest.mark.parametrize('tp', [1, 2, 4])
@pytest.mark.parametrize('pp', [1, 2, 4])
@pytest.mark.parametrize('w2_up', [True, False])
def test_first_generation(tmp_path, tp, pp, w2_up):
    state = full_state(SIZES, biases=True)
    write_shards(tmp_path / 'x', state, SIZES, tp=tp, pp=pp, w2_up=w2_up, config={})
    check(tmp_path / 'x', state, SIZES, 'InternLM')
    name = 'internlm-2023' if w2_up else 'internevo'
    check(tmp_path / 'x', state, SIZES, 'InternLM', format=name)


@pytest.mark.parametrize('kind', ['INTERNLM2_PUBLIC', 'LLAMA2'])
@pytest.mark.parametrize(('tp', 'pp'), [(1, 1), (2, 1), (1, 4), (2, 2)])
@pytest.mark.parametrize('adapt_hf', [True, False])
def test_internevo(tmp_path, kind, tp, pp, adapt_hf):
    state = full_state(GROUPED, biases=False)
    write_shards(
        tmp_path / 'x', state, GROUPED, kind=kind, tp=tp, pp=pp, adapt_hf=adapt_hf, config={}
    )
    check(tmp_path / 'x', state, GROUPED, FAMILIES[kind])


@pytest.mark.parametrize('kind', ['INTERNLM2_PUBLIC', 'LLAMA2'])
@pytest.mark.parametrize('adapt_hf', [True, False])
def test_internevo_in_four_parts(tmp_path, kind, adapt_hf):
    sizes = {**GROUPED, 'num_heads': 8, 'num_kv_heads': 4}
    state = full_state(sizes, biases=False)
    write_shards(tmp_path / 'x', state, sizes, kind=kind, tp=4, pp=2, adapt_hf=adapt_hf, config={})
    check(tmp_path / 'x', state, sizes, FAMILIES[kind])


@pytest.mark.parametrize('kind', list(FAMILIES))
@pytest.mark.parametrize('tp', [1, 2])
def test_embedding_cut_by_rows(tmp_path, kind, tp):
    sizes = SIZES if kind == 'INTERNLM' else GROUPED
    state = full_state(sizes, biases=kind == 'INTERNLM')
    write_shards(tmp_path / 'x', state, sizes, kind=kind, tp=tp, split_hidden=False, config={})
    check(tmp_path / 'x', state, sizes, FAMILIES[kind])


@pytest.mark.parametrize('chunks', [2, 4])
def test_interleaved_pipeline(tmp_path, chunks):
    sizes = SIZES | {'num_layers': 8}
    state = full_state(sizes, biases=True)
    write_shards(tmp_path / 'x', state, sizes, tp=2, pp=2, chunks=chunks, config={})
    check(tmp_path / 'x', state, sizes, 'InternLM')


def test_output_bias_in_the_first_part_only(tmp_path):
    state = full_state(SIZES, biases=True)
    write_shards(tmp_path / 'x', state, SIZES, tp=4, pp=2, bias_once=True, config={})
    check(tmp_path / 'x', state, SIZES, 'InternLM')


def test_dtypes_stay(tmp_path):
    state = {name: x.bfloat16() for name, x in full_state(SIZES, biases=True).items()}
    state['norm.weight'] = state['norm.weight'].float()
    write_shards(tmp_path / 'x', state, SIZES, tp=2, config={})
    check(tmp_path / 'x', state, SIZES, 'InternLM')


def test_only_one_stage_is_mapped(tmp_path):
    write_shards(tmp_path / 'x', full_state(SIZES, biases=True), SIZES, tp=2, pp=4, config={})
    _, weights = import_internlm(tmp_path / 'x')
    kept = [weights[name] for name in weights]
    mapped = [[file._state is not None for file in stage] for stage in weights.shards.files]
    assert mapped == [[False, False]] * 3 + [[True, True]]
    assert all(torch.isfinite(tensor).all() for tensor in kept)


def test_head_with_unit_rows(tmp_path):
    state = full_state(GROUPED, biases=False)
    write_shards(
        tmp_path / 'x', state, GROUPED, kind='INTERNLM2_PUBLIC', tp=2, config={'norm_head': True}
    )
    _, weights = import_internlm(tmp_path / 'x')
    head = state['lm_head.weight']
    expected = head / head.pow(2).sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(weights['lm_head.weight'], expected)
    assert torch.equal(weights['norm.weight'], state['norm.weight'])


@pytest.mark.parametrize('w2_up', [True, False])
def test_square_projections_need_the_format(tmp_path, w2_up):
    sizes = SIZES | {'intermediate_size': 64}  # 32 x 32 in each of two parts
    state = full_state(sizes, biases=True)
    write_shards(tmp_path / 'x', state, sizes, tp=2, w2_up=w2_up, config={})
    with pytest.raises(ValueError, match=r'--format internlm-2023.*--format internevo'):
        import_internlm(tmp_path / 'x')
    name = 'internlm-2023' if w2_up else 'internevo'
    check(tmp_path / 'x', state, sizes, 'InternLM', format=name)


@pytest.mark.parametrize(('w2_up', 'wrong'), [(True, 'internevo'), (False, 'internlm-2023')])
def test_the_other_format(tmp_path, w2_up, wrong):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, w2_up=w2_up, config={})
    with pytest.raises(ValueError, match=rf"'{wrong}' does not fit: 'blocks.0.mlp.w2.weight'"):
        import_internlm(tmp_path / 'x', format=wrong)


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"'internvo' is unknown\. Did you mean 'internevo'"):
        import_internlm(tmp_path, format='internvo')


@pytest.fixture
def folder(tmp_path):
    write_shards(tmp_path / 'x', full_state(SIZES, True), SIZES, tp=2, pp=2, config={})
    return tmp_path / 'x'


def change(file, edit):
    state = torch.load(file, weights_only=True)
    edit(state)
    torch.save(state, file)


def in_both(folder, stage, edit):
    for t in range(2):
        change(folder / f'model_tp{t}_pp{stage}.pt', edit)


def test_a_missing_tensor(folder):
    in_both(folder, 1, lambda s: s.pop('model.blocks.0.mlp.w3.weight'))
    with pytest.raises(ValueError, match=r"'blocks\.2\.mlp\.w3\.weight' is missing"):
        import_internlm(folder)


def test_a_missing_head(folder):
    in_both(folder, 1, lambda s: s.pop('model.head.weight'))
    with pytest.raises(ValueError, match=r"'head\.weight' is missing"):
        import_internlm(folder)


@pytest.mark.parametrize('name', ['blocks.1.mlp.w4.weight', 'blocks.0.norm1.scale', 'bias'])
def test_an_extra_tensor(folder, name):
    in_both(folder, 0, lambda s: s.update({f'model.{name}': torch.ones(3)}))
    with pytest.raises(ValueError, match=rf"'model\.{name}' in model_tp0_pp0\.pt"):
        import_internlm(folder)


def test_a_wrong_shape(folder):
    edit = {'model.blocks.1.mlp.w1.weight': torch.ones(23, 32)}
    in_both(folder, 1, lambda s: s.update(edit))
    with pytest.raises(
        ValueError,
        match=r"'model\.blocks\.1\.mlp\.w1\.weight' in model_tp0_pp1\.pt has shape \[23, 32\]; "
        r'expected \[24, 32\]',
    ):
        import_internlm(folder)


def test_another_model(folder):
    in_both(folder, 0, lambda s: s.clear())
    in_both(folder, 1, lambda s: s.clear() or s.update(bert=torch.ones(2)))
    with pytest.raises(ValueError, match=r'none of blocks\.0\.mixer\.Wqkv\.weight.*are bert'):
        import_internlm(folder)


def test_families_are_registered():
    MODELS.import_from_location()
    assert all(MODELS.get(family) is not None for family in FAMILIES.values())
