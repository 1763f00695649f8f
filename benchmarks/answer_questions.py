"""How many questions are right, refused, wrong: the 60 about the demo's corpus, or a store's own.

    python -m benchmarks.answer_questions --root runs/demo --out answers.jsonl
    python -m benchmarks.answer_questions --root runs/squad --dev 300
    python -m benchmarks.answer_questions --root runs/squad --times 100

The 60 (``tests/assets/demo_questions.jsonl``) were written before anything was tuned: 30 that the
corpus answers, in words that no training question has; 15 that it does not answer; 10 attacks and
pieces of nonsense; 5 follow-ups, which need the turns before them.  With ``--dev N`` the store's
dev questions are asked instead: N as they are, and N others with their documents taken out of the
search.  With ``--times N`` nothing is answered: N dev questions are searched for in each mode, one
at a time, and the milliseconds printed.

*right* is an answer that holds a gold answer, and for questions without one a refusal; *refused* is
a refusal of a question that has an answer.  A question whose document is gone can still be right:
another document may say the same.  Each table stands twice: as the model wrote it, and as served,
where what it was not sure of is refused.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from invar_ray import Rag, open_rag
from invar_ray.answering.filters import Where
from invar_ray.answering.followup import Turn
from invar_ray.answering.rag import answer_batch
from invar_ray.schema import Answer, Example, Mode
from invar_ray.steps.questions import load_examples
from invar_ray.text.answers import contains_answer

QUESTIONS = Path(__file__).parents[1] / "tests" / "assets" / "demo_questions.jsonl"
BATCH, NEW_TOKENS = 16, 24
STANDS, GONE = "document stands", "document gone"


def main() -> None:
    """Answer them all and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="runs/demo", help="store of the run")
    parser.add_argument("--dev", type=int, help="ask so many dev questions of each kind instead")
    parser.add_argument("--times", type=int, help="only time so many searches in each mode")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--mode", default="hybrid", choices=["dense", "bm25", "hybrid"])
    parser.add_argument("--index", help="URI of another index than the current")
    parser.add_argument("--generator", help="URI of another generator than the newest")
    parser.add_argument("--untrained", action="store_true", help="let an untrained encoder search")
    parser.add_argument("--out", type=Path, help="each answer, as JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(1)  # two threads wait for each other where the machine has other work
    rag = open_rag(
        args.root,
        k=args.top_k,
        mode=args.mode,
        index=args.index,
        generator=args.generator,
        untrained=args.untrained,
    )
    if args.times is not None:
        print(times(rag, args.times))
        return
    rows: list[dict[str, Any]] = []
    asking = of_the_file(rag) if args.dev is None else of_the_store(rag, args.dev)
    with (args.out or Path("/dev/null")).open("w", encoding="utf-8") as out:
        for asked, answer in asking:
            rows.append(judged(asked, answer))
            out.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            out.flush()
    print(f"as written\n{table(rows, 'written')}\n\nas served\n{table(rows, 'outcome')}")


def of_the_file(rag: Rag) -> Any:
    """The 60 questions, each with its answer."""
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        asked = json.loads(line)
        said = [message["content"] for message in asked.get("history", ())]
        turns = [Turn(*said[at : at + 2]) for at in range(0, len(said), 2)]
        yield asked, rag.ask(asked["question"], turns=turns)


def of_the_store(rag: Rag, count: int) -> Any:
    """Dev questions, half of them without their documents, each with its answer."""
    documents = documents_of(rag)
    examples = dev_questions(rag, documents)
    if len(examples) < 2 * count:
        raise SystemExit(f"the store has {len(examples)} dev questions, {2 * count} are needed")
    chosen = random.Random(0).sample(examples, 2 * count)
    trained = {} if rag.generator_artifact is None else rag.generator_artifact.info
    for start in range(0, len(chosen), BATCH):
        batch = chosen[start : start + BATCH]
        kinds = [GONE if number % 2 else STANDS for number in range(len(batch))]
        hits = []
        for example, kind in zip(batch, kinds, strict=True):
            own = [passage for name in example.positive_ids for passage in documents[name]]
            where = Where.of(without=own) if kind == GONE else None
            hits += rag.retriever.retrieve([example.question], rag.k, where=where)
        answers = answer_batch(
            rag.generator,
            [example.question for example in batch],
            hits,
            max_new_tokens=trained.get("max_new_tokens", NEW_TOKENS),
            batch_size=BATCH,
        )
        for example, kind, answer in zip(batch, kinds, answers, strict=True):
            asked = {
                "id": example.id,
                "kind": kind,
                "question": example.question,
                "answers": list(example.answers),
            }
            yield asked, answer


def documents_of(rag: Rag) -> dict[str, list[str]]:
    """Passages of each indexed document."""
    documents: dict[str, list[str]] = {}
    passages = rag.retriever.passages
    for passage, document in zip(passages.ids(), passages.document_ids(), strict=True):
        documents.setdefault(document, []).append(passage)
    return documents


def dev_questions(rag: Rag, documents: Mapping[str, Sequence[str]]) -> Sequence[Example]:
    """Of the newest questions in the store that the index has the documents of."""
    found = rag.index.store.newest(
        "questions",
        lambda made: all(
            name in documents for each in load_examples(made, "dev") for name in each.positive_ids
        ),
    )
    if found is None:
        raise SystemExit(f"no questions in {rag.index.store.root_uri} whose documents are indexed")
    return load_examples(found, "dev")


def times(rag: Rag, count: int) -> str:
    """Milliseconds of one search at a time, by mode; the modes take turns."""
    examples = random.Random(0).sample(list(dev_questions(rag, documents_of(rag))), count)
    taken: dict[Mode, list[float]] = {"dense": [], "bm25": [], "hybrid": []}
    for example in examples:
        for mode, values in taken.items():
            begin = time.perf_counter()
            rag.retriever.retrieve([example.question], rag.k, mode=mode)
            values.append(1000.0 * (time.perf_counter() - begin))
    lines = [f"{'mode':<8}{'median ms':>12}{'5 %':>8}{'95 %':>8}"]
    for mode, values in taken.items():
        low, middle, high = np.percentile(values, [5, 50, 95])
        lines.append(f"{mode:<8}{middle:>12.1f}{low:>8.1f}{high:>8.1f}")
    return "\n".join(lines)


def judged(asked: Mapping[str, Any], answer: Answer) -> dict[str, Any]:
    """A question with its answer and how that counts, as written and as served."""
    written = answer.guess or answer.text
    return {
        **asked,
        "answer": answer.text,
        "written": outcome(asked, written, answer.refused and not answer.low_confidence),
        "outcome": outcome(asked, answer.text, answer.refused),
        "read_as": answer.question,
        "guess": answer.guess,
        "confidence": answer.confidence,
        "probability": answer.probability,
        "found": any(contains_answer(hit.text, asked["answers"]) for hit in answer.hits),
        "cited": [citation.number for citation in answer.citations],
        "notes": list(answer.notes),
    }


def outcome(asked: Mapping[str, Any], text: str, refused: bool) -> str:
    """``right``, ``refused`` or ``wrong``."""
    if not asked["answers"]:
        return "right" if refused else "wrong"
    if refused:
        return "refused"
    return "right" if contains_answer(text, asked["answers"]) else "wrong"


def interval(count: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share."""
    z, share = 1.96, count / total
    middle = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (middle - spread) / (1 + z * z / total), (middle + spread) / (1 + z * z / total)


def table(rows: Sequence[Mapping[str, Any]], column: str) -> str:
    """Outcomes by kind of question, with 95 % intervals of their shares."""
    names = ("right", "refused", "wrong")
    lines = [f"{'questions':<16}{'count':>6}" + "".join(f"{name:>22}" for name in names)]
    kinds = [*dict.fromkeys(row["kind"] for row in rows), "all"]
    for kind in kinds:
        of_kind = [row[column] for row in rows if kind in (row["kind"], "all")]
        count = Counter(of_kind)
        cells = []
        for name in names:
            low, high = interval(count[name], len(of_kind))
            cells.append(f"{f'{count[name]} ({low:.2f} to {high:.2f})':>22}")
        lines.append(f"{kind:<16}{len(of_kind):>6}" + "".join(cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
