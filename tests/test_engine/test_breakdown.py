import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from internlm_mm.engine.breakdown import (
    DATA_WAIT,
    KINDS,
    OPTIMIZER,
    STEP,
    Span,
    break_down,
    kernel_kind,
    operator_kind,
    partition,
    read_trace,
    render_breakdown,
)
from internlm_mm.optim.hybrid_zero import NORM_AND_CLIP

# As cuBLAS, cuDNN, CUTLASS, NCCL, torch and its compiler call their kernels.
KERNELS = {
    'matmul': [
        'nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT',
        'sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_cublas',
        'void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x64_32x4_nn_align8>'
        '(cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x64_32x4_nn_align8::Params)',
        'void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(...)',
        'triton_tem_fused__scaled_mm_t_4',
        'ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_64x3_nn',
    ],
    'attention': [
        'cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_3_64x128x128_4x1x1',
        'void cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16, 128, 0>(...)',
        'void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>',
        'void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, cutlass>>',
        'kernel_cutlass_kernel_flash_attncuteflash_fwdFlashAttentionForwardSm90_object_at__ten',
        'fmha_cutlassF_bf16_aligned_64x128_rf_sm80(AttentionKernel<cutlass::bfloat16_t>::Params)',
        'triton_tem_fused_flex_attention_backward_1',
    ],
    'exposed communication': [
        'ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)',
        'ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)',
        'ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)',
        'Memcpy PtoP (Device -> Device)',
    ],
    'exposed host copies': ['Memcpy HtoD (Pinned -> Device)', 'Memcpy DtoH (Device -> Pageable)'],
    'elementwise': [
        'triton_poi_fused_mul_silu_3',
        'triton_red_fused__scaled_mm__to_copy_abs_max_2',  # beside a product, none itself
        'triton_poi_fused__scaled_dot_product_cudnn_attention_transpose_7',
        'void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(...)',
        'void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<...>(...)',
        'Memcpy DtoD (Device -> Device)',
        'Memset (Device)',
        'liger_cross_entropy_kernel',
    ],
}


@pytest.mark.parametrize(
    ('kind', 'name'), [(kind, name) for kind, names in KERNELS.items() for name in names]
)
def test_kernels_by_name(kind: str, name: str) -> None:
    assert kernel_kind(name) == kind


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('aten::mm', 'matmul'),
        ('aten::addmm', 'matmul'),
        ('aten::bmm', 'matmul'),
        ('aten::_scaled_mm', 'matmul'),
        ('mkldnn::_linear_pointwise', 'matmul'),
        ('aten::mul', 'elementwise'),
        ('aten::_foreach_mul_', 'elementwise'),
        ('aten::_scaled_dot_product_flash_attention_for_cpu_backward', 'attention'),
        ('c10d::allreduce_', 'exposed communication'),
        ('gloo:all_reduce', 'exposed communication'),
        ('_c10d_functional::wait_tensor', 'exposed communication'),
        ('autograd::engine::evaluate_function: MmBackward0', 'idle'),
        ('AddmmBackward0', 'idle'),
        ('torch::autograd::AccumulateGrad', 'idle'),
        ('CompiledFunction', 'elementwise'),
    ],
)
def test_operators_by_name(name: str, kind: str) -> None:
    assert operator_kind(name) == kind


def test_a_partition_by_hand() -> None:
    """Windows 0 to 10 and 20 to 24; what lies outside them does not count."""
    spans = [
        Span(1, 4, 'elementwise'),
        Span(2, 6, 'matmul'),  # hides two of the elementwise three
        Span(3, 9, 'exposed communication'),  # 6 to 9 shows
        Span(8, 22, 'data wait'),  # 9 to 10 and 20 to 22
        Span(23, 30, 'matmul'),
        Span(23, 23, 'attention'),  # no time at all
        Span(11, 19, 'attention'),
    ]
    parts = partition(spans, [(0, 10), (20, 24)])
    assert {kind: time for kind, time in parts.items() if time} == {
        'elementwise': 1,
        'matmul': 5,
        'exposed communication': 3,
        'data wait': 3,
        'idle': 2,  # 0 to 1 and 22 to 23
    }
    assert tuple(parts) == KINDS
    assert sum(parts.values()) == 14


@pytest.mark.parametrize('seed', range(5))
def test_a_partition_against_every_microsecond(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 100, (30, 3), generator=generator).tolist()
    spans = [Span(a, a + b % 20, KINDS[c % len(KINDS)]) for a, b, c in numbers]
    windows = [(5, 40), (50, 90)]
    expected = dict.fromkeys(KINDS, 0)
    for start, end in windows:
        for moment in range(start, end):
            running = [s.kind for s in spans if s.start <= moment < s.end]
            expected[min(running, key=KINDS.index, default='idle')] += 1
    assert partition(spans, windows) == expected


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args: Any) -> dict:
    return dict(ph='X', cat=cat, name=name, ts=ts, dur=dur, tid=tid, args=args)


def test_a_trace_of_a_gpu_by_hand() -> None:
    """One step of 1 ms: kernels on two streams, launched long before they run."""
    events = [
        dict(ph='M', name='process_name', args={'name': 'python'}),
        event('user_annotation', STEP, 0, 1000),
        event('user_annotation', DATA_WAIT, 0, 60),
        event('gpu_user_annotation', OPTIMIZER, 500, 400, tid=7),
        event('cuda_runtime', 'cudaLaunchKernel', 70, 5, correlation=1),
        event('kernel', 'nvjet_tst_128x256', 100, 300, tid=7, correlation=1),
        event('cuda_driver', 'cuLaunchKernelEx', 80, 5, correlation=2),
        event('kernel', 'ncclDevKernel_ReduceScatter_Sum_f32', 350, 150, tid=20, correlation=2),
        event('cuda_runtime', 'cudaLaunchKernel', 85, 5, correlation=6),
        event('kernel', 'fmha_cutlassF_bf16', 510, 40, tid=7, correlation=6),
        event('user_annotation', OPTIMIZER, 90, 30),
        event('user_annotation', NORM_AND_CLIP, 91, 3),
        event('cuda_runtime', 'cudaLaunchKernel', 92, 1, correlation=7),
        event('kernel', 'multi_tensor_apply_kernel<LpNorm>', 550, 25, tid=7, correlation=7),
        event('cuda_runtime', 'cudaLaunchKernel', 95, 5, correlation=3),
        event('kernel', 'multi_tensor_apply_kernel<FusedAdam>', 600, 200, tid=7, correlation=3),
        event('cuda_runtime', 'cudaLaunchKernel', 100, 5, correlation=4),
        event('kernel', 'ncclDevKernel_AllGather_RING_LL', 700, 200, tid=20, correlation=4),
        event('cuda_runtime', 'cudaMemcpyAsync', 130, 5, correlation=5),
        event('gpu_memcpy', 'Memcpy DtoH (Device -> Pinned)', 900, 50, tid=7, correlation=5),
        event('cpu_op', 'aten::mm', 60, 20),  # launching is not working
    ]
    found = break_down(events)
    assert found['steps'] == 1 and found['step_ms'] == 1.0
    assert found['parts_ms'] == pytest.approx(
        {
            'matmul': 0.300,
            'attention': 0.040,
            'norm and clip': 0.025,
            'optimizer': 0.200,
            'elementwise': 0.0,
            'exposed communication': 0.100 + 0.100,  # behind the product, behind the optimizer
            'exposed host copies': 0.050,
            'data wait': 0.060,
            'host optimizer': 0.010,  # 90 to 100: nothing runs yet
            'idle': 0.030 + 0.010 + 0.025 + 0.050,
        }
    )
    assert found['communication_ms'] == pytest.approx(0.350)
    longest = found['kernels']
    assert [one['ms'] for one in longest] == pytest.approx([0.3, 0.2, 0.2, 0.15, 0.05, 0.04, 0.025])
    first = dict(name='nvjet_tst_128x256', kind='matmul', ms=0.3, calls=1.0)
    assert longest[0] == first and longest[-2]['kind'] == 'attention'


def test_a_trace_of_a_cpu_by_hand() -> None:
    op = 'cpu_op'
    events = [
        event('user_annotation', STEP, 0, 1000),
        event('user_annotation', DATA_WAIT, 0, 100),
        event(op, 'aten::copy_', 10, 50),  # the loader's
        event(op, 'aten::linear', 100, 300),
        event(op, 'aten::addmm', 150, 240),
        event(op, 'aten::copy_', 160, 30),
        event(op, 'aten::scaled_dot_product_attention', 400, 100),
        event(op, 'aten::bmm', 420, 60),  # part of it
        event(op, 'autograd::engine::evaluate_function: MulBackward0', 500, 100),
        event(op, 'aten::mul', 550, 40),
        event('user_annotation', OPTIMIZER, 700, 200),
        event('user_annotation', NORM_AND_CLIP, 702, 16),
        event(op, 'aten::_foreach_norm', 703, 10),
        event(op, 'aten::mm', 705, 2),
        event(op, 'aten::_fused_adamw_', 720, 80),
        event(op, 'aten::mm', 730, 10),
        event(op, 'gloo:all_reduce', 560, 100, tid=2),
        event(op, 'aten::mm', 910, 50, tid=2),  # another thread's work
        event('user_annotation', 'FSDP::all_gather', 650, 20),
        event('user_annotation', '## Call CompiledFxGraph abc ##', 960, 30),
    ]
    found = break_down(events)
    assert found['parts_ms'] == pytest.approx(
        {
            'matmul': 0.050 + 0.010 + 0.210,
            'attention': 0.100,
            'norm and clip': 0.010,
            'optimizer': 0.080,
            'elementwise': 0.030 + 0.040 + 0.030,
            'exposed communication': 0.070,  # 590 to 660
            'exposed host copies': 0.0,
            'data wait': 0.100,
            'host optimizer': 0.0,  # its operators are the optimizer there
            'idle': 0.050 + 0.060 + 0.110 + 0.060 + 0.010 - 0.020,
        }
    )
    assert sum(found['parts_ms'].values()) == pytest.approx(found['step_ms'])


def test_a_trace_without_steps() -> None:
    with pytest.raises(ValueError, match=r"the trace has no range 'internlm_mm\.step'"):
        break_down([event('cpu_op', 'aten::mm', 0, 1)])


def test_a_real_trace(tmp_path: Path) -> None:
    """Most of this step is a product of matrices, and most of its wait is a nap."""
    x = torch.randn(400, 400, requires_grad=True)
    optimizer = torch.optim.AdamW([x], fused=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(2):
            with record_function(STEP):
                with record_function(DATA_WAIT):
                    time.sleep(0.02)
                    torch.ones(5).add_(1)  # the loader's, whatever it is
                for _ in range(20):
                    y = x @ x
                q = y.view(1, 4, 100, 400)
                F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
                with record_function(OPTIMIZER):
                    optimizer.step()
                    optimizer.zero_grad()
    path = tmp_path / 'trace.json'
    profiler.export_chrome_trace(str(path))
    found = break_down(read_trace(path))
    parts = found['parts_ms']
    assert found['steps'] == 2
    assert sum(parts.values()) == pytest.approx(found['step_ms'])
    assert all(parts[kind] > 0 for kind in ('matmul', 'attention', 'optimizer', 'elementwise'))
    assert parts['data wait'] >= 20
    assert parts['exposed communication'] == found['communication_ms'] == 0
    averages = {a.key: a.self_cpu_time_total / 2e3 for a in profiler.key_averages()}
    assert parts['matmul'] == pytest.approx(averages['aten::mm'], rel=0.02)


def test_the_waterfall_as_text() -> None:
    parts = dict.fromkeys(KINDS, 0.0) | {'matmul': 700.0, 'exposed communication': 50.0}
    parts['idle'] = 250.0
    found = {'steps': 2, 'step_ms': 1000.0, 'parts_ms': parts, 'communication_ms': 200.0}
    text = render_breakdown(found | {'timed_step_ms': 980.0, 'remainder_ms': -20.0})
    lines = {line.split('  ')[1].strip(): line for line in text.splitlines()[1:]}
    assert '2 profiled steps of 1,000.0 ms, timed without the profiler 980.0 ms' in text
    assert lines['matmul'].split() == ['matmul', '700.0', 'ms', '71.4%', '#' * 29]
    assert lines['remainder'].split() == ['remainder', '-20.0', 'ms', '-2.0%']
    assert '75.0% of it behind computation' in text
    alone = render_breakdown(found)
    assert 'timed' not in alone and 'remainder' not in alone
    assert json.loads(json.dumps(found)) == found
