"""What is wrong with a user's files, collected by file and line and shown together."""

import zlib

MAX_FAULTS_SHOWN = 10


BROKEN_FILE = ("ZstdError", "ArrowException")  # of libraries that are imported where they are needed


class BrokenFileError(ValueError):
    """A file that is not what its name says."""


class Faults:
    """Collects what is wrong with the input; the first ten are shown, all are counted."""

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, where: str, what: str) -> None:
        self.count += 1
        if len(self.shown) < MAX_FAULTS_SHOWN:
            self.shown.append(f"{where}: {what}")

    def raise_if_any(self) -> None:
        """Raises ValueError with the first faults, one a line."""
        if self.count:
            more = f"\n... and {self.count - len(self.shown)} more" if self.count > len(self.shown) else ""
            faults = "fault" if self.count == 1 else "faults"
            raise ValueError(f"{self.count} {faults} in the input:\n" + "\n".join(self.shown) + more)


def is_broken_file(error: Exception) -> bool:
    """Whether an error says that a file cannot be read, or is not what its name says."""
    # EOFError: a compressed file cut short; the libraries' own errors for one that is broken.
    known = isinstance(error, OSError | EOFError | zlib.error | UnicodeDecodeError | BrokenFileError)
    return known or any(kind.__name__ in BROKEN_FILE for kind in type(error).__mro__)
