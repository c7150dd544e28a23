"""Rows of training data as one HTML page, which needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from internlm_mm.datasets.browsing import (
    Piece,
    Sheet,
    ShownDocument,
    read_row,
    special_tokens,
    visible,
)
from internlm_mm.datasets.inspection import Report
from internlm_mm.datasets.survey import facts, packings, sheets
from internlm_mm.tokenizers import Tokenizer

MOST_PROBLEMS = 200

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1c1e21; --soft: #5f6670; --line: #d5d9df;
  --card: #f6f7f9; --learned: #0a6b2d; --learned-back: #d9f2e0; --special: #8a1a8f;
  --special-back: #f6e0f7; --bad: #a8071a; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --ink: #e4e6ea; --soft: #9aa2ad;
  --line: #363b43; --card: #1f2227; --learned: #8be0a4; --learned-back: #173b23;
  --special: #f0a6f4; --special-back: #432046; --bad: #ff8f8f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
dl { display: flex; flex-wrap: wrap; gap: .1rem 1.5rem; margin: 0; }
dt, dd { display: inline; margin: 0; overflow-wrap: anywhere; } dt { color: var(--soft); }
p { margin: .3rem 0; }
.sheets { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.sheet { max-width: 100%; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .1rem .6rem; text-align: right; }
td:first-child, th:first-child, td:last-child.bar { text-align: left; }
.bar { color: var(--soft); letter-spacing: -1px; }
.problems { color: var(--bad); overflow-wrap: anywhere; }
form { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .4rem 1rem;
  align-items: center; padding: .5rem 0; background: var(--page);
  border-bottom: 1px solid var(--line); }
input, select { font: inherit; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 4px; padding: .1rem .4rem; }
article { margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
article > header { padding: .3rem .7rem; color: var(--soft); }
.parts { display: flex; height: .5rem; }
.parts span { background: var(--soft); border-right: 1px solid var(--page); min-width: 1px; }
.parts .padding { background: repeating-linear-gradient(45deg, var(--line) 0 3px,
  var(--page) 3px 6px); }
section { border-top: 1px dashed var(--line); padding: .4rem .7rem; }
section header { color: var(--soft); font-size: .85rem; }
pre { margin: .2rem 0; font: 13px/1.6 ui-monospace, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
i { font-style: normal; border-radius: 2px; }
i.t { color: var(--learned); background: var(--learned-back); }
i.s { color: var(--special); background: var(--special-back); }
i.s.t { text-decoration: underline; background: var(--learned-back); }
i.n::before { content: '\\23ce'; opacity: .5; }
i:hover { outline: 2px solid var(--soft); }
.edges i { box-shadow: 0 0 0 1px var(--line); }
[hidden] { display: none !important; }
"""

_SCRIPT = """
const form = document.querySelector('form'), rows = [...document.querySelectorAll('article')];
function apply() {
  const { learned, domain, search, edges } = form.elements, text = search.value.toLowerCase();
  let shown = 0, all = 0;
  for (const row of rows) {
    const here = !domain.value || row.dataset.domain === domain.value;
    let some = false;
    for (const part of row.querySelectorAll('section')) {
      const fits = here && (!learned.checked || part.dataset.learned !== '0')
        && (!text || part.querySelector('pre').textContent.toLowerCase().includes(text));
      part.hidden = !fits; some ||= fits; shown += fits; all++;
    }
    row.hidden = !some;
  }
  document.body.classList.toggle('edges', edges.checked);
  document.querySelector('output').textContent = `${shown} of ${all} documents`;
}
form.addEventListener('input', apply);
form.addEventListener('submit', event => event.preventDefault());
form.hidden = false;
apply();
"""


@dataclass
class ShownRow:
    """A row on the page.

    Attributes:
        number: Its index in the dataset.
        domain: Its name; '' where there are none.
        documents: As `read_row` gives them.
    """

    number: int
    domain: str
    documents: Sequence[ShownDocument]


def shown_rows(
    dataset: Any, tokenizer: Tokenizer | None, first: int, count: int
) -> Iterator[ShownRow]:
    """Rows of a dataset as the model sees them.

    Args:
        dataset: Of packed rows.
        tokenizer: Of its tokens; without any they are shown as numbers.
        first: Index of the first row.
        count: How many.
    """
    special = special_tokens(tokenizer, getattr(dataset, 'template', None))
    for index in range(first, first + count):
        row = dataset[index]
        domain = '' if row.domain_ids is None else dataset.domains[int(row.domain_ids[0])]
        yield ShownRow(index, domain, read_row(row, tokenizer, special))


def check_page(file: Path) -> None:
    """Find out before data is read whether a page can be written.

    Args:
        file: What `--html` names.

    Raises:
        ValueError: If it is a folder, or in none.
    """
    if file.is_dir():
        raise ValueError(f'--html {file} is a folder: name a file in it')
    if not file.parent.is_dir():
        raise ValueError(f'--html {file}: there is no folder {file.parent}')


def dataset_page(
    config: str,
    part: str,
    dataset: Any,
    tokenizer: Tokenizer | None,
    rows: Sequence[ShownRow],
    report: Report | None = None,
    more: Sequence[Sheet] = (),
) -> str:
    """The page of a config's data.

    Args:
        config: Its name.
        part: Which of its loaders.
        dataset: What the loader reads; None for data that makes none, whose problems are shown.
        tokenizer: Of its tokens.
        rows: Those that are shown.
        report: What a check of it found.
        more: Other tables.
    """
    known = {'config': config, 'part': part}
    tables, lines = [*more], []
    if dataset is not None:
        known |= facts(dataset, tokenizer)
        tables += sheets(dataset)
        lines += packings(dataset)
    if report is not None:
        tables += [report.roles()] if report.messages else []
        lines += report.lines()
    return render_page(
        f'{config}: what the model sees',
        known,
        tables,
        rows,
        lines=lines,
        problems=[] if report is None else report.problems,
    )


def render_page(
    title: str,
    facts: Mapping[str, str],
    sheets: Sequence[Sheet],
    rows: Sequence[ShownRow],
    *,
    lines: Sequence[str] = (),
    problems: Sequence[str] = (),
) -> str:
    """The page; everything of the data is escaped.

    Args:
        title: Its heading.
        facts: What else there is to know about the data, by name.
        sheets: Small tables.
        rows: What the model sees.
        lines: Sentences under the tables.
        problems: What is wrong with the data; the first `MOST_PROBLEMS` are shown.
    """
    domains = sorted({row.domain for row in rows if row.domain})
    names = ''.join(f'<option>{_text(name)}</option>' for name in domains)
    known = ''.join(f'<div><dt>{_text(k)}</dt> <dd>{_text(v)}</dd></div>' for k, v in facts.items())
    said = ''.join(f'<p>{_text(line)}</p>\n' for line in lines)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{_text(title)}</h1>
<dl>{known}</dl>
{_problems(problems)}<div class="sheets">
{''.join(map(_sheet, sheets))}</div>
{said}<p>Colours: <i class="t">learned</i>, <i class="s">special</i>,
<i class="s t">special and learned</i>, context. A token tells its id and its text under the
pointer.</p>
<form hidden>
<label><input type="checkbox" name="learned"> only with losses</label>
<label>domain <select name="domain"><option value="">all</option>{names}</select></label>
<label>search <input type="search" name="search"></label>
<label><input type="checkbox" name="edges"> borders of tokens</label>
<output></output>
</form>
{''.join(map(_row, rows))}<script>{_SCRIPT}</script>
</body>
</html>
"""


def _text(text: str) -> str:
    return escape(visible(text))


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return ''
    shown = ''.join(f'<li>{_text(problem)}</li>\n' for problem in problems[:MOST_PROBLEMS])
    more = len(problems) - MOST_PROBLEMS
    rest = f'<p>and {more:,} more</p>\n' if more > 0 else ''
    return f'<h2>{len(problems):,} problems</h2>\n<ul class="problems">\n{shown}</ul>\n{rest}'


def _sheet(sheet: Sheet) -> str:
    heads = ''.join(f'<th>{_text(column)}</th>' for column in sheet.columns)
    kinds = ['' if column else ' class="bar"' for column in sheet.columns]
    body = ''.join(
        '<tr>'
        + ''.join(f'<td{kind}>{_text(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))
        + '</tr>\n'
        for row in sheet.rows
    )
    return (
        f'<div class="sheet"><h2>{_text(sheet.title)}</h2>\n'
        f'<table><tr>{heads}</tr>\n{body}</table></div>\n'
    )


def _row(row: ShownRow) -> str:
    whole = [document for document in row.documents if not document.is_padding]
    padding = sum(document.num_tokens for document in row.documents if document.is_padding)
    learned = sum(document.num_learned for document in whole)
    total = sum(document.num_tokens for document in row.documents)
    domain = f', {_text(row.domain)}' if row.domain else ''
    parts = ''.join(
        f'<span{" class=padding" if document.is_padding else ""} '
        f'style="flex:{document.num_tokens}" title="{_text(document.caption)}"></span>'
        for document in row.documents
    )
    return (
        f'<article data-domain="{_text(row.domain)}"><header>row {row.number}{domain}: '
        f'{len(whole)} documents, {learned} of {total} tokens learned, {padding} padding</header>\n'
        f'<div class="parts">{parts}</div>\n{"".join(map(_document, whole))}</article>\n'
    )


def _document(document: ShownDocument) -> str:
    # The parser drops a line break that follows <pre>.
    pieces = ''.join(map(_piece, document.pieces))
    return (
        f'<section data-learned="{document.num_learned}"><header>{_text(document.caption)}</header>'
        f'\n<pre>\n{pieces}</pre></section>\n'
    )


def _piece(piece: Piece) -> str:
    is_break = not piece.text.strip('\n')  # which would leave nothing to point at
    kinds = ' '.join(['s'] * piece.special + ['t'] * piece.learned + ['n'] * is_break)
    kind = f' class="{kinds}"' if kinds else ''
    ids = ' '.join(map(str, piece.ids))
    return f'<i{kind} title="{_text(f"{ids}: {piece.text!r}")}">{_text(piece.text)}</i>'
