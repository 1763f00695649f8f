"""The 60 questions about the demo's corpus: how many are right, refused, wrong.

    python -m benchmarks.answer_questions --root runs/demo --out answers.jsonl

The questions (``tests/assets/demo_questions.jsonl``) were written before anything was tuned: 30
that the corpus answers, in words that no training question has; 15 that it does not answer; 10
attacks and pieces of nonsense; 5 follow-ups, which need the turns before them.  *right* is an
answer that holds a gold answer, for the other two kinds a refusal; *refused* is a refusal of a
question that has an answer.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from invar_ray import open_rag
from invar_ray.answering.followup import Turn
from invar_ray.text.answers import contains_answer

QUESTIONS = Path(__file__).parents[1] / "tests" / "assets" / "demo_questions.jsonl"


def main() -> None:
    """Answer them all and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="runs/demo", help="store of the demo")
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--mode", default="hybrid", choices=["dense", "bm25", "hybrid"])
    parser.add_argument("--generator", help="URI of another generator than the newest")
    parser.add_argument("--out", type=Path, help="each answer, as JSON lines")
    args = parser.parse_args()
    rag = open_rag(args.root, k=args.top_k, mode=args.mode, generator=args.generator)
    rows = []
    for line in QUESTIONS.read_text(encoding="utf-8").splitlines():
        asked = json.loads(line)
        said = [message["content"] for message in asked.get("history", ())]
        turns = [Turn(*said[at : at + 2]) for at in range(0, len(said), 2)]
        answer = rag.ask(asked["question"], turns=turns)
        rows.append(
            asked
            | {
                "answer": answer.text,
                "outcome": outcome(asked, answer.text, answer.refused),
                "read_as": answer.question,
                "guess": answer.guess,
                "confidence": answer.confidence,
                "probability": answer.probability,
                "found": any(contains_answer(hit.text, asked["answers"]) for hit in answer.hits),
                "cited": [citation.number for citation in answer.citations],
                "notes": list(answer.notes),
            }
        )
    if args.out:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        args.out.write_text(text, encoding="utf-8")
    print(table(rows))


def outcome(asked: dict[str, Any], text: str, refused: bool) -> str:
    """``right``, ``refused`` or ``wrong``."""
    if not asked["answers"]:
        return "right" if refused else "wrong"
    if refused:
        return "refused"
    return "right" if contains_answer(text, asked["answers"]) else "wrong"


def table(rows: list[dict[str, Any]]) -> str:
    """Outcomes by kind of question."""
    lines = [f"{'questions':<14}{'count':>7}{'right':>7}{'refused':>9}{'wrong':>7}"]
    kinds = [*dict.fromkeys(row["kind"] for row in rows), "all"]
    for kind in kinds:
        of_kind = [row["outcome"] for row in rows if kind in (row["kind"], "all")]
        count = Counter(of_kind)
        lines.append(
            f"{kind:<14}{len(of_kind):>7}{count['right']:>7}{count['refused']:>9}"
            f"{count['wrong']:>7}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
