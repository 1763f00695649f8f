"""The training set of stage 1, and what each step sees of it.

Everything about a step follows from (seed, step): every rank plans the whole batch and encodes its
share; only vectors are exchanged.  Shape legend: B rows of the global batch, C candidate slots, R
wordings, N windows, E = R * N environments.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from invar_ray.errors import DataError
from invar_ray.losses.alignment import blend_teacher_scores
from invar_ray.losses.masks import Slots
from invar_ray.store.artifacts import Artifact
from invar_ray.text.answers import searchable

_ALL = slice(None)


@dataclass(frozen=True)
class StepPlan:
    """One global batch.

    Attributes:
        rows: [B] question numbers; B is a multiple of the number of ranks.
        weights: [B] 1 for real rows, 0 for padding.
        slots: [C] slot numbers; the positives of all rows first; C is a multiple of the number of
            ranks.
        present: [C] False for padding.
        positive: [B] position of each row's positive in ``slots``.
        owner: [C] the row whose positive it is, else -1.
    """

    rows: list[int]
    weights: list[float]
    slots: list[int]
    present: list[bool]
    positive: list[int]
    owner: list[int]


class Trainset:
    """A ``trainset`` artifact in memory."""

    def __init__(self, artifact: Artifact) -> None:
        questions = pq.read_table(artifact.path("questions.parquet"))
        slots = pq.read_table(artifact.path("slots.parquet"))
        self.question_ids: list[str] = questions.column("question_id").to_pylist()
        self.wordings: list[list[str]] = questions.column("wordings").to_pylist()
        self.answers: list[list[str]] = questions.column("answers").to_pylist()
        self.positives: list[int] = questions.column("positive").to_pylist()
        self.positive_texts: list[list[str]] = questions.column("positive_texts").to_pylist()
        self.negatives: list[list[int]] = questions.column("negatives").to_pylist()
        self.titles: list[str] = slots.column("title").to_pylist()
        self.slot_texts: list[list[str]] = slots.column("texts").to_pylist()
        self._spans = np.stack(
            [slots.column("start").to_numpy(), slots.column("end").to_numpy()], axis=1
        )
        self._documents = _numbered(slots.column("document_id").to_pylist())
        self._contents = _numbered([texts[0] for texts in self.slot_texts])
        vectors = load_file(artifact.path("teacher.safetensors"))
        self._teacher_questions, self._teacher_slots = vectors["questions"], vectors["slots"]
        self._teacher_documents = vectors["documents"]
        self._cache: dict[tuple[int, int, int], list[list[int]]] = {}
        self._slot_words: dict[int, list[str]] = {}
        self.heldout: list[int] = []
        """Questions that are not trained on; see :meth:`hold_out`."""
        self._heldout_titles: set[str] = set()

    def __len__(self) -> int:
        return len(self.question_ids)

    def hold_out(self, share: float, seed: int) -> None:
        """Set a share of the positives' titles aside: no batch holds their questions or passages
        from now on.

        Raises:
            DataError: nothing is left to train on, or nothing is set aside.
        """
        titles = sorted({self.titles[slot] for slot in self.positives})
        random.Random(f"{seed}-heldout").shuffle(titles)
        self._heldout_titles = set(titles[: round(share * len(titles))])
        self.heldout = [
            row
            for row, slot in enumerate(self.positives)
            if self.titles[slot] in self._heldout_titles
        ]
        self._cache.clear()
        if not 0 < len(self.heldout) < len(self):
            raise DataError(
                f"experimental.retriever.heldout_share {share} sets {len(self.heldout)} of "
                f"{len(self)} training questions aside",
                expected="some, and not all",
                action="change the share, or train on more documents",
            )

    @cached_property
    def num_wordings(self) -> int:
        """R: most wordings of any question."""
        return max(len(wordings) for wordings in self.wordings)

    @cached_property
    def num_windows(self) -> int:
        """N: most windows of any positive or slot."""
        return max(len(texts) for texts in [*self.positive_texts, *self.slot_texts])

    def _searchable(self, slot: int) -> list[str]:
        """A slot's windows as the encoder sees them, title first; a positive's own windows count
        too.  Made when first asked for: all of a large set would take minutes before step 1.
        """
        if slot not in self._slot_words:
            texts = set(self.slot_texts[slot]).union(
                *(self.positive_texts[row] for row in self._rows_of.get(slot, ()))
            )
            self._slot_words[slot] = [
                searchable(f"{self.titles[slot]} {text}") for text in sorted(texts)
            ]
        return self._slot_words[slot]

    @cached_property
    def _rows_of(self) -> dict[int, list[int]]:
        """Slot -> questions whose positive it is."""
        found: dict[int, list[int]] = {}
        for row, slot in enumerate(self.positives):
            found.setdefault(slot, []).append(row)
        return found

    def render(self, plan: StepPlan, column: int, window: int) -> tuple[str, str, bool]:
        """(title, text, missing) of a slot in a window; a missing rendering falls back to the
        anchor's.
        """
        slot, owner = plan.slots[column], plan.owner[column]
        texts = self.positive_texts[plan.rows[owner]] if owner >= 0 else self.slot_texts[slot]
        missing = window >= len(texts)
        return self.titles[slot], texts[0 if missing else window], missing

    def contents_of(self, slots: list[int]) -> npt.NDArray[np.int64]:
        """[C]: equal numbers mark equal texts."""
        return self._contents[slots]

    def slot_metadata(self, plan: StepPlan) -> Slots:
        """What the masks need to know of the plan's slots."""
        return Slots(
            document=torch.as_tensor(self._documents[plan.slots]),
            start=torch.as_tensor(self._spans[plan.slots, 0]),
            end=torch.as_tensor(self._spans[plan.slots, 1]),
            content=torch.as_tensor(self._contents[plan.slots]),
            present=torch.tensor(plan.present),
        )

    def holds_answer(self, plan: StepPlan, mine: slice = _ALL) -> Tensor:
        """[b, C] bool: the slot holds a gold answer of the row, word-bounded, in any of its
        windows; ``mine`` says which b rows of the plan.
        """
        windows = [self._searchable(slot) for slot in plan.slots]
        found = []
        for row in plan.rows[mine]:
            answers = [words for words in map(searchable, self.answers[row]) if words.strip()]
            found.append(
                [any(answer in text for answer in answers for text in texts) for texts in windows]
            )
        return torch.tensor(found)

    def teacher_scores(self, plan: StepPlan, document_weight: float, mine: slice = _ALL) -> Tensor:
        """[b, C]: s_T = (1 - g) cos(q, passage) + g cos(q, document), of the rows ``mine``."""
        return blend_teacher_scores(
            self._teacher_questions[plan.rows[mine]],
            self._teacher_slots[plan.slots],
            self._teacher_documents[plan.slots],
            document_weight=document_weight,
        )

    def environment_mask(self, plan: StepPlan) -> Tensor:
        """[B, R * N] bool: the row has that wording (windows fall back to the anchor cut, so they
        are always there).
        """
        counts = torch.tensor([len(self.wordings[row]) for row in plan.rows])
        held = torch.arange(self.num_wordings)[None, :] < counts[:, None]  # [B, R]
        return held.repeat_interleave(self.num_windows, dim=1)

    def plan(
        self, seed: int, step: int, global_batch_size: int, num_hard_negatives: int, world_size: int
    ) -> StepPlan:
        """The batch of a step: see :class:`StepPlan`."""
        rows = self._rows(seed, step, global_batch_size)
        weights = [1.0] * len(rows)
        while len(rows) % world_size:
            rows.append(rows[0])
            weights.append(0.0)
        place: dict[int, int] = {}
        owner: list[int] = []
        for number, row in enumerate(rows):
            if self.positives[row] not in place:
                place[self.positives[row]] = len(place)
                owner.append(number)
        for row in rows:
            for slot in self.negatives[row][:num_hard_negatives]:
                if slot not in place and self.titles[slot] not in self._heldout_titles:
                    place[slot] = len(place)
                    owner.append(-1)
        slots = list(place)
        present = [True] * len(slots)
        while len(slots) % world_size:
            slots.append(slots[0])
            owner.append(-1)
            present.append(False)
        positive = [place[self.positives[row]] for row in rows]
        return StepPlan(rows, weights, slots, present, positive, owner)

    def _rows(self, seed: int, step: int, size: int) -> list[int]:
        batches = self._epoch_batches(seed, 0, size)
        epoch, offset = 0, step
        while offset >= len(batches):
            offset -= len(batches)
            epoch += 1
            batches = self._epoch_batches(seed, epoch, size)
        return list(batches[offset])

    def _epoch_batches(self, seed: int, epoch: int, size: int) -> list[list[int]]:
        """A permutation cut into full batches in which no two questions share a positive's text."""
        if (seed, epoch, size) in self._cache:
            return self._cache[seed, epoch, size]
        aside = set(self.heldout)
        order = [row for row in range(len(self)) if row not in aside]
        random.Random(seed * 1_000_003 + epoch).shuffle(order)
        batches: list[list[int]] = []
        taken: list[set[int]] = []
        for row in order:
            content = int(self._contents[self.positives[row]])
            for batch, used in zip(batches[-8:], taken[-8:], strict=True):
                if len(batch) < size and content not in used:
                    batch.append(row)
                    used.add(content)
                    break
            else:
                batches.append([row])
                taken.append({content})
        # Fewer questions than a batch: the largest batch there is.
        full = [batch for batch in batches if len(batch) == size] or [max(batches, key=len)]
        self._cache[seed, epoch, size] = full
        return full


def _numbered(values: list[str]) -> npt.NDArray[np.int64]:
    numbers: dict[str, int] = {}
    return np.asarray([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
