"""What comes in: documents, questions, rewrites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import ConfigDict, NonNegativeInt, PositiveFloat, PositiveInt

from invar_ray.config.fields import FORBID, MetadataNames, PositiveShare, Share


@dataclass(frozen=True)
class StorageConfig:
    """Where artifacts live. Scale: never part of a fingerprint."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    root_uri: str = "runs/demo"
    """Root of the artifact store: a local path, or an ``s3://`` / ``gs://`` / ``file://`` URI that
    every node can reach.
    """


@dataclass(frozen=True)
class CorpusConfig:
    """The documents to index."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    uri: str = "builtin:facts"
    """File, folder or URI of documents, or ``builtin:facts``, the corpus that the project wrote for
    its demo.
    """
    format: Literal["auto", "jsonl", "parquet", "tsv", "text", "html", "pdf", "docx", "builtin"] = (
        "auto"
    )
    """How to read it; ``auto`` goes by the file's ending."""
    limit: PositiveInt | None = None
    """Read at most this many documents, in file order; ``null`` reads all."""
    max_file_mb: PositiveFloat = 32.0
    """Largest file that is one document (text, HTML, PDF, Word) and largest row of a JSON lines or
    Parquet file, in MiB; a larger one is left out of a folder, with a line that says so.  It also
    bounds what a file may unpack to. [ours]"""
    max_malformed_share: Share = 0.01
    """Of the rows of JSON lines, TSV and Parquet files: malformed ones go to a quarantine file, and
    above this share the run stops.  In a folder the share counts from 1,000 rows on; below, each
    fault costs a line.  It decides whether there is a result, never which: it enters no
    fingerprint. [ours]"""
    distractors: NonNegativeInt | None = None
    """Beyond the documents that the questions need, keep this many others (in file order); ``null``
    keeps all.  Makes a stated part of a large corpus in which every kept question can still be
    answered."""
    metadata: MetadataNames = ()
    """Fields of rows (columns of tables) that passages keep, e.g. ``[tenant, language]``: texts,
    whole numbers and truth values, by which searches and API keys can be narrowed (``where``).  A
    row without one has no value; any other value makes the row malformed."""
    chunk_tokens: PositiveInt = 128
    """Longest passage in tokens of the base's tokenizer, without title and special tokens; it ends
    with a sentence, unless that is longer."""
    chunk_stride: PositiveInt = 128
    """Tokens between the starts of neighbouring passages, moved to the start of a sentence; equal
    to ``chunk_tokens`` for no overlap."""


@dataclass(frozen=True)
class QuestionsConfig:
    """Questions to train and to evaluate on; never the same ones."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    train_uri: str = "builtin:facts"
    """JSON lines of ``{id, question, answers[], positive_ids[], rewrites[]?}`` (``.gz`` is fine),
    or ``builtin:facts``.
    """
    dev_uri: str = "builtin:facts"
    """Questions that every table reports on; nothing is trained on them."""
    format: Literal[
        "auto",
        "jsonl",
        "nq-open",
        "dpr-qa",
        "triviaqa",
        "popqa",
        "squad",
        "hotpotqa",
        "webquestions",
        "entityquestions",
        "dpr",
        "kilt",
        "beir",
    ] = "auto"
    """How both files are written (names: docs/design/benchmarks.md); ``auto`` looks into them.
    """
    train_limit: PositiveInt | None = None
    """Use at most this many training questions (a seeded sample); ``null`` uses all."""
    dev_limit: PositiveInt | None = None
    """Evaluate on at most this many questions (a seeded sample); ``null`` uses all."""
    near_duplicates: PositiveShare | None = None
    """Drop training questions a wording of which resembles a dev question's by this much or more,
    in (0, 1] (common words count little; 0.8 is nearly the same question), and list the pairs.
    ``null`` drops those with an equal wording only."""


@dataclass(frozen=True)
class RewritesConfig:
    """Environments: rewrites of the question x windows of the document."""

    __pydantic_config__: ClassVar[ConfigDict] = FORBID

    num_rewrites: NonNegativeInt = 2
    """Rewrites per question beside the anchor (published: 2)."""
    num_windows: NonNegativeInt = 1
    """Cuts per document beside the anchor cut."""
    provider: Literal["rules", "given", "file", "endpoint"] = "rules"
    """``given`` takes the rewrites that came with the data and fills up from the rules; ``file``
    reads ``uri``; ``endpoint`` asks an OpenAI-compatible server, with the key in the environment
    variable ``OPENAI_API_KEY``.  The dev questions' come from there, too; with ``endpoint`` they
    come from the rules."""
    uri: str | None = None
    """For ``file``: JSON lines of ``{question_id, text, kind?}``, of the training and of the dev
    questions.  For ``endpoint``: the server's base URL, e.g. ``http://127.0.0.1:8000/v1``."""
    endpoint_model: str | None = None
    """For ``endpoint``: the model name to ask for."""
