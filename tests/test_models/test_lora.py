"""Adapters against PEFT's over the same transformers Llama."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.models import InternLM, Llama, LoRA
from internlm_mm.models.lora import LoRALinear, adapter_layers, adapters_off
from internlm_mm.registry import MODELS
from internlm_mm.structures import IGNORE_INDEX
from tests.test_models.helpers import SIZES, make_batch, randomize

# peft asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings('ignore:.*is_gradient_checkpointing:FutureWarning')

TARGETS = ['q_proj', 'v_proj', 'o_proj', 'gate_proj', 'down_proj']
LONG = ['layers.*.self_attn.[qv]_proj', 'o_proj', 'gate_proj', 'down_proj']


@pytest.fixture(scope='module')
def base() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=SIZES['vocab_size'],
        hidden_size=SIZES['hidden_size'],
        intermediate_size=SIZES['intermediate_size'],
        num_hidden_layers=SIZES['num_layers'],
        num_attention_heads=SIZES['num_heads'],
        num_key_value_heads=2,
        max_position_embeddings=SIZES['max_seq_len'],
        rms_norm_eps=1e-5,
        attn_implementation='eager',
    )
    return randomize(LlamaForCausalLM(config)).double()


def theirs_of(base: LlamaForCausalLM, **options) -> nn.Module:
    """PEFT's model with adapters in which everything matters."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=TARGETS, task_type='CAUSAL_LM', **options
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if '.lora_magnitude' in name:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data *= 1 + 0.2 * noise
        elif 'lora_' in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


def ours_of(theirs: nn.Module, **options) -> nn.Module:
    """The same weights in our model."""
    adapter = dict(type=LoRA, rank=4, alpha=6.0, targets=LONG, **options)
    model = MODELS.build(dict(type=Llama, num_kv_heads=2, **SIZES, adapter=adapter)).double()
    state = {
        name.removeprefix('base_model.model.').removeprefix('model.')
        .replace('.base_layer', '').replace('.default', ''): value
        for name, value in theirs.state_dict().items()
    }  # fmt: skip
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize(
    'options, their_options',
    [
        (dict(), dict()),
        (dict(rslora=True), dict(use_rslora=True)),
        (dict(dora=True), dict(use_dora=True)),
        (dict(dora=True, rslora=True), dict(use_dora=True, use_rslora=True)),
    ],
    ids=['lora', 'rslora', 'dora', 'dora and rslora'],
)
def test_loss_and_every_gradient_are_those_of_peft(base, options, their_options) -> None:
    theirs = theirs_of(base, **their_options)
    ours = ours_of(theirs, **options)
    batch = make_batch([[24], [24]])
    loss = ours(batch)['loss']
    loss.backward()
    logits = theirs(input_ids=batch.input_ids).logits
    expected = nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), reduction='sum', ignore_index=IGNORE_INDEX
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    trained = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    found = {
        name.removeprefix('base_model.model.model.').replace('.default', ''): p.grad
        for name, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(trained) == set(found)
    assert len(trained) == 3 * len(TARGETS) * (3 if 'dora' in options else 2)
    for name, gradient in trained.items():
        assert gradient.norm() > 0, name
        # Norms and rotary tables of theirs are float32.
        assert (gradient - found[name]).norm() <= 1e-5 * gradient.norm(), name
    assert all(p.grad is None for p in ours.parameters() if not p.requires_grad)


def test_it_begins_as_the_frozen_model_does(base) -> None:
    plain = randomize(InternLM(**SIZES))
    batch = make_batch([[10, 6]])
    before = plain(batch)['loss']
    for options in (dict(), dict(dora=True)):
        model = LoRA(rank=4, **options).apply(copy.deepcopy(plain))
        torch.testing.assert_close(model(batch)['loss'], before, rtol=1e-6, atol=0)
        for layer in adapter_layers(model):
            bound = layer.in_features**-0.5
            assert layer.lora_A.weight.abs().max() <= bound
            assert layer.lora_A.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)


def test_layers_begin_with_numbers_of_their_own() -> None:
    def drawn() -> list[torch.Tensor]:
        model = LoRA(rank=4).apply(randomize(InternLM(**SIZES)))
        return [layer.lora_A.weight for layer in adapter_layers(model)]

    first = drawn()
    for index, one in enumerate(first):
        for other in first[index + 1 :]:
            assert one.shape != other.shape or not torch.equal(one, other)
    for one, again in zip(first, drawn(), strict=True):
        assert torch.equal(one, again), 'they follow from the name alone'


def test_off_is_the_frozen_model(base) -> None:
    plain = randomize(InternLM(**SIZES))
    model = LoRA(rank=4, dora=True, dropout=0.5).apply(copy.deepcopy(plain))
    for layer in adapter_layers(model):
        nn.init.normal_(layer.lora_B.weight)
    batch = make_batch([[10, 6]])
    wanted = plain(batch)['loss'].detach()
    with adapters_off(model):
        assert torch.equal(model(batch)['loss'], wanted)
        with adapters_off(model):
            pass
        assert torch.equal(model(batch)['loss'], wanted)  # the inner block changes nothing
    assert model(batch)['loss'] != wanted
    with pytest.raises(RuntimeError, match='here'), adapters_off(model):
        raise RuntimeError('here')
    assert all(layer.is_on for layer in adapter_layers(model))
    with pytest.raises(ValueError, match='InternLM has no adapters to switch off'):
        with adapters_off(plain):
            pass


def test_dropout_is_for_training_alone() -> None:
    model = LoRA(rank=4, dropout=0.5).apply(randomize(InternLM(**SIZES)))
    for layer in adapter_layers(model):
        nn.init.normal_(layer.lora_B.weight)
    batch = make_batch([[10, 6]])
    assert model(batch)['loss'] != model(batch)['loss']
    model.eval()
    assert model(batch)['loss'] == model(batch)['loss']


def test_targets_are_globs_over_names() -> None:
    def chosen(*targets: str) -> list[str]:
        with torch.device('meta'):
            model = LoRA(targets=targets).apply(InternLM(**SIZES))
        return [name for name, part in model.named_modules() if isinstance(part, LoRALinear)]

    assert len(chosen('*_proj')) == 7 * SIZES['num_layers']
    assert chosen('layers.[02].mlp.up_proj') == ['layers.0.mlp.up_proj', 'layers.2.mlp.up_proj']
    assert chosen('layers.1.self_attn.*', 'v_proj') == [
        'layers.0.self_attn.v_proj',
        *(f'layers.1.self_attn.{name}_proj' for name in 'qkvo'),
        'layers.2.self_attn.v_proj',
    ]


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(rank=0), 'model.adapter.rank=0 must be at least 1'),
        (dict(alpha=-1.0), 'model.adapter.alpha=-1.0 must be above 0'),
        (dict(dropout=1.0), r'model.adapter.dropout=1.0 is not in \[0, 1\)'),
        (dict(targets=[]), r'model.adapter.targets=\[\]: expected a list of patterns'),
        (dict(targets='q_proj'), "model.adapter.targets='q_proj': expected a list of patterns"),
        (
            dict(targets=['q_proj', 'querry_proj']),
            "'querry_proj' matches no linear layer of InternLM, which has down_proj, .*up_proj",
        ),
        (dict(targets=['layers.*.qproj']), "Did you mean 'q_proj'"),
        (dict(targets=['lm_head']), 'The head takes no adapter'),
    ],
)
def test_wrong_options_are_named(options, message: str) -> None:
    with torch.device('meta'), pytest.raises(ValueError, match=message):
        LoRA(**options).apply(InternLM(**SIZES))


def test_a_model_takes_one_adapter() -> None:
    with torch.device('meta'), pytest.raises(ValueError, match='InternLM has adapters already'):
        LoRA().apply(LoRA().apply(InternLM(**SIZES)))
