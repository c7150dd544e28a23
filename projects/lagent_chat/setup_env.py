"""Make the environment that Lagent runs in."""

from __future__ import annotations

import sys
from pathlib import Path

from lagent_chat import environment

from internlm_mm.utils.arguments import Arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if the environment cannot be made."""
    parser = Arguments(prog='setup_env.py', description=__doc__)
    env_help = 'where it goes (default: .venv beside this file)'
    parser.add_argument(
        '--env', metavar='PATH', type=Path, default=environment.FOLDER, help=env_help
    )
    args = parser.parse_args(argv)
    folder = args.env.absolute()
    print(f'installing {environment.LAGENT} into {folder}', flush=True)
    try:
        version = environment.make(folder)
    except environment.LagentMissing as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    print(f'Lagent {version} is ready.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
