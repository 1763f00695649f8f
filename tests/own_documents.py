"""A folder as people have them: twenty documents of all kinds, and files that cannot be read."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path

import docx
import pyarrow as pa
import pyarrow.parquet as pq
import pypdf

QUESTIONS = {
    "Who built the lighthouse of Arvon?": ("arvon.pdf", "page 2"),
    "What colour is the ferry of Belisk?": ("boats/belisk.pdf", "page 1"),
    "How do I descale the espresso machine?": ("manual.docx", '"Care"'),
    "How many litres does the water tank hold?": ("manual.docx", "paragraph"),
    "When is the parental leave request due?": ("policies/leave.md", '"Parental leave"'),
    "Who approves travel expenses?": ("policies/travel.md", '"Approval"'),
    "Which yeast does the rye sourdough need?": ("recipes/rye.txt", "line"),
    "How long does the barley soup simmer?": ("recipes/soup.txt", "line"),
    "What does error E42 mean?": ("site/errors.html", '"E42"'),
    "Where can I park at the museum?": ("site/visit.htm", '"Parking"'),
    "Which comet did Hestray observe?": ("comets.jsonl", "row 3"),
    "Which glacier feeds the river Lunna?": ("rivers.jsonl.gz", "row 2"),
    "Which mineral gives kelda green its colour?": ("minerals.parquet", "row 2"),
}
"""Question -> the file that answers it, and what its place must name."""

SOUND_FILES = 17
SOUND_DOCUMENTS = 22


def pdf_bytes(pages: list[str], title: str = "") -> bytes:
    """A PDF with one text line a line of each page, written by hand: Helvetica, WinAnsi."""
    objects = [b"<< /Type /Catalog /Pages 2 0 R >>"]
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>".encode())
    objects.append(
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>"
    )
    for number, page in enumerate(pages):
        lines = "".join(f"({line}) Tj T* " for line in page.splitlines())
        stream = f"BT /F1 12 Tf 14 TL 72 720 Td {lines}ET".encode("cp1252")
        objects.append(
            "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Resources << /Font << /F1 3 0 "
            "R >> >> "
            f"/Contents {5 + 2 * number} 0 R >>".encode()
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n".encode() + stream + b"\nendstream")
    objects.append(f"<< /Title ({title}) >>".encode())
    out = io.BytesIO(b"%PDF-1.4\n")
    out.seek(0, os.SEEK_END)
    places = []
    for number, body in enumerate(objects, start=1):
        places.append(out.tell())
        out.write(f"{number} 0 obj\n".encode() + body + b"\nendobj\n")
    table = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.write("".join(f"{place:010d} 00000 n \n" for place in places).encode())
    trailer = f"<< /Size {len(objects) + 1} /Root 1 0 R /Info {len(objects)} 0 R >>"
    out.write(f"trailer\n{trailer}\nstartxref\n{table}\n%%EOF\n".encode())
    return out.getvalue()


def encrypted_pdf(pages: list[str], user_password: str) -> bytes:
    """A PDF under AES-256; with an empty user password anyone may read it."""
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_bytes(pages)))
    writer.encrypt(user_password, owner_password="owner", algorithm="AES-256")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def docx_bytes() -> bytes:
    """A Word file with a title, two headings, a table and an empty paragraph."""
    document = docx.Document()
    document.add_heading("Espresso machine manual", level=0)
    document.add_heading("Parts", level=1)
    document.add_paragraph("The machine has a boiler, a pump and a steam wand.")
    table = document.add_table(rows=2, cols=2)
    for at, text in enumerate(["Water tank", "holds 1.8 litres", "Drip tray", "holds 0.4 litres"]):
        table.cell(at // 2, at % 2).text = text
    document.add_paragraph("")
    document.add_heading("Care", level=1)
    document.add_paragraph(
        "To descale the espresso machine, run citric acid through it every two months."
    )
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def docx_bomb(megabytes: int) -> bytes:
    """A small zip whose document.xml unpacks to so many megabytes."""
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(docx_bytes())) as source,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
    ):
        for part in source.infolist():
            content = source.read(part)
            if part.filename == "word/document.xml":
                content = content.replace(b"<w:body>", b"<w:body>" + b" " * (megabytes << 20))
            archive.writestr(part.filename, content)
    return out.getvalue()


def _rows(names: dict[str, str]) -> bytes:
    return "".join(
        json.dumps({"id": f"{n}", "title": n, "text": text}) + "\n" for n, text in names.items()
    ).encode()


def write_sound(folder: Path) -> None:
    """``SOUND_DOCUMENTS`` documents in ``SOUND_FILES`` files."""
    contents: dict[str, bytes] = {
        "arvon.pdf": pdf_bytes(
            [
                "Arvon is a small island in the northern sound, some three miles from the "
                "mainland.\n"
                "The ferry leaves at five in the morning and comes back with the tide.",
                "The lighthouse of Arvon was built by Ada Mor-\nvane after the great storm of "
                "1841.\nIts lamp burned "
                "whale oil for a century, and its keeper lived there with two goats and a clock.",
                "Farmers on the island grow barley on the terraces.",
            ],
            "Arvon: an island",
        ),
        "boats/belisk.pdf": pdf_bytes(
            ["The ferry of Belisk is painted orange, a colour seen in fog."], "Microsoft Word"
        ),
        "boats/open.pdf": encrypted_pdf(["Dunmore lends rowing boats to guests of the inn."], ""),
        "manual.docx": docx_bytes(),
        "policies/leave.md": b"---\ntitle: Leave rules\n---\n\n# Leave\n\nThirty days a year.\n\n"
        b"```\n# no heading\n```\n\n## Parental leave\n\nThe parental leave request is due seven "
        b"weeks before.\n",
        "policies/travel.md": b"Travel\n======\n\nBook trains first.\n\n## Approval\n\nTravel "
        b"expenses are approved by "
        b"the head of department.\n",
        "recipes/rye.txt": b"Rye bread\n\nThe rye sourdough needs no yeast at all,\nonly the "
        b"starter.\n",
        "recipes/soup.txt": "Barley soup\n\nThe barley soup simmers for ninety minutes.\n".encode(
            "utf-16"
        ),
        "recipes/tea.markdown": b"# Tea\n\nSteep green tea at seventy degrees.\n",
        "site/errors.html": b"<html><head><title>Error "
        b"codes</title><style>p{}</style></head><body><nav>Home</nav>"
        b"<h1>Errors</h1><h2>E17</h2><p>E17: the door is <b>open</b>.</p><h2>E42</h2><p>Error E42 "
        b"means that the filter"
        b" is clogged.</p><script>var hidden = 1;</script></body></html>",
        "site/visit.htm": "<h1>Visit us</h1><h2>Opening</h2><p>We open at "
        "nine.<h2>Parking</h2><p>At the museum you can"
        " park behind the caf\u00e9.".encode("cp1252"),
        "site/shop.xhtml": b"<?xml version='1.0'?><html><body><h1>Shop</h1><pre>a\n  "
        b"b</pre><table><tr><td>Postcard"
        b"</td><td>2 euros</td></tr></table></body></html>",
        "comets.jsonl": _rows(
            {
                "Fenholm": "Fenholm built a telescope of oak.",
                "Garsa": "Garsa mapped the moons of Jupiter.",
                "Hestray": "Hestray observed the comet Ivore in winter.",
            }
        ),
        "rivers.jsonl.gz": gzip.compress(
            _rows(
                {
                    "Jorsay": "Jorsay is a chalk stream.",
                    "Lunna": "The river Lunna is fed by the Corrie glacier.",
                }
            )
        ),
        "nameless.jsonl": b'{"text": "A row with neither id nor title is fine."}\n',
        "notes.txt": b"One line about the cellar key, which hangs behind the door.\n",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    table = pa.table(
        {
            "id": ["m1", "m2", "m3"],
            "title": ["Elvay blue", "Kelda green", "Garsa red"],
            "text": [
                "Lapis makes elvay blue.",
                "Malachite gives kelda green its colour.",
                "Iron oxide, of course.",
            ],
        }
    )
    pq.write_table(table, folder / "minerals.parquet")


def write_faulty(folder: Path) -> dict[str, str]:
    """Files that cannot be read; name -> what their line must say."""
    (folder / "bad").mkdir()
    contents = {
        "bad/locked.pdf": encrypted_pdf(["secret"], "user"),
        "bad/scan.pdf": pdf_bytes([""]),
        "bad/cut.pdf": pdf_bytes(["A page."])[:200],
        "bad/empty.txt": b"",
        "bad/blank.md": b" \n\n",
        "bad/large.txt": b"far too much text " * (50 * 2**20 // 18 + 1),
        "bad/binary.txt": b"\x7fELF\x00\x00\x01",
        "bad/program.bin": b"\x7fELF\x00\x00\x01",
        "bad/broken.docx": docx_bytes()[:-600],
        "bad/old.docx": b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 rest",
        "bad/bomb.docx": docx_bomb(70),
        "bad/noise.txt": bytes(range(1, 256)),
        "bad/rows.jsonl": b'{"id": "r1", "text": "A sound row about larches."}\n{"id": \n{"id": 7}\n',  # noqa: E501
        "bad/cut.jsonl.gz": gzip.compress(os.urandom(4000))[:-100],
        "bad/no.parquet": b"PAR1 no",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "bad" / "loop").symlink_to("..", target_is_directory=True)
    (folder / "bad" / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(folder / "bad" / "pipe.txt")
    return {
        "bad/locked.pdf": "is encrypted. To do: save it without a password.",
        "bad/scan.pdf": "holds no text on its 1 page (a scan?). To do: pip install",
        "bad/cut.pdf": "cannot be read as PDF (",
        "bad/empty.txt": "is empty. To do: remove it.",
        "bad/blank.md": "holds no text. To do: remove it.",
        "bad/large.txt": "has 50.0 MB or more, above the limit of 32 MB. To do: split it, or raise "
        "corpus.max_file_mb.",
        "bad/binary.txt": "is not text, it holds zero bytes (a binary file). To do: remove it",
        "bad/program.bin": "nothing here reads ending .bin. To do: convert to one of .txt,",
        "bad/broken.docx": "cannot be read as Word file (BadZipFile",
        "bad/old.docx": "is encrypted, or an old .doc file under a new name. To do: save it as "
        ".docx",
        "bad/bomb.docx": "would unpack to 71 MB in",
        "bad/noise.txt": "is not UTF-8 text (byte 0x80 at offset 127), nor in an encoding",
        "bad/rows.jsonl": "(first: bad/rows.jsonl, line 2: malformed JSON",
        "bad/cut.jsonl.gz": "cannot be read beyond line",
        "bad/no.parquet": "cannot be read as Parquet (",
        "bad/loop": "leads to a folder that is read already (a link)",
        "bad/gone.txt": "is a link that leads nowhere",
        "bad/pipe.txt": "is no regular file (a pipe, a socket or a device).",
    }
