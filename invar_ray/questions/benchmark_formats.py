"""The readers behind :mod:`invar_ray.questions.benchmarks`: one function a format, a place for each
question.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from invar_ray.corpus.json_places import as_object, json_entries, json_members
from invar_ray.corpus.rows import json_row, kind_of
from invar_ray.corpus.storage import InputFile, find_files, read_lines
from invar_ray.errors import DataError
from invar_ray.schema import Document, Example

Item = tuple[str, Example | DataError | None, Sequence[Document]]
"""Where it stands, the question (``None`` where only documents came, an error where the row is
faulty), the documents that came with it.
"""

_ENDING = re.compile(r"(\.(jsonl?|ndjson|tsv|csv|gz|zst))+$", re.IGNORECASE)
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()"]+))\)')


# One function a format.


def _each(
    rows: Iterable[tuple[str, Any]], items: Callable[[int, str, Any], Iterable[Item]]
) -> Iterator[Item]:
    """What each row holds; of a faulty one its fault, so that one of them need not end a set."""
    for number, (place, row) in enumerate(rows):
        try:
            yield from items(number, place, row)
        except DataError as error:
            yield place, error, ()


def plain(file: InputFile) -> Iterator[Item]:
    """The project's own form."""

    def items(number: int, place: str, line: bytes) -> Iterator[Item]:
        row = json_row(line, place)
        rewrites = _texts(row, "rewrites", place) if row.get("rewrites") is not None else ()
        answers, positives = _texts(row, "answers", place), _texts(row, "positive_ids", place)
        question = _text(row, "question", place)
        yield place, Example(_text(row, "id", place), question, answers, positives, rewrites), ()

    return _each(_lines(file), items)


def nq_open(file: InputFile) -> Iterator[Item]:
    """``{question, answer[]}`` a line."""

    def items(number: int, place: str, line: bytes) -> Iterator[Item]:
        row = json_row(line, place)
        id = _text(row, "id", place) if row.get("id") is not None else _counted(file, number)
        yield (
            place,
            Example(id, _text(row, "question", place), _texts(row, "answer", place), ()),
            (),
        )

    return _each(_lines(file), items)


def dpr_qa(file: InputFile) -> Iterator[Item]:
    """``question<TAB>['answer', ..]`` a line; the list is a Python literal."""

    def items(number: int, place: str, line: bytes) -> Iterator[Item]:
        cells = _cells(line, place)
        if len(cells) != 2:
            raise DataError(
                f"{place}: {len(cells)} columns", expected="2: the question and its list of answers"
            )
        try:
            answers = ast.literal_eval(cells[1])
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise DataError(
                f"{place}: the answers {cells[1][:80]!r} are no list", expected="['..', ..]"
            ) from error
        row = {"question": cells[0], "answers": answers}
        question, given = _text(row, "question", place), _texts(row, "answers", place)
        yield place, Example(_counted(file, number), question, given, ()), ()

    return _each(_lines(file), items)


def triviaqa(file: InputFile) -> Iterator[Item]:
    """TriviaQA's own files; gold answers are the value, its aliases and human answers."""

    def items(number: int, place: str, row: dict[str, Any]) -> Iterator[Item]:
        answer = as_object(row.get("Answer"), f"{place}, Answer")
        texts = [_text(answer, "Value", place)]
        for name in ("Aliases", "HumanAnswers"):
            texts += _texts(answer, name, place) if answer.get(name) is not None else ()
        answers = tuple(dict.fromkeys(text for text in texts if text.strip()))
        question = _text(row, "Question", place)
        yield place, Example(_text(row, "QuestionId", place), question, answers, ()), ()

    return _each(json_members(file, "Data"), items)


def popqa(file: InputFile) -> Iterator[Item]:
    """PopQA's table; ``possible_answers`` is a JSON list."""
    rows = _lines(file)
    header = next((_cells(line, place) for place, line in rows), [])
    for name in ("id", "question", "possible_answers"):
        if name not in header:
            raise DataError(
                f"{file.uri}, line 1: the column {name!r} is missing",
                expected=f"it among {header[:20]}",
            )

    def items(number: int, place: str, line: bytes) -> Iterator[Item]:
        cells = _cells(line, place)
        if len(cells) != len(header):
            raise DataError(
                f"{place}: {len(cells)} columns", expected=f"{len(header)}, as in the header"
            )
        row: dict[str, Any] = dict(zip(header, cells, strict=True))
        try:
            row["possible_answers"] = json.loads(row["possible_answers"])
        except json.JSONDecodeError as error:
            raise DataError(
                f"{place}: possible_answers is not JSON ({error.msg})", expected='["..", ..]'
            ) from error
        answers = _texts(row, "possible_answers", place)
        question = _text(row, "question", place)
        yield place, Example(_text(row, "id", place), question, answers, ()), ()

    yield from _each(rows, items)


def squad(file: InputFile) -> Iterator[Item]:
    """SQuAD 1.1 and 2.0; questions of 2.0 that cannot be answered are left out (their answers would
    be blank).
    """
    counts: dict[str, int] = {}

    def articles(number: int, at: str, article: dict[str, Any]) -> Iterator[Item]:
        base = _title(article) or _counted(file, number)
        given = [
            (f"{at}.paragraphs[{p}]", (base, _title(article), paragraph))
            for p, paragraph in enumerate(_list(article, "paragraphs", at))
        ]
        return _each(given, paragraphs)

    def paragraphs(number: int, here: str, given: tuple[str, str, Any]) -> Iterator[Item]:
        base, title, value = given
        paragraph = as_object(value, here)
        context = _text(paragraph, "context", here)
        # A title may come twice: its paragraphs are counted on.
        name = f"{base}/{counts.get(base, 0)}"
        counts[base] = counts.get(base, 0) + 1
        yield here, None, (Document(name, title.replace("_", " "), context, file.uri),)
        rows = [
            (f"{here}.qas[{q}]", (name, entry))
            for q, entry in enumerate(_list(paragraph, "qas", here))
        ]
        yield from _each(rows, questions)

    def questions(number: int, place: str, given: tuple[str, Any]) -> Iterator[Item]:
        name, value = given
        row = as_object(value, place)
        if row.get("is_impossible"):
            return
        entries = [as_object(each, place) for each in _list(row, "answers", place)]
        answers = tuple(dict.fromkeys(_text(each, "text", place) for each in entries))
        question = _text(row, "question", place)
        yield place, Example(_text(row, "id", place), question, answers, (name,)), ()

    return _each(json_members(file, "data"), articles)


def squad_rows(file: InputFile) -> Iterator[Item]:
    """SQuAD as Hugging Face's datasets export it: a question a line with its ``context``."""
    known: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}

    def items(number: int, place: str, line: bytes) -> Iterator[Item]:
        row = json_row(line, place)
        title, context = _title(row), _text(row, "context", place)
        base = title or stem(file)
        if (base, context) not in known:
            known[base, context] = f"{base}/{counts.get(base, 0)}"
            counts[base] = counts.get(base, 0) + 1
        name = known[base, context]
        yield place, None, (Document(name, title.replace("_", " "), context, file.uri),)
        given = row.get("answers")
        if isinstance(given, list):  # one object an answer, as SQuAD's own files have it
            given = {"text": [as_object(each, place).get("text") for each in given]}
        answers = _texts(as_object(given, f"{place}, answers"), "text", place)
        if answers:  # SQuAD 2.0's that cannot be answered have none
            question = _text(row, "question", place)
            yield place, Example(_text(row, "id", place), question, answers, (name,)), ()

    return _each(_lines(file), items)


def hotpotqa(file: InputFile) -> Iterator[Item]:
    """HotpotQA's distractor files; a document is a context paragraph, its id its title."""

    def items(number: int, place: str, row: dict[str, Any]) -> Iterator[Item]:
        documents = []
        for entry in _list(row, "context", place):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
                raise DataError(f"{place}: a context is no pair", expected="[title, [sentences]]")
            text = "".join(map(str, entry[1])).strip()
            if text:
                documents.append(Document(str(entry[0]), str(entry[0]), text, file.uri))
        facts = _list(row, "supporting_facts", place)
        gold = tuple(
            dict.fromkeys(str(fact[0]) for fact in facts if isinstance(fact, list) and fact)
        )
        answers = (_text(row, "answer", place),)
        question = _text(row, "question", place)
        yield place, Example(_text(row, "_id", place), question, answers, gold), documents

    return _each(json_entries(file), items)


def webquestions(file: InputFile) -> Iterator[Item]:
    """The original release, whose answers are ``(list (description ..) ..)``."""

    def items(number: int, place: str, row: dict[str, Any]) -> Iterator[Item]:
        given = _DESCRIPTION.findall(_text(row, "targetValue", place))
        answers = tuple(
            dict.fromkeys((quoted.replace('\\"', '"') or bare).strip() for quoted, bare in given)
        )
        question = _text(row, "utterance", place)
        yield place, Example(_counted(file, number), question, answers, ()), ()

    return _each(json_entries(file), items)


def entityquestions(file: InputFile) -> Iterator[Item]:
    """``[{question, answers[]}]``."""

    def items(number: int, place: str, row: dict[str, Any]) -> Iterator[Item]:
        id = _text(row, "id", place) if row.get("id") is not None else _counted(file, number)
        question, answers = _text(row, "question", place), _texts(row, "answers", place)
        yield place, Example(id, question, answers, ()), ()

    return _each(json_entries(file), items)


def dpr(file: InputFile) -> Iterator[Item]:
    """DPR's training files; documents are the passages of all its lists."""

    def items(number: int, place: str, row: dict[str, Any]) -> Iterator[Item]:
        carried: dict[str, list[Document]] = {}
        for kind in ("positive_ctxs", "negative_ctxs", "hard_negative_ctxs"):
            carried[kind] = []
            for context in (
                _list(row, kind, place) if kind == "positive_ctxs" or kind in row else []
            ):
                context = as_object(context, f"{place}, {kind}")
                id = context.get("passage_id", context.get("psg_id"))
                if id is None:
                    raise DataError(
                        f"{place}: a passage of {kind} has no id", expected="passage_id or psg_id"
                    )
                if context.get("text") == "":
                    continue  # it cannot be found
                text, title = _text(context, "text", place), str(context.get("title") or "")
                carried[kind].append(Document(str(id), title, text, file.uri))
        gold = tuple(dict.fromkeys(document.id for document in carried["positive_ctxs"]))
        question, answers = _text(row, "question", place), _texts(row, "answers", place)
        documents = [document for documents in carried.values() for document in documents]
        yield place, Example(_counted(file, number), question, answers, gold), documents

    return _each(json_entries(file), items)


def kilt(file: InputFile) -> Iterator[Item]:
    """KILT's question answering tasks; positives are Wikipedia page ids of its knowledge source."""

    def items(number: int, place: str, line: bytes) -> Iterator[Item]:
        row = json_row(line, place)
        answers: list[str] = []
        gold: list[str] = []
        for output in _list(row, "output", place):
            output = as_object(output, f"{place}, output")
            if isinstance(output.get("answer"), str):
                answers.append(output["answer"])
            for source in (
                _list(output, "provenance", place) if output.get("provenance") is not None else []
            ):
                source = as_object(source, f"{place}, provenance")
                if source.get("wikipedia_id") is not None:
                    gold.append(str(source["wikipedia_id"]))
        given, positives = tuple(dict.fromkeys(answers)), tuple(dict.fromkeys(gold))
        question = _text(row, "input", place)
        yield place, Example(_text(row, "id", place), question, given, positives), ()

    return _each(_lines(file), items)


def is_beir(uri: str) -> bool:
    """Whether ``uri`` is a folder with a corpus and queries."""
    return not uri.lower().endswith((".json", ".jsonl", ".gz", ".tsv", ".csv")) and all(
        _part(uri, f"{name}.jsonl") is not None for name in ("corpus", "queries")
    )


def beir(uri: str, split: str) -> Iterator[Item]:
    """A BEIR folder: every document, and the queries that the split's qrels judge."""

    def documents(number: int, place: str, line: bytes) -> Iterator[Item]:
        row = json_row(line, place)
        id, title = _text(row, "_id", place), _title(row)
        text = row.get("text") or title
        if not isinstance(text, str) or "text" not in row:
            got = "is missing" if "text" not in row else f"is {kind_of(text)}"
            raise DataError(f"{place}: 'text' {got}", expected="a string")
        text = text if text.strip() else title
        if text.strip():  # FiQA, SciDocs and others have rows without any; they cannot be found
            yield place, None, (Document(id, title, text, place.rpartition(", line ")[0]),)

    def judgements(number: int, place: str, line: bytes) -> Iterator[Item]:
        cells = _cells(line, place)
        if len(cells) == 1:
            cells = cells[0].split()
        if len(cells) == 4:  # TREC's own form: its second column says nothing
            del cells[1]
        if number == 0 and cells[-1].lower() in {"score", "relevance"}:
            return
        try:
            relevance = float(cells[2]) if len(cells) == 3 else math.nan
        except ValueError:
            relevance = math.nan
        if not math.isfinite(relevance):
            raise DataError(
                f"{place}: {cells[:4]}", expected="query-id, corpus-id, score, parted by tabs"
            )
        if relevance > 0:
            gold.setdefault(cells[0], []).append(cells[1])
        yield from ()

    def queries(number: int, place: str, line: bytes) -> Iterator[Item]:
        row = json_row(line, place)
        id = _text(row, "_id", place)
        if id in gold:
            positives = tuple(dict.fromkeys(gold[id]))
            yield place, Example(id, _text(row, "text", place), (), positives), ()

    gold: dict[str, list[str]] = {}
    names = [split, "test"] if split == "dev" else [split]
    found = next(filter(None, (_part(uri, f"qrels/{name}.tsv") for name in names)), None)
    corpus, asked = _part(uri, "corpus.jsonl"), _part(uri, "queries.jsonl")
    if corpus is None or asked is None:
        raise DataError(f"{uri} is no BEIR folder", expected="corpus.jsonl and queries.jsonl in it")
    yield from _each(_lines(corpus), documents)
    if found is None:
        raise DataError(
            f"{uri} has no qrels for {split}",
            expected=" or ".join(f"qrels/{name}.tsv" for name in names),
        )
    yield from _each(_lines(found), judgements)
    yield from _each(_lines(asked), queries)


# Fields.


def _part(folder: str, name: str) -> InputFile | None:
    """A file of a BEIR folder, packed or not; ``None`` if it is not there."""
    for ending in ("", ".gz"):
        try:
            return find_files(f"{folder.rstrip('/')}/{name}{ending}", "text")[0]
        except DataError:
            continue
    return None


def _lines(file: InputFile) -> Iterator[tuple[str, bytes]]:
    for number, line in read_lines(file):
        yield f"{file.uri}, line {number}", line


def _cells(line: bytes, place: str) -> list[str]:
    """The cells of a line of a table, parted by tabs."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text", action="convert the file to UTF-8") from error
    return [_unquoted(cell) for cell in text.rstrip("\r\n").split("\t")]


def _unquoted(cell: str) -> str:
    """A cell that a CSV writer put in quotes, without them."""
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _counted(file: InputFile, number: int) -> str:
    """An id for a question that has none: the file's path in its folder and its place in it."""
    return f"{stem(file)}-{number}"


def stem(file: InputFile) -> str:
    """A file's path in its folder, without the endings of its format: what ids are made of."""
    return _ENDING.sub("", file.name)


def _title(row: dict[str, Any]) -> str:
    """The title of a document, which may lack one or have null."""
    value = row.get("title")
    return "" if value is None else str(value)


def _text(row: dict[str, Any], name: str, place: str) -> str:
    value = row.get(name)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # ids are numbers in some files
    if not isinstance(value, str) or not value.strip():
        got = "is missing" if name not in row else f"is {value!r}"[:80]
        raise DataError(f"{place}: {name!r} {got}", expected="a string with text")
    return value


def _texts(row: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    """A list of strings, each once, without blank ones; a string alone is one, and numbers count as
    written.
    """
    given = row.get(name)
    value = [given] if isinstance(given, str) else given
    if isinstance(value, list):
        value = [
            str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item
            for item in value
        ]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        got = "is missing" if name not in row else f"is {given!r}"[:80]
        raise DataError(f"{place}: {name!r} {got}", expected="a list of strings")
    return tuple(dict.fromkeys(item for item in value if item.strip()))


def _list(row: dict[str, Any], name: str, place: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        got = "is missing" if name not in row else f"is {kind_of(value)}"
        raise DataError(f"{place}: {name!r} {got}", expected="a list")
    return value
