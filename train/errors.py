"""The one exception that a user is meant to see."""


class TrainError(Exception):
    """Something the user can put right. Its message is one line that names the cause and the remedy."""
