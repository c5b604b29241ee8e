"""What a user can do wrong, as one line."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a folder, in one line: key or file, what is wrong, the choices.

    Entry points print the message without a traceback and exit with status 2.
    """
