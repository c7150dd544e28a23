"""Time the training of a whole model as Hugging Face does it: transformers' Trainer, FSDP2, Liger.

torchrun --nproc-per-node 2 projects/peers/pretrain_transformers.py --liger --gathered
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from measuring import (  # beside this file
    SIZES,
    RandomTokens,
    StepClock,
    add_options,
    check_options,
    command_of,
    describe,
    read_job,
    report_of,
)
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from internlm_mm.engine.benchmark_report import save_record
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
    sizes = SIZES[args.size] | ({'num_hidden_layers': args.layers} if args.layers else {})
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=args.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation=args.attention,
    )
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
    options = TrainingArguments(
        output_dir=folder,
        max_steps=args.warmup + args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.rows // args.micro_batch // processes,
        bf16=True,
        fsdp=processes > 1,
        fsdp_config=sharding if processes > 1 else None,
        optim='adamw_torch_fused',
        learning_rate=3e-4,
        weight_decay=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        lr_scheduler_type='constant',
        gradient_checkpointing=args.checkpointing and processes == 1,
        use_liger_kernel=args.liger,
        torch_compile=args.compile,
        logging_steps=args.warmup + args.steps,
        logging_nan_inf_filter=False,
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
        dataloader_num_workers=0 if args.size == 'tiny' else 2,
        use_cpu=not torch.cuda.is_available(),
        seed=1,
    )
    trainer = Trainer(
        model=model,
        args=options,
        train_dataset=RandomTokens(model.config.vocab_size, args.seq_len),
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.train()
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
        report['command'] = command_of('pretrain_transformers.py', argv)
        say(json.dumps(report) if args.json else describe(report))
        if args.records is not None:
            save_record(args.records, report, f'peer_transformers_{args.size}')
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.exit(main())
