"""Bytes into text; of what is not UTF-8 a guess, from the letters that come out.

Charset-normalizer says which encodings give no mess.  Several do for a short text; which of them is
meant, the letters tell: those that a language writes often, else those that a script has at all.
[ours]
"""

from __future__ import annotations

import re
import unicodedata
from functools import cache

from invar_ray.corpus.formats.parsed import clean_text
from invar_ray.errors import DataError

# UTF-32's little-endian mark starts with that of UTF-16: the longer ones come first.
_BYTE_ORDER_MARKS = {
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ESCAPED = re.compile(rb"\x1b\$[@B]")  # ISO-2022-JP
_SAMPLE_BYTES = 100_000
_MAX_MESS = 0.1
"""How much messier (charset-normalizer's chaos, 0 to 1) than the cleanest a candidate may be."""
_LATIN = {
    "cp1252": """äöüßÄÖÜ éèêëàâçîïôùûüœæÉÈÀÇÊ áéíóúñüÁÉÍÓÚÑ ãõáéíóúâêôçàÃÕÁÉÍÓÚÂÊÔÇ àèéìòùÀÈ
    åäöæøéÅÄÖÆØ áéíóúýþðæöÁÉÍÓÚÝÞÐÆÖ éëïóöü""",
    "cp1250": """ąćęłńóśźżĄĆĘŁŃÓŚŹŻ áčďéěíňóřšťúůýžÁČĎÉĚÍŇÓŘŠŤÚŮÝŽ áäčďéíĺľňóôŕšťúýžČĎĽŠŤŽ
    áéíóöőúüűÁÉÍÓÖŐÚÜŰ čćžšđČĆŽŠĐ ăâîşţĂÂÎŞŢ""",
    "cp1254": "çğıöşüâîÇĞİÖŞÜ",
    "cp1257": "ąčęėįšųūžĄČĘĖĮŠŲŪŽ āčēģīķļņšūžĀČĒĢĪĶĻŅŠŪŽ äöõüšžÄÖÕÜŠŽ",
}
# Of other scripts the commonest letters, about half of the alphabet.
_OTHER = {
    "cp1251": "оеаинтсрвлкмдпуя оаинетвсрлкдпуі оаеинтсрвлкдпмзъ",
    "cp1253": "αοιετσνηυρπκλωςάίόέή",
    "cp1255": "יוהלאתרבמנשםדע",
    "cp1256": "ايلمنوتربةدعسفهك",
    "tis_620": "านรอกเงมยลวดทสตะปบคหแ่้ีิัุ",
}
_SAME = {"cp1250": ("iso8859_2",), "cp1252": ("mac_roman", "cp437"), "cp1251": ("koi8_r", "cp866")}
_LETTERS = {name: tuple(text.split()) for name, text in (_LATIN | _OTHER).items()}
_LETTERS |= {other: _LETTERS[name] for name, others in _SAME.items() for other in others}
_RARE = frozenset(other for others in _SAME.values() for other in others)
_RARE_COSTS = 0.05
_EAST_ASIAN = ("gb18030", "cp932", "euc_jp", "big5", "cp949", "iso2022_jp")
_KANA = frozenset(map(chr, range(0x3041, 0x30FF)))
_LEAST_KANA = 0.2
# Quotation marks, dashes and signs that any language writes.
_MARKS = frozenset("\xa0«»„“”‚‘’–—…·•€£§°©®™×½¼¾¿¡　、。，．！？「」『』（）：；")


def decoded(data: bytes, place: str) -> tuple[str, str]:
    """A file's text, and a note if its encoding was guessed.

    UTF-8, or UTF-16 and UTF-32 with a byte order mark; else what the letters that come out speak
    for.  Invisible characters go (see :func:`invar_ray.corpus.formats.parsed.clean_text`), and a
    terminal's colours.

    Raises:
        DataError: it is no text.
    """
    encoding = next(
        (name for mark, name in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8-sig"
    )
    binary = encoding == "utf-8-sig" and b"\x00" in data[:65536]
    what = "is not text, it holds zero bytes (a binary file)"
    if not binary:
        try:
            text = data.decode(encoding)
            if encoding != "utf-8-sig" or not _ESCAPED.search(data):
                return visible(text), ""
            what = "is not UTF-8 text"
        except UnicodeDecodeError as error:
            what = (
                f"is not {encoding.removesuffix('-sig').upper()} text (byte "
                f"{data[error.start]:#04x} at offset {error.start}), nor in an encoding that can "
                "be told"
            )
    found = _guess(data) if encoding == "utf-8-sig" else None
    if found is None:
        action = "remove it, or give it its true ending" if binary else "save it as UTF-8"
        raise DataError(f"{place} {what}", action=action)
    text, name = found
    note = (
        f"{place} is not UTF-8: read as {name} (a guess). To do: look at it, or save it as UTF-8."
    )
    return visible(text), note


def visible(text: str) -> str:
    """A text without invisible characters and a terminal's colours."""
    return clean_text(_COLOURS.sub("", text) if "\x1b" in text else text)


def _guess(data: bytes) -> tuple[str, str] | None:
    """The text of bytes that are not UTF-8, and what they were taken for; ``None`` if no text.

    UTF-8 with some bytes damaged or of an older encoding (they are read as Windows-1252), UTF-16
    and UTF-32 without a byte order mark, else the likeliest of the older encodings.
    """
    if b"\x00" in data[:65536]:
        return _wide(data)
    data = data.removeprefix(b"\xef\xbb\xbf")
    sample = data[:_SAMPLE_BYTES]
    if len(sample) > sum(byte >= 32 or byte in b"\t\n\r\f\v\x1b" for byte in sample):
        return _wide(data)  # control characters
    text = None if sample.isascii() else _damaged_utf8(data)
    if text is not None:
        return text, "UTF-8 but for its damaged bytes"
    name = _legacy(sample)
    return None if name is None else (data.decode(name, "replace"), name)


def _wide(data: bytes) -> tuple[str, str] | None:
    found = []
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        size = 4 if "32" in name else 2
        try:
            text = data[: len(data) // size * size].decode(name)
        except UnicodeDecodeError:
            continue
        kinds = {unicodedata.category(each) for each in set(text) - set("\t\n\r\f\v")}
        if text and kinds.isdisjoint({"Cc", "Cn", "Co", "Cs"}):
            # In the wrong order the letters of a text are spread over many blocks.
            found.append((len({ord(each) >> 8 for each in text}), text, name))
    best = min(found, default=None)
    return None if best is None else best[1:]


def _damaged_utf8(data: bytes) -> str | None:
    """UTF-8 of which at most a tenth of the characters outside ASCII is something else."""
    text = data.decode("utf-8", "surrogateescape")
    bad = sum("\udc80" <= each <= "\udcff" for each in text)
    good = sum(each > "\x7f" for each in text) - bad
    try:
        return data.decode("utf-8", "surrogatepass")  # halves of pairs, as Java writes them
    except UnicodeDecodeError:
        if bad * 10 > good:
            return None
    return re.sub(
        "[\udc80-\udcff]+",
        lambda run: run.group().encode("utf-8", "surrogateescape").decode("cp1252", "replace"),
        text,
    )


def _legacy(sample: bytes) -> str | None:
    from charset_normalizer import from_bytes  # only when such a file comes

    matches = list(from_bytes(sample, cp_isolation=[*_LETTERS, *_EAST_ASIAN]))
    scores: dict[str, float] = {}
    for match in matches:
        if match.chaos > matches[0].chaos + _MAX_MESS:
            continue
        for name in match.could_be_from_charset:
            fit = _fit(sample.decode(name, "ignore"), name)
            scores[name] = fit - match.chaos - _RARE_COSTS * (name in _RARE)
    # Where two fit alike, the order of the tables decides.
    order = [*_LETTERS, *_EAST_ASIAN]
    return max(scores, key=lambda name: (round(scores[name], 3), -order.index(name)), default=None)


def _fit(text: str, name: str) -> float:
    """The share of a text's characters outside ASCII that a language of the encoding writes
    often.
    """
    foreign = [each for each in text if each > "\x7f" and each not in _MARKS]
    if not foreign:
        return 1.0
    if name in _EAST_ASIAN:
        kana = sum(each in _KANA for each in foreign) / len(foreign)
        if (kana >= _LEAST_KANA) != (name in {"cp932", "euc_jp", "iso2022_jp"}):
            return 0.0
        return sum(each in _common(name) for each in foreign) / len(foreign)
    return max(
        sum(each in letters or each.lower() in letters for each in foreign) / len(foreign)
        for letters in _LETTERS[name]
    )


@cache
def _common(name: str) -> frozenset[str]:
    """The commoner characters of an East Asian encoding: the first of its two levels."""
    first, last, codec = {
        "gb18030": (0xB0, 0xD7, "gb2312"),
        "big5": (0xA4, 0xC6, "big5"),
        "cp949": (0xB0, 0xC8, "euc_kr"),
    }.get(name, (0xB0, 0xCF, "euc_jp"))
    second = (*range(0x40, 0x7F), *range(0xA1, 0xFF))
    pairs = (bytes((lead, trail)) for lead in range(first, last + 1) for trail in second)
    return frozenset("".join(pair.decode(codec, "ignore") for pair in pairs)) | _KANA
