"""What batching is worth: generator tokens a second at batch 16 against 1, encoder questions a second at 32 against 1.

Engines in this process, no web server; ``--rows`` questions at once also go through the service's own batching.

    python benchmarks/serve_batching.py --index URI --generator URI
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from invar_ray.models.decoding import Sampling
from invar_ray.models.generator import Task
from serve.answering import GeneratorCore, TransformersEngine, load_generator
from serve.limits import Limits
from serve.records import Context, Question
from serve.retrieving import RetrieverCore, load_retriever
from serve.service import Service
from serve.targets import LocalTarget

QUESTIONS = [f"Which river of number {number} flows past the old mill?" for number in range(64)]


def median_rate(work: Callable[[], int], repeats: int) -> float:
    """Median units a second of ``work``, which returns how many units it did; the first run is not counted."""
    work()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        units = work()
        rates.append(units / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--index", required=True)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", default="runs/benchmarks/serve_batching.json")
    options = parser.parse_args()
    retriever, generator = load_retriever(options.index), load_generator(options.generator)
    hits = retriever.retrieve(QUESTIONS, 3)
    from invar_ray.retrieval.rag import STOP_STRINGS, build_prompt

    prompts = [
        build_prompt(generator, question, found, max_new_tokens=options.tokens).text
        for question, found in zip(QUESTIONS, hits, strict=True)
    ]

    def generate(size: int) -> int:
        sampling = Sampling(options.tokens, STOP_STRINGS)
        return sum(
            generation.num_tokens
            for first in range(0, 16, size)
            for generation in generator.run([Task(prompt, sampling) for prompt in prompts[first : first + size]])
        )

    def encode(size: int) -> int:
        for first in range(0, len(QUESTIONS), size):
            retriever.encoder.encode_queries(QUESTIONS[first : first + size])
        return len(QUESTIONS)

    result: dict[str, Any] = {
        "generator_tokens_per_s": {str(n): median_rate(lambda n=n: generate(n), options.repeats) for n in (1, 4, 16)},
        "encoder_questions_per_s": {str(n): median_rate(lambda n=n: encode(n), options.repeats) for n in (1, 8, 32)},
        "end_to_end": asyncio.run(end_to_end(options)),
        "settings": vars(options),
        "versions": {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()},
    }
    tokens, encoded = result["generator_tokens_per_s"], result["encoder_questions_per_s"]
    result["generator_16_over_1"] = tokens["16"] / tokens["1"]
    result["encoder_32_over_1"] = encoded["32"] / encoded["1"]
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


async def end_to_end(options: argparse.Namespace) -> dict[str, float]:
    """Answers a second of the service (retrieve, then answer) at 1 and at ``rows`` concurrent callers."""
    rates = {}
    core = RetrieverCore(load_retriever, 32, 0.005)
    await core.configure(options.index)
    engine = TransformersEngine(options.generator, load_generator, 32, 0.005)
    service = Service([LocalTarget("retriever", core)], LocalTarget("generator", GeneratorCore(engine)))
    limits = Limits(max_new_tokens=options.tokens)

    async def ask(question: str) -> None:
        context = Context("bench", time.monotonic() + 600)
        found = await service.retrieve(question, 3, context)
        await service.answer(Question(question, found.hits, limits.max_new_tokens), context)

    await asyncio.gather(*(ask(question) for question in QUESTIONS[:4]))
    for crowd in (1, options.rows):
        pending, start = QUESTIONS[:32].copy(), time.perf_counter()

        async def caller(pending: list[str] = pending) -> None:
            while pending:
                await ask(pending.pop())

        await asyncio.gather(*(caller() for _ in range(crowd)))
        rates[f"answers_per_s_at_{crowd}"] = 32 / (time.perf_counter() - start)
    core.close()
    engine.close()
    return rates


if __name__ == "__main__":
    main()
