"""The one exception that is shown to a person instead of a traceback."""


class UserError(Exception):
    """Bad input: one line that names the value, what was expected and the way out; exit code 2."""
