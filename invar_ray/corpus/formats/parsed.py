"""What every parser returns, and how foreign text is made safe to store."""

from __future__ import annotations

from dataclasses import dataclass

from invar_ray.schema import Place


@dataclass(frozen=True, slots=True)
class Parsed:
    """A file as text.

    Attributes:
        title: from the file itself; empty where it has none.
        text: the whole text; blank where the file holds none.
        places: pages or headings, ascending by offset into ``text``.
        unit: see :class:`invar_ray.schema.Document`.
        note: what of the file could not be read; empty if nothing.
    """

    title: str
    text: str
    places: tuple[Place, ...] = ()
    unit: str = ""
    note: str = ""


def clean_text(text: str) -> str:
    """``text`` as UTF-8 can hold it: halves of surrogate pairs are joined, lone ones and NULs
    become U+FFFD.
    """
    if "\x00" in text:
        text = text.replace("\x00", "\ufffd")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def one_line(text: str) -> str:
    """Runs of white space as single spaces: for titles and labels."""
    return " ".join(clean_text(text).split())
