"""Measure the data path and checkpoints: tokenising, opening a large corpus, loading, saving."""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from internlm_mm.datasets.documents import read_documents
from internlm_mm.datasets.stdlib_corpus import write_stdlib_corpus
from internlm_mm.engine.benchmark_data import (
    DOCUMENT_LENGTH,
    PARTS,
    SEQ_LEN,
    check_room,
    judge,
    measure_data,
    render_data,
)
from internlm_mm.engine.benchmark_report import check_records, save_record
from internlm_mm.engine.train_cli import MISTAKE_EXIT_CODE
from internlm_mm.tokenizers.load import load_tokenizer
from internlm_mm.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm_mm.tokenizers.training import train_tokenizer
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.folders import why_not_writable
from internlm_mm.utils.suggest import nearest_path


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = Arguments(
        prog='benchmark_data.py',
        description=__doc__,
        epilog='Exit code 1: a target is missed; 2: a mistake in what was asked.',
    )
    parser.add_argument(
        '--texts',
        type=Path,
        nargs='+',
        help="files to tokenise; by default the standard library's own source",
    )
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS, help='to measure; all')
    parser.add_argument('--tokenizer', type=Path, help='SentencePiece model; trained by default')
    parser.add_argument('--folder', type=Path, help='on the disk to measure; a temporary one')
    parser.add_argument('--turns', type=int, default=5, help='of every comparison')
    parser.add_argument('--files', type=int, default=10_000, help='of the corpus that is opened')
    parser.add_argument('--tokens-per-file', type=int, default=100_000_000)
    parser.add_argument('--megabytes', type=int, default=1000, help='of the checkpoint')
    parser.add_argument('--seconds', type=float, default=5.0, help='of loading')
    parser.add_argument('--json', action='store_true', help='one line of JSON instead of text')
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        '--records', type=Path, default=Path('work_dirs/benchmarks'), metavar='DIR',
        help='folder in which every run is kept as a JSON file (work_dirs/benchmarks)',
    )  # fmt: skip
    kept.add_argument('--no-records', action='store_true', help='keep nothing')
    return parser.parse_args(argv)


def check_options(args: argparse.Namespace) -> None:
    """Refuse what could not be measured or kept, before any time is spent.

    Raises:
        ValueError: Naming the option and its value; OSError likewise.
    """
    for option in ('turns', 'files', 'megabytes', 'tokens_per_file'):
        value, step = getattr(args, option), DOCUMENT_LENGTH if option == 'tokens_per_file' else 1
        if value < step or value % step:
            kind = f'a multiple of {step:,}, ' if step > 1 else ''
            name = option.replace('_', '-')
            raise ValueError(f'--{name} {value}: must be {kind}at least {step:,}')
    if args.files * args.tokens_per_file < SEQ_LEN:
        raise ValueError(
            f'--files {args.files} --tokens-per-file {args.tokens_per_file}: together they need '
            f'{SEQ_LEN:,} tokens, which is one row'
        )
    if not 0 < args.seconds < float('inf'):
        raise ValueError(f'--seconds {args.seconds:g}: must be more than 0, and end')
    if args.folder is not None:
        check_writable(args.folder, '--folder')
    if 'saving' in args.parts:
        check_room(args.folder or Path(tempfile.gettempdir()), args.megabytes)
    if not args.no_records:
        check_records(args.records)
    for path in args.texts or []:
        with names('--texts'):
            if next(read_documents(path), None) is None:
                raise ValueError(f'{path} has no text')
    if args.tokenizer is not None:
        with names('--tokenizer'):
            if not isinstance(load_tokenizer(args.tokenizer), SentencePieceTokenizer):
                raise ValueError(f'{args.tokenizer} is no SentencePiece model, as it has to be')


@contextmanager
def names(option: str) -> Iterator[None]:
    """Let what is wrong with a file begin with the option that names it."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f'{option}: {error}') from error


def check_writable(folder: Path, option: str) -> None:
    """Raise an OSError if a folder is missing, or nothing can be written into it."""
    if not folder.exists():
        raise FileNotFoundError(f'{option} {folder}: no such folder{nearest_path(folder)}')
    if not folder.is_dir():
        raise NotADirectoryError(f'{option} {folder}: is no folder')
    reason = why_not_writable(folder)
    if reason is not None:
        raise PermissionError(f'{option} {folder}: cannot be written: {reason}')


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    """Make what is not given, and measure what is asked for."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        texts = args.texts or []
        if not texts and 'tokens' in args.parts:
            write_stdlib_corpus(folder / 'texts', validation_fraction=0)
            texts = sorted((folder / 'texts').rglob('*.jsonl'))
        tokenizer = args.tokenizer
        if tokenizer is None and 'tokens' in args.parts:
            tokenizer = folder / 'tokenizer'
            documents = (document.text for path in texts for document in read_documents(path))
            train_tokenizer(documents, tokenizer, vocab_size=2048)
        return measure_data(
            texts,
            tokenizer,
            folder,
            turns=args.turns,
            files=args.files,
            tokens_per_file=args.tokens_per_file,
            megabytes=args.megabytes,
            seconds=args.seconds,
            parts=args.parts,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 1 if a target is missed, 2 after a mistake."""
    args = parse_args(argv)
    try:
        check_options(args)
        report = measure_all(args)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return MISTAKE_EXIT_CODE
    report['command'] = ['tools/benchmark_data.py', *(sys.argv[1:] if argv is None else argv)]
    print(json.dumps(report) if args.json else render_data(report))
    if not args.no_records:
        path = save_record(args.records, report, 'data')
        print(f'kept in {path}', file=sys.stderr)
    return 0 if all(met for _, _, met in judge(report)) else 1


if __name__ == '__main__':
    sys.exit(main())
