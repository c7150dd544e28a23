"""Time LoRA of InternLM-7B as Hugging Face does it: transformers' Trainer, PEFT and Liger.

python projects/peers/lora_peft.py --liger --compile blocks
"""

import argparse
import json
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
    report_of,
)
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from internlm_mm.engine.benchmark_report import save_record
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
    return args


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The frozen model in bf16 with random weights, and adapters over all layers of its blocks."""
    from peft import LoraConfig, get_peft_model

    sizes = SIZES[args.size] | ({'num_hidden_layers': args.layers} if args.layers else {})
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=args.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
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
    config = model.get_base_model().config
    options = TrainingArguments(
        output_dir=folder,
        max_steps=args.warmup + args.steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.rows // args.micro_batch,
        bf16=True,
        optim='adamw_torch_fused',
        learning_rate=2e-4,
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        lr_scheduler_type='constant',
        gradient_checkpointing=args.checkpointing,
        gradient_checkpointing_kwargs={'use_reentrant': False} if args.checkpointing else None,
        use_liger_kernel=args.liger,
        torch_compile=args.compile == 'whole',
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
        train_dataset=RandomTokens(config.vocab_size, args.seq_len),
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.train()


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the command."""
    args = parse_args(argv)
    device = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
    torch.manual_seed(1)
    model = build_model(args, device)
    clock = StepClock(device, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        train(args, model, clock, folder)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    report = report_of(vars(args), clock.seconds, clock.loss, trained, device)
    report['command'] = command_of('lora_peft.py', argv)
    say(json.dumps(report) if args.json else describe(report))
    if args.records is not None:
        save_record(args.records, report, f'peer_lora_{args.size}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
