"""The two errors seqcore raises. Both say what was wrong, what was given, what is allowed, and what to do next."""


class InvalidInput(ValueError, RuntimeError):
    """An argument no backend can accept: a wrong rank, size, dtype or device.

    Both a ValueError and a RuntimeError, because ``torch.nn`` raises now one, now the other for the same mistakes and
    code that catches either must go on working.
    """


class UnsupportedInput(NotImplementedError):
    """A valid request that the backend asked for by name cannot serve; another backend may."""
