"""Paths as people write them: `~` stands for a home directory, and a scheme such as gs:// for a kind of storage."""

import os
import re
from pathlib import Path

from headsteer_jax.errors import HeadSteerError

SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # pathlib would make a directory `s3:` of s3://bucket


def has_known_scheme(text: str, buckets: bool = True) -> bool:
    """Say whether a path has no scheme, or gs:// if buckets are accepted."""
    return not SCHEME.match(text) or (buckets and re.match("gs://[^/]", text) is not None)


def is_unicode(text: str) -> bool:
    """Say whether a text can be written in UTF-8; bytes of a file's name that are no text become surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _has_utf8_bytes(text: str) -> bool:
    """Say whether the bytes of a path are UTF-8, whatever the locale made of them."""
    try:
        os.fsencode(text).decode("utf-8")
    except UnicodeError:
        return False
    return True


def expand_path(text: str, name: str, buckets: bool = True) -> str:
    """Replace a leading `~` or `~user`, which shells leave alone after an equals sign, and check the path's scheme.

    Args:
      text: the path.
      name: what the path was given as, such as --workdir, for the error.
      buckets: accept gs:// paths.

    Raises:
      HeadSteerError: there is no such user, the scheme is not supported, or the path is not UTF-8.
    """
    if not _has_utf8_bytes(text):
        raise HeadSteerError(f"{name}={text!r}: must be text in UTF-8; rename the directory, or make a link to it")
    if not has_known_scheme(text, buckets):
        allowed = "a path of this machine" + " or gs://bucket/path" * buckets
        raise HeadSteerError(f"{name}={text}: such paths are not supported; give {allowed}")
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        user = text[1:].partition("/")[0]
        reason = f"there is no user {user!r}" if user else "there is no home directory"
        raise HeadSteerError(
            f"{name}={text}: {reason}; write the path in full (or ./{text} for a file of this name)"
        ) from None
