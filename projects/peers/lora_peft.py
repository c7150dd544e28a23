"""Time LoRA of InternLM-7B as Hugging Face does it: transformers' Trainer, PEFT and Liger.

python projects/peers/lora_peft.py --liger --compile blocks
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence

import torch
from measuring import (  # beside this file
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
from transformers import LlamaForCausalLM

from internlm_mm.utils.arguments import Arguments

TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
PACKAGES = {'peft': None, 'accelerate': None, 'liger_kernel': 'liger', 'bitsandbytes': 'four_bit'}
"""What is no requirement of ours, and the option that asks for it, if not every run."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = Arguments(prog='lora_peft.py', description=__doc__)
    add_options(parser, ['7b', 'tiny'], rows=8)
    parser.add_argument('--rank', type=int, default=16)
    parser.add_argument('--liger', action='store_true', help="Liger's kernels and fused loss")
    parser.add_argument(
        '--compile', choices=['no', 'blocks', 'whole'], default='no',
        help='torch.compile: each block, or the whole model as Trainer does it',
    )  # fmt: skip
    parser.add_argument(
        '--checkpointing', action='store_true', help='recompute all blocks in backward'
    )
    parser.add_argument(
        '--adapter-dtype', choices=['float32', 'bfloat16'], default='float32',
        help="weights and moments of adapters; float32 is PEFT's default and ours",
    )  # fmt: skip
    parser.add_argument('--attention', default='sdpa', help="transformers' attn_implementation")
    parser.add_argument(
        '--four-bit', action='store_true', help='QLoRA: frozen layers of blocks in nf4'
    )
    args = parser.parse_args(argv)
    check_options(parser, args, PACKAGES)
    if read_job().processes > 1:
        parser.error('one GPU is measured: start it without torchrun')
    return args


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The frozen model in bf16 with random weights, and adapters over all layers of its blocks."""
    from peft import LoraConfig, get_peft_model

    config = llama_config(args)
    with device:
        model = LlamaForCausalLM._from_config(
            config, dtype=torch.bfloat16, attn_implementation=args.attention
        )
    if args.four_bit:
        quantize(model)
    lora = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, task_type='CAUSAL_LM'
    )
    return get_peft_model(model, lora, autocast_adapter_dtype=args.adapter_dtype == 'float32')


def quantize(model: nn.Module) -> None:
    """Hold the linear layers of all blocks in nf4, scales in 8 bits, as `from_pretrained` does."""
    import bitsandbytes as bnb

    for block in model.model.layers:
        for name, layer in list(block.named_modules()):
            if not isinstance(layer, nn.Linear):
                continue
            new = bnb.nn.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=torch.bfloat16,
                compress_statistics=True,
                quant_type='nf4',
                device='meta',
            )
            new.weight = bnb.nn.Params4bit(
                layer.weight.data.cpu(),
                requires_grad=False,
                compress_statistics=True,
                quant_type='nf4',
                module=new,
            )
            if layer.bias is not None:
                new.bias = nn.Parameter(layer.bias.data, requires_grad=False)
            new.to(layer.weight.device)
            block.set_submodule(name, new)
    model.is_loaded_in_4bit = True  # by which PEFT chooses its layer


def train(args: argparse.Namespace, model: nn.Module, clock: StepClock, folder: str) -> None:
    """Run the steps through Trainer."""
    if args.compile == 'blocks':
        for block in model.get_base_model().model.layers:
            block.compile()
    run_trainer(
        args,
        model,
        clock,
        folder,
        learning_rate=2e-4,
        weight_decay=0.0,
        gradient_checkpointing=args.checkpointing,
        gradient_checkpointing_kwargs={'use_reentrant': False} if args.checkpointing else None,
        torch_compile=args.compile == 'whole',
    )


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the command."""
    args = parse_args(argv)
    device = read_job().device
    torch.manual_seed(1)
    model = build_model(args, device)
    clock = StepClock(device, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        train(args, model, clock, folder)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    report = report_of(vars(args), clock.seconds, clock.loss, trained, device)
    tell(args, report, 'lora_peft', argv, say)
    return 0


if __name__ == '__main__':
    sys.exit(main())
