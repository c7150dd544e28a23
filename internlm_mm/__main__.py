"""`python -m internlm_mm COMMAND ...`: the programs of `tools/`, from any folder."""

import ast
import importlib.util
import sys
from pathlib import Path

from internlm_mm.utils.launch import guess_launch
from internlm_mm.utils.suggest import did_you_mean


def tools_folder() -> Path:
    """Where the programs are: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / 'tools'
    return inside if inside.is_dir() else package.parent / 'tools'


def commands() -> dict[str, str]:
    """First line of the docstring of every program, by its name."""
    found = {}
    for file in sorted(tools_folder().glob('*.py')):
        tree = ast.parse(file.read_text(encoding='utf-8'))
        if any(_binds_main(node) for node in tree.body):
            found[file.stem] = (ast.get_docstring(tree) or '').partition('\n')[0]
    return found


def _binds_main(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return any(alias.name == 'main' for alias in node.names)
    return isinstance(node, ast.FunctionDef) and node.name == 'main'


def main(argv: list[str] | None = None) -> int:
    """Run the command that the first argument names with the rest; its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    known = commands()
    if not argv or argv[0] in ('-h', '--help'):
        width = max(map(len, known))
        print('python -m internlm_mm COMMAND [arguments]; COMMAND --help tells more\n')
        for name, line in known.items():
            print(f'  {name:{width}}  {line}')
        return 0
    name = argv[0].removesuffix('.py')
    if name not in known:
        _tell(f'error: no command {argv[0]!r}.{did_you_mean(name, known)}')
        return 2
    folder = tools_folder()
    spec = importlib.util.spec_from_file_location(f'internlm_mm_{name}', folder / f'{name}.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what it starts with `spawn` finds it by this name
    sys.path.append(str(folder))  # last, or tools/test.py would hide the standard library's
    spec.loader.exec_module(module)
    return module.main(argv[1:]) or 0


def _tell(message: str) -> None:
    """Print what is wrong, once if a launcher has started several processes."""
    if guess_launch()[0].world_size == 1:
        print(message, file=sys.stderr)
        return
    from internlm_mm.engine.last_words import tell_once

    tell_once(message)


if __name__ == '__main__':
    sys.exit(main())
