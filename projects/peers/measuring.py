"""What all peers are measured with: sizes, random rows, a clock for steps, a report."""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from internlm_mm.engine.benchmark_report import peak_memory, save_record, summarise
from internlm_mm.utils.device import synchronize
from internlm_mm.utils.system import cpu_name

SIZES: dict[str, dict[str, Any]] = {
    '7b': {
        'vocab_size': 103_168,
        'hidden_size': 4096,
        'intermediate_size': 11_008,
        'num_hidden_layers': 32,
        'num_attention_heads': 32,
        'num_key_value_heads': 32,
        'attention_bias': True,
    },
    'llama3_8b': {
        'vocab_size': 128_256,
        'hidden_size': 4096,
        'intermediate_size': 14_336,
        'num_hidden_layers': 32,
        'num_attention_heads': 32,
        'num_key_value_heads': 8,
        'rope_parameters': {'rope_type': 'default', 'rope_theta': 500_000.0},
    },
    'tiny': {
        'vocab_size': 512,
        'hidden_size': 64,
        'intermediate_size': 96,
        'num_hidden_layers': 2,
        'num_attention_heads': 4,
        'num_key_value_heads': 4,
        'attention_bias': True,
    },
}
"""As transformers' Llama spells them. '7b' is InternLM-7B: a Llama whose attention has biases."""


class Job(NamedTuple):
    """What `torchrun` said of this process; one process alone without it.

    Attributes:
        rank: Its number.
        processes: How many there are.
        device: Where it trains.
    """

    rank: int
    processes: int
    device: torch.device


def read_job() -> Job:
    """The job of this process."""
    rank, local_rank, processes = (
        int(os.environ.get(name, default))
        for name, default in (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1))
    )
    has_gpu = torch.cuda.is_available()
    return Job(
        rank, processes, torch.device('cuda', local_rank) if has_gpu else torch.device('cpu')
    )


def add_options(parser: argparse.ArgumentParser, sizes: Sequence[str], rows: int) -> None:
    """The options that all programs have.

    Args:
        parser: Gets them.
        sizes: Names in SIZES.
        rows: Of an optimizer step, if nothing is said.
    """
    parser.add_argument('--size', choices=sizes, default='7b')
    parser.add_argument('--layers', type=int, help='other than the size has, to try settings')
    parser.add_argument('--seq-len', type=int, default=4096)
    parser.add_argument('--rows', type=int, default=rows, help='of a step, on all GPUs')
    parser.add_argument('--micro-batch', type=int, default=2, help='rows of a forward pass')
    parser.add_argument('--warmup', type=int, default=3, help='steps before measuring')
    parser.add_argument('--steps', type=int, default=6, help='steps measured')
    parser.add_argument('--json', action='store_true', help='one line of JSON instead of text')
    parser.add_argument(
        '--records', type=Path, metavar='DIR', help='folder in which the run is kept as JSON'
    )


def check_options(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    packages: Mapping[str, str | None],
    processes: int = 1,
) -> None:
    """End the program with a message if options do not fit one another or a package is missing.

    Args:
        parser: Of the options.
        args: What was typed.
        packages: That are no requirement of ours, and the option that asks for each, None if
            every run does.
        processes: That train.
    """
    counts = (
        ('layers', 1),
        ('seq_len', 2),
        ('rows', 1),
        ('micro_batch', 1),
        ('warmup', 1),
        ('steps', 2),
    )
    for name, least in counts:
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name.replace("_", "-")} {value} must be at least {least}')
    if args.rows % (args.micro_batch * processes):
        on = f' on {processes} processes' if processes > 1 else ''
        parser.error(f'--rows {args.rows} is no multiple of --micro-batch {args.micro_batch}{on}')
    for package, option in packages.items():
        is_asked = option is None or getattr(args, option)
        if is_asked and importlib.util.find_spec(package) is None:
            reason = '' if option is None else f', which --{option.replace("_", "-")} needs'
            name = package.replace('_', '-')
            parser.error(f'{name} is not installed{reason}: see projects/peers/README.md')


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


def llama_config(args: argparse.Namespace, **options: Any) -> LlamaConfig:
    """What transformers calls the model that the options name; `options` are further ones of it."""
    sizes = SIZES[args.size] | ({'num_hidden_layers': args.layers} if args.layers else {})
    return LlamaConfig(
        **sizes,
        max_position_embeddings=args.seq_len,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )


def run_trainer(
    args: argparse.Namespace,
    model: nn.Module,
    clock: StepClock,
    folder: str,
    processes: int = 1,
    **options: Any,
) -> Trainer:
    """Run the steps through transformers' Trainer on random rows.

    Args:
        args: The program's.
        model: Trained in place.
        clock: Told of every step.
        folder: For what Trainer writes.
        processes: That train.
        **options: Of TrainingArguments, beside those that all programs have.

    Returns:
        The trainer, when all is done.
    """
    steps = args.warmup + args.steps
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=args.rows // args.micro_batch // processes,
        bf16=True,
        optim='adamw_torch_fused',
        adam_beta2=0.95,
        max_grad_norm=1.0,
        lr_scheduler_type='constant',
        use_liger_kernel=args.liger,
        logging_steps=steps,
        logging_nan_inf_filter=False,
        save_strategy='no',
        report_to='none',
        disable_tqdm=True,
        dataloader_num_workers=0 if args.size == 'tiny' else 2,
        use_cpu=not torch.cuda.is_available(),
        seed=1,
        **options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=RandomTokens(SIZES[args.size]['vocab_size'], args.seq_len),
        data_collator=default_data_collator,
        callbacks=[clock],
    )
    trainer.train()
    return trainer


def peaks_of(device: torch.device) -> tuple[int, int]:
    """The most bytes that were allocated, and taken by the allocator, since that was reset."""
    reserved = torch.cuda.max_memory_reserved(device) if device.type == 'cuda' else 0
    return peak_memory(device), reserved


def report_of(
    settings: dict[str, Any],
    seconds: Sequence[float],
    loss: float | None,
    trained: int,
    device: torch.device,
    devices: int = 1,
    memory: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """What was measured, under the keys that `tools/benchmark.py --json` writes.

    Args:
        settings: How the peer was run; among them `warmup`, `rows` of a step on all devices and
            `seq_len`.
        seconds: Of all steps, those of the warm-up first.
        loss: The last one.
        trained: Weights that were trained, all devices together.
        device: This one.
        devices: How many trained.
        memory: From `peaks_of`, where that was asked before; None asks now.
    """
    allocated, reserved = memory or peaks_of(device)
    measured = list(seconds[settings['warmup'] :])
    times = summarise(measured)
    speed = settings['rows'] * settings['seq_len'] / times.median
    report: dict[str, Any] = {
        'settings': {key: value for key, value in settings.items() if key != 'records'},
        'framework': asdict(times),
        'step_seconds': measured,
        'first_step_seconds': seconds[0],
        'tokens_per_second': speed,
        'tgs': speed / devices,
        'devices': devices,
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu_name(),
        'device_type': device.type,
        'dtype': 'bfloat16',
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'peak_memory_bytes': allocated,
        'trained_weights': trained,
        'loss': loss,
    }
    if device.type == 'cuda':
        report['reserved_memory_bytes'] = reserved
    return report


def tell(
    args: argparse.Namespace,
    report: dict[str, Any],
    program: str,
    argv: Sequence[str] | None,
    say: Callable[[str], None],
) -> None:
    """Print a report, and keep it if that was asked for.

    Args:
        args: The program's.
        report: From `report_of`; gets the command.
        program: Its file's name.
        argv: What was typed, None for the process's own.
        say: Prints.
    """
    typed = sys.argv[1:] if argv is None else argv
    report['command'] = [f'projects/peers/{program}.py', *typed]
    say(json.dumps(report) if args.json else describe(report))
    if args.records is not None:
        save_record(args.records, report, f'peer_{program}_{args.size}')


def describe(report: dict[str, Any]) -> str:
    """The report in two lines for a person."""
    times = report['framework']
    each = ' a GPU' if report['devices'] > 1 else ''
    loss = math.nan if report['loss'] is None else report['loss']
    return (
        f'{report["device"]}, torch {report["torch"]}: step {times["median"] * 1e3:,.1f} ms '
        f'(median of {times["steps"]}, spread {times["spread"]:.1%}), first step '
        f'{report["first_step_seconds"]:.1f} s\n'
        f'{report["tgs"]:,.0f} tokens/s{each} | {report["peak_memory_bytes"] / 2**30:.2f} GiB | '
        f'{report["trained_weights"]:,} weights trained | loss {loss:.3f}'
    )
