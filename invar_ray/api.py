"""What ``import invar_ray`` offers: ask a finished run, train, index and evaluate from Python.

Thin: everything here is one call of the pipeline or of :mod:`invar_ray.answering`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import invar_ray.answering.rag as answering
from invar_ray.answering.current import current_index, newest_generator
from invar_ray.answering.followup import Turn
from invar_ray.answering.rerank import PassageRetriever, Reranked, Reranking, open_reranker
from invar_ray.answering.retriever import Retriever, open_retriever
from invar_ray.config import Config, SearchConfig
from invar_ray.errors import ArtifactError, MissingArtifactError, RequestError
from invar_ray.evaluation.report import Report, read_report
from invar_ray.evaluation.variance import overlap_at_k
from invar_ray.models.adapters import share_base
from invar_ray.models.base import (
    BaseRef,
    load_tokenizer,
    stored_base,
)
from invar_ray.models.generator import Generator
from invar_ray.models.loading import open_base_generator, open_generator, open_model
from invar_ray.models.precision import Precision, made_in
from invar_ray.questions.rules import RuleRewriter
from invar_ray.schema import Answer, Example, Hit, Mode
from invar_ray.store.artifacts import Artifact, Store, open_artifact
from invar_ray.store.published import Published

if TYPE_CHECKING:
    from invar_ray.pipeline import Pipeline

_BASE_CONTEXT, _BASE_ANSWER = 2048, 32


@dataclass(frozen=True, slots=True)
class Stability:
    """How much of what is found depends on the wording.

    Attributes:
        overlap: mean Jaccard overlap of the first k passages over all pairs of wordings, in [0, 1];
            1 where every wording finds the same ones.
        wordings: the question as asked, then its rewrites.
        hits: what each wording found, in the same order.
    """

    overlap: float
    wordings: tuple[str, ...]
    hits: tuple[tuple[Hit, ...], ...]


class Rag:
    """A finished run that can be asked, in this process and without Ray; :func:`open_rag` makes
    one.

    Models are loaded when they are first needed: a search loads no generator.

    Args:
        index: artifact of kind ``index``; it names its encoder.
        generator: artifact of kind ``generator`` on the same base; ``None``: there is none.
        untrained: without a generator the base answers as it is; else it only searches.
        k: how many passages an answer rests on.
        search: how, see the section ``search`` of a recipe.
        device: where the models run.
    """

    def __init__(
        self,
        index: Artifact,
        generator: Artifact | None,
        *,
        untrained: bool = False,
        k: int = 5,
        search: SearchConfig = SearchConfig(),  # noqa: B008 - frozen
        device: str = "cpu",
    ) -> None:
        self.index, self.k = index, k
        self._untrained = untrained
        self._search, self._reranking = search, Reranking.of(search)
        self._generator, self._device = generator, device
        self._bases: dict[str, Any] = {}

    @property
    def generator_artifact(self) -> Artifact | None:
        """The stage-2 adapter that answers; ``None``: there is none."""
        return self._generator

    @cached_property
    def retriever(self) -> Retriever:
        """Searches; has ``encode_queries`` and ``encode_passages``."""
        alone = self.index.info["encoder"]["kind"] != "llm"
        return open_retriever(
            self.index.uri,
            device=self._device,
            open_base_tree=None if alone else partial(self._tree, made_in(self.index)),
            mode=self._search.mode,
        )

    @cached_property
    def _finder(self) -> PassageRetriever:
        """The retriever, and a reranker behind it where the run has one."""
        if self._reranking is None:
            return self.retriever
        reranker = open_reranker(self._reranking.ref, made_in(self.index), self._device)
        return Reranked(self.retriever, reranker, self._reranking.depth)

    @cached_property
    def generator(self) -> Generator:
        """Continues prompts.

        Raises:
            MissingArtifactError: there is no trained one, and the base is not to answer, or nobody
                knows which it is.
        """
        made: Generator
        if self._generator is None:
            self.check_generator()
            base = _answering_base(self.index)
            if base is None:
                raise MissingArtifactError(
                    f"no generator goes with {self.index.ref}, whose retriever cannot answer",
                    expected="a generator, trained by the run that cut its passages",
                    action="train one (invar-ray train generator), or name one",
                )
            made = open_base_generator(
                base,
                self.index.store,
                _BASE_CONTEXT,
                precision=made_in(self.index),
                device=self._device,
            )
        else:
            tree = partial(self._tree, made_in(self._generator))
            made = open_generator(self._generator.uri, open_base_tree=tree)
        return made

    def check_generator(self) -> None:
        """Nothing is loaded: whether :meth:`ask` has something that answers.

        Raises:
            MissingArtifactError: there is no trained generator, and the base is not to answer.
        """
        if self._generator is None and not self._untrained:
            raise MissingArtifactError(
                f"{self.index.store.root_uri} has no generator of the base of {self.index.ref}",
                expected="a trained generator (searching needs none)",
                action="train one (invar-ray train generator), or let the base answer "
                "(--untrained, untrained=True)",
            )

    def search(self, question: str, k: int | None = None) -> list[Hit]:
        """The ``k`` best passages, best first.

        Raises:
            RequestError: the question is empty, or ``k`` is below 1.
        """
        return self.search_all([question], k)[0]

    def search_all(self, questions: Sequence[str], k: int | None = None) -> list[list[Hit]]:
        """As :meth:`search`, for many questions at once, which costs less than one by one."""
        if not all(question.strip() for question in questions):
            raise RequestError("the question is empty", expected="some words")
        return self._finder.retrieve(list(questions), self.k if k is None else k)

    def ask(
        self,
        question: str,
        k: int | None = None,
        *,
        max_new_tokens: int | None = None,
        turns: Sequence[Turn] = (),
    ) -> Answer:
        """An answer from the ``k`` best passages, with its citations and the passages.

        Args:
            question: the question.
            k: how many passages; ``None`` takes the run's.
            max_new_tokens: longest answer; ``None`` takes what the generator was trained for.
            turns: questions and answers before this one: a follow-up is read in their light, and
                ``question`` of the answer says how.

        Raises:
            RequestError: the question is empty, or does not fit the model's context.
            MissingArtifactError: there is no generator, see :attr:`generator`.
        """
        self.check_generator()  # before a retriever is loaded
        trained = {} if self._generator is None else self._generator.info
        return answering.answer_question(
            self._finder,
            self.generator,
            question,
            turns=turns,
            top_k=self.k if k is None else k,
            max_new_tokens=max_new_tokens or trained.get("max_new_tokens", _BASE_ANSWER),
        )

    def stability(
        self, question: str, k: int | None = None, *, rewrites: int = 4, seed: int = 0
    ) -> Stability:
        """Search with a question and with rewrites of it, made by rule, and compare what is found.

        Args:
            question: the question.
            k: how many passages are compared.
            rewrites: how many other wordings; a short question may give fewer.
            seed: of the rules.
        """
        depth = self.k if k is None else k
        made = RuleRewriter().rewrite(Example("asked", question, (), ()), rewrites, seed)
        wordings = (question, *(each.text for each in made))
        found = self.search_all(wordings, depth)
        ids = [[hit.passage_id for hit in hits] for hits in found]
        pairs = [overlap_at_k(a, b, depth) for a, b in itertools.combinations(ids, 2)]
        return Stability(fmean(pairs) if pairs else 1.0, wordings, tuple(map(tuple, found)))

    def _tree(self, precision: Precision, base: BaseRef, store: Store) -> tuple[Any, Any]:
        """Model and tokenizer; retriever and generator share the tensors of one base."""
        source, key = base.folder_or_name(store), f"{base.fingerprint} {precision}"
        if key not in self._bases:
            self._bases[key], _ = open_model(base, store, precision, self._device)
        shared = share_base(self._bases[key])
        return shared, load_tokenizer(source, base.revision)


def open_rag(
    root: str = "runs/demo",
    *,
    corpus: str | None = None,
    index: str | None = None,
    generator: str | None = None,
    untrained: bool = False,
    k: int = 5,
    mode: Mode = SearchConfig.mode,
    reranker: str | None = SearchConfig.reranker,
    rerank_depth: int = SearchConfig.rerank_depth,
    device: str = "cpu",
) -> Rag:
    """Open what a run made, to search, and to ask where a generator was trained.

    Args:
        root: the storage root of the run: a folder or a URI.
        corpus: ask the newest index of this file or folder; by default the current index.
        index: URI of an index artifact, where another one than the current is meant.
        generator: URI of a stage-2 adapter; by default the newest one of the index's base.
        untrained: search and answer with the base where no adapter was trained.
        k: how many passages, where a call does not say it.
        mode: search by vectors (``dense``), by words (``bm25``) or by both (``hybrid``); an index
            without BM25 is searched by its vectors.
        reranker: a cross-encoder that sorts the best hits anew, see ``search.reranker``.
        rerank_depth: how many it reads.
        device: ``cpu`` or ``cuda``.

    Raises:
        ArtifactError: there is no index, it was made by a base that nobody trained, or another run
            is making a new one right now.
    """
    store = Store(root)
    found = open_artifact(index, "index") if index else current_index(store, corpus)
    encoder = found.info["encoder"]
    if index is None and (busy := store.being_made("retriever", "vectors", "index")):
        raise ArtifactError(
            f"another run is making {busy[0]} in {root}, so {found.ref} may not be what you mean",
            action=f"wait until it has ended, or name the index: {found.uri}",
        )
    if encoder["kind"] == "llm" and encoder["adapter"] is None and not untrained:
        raise ArtifactError(
            f"{found.ref} was made by a base that was never trained to find passages",
            expected="an index under a trained retriever",
            action="train one (invar-ray train), or ask it as it is (--untrained, untrained=True)",
        )
    trained = open_artifact(generator, "generator") if generator else newest_generator(found)
    search = SearchConfig(mode=mode, reranker=reranker, rerank_depth=rerank_depth)
    return Rag(found, trained, untrained=untrained, k=k, search=search, device=device)


def _answering_base(index: Artifact) -> BaseRef | None:
    """The base that answers where no generator was trained: the retriever's, or, where that has an
    encoder of its own, the built-in one in whose tokens the passages were cut; ``None``: it is not
    known.
    """
    encoder = index.info["encoder"]
    if encoder["kind"] == "llm":
        return BaseRef(**encoder["base"])
    wanted = index.parent("passages").manifest.config.get("tokenizer")
    made = index.store.newest("model", lambda model: model.fingerprint == wanted)
    return None if made is None else stored_base(made)


def _pipeline(config: Config) -> Pipeline:
    """The graph of a run; imported here, since it brings Ray and asking needs none."""
    from invar_ray import pipeline

    return pipeline.Pipeline(config)


def index_documents(config: Config, corpus: str, *, adapter: Artifact | None = None) -> Artifact:
    """Index a file or folder and make the index current.

    Args:
        config: the run, of :func:`invar_ray.load_config`.
        corpus: file, folder or URI.
        adapter: of :func:`train_retriever`; ``None`` embeds with the base as it is.
    """
    settings = replace(config, corpus=replace(config.corpus, uri=corpus, distractors=None))
    with _pipeline(settings) as pipeline:
        made = pipeline.base_index if adapter is None else pipeline.index_with(adapter)
        Published(pipeline.store).publish([made], verify=False)
        return made


def train_retriever(config: Config) -> Artifact:
    """Train stage 1, or find the adapter that equals it; ``.uri`` says where it is."""
    with _pipeline(config) as pipeline:
        return pipeline.retriever


def train_generator(config: Config) -> Artifact:
    """Train stage 2 on what stage 1 finds (trained first, where it is missing), and make the index
    that it read current.
    """
    with _pipeline(config) as pipeline:
        made = pipeline.generator
        Published(pipeline.store).publish([pipeline.index], verify=False)
        return made


def evaluate(config: Config) -> Report:
    """Measure the systems that ``config.evaluation.systems`` names; trains what is missing."""
    with _pipeline(config) as pipeline:
        return read_report(pipeline.report.path("report.json"))
