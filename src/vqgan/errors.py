"""The one error that users cause and can mend."""


class InputError(ValueError):
    """Bad input: the message is one line that names the input and the mend.

    The command line prints it on stderr and ends with exit status 2; from Python it is an ordinary
    `ValueError`.
    """
