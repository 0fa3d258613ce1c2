"""Prompts as token ids, in the two forms that openpi trained π0 and π0.5 on, with the sentencepiece library.

Everything here runs on the host in NumPy, so that a JAX callback may call it.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from fpo_jax.policies.storage import openpi_cache, quiet_client
from fpo_jax.types import FpoError

PALIGEMMA = "gs://big_vision/paligemma_tokenizer.model"
TOKENIZER_FILE = "tokenizer.model"  # beside `params/`, in a checkpoint that brings a tokenizer of its own
PAD = 0  # token id
STATE_BINS = 256
_ASCII = "".join(map(chr, range(32, 127)))  # every printable character


def discretize_state(state: Float[np.ndarray | Array, "*batch n"]) -> Int[np.ndarray, "*batch n"]:
    """The bin of each normalised number among 256 equal ones on [-1, 1]; -1 below them and 255 above (π0.5)."""
    return np.digitize(np.asarray(state), np.linspace(-1.0, 1.0, STATE_BINS + 1)[:-1]) - 1


def prompt_text(prompt: str, state: Float[np.ndarray | Array, " n"] | None) -> str:
    """The prompt on one line, without underscores; with a state (π0.5) `Task: <prompt>, State: <bins>;⏎Action: `."""
    cleaned = prompt.strip().replace("_", " ").replace("\n", " ")
    if state is None:
        return cleaned
    return _state_text(cleaned, discretize_state(state).tolist())


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A sentencepiece model; `load_tokenizer` makes one."""

    processor: Any  # sentencepiece.SentencePieceProcessor, which has no types

    @property
    def vocab_size(self) -> int:
        """Number of token ids; the model's embedding table must have at least as many rows."""
        return self.processor.vocab_size()

    def encode(self, prompt: str, state: Float[np.ndarray | Array, " n"] | None = None) -> list[int]:
        """All token ids: BOS and the text; without a state (π0, and π0.5 of LIBERO) also a newline, encoded apart."""
        return self._encode(prompt_text(prompt, state), newline=state is None)

    def tokenize(
        self, prompt: str, state: Float[np.ndarray | Array, " n"] | None, max_len: int
    ) -> tuple[Int[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
        """(ids int32, mask) of length `max_len`: cut at the end, or filled up with id 0 and mask False.

        `state` is normalised and unpadded.
        """
        ids = self.encode(prompt, state)[:max_len]
        padded = np.full(max_len, PAD, np.int32)
        padded[: len(ids)] = ids
        return padded, np.arange(max_len) < len(ids)

    def tokenize_batch(
        self, prompts: Sequence[str], states: Float[np.ndarray | Array, "N n"] | None, max_len: int
    ) -> tuple[Int[np.ndarray, "N l"], Bool[np.ndarray, "N l"]]:
        """`tokenize` for N prompts with their states; raises for no number, not even for NaN."""
        states = None if states is None else np.asarray(states)
        rows = [self.tokenize(p, None if states is None else states[i], max_len) for i, p in enumerate(prompts)]
        ids, masks = zip(*rows, strict=True)
        return np.stack(ids), np.stack(masks)

    def trimmed_length(self, prompts: Sequence[str], state_dim: int | None, max_len: int) -> int:
        """How many tokens these prompts ever need, at most `max_len`: the rest would be padding, which costs time only.

        `state_dim` None: prompts without a state. Otherwise the longest over all states that put every number into the
        same bin, which no other state exceeds, because no piece reaches over a space.
        """
        texts = [prompt_text(prompt, None) for prompt in prompts]
        if state_dim is not None:
            texts = [_state_text(text, [value] * state_dim) for text in texts for value in range(-1, STATE_BINS)]
        return min(max_len, max(len(self._encode(text, newline=state_dim is None)) for text in texts))

    def _encode(self, text: str, newline: bool) -> list[int]:
        return self.processor.encode(text, add_bos=True) + (self.processor.encode("\n") if newline else [])


def load_tokenizer(source: str | Path | None = None) -> Tokenizer:
    """Reads a sentencepiece model from a path or bucket URL; None is PaliGemma's, from openpi's cache or its bucket.

    openpi's cache is $OPENPI_DATA_HOME, by default ~/.cache/openpi. Raises FpoError where there is no file, no
    network, or no sentencepiece model in the file.
    """
    from etils import epath
    from sentencepiece import SentencePieceProcessor

    if source is None:
        cached = openpi_cache() / PALIGEMMA.removeprefix("gs://")
        source = str(cached) if cached.is_file() else PALIGEMMA
    try:
        with quiet_client():
            content = epath.Path(source).expanduser().read_bytes()
    except Exception as error:  # each kind of storage raises its own
        raise FpoError(_unreadable(str(source), error)) from error
    try:
        # An empty file would load as a model without pieces.
        processor = SentencePieceProcessor(model_proto=content) if content else None
    except RuntimeError:
        processor = None
    if processor is None or processor.bos_id() < 0:
        raise FpoError(
            f"The tokenizer {source} is no sentencepiece model with a BOS token: give PaliGemma's "
            "paligemma_tokenizer.model or the tokenizer.model of the checkpoint."
        )
    return Tokenizer(processor)


def train_tiny_tokenizer(path: str | Path, sentences: Sequence[str], vocab_size: int = 256) -> Tokenizer:
    """Trains a sentencepiece model of a few kB on `sentences`, writes it to `path` and returns it.

    It has PaliGemma's conventions (pad 0, EOS 1, BOS 2, unknown 3, a newline piece, single digits, no dummy space) and
    a piece for every printable ASCII character; `vocab_size` is the most it may have. Same sentences, same file.
    Raises FpoError where `vocab_size` has no room for the characters.
    """
    from sentencepiece import SentencePieceTrainer

    # The trainer takes no newline inside a sentence, and makes words only of what it sees often.
    lines = [line for sentence in sentences for line in sentence.splitlines() if line.strip()]
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter([*(100 * lines), *_ASCII]),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            pad_id=PAD,
            eos_id=1,
            bos_id=2,
            unk_id=3,
            user_defined_symbols=["\n"],
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            model_type="bpe",
            num_threads=1,
            minloglevel=2,  # errors only
        )
    except RuntimeError as error:
        raise FpoError(
            f"A tokenizer of {vocab_size} pieces has no room for every character of its text: set vocab_size to 128 or "
            "more."
        ) from error
    Path(path).write_bytes(model.getvalue())
    return load_tokenizer(path)


def _state_text(cleaned_prompt: str, bins: list[int]) -> str:
    return f"Task: {cleaned_prompt}, State: {' '.join(map(str, bins))};\nAction: "


def _unreadable(source: str, error: Exception) -> str:
    """One sentence: which file can't be read, why, and what to do."""
    if "://" not in source:
        return f"There is no tokenizer file {source}: give the path of a sentencepiece model."
    reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    place = openpi_cache() / PALIGEMMA.removeprefix("gs://")
    remedy = f"download it to {place} or give the path of a copy" if source == PALIGEMMA else "give the path of a copy"
    return f"The tokenizer {source} can't be read ({reason}): {remedy}."
