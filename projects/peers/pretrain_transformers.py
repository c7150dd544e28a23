"""Time the training of a whole model as Hugging Face does it: transformers' Trainer, FSDP2, Liger.

torchrun --nproc-per-node 2 projects/peers/pretrain_transformers.py --liger --gathered
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from measuring import (  # beside this file
    SIZES,
    StepClock,
    add_options,
    check_options,
    llama_config,
    read_job,
    report_of,
    run_trainer,
    tell,
)
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM

from internlm_mm.utils.arguments import Arguments

PACKAGES = {'accelerate': None, 'liger_kernel': 'liger'}
"""What is no requirement of ours, and the option that asks for it, if not every run."""


def parse_args(argv: Sequence[str] | None, processes: int) -> argparse.Namespace:
    """Arguments of the command.

    Args:
        argv: What was typed.
        processes: That train.
    """
    parser = Arguments(prog='pretrain_transformers.py', description=__doc__)
    add_options(parser, list(SIZES), rows=32)
    parser.add_argument('--liger', action='store_true', help="Liger's kernels and fused loss")
    parser.add_argument('--compile', action='store_true', help='torch.compile of each block')
    parser.add_argument(
        '--gathered', action='store_true',
        help='keep weights gathered from forward to backward (reshard_after_forward=False)',
    )  # fmt: skip
    parser.add_argument(
        '--checkpointing', action='store_true', help='recompute all blocks in backward'
    )
    parser.add_argument('--attention', default='sdpa', help="transformers' attn_implementation")
    args = parser.parse_args(argv)
    check_options(parser, args, PACKAGES, processes)
    return args


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The model in fp32 with random weights; Trainer shards it."""
    config = llama_config(args, attn_implementation=args.attention)
    with device:
        return LlamaForCausalLM(config)


def train(
    args: argparse.Namespace, model: nn.Module, clock: StepClock, folder: str, processes: int
) -> bool:
    """Run the steps through Trainer.

    Returns:
        Whether ranks held shares of the weights, by FSDP2: accelerate does so on GPUs.
    """
    if args.compile:  # by which accelerate compiles block by block; it has no option for it
        os.environ['ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION'] = 'true'
    sharding = {
        'version': 2,
        'auto_wrap_policy': 'TRANSFORMER_BASED_WRAP',
        'transformer_layer_cls_to_wrap': ['LlamaDecoderLayer'],
        'reshard_after_forward': not args.gathered,
        'cpu_ram_efficient_loading': False,
        'activation_checkpointing': args.checkpointing,
    }
    trainer = run_trainer(
        args,
        model,
        clock,
        folder,
        processes,
        learning_rate=3e-4,
        weight_decay=0.1,
        fsdp=processes > 1,
        fsdp_config=sharding if processes > 1 else None,
        gradient_checkpointing=args.checkpointing and processes == 1,
        torch_compile=args.compile,
    )
    return any(isinstance(weight, DTensor) for weight in trainer.model_wrapped.parameters())


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the command."""
    rank, processes, device = read_job()
    args = parse_args(argv, processes)
    torch.manual_seed(1)
    model = build_model(args, device)
    trained = sum(weight.numel() for weight in model.parameters())
    clock = StepClock(device, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        is_sharded = train(args, model, clock, folder, processes)
    if rank == 0:
        report = report_of(vars(args), clock.seconds, clock.loss, trained, device, processes)
        report['is_sharded'] = is_sharded
        tell(args, report, 'pretrain_transformers', argv, say)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.exit(main())
