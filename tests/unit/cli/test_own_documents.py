"""A folder of one's own: every kind of file becomes text with places; what cannot be read costs a
line, no more.
"""

from __future__ import annotations

import io
import os
import shutil
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from invar_ray.cli.documents import choose_adapter
from invar_ray.corpus.formats.html import parse_html
from invar_ray.corpus.formats.word import parse_docx
from invar_ray.corpus.readers import read_documents
from invar_ray.corpus.readlog import ReadLog
from invar_ray.corpus.sources import source_digest
from invar_ray.errors import ArtifactError, DataError
from invar_ray.pipeline import Pipeline
from invar_ray.schema import Document, Place
from invar_ray.steps.passages import load_passages, load_skipped
from invar_ray.text.chunking import chunk_document
from invar_ray.text.places import PlaceFinder
from tests.own_documents import (
    QUESTIONS,
    SOUND_DOCUMENTS,
    SOUND_FILES,
    docx_bomb,
    docx_bytes,
    encrypted_pdf,
    pdf_bytes,
    write_faulty,
    write_sound,
)
from tests.support import World, small_config, tiny_base
from tests.unit.steps.test_passages import build


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder with its faulty files, and what must be said of them."""
    folder = tmp_path_factory.mktemp("my docs")
    write_sound(folder)
    return folder, write_faulty(folder)


@pytest.fixture(scope="module")
def read(mixed: tuple[Path, dict[str, str]]) -> tuple[dict[str, Document], list[str]]:
    log = ReadLog()
    return {document.id: document for document in read_documents(str(mixed[0]), log=log)}, log.lines


def test_all_sound_documents_are_read(read: tuple[dict[str, Document], list[str]]) -> None:
    found = [document for document in read[0].values() if not document.file.startswith("bad/")]
    assert len(found) == SOUND_DOCUMENTS
    assert len({document.file for document in found}) == SOUND_FILES
    # its neighbours in the file are malformed
    assert read[0]["r1"].text == "A sound row about larches."
    for document in read[0].values():
        assert document.uri.removesuffix("#L1").startswith("/") or document.uri == ""
        assert list(document.places) == sorted(document.places, key=lambda place: place.start)


def test_texts_and_titles(read: tuple[dict[str, Document], list[str]]) -> None:
    titles = {id: document.title for id, document in read[0].items()}
    assert titles["arvon.pdf"] == "Arvon: an island"
    assert titles["boats/belisk.pdf"] == "belisk"  # what the word processor wrote is no title
    assert titles["manual.docx"] == "Espresso machine manual"
    assert titles["policies/leave.md"] == "Leave rules"  # front matter
    assert titles["policies/travel.md"] == "Travel"
    assert titles["site/errors.html"] == "Error codes"
    assert titles["site/visit.htm"] == "Visit us"
    assert titles["nameless.jsonl#L1"] == ""
    assert "built by Ada Morvane after" in read[0]["arvon.pdf"].text  # a hyphen at the line's end
    assert "Water tank | holds 1.8 litres" in read[0]["manual.docx"].text
    assert "behind the café." in read[0]["site/visit.htm"].text  # Windows-1252, undeclared
    assert "the door is open." in read[0]["site/errors.html"].text
    assert not {"Home", "hidden", "p{}"} & set(read[0]["site/errors.html"].text.split())
    assert "a\n  b" in read[0]["site/shop.xhtml"].text
    assert "simmers for ninety" in read[0]["recipes/soup.txt"].text  # UTF-16
    # encrypted with an empty password
    assert read[0]["boats/open.pdf"].text.startswith("Dunmore lends")


def test_every_fault_is_one_line(
    mixed: tuple[Path, dict[str, str]], read: tuple[dict[str, Document], list[str]]
) -> None:
    lines = read[1]
    assert len(lines) == len(mixed[1])
    for name, message in mixed[1].items():
        [line] = [line for line in lines if name in line]
        assert message in line
        assert str(mixed[0]) not in line
        assert "\n" not in line
    [rows] = [line for line in lines if "rows.jsonl" in line]
    assert rows.startswith("2 of 3 rows of bad/rows.jsonl")


def test_a_file_that_was_named_itself_raises(mixed: tuple[Path, dict[str, str]]) -> None:
    for name in (
        "locked.pdf",
        "scan.pdf",
        "empty.txt",
        "large.txt",
        "broken.docx",
        "rows.jsonl",
        "noise.txt",
    ):
        place = mixed[0] / "bad" / name
        with pytest.raises(DataError) as caught:
            list(read_documents(str(place), log=ReadLog()))
        assert str(place) in str(caught.value)


def test_nothing_readable_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    (tmp_path / "b.pdf").write_bytes(encrypted_pdf(["x"], "user"))
    with pytest.raises(
        DataError, match=r"is empty: of its 2 files none could be read \(first: a.txt is empty"
    ):
        list(read_documents(str(tmp_path), log=ReadLog()))


def test_an_unreadable_file_and_folder(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # the other user must get in
    try:
        (folder / "shut").mkdir()
        (folder / "secret.txt").write_text("secret")
        (folder / "open.txt").write_text("open")
        folder.chmod(0o755)
        (folder / "secret.txt").chmod(0)
        (folder / "shut").chmod(0)
        log = ReadLog()
        as_root = os.geteuid() == 0
        if as_root:
            os.seteuid(65534)
        try:
            found = [document.id for document in read_documents(str(folder), log=log)]
            digest = source_digest(str(folder))
        finally:
            if as_root:
                os.seteuid(0)
        assert found == ["open.txt"]
        assert len(digest) == 16
        assert log.lines == [
            "shut/ cannot be listed (Permission denied). To do: check its rights.",
            "secret.txt cannot be read (Permission denied). To do: check address and rights.",
        ]
    finally:
        (folder / "shut").chmod(0o755)
        shutil.rmtree(folder)


def test_links_are_followed_once_and_own_results_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    (folder / "z").mkdir(parents=True)
    (folder / "z" / "one.txt").write_text("one")
    (folder / "a").symlink_to("z", target_is_directory=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "two.txt").write_text("two")
    (folder / "out").symlink_to(tmp_path / "outside", target_is_directory=True)
    (folder / "runs").mkdir()
    (folder / "runs" / "skipped.txt").write_text("an artifact")
    log = ReadLog()
    found = [d.id for d in read_documents(str(folder), log=log, exclude=str(folder / "runs"))]
    assert found == ["out/two.txt", "z/one.txt"]
    assert log.lines == ["a leads to a folder that is read already (a link). To do: nothing."]
    before = source_digest(str(folder), exclude=str(folder / "runs"))
    (folder / "runs" / "skipped.txt").write_text("another")
    assert source_digest(str(folder), exclude=str(folder / "runs")) == before


def test_rows_have_a_limit_too(tmp_path: Path) -> None:
    long = "x" * 4000
    (tmp_path / "rows.jsonl").write_text(f'{{"text": "{long}"}}\n{{"text": "short"}}\n')
    log = ReadLog()
    found = list(read_documents(str(tmp_path), max_file_mb=2000 / 2**20, log=log))
    assert [document.text for document in found] == ["short"]
    assert found[0].places == (Place(0, "row 2"),)
    assert "1 of 2 rows of rows.jsonl (first: rows.jsonl, line 1 has 0.0 MB or more" in log.lines[0]


def test_a_surrogate_in_a_row_does_not_stop_the_writing(tmp_path: Path) -> None:
    place = tmp_path / "rows.jsonl"
    place.write_text('{"id": "a", "text": "half \\ud83d of a pair, whole \\ud83d\\ude00"}\n')
    [document] = read_documents(str(place))
    assert document.text == "half \ufffd of a pair, whole \U0001f600"
    build(small_config(tmp_path, f"corpus.uri={place}"))


# Bombs


def test_a_word_file_that_unpacks_to_too_much_is_refused_before_it_does() -> None:
    bomb = docx_bomb(5)
    assert len(bomb) < 200_000
    assert parse_docx(bomb, "b.docx", 32 << 20).title == "Espresso machine manual"
    with pytest.raises(DataError, match=r"would unpack to [56] MB"):
        parse_docx(bomb, "b.docx", 2 << 20)


def test_entities_do_not_expand() -> None:
    lines = [
        '<!ENTITY a0 "lol">',
        *(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 10)),
    ]
    doctype = f"<!DOCTYPE x [{''.join(lines)}]>"
    page = parse_html(
        f"{doctype}<html><body><p>before &a9; after</p></body></html>".encode(), "x.html"
    )
    assert len(page.text) < 2000
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(docx_bytes())) as source, zipfile.ZipFile(out, "w") as archive:
        for part in source.infolist():
            content = source.read(part).decode("utf-8", "surrogateescape")
            if part.filename == "word/document.xml":
                head, body = content.split("?>", 1)
                content = (
                    f"{head}?>{doctype}{body.replace('The machine has', 'The machine &a9; has')}"
                )
            archive.writestr(part.filename, content.encode("utf-8", "surrogateescape"))
    try:
        found = parse_docx(out.getvalue(), "x.docx", 32 << 20).text
    except DataError as error:  # recent releases of libxml2 refuse it altogether
        found = str(error)
    assert len(found) < 2000


def test_html_is_read_however_deep_or_broken_it_is() -> None:
    deep = parse_html(b"<p>top" + b"<div>" * 5000 + b"bottom", "x.html")
    assert deep.text.startswith("top")
    assert parse_html(b"<p>a<b>b</p>c<li>d &amp; e &nbsp;f", "x.html").text == "ab\n\nc\n\nd & e f"
    assert parse_html(b"", "x.html").text == ""


# Places


@pytest.mark.parametrize(
    ("start", "end", "place"),
    [
        (0, 5, "a.md, line 1"),
        (3, 9, 'a.md, "One", lines 1-2'),
        (8, 18, 'a.md, "One", lines 2-4'),
        (8, 25, 'a.md, "One" to "Two", lines 2-6'),
        (21, 25, 'a.md, "Two", line 6'),
    ],
)
def test_places_of_spans(start: int, end: int, place: str) -> None:
    text = "intro:\n# One\n\nText\n\n# Two\n"
    document = Document("a", "", text, "", "a.md", (Place(7, '"One"'), Place(20, '"Two"')), "line")
    assert PlaceFinder(document).of(start, end) == place


def test_pages_make_a_range_and_documents_without_file_have_no_place() -> None:
    pages = (Place(0, "page 1"), Place(10, "page 2"))
    assert (
        PlaceFinder(Document("a", "", "x" * 20, "", "a.pdf", pages)).of(5, 15) == "a.pdf, pages 1-2"
    )
    assert PlaceFinder(Document("a", "", "x" * 20, "", "", pages)).of(5, 15) == ""


def test_passages_keep_to_their_page_once_they_are_a_quarter_full() -> None:
    page = "The harbour was dug by hand. It took nine years to dig it. "
    text = page * 3
    places = tuple(Place(len(page) * n, f"page {n + 1}") for n in range(3))
    document = Document("a", "", text, "", "a.pdf", places)
    kept = chunk_document(document, tiny_base()[1], tokens=40, stride=40)
    assert [passage.place for passage in kept] == [
        "a.pdf, page 1",
        "a.pdf, page 2",
        "a.pdf, page 3",
    ]
    large = chunk_document(document, tiny_base()[1], tokens=200, stride=200)
    assert [passage.place for passage in large] == ["a.pdf, pages 1-3"]
    plain = chunk_document(Document("a", "", text), tiny_base()[1], tokens=40, stride=40)
    assert len(plain) < len(kept)


def test_long_documents_are_cut_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    document = Document("a", "", "The harbour was dug by hand in 1841. " * 40)
    whole = chunk_document(document, tiny_base()[1], tokens=32, stride=32)
    monkeypatch.setattr("invar_ray.text.chunking._SLICE_CHARS", 100)
    assert chunk_document(document, tiny_base()[1], tokens=32, stride=32) == whole


def test_the_passages_artifact_says_what_was_left_out(
    mixed: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    artifact = build(small_config(tmp_path, f"corpus.uri={mixed[0]}"))
    assert artifact.info["source"] == str(mixed[0])
    assert artifact.info["files"] == SOUND_FILES + 1
    assert artifact.info["documents"] == SOUND_DOCUMENTS + 1
    # A file of which rows are malformed is not left out.
    assert artifact.info["skipped"] == len(load_skipped(artifact)) - 1 == len(mixed[1]) - 1
    places = [passage.place for passage in load_passages(artifact)]
    for file, place in QUESTIONS.values():
        assert any(found.startswith(f"{file}, ") and place in found for found in places), (
            file,
            place,
        )


def test_pages_without_text_do_not_shift_the_others(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_bytes(pdf_bytes(["one", "", "three"]))
    [document] = read_documents(str(tmp_path / "a.pdf"))
    assert document.places == (Place(0, "page 1"), Place(5, "page 3"))
    assert document.text[5:] == "three"


def test_documents_are_indexed_with_the_newest_adapter_that_fits(tmp_path: Path) -> None:
    small = World(tmp_path)
    pipeline = Pipeline(small.config, quiet=True)
    assert choose_adapter(pipeline, None) is None
    first = small.make_adapter("first", seed=1)
    found = choose_adapter(pipeline, None)
    assert found is not None
    assert found.ref == first.ref
    other = Pipeline(
        replace(small.config, model=replace(small.config.model, query_prefix="ask: ")), quiet=True
    )
    # its vectors of questions would not be those of the adapter
    assert choose_adapter(other, None) is None
    assert choose_adapter(pipeline, "base") is None
    named = choose_adapter(pipeline, first.uri)
    assert named is not None
    assert named.ref == first.ref
    with pytest.raises(ArtifactError, match="retriever"):
        choose_adapter(pipeline, small.base_artifact.uri)
