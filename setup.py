"""How internlm_mm is packaged; pyproject.toml holds settings of tools only."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# Extras with kernels that run on GPUs alone.
FOR_GPUS = {'flash4', 'fp8', 'liger', 'qlora'}


def read(path: str) -> str:
    """Text of a file of the repository."""
    return (ROOT / path).read_text(encoding='utf-8')


def requirements(path: str) -> list[str]:
    """Lines of a requirements file that are neither empty nor a comment."""
    lines = (line.split('#')[0].strip() for line in read(path).splitlines())
    return [line for line in lines if line]


def extras() -> dict[str, list[str]]:
    """Optional dependencies by name; `all` is every one that runs in production, on any machine."""
    named: dict[str, list[str]] = {}
    for line in requirements('requirements/optional.txt'):
        name, requirement = line.split(':', 1)
        named.setdefault(name.strip(), []).append(requirement.strip())
    return named | {
        'all': sorted(
            {
                requirement
                for name, group in named.items()
                for requirement in group
                if name not in FOR_GPUS
            }
        ),
        'docs': requirements('requirements/docs.txt'),
        'tests': requirements('requirements/tests.txt'),
    }


def travelling(folder: str) -> list[str]:
    """Packages that a folder beside the package becomes inside the wheel."""
    files = sorted((ROOT / folder).rglob('*.py'))
    parents = sorted({file.parent.relative_to(ROOT).as_posix() for file in files})
    return [f'internlm_mm.{parent.replace("/", ".")}' for parent in parents]


match = re.search(r"__version__ = '(.+?)'", read('internlm_mm/version.py'))
assert match is not None, 'internlm_mm/version.py has no __version__'

setup(
    name='internlm_mm',
    version=match.group(1),
    description='Train, align, convert and serve InternLM-family language models on MMEngine',
    long_description=read('README.md') if (ROOT / 'README.md').exists() else '',
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11,<3.14',
    install_requires=requirements('requirements/runtime.txt'),
    extras_require=extras(),
    packages=[
        *find_packages(include=['internlm_mm', 'internlm_mm.*']),
        *travelling('configs'),
        *travelling('tools'),
    ],
    package_dir={'internlm_mm.configs': 'configs', 'internlm_mm.tools': 'tools'},
    include_package_data=False,
    entry_points={'console_scripts': ['internlm_mm = internlm_mm.__main__:main']},
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: POSIX :: Linux',
        'Operating System :: MacOS',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
    ],
)
