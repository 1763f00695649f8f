"""Pre-train a small base to read, and write it as a plain transformers folder (for ``model.base=FOLDER``).

It wants the project's development data, a folder with ``wiki_pool``, ``squad``, ``nq`` and ``popqa``.  On one CPU core
2,600 steps take about an hour, which is too few (docs/log.md).

Command::

    python -m jobs.pretrain_tiny --data DATA --out runs/invar-tiny
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import cast

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from invar_ray.errors import InvarError
from invar_ray.models.locate import load_causal_lm, load_tokenizer
from invar_ray.models.tiny import MAX_POSITIONS, minilm_embeddings, minilm_folder, minilm_tokenizer
from invar_ray.pretraining.measure import exact_match, reading_tasks, retrieval_recall
from invar_ray.pretraining.reading import ReadingMixture
from invar_ray.pretraining.start import start_model
from invar_ray.pretraining.train import PretrainConfig, Pretraining
from invar_ray.pretraining.vocabulary import count_tokens, prune_tokenizer
from invar_ray.session import quieten_libraries

VOCABULARY = 16_000
_COUNTED = 30_000  # passages


def main() -> None:
    """Train, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wiki_pool, squad, nq and popqa")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its log")
    parser.add_argument("--steps", type=int, default=PretrainConfig.steps)
    parser.add_argument("--minutes", type=float, help="end by then, with the learning rate fallen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--base", type=Path, help="go on from this model")
    parser.add_argument("--level", type=int, default=0, help="where the curriculum begins: 0, 1 or 2")
    parser.add_argument("--learning-rate", type=float, default=PretrainConfig.learning_rate)
    parser.add_argument("--made-up", type=float, help="share of made-up text (default: falls from 0.6 to 0.35)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", type=int, default=300, help="of each kind, to measure reading with")
    arguments = parser.parse_args()
    quieten_libraries()
    torch.set_num_threads(arguments.threads)
    try:
        config = PretrainConfig(
            steps=arguments.steps,
            minutes=arguments.minutes,
            seed=arguments.seed + 7,
            learning_rate=arguments.learning_rate,
            made_up_share=arguments.made_up,
        )
        run(arguments.data, arguments.out, config, arguments.seed, arguments.tasks, arguments.base, arguments.level)
    except InvarError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def run(
    data_folder: Path,
    out: Path,
    config: PretrainConfig,
    seed: int,
    num_tasks: int,
    base: Path | None = None,
    level: int = 0,
) -> None:
    """See the module; ``out`` gets the model in bf16, ``pretraining.jsonl`` and ``reading.json``."""
    data = ReadingMixture(data_folder, seed)
    if base:
        model = cast(LlamaForCausalLM, load_causal_lm(str(base)))
        tokenizer = cast(PreTrainedTokenizerFast, load_tokenizer(str(base)))
    else:
        texts = [f"{row['title']} {row['text']}" for row in data.wiki[:: max(1, len(data.wiki) // _COUNTED)]]
        texts += [item.question for item in (*data.squad, *data.others)]
        counts = count_tokens(minilm_tokenizer().backend_tokenizer, texts)
        tokenizer, kept = prune_tokenizer(minilm_folder() / "tokenizer.json", counts, VOCABULARY, MAX_POSITIONS)
        model = start_model(minilm_embeddings()[kept], tokenizer.pad_token_id, tokenizer.eos_token_id, seed=seed)
    training = Pretraining(model, tokenizer, data, config)
    training.level = level
    glimpse = reading_tasks(data, 60)
    for line in training.run(out):
        print(json.dumps(line), flush=True)
        if line["step"] % 250 == 0:
            seen = {name: round(exact_match(training, tasks)[0], 2) for name, tasks in glimpse.items()}
            print(json.dumps(seen | retrieval_recall(training)), flush=True)
            save(training, out / "unfinished")
    found = {name: exact_match(training, tasks) for name, tasks in reading_tasks(data, num_tasks).items()}
    (out / "reading.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found))
    save(training, out)


def save(training: Pretraining, folder: Path) -> None:
    """The model in bf16 with its tokenizer, loadable by plain transformers."""
    model = copy.deepcopy(training.model).bfloat16()
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    training.tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
