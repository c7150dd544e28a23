from internlm_mm.utils.progress import byte_bar


def test_shows_how_far(capsys):
    with byte_bar('writing', 4000, shown=True) as advance:
        advance(1000)
        advance(3000)
    error = capsys.readouterr().err
    assert 'writing' in error and '4.0/4.0 kB' in error


def test_not_shown(capsys):
    with byte_bar('writing', 4000, shown=False) as advance:
        advance(4000)
    assert capsys.readouterr().err == ''
