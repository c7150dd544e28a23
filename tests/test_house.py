"""The house rules that a machine can check: who may import whom, no hidden inputs, sizes, mirrors.

The rules are explained in docs/en/architecture.md.
"""

import ast
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
ROOT = REPOSITORY / 'internlm_mm'

# What a package may import of ours besides itself and COMMON. What is not listed is refused.
COMMON = {'registry', 'structures', 'utils', 'version'}
MAY_IMPORT: dict[str, set[str]] = {
    'registry': set(),
    'structures': set(),
    'version': set(),
    'utils': {'registry'},  # to check a config against what is registered
    'tokenizers': set(),
    'sandbox': set(),
    'ops': set(),
    'models': {'ops'},
    'datasets': {'tokenizers'},
    'parallel': {'ops'},
    'optim': set(),
    'planner': set(),
    'checkpoint': {'tokenizers'},
    'evaluation': {
        *('tokenizers', 'agents', 'datasets', 'inference', 'sandbox'),  # rows; texts; programs
    },
    'inference': {'tokenizers', 'checkpoint'},
    'agents': {'tokenizers', 'sandbox'},
    'engine': {
        *('datasets', 'optim', 'parallel', 'checkpoint', 'evaluation', 'inference', 'planner'),
    },
    'doctor': {'ops', 'parallel'},
    'api': {'checkpoint', 'engine', 'inference'},
    'verify': {'engine', 'datasets', 'parallel', 'optim', 'checkpoint'},
    '__main__': {'engine'},
}

# Distributions that are no requirement and are therefore imported where they are used.
OPTIONAL = {
    'bitsandbytes',
    'flash_attn',
    'flash_attn_interface',
    'gguf',
    'liger_kernel',
    'pyarrow',
    'torchao',
    'torchdata',
    'triton',
}

# Requirements that take seconds to import, and that most runs never need.
SLOW = {'matplotlib', 'sentencepiece', 'transformers'}

# What of ours is imported where it is used, and why.
LATE = {
    ('api.py', 'internlm_mm.engine.runner'): 'seconds that a process which only generates saves',
    ('api.py', 'internlm_mm.engine.start'): 'likewise',
    ('__main__.py', 'internlm_mm.engine.last_words'): 'seconds that a misspelt command saves',
    ('cross_entropy.py', 'internlm_mm.ops.softmax_gradient'): 'a module for where Triton is',
    ('reducing.py', 'internlm_mm.ops.wide_add'): 'likewise',
    ('apart_turns.py', 'internlm_mm.ops.turned'): 'likewise',
}

# Sources without a test file of their own, and why.
NO_MIRROR = {
    'version.py': 'a constant',
}

# Modules of tools/ that are no programs, and why they are there.
NO_MAIN = {
    'bare_loop.py': 'what benchmark.py compares with',
}

# Packages that run in the user's transformers, never in ours: copied into exported folders, where
# they find one another by relative imports only, and called by transformers with whatever
# config.json and its own auto classes hand on.
CARRIED = {ROOT / 'checkpoint' / 'remote_code'}

# Files that are longer than 400 lines, and why.
LONG: dict[str, str] = {}

FILES = sorted(ROOT.rglob('*.py'))
TOOLS = sorted((REPOSITORY / 'tools').glob('*.py'))
PROGRAMS = [*FILES, *TOOLS]


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding='utf-8'))


def of_each(paths: Iterable[Path]) -> Callable[[Callable[[Path], None]], Callable[[], None]]:
    """One test of many files, which names all that fail: thousands of tests would take longer."""

    def test_of_all(check: Callable[[Path], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = []
            for path in paths:
                try:
                    check(path)
                except AssertionError as error:
                    wrong.append(f'{name_of(path)}: {error}')
            assert not wrong, '\n'.join(wrong)

        test.__name__ = check.__name__
        return test

    return test_of_all


def imports(node: ast.AST) -> list[tuple[int, str]]:
    """Line and dotted name of every module imported by one statement."""
    if isinstance(node, ast.Import):
        return [(node.lineno, alias.name) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        module = '.' * node.level + (node.module or '')
        if module == 'internlm_mm':
            return [(node.lineno, f'internlm_mm.{alias.name}') for alias in node.names]
        return [(node.lineno, module)]
    return []


@of_each(FILES)
def test_imports_only_what_the_table_allows(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix('.py')
    if package == '__init__':
        allowed = {'version', 'utils', 'api'}
    else:
        assert package in MAY_IMPORT, f'{package} has no line in the table of who may import whom'
        base = COMMON if package not in COMMON else set()
        allowed = MAY_IMPORT[package] | base | {package}
    for node in ast.walk(parsed(path)):
        for line, module in imports(node):
            if path.parent in CARRIED and path.name != '__init__.py':
                there = {'', 'torch', 'transformers', *sys.stdlib_module_names}
                assert module.split('.')[0] in there, f'line {line}: {module} is not there'
                continue
            assert not module.startswith('.'), f'line {line}: imports are absolute'
            first, _, rest = module.partition('.')
            assert first not in {'tools', 'configs', 'projects', 'tests'}, f'line {line}: {module}'
            if first == 'internlm_mm':
                part = rest.split('.')[0]
                assert part in allowed, f'line {line}: {package} may not import {part}'


@of_each(PROGRAMS)
def test_only_optional_or_slow_packages_are_imported_inside_functions(path: Path) -> None:
    for function in ast.walk(parsed(path)):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for node in ast.walk(function):
                for line, module in imports(node):
                    package = module.split('.')[0]
                    allowed = package in OPTIONAL | SLOW or (path.name, module) in LATE
                    assert allowed, f'line {line}: import {module} at the top'


@of_each(PROGRAMS)
def test_no_hidden_inputs(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        assert not isinstance(node, ast.Global), f'line {node.lineno}: global statement'
        hidden = isinstance(node, ast.Attribute) and node.attr in ('environ', 'getenv')
        if path != ROOT / 'utils' / 'launch.py':
            assert not hidden, f'line {node.lineno}: only utils/launch.py reads the environment'


@of_each(PROGRAMS)
def test_no_pickle_and_no_eval(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        for line, module in imports(node):
            assert module.split('.')[0] not in {'pickle', 'dill', 'cloudpickle'}, f'line {line}'
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != 'eval', f'line {node.lineno}: eval'


@of_each(PROGRAMS)
def test_every_option_of_a_constructor_is_used(path: Path) -> None:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef) and node.name == '__init__':
            body = [name for statement in node.body for name in ast.walk(statement)]
            used = {name.id for name in body if isinstance(name, ast.Name)}
            for argument in [*node.args.args[1:], *node.args.kwonlyargs]:
                assert argument.arg in used, f'line {argument.lineno}: {argument.arg} does nothing'
            hides = node.args.kwarg is not None and path.parent not in CARRIED
            assert not hides, f'line {node.lineno}: **kwargs hides misspelt options'


@of_each([f for f in FILES if f.name == '__init__.py'])
def test_packages_only_re_export(path: Path) -> None:
    for node in parsed(path).body:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__'
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        is_import = isinstance(node, (ast.Import, ast.ImportFrom))
        allowed = is_import or is_all or is_text
        if path.parent == ROOT:  # looks at the installation, and imports the API when asked for it
            allowed = allowed or ast.unparse(node).startswith(
                ('check_mmengine()', 'if TYPE_CHECKING:', 'def __getattr__(')
            )
        assert allowed, f'line {node.lineno}: logic in __init__.py'


@of_each([f for f in FILES if f.name != '__init__.py'])
def test_has_a_test_of_its_own(path: Path) -> None:
    inside = path.relative_to(ROOT)
    folders = [f'test_{part}' for part in inside.parts[:-1]]
    mirror = Path(__file__).parent.joinpath(*folders, f'test_{inside.stem.strip("_")}.py')
    listed = NO_MIRROR.get(inside.as_posix())
    assert mirror.exists() or listed, f'{name_of(mirror)} is missing'
    assert not (mirror.exists() and listed), f'take {inside} off NO_MIRROR'


@of_each(PROGRAMS)
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding='utf-8').splitlines())
    listed = name_of(path) in LONG
    assert lines <= 400 or listed, f'{lines} lines: split it, or say in LONG why not'
    assert lines > 400 or not listed, f'take {name_of(path)} off LONG'


@of_each(PROGRAMS)
def test_modules_say_what_they_are(path: Path) -> None:
    assert ast.get_docstring(parsed(path)), 'a module begins with a docstring'


@of_each(TOOLS)
def test_tools_have_a_main(path: Path) -> None:
    if path.name in NO_MAIN:
        return
    for node in parsed(path).body:
        if isinstance(node, ast.FunctionDef) and node.name == 'main':
            signatures = ('argv: list[str] | None=None', 'argv: Sequence[str] | None=None')
            assert ast.unparse(node.args) in signatures
            return
        if isinstance(node, ast.ImportFrom) and 'main' in [alias.name for alias in node.names]:
            return
    raise AssertionError('no main(argv: list[str] | None = None) -> int | None')


@of_each(PROGRAMS)
def test_the_search_path_is_left_alone(path: Path) -> None:
    if path == ROOT / '__main__.py':
        return
    for node in ast.walk(parsed(path)):
        # `make install` makes us importable. In a wheel, where tools/ lies inside the package, its
        # parent on sys.path would put our tokenizers and datasets in the place of Hugging Face's.
        touched = isinstance(node, ast.Attribute) and ast.unparse(node) == 'sys.path'
        assert not touched, f'line {node.lineno}: sys.path'


@of_each(sorted((REPOSITORY / 'configs').glob('*.py')))
def test_leaf_configs_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 40
    assert ast.get_docstring(ast.parse(text))
