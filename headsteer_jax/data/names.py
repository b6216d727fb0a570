"""Names of classes, splits and files in one form, whatever system and encoding they come from."""

import unicodedata

# Files and directories that operating systems and their tools leave beside a user's files.
SYSTEM_NAMES = frozenset(
    ("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin", "lost+found")
)


def normalise_name(name: str | bytes) -> str:
    r"""Return a name in the Unicode form NFC, in which control characters and bytes that are not UTF-8 are escaped.

    macOS writes "é" as two characters and other systems as one (NFC). Without one form, the same class could have two
    names, and a copied dataset another order. An escape, such as `caf\xe9`, can be printed and stored everywhere.
    """
    if isinstance(name, str) and name.isascii() and name.isprintable():  # almost all of a million names
        return name
    raw = name if isinstance(name, bytes) else name.encode("utf-8", "surrogateescape")
    text = unicodedata.normalize("NFC", raw.decode("utf-8", "backslashreplace"))
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in ("Cc", "Zl", "Zp")
        else character
        for character in text
    )


def is_system_name(name: str) -> bool:
    """Say whether a file or directory is hidden, as macOS's `._x.jpg` and `.DS_Store` are, or an operating system's."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES
