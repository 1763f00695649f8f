"""The readers behind :mod:`invar_ray.questions.benchmarks`: one function a format, a place for each
question.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from invar_ray.corpus.json_places import as_object, json_entries, json_lines, json_members
from invar_ray.corpus.rows import kind_of
from invar_ray.corpus.storage import InputFile, find_files, read_lines
from invar_ray.errors import DataError
from invar_ray.schema import Document, Example

Item = tuple[str, Example | None, Sequence[Document]]
"""Where it stands, the question (``None`` where only documents came), the documents that came with
it.
"""

_ENDING = re.compile(r"(\.(jsonl?|ndjson|tsv|csv|gz|zst))+$", re.IGNORECASE)
_DESCRIPTION = re.compile(r'\(description (?:"((?:[^"\\]|\\.)*)"|([^()"]+))\)')


# One function a format.


def plain(file: InputFile) -> Iterator[Item]:
    """The project's own form."""
    for place, row in json_lines(file):
        rewrites = _texts(row, "rewrites", place) if row.get("rewrites") is not None else ()
        answers, positives = _texts(row, "answers", place), _texts(row, "positive_ids", place)
        yield (
            place,
            Example(
                _text(row, "id", place), _text(row, "question", place), answers, positives, rewrites
            ),
            (),
        )


def nq_open(file: InputFile) -> Iterator[Item]:
    """``{question, answer[]}`` a line."""
    for number, (place, row) in enumerate(json_lines(file)):
        id = _text(row, "id", place) if row.get("id") is not None else _counted(file, number)
        yield (
            place,
            Example(id, _text(row, "question", place), _texts(row, "answer", place), ()),
            (),
        )


def dpr_qa(file: InputFile) -> Iterator[Item]:
    """``question<TAB>['answer', ..]`` a line; the list is a Python literal."""
    for number, (place, cells) in enumerate(_table(file)):
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
        yield (
            place,
            Example(
                _counted(file, number),
                _text(row, "question", place),
                _texts(row, "answers", place),
                (),
            ),
            (),
        )


def triviaqa(file: InputFile) -> Iterator[Item]:
    """TriviaQA's own files; gold answers are the value, its aliases and human answers."""
    for place, row in json_members(file, "Data"):
        answer = as_object(row.get("Answer"), f"{place}, Answer")
        texts = [_text(answer, "Value", place), *_texts(answer, "Aliases", place)]
        texts += _texts(answer, "HumanAnswers", place) if "HumanAnswers" in answer else []
        answers = tuple(dict.fromkeys(text for text in texts if text.strip()))
        yield (
            place,
            Example(_text(row, "QuestionId", place), _text(row, "Question", place), answers, ()),
            (),
        )


def popqa(file: InputFile) -> Iterator[Item]:
    """PopQA's table; ``possible_answers`` is a JSON list."""
    rows = _table(file)
    _, header = next(rows, ("", []))
    for name in ("id", "question", "possible_answers"):
        if name not in header:
            raise DataError(
                f"{file.uri}, line 1: the column {name!r} is missing",
                expected=f"it among {header[:20]}",
            )
    for place, cells in rows:
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
        yield (
            place,
            Example(_text(row, "id", place), _text(row, "question", place), answers, ()),
            (),
        )


def squad(file: InputFile) -> Iterator[Item]:
    """SQuAD 1.1 and 2.0; questions of 2.0 that cannot be answered are left out (their answers would
    be blank).
    """
    for number, (at, article) in enumerate(json_members(file, "data")):
        title = _title(article)
        article_id = title or _counted(file, number)
        for p, paragraph in enumerate(_list(article, "paragraphs", at)):
            here = f"{at}.paragraphs[{p}]"
            paragraph = as_object(paragraph, here)
            name = f"{article_id}/{p}"
            document = Document(
                name, title.replace("_", " "), _text(paragraph, "context", here), file.uri
            )
            yield here, None, (document,)
            for q, entry in enumerate(_list(paragraph, "qas", here)):
                place = f"{here}.qas[{q}]"
                row = as_object(entry, place)
                if row.get("is_impossible"):
                    continue
                given = [
                    _text(as_object(answer, place), "text", place)
                    for answer in _list(row, "answers", place)
                ]
                answers = tuple(dict.fromkeys(given))
                yield (
                    place,
                    Example(
                        _text(row, "id", place),
                        _text(row, "question", place),
                        answers,
                        (document.id,),
                    ),
                    (),
                )


def squad_rows(file: InputFile) -> Iterator[Item]:
    """SQuAD as Hugging Face's datasets export it: a question a line with its ``context``."""
    known: dict[tuple[str, str], str] = {}
    counts: dict[str, int] = {}
    for place, row in json_lines(file):
        title, context = _title(row), _text(row, "context", place)
        base = title or _stem(file)
        if (base, context) not in known:
            known[base, context] = f"{base}/{counts.get(base, 0)}"
            counts[base] = counts.get(base, 0) + 1
        name = known[base, context]
        document = Document(name, title.replace("_", " "), context, file.uri)
        answers = _texts(as_object(row.get("answers"), f"{place}, answers"), "text", place)
        example = (
            Example(_text(row, "id", place), _text(row, "question", place), answers, (document.id,))
            if answers  # SQuAD 2.0's that cannot be answered have none
            else None
        )
        yield place, example, (document,)


def hotpotqa(file: InputFile) -> Iterator[Item]:
    """HotpotQA's distractor files; a document is a context paragraph, its id its title."""
    for place, row in json_entries(file):
        documents = []
        for entry in _list(row, "context", place):
            if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
                raise DataError(f"{place}: a context is no pair", expected="[title, [sentences]]")
            documents.append(
                Document(
                    str(entry[0]), str(entry[0]), "".join(map(str, entry[1])).strip(), file.uri
                )
            )
        facts = _list(row, "supporting_facts", place)
        gold = tuple(
            dict.fromkeys(str(fact[0]) for fact in facts if isinstance(fact, list) and fact)
        )
        answers = (_text(row, "answer", place),)
        yield (
            place,
            Example(_text(row, "_id", place), _text(row, "question", place), answers, gold),
            documents,
        )


def webquestions(file: InputFile) -> Iterator[Item]:
    """The original release, whose answers are ``(list (description ..) ..)``."""
    for number, (place, row) in enumerate(json_entries(file)):
        given = _DESCRIPTION.findall(_text(row, "targetValue", place))
        answers = tuple(
            dict.fromkeys((quoted.replace('\\"', '"') or bare).strip() for quoted, bare in given)
        )
        yield (
            place,
            Example(_counted(file, number), _text(row, "utterance", place), answers, ()),
            (),
        )


def entityquestions(file: InputFile) -> Iterator[Item]:
    """``[{question, answers[]}]``."""
    for number, (place, row) in enumerate(json_entries(file)):
        id = _text(row, "id", place) if row.get("id") is not None else _counted(file, number)
        yield (
            place,
            Example(id, _text(row, "question", place), _texts(row, "answers", place), ()),
            (),
        )


def dpr(file: InputFile) -> Iterator[Item]:
    """DPR's training files; documents are the passages of all its lists."""
    for number, (place, row) in enumerate(json_entries(file)):
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
                text, title = _text(context, "text", place), str(context.get("title") or "")
                carried[kind].append(Document(str(id), title, text, file.uri))
        gold = tuple(dict.fromkeys(document.id for document in carried["positive_ctxs"]))
        example = Example(
            _counted(file, number),
            _text(row, "question", place),
            _texts(row, "answers", place),
            gold,
        )
        yield place, example, [document for documents in carried.values() for document in documents]


def kilt(file: InputFile) -> Iterator[Item]:
    """KILT's question answering tasks; positives are Wikipedia page ids of its knowledge source."""
    for place, row in json_lines(file):
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
        id, question = _text(row, "id", place), _text(row, "input", place)
        yield (
            place,
            Example(id, question, tuple(dict.fromkeys(answers)), tuple(dict.fromkeys(gold))),
            (),
        )


def is_beir(uri: str) -> bool:
    """Whether ``uri`` is a folder with a corpus and queries."""
    return not uri.lower().endswith((".json", ".jsonl", ".gz", ".tsv", ".csv")) and all(
        _exists(f"{uri.rstrip('/')}/{name}.jsonl") for name in ("corpus", "queries")
    )


def beir(uri: str, split: str) -> Iterator[Item]:
    """A BEIR folder: every document, and the queries that the split's qrels judge."""
    root = uri.rstrip("/")
    for place, row in json_lines(_one(f"{root}/corpus.jsonl")):
        id, title = _text(row, "_id", place), _title(row)
        text = row.get("text") or title
        if not isinstance(text, str) or "text" not in row:
            got = "is missing" if "text" not in row else f"is {kind_of(text)}"
            raise DataError(f"{place}: 'text' {got}", expected="a string")
        if text.strip():  # FiQA, SciDocs and others have rows without any; they cannot be found
            yield place, None, (Document(id, title, text, f"{root}/corpus.jsonl"),)
    names = [split, "test"] if split == "dev" else [split]
    found = next(
        (f"{root}/qrels/{name}.tsv" for name in names if _exists(f"{root}/qrels/{name}.tsv")), None
    )
    if found is None:
        raise DataError(
            f"{uri} has no qrels for {split}",
            expected=" or ".join(f"qrels/{name}.tsv" for name in names),
        )
    gold: dict[str, list[str]] = {}
    for number, (place, cells) in enumerate(_table(_one(found))):
        if number == 0 and cells[-1] == "score":
            continue
        if len(cells) != 3 or not cells[2].lstrip("-").isdigit():
            raise DataError(
                f"{place}: {cells[:4]}", expected="query-id, corpus-id, score, parted by tabs"
            )
        if int(cells[2]) > 0:
            gold.setdefault(cells[0], []).append(cells[1])
    for place, row in json_lines(_one(f"{root}/queries.jsonl")):
        id = _text(row, "_id", place)
        if id in gold:
            yield (
                place,
                Example(id, _text(row, "text", place), (), tuple(dict.fromkeys(gold[id]))),
                (),
            )


# Fields.


def _one(uri: str) -> InputFile:
    return find_files(uri, "text")[0]


def _exists(uri: str) -> bool:
    try:
        return bool(find_files(uri, "text"))
    except DataError:
        return False


def _table(file: InputFile) -> Iterator[tuple[str, list[str]]]:
    for number, line in read_lines(file):
        place = f"{file.uri}, line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            yield place, [_unquoted(cell) for cell in text.rstrip("\r\n").split("\t")]
        except UnicodeDecodeError as error:
            raise DataError(
                f"{place}: not UTF-8 text", action="convert the file to UTF-8"
            ) from error


def _unquoted(cell: str) -> str:
    """A cell that a CSV writer put in quotes, without them."""
    if len(cell) >= 2 and cell[0] == cell[-1] == '"':
        return cell[1:-1].replace('""', '"')
    return cell


def _counted(file: InputFile, number: int) -> str:
    """An id for a question that has none: the file's path in its folder and its place in it."""
    return f"{_stem(file)}-{number}"


def _stem(file: InputFile) -> str:
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
    value = row.get(name)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in _items(value)):
        got = "is missing" if name not in row else f"is {value!r}"[:80]
        raise DataError(f"{place}: {name!r} {got}", expected="a list of strings")
    return tuple(dict.fromkeys(value))


def _list(row: dict[str, Any], name: str, place: str) -> list[Any]:
    value = row.get(name)
    if not isinstance(value, list):
        got = "is missing" if name not in row else f"is {kind_of(value)}"
        raise DataError(f"{place}: {name!r} {got}", expected="a list")
    return value


def _items(value: Iterable[Any]) -> Iterable[Any]:
    return value
