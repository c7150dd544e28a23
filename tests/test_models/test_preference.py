"""Objectives over pairs against the papers' formulas in float64, and against TRL's trainer."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

from internlm_mm.datasets.packing import Row, collate_rows, pack_row, untrained_row
from internlm_mm.models import DPO, IPO, InternLM, NextToken, SimPO
from internlm_mm.registry import MODELS, OBJECTIVES
from internlm_mm.structures import IGNORE_INDEX
from tests.test_models.helpers import SIZES, randomize
from tests.test_models.parity import THEIRS, llama_name

# Prompt, chosen and rejected answer of each pair of each row, in tokens.
ROWS = [[(4, 5, 3), (6, 2, 9)], [(3, 1, 8), (5, 4, 4)], [(9, 7, 2)]]
SEQ = 60


def pairs_of(rows=ROWS, seed: int = 2) -> list[list[tuple[list[int], list[int], list[int]]]]:
    draw = np.random.default_rng(seed)
    return [
        [tuple(draw.integers(1, 128, n).tolist() for n in pair) for pair in row] for row in rows
    ]


def row_of(pairs, references=None, domain: int | None = None) -> Row:
    """Documents prompt + chosen and prompt + rejected, end to end, labels on the answers."""
    tokens, labels, lengths = [], [], []
    for prompt, chosen, rejected in pairs:
        for answer in (chosen, rejected):
            document = prompt + answer
            tokens += document
            shown = [IGNORE_INDEX] * len(prompt) + answer
            labels += [*shown[1:], IGNORE_INDEX]
            lengths.append(len(document))
    row = pack_row(
        np.array(tokens), np.array(labels), np.array(lengths), seq_len=SEQ, max_docs=8,
        domain_id=domain, num_domains=0 if domain is None else 2,
    )  # fmt: skip
    if references is not None:
        references = np.pad(np.array(references, np.float32), (0, 8 - len(references)))
    return replace(row, num_pairs=len(pairs), references=references)


def batch_of(dtype=np.float32, domains: bool = False):
    draw = np.random.default_rng(3)
    rows = [
        row_of(pairs, draw.uniform(-60, -5, 2 * len(pairs)), index % 2 if domains else None)
        for index, pairs in enumerate(pairs_of())
    ]
    return collate_rows(rows)


def oracle(hidden, weight, batch):
    """Summed log-probabilities, lengths and references of all pairs in float64, [pairs] each."""
    log_probs = F.log_softmax(hidden.double() @ weight.double().T, -1)
    found = []
    for row, pairs in enumerate(pairs_of()):
        start = 0
        for number, (prompt, *answers) in enumerate(pairs):
            one = []
            for side, answer in enumerate(answers):
                first = start + len(prompt) - 1
                place = torch.arange(first, first + len(answer))
                one += [
                    log_probs[row, place, torch.tensor(answer)].sum(),
                    len(answer),
                    batch.references[row, 2 * number + side].double(),
                ]
                start += len(prompt) + len(answer)
            found.append(one)
    columns = list(zip(*found, strict=True))
    return [torch.stack(c) if isinstance(c[0], torch.Tensor) else torch.tensor(c) for c in columns]


def log_sigmoid(x):
    return torch.log(1 / (1 + torch.exp(-x)))


def expected_losses(objective, c, nc, rc, r, nr, rr):
    """Loss of each pair, written out from the papers."""
    beta, ratios = objective.beta, (c - rc, r - rr)
    if getattr(objective, 'average_log_prob', False):
        ratios = (ratios[0] / nc, ratios[1] / nr)
    delta = ratios[0] - ratios[1]
    match objective:
        case DPO():
            epsilon = objective.label_smoothing
            losses = -(1 - epsilon) * log_sigmoid(beta * delta) - epsilon * log_sigmoid(
                -beta * delta
            )
        case IPO():
            losses = (delta - 1 / (2 * beta)) ** 2
        case SimPO():
            losses = -log_sigmoid(beta * c / nc - beta * r / nr - objective.gamma)
    return losses + objective.sft_weight * -c / nc


OBJECTIVES_HERE = [
    DPO(beta=0.3),
    DPO(beta=0.05, label_smoothing=0.2),
    DPO(beta=1.5, average_log_prob=True),
    DPO(beta=0.1, sft_weight=0.7, chunk_tokens=7),
    IPO(beta=0.2),
    IPO(beta=0.01, average_log_prob=False),
    SimPO(beta=2.5, gamma=0.4),
    SimPO(sft_weight=0.3),
]


@pytest.mark.parametrize(
    'objective',
    OBJECTIVES_HERE,
    ids=[f'{type(one).__name__}-{number}' for number, one in enumerate(OBJECTIVES_HERE)],
)
def test_losses_and_gradients(objective) -> None:
    batch = batch_of()
    hidden = torch.randn(3, SEQ, 16).requires_grad_()
    weight = (0.5 * torch.randn(128, 16)).requires_grad_()
    outputs = objective(hidden, weight, batch)
    outputs['loss'].backward()
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    c, nc, rc, r, nr, rr = oracle(h, w, batch)
    expected = expected_losses(objective, c, nc, rc, r, nr, rr).sum()
    expected.backward()
    # Float32 sums of log-probabilities of up to 60.
    torch.testing.assert_close(outputs['loss'].double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), h.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), w.grad, rtol=1e-4, atol=1e-5)
    assert all(not value.requires_grad for key, value in outputs.items() if key != 'loss')


def test_measures() -> None:
    batch = batch_of(domains=True)
    hidden, weight = torch.randn(3, SEQ, 16), torch.randn(128, 16)
    objective = DPO(beta=0.3)
    found = objective(hidden, weight, batch)
    c, nc, rc, r, nr, rr = oracle(hidden, weight, batch)
    losses = expected_losses(objective, c, nc, rc, r, nr, rr)
    wanted = {
        'rewards/chosen': 0.3 * (c - rc).sum(),
        'rewards/rejected': 0.3 * (r - rr).sum(),
        'rewards/margin': 0.3 * (c - rc - r + rr).sum(),
        'rewards/accuracy': (c - rc > r - rr).sum(),
        'log_probs/chosen': c.sum(),
        'log_probs/rejected': r.sum(),
        'kl': (c - rc + r - rr).sum() / 2,
        'domain_loss': torch.stack([losses[:2].sum() + losses[4], losses[2:4].sum()]),
        'domain_targets': torch.tensor([3, 2]),
    }
    assert found.keys() == wanted.keys() | {'loss'}
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value.double(), rtol=1e-5, atol=1e-4)
    assert 0 < found['rewards/accuracy'] < 5  # or the measure could be anything
    assert 'kl' not in SimPO()(hidden, weight, batch)


def test_rows_that_fill_up_a_batch_count_for_nothing() -> None:
    rows = [row_of(pairs, [-9.0] * 2 * len(pairs)) for pairs in pairs_of()]
    hidden, weight = torch.randn(4, SEQ, 16), torch.randn(128, 16)
    objective = DPO()
    found = objective(hidden, weight, collate_rows([*rows, untrained_row(rows[0])]))
    wanted = objective(hidden[:3], weight, collate_rows(rows))
    assert collate_rows([*rows, untrained_row(rows[0])]).num_targets == 5
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)


def test_the_batch_counts_pairs() -> None:
    batch = batch_of()
    assert batch.num_targets == 5 and batch.is_paired
    assert batch.references.shape == (3, 8)


def test_without_adapters_the_model_is_its_own_reference() -> None:
    model = MODELS.build(
        dict(
            type='InternLM', **SIZES, objective=dict(type='DPO'), adapter=dict(type='LoRA', rank=4)
        )
    )
    randomize(model, 0.1)
    batch = replace(batch_of(), references=None)
    with torch.no_grad():
        told = model(batch)
        for name, parameter in model.named_parameters():
            if '.lora_B.' in name:
                parameter.zero_()
        with model.objective.telling_log_probs():
            references = model(batch)['log_probs']
        torch.testing.assert_close(model(batch)['loss'], 5 * torch.tensor(2.0).log())
    randomize(model, 0.1)
    wanted = model(replace(batch, references=references))
    assert told['loss'] == wanted['loss'] and told['loss'] != 5 * torch.tensor(2.0).log()
    wanted['loss'].backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == {n for n, _ in model.named_parameters() if '.lora_' in n}
    model.zero_grad()
    model(batch)['loss'].backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


def test_pairs_and_objectives_must_go_together() -> None:
    hidden, weight = torch.randn(3, SEQ, 16), torch.randn(128, 16)
    with pytest.raises(ValueError, match='NextToken learns every answer, and the data has pairs'):
        NextToken()(hidden, weight, batch_of())
    with pytest.raises(ValueError, match=r'SimPO compares two answers.*PreferenceDataset'):
        SimPO()(hidden, weight, replace(batch_of(), is_paired=False))
    with pytest.raises(ValueError, match=r'strategy\.parallel\.context=1'):
        SimPO()(hidden, weight, replace(batch_of(), own_positions=torch.arange(30)))
    with pytest.raises(ValueError, match='ReferenceHook'):
        DPO(reference='precomputed')(hidden, weight, replace(batch_of(), references=None))
    plain = InternLM(**SIZES, objective=DPO())
    with pytest.raises(ValueError, match='has no adapters to switch off'):
        plain(replace(batch_of(), references=None))


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(type='DPO', beta=0), 'beta=0 must be above 0'),
        (dict(type='DPO', label_smoothing=0.5), r'label_smoothing=0.5 is not in \[0, 0.5\)'),
        (dict(type='DPO', reference='adapter_off'), "adapter_off.*mean 'adapters_off'"),
        (dict(type='DPO', reference=None), 'reference=None'),
        (dict(type='DPO', sft_weight=-1), 'sft_weight=-1'),
        (dict(type='IPO', beta=-1.0), 'beta=-1.0'),
        (dict(type='SimPO', gamma=-1.0), 'gamma=-1.0'),
        (dict(type='SimPO', chunk_tokens=0), 'chunk_tokens=0'),
    ],
)
def test_values_out_of_range(wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        OBJECTIVES.build(wrong)


def assert_a_step_of_the_trainer_is_ours(objective, trainer_options, tmp_path) -> None:
    """Loss and the gradient of every parameter of a model and its frozen reference, as in TRL."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = LlamaConfig(**THEIRS, attention_bias=True, tie_word_embeddings=False)
    policy, frozen = LlamaForCausalLM(config), LlamaForCausalLM(config)
    ours = InternLM(**SIZES, objective=objective)
    state = {name: p.detach().clone() for name, p in randomize(ours, 0.2).named_parameters()}
    policy.load_state_dict({llama_name(name): value for name, value in state.items()})
    for parameter in ours.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    frozen.load_state_dict({llama_name(n): p.detach() for n, p in ours.named_parameters()})
    rows = [row_of(pairs) for pairs in pairs_of()]
    batch = collate_rows(rows)
    with torch.no_grad(), objective.telling_log_probs():
        batch = replace(batch, references=ours(batch)['log_probs'])  # the frozen one's weights
    ours.load_state_dict(state)
    outputs = ours(batch)
    (outputs['loss'] / batch.num_targets).backward()

    pairs = [pair for row in pairs_of() for pair in row]
    data = Dataset.from_list([dict(prompt='a', chosen='b', rejected='c')] * len(pairs))
    trainer = DPOTrainer(
        policy,
        ref_model=frozen,
        args=DPOConfig(
            output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None,
            gradient_checkpointing=False, **trainer_options,
        ),
        train_dataset=data,
        processing_class=tokenizer_with_padding(),
    )  # fmt: skip
    inputs = trainer.data_collator(
        [dict(prompt_ids=p, chosen_ids=c, rejected_ids=r) for p, c, r in pairs]
    )
    loss = trainer.compute_loss(policy, inputs)
    loss.backward()
    torch.testing.assert_close(outputs['loss'].detach() / 5, loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in ours.named_parameters():
        wanted = policy.get_parameter(llama_name(name)).grad
        error = (parameter.grad - wanted).norm() / wanted.norm()
        assert error < 1e-4, f'{name}: {error:.1e}'
    metrics = {key: value[-1] for key, value in trainer._metrics['train'].items()}
    return outputs, metrics


def tokenizer_with_padding():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({'a': 1, 'b': 2, 'c': 3, '<eos>': 4, '<pad>': 0}, '<pad>'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token='<eos>', pad_token='<pad>', unk_token='<pad>'
    )


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.filterwarnings('ignore')  # of trl and what it imports
@pytest.mark.parametrize(
    ('objective', 'options'),
    [
        (DPO(beta=0.3), dict(beta=0.3)),
        (DPO(beta=0.2, average_log_prob=True), dict(beta=0.2, loss_type=['sigmoid_norm'])),
        (IPO(beta=0.4), dict(beta=0.4, loss_type=['ipo'])),
    ],
    ids=['dpo', 'length-normalised', 'ipo'],
)
def test_it_is_what_trl_does(objective, options, tmp_path) -> None:
    outputs, metrics = assert_a_step_of_the_trainer_is_ours(objective, options, tmp_path)
    if options.get('loss_type') is None:
        for key, theirs in (
            ('rewards/chosen', 'rewards/chosen'),
            ('rewards/rejected', 'rewards/rejected'),
            ('rewards/margin', 'rewards/margins'),
            ('rewards/accuracy', 'rewards/accuracies'),
            ('log_probs/chosen', 'logps/chosen'),
            ('log_probs/rejected', 'logps/rejected'),
        ):
            assert outputs[key] / 5 == pytest.approx(metrics[theirs], rel=1e-4), key
        assert abs(outputs['rewards/margin']) > 0.5  # or all losses would be log(2)


@pytest.mark.slow  # importing trl takes seconds
@pytest.mark.filterwarnings('ignore')  # of trl and what it imports
def test_simpo_is_what_trl_does() -> None:
    """Their forward pass and loss, without the trainer around them."""
    from trl.experimental.cpo import CPOTrainer

    objective = SimPO(beta=2.5, gamma=0.4)
    theirs = LlamaForCausalLM(
        LlamaConfig(**THEIRS, attention_bias=True, tie_word_embeddings=False)
    ).eval()
    ours = randomize(InternLM(**SIZES, objective=objective), 0.2)
    theirs.load_state_dict({llama_name(n): p.detach() for n, p in ours.named_parameters()})
    outputs = ours(collate_rows([row_of(pairs) for pairs in pairs_of()]))
    (outputs['loss'] / 5).backward()

    batch: dict[str, torch.Tensor] = {}
    pairs = [pair for row in pairs_of() for pair in row]
    for side, name in enumerate(('chosen', 'rejected'), 1):
        documents = [torch.tensor(pair[0] + pair[side]) for pair in pairs]
        labels = [torch.tensor([-100] * len(pair[0]) + pair[side]) for pair in pairs]
        masks = [torch.ones_like(document) for document in documents]
        for kind, rows, filler in (
            ('input_ids', documents, 0),
            ('labels', labels, -100),
            ('attention_mask', masks, 0),
        ):
            batch[f'{name}_{kind}'] = pad_sequence(rows, batch_first=True, padding_value=filler)
    trainer = CPOTrainer.__new__(CPOTrainer)
    trainer.accelerator = SimpleNamespace(
        device=torch.device('cpu'), gather_for_metrics=lambda value: value
    )
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.loss_type, trainer.beta, trainer.simpo_gamma = 'simpo', 2.5, 0.4
    trainer.pad_token_id = trainer.cpo_alpha = trainer.alpha = trainer.label_smoothing = 0
    loss, metrics = trainer.get_batch_loss_metrics(theirs, batch)
    loss.backward()
    torch.testing.assert_close(outputs['loss'].detach() / 5, loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in ours.named_parameters():
        wanted = theirs.get_parameter(llama_name(name)).grad
        assert (parameter.grad - wanted).norm() / wanted.norm() < 1e-4, name
    for key, kind in (('rewards/margin', 'margins'), ('rewards/accuracy', 'accuracies')):
        assert outputs[key] / 5 == pytest.approx(metrics[f'rewards/{kind}'], rel=1e-4), key
