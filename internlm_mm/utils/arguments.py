"""Command lines whose misspelt options come with the nearest that there is."""

import argparse
from collections.abc import Sequence
from typing import Any

from internlm_mm.utils.suggest import nearest


class Arguments(argparse.ArgumentParser):
    """Reads a command line; what it does not know is named with what was meant."""

    # Typed loosely: argparse overloads it by the kind of namespace.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Read everything, or leave with exit code 2 and a message."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            hints = [self._nearest(one) for one in unknown]
            self.error(f'unrecognized arguments: {" ".join(unknown)}{"".join(hints)}')
        return found

    def _nearest(self, unknown: str) -> str:
        """What was meant by an option, of this program's and of its commands'; '' for others."""
        known: list[str] = []
        for action in self._actions:
            known += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    known += [name for one in command._actions for name in one.option_strings]
        hint = nearest(unknown.partition('=')[0], known) if unknown.startswith('--') else ''
        return f'.{hint}' if hint else ''  # usage has told of all the others
