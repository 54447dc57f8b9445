"""Errors whose message is for the user."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is for the user, holds the numbers and the remedy, and needs no traceback.

    Example:
        >>> str(UserError.of(["a is 3", "b is 4"]))
        '2 problems, nothing was started:\\n  - a is 3\\n  - b is 4'
    """

    def __init__(self, message: str, problems: list[str] | None = None) -> None:
        super().__init__(message)
        self.problems = problems or [message]

    @classmethod
    def of(cls, problems: list[str]) -> UserError:
        """Join all problems of one command into one error."""
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        return cls(f"{head}, nothing was started:\n" + "\n".join(f"  - {p}" for p in problems), problems)


class JobFailed(Exception):
    """A started job did not end well; ``code`` is the exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
