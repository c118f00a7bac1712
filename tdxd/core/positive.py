"""The check that most numbers of a configuration need."""

from __future__ import annotations

__all__ = ["check_positive"]


def check_positive(record: object, *names: str) -> None:
    """Check that these numbers of a record are greater than 0; `None` is no number.

    Raises: ValueError, naming the first that is not, with its value.
    """
    for name in names:
        value = getattr(record, name)
        if value is not None and not value > 0:
            msg = f"{name} {value} is not greater than 0"
            raise ValueError(msg)
