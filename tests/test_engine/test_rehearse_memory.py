"""What the planner is told of a run."""

import pytest
import torch
from torch import nn

from internlm_mm.engine.rehearse_memory import model_sizes, run_sizes, unknown_parameters
from internlm_mm.models import InternLM, Qwen2, Qwen3
from internlm_mm.optim import CompactAdamW, MuonAdamW
from internlm_mm.parallel.mesh import Layout
from internlm_mm.parallel.pipeline_plan import plan_pipeline
from internlm_mm.parallel.place import Techniques
from internlm_mm.planner import RunSizes, predict_memory

STEP = dict(seq_len=16, micro_batch_size=2, micro_batches=1, micro_batches_at_most=4)


@pytest.fixture
def model() -> InternLM:
    with torch.device('meta'):
        return InternLM(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_layers=4,
            num_heads=4,
            objective=dict(type='NextToken', chunk_tokens=7),
        )


def sizes_of(model: nn.Module, optimizer=None, layout=None, **changes) -> RunSizes:
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), fused=True)
    flags = dict(packed=False, has_mask=False, has_kernel=False)
    techniques = changes.pop('techniques', Techniques(param_dtype=torch.bfloat16))
    plan = changes.pop('plan', None)
    return run_sizes(
        layout or Layout(),
        techniques,
        plan,
        STEP,
        model=model,
        optimizer=optimizer,
        **(flags | changes),
    )


def test_sizes_of_a_decoder(model: InternLM) -> None:
    sizes = model_sizes(model)
    assert sizes is not None
    assert (sizes.num_layers, sizes.head_dim, sizes.attention_bias) == (4, 8, True)
    assert model_sizes(nn.Linear(2, 2)) is None


def test_sizes_of_other_families() -> None:
    small = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4)
    with torch.device('meta'):
        two, three = Qwen2(**small), Qwen3(**small, tie_word_embeddings=True)
    sizes = model_sizes(two)
    assert (sizes.attention_bias, sizes.output_bias, sizes.qk_norm) == (True, False, False)
    sizes = model_sizes(three)
    assert (sizes.attention_bias, sizes.output_bias, sizes.qk_norm) == (False, False, True)
    assert sizes.tie_word_embeddings
    # A model of a plug-in may say less.
    Plain = type('Plain', (nn.Module,), {})
    plain = Plain()
    for name in ('hidden_size', 'intermediate_size', 'num_heads', 'num_kv_heads', 'head_dim',
                 'vocab_size', 'attention_bias', 'layers'):  # fmt: skip
        setattr(plain, name, getattr(three, name))
    assert model_sizes(plain).output_bias is None


def test_the_run_is_told_as_it_is(model: InternLM) -> None:
    run = sizes_of(model)
    assert (run.seq_len, run.micro_batch_size, run.micro_batches) == (16, 2, 4)
    assert (run.param_bytes, run.reduce_bytes, run.chunk_tokens) == (2, 4, 7)
    assert (run.moments, run.optimizer_copies, run.sharded) == (2, 0, True)
    assert run.stages == ((0, 1, 2, 3),)
    assert not sizes_of(model, techniques=Techniques()).sharded
    assert sizes_of(model, techniques=Techniques(), layout=Layout(data_shard=2)).sharded


def test_optimizers(model: InternLM) -> None:
    def told(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
        run = sizes_of(model, optimizer)
        return run.moments, run.optimizer_copies

    parameters = list(model.parameters())
    assert told(torch.optim.AdamW(parameters, amsgrad=True)) == (3, 1)
    assert told(torch.optim.SGD(parameters, fused=True)) == (0, 0)
    assert told(torch.optim.SGD(parameters, momentum=0.9)) == (1, 1)


def held_bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()


@pytest.mark.parametrize('state_dtype', ['bfloat16', 'int8', 'muon'])
def test_state_is_what_an_optimizer_makes_of_it(state_dtype: str) -> None:
    torch.manual_seed(0)
    built = InternLM(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4
    )
    optimizer = MuonAdamW(MuonAdamW.parameter_groups(built), fused=True)
    if state_dtype != 'muon':
        optimizer = CompactAdamW(built.parameters(), state_dtype=state_dtype)
    run = sizes_of(built, optimizer)
    assert run.optimizer_copies == 0
    for parameter in built.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    held = {
        name: sum(map(held_bytes, optimizer.state[parameter].values()))
        for name, parameter in built.named_parameters()
    }
    found = {
        name: run.states[name].each * parameter.numel() + run.states[name].fixed
        for name, parameter in built.named_parameters()
    }
    assert found == held
    sizes = model_sizes(built)
    assert sizes is not None
    assert predict_memory(sizes, run).kinds['optimizer'] == sum(held.values())


@pytest.mark.parametrize(
    ('flags', 'context', 'mask'),
    [
        (dict(packed=True, has_mask=True), 1, 2),
        (dict(packed=True, has_mask=False), 1, 0),
        (dict(packed=False, has_mask=True), 1, 0),
        (dict(has_kernel=False), 2, 2),
        (dict(has_kernel=True), 2, 0),
    ],
)
def test_masks(model: InternLM, flags: dict, context: int, mask: int) -> None:
    run = sizes_of(model, layout=Layout(context=context), **flags)
    assert (run.mask, run.context_kernel) == (mask, flags.get('has_kernel', False))


def test_stages(model: InternLM) -> None:
    options = dict(schedule='zbv_zero_bubble')
    plan = plan_pipeline(list(model.layers), 2, options)
    run = sizes_of(model, layout=Layout(pipeline=2), plan=plan)
    assert run.stages == ((0,), (1,), (2,), (3,))
    assert run.stages_of_rank == ((0, 3), (1, 2))
    assert run.schedule == 'zbv_zero_bubble'


def test_a_parameter_that_the_planner_does_not_know(model: InternLM) -> None:
    sizes = model_sizes(model)
    assert sizes is not None
    here = {'pipeline': 0, 'data_shard': 0, 'context': 0}
    built = {name: parameter.numel() for name, parameter in model.named_parameters()}
    run = sizes_of(model)
    assert unknown_parameters(built, sizes, run, here) == []
    extra = built | {'layers.0.self_attn.q_norm.weight': 8, 'norm.weight': 31}
    assert unknown_parameters(extra, sizes, run, here) == [
        'layers.0.self_attn.q_norm.weight',
        'norm.weight',
    ]
