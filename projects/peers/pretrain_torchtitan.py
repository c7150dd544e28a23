"""Time the training of a whole model as torchtitan does it: its own trainer, FSDP2, torch.compile.

torchrun --nproc-per-node 2 projects/peers/pretrain_torchtitan.py --gathered --fp8
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from measuring import (  # beside this file
    SIZES,
    RandomTokens,
    StepClock,
    add_options,
    check_options,
    peaks_of,
    read_job,
    report_of,
    tell,
)
from torch import Tensor
from torch.utils.data import IterableDataset

from internlm_mm.utils.arguments import Arguments

NAME = 'internlm_peer'
PACKAGES = ('torchtitan', 'torchdata', 'tyro', 'torchao')


class TokenStream(IterableDataset):
    """Random rows without end, as torchtitan wants them: inputs, and labels one token on."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self._rows = RandomTokens(vocab_size, seq_len + 1)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for index in range(len(self._rows)):
            row = self._rows[index]['input_ids']
            yield {'input': row[:-1]}, row[1:]


def parse_args(argv: Sequence[str] | None, processes: int) -> argparse.Namespace:
    """Arguments of the command.

    Args:
        argv: What was typed.
        processes: That train.
    """
    parser = Arguments(prog='pretrain_torchtitan.py', description=__doc__)
    add_options(parser, list(SIZES), rows=32)
    parser.add_argument(
        '--fp8', action='store_true', help='products in 8 bits, one scale a tensor, gathered so'
    )
    parser.add_argument(
        '--gathered', action='store_true',
        help='keep weights gathered from forward to backward (reshard_after_forward=never)',
    )  # fmt: skip
    parser.add_argument('--no-compile', action='store_true', help='without torch.compile')
    parser.add_argument(
        '--checkpointing', choices=['none', 'selective', 'full'], default='none',
        help='what is recomputed, by its own names',
    )  # fmt: skip
    args = parser.parse_args(argv)
    check_options(parser, args, dict.fromkeys(PACKAGES), processes)
    return args


def register_model(args: argparse.Namespace) -> None:
    """Make the model known to torchtitan, as a Llama without biases, which it does not have."""
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.models.llama3 import get_train_spec
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.protocols.train_spec import register_train_spec

    sizes = SIZES[args.size]
    width, inner = sizes['hidden_size'], sizes['intermediate_size']
    options = TransformerModelArgs(
        dim=width,
        n_layers=args.layers or sizes['num_hidden_layers'],
        n_heads=sizes['num_attention_heads'],
        n_kv_heads=sizes['num_key_value_heads'],
        vocab_size=sizes['vocab_size'],
        multiple_of=inner,
        ffn_dim_multiplier=gate_factor(inner, width),
        rope_theta=sizes.get('rope_parameters', {}).get('rope_theta', 10_000.0),
    )

    def build_loader(dp_world_size: int, dp_rank: int, job_config: Any, **_: Any) -> Any:
        return ParallelAwareDataloader(
            TokenStream(sizes['vocab_size'], args.seq_len),
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=job_config.training.local_batch_size,
        )

    spec = get_train_spec()
    spec.model_args = {NAME: options}
    spec.build_dataloader_fn = build_loader
    spec.build_tokenizer_fn = spec.build_validator_fn = None
    register_train_spec(NAME, spec)


def gate_factor(inner: int, width: int) -> float:
    """By what 8/3 of a model's width is multiplied to be `inner` when rounded up to that."""
    return inner / (8 * width / 3) / 2


def flags_of(args: argparse.Namespace, folder: str) -> list[str]:
    """The options in torchtitan's own words."""
    steps = args.warmup + args.steps
    flags = {
        'model.name': NAME,
        'model.flavor': NAME,
        'job.dump_folder': folder,
        'training.local_batch_size': args.micro_batch,
        'training.global_batch_size': args.rows,
        'training.seq_len': args.seq_len,
        'training.steps': steps,
        'optimizer.lr': 3e-4,
        'lr_scheduler.warmup_steps': 1,
        'metrics.log_freq': steps,
        'activation_checkpoint.mode': args.checkpointing,
        'parallelism.fsdp_reshard_after_forward': 'never' if args.gathered else 'default',
    }
    words = [word for name, value in flags.items() for word in (f'--{name}', str(value))]
    if not args.no_compile:
        words.append('--compile.enable')
    if args.fp8:
        linear = 'quantize.linear.float8'
        words += ['--model.converters', linear, f'--{linear}.filter_fqns', 'output']
        words.append(f'--{linear}.enable_fsdp_float8_all_gather')
        words.append(f'--{linear}.precompute_float8_dynamic_scale_for_fsdp')
    return words


def train(
    args: argparse.Namespace, clock: StepClock, device: torch.device, folder: str
) -> tuple[int, tuple[int, int]]:
    """Run the steps through torchtitan's trainer.

    Returns:
        How many weights were trained, and the peaks of memory.
    """
    from torchtitan.config import ConfigManager
    from torchtitan.tools.logging import init_logger
    from torchtitan.train import Trainer

    class TimedTrainer(Trainer):
        """torchtitan's, with a clock that waits for the device after each step."""

        def train_step(self, data_iterator: Any) -> None:
            clock.on_train_begin()
            super().train_step(data_iterator)
            clock.on_step_end()

    init_logger()
    register_model(args)
    trainer = TimedTrainer(ConfigManager().parse_args(flags_of(args, folder)))
    peaks: list[tuple[int, int]] = []
    log = trainer.metrics_processor.log

    def noting(step: int, loss: float, *rest: Any, **options: Any) -> None:
        clock.loss = float(loss)
        peaks.append(peaks_of(device))  # which torchtitan resets whenever it logs
        log(step, loss, *rest, **options)

    trainer.metrics_processor.log = noting
    try:
        trainer.train()
    finally:
        trainer.close()
    weights = [weight for part in trainer.model_parts for weight in part.parameters()]
    return sum(weight.numel() for weight in weights), peaks[-1]


def main(argv: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the command."""
    rank, processes, device = read_job()
    args = parse_args(argv, processes)
    clock = StepClock(device, args.warmup)
    with tempfile.TemporaryDirectory() as folder:
        trained, peaks = train(args, clock, device, folder)
    if rank == 0:
        report = report_of(vars(args), clock.seconds, clock.loss, trained, device, processes, peaks)
        tell(args, report, 'pretrain_torchtitan', argv, say)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


if __name__ == '__main__':
    sys.exit(main())
