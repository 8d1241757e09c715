"""The error of a command line that its user has to put right: exit status 2."""

__all__ = ["WrongCommand"]


class WrongCommand(ValueError):
    """A command line, or a file it names, that has to be put right; the message says how."""
