"""From nothing to a trained, exported and proven model: `make demo`.

Takes real text that every machine has, the source of Python's own standard library, and does with
it what one does with a corpus of any size. Nothing is downloaded. Every step prints the command
that does it alone.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from internlm_mm.api import Sampling, from_pretrained
from internlm_mm.checkpoint.pretrained import convert_to_hf
from internlm_mm.checkpoint.step_folders import find_checkpoint, list_checkpoints
from internlm_mm.datasets.documents import read_documents
from internlm_mm.datasets.preprocessing import preprocess
from internlm_mm.datasets.stdlib_corpus import write_stdlib_corpus
from internlm_mm.engine.runner import LLMRunner
from internlm_mm.tokenizers.training import train_tokenizer
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.config import load_config, parse_cfg_options
from internlm_mm.utils.config_check import check_config
from internlm_mm.utils.curves import draw_curves, read_run

DATA = Path('data/python_stdlib')
PROMPT = 'def __init__(self, '
PYTHON = '.venv/bin/python' if Path('.venv/bin/python').is_file() else 'python'


def program(name: str, arguments: str) -> str:
    """A command that runs one of our programs from any folder."""
    return f'{PYTHON} -m internlm_mm {name} {arguments}'


def say(title: str, command: str = '') -> None:
    """Announce a step, with the command that does it alone."""
    print(f'\n== {title}' + (f'\n   {command}' if command else ''), flush=True)


def step(title: str, command: str, made: Path, make: Callable[[], Any]) -> None:
    """Do a step of the set-up unless what it makes is there already."""
    say(title, command)
    start = time.perf_counter()
    if made.exists():
        print(f'   {made} is there from an earlier run')
        return
    make()
    print(f'   {made}, {time.perf_counter() - start:.1f} s')


def texts_of(folder: Path) -> Iterator[str]:
    """Every document of a folder of JSON lines."""
    for file in sorted(folder.glob('*.jsonl')):
        for document in read_documents(file):
            yield document.text


def set_up(vocab_size: int) -> None:
    """Corpus, tokenizer and tokens."""
    text, tokenizer, tokens = DATA / 'text', DATA / 'tokenizer', DATA / 'tokens'
    step(
        'Corpus: the standard library of this Python, with held-out files',
        f'{PYTHON} -c "from internlm_mm.datasets.stdlib_corpus import write_stdlib_corpus; '
        f"write_stdlib_corpus('{text}')\"",
        text,
        lambda: write_stdlib_corpus(text),
    )
    step(
        'Tokenizer: byte-pair encoding learned from the training text',
        program(
            'train_tokenizer',
            f'{text / "train"} --output {tokenizer} --vocab-size {vocab_size}',
        ),
        tokenizer,
        lambda: train_tokenizer(texts_of(text / 'train'), tokenizer, vocab_size=vocab_size),
    )
    step(
        'Tokens: memory-mapped files, a folder for each domain',
        program(
            'preprocess_data',
            f'{text / "train"} --output {tokens} --tokenizer {tokenizer} '
            f'--validation-inputs {text / "validation"}',
        ),
        tokens,
        lambda: preprocess(
            [text / 'train'], tokens, tokenizer=tokenizer, validation_inputs=[text / 'validation']
        ),
    )


def train(config: Any, work_dir: Path) -> None:
    """Pre-train, or go on where an interrupted demo stopped."""
    say(
        'Pre-training',
        program('train', f'{Path(config.filename).stem} --work-dir {work_dir}'),
    )
    config.work_dir = str(work_dir)
    config.resume = bool(list_checkpoints(work_dir))
    check_config(config)
    runner = LLMRunner.from_cfg(config)
    runner.train()
    if runner.train_loop.stopped_by_signal:
        sys.exit('stopped after saving; make demo goes on from the checkpoint')


def summarise(work_dir: Path) -> dict[str, float]:
    """Held-out losses before and after, and mean speed, from the run's log."""
    run = read_run(work_dir)
    losses = run.series('val/loss')
    return {
        'tokens_per_second': round(run.mean_speed(), 1),
        'validation_loss_before': losses[min(losses)],
        'validation_loss_after': losses[max(losses)],
    }


def report(work_dir: Path) -> None:
    """Perplexity of each domain before and after."""
    run = read_run(work_dir)
    say('Held-out perplexity, before and after', program('test', str(work_dir)))
    for key in sorted(run.keys()):
        if key.startswith('val/perplexity'):
            values = run.series(key)
            name = key.removeprefix('val/perplexity').strip('/') or 'all'
            print(f'   {name:<12} {values[min(values)]:>10,.1f}  ->  {values[max(values)]:>8,.2f}')


def export(checkpoint: Path, folder: Path) -> float:
    """Export to Hugging Face and compare logits. Returns the largest difference."""
    say(
        'Export to Hugging Face, proven by logits in both stacks',
        program('convert2hf', f'{checkpoint} {folder} --dtype float32'),
    )
    difference = convert_to_hf(checkpoint, folder, dtype='float32', overwrite=True)
    print(f'   {folder}, largest difference of a logit {difference:.1e}')
    return difference


def complete(folder: Path, prompt: str) -> None:
    """Let the exported model go on with a prompt."""
    say('Completion by the exported model', program('chat', f'{folder} --prompt {prompt!r}'))
    generator = from_pretrained(folder)
    answer = generator.generate([prompt], Sampling(max_new_tokens=60, temperature=0.7, seed=1))[0]
    print('   ' + (prompt + answer).replace('\n', '\n   '))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo. The last line of stdout is JSON."""
    parser = Arguments(prog='demo.py', description=__doc__)
    parser.add_argument('--config', default='internlm_tiny_pretrain', help='config to train')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/demo'))
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    args = parser.parse_args(argv)
    start = time.perf_counter()
    config = load_config(args.config, parse_cfg_options(args.cfg_options))
    set_up(config.model.vocab_size)
    train(config, args.work_dir)
    report(args.work_dir)
    curve = args.work_dir / 'loss.png'
    say('Loss curve', program('analyze_logs', f'{args.work_dir} --keys loss --out {curve}'))
    draw_curves([args.work_dir], ['loss', 'val/loss'], curve)
    print(f'   {curve}')
    checkpoint, folder = find_checkpoint(args.work_dir), args.work_dir / 'hf'
    difference = export(checkpoint, folder)
    complete(folder, PROMPT)
    result = summarise(args.work_dir) | {
        'hf_folder': str(folder),
        'logits_max_difference': difference,
        'seconds': round(time.perf_counter() - start, 1),
    }
    say('Where everything is')
    print(f'   data, tokenizer        {DATA}')
    print(f'   checkpoints, logs      {args.work_dir}')
    print(f'   Hugging Face folder    {folder}')
    print(f'   curves in a browser    tensorboard --logdir {args.work_dir}')
    say('What to try next')
    for purpose, command in (
        ('chat with it', program('chat', str(folder))),
        (
            'train longer',
            program('train', 'internlm_tiny_pretrain --cfg-options train_cfg.max_iters=2000'),
        ),
        ('plan a 7B run', program('train', 'internlm_7b_speed --dry-run')),
        ('measure this machine', program('benchmark', 'internlm_tiny_pretrain')),
        ('train on your text', 'the page docs/en/pretrain.md'),
        ('your own model, hook or data', 'the page docs/en/plugins.md'),
    ):
        print(f'   {purpose:<30} {command}')
    print(json.dumps(result), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
