"""Tools to try: `--plugins projects/lagent_chat/plugins.py`. Lagent takes this file as it is."""

from datetime import date, timedelta

from lagent.actions import BaseAction, tool_api


@tool_api
def days_between(first: str, last: str) -> int:
    """Count the days from one date to another.

    Args:
        first (str): As 2026-01-31.
        last (str): As 2026-02-28.
    """
    return (date.fromisoformat(last) - date.fromisoformat(first)).days


class Calendar(BaseAction):
    """Dates."""

    @tool_api
    def weekday(self, day: str) -> str:
        """The weekday of a date.

        Args:
            day (str): As 2026-01-31.
        """
        return date.fromisoformat(day).strftime('%A')

    @tool_api
    def later(self, day: str, days: int = 1) -> str:
        """A date some days later.

        Args:
            day (str): As 2026-01-31.
            days (int): How many.
        """
        return (date.fromisoformat(day) + timedelta(days=days)).isoformat()
