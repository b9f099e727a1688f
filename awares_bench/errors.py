"""What the Python API raises. One root, so that a caller can catch everything that this package says no to."""


class AwaresError(Exception):
    """The root. Its text says what was given, what is allowed, and what to do."""


class OptionError(AwaresError, ValueError):
    """A method, an option or a checkpoint that cannot be used as asked."""


class AnswerError(AwaresError, RuntimeError):
    """A question that could not be answered, such as one about a picture that cannot be read."""


class RunError(AwaresError, RuntimeError, ValueError):
    """What no document can be answered after or with: the server is gone, the device is broken, the method does not fit the model.

    Any other exception is a failure of the document that raised it.
    """


class CheckpointError(AwaresError, ValueError):
    """A checkpoint folder that cannot be used, and what to do about it."""
