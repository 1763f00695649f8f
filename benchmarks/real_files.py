"""Sixty real files of a dozen kinds: how many are read, and how often a question finds its passage.

Files come from Debian's documentation and from scikit-learn's package; Word files, slides,
spreadsheets, notebooks, books and scans, of which neither has any, are made from their pages.

    python -m benchmarks.real_files [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import docx
import numpy as np
import openpyxl
import pptx

from invar_ray.answering.bm25 import Bm25
from invar_ray.answering.fusion import fuse_lists, fusion_depth
from invar_ray.config import CoarseConfig
from invar_ray.corpus.formats.html import parse_html
from invar_ray.corpus.formats.plain import csv_rows
from invar_ray.corpus.readers import read_documents
from invar_ray.corpus.readlog import ReadLog
from invar_ray.models.encoder import coarse_spec, open_encoder
from invar_ray.models.tiny import minilm_tokenizer
from invar_ray.schema import Hit
from invar_ray.store.artifacts import Store
from invar_ray.text.chunking import chunk_document

DEBIAN = Path("/usr/share/doc")
_PLAIN = """nodejs/api/dgram.md nodejs/api/modules.md nodejs/api/querystring.md nodejs/api/tty.md
nodejs/api/string_decoder.md nodejs/api/punycode.md nodejs/api/path.md nodejs/api/os.md
libffi8/html/The-Basics.html libffi8/html/Size-and-Alignment.html
libffi8/html/Arrays-Unions-Enums.html
libffi8/html/The-Closure-API.html base-passwd/users-and-groups.html python3/python-policy.html
bzip2/manual.html valgrind/html/hg-manual.html valgrind/html/cg-manual.html
valgrind/html/quick-start.html valgrind/html/ms-manual.html valgrind/html/lk-manual.html
libxslt1-dev/html/html/libxslt-security.html libxslt1-dev/html/html/libxslt-keys.html
libxslt1-dev/html/html/libxslt-variables.html libtasn1-doc/libtasn1.pdf
shared-mime-info/shared-mime-info-spec.pdf dpkg/spec/triggers.txt dpkg/spec/rootless-builds.txt
zstd/README.md.gz zstd/CONTRIBUTING.md.gz bzip2/manual.pdf.gz""".split()  # fmt: skip
_SKLEARN = """olivetti_faces.rst rcv1.rst kddcup99.rst california_housing.rst covtype.rst lfw.rst
species_distributions.rst digits.rst linnerud.rst iris.csv wine_data.csv breast_cancer.csv
linnerud_exercise.csv""".split()
# Question, file (or its beginning), words that its passage holds.
QUESTIONS = [
    ("How many subjects are in the Olivetti faces data?", "olivetti", "40 distinct subjects"),
    ("How many samples are in the training set of RCV1?", "rcv1", "first 23149 samples"),
    ("What share of the KDD Cup data is abnormal?", "kddcup99", "(80.1%)"),
    ("From which census does the California housing data come?", "california", "1990 U.S. census"),
    ("How large are the patches of forest in covertype?", "covtype", "patches of forest"),
    ("Which face detector extracted the LFW faces?", "lfw", "Viola-Jones"),
    ("Which rodent lives in Peru and Colombia?", "species", "Rice Rat"),
    ("How many people contributed handwritten digits?", "digits", "total of 43 people"),
    ("Where were the men of the Linnerud data recruited?", "linnerud.docx", "fitness club"),
    ("What does the module node:dgram implement?", "dgram.md", "UDP datagram sockets"),
    ("Which module decodes buffers into strings?", "string_decoder.md", "string_decoder"),
    ("What must be called for variadic functions in libffi?", "The-Basics", "ffi_prep_cif_var"),
    ("How are offsets of struct members found in libffi?", "Size-and", "get_struct_offsets"),
    ("Which tool keeps passwd and group in sync on Debian?", "users-and-groups", "update-passwd"),
    ("Who wrote bzip2?", "manual", "Julian Seward"),
    ("Which tool of Valgrind finds races between threads?", "hg-manual", "Helgrind"),
    ("What does the libxslt security framework restrict?", "xslt-security", "restrict the"),
    ("Which error says that an ASN.1 element is not found?", "libtasn1", "ELEMENT_NOT_FOUND"),
    ("What is the MIME type of a mount point?", "shared-mime", "inode/mount-point"),
    ("What are dpkg triggers?", "triggers.txt", "trigger"),
    ("How can a Debian package be built without root?", "rootless", "Rules-Requires-Root"),
    ("How fast is Zstandard decompression?", "zstd", "decompression speed"),
    ("What is the fee of the harbour of Tarn?", "fees.xlsx", "Harbour: Tarn"),
    ("Who keeps the lamp at Velm?", "keepers.pptx", "Oda"),
    ("When was the breakwater of Velm finished?", "scan.pdf", "breakwater"),
    ("What does Massif measure?", "ms-manual", "heap"),
    ("How is a heap profiler run?", "ms-manual.html", "massif"),
    ("What is Cachegrind?", "cg-manual.html", "Cachegrind"),
    ("Which notebook cell loads the iris table?", "iris.ipynb", "iris.csv"),
    ("What does the quick start of Valgrind say about compiling with -g?", "quick-start", "-g"),
]  # fmt: skip
CHUNK_TOKENS, BEST, DEEP = 128, 3, fusion_depth(3)


def build(folder: Path) -> None:
    """Fill an empty folder."""
    for name in _PLAIN:
        _copy(DEBIAN / name, folder / name)
    spec = find_spec("sklearn.datasets")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-learn is not installed. To do: pip install 'invar-ray[dev]'")
    package = Path(spec.origin).parent
    for name in _SKLEARN:
        kind = {"rst": "descr/", "csv": "data/"}.get(name.rpartition(".")[2], "")
        _copy(package / kind / name, folder / "sklearn" / name)
    _office(folder, package)
    _books(folder)
    _notebooks(folder)
    _scans(folder)
    (folder / "unreadable.odt").write_bytes(b"PK\x03\x04 no reader for this kind")


def _copy(source: Path, target: Path) -> None:
    if not source.exists():
        print(f"  not on this machine: {source}", file=sys.stderr)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    data = source.read_bytes()
    if source.name.endswith(".pdf.gz"):
        target, data = target.with_suffix(""), gzip.decompress(data)
    target.write_bytes(data)


def _page(name: str) -> str:
    return parse_html((DEBIAN / name).read_bytes(), name).text


def _office(folder: Path, package: Path) -> None:
    pages = {
        "massif": _page("valgrind/html/ms-manual.html"),
        "lackey": _page("valgrind/html/lk-manual.html"),
        "linnerud": (package / "descr" / "linnerud.rst").read_text(encoding="utf-8"),
    }
    for name, text in pages.items():
        document = docx.Document()
        for paragraph in text.split("\n\n")[:60]:
            document.add_paragraph(paragraph)
        document.save(str(folder / f"{name}.docx"))
        slides = pptx.Presentation()
        for paragraph in text.split("\n\n")[:10]:
            slide = slides.slides.add_slide(slides.slide_layouts[1])
            slide.placeholders[1].text = paragraph[:400]
        slides.save(str(folder / f"{name}.pptx"))
    keepers = pptx.Presentation()
    slide = keepers.slides.add_slide(keepers.slide_layouts[1])
    slide.shapes.title.text = "Keepers"
    slide.placeholders[1].text = "Oda keeps the lamp at Velm, and Ib the one at Tarn."
    keepers.save(str(folder / "keepers.pptx"))
    tables = {
        name: csv_rows((package / "data" / f"{name}.csv").read_text(encoding="utf-8"))[:60]
        for name in ("iris", "wine_data", "linnerud_exercise")
    }
    tables["fees"] = [["Harbour", "Fee", "Keeper"], ["Velm", "12", "Oda"], ["Tarn", "9", "Ib"]]
    for name, rows in tables.items():
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(folder / f"{name}.xlsx")


def _books(folder: Path) -> None:
    """EPUB files of a manual's pages."""
    for name, pages in {
        "libffi": ("The-Basics", "Size-and-Alignment", "The-Closure-API"),
        "arrays": ("Arrays-Unions-Enums", "Index"),
    }.items():
        items = "".join(f'<item id="{page}" href="{page}.html"/>' for page in pages)
        spine = "".join(f'<itemref idref="{page}"/>' for page in pages)
        with zipfile.ZipFile(folder / f"{name}.epub", "w") as book:
            book.writestr(
                "META-INF/container.xml",
                '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
                '<rootfile full-path="book.opf"/></rootfiles></container>',
            )
            book.writestr(
                "book.opf",
                '<package xmlns="http://www.idpf.org/2007/opf"><metadata/><manifest>'
                f"{items}</manifest><spine>{spine}</spine></package>",
            )
            for page in pages:
                book.write(DEBIAN / f"libffi8/html/{page}.html", f"{page}.html")


def _notebooks(folder: Path) -> None:
    for name in ("iris", "wine_data"):
        cells = [
            {"cell_type": "markdown", "source": [f"# The table {name}\n", "Loads and counts it."]},
            {
                "cell_type": "code",
                "source": [f"rows = open('{name}.csv').readlines()\n", "len(rows)"],
                "outputs": [{"output_type": "execute_result", "data": {"text/plain": ["151"]}}],
            },
        ]
        text = json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
        (folder / f"{name}.ipynb").write_text(text, encoding="utf-8")


def _scans(folder: Path) -> None:
    from PIL import Image, ImageDraw, ImageFont

    texts = {
        "scan": "The breakwater of Velm\nwas finished in 1892.",
        "letter": "Dear keeper, please order\nnew wicks before the winter.",
    }
    for name, text in texts.items():
        picture = Image.new("RGB", (1300, 500), "white")
        draw = ImageDraw.Draw(picture)
        draw.text((60, 120), text, fill="black", font=ImageFont.load_default(60))
        out = io.BytesIO()
        picture.save(out, "PDF", resolution=150)
        (folder / f"{name}.pdf").write_bytes(out.getvalue())


def measure(folder: Path) -> None:
    """Read the folder, ask the questions, and print the table."""
    log = ReadLog()
    documents = list(read_documents(str(folder), log=log))
    files = sum(path.is_file() for path in folder.rglob("*"))
    read = len({document.file for document in documents})
    print(f"{files} files, {read} read, {log.files} left out, {len(documents)} documents")
    for line in log.lines:
        print(f"  {line}")
    tokenizer = minilm_tokenizer()
    passages = [
        passage
        for document in documents
        for passage in chunk_document(document, tokenizer, tokens=CHUNK_TOKENS, stride=CHUNK_TOKENS)
    ]
    with tempfile.TemporaryDirectory() as store:
        encoder = open_encoder(coarse_spec(CoarseConfig()), Store(store))
    matrix = encoder.encode_passages([(each.title, each.text) for each in passages])
    asked = [question for question, _, _ in QUESTIONS]
    scores = encoder.encode_queries(asked) @ matrix.T
    by_words = Bm25([f"{each.title} {each.text}" for each in passages]).search(asked, DEEP)
    found = {"hybrid": 0, "MiniLM": 0, "BM25": 0}
    print("\n| question | place | hybrid | MiniLM | BM25 |\n| --- | --- | --- | --- | --- |")
    for number, (question, file, words) in enumerate(QUESTIONS):
        best = np.argsort(-scores[number], kind="stable")[:DEEP]
        dense = _hits([(int(row), float(scores[number, row])) for row in best])
        by_bm25 = _hits(by_words[number])
        both = fuse_lists(dense, by_bm25, BEST)
        lists = {
            system: [int(hit.passage_id) for hit in hits[:BEST]]
            for system, hits in (("hybrid", both), ("MiniLM", dense), ("BM25", by_bm25))
        }
        ranks = {}
        for system, rows in lists.items():
            hits = [
                rank
                for rank, row in enumerate(rows, start=1)
                if file in passages[row].place
                and words.lower() in " ".join(passages[row].text.lower().split())
            ]
            found[system] += bool(hits)
            ranks[system] = (hits[0], passages[rows[hits[0] - 1]].place) if hits else None
        place = next((each[1] for each in ranks.values() if each), file)
        shown = " | ".join(str(each[0]) if each else "-" for each in ranks.values())
        print(f"| {question} | {place} | {shown} |")
    total = " | ".join(f"{count} of {len(QUESTIONS)}" for count in found.values())
    print(f"| **in the first {BEST} of {len(passages):,} passages** | | {total} |")


def _hits(rows: Iterable[tuple[int, float]]) -> list[Hit]:
    """Numbers of passages with their scores, best first, as hits."""
    return [Hit(str(row), "", rank, score) for rank, (row, score) in enumerate(rows, start=1)]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--folder", type=Path, help="keep the files here; it must not exist")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=arguments.folder is None)
    try:
        build(folder)
        measure(folder)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
