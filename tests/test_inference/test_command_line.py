"""Texts and commands, without anybody who types."""

import pytest

from internlm_mm.inference.command_line import CommandLine, stands_alone


class Heard(CommandLine):
    def __init__(self, *lines):
        self.heard = []
        rest = iter(lines)

        def read(prompt):
            line = next(rest, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        super().__init__('Hello.', read)

    def say(self, text):
        if text == 'bad':
            raise ValueError('no good')
        self.heard.append(text)

    def _do_note(self, rest):
        """/note TEXT: keep it."""
        self.heard.append(('note', rest))


class More(Heard):
    def _do_more(self, rest):
        """/more: says so."""
        stands_alone(rest, '/more')
        self.heard.append('more')


def test_texts_and_commands(capsys):
    line = More('a', '', 'b\\', 'c', '"""', 'd', '/note x', '"""', '/note  y z ', '//x', '/more')
    line.run()
    assert line.heard == ['a', 'b\nc', 'd\n/note x', ('note', 'y z'), '/x', 'more']
    printed = capsys.readouterr()
    assert printed.out.startswith('Hello. /help lists commands') and printed.err == ''


def test_commands_of_a_subclass_and_of_its_bases_are_listed(capsys):
    More('/help', '/exit', 'never').run()
    listed = [line.split(':')[0] for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert listed == ['/more', '/note TEXT', '/help', '/exit']


@pytest.mark.parametrize(
    ('text', 'error'),
    [
        ('bad', 'no good'),
        ('/nothing', "there is no command /nothing. Did you mean 'note'?"),
        ('/note', ''),
        ('/more x', '/more stands alone'),
        ('/exit x', '/exit stands alone'),
        ('/help x', '/help stands alone'),
    ],
)
def test_what_is_wrong_is_said_and_the_next_line_is_read(text, error, capsys):
    line = More(text, 'on')
    line.run()
    assert line.heard[-1] == 'on'
    assert capsys.readouterr().err.startswith(f'error: {error}' if error else '')


def test_ctrl_c_twice_leaves(capsys):
    line = Heard(KeyboardInterrupt(), 'a', KeyboardInterrupt(), KeyboardInterrupt(), 'never')
    line.run()
    assert line.heard == ['a']
    assert 'Ctrl-C once more' in capsys.readouterr().out
