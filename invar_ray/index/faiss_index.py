"""The vector index.  The only file that imports FAISS.

An index artifact holds ``index.faiss`` (inner product over unit vectors, i.e. cosine), row i being
passage i of its ``passages`` parent, and ``probes.parquet``: texts with the vectors that the
index's own encoder gave them.

What kind of index to build is decided in :mod:`invar_ray.index.planner`, the order of building in
:mod:`invar_ray.index.build`; here is what FAISS does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import faiss as _faiss
import numpy as np
import numpy.typing as npt

from invar_ray.errors import ArtifactError, MixedArtifactsError, RequestError
from invar_ray.index.blocks import Rows, Vectors
from invar_ray.index.planner import CODEBOOK_ROWS, OPQ_ROUNDS, OPQ_ROWS
from invar_ray.models.batching import refuse_not_finite
from invar_ray.store.artifacts import Artifact

faiss: Any = _faiss  # its type stubs know a part of it
INDEX_FILE = "index.faiss"
_FEW = 4096
"""With so few allowed rows, compare them one by one: a search in the graph would miss them."""
Mask = npt.NDArray[np.bool_]


class Index:
    """A loaded FAISS index: unit vectors in, (scores, rows) out.  Searches do not change it:
    threads may share one.

    Args:
        index: FAISS's.
        depth: how far an approximate index looks: lists visited (nprobe) of an IVF, candidates kept
            (efSearch) of a graph; an exact one has none.
    """

    def __init__(self, index: Any, depth: int = 1) -> None:
        self._index = index
        self._depth = depth
        self._core = _core(index)
        # wrapped in something that takes no parameters, e.g. a refinement
        with contextlib.suppress(RuntimeError):
            faiss.extract_index_ivf(index).nprobe = depth

    @property
    def size(self) -> int:
        """Number of vectors."""
        return int(self._index.ntotal)

    @property
    def dimension(self) -> int:
        """D."""
        return int(self._index.d)

    @property
    def depth(self) -> int:
        """See the class."""
        return self._depth

    @property
    def most_depth(self) -> int:
        """The depth that leaves nothing out (0: the index has no depth)."""
        if isinstance(self._core, faiss.IndexIVF):
            return int(self._core.nlist)
        return self.size if isinstance(self._core, faiss.IndexHNSW) else 0

    def search(
        self, queries: Vectors, top_k: int, *, allowed: Mask | None = None, depth: int | None = None
    ) -> tuple[Vectors, Rows]:
        """The nearest rows of each query; many queries at once cost less than one by one.

        Args:
            queries: [N, D] unit rows.
            top_k: how many; where the index holds fewer, fewer come back.
            allowed: [size] True for rows that may be found; an approximate index then looks deeper,
                by the inverse of their share.
            depth: in place of the index's own.

        Returns:
            cosines [N, k] falling (ties by row), and row numbers [N, k]; -1 marks a place that
            stayed empty.

        Raises:
            MixedArtifactsError: if D differs.  RequestError: if ``allowed`` has another length.
            ModelError: a query is not finite.
        """
        if queries.shape[1] != self.dimension:
            raise MixedArtifactsError(
                f"queries have {queries.shape[1]} dimensions, the index has {self.dimension}",
                expected="the encoder that made the index",
            )
        refuse_not_finite(queries, [f"question {number + 1}" for number in range(len(queries))])
        queries, top_k = np.ascontiguousarray(queries, dtype=np.float32), min(top_k, self.size)
        depth = depth or self._depth
        if allowed is None:
            scores, rows = self._index.search(queries, top_k, params=self._parameters(depth, None))
        else:
            if allowed.shape != (self.size,):
                raise RequestError(
                    f"the filter has shape {allowed.shape}", expected=f"({self.size},), one per row"
                )
            count = int(np.count_nonzero(allowed))
            if count <= _FEW and isinstance(self._core, faiss.IndexHNSW):
                scores, rows = self._compare(queries, top_k, np.flatnonzero(allowed))
            else:
                bits = np.packbits(allowed, bitorder="little")
                selector = faiss.IDSelectorBitmap(bits)
                deeper = min(self.most_depth, -(-depth * self.size // max(1, count)))
                scores, rows = self._index.search(
                    queries, top_k, params=self._parameters(deeper, selector)
                )
        # FAISS returns ties in no useful order; empty places (-1) have the lowest score and stay
        # last.
        order = np.lexsort((rows, -scores), axis=1)
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)

    def _parameters(self, depth: int, selector: Any) -> Any:
        given = {} if selector is None else {"sel": selector}
        if isinstance(self._core, faiss.IndexIVF):
            parameters = faiss.SearchParametersIVF(nprobe=min(depth, self.most_depth), **given)
        elif isinstance(self._core, faiss.IndexHNSW):
            parameters = faiss.SearchParametersHNSW(efSearch=max(1, depth), **given)
        elif selector is None:
            return None
        else:
            parameters = faiss.SearchParameters(**given)
        if isinstance(self._index, faiss.IndexPreTransform):
            return faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters

    def _compare(self, queries: Vectors, top_k: int, candidates: Rows) -> tuple[Vectors, Rows]:
        scores = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
        rows = np.full((len(queries), top_k), -1, dtype=np.int64)
        if len(candidates):
            found = queries @ self._index.reconstruct_batch(candidates).T
            best = np.argsort(-found, axis=1, kind="stable")[:, :top_k]
            scores[:, : best.shape[1]] = np.take_along_axis(found, best, axis=1)
            rows[:, : best.shape[1]] = candidates[best]
        return scores, rows


def _core(index: Any) -> Any:
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def gpus() -> int:
    """How many GPUs FAISS can use; 0 with the CPU wheel."""
    # index_cpu_to_all_gpus with none returns an empty index and no error: this is the only gate.
    return int(getattr(faiss, "get_num_gpus", lambda: 0)())


def new_index(dimension: int, factory: str, rows: int) -> Any:
    """An empty index, inner product, for so many rows.

    Raises:
        ArtifactError: if FAISS does not know the factory string.
    """
    with _clear(factory, f"{rows} vectors of {dimension} dimensions"):
        index = faiss.index_factory(dimension, factory, faiss.METRIC_INNER_PRODUCT)
    core = _core(index)
    if isinstance(core, faiss.IndexIVF):
        core.cp.min_points_per_centroid = (
            1  # too few is the planner's to know, and training fails below one
        )
    if hasattr(core, "pq"):
        # A factory string without "np" asks for polysemous codes: simulated annealing over each
        # codebook, minutes for nothing, since only a search type that is never used here reads
        # them.
        core.do_polysemous_training = False
        core.pq.cp.min_points_per_centroid, core.pq.cp.max_points_per_centroid = (
            1,
            CODEBOOK_ROWS // 256,
        )
    if isinstance(index, faiss.IndexPreTransform):
        for number in range(index.chain.size()):
            step = faiss.downcast_VectorTransform(index.chain.at(number))
            if isinstance(step, faiss.OPQMatrix):
                step.niter, step.niter_pq_0, step.niter_pq = OPQ_ROUNDS
                step.max_train_points = OPQ_ROWS
    return index


def train(index: Any, sample: Vectors, factory: str) -> None:
    """Train an index on [n, D] rows, on a GPU where there is one; an index that needs none stays as
    it is.

    Raises:
        ArtifactError: if there are too few.
    """
    if index.is_trained:
        return
    core, on_gpu = _core(index), None
    if isinstance(core, faiss.IndexIVF) and gpus():
        on_gpu = core.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatIP(core.d))
    # Codebooks are hundreds of tiny k-means: two threads that wait for each other made them 5 times
    # as slow.
    threads = 1 if hasattr(core, "pq") and len(sample) <= CODEBOOK_ROWS else 0
    with (
        _clear(factory, f"{sample.shape[0]} vectors of {sample.shape[1]} dimensions"),
        _threads(threads),
    ):
        index.train(np.ascontiguousarray(sample))
    if on_gpu is not None:
        core.clustering_index = None


def centroids_of(index: Any) -> Vectors:
    """[L, D] centroids of a trained IVF."""
    core = _core(index)
    return np.asarray(core.quantizer.reconstruct_n(0, core.nlist), dtype=np.float32)


def give_centroids(index: Any, centroids: Vectors) -> None:
    """Let an empty, untrained IVF take the [L, D] centroids of another: :func:`train` then trains
    what is left, its codes.
    """
    _core(index).quantizer.add(np.ascontiguousarray(centroids))


def add(index: Any, rows: Vectors, first: int, assigner: Any = None) -> None:
    """Add [n, D] rows as numbers ``first``, ``first`` + 1 ..

    Args:
        index: trained; an IVF keeps the numbers, others count by themselves.
        assigner: finds the list of each row in place of the index's own quantizer: a copy of that
            on a GPU.
    """
    rows = np.ascontiguousarray(rows)
    core = _core(index)
    if not isinstance(core, faiss.IndexIVF):
        index.add(rows)
        return
    numbers = np.arange(first, first + len(rows), dtype=np.int64)
    if assigner is None:
        index.add_with_ids(rows, numbers)
        return
    if isinstance(index, faiss.IndexPreTransform):
        rows = index.chain.at(0).apply(rows)
    _, lists = assigner.search(rows, 1)
    lists = np.ascontiguousarray(lists.reshape(-1))
    core.add_core(len(rows), faiss.swig_ptr(rows), faiss.swig_ptr(numbers), faiss.swig_ptr(lists))
    index.ntotal = core.ntotal


def gpu_assigner(index: Any) -> Any:
    """A copy of an IVF's quantizer on the GPUs for :func:`add`, or ``None`` where that does not
    apply.
    """
    core = _core(index)
    chain = index.chain.size() if isinstance(index, faiss.IndexPreTransform) else 0
    if not gpus() or not isinstance(core, faiss.IndexIVF) or chain > 1:
        return None
    centroids = faiss.IndexFlatIP(core.d)
    centroids.add(core.quantizer.reconstruct_n(0, core.nlist))
    return faiss.index_cpu_to_all_gpus(centroids)


def mergeable(index: Any) -> bool:
    """Whether parts of it can be built apart and put together: Flat and IVF can, graphs cannot."""
    return isinstance(_core(index), (faiss.IndexFlat, faiss.IndexIVF))


def add_all(index: Any, groups: Sequence[Iterator[tuple[int, Vectors]]]) -> Any:
    """Add the blocks of several groups, each in a thread of its own where the index can be merged.

    Args:
        index: trained and empty.
        groups: (first row, rows) blocks; groups and blocks in row order.

    Returns:
        The index with all rows, as if they had been added in order.
    """
    assigner = gpu_assigner(index)
    if len(groups) == 1 or not mergeable(index):
        for blocks in groups:
            for first, rows in blocks:
                add(index, rows, first, assigner)
        return index

    def part(blocks: Iterator[tuple[int, Vectors]]) -> Any:
        mine = faiss.clone_index(index)
        with _threads(1):
            for first, rows in blocks:
                add(mine, rows, first, assigner)
        return mine

    with ThreadPoolExecutor(len(groups)) as pool:
        parts = list(pool.map(part, groups))
    return merge(parts)


def merge(parts: Sequence[Any]) -> Any:
    """Put parts of one trained index together, in this order; they are empty afterwards.

    Raises:
        ArtifactError: if they cannot be merged.
    """
    whole = parts[0]
    for other in parts[1:]:
        with _clear(type(_core(whole)).__name__, "parts that are to be merged"):
            whole.merge_from(other, 0)  # an IVF's rows have their numbers already, Flat counts on
    return whole


def build_faiss(vectors: Vectors, factory: str) -> Any:
    """A FAISS index of unit vectors, inner product, trained on all of them.

    Raises:
        ArtifactError: if FAISS does not know the factory string or there are too few vectors to
            train it.
    """
    index = new_index(vectors.shape[1], factory, len(vectors))
    train(index, vectors, factory)
    add(index, vectors, 0)
    return index


def exact_best(queries: Vectors, blocks: Iterator[tuple[int, Vectors]], top_k: int) -> Rows:
    """[N, top_k] rows of the highest cosines, comparing everything; -1 where there are fewer."""
    scores = np.full((len(queries), top_k), -np.inf, dtype=np.float32)
    best = np.full((len(queries), top_k), -1, dtype=np.int64)
    for first, rows in blocks:
        count = min(top_k, len(rows))
        arguments: dict[str, Any] = {"metric": faiss.METRIC_INNER_PRODUCT}
        if gpus():
            found, at = faiss.knn_gpu(
                faiss.StandardGpuResources(), queries, rows, count, **arguments
            )
        else:
            found, at = faiss.knn(queries, rows, count, **arguments)
        scores = np.concatenate([scores, found], axis=1)
        best = np.concatenate([best, at + first], axis=1)
        order = np.lexsort((best, -scores), axis=1)[:, :top_k]
        scores, best = (
            np.take_along_axis(scores, order, axis=1),
            np.take_along_axis(best, order, axis=1),
        )
    return best


def save_index(index: Any, path: Path) -> None:
    """Write an index file."""
    faiss.write_index(index, str(path))


def open_index(path: Path, depth: int = 1, *, memory_map: bool = False) -> Index:
    """Read an index file, or map it: pages then come from the disk when they are first needed, and
    processes share them.
    """
    # IO_FLAG_MMAP maps an IVF only; IFC maps Flat, HNSW and IVF alike.
    return Index(faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if memory_map else 0), depth)


def load_index(artifact: Artifact, *, memory_map: bool = False) -> Index:
    """Load and verify an ``index`` artifact; errors as :meth:`Artifact.verify_copy`.

    Args:
        artifact: of kind ``index``.
        memory_map: see :func:`open_index`.
    """
    artifact.verify_copy()
    depth = artifact.info.get("search_depth", artifact.info.get("num_lists_searched", 1))
    return open_index(artifact.path(INDEX_FILE), int(depth), memory_map=memory_map)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let FAISS use ``count`` threads from this thread (0: as it is)."""
    before = faiss.omp_get_max_threads()
    if count:
        faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


@contextlib.contextmanager
def _clear(factory: str, over: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ArtifactError(
            f"FAISS cannot build {factory!r} over {over} ({str(error).splitlines()[0]})",
            action="set index.factory to Flat, to auto, or to one that fits the corpus (IVF needs "
            "some 39 vectors per "
            "list)",
        ) from error
