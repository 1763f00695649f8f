"""Rewrites and windows: what they keep, how they differ, and that they never depend on the
process.
"""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from invar_ray.errors import ConfigError, DataError, ResourceError
from invar_ray.questions.endpoint import EndpointRewriter, answer_type
from invar_ray.questions.noise import case, speech, typo
from invar_ray.questions.numbers import numbers_to_words
from invar_ray.questions.parsing import parse_question
from invar_ray.questions.phrases import WORDING, clause, keywords, request, template
from invar_ray.questions.rewrites import FileRewriter, GivenRewriter, make_rewriter
from invar_ray.questions.rules import KINDS, NOISE, RuleRewriter, comparison_key
from invar_ray.schema import Document, Example
from invar_ray.text.answers import contains_answer, find_answer
from invar_ray.text.windows import resize_windows

QUESTIONS = [
    "What is the capital of Norland?",
    "who wrote the book of tides",
    "When did Ansel Brook open the Harbour Museum in 1841?",
    "where was the first lighthouse built",
    "How many ships did the Northern Company own in 1,902?",
    "In what city was Mara Holt born?",
    "During the storm of 1703, which bridge fell?",
    "What do sailors call the old mill?",
    "The mill was sold to whom?",
    "salt harbour opening date",
    "Why are there 2 towers?",
    "Paris",
]


def example(question: str, id: str = "q", **more: Any) -> Example:
    return Example(id, question, more.pop("answers", ("no answer here",)), ("d",), **more)


def forms(kind: Any, question: str) -> set[str]:
    return {kind(question, random.Random(seed)) for seed in range(40)}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is the capital of Norland?", "The capital of Norland is what?"),
        (
            "when did the romans start building the wall",
            "the romans started building the wall when",
        ),
        ("who wrote the book of tides", "by whom was the book of tides written"),
        ("who designed the harbour towers", "by whom were the harbour towers designed"),
        ("Where was Mara Holt born?", "What is the birthplace of Mara Holt?"),
        ("What did Ansel Brook use as an anchor?", "Ansel Brook used what as an anchor?"),
        ("What title did the town award Mara Holt?", "The town awarded Mara Holt what title?"),
        ("how many ships are there in the bay", "there are how many ships in the bay"),
        ("The mill was sold to whom?", "To whom was The mill sold?"),
        ("What is the old mill in the north called?", "The old mill in the north is called what?"),
        ("how many people live in Norland", "what is the population of Norland"),
    ],
)
def test_template(question: str, expected: str) -> None:
    assert expected.lower() in {form.lower() for form in forms(template, question) if form}


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Who won the cup in 1990?", {"In 1990, who won the cup?"}),
        (
            "During the storm of 1703, which bridge fell?",
            {"Which bridge fell, during the storm of 1703?"},
        ),
        ("In Norland, which city burned?", {"Which city burned in Norland?"}),
        ("salt harbour why are there towers", {"why are there towers, salt harbour"}),
        ("who is the mayor of the town", {None}),
        ("where was the ship on the river built", {None}),  # "on the river built" is no clause
        (
            "what is the name of the saint carved on the gate",
            {None},
        ),  # the phrase belongs to the noun
    ],
)
def test_clause(question: str, expected: set[str | None]) -> None:
    assert forms(clause, question) == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("When did Mara Holt leave Norland?", "Do you know when Mara Holt left Norland?"),
        ("What is the capital of Norland?", "Tell me the capital of Norland."),
        ("who wrote the book of tides", "can you tell me who wrote the book of tides"),
        ("How tall is the north tower?", "Tell me the height of the north tower."),
        ("salt harbour opening date", "tell me: salt harbour opening date"),
        ("Name the river of Norland.", "Please name the river of Norland."),
        (
            "When is the first recorded visit to Norland?",
            "Quick question: when is the first recorded visit to Norland?",
        ),
    ],
)
def test_request(question: str, expected: str) -> None:
    assert expected in forms(request, question)


def test_keywords() -> None:
    assert "Mara Holt leave Norland in 1841 when" in forms(
        keywords, "When did Mara Holt leave Norland in 1841?"
    )
    assert forms(keywords, "how many ships does the company have") == {"how many ships company"}
    assert forms(keywords, "salt harbour date") == {None}


@pytest.mark.parametrize(
    "question",
    [
        "when did help move start",
        "who was Mara a guest of during the war",
        "what is it",
        "is it true",
        "how",
        "",
    ],
)
def test_no_parse_where_unsure(question: str) -> None:
    assert parse_question(question) is None


_NAMES = st.sampled_from(
    ["Mara Holt", "Norland", "the Harbour Museum", "Ansel Brook", "HMS 42", "the 1841 Treaty"]
)
_FRAMES = st.sampled_from(
    [
        "what is the capital of {}?",
        "When did {} open?",
        "who wrote about {} in 1902",
        "Where was {} built?",
        "During 1703, which city did {} leave?",
        "How many ships did {} own at 7:30?",
        "What was the name of the first lighthouse of {}?",
        "Who discovered {} in 1,902?",
        "{} was sold to whom?",
        "why are there 12 towers in {}",
        "Which king of {} reigned until 1066?",
    ]
)


@settings(max_examples=150, deadline=None)
@given(frame=_FRAMES, name=_NAMES, seed=st.integers(0, 99), kind=st.sampled_from(sorted(WORDING)))
def test_wording_kinds_keep_names_and_numbers(frame: str, name: str, seed: int, kind: str) -> None:
    question = frame.format(name)
    text = WORDING[kind](question, random.Random(seed))
    if text is None:
        return
    assert [c for c in sorted(text) if c.isdigit()] == [c for c in sorted(question) if c.isdigit()]
    bare = name.removeprefix("the ")
    assert bare in text
    assert "  " not in text
    assert text == text.strip()


@settings(max_examples=150, deadline=None)
@given(
    question=st.one_of(st.sampled_from(QUESTIONS), st.text(max_size=60)), seed=st.integers(0, 999)
)
def test_typos_are_few_and_spare_digits(question: str, seed: int) -> None:
    text = typo(question, random.Random(seed))
    before, after = question.split(" "), text.split(" ")
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) <= max(1, len(before) // 5)
    for old, new in changed:
        assert not any(c.isdigit() for c in old)
        assert abs(len(old) - len(new)) <= 1
        assert old[0] == new[0]


@settings(max_examples=100, deadline=None)
@given(
    question=st.one_of(st.sampled_from(QUESTIONS), st.text(max_size=60)), seed=st.integers(0, 99)
)
def test_every_kind_takes_any_text_and_is_pure(question: str, seed: int) -> None:
    for kind in KINDS.values():
        assert kind(question, random.Random(seed)) == kind(question, random.Random(seed))


def test_speech_and_case() -> None:
    spoken = forms(speech, "When did HMS 42 leave the St. John's harbour, in 1841?")
    assert all(text == text.lower() and not set(text) & set("?,.:0123456789") for text in spoken)
    assert any(
        text == "when did hms forty two leave the st john's harbour in eighteen forty one"
        for text in spoken
    )
    assert len(spoken) > 10
    for question in ("When did HMS 42 leave?", "when was it"):
        assert all(
            text != question
            and text.replace(" ?", "").rstrip("?").lower() == question.rstrip("?").lower()
            for text in forms(case, question)
        )


@pytest.mark.parametrize(
    ("digits", "words"),
    [
        ("0", "zero"),
        ("21", "twenty one"),
        ("1973", "nineteen seventy three"),
        ("1905", "nineteen oh five"),
        ("1900", "nineteen hundred"),
        ("2000", "two thousand"),
        ("2007", "two thousand seven"),
        ("2021", "twenty twenty one"),
        ("1,973", "one thousand nine hundred seventy three"),
        ("1,000,000", "one million"),
        ("3.14", "three point one four"),
        ("21st", "twenty first"),
        ("20th", "twentieth"),
        ("1980s", "nineteen eighties"),
        ("12.", "twelve."),
        ("B52 3D 1.2.3 99999999999999", "B52 3D 1.2.3 99999999999999"),
    ],
)
def test_numbers_to_words(digits: str, words: str) -> None:
    assert numbers_to_words(digits) == words


@pytest.mark.parametrize("question", QUESTIONS)
def test_rule_rewriter(question: str) -> None:
    for number in range(12):
        item = example(question, f"q{number}")
        rewrites = RuleRewriter().rewrite(item, 4, seed=number)
        assert [rewrite.rewrite for rewrite in rewrites] == [1, 2, 3, 4]
        assert {(rewrite.question_id, rewrite.provider) for rewrite in rewrites} == {
            (item.id, "rules")
        }
        keys = [
            comparison_key(text) for text in (question, *(rewrite.text for rewrite in rewrites))
        ]
        assert len(set(keys)) == 5
        first, second = rewrites[0].kind, rewrites[1].kind
        assert (first in NOISE) != (second in NOISE)


def test_rewrites_are_a_prefix_of_more_rewrites_and_seeds_differ() -> None:
    item = example(QUESTIONS[2])
    assert RuleRewriter().rewrite(item, 5, 3)[:2] == RuleRewriter().rewrite(item, 2, 3)
    texts = {
        tuple(rewrite.text for rewrite in RuleRewriter().rewrite(item, 2, seed))
        for seed in range(10)
    }
    assert len(texts) > 4
    assert len(RuleRewriter().rewrite(item, 40, 0)) == 40


def test_kinds_rotate_over_examples() -> None:
    first = {
        RuleRewriter().rewrite(example(QUESTIONS[2], f"q{n}"), 1, 0)[0].kind for n in range(60)
    }
    assert first >= {"template", "clause", "request", "keywords", "typo", "speech"}


def test_rewrites_are_the_same_in_another_process() -> None:
    code = (
        "from invar_ray.schema import Example\nfrom invar_ray.questions.rules import RuleRewriter\n"
        f"print([v.text for v in RuleRewriter().rewrite(Example('q', {QUESTIONS[2]!r}, ('a',), "
        "()), 5, 7)])"
    )
    root = Path(__file__).parents[3]
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env={"PYTHONHASHSEED": "99"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert out == str(
        [rewrite.text for rewrite in RuleRewriter().rewrite(example(QUESTIONS[2]), 5, 7)]
    )


def test_given_rewriter_fills_up() -> None:
    item = example("When was it?", rewrites=("when was it?", "When was it?", " what  year was it?"))
    texts = GivenRewriter().rewrite(item, 5, 0)
    assert [
        (rewrite.rewrite, rewrite.text, rewrite.kind, rewrite.provider) for rewrite in texts
    ] == [
        (1, "when was it?", "given", "data"),
        (2, "what year was it?", "given", "data"),
    ]
    filled = GivenRewriter(RuleRewriter()).rewrite(item, 4, 0)
    assert filled[:2] == texts
    assert [rewrite.provider for rewrite in filled[2:]] == ["rules", "rules"]
    assert [rewrite.rewrite for rewrite in filled] == [1, 2, 3, 4]
    assert len({comparison_key(rewrite.text) for rewrite in filled}) == 4


def test_file_rewriter(tmp_path: Path) -> None:
    path = tmp_path / "v.jsonl"
    rows = [
        {"question_id": "q", "text": "one?", "kind": "human"},
        {"question_id": "x", "text": "two?"},
    ]
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, {"question_id": "q", "text": "three?"}])
    )
    rewriter = FileRewriter(str(path))
    found = rewriter.rewrite(example("Q?"), 5, 0)
    assert [(rewrite.text, rewrite.kind) for rewrite in found] == [
        ("one?", "human"),
        ("three?", "file"),
    ]
    assert found[0].provider == f"file:{path}"
    assert rewriter.rewrite(example("Q?", "unknown"), 5, 0) == []
    path.write_text('{"question_id": "q"}\n')
    with pytest.raises(DataError, match="line 1: the field 'text' is missing"):
        FileRewriter(str(path)).rewrite(example("Q?"), 1, 0)


def test_make_rewriter(tmp_path: Path) -> None:
    assert isinstance(make_rewriter(), RuleRewriter)
    assert isinstance(make_rewriter(provider="given"), GivenRewriter)
    assert isinstance(make_rewriter(provider="file", uri="x.jsonl"), FileRewriter)
    assert isinstance(
        make_rewriter(
            provider="endpoint",
            uri="http://h/v1",
            endpoint_model="m",
            cache_path=tmp_path / "c",
        ),
        EndpointRewriter,
    )
    for arguments in (
        {"provider": "file"},
        {"provider": "endpoint", "uri": "x"},
        {"provider": "magic"},
    ):
        with pytest.raises(ConfigError):
            make_rewriter(**arguments)


# --- the endpoint, against a server that speaks the protocol
# -----------------------------------------------------


class Server:
    """Answers requests from a script of (status, headers, body); the last entry repeats."""

    def __init__(self) -> None:
        self.script: list[tuple[int, dict[str, str], str]] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                sent = {name.title(): value for name, value in self.headers.items()}
                outer.requests.append((self.path, sent, body))
                status, headers, text = outer.script[
                    min(len(outer.requests), len(outer.script)) - 1
                ]
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text.encode()))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def says(self, *contents: str) -> None:
        self.script = [
            (200, {}, json.dumps({"choices": [{"message": {"content": text}}]}))
            for text in contents
        ]


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


ASKED = example("When did Mara leave Norland in 1841?", answers=("spring",))


def client(server: Server, cache: Path | None = None, **more: Any) -> EndpointRewriter:
    return EndpointRewriter(server.url, "m", "INVAR_TEST_KEY", cache, timeout_s=5, **more)


def test_endpoint_checks_what_it_gets(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVAR_TEST_KEY", "sk-secret")
    server.says(
        '```json\n["when did mara leave norland in 1841", "In 1841, when did Mara leave?", "When did Mara leave?",'  # noqa: E501
        ' "Did Mara leave in spring 1841?", "in 1841 when did mara leave", 7, "Mara left Norland when in 1841?"]\n```'  # noqa: E501
    )
    rewriter = client(server)
    rewrites = rewriter.rewrite(ASKED, 3, 0)
    assert [(rewrite.text, rewrite.provider) for rewrite in rewrites[:2]] == [
        ("In 1841, when did Mara leave?", "endpoint:m"),
        ("Mara left Norland when in 1841?", "endpoint:m"),
    ]
    assert (rewrites[2].provider, rewrites[2].rewrite) == ("rules", 3)
    [(path, headers, body)] = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer sk-secret"
    assert (body["model"], body["seed"]) == ("m", 0)
    assert ASKED.question in body["messages"][0]["content"]
    rewriter.close()


@pytest.mark.parametrize(
    "question, expected",
    [
        ("Who built it?", "person"),
        ("which woman built it", "person"),
        ("In what year was it built?", "time"),
        ("When was it built, and where?", "time"),
        ("where is it", "place"),
        ("How many ships came?", "number"),
        ("How old is it?", "number"),
        ("Why did it burn?", "reason"),
        ("What did they grow?", None),
        ("name of the lighthouse", None),
        ("the whole thing", None),
    ],
)
def test_type_of_the_answer(question: str, expected: str | None) -> None:
    assert answer_type(question) == expected


def test_endpoint_drops_a_rewording_that_asks_for_something_else(server: Server) -> None:
    server.says(json.dumps(["Where did Mara go in 1841?", "In 1841, when did Mara leave?"]))
    texts = [rewrite.text for rewrite in client(server).rewrite(ASKED, 2, 0)]
    assert "In 1841, when did Mara leave?" in texts
    assert "Where did Mara go in 1841?" not in texts


def test_endpoint_reads_lines_too_and_sends_no_empty_key(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("INVAR_TEST_KEY", raising=False)
    server.says('Here you are:\n1. "Mara left Norland when, in 1841?"\n2) In 1841 Mara left when?')
    texts = [rewrite.text for rewrite in client(server).rewrite(ASKED, 2, 0)]
    assert texts == ["Mara left Norland when, in 1841?", "In 1841 Mara left when?"]
    assert "Authorization" not in server.requests[0][1]


def test_endpoint_cache(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVAR_TEST_KEY", "sk-secret")
    cache = tmp_path / "sub" / "cache.jsonl"
    server.says('["In 1841, when did Mara leave?"]')
    first = client(server, cache).rewrite(ASKED, 1, 0)
    assert client(server, cache).rewrite(ASKED, 1, 0) == first
    assert len(server.requests) == 1
    cache.write_text(cache.read_text() + '{"key": "cut of')  # a crash while writing
    rewriter = client(server, cache)
    rewriter.rewrite(ASKED, 1, seed=1)
    assert len(server.requests) == 2
    again = client(server, cache)
    assert again.rewrite(ASKED, 1, 1) == rewriter.rewrite(ASKED, 1, 1)
    assert len(server.requests) == 2
    assert "sk-secret" not in cache.read_text()


def test_endpoint_tries_again_when_busy(server: Server) -> None:
    server.says('["In 1841, when did Mara leave?"]')
    server.script = [
        (429, {"Retry-After": "0"}, "slow down"),
        (503, {}, ""),
        (200, {}, "not json"),
        *server.script,
    ]
    assert client(server).rewrite(ASKED, 1, 0)[0].provider == "endpoint:m"
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("answer", "error", "message", "requests"),
    [
        ((500, {}, "boom"), ResourceError, "failed 3 times, last with HTTP 500", 3),
        ((200, {}, "{not json"), DataError, "answered with something that is not JSON", 3),
        ((200, {}, '{"choices": []}'), DataError, "answered JSON without a message", 3),
        (
            (200, {}, '{"choices": [{"message": {"content": null}}]}'),
            DataError,
            "a message without text",
            3,
        ),
        (
            (401, {}, "bad key sk-secret"),
            ConfigError,
            r"HTTP 401 \(bad key \*\*\*\).*INVAR_TEST_KEY",
            1,
        ),
        ((404, {}, "no model"), ConfigError, "HTTP 404", 1),
    ],
)
def test_endpoint_failures(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    answer: tuple[int, dict[str, str], str],
    error: type[Exception],
    message: str,
    requests: int,
) -> None:
    monkeypatch.setenv("INVAR_TEST_KEY", "sk-secret")
    server.script = [answer]
    caplog.set_level("DEBUG")
    with pytest.raises(error, match=message) as caught:
        client(server, attempts=3).rewrite(ASKED, 1, 0)
    assert len(server.requests) == requests
    assert "sk-secret" not in str(caught.value)
    assert "sk-secret" not in caplog.text


def test_endpoint_out_of_reach_and_bad_keys(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ResourceError, match="does not answer"):
        client(server, attempts=2).rewrite(ASKED, 1, 0)
    with pytest.raises(ConfigError, match="not a usable URL"):
        EndpointRewriter("localhost:8000/v1", "m").rewrite(ASKED, 1, 0)
    monkeypatch.setenv("INVAR_TEST_KEY", "sk-sec\nret")
    with pytest.raises(ConfigError, match="no header can carry") as caught:
        client(server).rewrite(ASKED, 1, 0)
    assert "sec" not in str(caught.value)


def test_endpoint_travels_without_its_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVAR_TEST_KEY", "sk-secret")
    server.says('["In 1841, when did Mara leave?"]')
    rewriter = client(server)
    rewrites = rewriter.rewrite(ASKED, 1, 0)
    sent = pickle.dumps(rewriter)
    assert b"sk-secret" not in sent
    assert pickle.loads(sent).rewrite(ASKED, 1, 0) == rewrites


# --- windows
# -----------------------------------------------------------------------------------------------------  # noqa: E501

SENTENCES = [
    "The harbour was dug in 1841 by convicts from the north.",
    "Ships brought salt, wool and news!",
    "Was it ever closed?",
    "A storm took the east mole in 1872, and nobody rebuilt it for 30 years.",
    "Mara Holt kept the lighthouse.",
    "It still stands.",
]


@settings(max_examples=150, deadline=None)
@given(
    sentences=st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=30),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    answers=st.sampled_from(
        [(), ("1841",), ("Mara Holt",), ("the east mole", "nothing"), ("nowhere",)]
    ),
    count=st.integers(0, 5),
    seed=st.integers(0, 50),
)
def test_windows(
    sentences: list[str], cut: tuple[float, float], answers: tuple[str, ...], count: int, seed: int
) -> None:
    document = Document("d", "t", " ".join(sentences))
    text = document.text
    start, end = sorted(round(part * len(text)) for part in cut)
    if start == end:
        return
    windows = resize_windows(document, start, end, answers, count, seed)
    assert windows == resize_windows(document, start, end, answers, count, seed)
    assert [window.window for window in windows] == list(range(1, len(windows) + 1))
    assert len(windows) <= count
    anchor = text[start:end]
    pieces = [text[window.start : window.end] for window in windows]
    assert len({anchor.strip(), *pieces}) == len(pieces) + 1
    for window, piece in zip(windows, pieces, strict=True):
        assert len(piece.split()) >= 5
        assert window.start == 0 or text[window.start - 1].isspace()
        assert window.end == len(text) or text[window.end].isspace()
        assert piece == piece.strip()
        assert window.start < end
        assert window.end > start
        if contains_answer(anchor, answers):
            assert contains_answer(piece, answers)


def test_windows_of_a_long_document_are_of_all_kinds() -> None:
    document = Document("d", "t", " ".join(SENTENCES * 10))
    start = document.text.index("Mara Holt", 1000)
    end = start + 400
    windows = resize_windows(document, start, end, (), 6, 0)
    assert [window.kind for window in windows].count("shorter") == 2
    assert {window.kind for window in windows} == {"shorter", "longer", "shifted"}
    for window in windows:
        size = (window.end - window.start) / (end - start)
        assert {"shorter": size < 0.95, "longer": size > 1.05, "shifted": 0.7 < size < 1.3}[
            window.kind
        ]
    edges = [
        document.text[: window.start].rstrip()[-1:] for window in windows if window.start != start
    ]
    assert sum(edge in ".!?" for edge in edges) >= len(edges) / 2
    other = [resize_windows(document, start, end, (), 1, seed)[0].kind for seed in range(30)]
    assert set(other) == {"shorter", "longer", "shifted"}


def test_a_document_that_is_its_anchor_has_sub_cuts_only() -> None:
    document = Document("d", "t", " ".join(SENTENCES))
    windows = resize_windows(document, 0, len(document.text), ("1841",), 4, 0)
    assert len(windows) == 4
    assert {window.kind for window in windows} == {"shorter"}
    assert all(
        find_answer(document.text[window.start : window.end], ("1841",)) for window in windows
    )
    short = Document("d", "t", "It still stands today.")
    assert resize_windows(short, 0, len(short.text), (), 4, 0) == []
    whole = Document("d", "t", "one two three four five six")
    assert resize_windows(whole, 0, len(whole.text), ("one two three four five six",), 4, 0) == []
    assert {window.kind for window in resize_windows(whole, 0, len(whole.text), (), 4, 0)} == {
        "shorter"
    }


def test_windows_refuse_a_span_outside_the_text() -> None:
    with pytest.raises(ValueError, match="span 3:9 of a text of 5 characters"):
        resize_windows(Document("d", "t", "abcde"), 3, 9, (), 1, 0)
