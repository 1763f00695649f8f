"""Each kind of file into one text: nothing that a reader sees is lost, nothing hidden is read."""

from __future__ import annotations

import gzip
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import docx
import openpyxl
import pptx
import pytest
from docx.oxml import parse_xml

from invar_ray.corpus.formats.html import parse_html
from invar_ray.corpus.formats.pdf import parse_pdf
from invar_ray.corpus.formats.word import parse_docx
from invar_ray.corpus.readers import read_documents
from invar_ray.corpus.readlog import ReadLog
from invar_ray.schema import Document
from tests.own_documents import pdf_bytes

_W = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'


def read(folder: Path) -> tuple[dict[str, Document], ReadLog]:
    log = ReadLog()
    return {document.id: document for document in read_documents(str(folder), log=log)}, log


def words_of(*body: str) -> str:
    document = docx.Document()
    for xml in body:
        document.element.body.insert(-1, parse_xml(xml))
    out = io.BytesIO()
    document.save(out)
    return parse_docx(out.getvalue(), "x.docx", 2**25).text


RUN = "<w:r><w:t>{}</w:t></w:r>"


@pytest.mark.parametrize(
    ("wrapped", "expected"),
    [
        ("<w:sdt><w:sdtContent>{}</w:sdtContent></w:sdt>", "The fee is due in May."),
        ('<w:ins w:id="1" w:author="x">{}</w:ins>', "The fee is due in May."),
        ('<w:moveTo w:id="1" w:author="x">{}</w:moveTo>', "The fee is due in May."),
        ('<w:smartTag w:element="date">{}</w:smartTag>', "The fee is due in May."),
        ('<w:customXml w:element="date">{}</w:customXml>', "The fee is due in May."),
        ('<w:fldSimple w:instr="REF x">{}</w:fldSimple>', "The fee is due in May."),
        ('<w:hyperlink w:anchor="x">{}</w:hyperlink>', "The fee is due in May."),
        ('<w:sdt><w:sdtContent><w:ins>{}</w:ins></w:sdtContent></w:sdt>', "The fee is due in May."),
        ('<w:del w:id="1"><w:r><w:delText>due in May</w:delText></w:r></w:del>', "The fee is ."),
        ('<w:moveFrom w:id="1">{}</w:moveFrom>', "The fee is ."),
    ],
)  # fmt: skip
def test_what_wraps_a_run_loses_no_text(wrapped: str, expected: str) -> None:
    inner = wrapped.format(RUN.format("due in May"))
    first = '<w:r><w:t xml:space="preserve">The fee is </w:t></w:r>'
    assert words_of(f"<w:p {_W}>{first}{inner}{RUN.format('.')}</w:p>") == expected


def test_what_wraps_blocks_rows_and_cells_loses_no_text() -> None:
    def p(text: str) -> str:
        return f"<w:p>{RUN.format(text)}</w:p>"

    def sdt(inner: str, more: str = "") -> str:
        return f"<w:sdt {more}><w:sdtContent>{inner}</w:sdtContent></w:sdt>"

    nested = f"<w:tbl><w:tr><w:tc>{p('inner')}</w:tc></w:tr></w:tbl>"
    row = f"<w:tr><w:tc>{sdt(p('cell a'))}</w:tc>{sdt(f'<w:tc>{nested}<w:p/></w:tc>')}</w:tr>"
    box = f"<w:pict><w:txbxContent>{p('boxed')}</w:txbxContent></w:pict>"
    text = words_of(
        sdt(p("controlled"), _W),
        f"<w:tbl {_W}>{sdt(row)}</w:tbl>",
        f"<w:p {_W}><w:r><w:t>around</w:t>{box}</w:r></w:p>",
        f"<w:p {_W}><w:r><w:rPr><w:vanish/></w:rPr><w:t>secret</w:t></w:r></w:p>",
    )
    assert text.split("\n\n") == ["controlled", "cell a | inner", "around", "boxed"]


def test_rows_of_tables_keep_the_names_of_their_columns() -> None:
    rows = [("Harbour", "Fee", "Keeper"), ("Velm", "12 crowns", "Oda"), ("Tarn", "9 crowns", "Ib")]
    document = docx.Document()
    table = document.add_table(0, 3)
    for row in rows:
        for cell, text in zip(table.add_row().cells, row, strict=True):
            cell.text = text
    out = io.BytesIO()
    document.save(out)
    wanted = ["Harbour | Fee | Keeper", "Harbour: Velm | Fee: 12 crowns | Keeper: Oda"]
    assert parse_docx(out.getvalue(), "x", 2**25).text.split("\n\n")[:2] == wanted
    cells = "".join(f"<tr>{''.join(f'<td>{text}</td>' for text in row)}</tr>" for row in rows[1:])
    head = "".join(f"<th>{name}</th>" for name in rows[0])
    html = f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"
    assert parse_html(html.encode(), "x").text.split("\n\n")[:2] == wanted


def test_of_a_page_what_is_hidden_or_navigation_goes() -> None:
    page = """<body><div role=navigation>Contents</div><ul role="menu"><li>File</li></ul>
    <div aria-hidden="true">icon</div><p style="color:red; display : none">gone</p>
    <p style="visibility:hidden">gone</p><p hidden>gone</p><textarea>typed</textarea>
    <h2>Moor&shy;ings<a class="headerlink" href="#m">\u00b6</a></h2><p>Ropes hang by the wall.</p>
    <details><summary>More</summary>Folded text</details></body>"""
    parsed = parse_html(page.encode(), "x.html")
    assert parsed.text == "Moorings\n\nRopes hang by the wall.\n\nMore\n\nFolded text"
    assert [place.label for place in parsed.places] == ['"Moorings"']


def test_hyphens_at_a_lines_end_go_unless_the_word_has_one() -> None:
    text = parse_pdf(
        pdf_bytes(
            [
                "The well-\nknown keeper re-\nturned with an X-\nray of the Anglo-\nSaxon lamp.\n"
                "It took 10-\n20 days of hand-\nmade work. A hand-made lamp is a lan-\ntern."
            ]
        ),
        "x.pdf",
        10**6,
    ).text
    for word in ("well-known", "returned", "X-ray", "Anglo-Saxon", "10-20", "hand-made", "lantern"):
        assert word in text


def _columns(left: list[str], right: list[str]) -> bytes:
    """A page whose columns are drawn line by line across both."""
    pairs = zip(left, right, strict=True)
    rows = "".join(
        f"1 0 0 1 60 {700 - 14 * n} Tm ({a}) Tj 1 0 0 1 320 {700 - 14 * n} Tm ({b}) Tj "
        for n, (a, b) in enumerate(pairs)
    )
    whole = pdf_bytes(["@"])
    before, after = whole.split(b"14 TL 72 720 Td (@) Tj T* ")
    return before + rows.encode() + after  # PDFium mends the lengths


def test_columns_follow_each_other() -> None:
    left = [f"Left line {n} tells of the harbour wall" for n in range(10)]
    right = [f"Right line {n} tells of the lamp room" for n in range(10)]
    text = parse_pdf(_columns(left, right), "x.pdf", 10**6).text
    assert text.index("Left line 9") < text.index("Right line 0")
    assert text.index("Left line 0") < text.index("Left line 1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    book = openpyxl.Workbook()
    sheet = book.active
    sheet.title = "Fees"
    for row in (["Harbour", "Fee"], ["Velm", 12.0], ["Tarn", 9.5]):
        sheet.append(row)
    book.create_sheet("Empty")
    book.save(tmp_path / "fees.xlsx")
    slides = pptx.Presentation()
    slide = slides.slides.add_slide(slides.slide_layouts[1])
    slide.shapes.title.text = "Lamp duty"
    slide.placeholders[1].text = "Trim the wick at dusk."
    slide.notes_slide.notes_text_frame.text = "Ask Oda."
    slides.save(str(tmp_path / "duty.pptx"))
    with zipfile.ZipFile(tmp_path / "tale.epub", "w") as book_file:
        book_file.writestr(
            "META-INF/container.xml",
            '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/p.opf"/></rootfiles></container>',
        )
        book_file.writestr(
            "OEBPS/p.opf",
            '<package xmlns="http://www.idpf.org/2007/opf"><metadata '
            'xmlns:dc="http://purl.org/dc/elements/1.1/"><dc:title>A Tale</dc:title></metadata>'
            '<manifest><item id="b" href="b.xhtml"/><item id="a" href="a%20.xhtml"/></manifest>'
            '<spine><itemref idref="a"/><itemref idref="b"/></spine></package>',
        )
        book_file.writestr("OEBPS/b.xhtml", "<html><body><h1>Two</h1><p>The end.</p></body></html>")
        book_file.writestr("OEBPS/a .xhtml", "<html><body><h1>One</h1><p>Once.</p></body></html>")
    files: dict[str, bytes] = {
        "log.txt.gz": gzip.compress(b"The fog horn failed."),
        "people.csv": b'Name;Post\nOda;keeper\nIb;"cook; baker"\n',
        "rows.csv": b"id,title,text\n7,Bell,The bell is bronze.\n",
        "tree.json": json.dumps({"lamp": {"oil": "whale", "hours": [6, 7]}, "bell": None}).encode(),
        "rows.json": json.dumps([{"id": 3, "text": "The pier is oak."}]).encode(),
        "walk.ipynb": json.dumps(
            {
                "cells": [
                    {"cell_type": "markdown", "source": ["# Tides\n", "How they run."]},
                    {"cell_type": "code", "source": "high()", "outputs": [{"text": ["at noon\n"]}]},
                ],
                "nbformat": 4,
            }
        ).encode(),
        "guide.rst": b"======\nGuide\n======\n\nText.\n\nRopes\n-----\n\nHemp lasts.\n",
        "lamp.py": b'"""Lights the lamp."""\n',
        "map.xml": b"<m><title>Chart</title><s><head>Reefs</head>"
        b"<p>Two <i>sharp</i> reefs.</p></s></m>",
        "old.txt": "Das Boot gehört Jörg, der Käse und Brötchen lädt.".encode("latin-1"),
        "sea.txt": "Маяк стоит на острове, и смотритель живёт там зимой.".encode("cp1251"),
        "wide.txt": "Wide letters".encode("utf-32"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_every_kind_of_file_is_read(folder: Path) -> None:
    documents, log = read(folder)
    texts = {
        "fees.xlsx": "Harbour | Fee\n\nHarbour: Velm | Fee: 12\n\nHarbour: Tarn | Fee: 9.5",
        "duty.pptx": "Lamp duty\nTrim the wick at dusk.\nNotes: Ask Oda.",
        "tale.epub": "One\n\nOnce.\n\nTwo\n\nThe end.",
        "log.txt.gz": "The fog horn failed.",
        "people.csv": "Name | Post\n\nName: Oda | Post: keeper\n\nName: Ib | Post: cook; baker",
        "7": "The bell is bronze.",
        "tree.json": "lamp.oil: whale\nlamp.hours: 6, 7",
        "3": "The pier is oak.",
        "walk.ipynb": "# Tides\nHow they run.\n\nhigh()\nat noon",
        "lamp.py": '"""Lights the lamp."""\n',
        "map.xml": "Chart\n\nReefs\n\nTwo sharp reefs.",
        "old.txt": "Das Boot gehört Jörg, der Käse und Brötchen lädt.",
        "sea.txt": "Маяк стоит на острове, и смотритель живёт там зимой.",
        "wide.txt": "Wide letters",
    }
    assert {id: documents[id].text for id in texts} == texts
    assert {documents[id].title for id in ("tale.epub", "walk.ipynb", "guide.rst", "map.xml")} == {
        "A Tale",
        "Tides",
        "Guide",
        "Chart",
    }
    assert [place.label for place in documents["guide.rst"].places] == ['"Guide"', '"Ropes"']
    assert [place.label for place in documents["tale.epub"].places] == ['"One"', '"Two"']
    assert documents["people.csv"].unit == "row"
    assert log.files == 0
    assert [line.partition(". To do")[0] for line in log.lines] == [
        "old.txt is not UTF-8: read as cp1252 (a guess)",
        "sea.txt is not UTF-8: read as cp1251 (a guess)",
    ]


def test_what_is_left_out_is_counted_by_file_and_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        (tmp_path / f"{number}.bin").write_bytes(b"x")
        (tmp_path / f"page {number}.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "sound.txt").write_text("A text.")
    log = ReadLog(echo=True)
    assert len(list(read_documents(str(tmp_path), log=log))) == 1
    assert log.files == 6
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 2
    assert said[0].startswith("  left out: 3 files (first: 0.bin): nothing here reads ending .bin")
    assert said[1].startswith("  left out: 3 files (first: page 0.pdf) cannot be read as PDF")


def test_a_file_name_that_is_no_text_is_read_and_written_so(tmp_path: Path) -> None:
    for name, text in ((b"caf\xe9.txt", b"One."), (b"two\nlines.txt", b"Two.")):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as stream:
            stream.write(text)
    documents, log = read(tmp_path)
    assert {id: document.text for id, document in documents.items()} == {
        "caf\\xe9.txt": "One.",
        "two\\nlines.txt": "Two.",
    }
    assert not log.lines
    json.dumps([document.uri for document in documents.values()]).encode()


def test_a_damaged_file_of_each_kind_is_one_line(tmp_path: Path) -> None:
    for kind in ("pptx", "xlsx", "epub", "docx", "pdf", "ipynb", "json"):
        (tmp_path / f"cut.{kind}").write_bytes(b"PK\x03\x04 cut off {")
    (tmp_path / "sound.txt").write_text("A text.")
    documents, log = read(tmp_path)
    assert list(documents) == ["sound.txt"]
    assert len(log.lines) == log.files == 7
    assert all("To do: " in line for line in log.lines)


def test_scans_are_read_where_ocr_is_installed() -> None:
    pytest.importorskip("rapidocr")
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (1200, 400), "white")
    font: Any = ImageFont.load_default(60)
    ImageDraw.Draw(picture).text((60, 120), "Harbour dues 1892", fill="black", font=font)
    out = io.BytesIO()
    picture.save(out, "PDF", resolution=150)
    parsed = parse_pdf(out.getvalue(), "scan.pdf", 10**6)
    assert "1892" in parsed.text
    assert [place.label for place in parsed.places] == ["page 1"]
    assert parsed.note == "scan.pdf: 1 of 1 pages are scans, read by OCR (first: page 1)"
