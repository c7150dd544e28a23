"""What a misspelt option is answered with."""

import pytest

from internlm_mm.utils.arguments import Arguments


@pytest.fixture
def parser() -> Arguments:
    parser = Arguments(prog='x')
    parser.add_argument('config')
    parser.add_argument('--dry-run', action='store_true')
    parser.add_argument('--rows', type=int, default=2)
    commands = parser.add_subparsers(dest='command')
    commands.add_parser('make').add_argument('--folder')
    return parser


def test_what_is_known_is_read(parser: Arguments) -> None:
    found = parser.parse_args(['a.py', '--rows', '3', '--dry'])  # argparse takes beginnings
    assert vars(found) == {'config': 'a.py', 'dry_run': True, 'rows': 3, 'command': None}
    assert parser.parse_args(['a.py', 'make', '--folder', 'x']).folder == 'x'


@pytest.mark.parametrize(
    ('argv', 'message'),
    [
        (['a.py', '--dri-run'], "arguments: --dri-run. Did you mean '--dry-run'?\n"),
        (['a.py', '--rosw=3'], "arguments: --rosw=3. Did you mean '--rows'?\n"),
        (['a.py', 'make', '--foldre', 'x'], "--foldre x. Did you mean '--folder'?\n"),
        (['a.py', '--zzzz'], 'arguments: --zzzz\n'),
        (['a.py', 'make', 'dry-run'], 'arguments: dry-run\n'),
        (['a.py', 'make', '-1'], 'arguments: -1\n'),
        (['a.py', '--rows', 'x'], "argument --rows: invalid int value: 'x'\n"),
    ],
)
def test_what_is_not_comes_with_the_nearest(
    parser: Arguments, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parser.parse_args(argv)
    assert left.value.code == 2
    assert capsys.readouterr().err.endswith(message)
