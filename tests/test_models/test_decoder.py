"""The decoder: packing, shapes, seams."""

import copy
import dataclasses
import fnmatch

import pytest
import torch

from internlm_mm.models import InternLM, Llama, Qwen3
from internlm_mm.models.decoder import Decoder
from internlm_mm.ops import make_documents
from internlm_mm.parallel.tensor import match_plan
from internlm_mm.registry import ATTENTIONS, MODELS
from tests.test_models.helpers import SIZES, make_batch, randomize

PACKED = [[7, 1, 12], [20], [4, 16]]


MODELS_OF = {
    'InternLM': lambda: InternLM(**SIZES),
    'Llama': lambda: Llama(**SIZES),
    'Qwen3, tied': lambda: Qwen3(**SIZES, num_kv_heads=2, tie_word_embeddings=True),
    'dynamic': lambda: Llama(
        **SIZES,
        rope_theta=100.0,
        rope_scaling=dict(rope_type='dynamic', factor=2.0, original_max_position_embeddings=8),
    ),
}


@pytest.fixture(params=MODELS_OF.values(), ids=MODELS_OF)
def model(request):
    return randomize(request.param())


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_packed_rows_equal_separate_documents(model):
    batch = make_batch(PACKED)
    alone = copy.deepcopy(model)
    model(batch)['loss'].backward()
    documents = make_documents(batch, need_mask=True)
    hidden = model.hidden_states(batch.input_ids, batch.position_ids, documents)
    logits = model.lm_head(hidden)
    total = 0.0
    for row, sizes in enumerate(PACKED):
        start = 0
        for size in sizes:
            part = slice(start, start + size)
            expected = alone.logits(batch.input_ids[row : row + 1, part])
            torch.testing.assert_close(logits[row : row + 1, part], expected)
            total += torch.nn.functional.cross_entropy(
                expected[0], batch.labels[row, part], reduction='sum'
            )
            start += size
    total.backward()
    wanted = gradients(alone)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_documents_do_not_leak(model):
    batch = make_batch(PACKED)
    documents = make_documents(batch, need_mask=True)

    def run(ids):
        with torch.no_grad():
            return model.hidden_states(ids, batch.position_ids, documents)

    before = run(batch.input_ids)
    changed = batch.input_ids.clone()
    changed[0, 3] += 1  # in the first document, of 7 tokens
    changed %= 128
    moved = (run(changed) != before).any(-1)
    assert moved[0].tolist() == [False] * 3 + [True] * 4 + [False] * 13
    assert not moved[1:].any()


def test_loss_is_a_sum_in_float32(model):
    batch = make_batch([[20], [20]])
    loss = model(batch)['loss']
    assert loss.shape == () and loss.dtype == torch.float32
    logits = model.logits(batch.input_ids)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction='sum'
    )
    torch.testing.assert_close(loss, expected)
    assert list(model(batch)) == ['loss']


def test_float64_is_float64_throughout(model):
    batch = make_batch(PACKED)
    narrow = model(batch)['loss']
    wide = model.double()(batch)['loss']
    assert wide.dtype == torch.float64
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-5, atol=0)


@pytest.mark.parametrize('lengths', [PACKED, [[20], [20]]], ids=['packed', 'dense'])
def test_bfloat16_stays_near_float32(model, lengths):
    batch = make_batch(lengths)
    loss = model(batch)['loss'] / batch.num_targets
    half = model.bfloat16()(batch)['loss'] / batch.num_targets
    # Weights are rounded to 8 bits; losses here are about 7.
    assert abs(half - loss) < 0.1


# torch's tracer asks for it on purpose and hides the warning, unless warnings are errors.
@pytest.mark.filterwarnings('ignore:The .grad attribute of a Tensor')
def test_layers_trace_into_one_graph(model):
    batch = make_batch(PACKED)
    expected = model(batch)['loss']
    for layer in model.layers.values():
        layer.compile(fullgraph=True, backend='eager')
    torch.testing.assert_close(model(batch)['loss'], expected)
    torch.testing.assert_close(
        model(make_batch([[20], [20]]))['loss'].isfinite(), torch.tensor(True)
    )


def test_the_seam_decides_whether_a_mask_is_built(model):
    seen = []

    def attend(q, k, v, documents):
        seen.append(documents.mask)
        return q

    attend.needs_mask = False
    for layer in model.layers.values():
        layer.self_attn.attend = attend
    model(make_batch(PACKED))
    assert seen == [None] * 3
    model.layers['1'].self_attn.attend = ATTENTIONS.get('sdpa')
    model(make_batch(PACKED))
    assert len(seen) == 5 and seen[-1].shape == (3, 1, 20, 20)


def test_built_on_meta_there_are_only_parameters_to_fill():
    with torch.device('meta'):
        model = InternLM(**SIZES)
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_row_longer_than_the_model(model):
    with pytest.raises(ValueError, match='rows of 65 tokens exceed max_seq_len=64'):
        model(make_batch([[65]]))


@pytest.mark.parametrize(
    ('key', 'value'),
    [('vocab_size', 0), ('num_layers', -1), ('max_seq_len', 12.5), ('intermediate_size', '48')],
)
def test_sizes_that_are_no_sizes(key, value):
    with pytest.raises(ValueError, match=f'{key}={value!r} must be a positive integer'):
        InternLM(**(SIZES | {key: value}))


def test_unknown_options_are_errors():
    with pytest.raises(TypeError, match='num_layer'):
        InternLM(**SIZES, num_layer=3)


def test_parts_of_a_model_one_after_the_other(model):
    """As a pipeline cuts it: the first without a head, the last without an embedding."""
    if model.tie_word_embeddings:
        pytest.skip('pipelines refuse tied heads')
    batch = make_batch(PACKED)
    whole = copy.deepcopy(model)
    parts = [copy.deepcopy(model) for _ in range(3)]
    for index, part in enumerate(parts):
        part.layers = torch.nn.ModuleDict({str(index): part.layers[str(index)]})
        if index > 0:
            part.embed_tokens = None
        if index < 2:
            part.norm = part.lm_head = None
    first = parts[0](batch)
    assert first.shape == (3, 20, 32)
    loss = parts[2](batch, parts[1](batch, first))['loss']
    expected = whole(batch)['loss']
    assert torch.equal(loss, expected)
    loss.backward()
    expected.backward()
    wanted = gradients(whole)
    found = [item for part in parts for item in gradients(part).items()]
    assert sorted(name for name, _ in found) == sorted(wanted)
    for name, grad in found:
        assert torch.equal(grad, wanted[name]), name


def test_a_part_without_an_embedding_needs_what_came_before(model):
    model.embed_tokens = None
    with pytest.raises(AssertionError, match='needs the layers before'):
        model(make_batch(PACKED))


@pytest.mark.parametrize('original', [4, 8, 64])
def test_a_rank_with_some_tokens_of_packed_rows_has_their_angles(original):
    """Under context parallelism lengths are those of whole documents, long or short."""
    scaling = dict(rope_type='dynamic', factor=2.0, original_max_position_embeddings=original)
    model = randomize(Llama(**SIZES, rope_theta=100.0, rope_scaling=scaling))
    tables = []
    model.layers['0'].register_forward_pre_hook(lambda _module, args: tables.append(args[1]))
    batch = make_batch(PACKED)
    own = torch.tensor([3, 19, 0, 8])
    part = dataclasses.replace(
        batch,
        input_ids=batch.input_ids[:, own],
        labels=batch.labels[:, own],
        position_ids=batch.position_ids[:, own],
        own_positions=own,
    )
    for layer in model.layers.values():
        layer.self_attn.attend = lambda q, k, v, documents: q
        layer.self_attn.attend.needs_mask = False
    model(batch)
    model(part)
    assert torch.equal(tables[1], tables[0][:, :, own])
    plain = model.hidden_states(batch.input_ids, batch.position_ids, lengths=torch.ones(1, 1))
    assert plain.shape == (3, 20, 32)
    assert torch.equal(tables[2], tables[0]) == (original >= 20)


FAMILIES = [
    family
    for family in MODELS.module_dict.values()
    if isinstance(family, type) and issubclass(family, Decoder)
]


def test_families_are_found():
    assert {InternLM, Llama} <= set(FAMILIES)


@pytest.mark.parametrize('family', FAMILIES)
def test_the_tensor_plan_says_something_of_every_parameter(family):
    with torch.device('meta'):
        built = family(**SIZES)
    modules = dict(built.named_modules())
    for pattern in built.tensor_plan:
        assert any(fnmatch.fnmatchcase(name, pattern) for name in modules), pattern
    styles = match_plan(built, built.tensor_plan)
    for name, _ in built.named_parameters():
        owner = name.rpartition('.')[0]
        assert owner in styles, name
        assert styles[owner] != 'gather', name  # which leaves parameters alone
