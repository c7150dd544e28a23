"""The page: nothing of the data is markup, nothing is fetched, filters filter."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from internlm_mm.datasets.browsing import Piece, Sheet, ShownDocument
from internlm_mm.datasets.browsing_page import MOST_PROBLEMS, ShownRow, render_page
from tests import webdriver

EVIL = (
    '<script>document.title = "gotcha"</script></pre></script><img src=x onerror=alert(1)>&amp;"\''
)


class Outline(HTMLParser):
    """Tags, attributes of tokens, and the text inside <pre>, as a browser's parser would have."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == 'pre':
            self._inside = True
            self.texts.append('')
        if tag == 'i' and self._inside:
            self.tokens.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != 'pre'

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def document(*texts: str, learned: bool = True) -> ShownDocument:
    pieces = [Piece((number,), text, learned, False) for number, text in enumerate(texts)]
    return ShownDocument(pieces, len(texts), len(texts) * learned)


def page_of(*documents: ShownDocument, domain: str = 'd', **options) -> str:
    return render_page('t', {}, [], [ShownRow(0, domain, documents)], **options)


ordinary = some.text(some.characters(exclude_categories=['Cs', 'Cc']), max_size=8)


@given(some.lists(some.one_of(ordinary, some.just(EVIL), some.just('\n')), min_size=1, max_size=6))
def test_texts_come_back_and_are_no_markup(texts: list[str]) -> None:
    tame, wild = page_of(document(*'a' * len(texts))), page_of(document(*texts))
    outline = Outline(wild)
    assert outline.tags == Outline(tame).tags
    assert outline.texts == ['\n' + ''.join(texts)]  # browsers drop a break behind <pre>
    titles = [token['title'] for token in outline.tokens]
    assert titles == [f'{number}: {text!r}' for number, text in enumerate(texts)]


def test_everything_else_of_the_data_is_escaped_too() -> None:
    page = render_page(
        EVIL,
        {EVIL: EVIL},
        [Sheet(EVIL, (EVIL, ''), [(EVIL, EVIL)])],
        [ShownRow(0, EVIL, [ShownDocument([], 3, 0, title=EVIL)])],
        lines=[EVIL],
        problems=[EVIL],
    )
    assert '<img' not in page and page.count('<script>') == 1 and page.count('</script>') == 1


def test_nothing_is_fetched() -> None:
    page = page_of(document('a'))
    assert "default-src 'none'" in page
    assert not re.search(r'https?:|\bsrc=|\bhref=|url\(|@import', page)
    assert 'prefers-color-scheme: dark' in page and 'color-scheme: light dark' in page


def test_kinds_of_tokens_and_borders_of_documents() -> None:
    pieces = [
        Piece((1,), '<bos>', False, True),
        Piece((5,), 'ask', False, False),
        Piece((6, 7), '书', True, False),
        Piece((8,), '<eoa>', True, True),
        Piece((9,), '\n', False, False),
    ]
    page = page_of(
        ShownDocument(pieces, 6, 3, title='chosen'), ShownDocument([], 4, 0, is_padding=True)
    )
    outline = Outline(page)
    assert [token.get('class') for token in outline.tokens] == ['s', None, 't', 's t', 'n']
    assert [token['title'] for token in outline.tokens][2:4] == ["6 7: '书'", "8: '<eoa>'"]
    assert 'row 0, d: 1 documents, 3 of 10 tokens learned, 4 padding' in page
    assert '<header>chosen: 6 tokens, 3 learned</header>' in page
    assert '<span class=padding style="flex:4" title="4 tokens of padding"></span>' in page


def test_problems_are_shown_first_and_not_without_end() -> None:
    page = page_of(document('a'), problems=[f'c:{n}' for n in range(MOST_PROBLEMS + 3)])
    assert f'{MOST_PROBLEMS + 3} problems' in page and '<p>and 3 more</p>' in page
    assert f'c:{MOST_PROBLEMS - 1}<' in page and f'c:{MOST_PROBLEMS}<' not in page
    assert 'class="problems"' not in page_of(document('a'))


@pytest.mark.slow
@pytest.mark.skipif(webdriver.missing() is not None, reason=str(webdriver.missing()))
def test_filters_in_a_browser(tmp_path: Path) -> None:
    rows = [
        ShownRow(0, 'code', [document('def', ' f', '\n'), document('muted', learned=False)]),
        ShownRow(1, 'chat', [document('Hello ', EVIL)]),
    ]
    (tmp_path / 'page.html').write_text(render_page('t', {}, [], rows), encoding='utf-8')
    with webdriver.browser(tmp_path) as browser:
        browser.open((tmp_path / 'page.html').as_uri())
        shown = "return [...document.querySelectorAll('section')].map(e => e.offsetParent !== null)"
        assert browser.run(shown) == [True, True, True]
        assert browser.run('return document.title') == 't'
        assert browser.run("return document.querySelectorAll('pre img, pre script').length") == 0
        texts = browser.run("return [...document.querySelectorAll('pre')].map(e => e.textContent)")
        assert texts == ['def f\n', 'muted', 'Hello ' + EVIL]
        change = (
            'const f = document.forms[0].elements; Object.assign(f[arguments[0]], arguments[1]);'
            "f[arguments[0]].dispatchEvent(new Event('input', {bubbles: true}));"
        )
        browser.run(change, 'learned', {'checked': True})
        assert browser.run(shown) == [True, False, True]
        browser.run(change, 'domain', {'value': 'code'})
        assert browser.run(shown) == [True, False, False]
        browser.run(change, 'domain', {'value': ''})
        browser.run(change, 'search', {'value': 'ALERT'})
        assert browser.run(shown) == [False, False, True]
        assert browser.run("return document.querySelector('output').value") == '1 of 3 documents'
