"""Finds an installation that cannot work before it fails in some obscure place."""

from importlib.metadata import PackageNotFoundError, version

FIX = "pip uninstall -y mmengine mmengine-lite && pip install 'mmengine-lite>=0.10.7,<0.12'"


def check_mmengine() -> None:
    """Refuse `mmengine` beside `mmengine-lite`: they own the same files and overwrite each other.

    Raises:
        ImportError: If both are installed; says what to type.
    """
    found = []
    for name in ('mmengine', 'mmengine-lite'):
        try:
            found.append(f'{name} {version(name)}')
        except PackageNotFoundError:
            continue
    if len(found) > 1:
        raise ImportError(
            f'{" and ".join(found)} are both installed and overwrite each other. '
            f'Fix it with:\n  {FIX}'
        )
