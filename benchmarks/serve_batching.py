"""What batching is worth: generator tokens a second at batch 16 against 1, encoder questions a
second at 32 against 1.

Engines in this process, no web server; ``--rows`` questions at once also go through the service's
own batching.  Rates are per second by the clock and per second of CPU time: the second says
something on a machine that does other work too. The end token is forbidden, so that every row
writes ``--tokens`` tokens whatever the adapter was trained to say. Reading a prompt is bound by
computing and gains little from a batch; the tokens after the first (`writing`) gain.

    python benchmarks/serve_batching.py --index URI --generator URI
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from invar_ray.models.decoding import Sampling
from invar_ray.models.generator import Generator, Task
from serve.http.limits import Limits
from serve.records import Context, Question
from serve.replicas.generator import TransformersEngine, load_generator
from serve.replicas.retriever import RetrieverReplica, load_retriever
from serve.replicas.targets import LocalTarget
from serve.service import Service

QUESTIONS = [f"Which river of number {number} flows past the old mill?" for number in range(64)]


def median_rate(work: Callable[[], int], repeats: int) -> dict[str, float]:
    """Median units a second of ``work``, which returns how many units it did; the first run is not
    counted.
    """
    work()
    by_clock, by_cpu = [], []
    for _ in range(repeats):
        clock, cpu = time.perf_counter(), time.process_time()
        units = work()
        by_clock.append(units / (time.perf_counter() - clock))
        by_cpu.append(units / (time.process_time() - cpu))
    return {"per_s": statistics.median(by_clock), "per_cpu_s": statistics.median(by_cpu)}


def write_on(generator: Generator) -> None:
    """Forbid the end tokens."""
    ends = torch.tensor(list(generator._eos_ids))

    def forbid(head: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, ends, float("-inf"))

    generator.model.get_output_embeddings().register_forward_hook(forbid)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--index", required=True)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", default="runs/benchmarks/serve_batching.json")
    options = parser.parse_args()
    retriever, generator = load_retriever(options.index), load_generator(options.generator)
    write_on(generator)
    hits = retriever.retrieve(QUESTIONS, 3)
    from invar_ray.answering.rag import STOP_STRINGS, build_prompt

    prompts = [
        build_prompt(generator, question, found, max_new_tokens=options.tokens).text
        for question, found in zip(QUESTIONS, hits, strict=True)
    ]

    def generate(size: int, tokens: int = options.tokens) -> int:
        sampling = Sampling(tokens, STOP_STRINGS)
        return sum(
            generation.num_tokens
            for first in range(0, 16, size)
            for generation in generator.run(
                [Task(prompt, sampling) for prompt in prompts[first : first + size]]
            )
        )

    def encode(size: int) -> int:
        for first in range(0, len(QUESTIONS), size):
            retriever.encoder.encode_queries(QUESTIONS[first : first + size])
        return len(QUESTIONS)

    result: dict[str, Any] = {
        "generator_tokens_per_s": {
            str(n): median_rate(lambda n=n: generate(n), options.repeats) for n in (1, 4, 16)
        },
        "prompts_read_per_s": {
            str(n): median_rate(lambda n=n: generate(n, 1), options.repeats) for n in (1, 16)
        },
        "encoder_questions_per_s": {
            str(n): median_rate(lambda n=n: encode(n), options.repeats) for n in (1, 8, 32)
        },
        "end_to_end": asyncio.run(end_to_end(options)),
        "settings": vars(options),
        "versions": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        },
    }
    tokens, encoded = result["generator_tokens_per_s"], result["encoder_questions_per_s"]

    def writing(size: str, unit: str) -> float:
        """Tokens a second after the first of each answer."""
        answer_s = options.tokens / tokens[size][unit]
        return float(
            (options.tokens - 1) / (answer_s - 1 / result["prompts_read_per_s"][size][unit])
        )

    for unit in ("per_s", "per_cpu_s"):
        result[f"writing_16_over_1_{unit}"] = writing("16", unit) / writing("1", unit)
        result[f"generator_16_over_1_{unit}"] = tokens["16"][unit] / tokens["1"][unit]
        result[f"encoder_32_over_1_{unit}"] = encoded["32"][unit] / encoded["1"][unit]
    result["prompt_tokens"] = statistics.mean(generator.count_tokens(prompt) for prompt in prompts)
    result["load_average"] = os.getloadavg()
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result, indent=1))


async def end_to_end(options: argparse.Namespace) -> dict[str, float]:
    """Answers a second of the service (retrieve, then answer) at 1 and at ``rows`` concurrent
    callers.
    """
    rates = {}
    core = RetrieverReplica(load_retriever, 32, 0.005)
    await core.configure(options.index)
    engine = TransformersEngine(options.generator, load_generator, 32, 0.005)
    write_on(engine._generator)
    service = Service([LocalTarget("retriever", core)], LocalTarget("generator", engine))
    limits = Limits(max_new_tokens=options.tokens)

    async def ask(question: str) -> None:
        context = Context("bench", time.monotonic() + 600)
        found = await service.retrieve(question, 3, context)
        await service.answer(Question(question, found.hits, limits.max_new_tokens), context)

    await asyncio.gather(*(ask(question) for question in QUESTIONS[:4]))
    for crowd in (1, options.rows):
        pending, start, cpu = QUESTIONS[:32].copy(), time.perf_counter(), time.process_time()

        async def caller(pending: list[str] = pending) -> None:
            while pending:
                await ask(pending.pop())

        await asyncio.gather(*(caller() for _ in range(crowd)))
        rates[f"answers_per_s_at_{crowd}"] = 32 / (time.perf_counter() - start)
        rates[f"answers_per_cpu_s_at_{crowd}"] = 32 / (time.process_time() - cpu)
    core.close()
    engine.close()
    return rates


if __name__ == "__main__":
    main()
