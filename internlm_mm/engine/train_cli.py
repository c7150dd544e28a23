"""The command line of training: config, overrides, dry run, exit codes."""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmengine.config import Config

from internlm_mm.engine.dry_run import dry_run
from internlm_mm.engine.last_words import JobParser, tell_once
from internlm_mm.engine.lost_ranks import LostRanks, watch_ranks
from internlm_mm.engine.made_folders import MadeFolders
from internlm_mm.engine.rehearse import rehearse
from internlm_mm.engine.rehearse_report import render
from internlm_mm.engine.start import adopt_model
from internlm_mm.registry import RUNNERS
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config
from internlm_mm.utils.launch import LAUNCHERS, read_launch
from internlm_mm.utils.signals import (
    REQUEUE_EXIT_CODE,
    ignore_stop_signals,
    outlive_errors,
)

INTERRUPTED_EXIT_CODE = 130
"""What shells give a program that Ctrl-C has ended at once: the second one does."""

MISTAKE_EXIT_CODE = 2
"""A mistake in what was asked, told in one message before time is spent; as of all programs."""

USER_ERRORS = (
    *(ValueError, TypeError, KeyError, ImportError),
    *(FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError),
)
"""Raised before time is spent, with a message that needs no traceback."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of `tools/train.py`."""
    parser = JobParser(
        prog='train.py',
        description='Train a model from a config.',
        epilog='Examples: train.py internlm_tiny_pretrain; train.py my.py --resume; '
        'torchrun --nproc-per-node 8 tools/train.py my.py --launcher pytorch '
        '--cfg-options train_cfg.max_iters=100. '
        f'Exit code {REQUEUE_EXIT_CODE}: stopped by SIGTERM or Ctrl-C after saving a '
        'checkpoint; start again with --resume.',
    )
    parser.add_argument('config', help='a config file, or the name of a shipped one')
    parser.add_argument(
        '--launcher', choices=LAUNCHERS, help='who starts the processes (default: none)'
    )
    parser.add_argument('--work-dir', help='logs and checkpoints; work_dirs/CONFIG by default')
    parser.add_argument(
        '--resume',
        nargs='?',
        const=True,
        default=None,
        metavar='PATH',
        help='go on from the newest whole checkpoint of the work dir, or from PATH',
    )
    parser.add_argument(
        '--load-from',
        metavar='PATH',
        help="start from the weights of a checkpoint, a Hugging Face folder or InternLM's shards",
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='override, a.b.c=value'
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='check everything, print the plan, train nothing'
    )
    rehearsal = parser.add_argument_group('rehearsal, without GPUs and without data')
    rehearsal.add_argument(
        '--rehearse',
        type=int,
        metavar='N',
        help='build what ranks of a job of N GPUs would hold, print the map and the memory',
    )
    rehearsal.add_argument(
        '--rehearse-rank',
        type=int,
        metavar='R',
        help='show rank R; by default the first rank of every pipeline stage',
    )
    rehearsal.add_argument('--rehearse-json', metavar='FILE', help='write all of it to FILE, too')
    rehearsal.add_argument(
        '--gpus-per-node', type=int, metavar='G', help='of one machine (default: 8)'
    )
    return parser.parse_args(argv)


def resolve_config(args: argparse.Namespace) -> Config:
    """The config with the command line's changes, checked."""
    config = load_config(args.config, parse_cfg_options(args.cfg_options))
    name = Path(config.filename).stem if config.filename else 'run'
    config.work_dir = args.work_dir or config.get('work_dir') or str(Path('work_dirs') / name)
    config.launcher = args.launcher or config.get('launcher', 'none')
    if args.resume is not None:
        config.resume = args.resume
    if args.load_from is not None:
        config.load_from = args.load_from
    adopt_model(config)
    check_config(config)
    return config


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    args = parse_args(argv)
    runner = watch = made = None
    try:
        is_rehearsal = _is_rehearsal(args)
        config = resolve_config(args)
        if args.dry_run:
            print(dry_run(config))
            return 0
        if is_rehearsal:
            report = rehearse(config, args.rehearse, args.gpus_per_node or 8, args.rehearse_rank)
            if args.rehearse_json is not None:
                Path(args.rehearse_json).write_text(json.dumps(report, indent=1) + '\n')
            print(render(report))
            return 0
        launch = read_launch(config.launcher)  # a wrong one is found before anything is written
        made = MadeFolders(config.work_dir) if launch.rank == 0 else None
        runner = RUNNERS.build(config)
        dist_cfg = (config.get('env_cfg') or {}).get('dist_cfg') or {}
        watch = watch_ranks(
            lambda: getattr(runner._train_loop, 'iter', None), dist_cfg.get('timeout', 1800)
        )
        if watch is not None:
            outlive_errors()
        runner.train()
    except USER_ERRORS as error:
        started = runner is not None and getattr(runner, '_has_loaded', False)
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        message = f'{type(error).__name__}: {text}'
        if started:
            traceback.print_exc()
            print(message, file=sys.stderr, flush=True)
        else:
            if made is not None:
                made.take_back(getattr(runner, 'log_dir', None))
            tell_once(message)
        _ask_the_others(watch, error)
        return _leave(1 if started else MISTAKE_EXIT_CODE)
    except KeyboardInterrupt:
        print('interrupted: steps since the last checkpoint are lost', file=sys.stderr)
        return _leave(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        traceback.print_exc()
        _ask_the_others(watch, error)
        return _leave(1)
    if runner.train_loop.stopped_by_signal:
        ignore_stop_signals()  # launchers repeat them when the first process has left
        if runner.rank == 0:
            print(_how_to_go_on(runner), file=sys.stderr)
        return _leave(REQUEUE_EXIT_CODE)
    return _leave(0)


def _is_rehearsal(args: argparse.Namespace) -> bool:
    """Whether to rehearse.

    Raises:
        ValueError: If an option of rehearsals would do nothing, or one of runs.
    """
    if args.rehearse is None:
        for key in ('rehearse_rank', 'rehearse_json', 'gpus_per_node'):
            if getattr(args, key) is not None:
                raise ValueError(f'--{key.replace("_", "-")} needs --rehearse N')
        return False
    if args.dry_run:
        raise ValueError(
            f'--dry-run and --rehearse {args.rehearse}: give one of them; a rehearsal trains '
            'nothing either'
        )
    if args.launcher not in (None, 'none'):
        raise ValueError(
            f'--rehearse {args.rehearse} is one process on its own: leave out '
            f'--launcher {args.launcher}'
        )
    return True


def _ask_the_others(watch: LostRanks | None, error: Exception) -> None:
    """Say which rank is the cause, where it is another one."""
    if watch is None:
        return
    # Launchers end the others when the first has failed, before those could say why.
    ignore_stop_signals()
    message = watch.tell(error)
    if message is not None:
        print(message, file=sys.stderr, flush=True)


def _how_to_go_on(runner: Any) -> str:
    saved = Path(runner.work_dir) / f'iter_{runner.iter}'
    if not saved.is_dir():
        return 'stopped by a signal; nothing was saved, for want of a checkpoint hook'
    return f'stopped by a signal; saved {saved}, go on with --resume'


def _leave(code: int) -> int:
    """Leave a job of several processes at once; return the code in a process of its own.

    After an error nobody waits for ranks that may hang inside a collective: the launcher ends them
    when this one has left. After success all leave together, since launchers end the others when
    one has.
    """
    if not dist.is_initialized():
        return code
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
        return code
    if code in (0, REQUEUE_EXIT_CODE):
        dist.all_reduce(torch.zeros(1))
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of process groups that are torn down with the interpreter can abort the process.
    os._exit(code)
