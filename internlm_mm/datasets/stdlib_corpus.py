"""Real text that every machine with Python has: the source of its standard library."""

from __future__ import annotations

import json
import shutil
import sysconfig
import tempfile
import tokenize
from pathlib import Path

from internlm_mm.datasets.documents import fraction_of
from internlm_mm.utils.publish import publish

DOMAINS = {
    'tests': ('test', 'tests', 'idle_test', 'lib2to3'),
    'network': ('email', 'http', 'urllib', 'xml', 'xmlrpc', 'wsgiref', 'html', 'json', 'socket.py')
    + (
        'socketserver.py',
        'ssl.py',
        'ftplib.py',
        'smtplib.py',
        'imaplib.py',
        'poplib.py',
        'nntplib.py',
    ),
    'concurrency': ('asyncio', 'concurrent', 'multiprocessing', 'threading.py', 'subprocess.py')
    + (
        'queue.py',
        'selectors.py',
        'sched.py',
        'asyncore.py',
        'asynchat.py',
        'contextlib.py',
        'signal.py',
    ),
}
"""First folder, or file, of the library -> domain; what is not listed is `library`."""

_SKIPPED = {'site-packages', 'dist-packages', '__pycache__', 'lib-dynload'}


def write_stdlib_corpus(
    output: str | Path,
    *,
    max_megabytes: float = 10,
    validation_fraction: float = 0.05,
    source: str | Path | None = None,
) -> dict[str, dict[str, int]]:
    """Write `OUTPUT/train/DOMAIN.jsonl` and `OUTPUT/validation/DOMAIN.jsonl`, a record a file.

    Domains are `library`, `concurrency`, `network` and `tests` (where the system installs them).
    Files are taken in the order of a hash of their names until each domain has its share, so the
    same library gives the same corpus everywhere; held-out files are chosen by the same hash.

    Args:
        output: The folder to make; one that this function made before is replaced.
        max_megabytes: Text to take, in 10^6 characters. Domains get equal shares; what a small one
            leaves over goes to the others.
        validation_fraction: Share of the files held out.
        source: The library's folder; by default that of the running interpreter.

    Returns:
        Files, by split and domain.

    Raises:
        FileExistsError: If `output` holds something else.
        ValueError: If there is no Python file in the library's folder.
    """
    output = Path(output)
    if output.exists() and {path.name for path in output.iterdir()} - {'train', 'validation'}:
        raise FileExistsError(f'output {output} holds other files, so it is not replaced')
    root = Path(source or sysconfig.get_path('stdlib'))
    texts = _read(root)
    if not texts:
        raise ValueError(f'the standard library at {root} has no source files')
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f'.{output.name}.', suffix='.partial', dir=output.parent))
    folder.chmod(0o755)
    counts: dict[str, dict[str, int]] = {'train': {}, 'validation': {}}
    try:
        shares = _shares({d: sum(map(len, t.values())) for d, t in texts.items()}, max_megabytes)
        for domain, files in texts.items():
            chosen = _choose(files, shares[domain])
            parts = _split(chosen, validation_fraction)
            for split, names in parts.items():
                counts[split][domain] = len(names)
                if names:
                    _write(folder / split / f'{domain}.jsonl', {n: files[n] for n in names})
        publish(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts


def _read(root: Path) -> dict[str, dict[str, str]]:
    """Source by domain and name of the file."""
    texts: dict[str, dict[str, str]] = {}
    for path in sorted(root.rglob('*.py')):
        parts = path.relative_to(root).parts
        if _SKIPPED.intersection(parts):
            continue
        try:
            with tokenize.open(path) as file:  # the encoding that the file declares
                text = file.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue  # some test data is broken on purpose
        if text.strip():
            texts.setdefault(_domain_of(parts), {})['/'.join(parts)] = text
    return dict(sorted(texts.items()))


def _domain_of(parts: tuple[str, ...]) -> str:
    if set(parts[:-1]).intersection(DOMAINS['tests']):
        return 'tests'
    for domain, names in DOMAINS.items():
        if parts[0] in names:
            return domain
    return 'library'


def _shares(sizes: dict[str, int], max_megabytes: float) -> dict[str, int]:
    """Characters for each domain: equal, but none gets more than it has."""
    left, shares = int(max_megabytes * 1e6), {}
    for count, domain in enumerate(sorted(sizes, key=lambda d: sizes[d])):
        shares[domain] = min(sizes[domain], left // (len(sizes) - count))
        left -= shares[domain]
    return shares


def _choose(files: dict[str, str], share: int) -> list[str]:
    chosen = []
    for name in sorted(files, key=lambda name: fraction_of(name, 'stdlib order')):
        if len(files[name]) <= share:
            chosen.append(name)
            share -= len(files[name])
    return sorted(chosen)


def _split(names: list[str], validation_fraction: float) -> dict[str, list[str]]:
    held_out = [name for name in names if fraction_of(name, 'stdlib') < validation_fraction]
    if validation_fraction and not held_out and len(names) > 1:
        held_out = [min(names, key=lambda name: fraction_of(name, 'stdlib'))]
    return {'train': [n for n in names if n not in held_out], 'validation': held_out}


def _write(path: Path, texts: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', encoding='utf-8') as file:
        for name, text in texts.items():
            file.write(json.dumps({'text': text, 'file': name}, ensure_ascii=False) + '\n')
