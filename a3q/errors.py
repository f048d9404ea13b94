"""Errors that are addressed to the person at the keyboard."""


class InputError(Exception):
    """Something the user gave cannot be used. The message names it and says what to do; the CLI exits with 2."""


class VerifyError(Exception):
    """The written file is not what it should be. The CLI exits with 1."""
