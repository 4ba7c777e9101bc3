"""What a contestant raises that this machine or network cannot have: it is left out, with the reason."""


class Unavailable(Exception):
    """Names what is missing."""
