"""Measure the data path and checkpoints: tokenising, opening a large corpus, loading, saving."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from internlm_mm.datasets.documents import read_documents
from internlm_mm.datasets.stdlib_corpus import write_stdlib_corpus
from internlm_mm.engine.benchmark_data import PARTS, judge, measure_data, render_data
from internlm_mm.engine.benchmark_report import save_record
from internlm_mm.tokenizers.training import train_tokenizer
from internlm_mm.utils.arguments import Arguments


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command."""
    parser = Arguments(
        prog='benchmark_data.py', description=__doc__, epilog='Exit code 1: a target is missed.'
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
    parser.add_argument(
        '--records', type=Path, default=Path('work_dirs/benchmarks'), metavar='DIR',
        help='folder in which every run is kept as a JSON file (work_dirs/benchmarks)',
    )  # fmt: skip
    parser.add_argument('--no-records', action='store_true', help='keep nothing')
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = parse_args(argv)
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
        report = measure_data(
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
    report['command'] = ['tools/benchmark_data.py', *(sys.argv[1:] if argv is None else argv)]
    print(json.dumps(report) if args.json else render_data(report))
    if not args.no_records:
        path = save_record(args.records, report, 'data')
        print(f'kept in {path}', file=sys.stderr)
    return 0 if all(met for _, _, met in judge(report)) else 1


if __name__ == '__main__':
    sys.exit(main())
