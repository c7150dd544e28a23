"""Chat with a model that calls tools, in the terminal, by Lagent or by a loop of our own.

python projects/lagent_chat/chat.py work_dirs/my_agent
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from lagent_chat import environment
from lagent_chat.folder import SessionFolder
from lagent_chat.models import Speaker, load_model
from lagent_chat.options import api_key, folder_of, is_url, parse_args, sampling_of
from lagent_chat.plugins import load_plugins
from lagent_chat.server import Server
from lagent_chat.terminal import AgentTerminal, Loop
from lagent_chat.toolbox import ChatTools

from internlm_mm.agents import Agent
from internlm_mm.sandbox import Limits, Sandbox, SandboxError

try:
    import readline  # noqa: F401  arrows and history in what is typed
except ImportError:
    pass


def main(argv: list[str] | None = None) -> int:
    """Run the command; 1 if `--ask` got no answer, 2 for what is wrong, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    try:
        if not args.no_lagent and importlib.util.find_spec('lagent') is None:
            run_in(Path(args.env or environment.FOLDER).absolute(), argv)
        with ExitStack() as stack:
            terminal = open_chat(args, stack)
            if args.ask is None:
                terminal.run()
                return 0
            terminal.say(args.ask)
            return 0 if terminal.status == 'answer' else 1
    except (environment.LagentMissing, SandboxError, OSError, ValueError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def run_in(folder: Path, argv: list[str]) -> None:
    """Go on in the environment that has Lagent; returns only if there is none.

    Raises:
        LagentMissing: With the command that makes it.
    """
    if Path(sys.prefix).resolve() == folder.resolve():
        environment.check(folder)  # says what is missing
    python = environment.find(folder)
    sys.stdout.flush()
    os.execv(python, [str(python), str(Path(__file__).resolve()), *argv])


def open_chat(args: argparse.Namespace, stack: ExitStack) -> AgentTerminal:
    """Make all that a chat needs; what has to be closed goes onto the stack.

    Raises:
        OSError: And ValueError or SandboxError, with what is wrong.
    """
    folder = SessionFolder(folder_of(args))
    plugins = [one for file in args.plugins for one in load_plugins(file, args.tool_seconds)]
    speaker = open_speaker(args)
    session = None
    if not args.no_interpreter:
        limits = Limits(seconds=args.cell_seconds)
        try:
            box = Sandbox(python=args.python, limits=limits, spare=0, unsafe=args.unsafe_no_sandbox)
        except SandboxError as error:
            raise SandboxError(
                f'{error}\n--no-interpreter chats without one; --unsafe-no-sandbox runs what the '
                'model writes on this machine as it is'
            ) from None
        session = stack.enter_context(stack.enter_context(box).session())
    tools = ChatTools(plugins, session)
    if tools.tools and speaker.template.tools is None:
        raise ValueError(
            f'the template {speaker.template.name!r} spells no functions: name another one with '
            '--template, or chat without tools: --no-interpreter and no --plugins'
        )
    loop = open_loop(args, speaker, tools, folder)
    return AgentTerminal(loop, speaker, tools.declarations(), folder, args.system, read_line)


def open_speaker(args: argparse.Namespace) -> Speaker:
    """The model that the command line names."""
    sampling = sampling_of(args)
    if is_url(args.model):
        template = args.template or 'chatml'
        return Server(args.model, sampling, template, args.model_name, api_key())
    return load_model(args.model, sampling, args.template, args.device, args.dtype)


def open_loop(
    args: argparse.Namespace, speaker: Speaker, tools: ChatTools, folder: SessionFolder
) -> Loop:
    """Lagent, or the loop without it."""
    if args.no_lagent:
        return Agent(speaker, speaker.template, tools, args.max_turns, args.max_repairs)
    from lagent_chat.lagent_loop import LagentLoop  # only its own environment has Lagent

    return LagentLoop(speaker, tools, folder, args.max_turns, args.max_repairs)


def read_line(prompt: str) -> str:
    """The next line that is typed; a file or another program is not prompted."""
    return input(prompt if sys.stdin.isatty() else '')


if __name__ == '__main__':
    sys.exit(main())
