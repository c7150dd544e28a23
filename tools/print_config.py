"""Print a config with everything it inherits, or which line set one of its values."""

import sys

from internlm_mm.engine.start import adopt_model
from internlm_mm.utils.arguments import Arguments
from internlm_mm.utils.config import (
    check_config,
    dump_config,
    load_config,
    parse_cfg_options,
)
from internlm_mm.utils.provenance import Setting, explain


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0 if the config is valid."""
    parser = Arguments(prog='print_config', description=__doc__)
    parser.add_argument('config', help='a config file, or the name of one of ours')
    parser.add_argument('--explain', metavar='a.b.c', help='say which file and line set this value')
    parser.add_argument('--json', action='store_true', help='print JSON instead of Python')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='a.b=c', help='overrides')
    args = parser.parse_args(argv)
    try:
        options = parse_cfg_options(args.cfg_options)
        if args.explain:
            for setting in explain(args.config, args.explain, options):
                _print(setting)
            return 0
        cfg = load_config(args.config, options)
        adopt_model(cfg)
        python, json_text = dump_config(cfg)
        print(json_text if args.json else python, end='')
        check_config(cfg)
    except (ValueError, FileNotFoundError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


def _print(setting: Setting, indent: str = '') -> None:
    print(f'{indent}{setting}')
    for inner in setting.through:
        _print(inner, indent + '    ')


if __name__ == '__main__':
    sys.exit(main())
