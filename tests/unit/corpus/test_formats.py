"""Each kind of file into one text: nothing that a reader sees is lost, nothing hidden is read."""

from __future__ import annotations

import gzip
import html
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import docx
import openpyxl
import pptx
import pyarrow as pa
import pyarrow.parquet as pq
import pypdf
import pytest
from docx.opc.packuri import PackURI
from docx.opc.part import Part
from docx.oxml import parse_xml
from lxml import etree
from pptx.chart.data import CategoryChartData
from pptx.enum.chart import XL_CHART_TYPE
from pptx.oxml import parse_xml as parse_slide
from pypdf.annotations import FreeText
from pypdf.generic import ArrayObject, DictionaryObject, FloatObject, NameObject, TextStringObject

from invar_ray.corpus.formats.encodings import decoded
from invar_ray.corpus.formats.html import parse_html
from invar_ray.corpus.formats.html import parse_xml as parse_xml_file
from invar_ray.corpus.formats.pdf import parse_pdf
from invar_ray.corpus.formats.plain import parse_notebook
from invar_ray.corpus.formats.word import parse_docx
from invar_ray.corpus.readers import read_documents
from invar_ray.corpus.readlog import ReadLog
from invar_ray.corpus.sources import source_digest
from invar_ray.errors import DataError
from invar_ray.questions.benchmarks import read_benchmark
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
        ("<w:sdt><w:sdtContent><w:ins>{}</w:ins></w:sdtContent></w:sdt>", "The fee is due in May."),
        ('<w:del w:id="1"><w:r><w:delText>due in May</w:delText></w:r></w:del>', "The fee is ."),
        ('<w:moveFrom w:id="1">{}</w:moveFrom>', "The fee is ."),
    ],
)
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


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "sheet", ["a", "@", "@a{b{", "/*", "a,", " ", "}"], ids=lambda text: text.strip() or "blanks"
)
def test_a_style_sheet_of_anything_is_read_in_one_pass(sheet: str) -> None:
    page = f"<style>{sheet * 400_000}</style><p>Mara keeps the light.</p>"
    assert parse_html(page.encode(), "page.html").text == "Mara keeps the light."


def test_rules_inside_others_and_remarks_hide_nothing() -> None:
    sheet = """@import url(x.css); .gone { display: none } /* .a { display: none } */
    @media print { .b { display: none } } .c { color: red } .d .e { display: none }"""
    shown = "".join(f"<p class={name}>{name}</p>" for name in ("gone", "a", "b", "c", "d", "e"))
    page = f"<style>{sheet}</style>{shown}"
    assert parse_html(page.encode(), "page.html").text.split() == ["a", "b", "c", "d", "e"]


def test_pages_within_pages_end_somewhere() -> None:
    page = "<p>innermost</p>"
    for level in range(600):
        page = f'<p>{level}</p><iframe srcdoc="{html.escape(page)}"></iframe>'
    assert parse_html(page.encode(), "page.html").text.split() == [
        "599",
        "598",
        "597",
        "596",
        "595",
    ]


def test_a_charset_of_python_s_own_is_none() -> None:
    page = "<meta charset=unicode_escape><p>caf\xe9 C:\\new</p>".encode("cp1252")
    assert parse_html(page, "page.html").text == "caf\xe9 C:\\new"


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
        (tmp_path / f"{number}.dat").write_bytes(b"x")
        (tmp_path / f"page {number}.pdf").write_bytes(b"%PDF-1.4")
    (tmp_path / "sound.txt").write_text("A text.")
    log = ReadLog(echo=True)
    assert len(list(read_documents(str(tmp_path), log=log))) == 1
    assert log.files == 9
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(said) == 3
    assert sum(".docx, .pptx" in line for line in said) == 1  # what can be read, once
    assert said[0].startswith("  left out: 3 files (first: 0.bin): nothing here reads ending .bin")
    assert said[2].startswith("  left out: 3 files (first: page 0.pdf) cannot be read as PDF")


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


def test_folders_and_files_of_rows_with_names_that_are_no_text_are_read(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"d\xe9")
    os.mkdir(folder)
    pq.write_table(pa.table({"text": ["A row."]}), tmp_path / "x")
    os.rename(tmp_path / "x", os.path.join(folder, b"\xe8.parquet"))
    with open(os.path.join(folder, b"\xff.jsonl"), "wb") as stream:
        stream.write(b'{"question": "Who?", "answer": ["Oda"]}\n')
    named = os.fsdecode(folder)
    rows = read_documents(f"{named}/" + os.fsdecode(b"\xe8.parquet"))
    assert [document.text for document in rows] == ["A row."]
    (found,) = read_benchmark(f"{named}/" + os.fsdecode(b"\xff.jsonl")).examples
    assert found.question == "Who?"
    assert len(source_digest(named)) == len(source_digest(str(tmp_path))) == 16


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


def _boxed(text: str) -> str:
    """A text box as Word writes it: in the new form and, beside it, in the old one."""
    box = f"<w:txbxContent><w:p><w:r><w:t>{text}</w:t></w:r></w:p></w:txbxContent>"
    return (
        f"<w:p {_W} {_MC}><w:r><mc:AlternateContent><mc:Choice Requires='wps'>{box}</mc:Choice>"
        f"<mc:Fallback><w:pict>{box}</w:pict></mc:Fallback></mc:AlternateContent></w:r></w:p>"
    )


_MC = 'xmlns:mc="http://schemas.openxmlformats.org/markup-compatibility/2006"'
_DIAGRAM = (
    b'<d:dataModel xmlns:d="http://schemas.openxmlformats.org/drawingml/2006/diagram" '
    b'xmlns:a="http://schemas.openxmlformats.org/drawingml/2006/main"><d:pt><a:p><a:r>'
    b"<a:t>Keel before mast</a:t></a:r></a:p></d:pt></d:dataModel>"
)
_RELATIONS = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"


def test_of_a_word_file_parts_of_their_own_are_read_once() -> None:
    """Old and new forms of a box, files within the file, diagrams, formulas, words along a line."""
    document = docx.Document()
    body = document.element.body
    math = "http://schemas.openxmlformats.org/officeDocument/2006/math"
    package = document.part.package
    page = Part(PackURI("/word/p.html"), "text/html", b"<p>A page within</p>", package)
    odd = Part(PackURI("/word/p.rtf"), "application/rtf", b"{\\rtf1}", package)
    drawn = Part(PackURI("/word/diagrams/data1.xml"), "application/xml", _DIAGRAM, package)
    ids = [
        document.part.relate_to(part, f"{_RELATIONS}/{kind}")
        for part, kind in ((page, "aFChunk"), (odd, "aFChunk"), (drawn, "diagramData"))
    ]
    for xml in (
        _boxed("In both forms"),
        f"<w:p {_W} {_MC}><w:r><mc:AlternateContent><mc:Choice Requires='x'/><mc:Fallback>"
        "<w:t>In the old form alone</w:t></mc:Fallback></mc:AlternateContent></w:r></w:p>",
        f'<w:p {_W} xmlns:m="{math}"><m:oMath><m:r><m:t>a+b</m:t></m:r></m:oMath></w:p>',
        f'<w:p {_W} xmlns:v="urn:schemas-microsoft-com:vml"><w:r><w:pict><v:textpath '
        'string="Along a line"/></w:pict></w:r></w:p>',
        f'<w:p {_W}><w:r><w:ffData><w:ddList><w:result w:val="1"/><w:listEntry w:val="red"/>'
        '<w:listEntry w:val="green"/></w:ddList></w:ffData></w:r></w:p>',
        f"<w:p {_W}><w:pPr><w:rPr><w:del w:id='1'/></w:rPr></w:pPr><w:r><w:t>One par</w:t></w:r>"
        "</w:p>",
        f"<w:p {_W}><w:r><w:t>agraph.</w:t></w:r></w:p>",
        f'<w:altChunk {_W} xmlns:r="{_RELATIONS}" r:id="{ids[0]}"/>',
        f'<w:altChunk {_W} xmlns:r="{_RELATIONS}" r:id="{ids[1]}"/>',
        f'<w:p {_W} xmlns:r="{_RELATIONS}" xmlns:d="urn:d"><w:r><d:relIds r:dm="{ids[2]}"/></w:r>'
        "</w:p>",
    ):
        body.insert(-1, parse_xml(xml))
    out = io.BytesIO()
    document.save(out)
    parsed = parse_docx(out.getvalue(), "x.docx", 2**25)
    assert parsed.text.split("\n\n") == [
        "In both forms",
        "In the old form alone",
        "a+b",
        "Along a line",
        "green",
        "One paragraph.",
        "A page within",
        "Keel before mast",
    ]
    assert parsed.note == "x.docx: 1 files within it are not read"


def _holding(inner: bytes, times: int, text: str) -> bytes:
    """A Word file that names another one so many times."""
    document = docx.Document()
    document.add_paragraph(text)
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    part = Part(PackURI("/word/inner.docx"), kind, inner, document.part.package)
    id = document.part.relate_to(part, f"{_RELATIONS}/aFChunk")
    for _ in range(times):
        chunk = f'<w:altChunk {_W} xmlns:r="{_RELATIONS}" r:id="{id}"/>'
        document.element.body.insert(-1, parse_xml(chunk))
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


@pytest.mark.timeout(60)
def test_word_files_within_word_files_end_somewhere() -> None:
    data = _holding(b"", 0, "level 0")
    for level in range(1, 5):
        data = _holding(data, 200, f"level {level}")  # 200 ** 4 times the innermost
    parsed = parse_docx(data, "x.docx", 2**25)
    assert parsed.text.split("\n\n") == ["level 4", *["level 3"] * 200]
    with pytest.raises(DataError, match="the files within it hold more than"):
        parse_docx(_holding(_holding(b"", 0, "x" * 9000), 200, ""), "x.docx", 2**20)


def test_of_slides_and_sheets_what_is_drawn_is_read(tmp_path: Path) -> None:
    slides = pptx.Presentation()
    slide = slides.slides.add_slide(slides.slide_layouts[6])
    box = slide.shapes.add_textbox(0, 0, 1, 1)
    box.text_frame.text = "Wrapped in two forms"
    place = box.element.getparent()
    wrapped = parse_slide(
        f"<mc:AlternateContent {_MC}><mc:Choice/><mc:Fallback/></mc:AlternateContent>"
    )
    place.append(wrapped)
    wrapped[0].append(box.element)
    wrapped[1].append(parse_slide(etree.tostring(box.element)))
    data = CategoryChartData()
    data.categories = ["Velm", "Tarn"]
    data.add_series("Fee", (12, 9.5))
    chart = slide.shapes.add_chart(XL_CHART_TYPE.COLUMN_CLUSTERED, 0, 0, 9, 9, data).chart
    chart.has_title = True
    chart.chart_title.text_frame.text = "Harbour fees"
    group = slide.shapes.add_group_shape().shapes.add_group_shape()
    group.shapes.add_textbox(0, 0, 1, 1).text_frame.text = "Deep in groups"
    slides.save(str(tmp_path / "a.pptx"))
    book = openpyxl.Workbook()
    book.active.append(["Oda", 3])
    bars = openpyxl.chart.BarChart()
    bars.title = "Watches a week"
    book.active.add_chart(bars, "D1")
    book.save(tmp_path / "b.xlsx")
    documents, log = read(tmp_path)
    assert documents["a.pptx"].text.split("\n") == [
        "Wrapped in two forms",
        "Harbour fees",
        "Fee",
        "Velm | Fee: 12",
        "Tarn | Fee: 9.5",
        "Deep in groups",
    ]
    assert documents["b.xlsx"].text == "Oda | 3\n\nWatches a week"
    assert not log.lines


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (
            "<table><caption>Dues</caption><tr><th>A<th>B<tr><td>1<td>2</table>",
            "Dues\n\nA | B\n\nA: 1 | B: 2",
        ),
        (
            "<table><tr><td>a<td>b<tr hidden><td>x<td>y<tr><td>c<td hidden>d<td>e</table>",
            "a | b\n\nc | e",
        ),
        ("<p>so <math><mi>E</mi><mo>=</mo><mfrac><mn>1</mn><mn>2</mn></mfrac></math>", "so E=1/2"),
        ("<svg><title>icon</title><text>Reef</text><text>Pier</text></svg>", "Reef\n\nPier"),
        (
            "<x-a><template shadowrootmode=open><p>Shown</template></x-a><template>Not</template>",
            "Shown",
        ),
        ("<iframe srcdoc='&lt;p&gt;A page within'>old browsers</iframe>", "A page within"),
        (
            "<h2><button>Opening hours</button></h2><p>At nine.<button>Buy</button>",
            "Opening hours\n\nAt nine.",
        ),
        (
            "<nav><p>" + "This was never closed. " * 12 + "</p>",
            "This was never closed. " * 11 + "This was never closed.",
        ),
        ("<nav><ul><li><a href=x>Home</a></ul></nav><p>Text", "Text"),
        ("<div hidden=until-found>Found by search</div><dialog>Later</dialog>", "Found by search"),
        ("<style>.no,#x{display:none}</style><p class='a no'>A<p id=x>B<p>C", "C"),
        (
            "<style>.t{display:none}.t.on{display:block}</style><p class=t>A<p class='t on'>B",
            "A\n\nB",
        ),
        ("<style>@media print{.p{display:none}}</style><p class=p>A", "A"),
        ("<p style='opacity: 0'>A<p style='opacity:0.5'>B", "B"),
        ("<p style='font-size:0'>A<p style='font-size:0.9em'>B", "B"),
        ("<p>break<wbr>able", "breakable"),
    ],
)
def test_of_a_page_what_is_seen_is_read(page: str, text: str) -> None:
    assert parse_html(page.encode(), "x.html").text == text


@pytest.mark.parametrize(
    ("declared", "encoding", "text", "says"),
    [
        ('<meta charset="utf-8">', "latin-1", "Jörg lädt Käse", ""),
        ('<meta charset="gb2312">', "utf-8", "Jörg", ""),
        ('<meta charset="iso-8859-1">', "cp1252", "it’s 5 €", ""),
        (
            '<meta http-equiv="x" content="text/html; charset=Shift_JIS">',
            "cp932",
            "灯台",
            "",
        ),
        ('<?xml version="1.0" encoding="iso-8859-2"?>', "iso8859_2", "Łódź", ""),
        ("", "cp1251", "Маяк стоит на острове", "cp1251"),
        ("", "utf-16-le", "The lamp is lit.", "utf-16-le"),
        ("<meta charset=nonsense>", "latin-1", "café", ""),
    ],
)
def test_a_page_is_read_in_what_it_is_written_in(
    declared: str, encoding: str, text: str, says: str
) -> None:
    parsed = parse_html(f"{declared}<p>{text}</p>".encode(encoding), "x.html")
    assert parsed.text == text
    assert parsed.note == "" if not says else f"read as {says} (a guess)" in parsed.note


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("koi8_r", "Смотритель живёт там зимой."),
        ("cp866", "Смотритель живёт там зимой."),
        ("iso8859_2", "Strażnik mieszka w latarni; śpi źle."),
        ("cp1250", "Věž střeží přístav už přes století."),
        ("cp1254", "Kışın bekçi orada yaşıyor, ışığı yakıyor."),
        ("cp1255", "השומר גר שם בחורף."),
        ("cp1257", "Švyturio sargas ten gyvena žiemą."),
        ("mac_roman", "Der Wärter lädt fünf Körbe, größer als üblich."),
        ("cp437", "Der Wärter lädt fünf Körbe."),
        ("cp1252", "Open 9\u201317 daily \u2014 it\u2019s free."),
        ("gbk", "守塔人住在那里。"),
        ("big5", "守塔人住在那裡。"),
        ("cp949", "등대지기는 겨울에 거기 산다."),
        ("euc_jp", "灯台守は冬もそこに住む。"),
        ("iso2022_jp", "灯台守は冬もそこに住む。"),
        ("utf-16-le", "The keeper lives there."),
        ("utf-16-be", "灯台守は冬もそこに住む。"),
        ("utf-32-le", "The keeper lives there."),
    ],
)
def test_a_text_in_an_older_encoding_is_guessed_by_its_letters(encoding: str, text: str) -> None:
    found, note = decoded(text.encode(encoding), "x.txt")
    assert found == text
    assert "(a guess)" in note


def test_a_few_damaged_bytes_do_not_cost_a_text() -> None:
    sound = "Ōsaka lies by the sea. " * 20
    found, note = decoded(sound.encode() + "A café.".encode("latin-1") + b"\xff", "x.txt")
    assert found == sound + "A café.ÿ"
    assert "UTF-8 but for its damaged bytes (a guess)" in note
    assert decoded(b"\x1b[31mred\x1b[0m\xed\xa0\xbd\xed\xb8\x80", "x.txt")[0] == "red\U0001f600"


def test_forms_and_notes_of_a_pdf_are_read() -> None:
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf_bytes(["Entry form"])))
    writer.add_annotation(0, FreeText(text="Paid in full", rect=(9, 9, 99, 99)))
    kinds = (("/Tx", TextStringObject("Oda Lind")), ("/Btn", NameObject("/Off")))
    for kind, value in kinds:
        field = DictionaryObject(
            {
                NameObject("/Subtype"): NameObject("/Widget"),
                NameObject("/FT"): NameObject(kind),
                NameObject("/V"): value,
                NameObject("/Rect"): ArrayObject([FloatObject(each) for each in (9, 9, 99, 99)]),
            }
        )
        writer.pages[0][NameObject("/Annots")].append(writer._add_object(field))
    out = io.BytesIO()
    writer.write(out)
    parsed = parse_pdf(out.getvalue(), "form.pdf", 10**6)
    assert parsed.text.split("\n") == ["Entry form", "Paid in full", "Oda Lind"]


def test_outputs_of_a_notebook_that_are_no_plain_text_are_read() -> None:
    cell = {
        "cell_type": "code",
        "source": "table",
        "outputs": [
            {"data": {"text/html": "<table><tr><td>Velm<td>12<tr><td>Tarn<td>9</table>"}},
            {"data": {"text/markdown": "*Low water*", "text/plain": ""}},
            {
                "data": {
                    "text/html": "<b>bold</b>",
                    "text/plain": "<IPython.core.display.HTML object>",
                }
            },
            {"output_type": "error", "ename": "KeyError", "evalue": "'lamp'", "traceback": []},
        ],
    }
    text = parse_notebook(json.dumps({"cells": [cell]}).encode(), "x.ipynb").text
    wanted = ["table", "Velm | 12", "", "Tarn | 9", "*Low water*", "bold", "KeyError: 'lamp'"]
    assert text.split("\n") == wanted


def test_blocks_of_xml_do_not_run_together() -> None:
    data = b"<m><sec><p>One.</p>Between.<p>Two <b>bo</b>ld.</p></sec></m>"
    assert parse_xml_file(data, "x.xml").text == "One. Between. Two bold."
