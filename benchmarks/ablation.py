"""What each loss of stage 1 does to recall and variance, on Natural Questions and on SQuAD's human
rewrites.

    python benchmarks/ablation.py run [key=value ..] --data DATA --folder runs/ablation
    python benchmarks/ablation.py run retriever.invariance_weight=2 --data DATA --systems invariance
    --seeds 100 \
        --splits heldout                      # choosing weights: on held-out train questions only
    python benchmarks/ablation.py summary --folder runs/ablation

``run`` trains every system with every seed, each in a process of its own (one thread, no Ray, the
same stage and losses), and goes on where it was stopped: what stands in ``results/runs.csv`` is not
run again.  ``summary`` writes ``results/summary.md`` and pictures.  DATA is a folder with ``nq/``
and ``squad/`` (corpus, questions, NoiseQA).
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ablation_data import SPLITS, EvalSet, ablation_config, eval_set, prepare
from ablation_measure import DEPTH, OVERLAP_K, QUESTION_FIELDS, measure, question_values
from ablation_train import SYSTEMS, train, used_settings

from invar_ray.config import Config, ExperimentalRetriever, RetrieverConfig, to_dict
from invar_ray.evaluation.metrics import recall_at_k
from invar_ray.evaluation.variance import Family, overlap_at_k, summarise_families
from invar_ray.models.encoder import Encoder
from invar_ray.store.artifacts import digest

SEEDS = (0, 1, 2)
WORDING_FIELDS = ["id", "cluster", "kind", "overlap_at_10", "recall_at_5"]


def main() -> None:
    """Parse and dispatch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["run", "one", "summary"])
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--passages", type=int, default=5000, help="passages that a set is searched in, at least"
    )
    parser.add_argument(
        "--questions", type=int, help="only so many of each set's questions (for a trial)"
    )
    arguments = parser.parse_args()
    if arguments.command == "summary":
        from ablation_summary import write_summary

        print(write_summary(arguments.folder / "results"))
        return
    if arguments.data is None:
        parser.error("--data: name the folder that holds nq/ and squad/")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    (run_one if arguments.command == "one" else run_all)(arguments)


def run_all(arguments: argparse.Namespace) -> None:
    """Every system and seed that has no rows yet, each in a process."""
    config = ablation_config(arguments.data, arguments.folder, arguments.overrides)
    with prepare(config)[0]:
        pass  # made once here, so that the processes only open it
    jobs = [(system, seed) for seed in arguments.seeds for system in arguments.systems]
    for number, (system, seed) in enumerate(jobs, start=1):
        if not SYSTEMS[system].trained and seed != arguments.seeds[0]:
            continue  # nothing is drawn
        missing = [
            split for split in arguments.splits if not _done(arguments, config, system, seed, split)
        ]
        print(
            f"[{number}/{len(jobs)}] {system}, seed {seed}: {'to do' if missing else 'stands'}",
            flush=True,
        )
        if not missing:
            continue
        command = [
            sys.executable,
            __file__,
            "one",
            *arguments.overrides,
            "--data",
            str(arguments.data),
        ]
        command += [
            "--folder",
            str(arguments.folder),
            "--systems",
            system,
            "--seeds",
            str(seed),
            "--splits",
            *missing,
        ]
        command += ["--passages", str(arguments.passages)]
        if arguments.questions:
            command += ["--questions", str(arguments.questions)]
        subprocess.run(command, check=True)


def run_one(arguments: argparse.Namespace) -> None:
    """Train one system with one seed and measure it."""
    torch.set_num_threads(1)
    (name,), (seed,) = arguments.systems, arguments.seeds
    system = SYSTEMS[name]
    config = ablation_config(arguments.data, arguments.folder, arguments.overrides)
    pipeline, trainset = prepare(config)
    log = _results(arguments) / "logs" / f"{name}-s{seed}-{_key(arguments, config, name)}.jsonl"
    stage, seconds = train(system, config, pipeline, trainset, seed, log)
    encoder = Encoder(stage.module, stage.tokenizer, stage.spec)  # type: ignore[arg-type]
    for split in arguments.splits:
        data = eval_set(
            split,
            arguments.data,
            arguments.folder,
            stage.tokenizer,
            config,
            arguments.passages,
            limit=arguments.questions,
            rewrites=system.fused,
        )
        for label, ranked in measure(encoder, data, fused=system.fused).items():
            _keep(arguments, config, f"{name}{label}", seed, data, ranked, seconds, of=name)


def _results(arguments: argparse.Namespace) -> Path:
    folder: Path = arguments.folder / "results"
    return folder


def _key(arguments: argparse.Namespace, config: Config, name: str) -> str:
    """Of what the system used: a choice of the invariance loss's weight runs none of the others
    again.
    """
    system = SYSTEMS[name]
    settings = to_dict(used_settings(system, config)) | to_dict(config.experimental.retriever)
    plain = to_dict(RetrieverConfig()) | to_dict(ExperimentalRetriever())
    unused = (
        []
        if system.invariance
        else [field for field in settings if field.startswith(("invariance_", "pattern_"))]
    )
    unused += (
        [] if system.alignment else [field for field in settings if field.startswith("alignment_")]
    )
    settings |= {field: plain[field] for field in unused}
    if system.heavy or system.second:
        kept = ("invariance_weight", "invariance_temperature", "invariance_ramp_steps")
        settings |= {field: getattr(config.retriever, field) for field in kept}
    of_all = {
        "model": to_dict(config.model),
        "passages": arguments.passages,
        "questions": arguments.questions or 0,
    }
    return digest({**of_all, "retriever": settings})[:10]


def _done(
    arguments: argparse.Namespace, config: Config, system: str, seed: int, split: str
) -> bool:
    path = _results(arguments) / "runs.csv"
    if not path.exists():
        return False
    with open(path, encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    wanted = {
        "of": system,
        "seed": str(seed),
        "split": split,
        "settings": _key(arguments, config, system),
    }
    found = {
        row["system"] for row in rows if all(row[name] == value for name, value in wanted.items())
    }
    return len(found) == 1 + SYSTEMS[system].fused


def _keep(
    arguments: argparse.Namespace,
    config: Config,
    label: str,
    seed: int,
    data: EvalSet,
    ranked: list[list[list[str]]],
    seconds: float,
    *,
    of: str,
) -> None:
    """The questions' numbers in a file of their own first, then the run's row, in one write."""
    folder, key = _results(arguments), _key(arguments, config, of)
    name = f"{label.replace(' + ', '-')}-s{seed}-{data.name}-{key}.csv"
    values = [question_values(lists, gold) for lists, gold in zip(ranked, data.gold, strict=True)]
    rows = [
        [
            data.ids[number],
            data.clusters[number],
            int(data.seen[number]),
            *(one[field] for field in QUESTION_FIELDS),
        ]
        for number, one in enumerate(values)
    ]
    (folder / "questions").mkdir(parents=True, exist_ok=True)
    temporary = folder / "questions" / f".{name}"
    temporary.write_text(
        _csv([["id", "cluster", "seen", *QUESTION_FIELDS], *rows]), encoding="utf-8"
    )
    temporary.replace(folder / "questions" / name)

    (folder / "wordings").mkdir(exist_ok=True)
    by_wording = [
        [
            data.ids[number],
            data.clusters[number],
            kind,
            overlap_at_k(lists[0], other, OVERLAP_K),
            recall_at_k(other, gold, 5),
        ]
        for number, (lists, gold) in enumerate(zip(ranked, data.gold, strict=True))
        for kind, other in zip(data.kinds[number], lists[1:], strict=True)
    ]
    (folder / "wordings" / name).write_text(_csv([WORDING_FIELDS, *by_wording]), encoding="utf-8")

    families = [Family(lists, gold) for lists, gold in zip(ranked, data.gold, strict=True)]
    summary = summarise_families(families, overlap_k=OVERLAP_K, ks=(1, 5, 20), depth=DEPTH)
    columns = [
        "system",
        "of",
        "seed",
        "split",
        "settings",
        "questions",
        "passages",
        "seconds",
        "file",
    ]
    metrics = sorted(summary)
    line = [
        label,
        of,
        seed,
        data.name,
        key,
        len(data.ids),
        len(data.passages),
        round(seconds, 1),
        name,
    ]
    path = folder / "runs.csv"
    text = _csv(
        [[*line, *(f"{summary[metric]:.6f}" for metric in metrics), " ".join(arguments.overrides)]]
    )
    if not path.exists():
        text = _csv([[*columns, *metrics, "overrides"]]) + text
    with open(path, "ab") as stream:
        stream.write(text.encode("utf-8"))  # one write: a row is there or it is not
        stream.flush()
        os.fsync(stream.fileno())
    shown = ", ".join(
        f"{metric} {summary[metric]:.3f}"
        for metric in metrics
        if "recall_at_5" in metric or "10" in metric
    )
    print(f"  {label} seed {seed} on {data.name}: {shown}", flush=True)


def _csv(rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    return stream.getvalue()


if __name__ == "__main__":
    main()
