"""The service, started and stopped from the command line and from jobs."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict
from typing import Any

from invar_ray.answering.current import current_index, fits_generator, newest_generator
from invar_ray.config import Config
from invar_ray.console import is_verbose
from invar_ray.errors import ArtifactError, MissingArtifactError, MixedArtifactsError
from invar_ray.executor import OnRay, one_error, own_cores
from invar_ray.models.encoder import EncoderSpec
from invar_ray.steps.questions import load_examples
from invar_ray.steps.report import SYSTEM_NAMES
from invar_ray.store.artifacts import Artifact, Store, open_artifact
from invar_ray.text.answers import contains_answer

_EXAMPLES, _EXAMPLE_CHARS = 4, 80
_MOST_REPLICAS = 4


def serve_until_stopped(
    config: Config, index_uri: str | None = None, generator_uri: str | None = None
) -> None:
    """Serve over HTTP until Ctrl-C; nothing is trained or embedded, and what can fail does so
    before Ray starts.

    Args:
        config: where the store is, and how to serve.
        index_uri: the index; ``None`` takes the current one of the store.
        generator_uri: the generator; ``None`` takes the newest of the index's base.

    Raises:
        MissingArtifactError: the store lacks one of them.  MixedArtifactsError: if they have
            different bases.
        ConfigError: a key of the service is wrong.  ResourceError: the port is taken, or it does
            not start.
    """
    index = (
        open_artifact(index_uri, "index")
        if index_uri
        else current_index(Store(config.storage.root_uri))
    )
    generator = (
        open_artifact(generator_uri, "generator") if generator_uri else newest_generator(index)
    )
    if generator is None:
        raise MissingArtifactError(
            f"{index.store.root_uri} has no generator of the base of {index.ref}",
            action="train it (invar-ray train), or name one with --generator",
        )
    with OnRay(config.scale) as executor:
        args = service_args(index, generator, config)
        _service().check_start(args, config.serve.host, config.serve.port, joins=executor.joins)
        executor.connect()
        # A line for each request, the audit log's included, only for those who want to see all.
        level = "INFO" if is_verbose() else "WARNING"
        start_service(index, generator, config, blocking=True, log_level=level)


def start_service(
    index: Artifact,
    generator: Artifact,
    config: Config,
    *,
    blocking: bool = False,
    log_level: str = "INFO",
) -> str:
    """Serve an index and a generator on the connected Ray; returns the address (after Ctrl-C, if
    ``blocking``).

    Raises:
        MixedArtifactsError: if they have different bases.  ResourceError: if it does not start.
    """
    args = service_args(index, generator, config)
    with one_error("starting the service"):
        address: str = _service().start(
            args,
            host=config.serve.host,
            port=config.serve.port,
            blocking=blocking,
            log_level=log_level,
        )
    return address


def service_args(index: Artifact, generator: Artifact, config: Config) -> Any:
    """What the service is deployed with, as ``serve.args.AppArgs``, from a run's config.

    Raises:
        MixedArtifactsError: the generator does not go with the index.
    """
    encoder = EncoderSpec.from_json(index.info["encoder"])
    if not fits_generator(index, generator):
        raise MixedArtifactsError(
            f"{index.uri} was made with base {encoder.base.fingerprint}, {generator.uri} with base "
            f"{generator.info['base']['fingerprint']}",
            expected="an index and a generator of one base, or an index of an encoder whose "
            "passages were cut in the tokens of the generator's base",
            action="reindex with the generator's base, or train a generator on the index's",
        )
    # An adapter that was not trained here says nothing of an answer's length: the service's default
    # holds.
    length = {name: generator.info[name] for name in ("max_new_tokens",) if name in generator.info}
    settings = asdict(config.serve)  # by the names of AppArgs
    del settings["host"], settings["port"]
    return _service().AppArgs(
        index_uri=index.uri,
        generator_uri=generator.uri,
        mode=config.search.mode,
        reranker=config.search.reranker,
        rerank_depth=config.search.rerank_depth,
        examples=example_questions(index, generator),
        **_replicas(config),
        **settings,
        **length,
    )


def _replicas(config: Config) -> dict[str, tuple[int, int]]:
    """Fewest and most replicas on a machine that is ours alone: at most one of a kind for every two
    cores.  On a cluster, where nodes may come, the defaults of ``AppArgs`` hold.
    """
    cores = own_cores(config.scale)
    if cores is None:
        return {}
    most = max(1, min(_MOST_REPLICAS, cores // 2))
    kinds = {"ingress_replicas": min(most, 2)} | dict.fromkeys(
        ("retriever_replicas", "generator_replicas", "reranker_replicas"), most
    )
    return {kind: (1, count) for kind, count in kinds.items()}


def example_questions(index: Artifact, generator: Artifact) -> list[str]:
    """A few short dev questions of the run that made the generator, where it read the passages of
    this index; none, where the run's questions are gone.  Those that a report shows as answered
    right, and given, come first.
    """
    if "readings" not in generator.manifest.parents:
        return []
    try:
        readings = generator.parent("readings")
        if readings.parent("passages").fingerprint != index.parent("passages").fingerprint:
            return []
        asked = load_examples(readings.parent("hits").parent("questions"), "dev")
    except ArtifactError:
        return []
    short = [each.question for each in asked if len(each.question) <= _EXAMPLE_CHARS]
    right = _answered_right(generator)
    known = [question for question in short if question in right]
    others = [question for question in short if question not in right]
    return [*_spread(known), *_spread(others)][:_EXAMPLES]


def _spread(questions: list[str]) -> list[str]:
    return questions[:: max(1, len(questions) // _EXAMPLES)][:_EXAMPLES]


def _answered_right(generator: Artifact) -> set[str]:
    """Questions that the newest report of a generator shows as answered right, and given."""
    name = SYSTEM_NAMES["both"]
    # An example is a convenience: no report of another time may keep a service from its start, and
    # none is fetched from afar.
    if not generator.store.is_local:
        return set()
    try:
        report = generator.store.newest(
            "report", lambda made: made.manifest.parents.get(f"generator/{name}") == generator.ref
        )
        if report is None:
            return set()
        lines = report.path("answers.jsonl").read_text(encoding="utf-8").splitlines()
        return {
            each["question"]
            for each in map(json.loads, lines)
            if each["system"] == name
            and not (each["refused"][0] or each["unsure"][0])
            and contains_answer(each["texts"][0], each["answers"])
        }
    except (ArtifactError, OSError, ValueError, KeyError):
        return set()


def stop_service() -> None:
    """Stop what :func:`start_service` started."""
    _service().stop()


def _service() -> Any:
    # serve/ is a top level package of its own, above this one: it is started by name.
    return importlib.import_module("serve.app")
