"""Prompts in, answers out: greedy or seeded generation with a causal language model, in batches or
streamed.

Shape legend: B prompts · T tokens (prompts are padded on the left) · V vocabulary.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from invar_ray.errors import ModelError, RequestError
from invar_ray.models.decoding import Finish, Row, RowEnds, Sampling, TokenPicker, first_stop
from invar_ray.text.tokens import text_ids


@dataclass(frozen=True, slots=True)
class Generation:
    """One continuation.

    Attributes:
        text: without special tokens, outer whitespace, the stop string and what follows it.
        token_logprobs: natural-log probability (nats) of each generated token, the end token
            included, under the model's own distribution (before any temperature).
        num_tokens: number of generated tokens, equal to ``len(token_logprobs)``.
        finish: why it ended: the end token, a stop string, ``max_new_tokens``, or that it was
            cancelled.
        prompt_tokens: number of the prompt's tokens.
    """

    text: str
    token_logprobs: list[float]
    num_tokens: int
    finish: Finish = "length"
    prompt_tokens: int = 0

    @property
    def confidence(self) -> float | None:
        """Mean log-probability of the tokens in nats; ``None`` without tokens."""
        return sum(self.token_logprobs) / len(self.token_logprobs) if self.token_logprobs else None


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt to continue, and how; tasks of one batch may differ in everything.

    Attributes:
        prompt: the text.
        sampling: length, stop strings and randomness.
        on_text: called with each piece of text as soon as no later token can change it, in the
            thread that generates; the pieces add up to the continuation's text.
        cancelled: asked once a token; once it says true the row ends (``finish="cancelled"``), the
            others go on.
    """

    prompt: str
    sampling: Sampling
    on_text: Callable[[str], None] | None = None
    cancelled: Callable[[], bool] | None = None


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt that text is to follow: with the tokenizer's start token, without a
    closing end token.

    Training and serving both encode with this, so that a model sees at answer time what it saw in
    training.  The prompt is text from outside throughout: strings in it that look like control
    tokens stay text (:mod:`invar_ray.text.tokens`).  A tokenizer that closes texts
    (``[CLS] .. [SEP]``) would tell the model that everything was already said.
    """
    ids = text_ids(tokenizer, [prompt])[0]
    closing = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
    # A text's own tokens are never special ones, so this takes only what the tokenizer's template
    # added.
    while ids and ids[-1] in closing:
        ids.pop()
    return ids


class Generator:
    """Generation with a causal language model whose adapter, if any, is already on it and stays on
    it.

    Results do not depend on what else is in the batch (up to floating-point rounding), nor on the
    global random state. ``generate`` and ``stream`` may run in several threads at once: nothing of
    the model is switched.

    Args:
        model: a Hugging Face causal LM.  Its own ``generation_config`` is replaced: decoding
            settings that came with a checkpoint (temperatures, penalties) would mix with the ones
            given here.
        tokenizer: its tokenizer; the end token is ``eos``, or ``sep`` where there is none.
        max_context: most tokens of prompt and answer together; ``None`` takes the model's
            positions.
        version: a name or fingerprint that answers of a service carry.

    ``certainty`` is what :class:`invar_ray.answering.certainty.Certainty` reads; ``None`` unless
    the generator was calibrated.

    Raises:
        ModelError: if model, tokenizer and ``max_context`` do not fit each other.
    """

    def __init__(
        self, model: Any, tokenizer: Any, max_context: int | None = None, *, version: str = ""
    ) -> None:
        positions = getattr(model.config, "max_position_embeddings", None)
        context = positions if max_context is None else max_context
        if context is None:
            raise ModelError(
                "the model does not say how many positions it has", action="give max_context"
            )
        if context < 2 or (positions is not None and context > positions):
            raise ModelError(
                f"max_context is {context}",
                expected=f"between 2 and the model's {positions} positions",
                action="lower max_context or use a model with a longer context",
            )
        self._eos_ids = _end_tokens(model, tokenizer)
        rows = model.get_input_embeddings().weight.shape[0]
        if rows and max(self._eos_ids) >= rows:
            raise ModelError(
                f"the tokenizer's end token is number {max(self._eos_ids)}, the model has {rows} "
                "token embeddings",
                action="use the tokenizer that belongs to the model",
            )
        self.model, self.tokenizer, self.version = model.eval(), tokenizer, version
        head = model.get_output_embeddings()
        if head is not None and _in_one_block not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_in_one_block)
        self.certainty: dict[str, Any] | None = None
        self.max_context: int = int(context)
        pad = tokenizer.pad_token_id
        self._pad_id: int = pad if pad is not None else self._eos_ids[0]
        model.generation_config = GenerationConfig(
            do_sample=False, num_beams=1, eos_token_id=self._eos_ids, pad_token_id=self._pad_id
        )

    def count_tokens(self, text: str) -> int:
        """Tokens that ``text`` takes as a prompt, the start token included."""
        return len(encode_prompt(self.tokenizer, text))

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[Generation]:
        """Continue each prompt; all of them in one batch.

        Args:
            prompts: B texts.
            max_new_tokens: longest continuation in tokens.
            stop: strings that end a continuation where they first occur in it.
            temperature: 0 takes the likeliest token (greedy); above 0 samples from softmax(logits /
                temperature).
            seed: of the sampling.  The draw depends on seed and prompt only, not on the batch.

        Raises:
            RequestError: if a prompt is empty, or does not fit the context together with
                ``max_new_tokens``.
        """
        sampling = Sampling(max_new_tokens, _strings(stop), temperature, seed=seed)
        return self.run([Task(prompt, sampling) for prompt in prompts])

    def run(self, tasks: Sequence[Task]) -> list[Generation]:
        """Continue the prompts of all tasks in one batch, each in its own way.

        Raises:
            RequestError: if a prompt is empty or does not fit the context; nothing is generated
                then.
            Exception: whatever an ``on_text`` raises ends the batch.
        """
        if not tasks:
            return []
        rows = [
            Row(
                task.sampling,
                self._encode(task.prompt, task.sampling.max_new_tokens),
                task.on_text,
                task.cancelled,
            )
            for task in tasks
        ]
        logprobs = self._run(rows)
        return [self._finish(row, values) for row, values in zip(rows, logprobs, strict=True)]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """Continue one prompt and yield its text in pieces that add up to what :meth:`generate`
        returns.

        The model runs in a thread of its own; what it raises is raised here, and closing the
        iterator (or leaving the loop) stops it within one token.

        Raises:
            RequestError: at the call, not at the first piece; see :meth:`generate`.
        """
        sampling = Sampling(max_new_tokens, _strings(stop), temperature, seed=seed)
        self._encode(prompt, max_new_tokens)
        return self._stream(prompt, sampling)

    def _stream(self, prompt: str, sampling: Sampling) -> Iterator[str]:
        items: queue.Queue[str | BaseException | None] = queue.Queue()
        cancelled = threading.Event()

        def work() -> None:
            try:
                self.run([Task(prompt, sampling, items.put, cancelled.is_set)])
                items.put(None)
            except BaseException as error:  # handed to the consumer, which is waiting
                items.put(error)

        thread = threading.Thread(target=work, name="generate", daemon=True)
        thread.start()
        try:
            while (item := items.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            cancelled.set()
            thread.join()

    @torch.inference_mode()
    def _run(self, rows: list[Row]) -> list[list[float]]:
        """Fill the rows with new tokens; returns their log-probabilities (what follows a row's end
        is not yet cut).
        """
        width = max(len(row.prompt) for row in rows)
        device = self.model.get_input_embeddings().weight.device
        padding = [width - len(row.prompt) for row in rows]
        input_ids = torch.tensor(
            [[self._pad_id] * n + row.prompt for n, row in zip(padding, rows, strict=True)]
        )
        mask = torch.tensor(
            [[0] * n + [1] * len(row.prompt) for n, row in zip(padding, rows, strict=True)]
        )  # [B, T]
        picker = TokenPicker(rows)
        self.model.generate(
            input_ids=input_ids.to(device),  # [B, T]
            attention_mask=mask.to(device),
            max_new_tokens=max(row.sampling.max_new_tokens for row in rows),
            logits_processor=LogitsProcessorList([picker]),
            stopping_criteria=StoppingCriteriaList(
                [RowEnds(rows, width, self._eos_ids, self._decode)]
            ),
            return_dict_in_generate=False,
            use_cache=True,
        )
        logprobs: list[list[float]] = torch.stack(picker.logprobs, dim=1).tolist()
        return logprobs

    def _encode(self, prompt: str, max_new_tokens: int) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise RequestError("the prompt is empty", expected="at least one token")
        if len(ids) + max_new_tokens > self.max_context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and {max_new_tokens} are kept for the answer: "
                f"{len(ids) + max_new_tokens - self.max_context} too many",
                expected=f"at most {self.max_context} together",
                action="shorten the question, give fewer passages or ask for a shorter answer",
            )
        return ids

    def _decode(self, ids: Sequence[int]) -> str:
        shown = [
            token for token in ids if token not in self._eos_ids
        ]  # not every end token is marked as special
        # Clean-up rewrites text across tokens ("don ' t" -> "don't"): without it, text only ever
        # grows at its end, which streaming relies on.
        text = self.tokenizer.decode(
            shown, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return str(text)

    def _finish(self, row: Row, logprobs: list[float]) -> Generation:
        ids, finish, stop = row.ids, row.finish or "length", row.sampling.stop
        text = self._decode(ids)
        if first_stop(text, stop) is not None:
            # The shortest run of tokens that holds the stop string, so that the batch does not
            # change the count.
            count = next(
                n
                for n in range(1, len(ids) + 1)
                if first_stop(self._decode(ids[:n]), stop) is not None
            )
            ids, finish = ids[:count], "stop"
            text = self._decode(ids)
            text = text[: first_stop(text, stop)]
        text = text.strip()
        row.send(text)  # what was held back because it might have become a stop string
        return Generation(text, logprobs[: len(ids)], len(ids), finish, len(row.prompt))


def _in_one_block(_: Any, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The last positions of a batch of prompts lie apart in memory, and torch's matmul would then
    copy the head's weights once a prompt (SmolLM2, 16 prompts: a sixth of the time).
    """
    return (states[0].contiguous(), *states[1:])


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    own = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if own is None:
        raise ModelError(
            "the tokenizer has neither an end token (eos) nor a separator (sep)",
            action="set eos_token",
        )
    stated = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    # Chat models end a turn with other tokens as well and list them all in their generation config.
    extra = (
        [int(token) for token in stated]
        if isinstance(stated, (list, tuple)) and own in stated
        else []
    )
    return [int(own), *(token for token in extra if token != own)]


def _strings(stop: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stop, str):  # a sequence of its letters, which nobody means
        raise ValueError(f"stop must be a sequence of non-empty strings, got {stop!r}")
    return tuple(stop)
