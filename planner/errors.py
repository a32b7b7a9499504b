"""The one exception for mistakes a user can mend; commands print it as a single line and exit with status 2."""


class UserError(Exception):
    """A mistake in a user's file, flag or value.

    The text is one line: where (file, line, key), what was found, what was expected.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        key: str | None = None,
        value: object = None,
        expected: str | None = None,
    ) -> None:
        where = ": ".join(str(part) for part in (file, key) if part is not None)
        what = problem if value is None else f"{problem} (got {value!r})"
        line = f"{where}: {what}" if where else what
        if expected is not None:
            line += f"; expected {expected}"
        super().__init__(" ".join(line.split()))
