"""Chat with a model in the browser: a checkpoint, a Hugging Face folder, or a server's URL.

python projects/web_chat/run.py work_dirs/my_pretrain
"""

import sys
from pathlib import Path

from web_chat.backend import BackendError, Settings
from web_chat.options import check_address, check_model, open_backend, parse_args
from web_chat.terminal import write_events


def main(argv: list[str] | None = None) -> int:
    """Serve until Ctrl-C; 2 for what the user did wrong."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        check_model(args.model, page=args.ask is None, template=args.template)
        if args.ask is not None:
            messages = [{'role': 'user', 'content': args.ask}]
            write_events(open_backend(args).answer(messages, Settings()), sys.stdout)
            return 0
        check_address(args.host, args.port)
    except (BackendError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return serve(argv, args.host, args.port)


def serve(argv: list[str], host: str, port: int) -> int:
    """Hand over to Streamlit, which reads the rest from `.streamlit/config.toml`."""
    from streamlit.web import cli

    app = str(Path(__file__).with_name('app.py'))
    options = [f'--server.address={host}', f'--server.port={port}']
    return cli.main(['run', *options, app, '--', *argv], standalone_mode=False) or 0


if __name__ == '__main__':
    sys.exit(main())
