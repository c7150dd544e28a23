"""Updates of few bits: how they round, and that a kernel computes what single operations do."""

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from internlm_mm.optim import CompactAdamW, compact_update
from internlm_mm.optim.compact_update import Rates, round_by_hash, salt_of, to_levels, update


def salted(number: int) -> Tensor:
    return torch.tensor(salt_of(number), dtype=torch.int32)


# ---------------------------------------------------------------------------------- rounding


SAMPLES = 4000
FOUR_SIGMA = 4 * 0.5 / SAMPLES**0.5
"""Of the mean of so many draws of two neighbours, in units: what lies between them."""


def test_sixteen_bits_are_right_on_average() -> None:
    values = torch.cat([torch.randn(50), torch.tensor([0.0, 1.0, -1.5, 1e-20, -3e8])])
    before = values.clone()
    found = torch.stack([round_by_hash(values, salted(salt)) for salt in range(SAMPLES)]).double()
    assert torch.equal(values, before)
    exact = values.double()
    unit = 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) / 2**7
    below = torch.trunc(exact / unit) * unit
    neighbours = torch.stack([below, below + exact.sign() * unit])
    assert ((found[:, None] - neighbours[None]).abs().amin(1) == 0).all()
    assert ((found.mean(0) - exact).abs() <= FOUR_SIGMA * unit).all()
    whole = torch.tensor([0.0, 1.0, -1.5])
    assert torch.equal(round_by_hash(whole, salted(7)).float(), whole)


def signed(bits: int) -> int:
    return (bits + 2**31) % 2**32 - 2**31


def drawn(bits: int, salt: int) -> int:
    """What is added below the upper half, in Python's integers."""
    mixed = signed(bits * 2654435761 + salt * 0x85EBCA6B)
    mixed = signed((mixed ^ (mixed >> 15)) * 2246822507)
    return (mixed ^ (mixed >> 13)) * 3266489909 % 2**32 >> 16


@pytest.mark.parametrize('salt', [0, 1, 12345, 2**31 + 7])
def test_what_is_random_is_a_hash(salt: int) -> None:
    """Checkpoints go on to the same bits for as long as it stays this one."""
    values = torch.cat([torch.randn(40), torch.tensor([0.0, -0.0, 1e-40, 3e38, -1e-12])])
    before = values.view(torch.int32).tolist()
    expected = [signed((bits % 2**32 + drawn(bits, salt)) >> 16 << 16) for bits in before]
    found = round_by_hash(values, salted(salt))
    assert found.dtype == torch.bfloat16
    assert found.float().view(torch.int32).tolist() == expected


@pytest.mark.parametrize('levels', [127, 255])
def test_eight_bits_are_right_on_average(levels: int) -> None:
    values = torch.cat([torch.rand(50) * 2 - 1, torch.tensor([0.0, 1.0, -1.0, 1e-9, 0.25])])
    before = values.clone()
    codes = torch.stack(
        [to_levels(values, levels, salted(salt)) for salt in range(SAMPLES)]
    ).double()
    assert torch.equal(values, before)
    table = (torch.arange(levels + 1).double() / levels).square()
    place = torch.searchsorted(table, values.double().abs(), right=True).clamp(max=levels)
    assert ((codes.abs() - place).abs() <= 1).all() and (codes * values >= 0).all()
    found = codes.sign() * table[codes.abs().long()]
    unit = table[place] - table[place - 1]
    assert ((found.mean(0) - values.double()).abs() <= FOUR_SIGMA * unit + 1e-7).all()
    assert codes[:, 50].abs().max() == 0 and (codes[:, 51] == levels).all()


def test_neighbouring_numbers_round_independently() -> None:
    """Numbers that are nearly equal, as moments of alike parameters are."""
    values = 1 + torch.arange(4096) * 2.0**-23
    up = round_by_hash(values, salted(3)) > 1
    assert up[2048:].float().mean() == pytest.approx(3072 / 65536, abs=4 * 0.22 / 2048**0.5)


# ----------------------------------------------------------------------------------- kernels


def state(kind: str, shape: tuple[int, ...], device: str) -> dict[str, Tensor]:
    if kind == 'int8':
        scales = (*shape[:-1], shape[-1] // 32)
        return {
            'exp_avg_scale': torch.zeros(scales, device=device),
            'exp_avg': torch.zeros(shape, dtype=torch.int8, device=device),
            'exp_avg_sq': torch.zeros(shape, dtype=torch.uint8, device=device),
            'exp_avg_sq_scale': torch.zeros(scales, device=device),
        }
    dtype = getattr(torch, kind)
    return {
        name: torch.zeros(shape, dtype=dtype, device=device) for name in compact_update.HELD[:2]
    }


def numbers(held: dict[str, Tensor], name: str) -> Tensor:
    values = held[name].double().cpu()
    if f'{name}_scale' not in held:
        return values
    scale = held[f'{name}_scale'].double().cpu().repeat_interleave(32, -1)
    found = (values / torch.iinfo(held[name].dtype).max).square() * scale * values.sign()
    return found.square() if name == 'exp_avg_sq' else found


def trained(
    kind: str, dtype: torch.dtype, shape: tuple[int, ...], device: str, compiled: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight and state after four steps on drawn gradients."""
    draws = torch.Generator().manual_seed(5)
    weight = torch.randn(shape, generator=draws).to(device, dtype)
    held = state(kind, shape, device)
    group = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 5):
        gradient = torch.randn(shape, generator=draws).to(device, dtype)
        update(weight, gradient, held, Rates.of(step, group, weight), compiled)
    return weight, held


def check_kernel(kind: str, dtype: torch.dtype, shape: tuple[int, ...], device: str) -> None:
    compact_update._can_be_compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (weight, held), (expected, single) = (
        trained(kind, dtype, shape, *where) for where in ((device, True), ('cpu', False))
    )
    assert compact_update._can_be_compiled.cache_info().currsize == 1
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] >= 1
    # A last bit that differs draws otherwise: single moments by one level, weights by its share.
    of_weight, of_moment = {
        'bfloat16': (1e-4, 1e-2),
        'int8': (1e-3, 5e-2),
        'float32': (1e-6, 1e-5),
        'float64': (1e-9, 1e-9),
    }[kind]
    if dtype == torch.bfloat16:
        of_weight = 1e-2
    assert (weight.cpu() - expected).norm() < of_weight * expected.norm()
    for name in compact_update.HELD[:2]:
        here, there = numbers(held, name), numbers(single, name)
        assert (here - there).norm() < of_moment * there.norm()


CASES = [
    ('bfloat16', torch.float32, (96, 128)),
    ('int8', torch.float32, (96, 128)),
    ('float32', torch.float32, (100,)),  # rows of no width
    ('float64', torch.float64, (3, 64)),
    ('bfloat16', torch.bfloat16, (96, 128)),
]


@pytest.mark.slow
@pytest.mark.parametrize(('kind', 'dtype', 'shape'), CASES, ids=str)
def test_a_kernel_computes_what_operations_do(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(compact_update, 'AT_ONCE_IN_BLOCKS', 2000)  # some rows at a time
    check_kernel(kind, dtype, shape, 'cpu')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
@pytest.mark.parametrize(('kind', 'dtype', 'shape'), CASES, ids=str)
def test_a_kernel_on_a_gpu_computes_it(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    check_kernel(kind, dtype, shape, 'cuda')


@pytest.mark.slow
def test_parts_of_a_tensor_have_the_bits_of_the_whole() -> None:
    """A kernel's vectors and what is left of them; what lies on another rank changes nothing."""
    compact_update._can_be_compiled.cache_clear()
    for kind, columns in (('bfloat16', 64), ('int8', 32), ('float32', 1)):
        shape = (101, columns)
        draws = torch.Generator().manual_seed(5)
        weight, gradient = (torch.randn(shape, generator=draws) for _ in range(2))
        group = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        found = []
        for cuts in ([101], [3, 7, 91]):
            held, own = state(kind, shape, 'cpu'), weight.clone()
            starts = torch.tensor([0, *cuts]).cumsum(0).tolist()
            for step in (1, 2):
                rates = Rates.of(step, group, own)
                for start, rows in zip(starts, cuts, strict=False):
                    part = slice(start, start + rows)
                    parts = {name: value[part] for name, value in held.items()}
                    update(own[part], gradient[part], parts, rates, True)
            found.append([own, *held.values()])
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert compact_update._can_be_compiled.cache_info().currsize == 3  # and none was refused


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.int8], ids=str)
def test_a_kernel_is_for_all_threads(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """However many: a trial of a few rows would be too little work to share out."""
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 256)
    fp32, unsigned = torch.float32, torch.uint8 if dtype == torch.int8 else dtype
    scales = (fp32, fp32) if dtype == torch.int8 else ()
    dtypes = (fp32, fp32, dtype, unsigned, *scales)
    kind = compact_update._Kind(torch.device('cpu'), dtypes, (compact_update._ROWS, 64))
    compact_update._can_be_compiled.cache_clear()
    torch._dynamo.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        can, codes = run_and_get_code(compact_update._can_be_compiled, kind)
    compact_update._can_be_compiled.cache_clear()
    assert can and codes
    for code in codes:
        loops = code.count('for(int64_t x0=')  # of which others are inside
        assert code.count('#pragma omp for') == loops > 0


@pytest.mark.parametrize('fault', ['raises', 'computes something else'])
def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Told once; updates go on, operation by operation."""

    def fails(weight: Tensor, *others: object) -> None:
        if fault == 'raises':
            raise RuntimeError('no g++\nand more')
        weight.zero_()

    monkeypatch.setattr(compact_update, '_compiled', lambda: fails)
    compact_update._can_be_compiled.cache_clear()
    with pytest.warns(UserWarning, match='CompactAdamW is not compiled on cpu') as told:
        weight, held = trained('bfloat16', torch.float32, (6, 64), 'cpu', True)
    expected, single = trained('bfloat16', torch.float32, (6, 64), 'cpu', False)
    assert torch.equal(weight, expected)
    assert all(torch.equal(held[name], single[name]) for name in single)
    assert len(told) == 1
    why = 'no g++' if fault == 'raises' else 'its kernel computes something else'
    assert f'on cpu: {why}. Its updates' in str(told[0].message)
    compact_update._can_be_compiled.cache_clear()


@pytest.mark.parametrize(('size', 'expected'), [(31, False), (32, True)])
def test_a_compiler_is_asked_where_it_pays(
    monkeypatch: pytest.MonkeyPatch, size: int, expected: bool
) -> None:
    """By what all tensors have together, whole."""
    monkeypatch.setattr('internlm_mm.optim.compact_adamw.COMPILED_FROM', 64)
    seen, asked = [], []
    monkeypatch.setattr(
        'internlm_mm.optim.compact_adamw.update', lambda *given: seen.append(given[-1])
    )
    monkeypatch.setattr(
        'internlm_mm.optim.compact_adamw.look_for_vectors', lambda: asked.append(True)
    )
    weights = [torch.nn.Parameter(torch.zeros(count)) for count in (32, size)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer = CompactAdamW([{'params': [weight]} for weight in weights])
    assert len(asked) == expected  # before it is needed
    optimizer.step()
    assert seen == [expected, expected]


def test_kinds_beyond_the_compilers_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises before it writes; no step is lost."""

    def fails(*_: object) -> None:
        raise torch._dynamo.exc.FailOnRecompileLimitHit('limit')

    monkeypatch.setattr(compact_update, '_compiled', lambda: fails)
    monkeypatch.setattr(compact_update, '_can_be_compiled', lambda kind: True)
    with pytest.warns(UserWarning, match='CompactAdamW is not compiled on cpu: limit'):
        weight, _ = trained('int8', torch.float32, (6, 64), 'cpu', True)
    assert torch.equal(weight, trained('int8', torch.float32, (6, 64), 'cpu', False)[0])


@pytest.mark.parametrize('state_dtype', ['bfloat16', 'int8'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('shape', [(8, 128), (10,), (5, 7), ()])
def test_weights_of_any_precision(
    state_dtype: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    weight = torch.nn.Parameter(torch.ones(shape, dtype=dtype))
    optimizer = CompactAdamW([weight], lr=0.1, state_dtype=state_dtype, weight_decay=0.0)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # Both moments are 1 after their correction.
    torch.testing.assert_close(weight.double(), torch.full(shape, 0.8).double(), rtol=0.02, atol=0)
