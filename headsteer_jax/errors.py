"""The one exception that the command line turns into a line."""


class HeadSteerError(Exception):
    """A mistake or a misfortune outside the program: its message is one line that names the culprit and the mend."""
