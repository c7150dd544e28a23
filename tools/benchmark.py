"""Measure training steps on this machine, alone or in turns with a bare loop."""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from bare_loop import BareLoop  # beside this file
from mmengine.config import Config

from internlm_mm.engine.benchmark import FrameworkSteps, measure
from internlm_mm.engine.benchmark_bare import attention_of, beyond_bare, check_bare
from internlm_mm.engine.benchmark_memory import host_memory, reckon_memory, render_memory
from internlm_mm.engine.benchmark_report import (
    add_breakdown,
    add_matmul_rate,
    check_records,
    config_hash,
    rate_of_products,
    render,
    save_record,
)
from internlm_mm.engine.breakdown import render_breakdown
from internlm_mm.engine.last_words import JobParser, tell_once
from internlm_mm.engine.runner import LLMRunner
from internlm_mm.engine.start import adopt_model
from internlm_mm.engine.train_cli import MISTAKE_EXIT_CODE, USER_ERRORS
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config
from internlm_mm.utils.device import release_cached
from internlm_mm.utils.launch import LAUNCHERS, NotStarted, read_launch

PROFILED_STEPS = 2
"""Steps that a breakdown profiles, if none are asked for."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = JobParser(prog='benchmark.py', description=__doc__)
    parser.add_argument('config', help='a config file, or the name of a shipped one')
    parser.add_argument(
        '--against', choices=['bare'], help='also time tools/bare_loop.py, in turns'
    )
    parser.add_argument('--warmup', type=int, default=3, help='steps before measuring')
    parser.add_argument('--steps', type=int, default=5, help='steps in a block')
    parser.add_argument('--blocks', type=int, default=5)
    parser.add_argument(
        '--breakdown', action='store_true', help='say where time and memory of a step go'
    )
    parser.add_argument(
        '--profiled-steps', type=int, metavar='STEPS',
        help=f'steps that --breakdown profiles, after all ({PROFILED_STEPS})',
    )  # fmt: skip
    parser.add_argument('--json', action='store_true', help='one line of JSON instead of text')
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        '--records', type=Path, default=Path('work_dirs/benchmarks'), metavar='DIR',
        help='folder in which every run is kept as a JSON file (work_dirs/benchmarks)',
    )  # fmt: skip
    kept.add_argument('--no-records', action='store_true', help='keep nothing')
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    return parser.parse_args(argv)


def bare_step(framework: FrameworkSteps, config: Config) -> Callable[[], float]:
    """One step of the bare loop over batches of the same shapes."""
    model = dict(config.model)
    named = model.pop('type')
    optimizer = dict(config.optim_wrapper.optimizer)
    del optimizer['type']
    runner, strategy = framework.runner, framework.runner.strategy
    loop = BareLoop(
        named if isinstance(named, str) else named.__name__,
        model,
        strategy.device,
        optimizer=optimizer,
        max_norm=config.optim_wrapper.clip_grad.max_norm,
        dtypes=strategy.mesh and (strategy.param_dtype, strategy.reduce_dtype),
        compile=strategy.techniques.compile,
        attend=attention_of(runner.model),
    )
    batches = itertools.cycle(framework.sample(4))
    return lambda: loop.step(next(batches))


def check_numbers(args: argparse.Namespace) -> None:
    """Refuse what could not be measured or kept, before any step is made.

    Raises:
        ValueError: Naming the option and its value; OSError likewise.
    """
    for option, least in (('warmup', 0), ('steps', 1), ('blocks', 1), ('profiled_steps', 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f'--{option.replace("_", "-")} {value}: must be at least {least}')
    if args.profiled_steps is not None and not args.breakdown:
        raise ValueError(f'--profiled-steps {args.profiled_steps}: give it with --breakdown')
    if args.steps * args.blocks < 2:
        raise ValueError(f'--steps {args.steps} --blocks {args.blocks}: measure at least 2 steps')
    if not args.no_records:
        check_records(args.records)


def check_launcher(launcher: str) -> None:
    """Raise ValueError if the launcher has not started this process; says how it would."""
    try:
        read_launch(launcher)
    except NotStarted as error:
        raise ValueError(error.told('tools/benchmark.py CONFIG')) from error


def check_trains(config: Config, path: str) -> None:
    """Raise ValueError if a config has no steps that could be measured, or is none."""
    needed = ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper')
    missing = [key for key in needed if not isinstance(config.get(key), dict)]
    if missing:
        raise ValueError(
            f'{path}: has no training steps to measure: it lacks '
            f'{", ".join(f"{key}=dict(...)" for key in missing)}'
        )


def read_config(args: argparse.Namespace) -> Config:
    """The config with the command line's changes, for a run that is only to be timed."""
    config = load_config(args.config, parse_cfg_options(args.cfg_options))
    config.launcher = args.launcher
    adopt_model(config)
    check_trains(config, args.config)
    check_config(config)
    # Long enough for every step; nothing is saved, evaluated or resumed while the clock runs.
    config.train_cfg.max_iters = 1_000_000
    if config.get('default_hooks'):
        config.default_hooks.update(checkpoint=None, evaluation=None)
    config.resume = False
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, or 2 after a mistake in what was asked."""
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as work_dir:
        try:
            check_numbers(args)
            check_launcher(args.launcher)
            config = read_config(args)
            fingerprint = config_hash(config)
            config.work_dir = work_dir
            config.log_level = 'WARNING'  # no progress towards a last step that never comes
            runner = LLMRunner.from_cfg(config)
            if args.against:
                check_bare(config, runner.strategy)
            framework = FrameworkSteps(runner)
        except USER_ERRORS as error:
            tell_once(f'error: {error.args[0] if isinstance(error, KeyError) else error}')
            return MISTAKE_EXIT_CODE
        other = bare_step(framework, config) if args.against else None
        report = measure(framework, other, args.warmup, args.steps, args.blocks)
        if args.against:
            report['beyond_bare'] = beyond_bare(runner.model, runner.strategy.device)
        if args.breakdown:
            report |= host_memory(runner.strategy.device)
        profiled = args.profiled_steps or PROFILED_STEPS
        found = framework.profile(profiled) if args.breakdown else {}
        framework.close()
    release_cached(runner.strategy.device)  # the products need a little, and may find none
    add_matmul_rate(report, rate_of_products(runner.strategy))
    if found:
        add_breakdown(report, found)
    if dist.is_initialized():
        dist.destroy_process_group()
    if runner.rank == 0:
        if found:  # after the process group: a rehearsal pretends one
            report['memory'] = reckon_memory(config, runner.strategy.layout)
        report['command'] = ['tools/benchmark.py', *(sys.argv[1:] if argv is None else argv)]
        print(json.dumps(report) if args.json else render(report))
        if found and not args.json:
            print(render_breakdown(report['breakdown']))
            print(render_memory(report))
        if not args.no_records:
            name = Path(args.config).stem
            path = save_record(args.records, report, name, fingerprint)
            print(f'kept in {path}', file=sys.stderr)
    return 0


if __name__ == '__main__':
    sys.exit(main())
