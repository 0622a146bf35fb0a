"""The failure that is the user's to mend."""


class BadInput(Exception):
    """Wrong use or bad input; the message says the cause and the remedy (exit code 2)."""
