"""The one exception for input that cannot be used: a sentence that says what was given and what to do."""


class InputError(ValueError):
    """What the caller gave cannot be used; the command prints its one line and exits with status 2."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))  # a name in it may hold anything
