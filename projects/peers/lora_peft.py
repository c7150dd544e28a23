"""Time LoRA of InternLM-7B as Hugging Face does it: transformers' Trainer, PEFT and Liger.

python projects/peers/lora_peft.py --liger --compile blocks
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from internlm_mm.engine.benchmark_report import peak_memory, save_record, summarise
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.device import synchronize
from internlm_mm.utils.system import cpu_name

TARGETS = ['q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj']
SIZES = {
    '7b': {
        'vocab_size': 103_168,
        'hidden_size': 4096,
        'intermediate_size': 11_008,
        'num_hidden_layers': 32,
        'num_attention_heads': 32,
        'num_key_value_heads': 32,
    },
    'tiny': {
        'vocab_size': 512,
        'hidden_size': 64,
        'intermediate_size': 96,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 4,
    },
}
"""'7b' is InternLM-7B: a Llama whose attention has biases."""

PACKAGES = {'peft': None, 'accelerate': None, 'liger_kernel': 'liger', 'bitsandbytes': 'four_bit'}
"""What is no requirement of ours, and the option that asks for it, if not every run."""


class RandomTokens(Dataset):
    """Rows of random tokens, each its own labels: the model shifts them."""

    def __init__(self, vocab_size: int, seq_len: int, rows: int = 128) -> None:
        drawn = torch.Generator().manual_seed(1)
        self._rows = torch.randint(0, vocab_size, (rows, seq_len), generator=drawn)

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self._rows[index % len(self._rows)]
        return {'input_ids': row, 'labels': row}


class StepClock(TrainerCallback):
    """Seconds of every optimizer step, waiting for the device after each.

    Args:
        device: That trains.
        warmup: After so many steps the peak of memory is counted from anew.

    Attributes:
        seconds: Of each step.
        loss: The last one that was logged.
    """

    def __init__(self, device: torch.device, warmup: int) -> None:
        self._device, self._warmup = device, warmup
        self._start = 0.0
        self.seconds: list[float] = []
        self.loss: float | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        synchronize(self._device)
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note how long the step took."""
        synchronize(self._device)
        self.seconds.append(time.perf_counter() - self._start)
        if len(self.seconds) == self._warmup and self._device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.perf_counter()

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """Keep the loss."""
        self.loss = (logs or {}).get('loss', self.loss)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = Arguments(prog='lora_peft.py', description=__doc__)
    parser.add_argument('--size', choices=SIZES, default='7b')
    parser.add_argument('--layers', type=int, help='other than the size has, to try settings')
    parser.add_argument('--seq-len', type=int, default=4096)
    parser.add_argument('--rows', type=int, default=8, help='of an optimizer step')
    parser.add_argument('--micro-batch', type=int, default=2, help='rows of a forward pass')
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
    parser.add_argument('--warmup', type=int, default=3, help='steps before measuring')
    parser.add_argument('--steps', type=int, default=6, help='steps measured')
    parser.add_argument('--json', action='store_true', help='one line of JSON instead of text')
    parser.add_argument(
        '--records', type=Path, metavar='DIR', help='folder in which the run is kept as JSON'
    )
    args = parser.parse_args(argv)
    if args.rows % args.micro_batch:
        parser.error(f'--rows {args.rows} is no multiple of --micro-batch {args.micro_batch}')
    for name, least in (('layers', 1), ('warmup', 1), ('steps', 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name} {value} must be at least {least}')
    for package, option in PACKAGES.items():
        is_asked = option is None or getattr(args, option)
        if is_asked and importlib.util.find_spec(package) is None:
            reason = '' if option is None else f', which --{option.replace("_", "-")} needs'
            name = package.replace('_', '-')
            parser.error(f'{name} is not installed{reason}: see projects/peers/README.md')
    return args


def build_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """The frozen model in bf16 with random weights, and adapters over all layers of its blocks."""
    from peft import LoraConfig, get_peft_model

    sizes = SIZES[args.size] | ({'num_hidden_layers': args.layers} if args.layers else {})
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=args.seq_len,
        rms_norm_eps=1e-5,
        attention_bias=True,
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


def report_of(
    args: argparse.Namespace, model: nn.Module, clock: StepClock, device: torch.device
) -> dict[str, Any]:
    """What was measured, under the keys that `tools/benchmark.py --json` writes."""
    seconds = clock.seconds[args.warmup :]
    times = summarise(seconds)
    speed = args.rows * args.seq_len / times.median
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    report: dict[str, Any] = {
        'settings': {key: value for key, value in vars(args).items() if key != 'records'},
        'framework': asdict(times),
        'step_seconds': seconds,
        'first_step_seconds': clock.seconds[0],
        'tokens_per_second': speed,
        'tgs': speed,
        'devices': 1,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        'device_type': device.type,
        'dtype': 'bfloat16',
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'peak_memory_bytes': peak_memory(device),
        'trained_weights': trained,
        'loss': clock.loss,
    }
    if device.type == 'cuda':
        report['reserved_memory_bytes'] = torch.cuda.max_memory_reserved(device)
    return report


def describe(report: dict[str, Any]) -> str:
    """The report in two lines for a person."""
    times = report['framework']
    return (
        f'{report["device"]}, torch {report["torch"]}: step {times["median"] * 1e3:,.1f} ms '
        f'(median of {times["steps"]}, spread {times["spread"]:.1%}), first step '
        f'{report["first_step_seconds"]:.1f} s\n'
        f'{report["tgs"]:,.0f} tokens/s | {report["peak_memory_bytes"] / 2**30:.2f} GiB | '
        f'{report["trained_weights"]:,} weights trained | loss {report["loss"]:.3f}'
    )


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the command."""
    args = parse_args(argv)
    device = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
    torch.manual_seed(1)
    model = build_model(args, device)
    clock = StepClock(device, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        train(args, model, clock, folder)
    report = report_of(args, model, clock, device)
    report['command'] = ['projects/peers/lora_peft.py', *(sys.argv[1:] if argv is None else argv)]
    say(json.dumps(report) if args.json else describe(report))
    if args.records is not None:
        save_record(args.records, report, f'peer_lora_{args.size}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
