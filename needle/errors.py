"""Errors that are the user's to mend. A stage prints their message without a traceback and exits with status 2."""


class UserError(Exception):
    """What was wrong, which value, which limit, and what to do, in one message."""


class ConfigError(UserError):
    """A setting is unknown, missing, of the wrong type, out of range, or illegal beside another."""


class DataError(UserError):
    """An input file is missing, unreadable or holds nothing usable."""
