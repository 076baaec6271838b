"""Tokenizer training, encoding of lines, and windows in which every token is predicted exactly once."""

from __future__ import annotations

import multiprocessing
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB_SIZE = 257
"""Smallest byte-level vocabulary: 256 bytes and the end-of-text token."""

GPT1_NEWLINE = "\n</w>"

_QUIET_SECONDS = 3
_CHUNK_LINES = 1000  # one string per chunk: a whole corpus as one string costs a tokenizer gigabytes


_CHUNK_CHARS = 1 << 20  # of longer chunks, and of longer lines, each piece is a string of its own


def _chunks(lines: Iterable[str]) -> Iterator[str]:
    iterator = iter(lines)
    while chunk := list(islice(iterator, _CHUNK_LINES)):
        yield from _pieces("".join(f"{line}\n" for line in chunk))


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text before single spaces, where a byte-level tokenizer begins a token anyway."""
    start = 0
    while len(text) - start > _CHUNK_CHARS:
        end = start + _CHUNK_CHARS
        cut = text.rfind(" ", start + 1, end)
        while cut > start and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind(" ", start + 1, cut)
        end = cut if cut > start else end
        yield text[start:end]
        start = end
    yield text[start:]


def _with_progress(pieces: Iterable[str], lines: Iterable[str], description: str) -> Iterator[str]:
    """Show a bar over the characters of a text that takes more than a few seconds."""
    total = sum(map(len, lines)) + len(lines) if isinstance(lines, Sequence) else None
    with tqdm(total=total, desc=description, unit="char", unit_scale=True, delay=_QUIET_SECONDS, leave=False) as bar:
        for piece in pieces:
            yield piece
            bar.update(len(piece))


def train_tokenizer(lines: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer as GPT-2 uses; deterministic.

    Args:
        lines: Training text, lines without their newline.
        vocab_size: Largest vocabulary, >= 257. A small corpus may give fewer tokens; see ``len(tokenizer)``.

    Returns:
        A tokenizer with one special token, ``<|endoftext|>`` (id 0), as bos, eos, pad and unk.

    Raises:
        ValueError: ``vocab_size`` is below 257.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} "
            "(256 bytes and the end-of-text token): raise --vocab_size"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_with_progress(_chunks(lines), lines, "training the tokenizer"), trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), END_OF_TEXT)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def line_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Id to append to each line where a tokenizer drops newlines although its vocabulary has one.

    GPT-1's tokenizer does so: its pre-tokenizer splits at white space. Without the id, line ends would not be
    predicted, and a word perplexity that counts them would be too low.

    Returns:
        The id of the newline token, or None for any other tokenizer.
    """
    if tokenizer.encode("a\n", add_special_tokens=False) != tokenizer.encode("a", add_special_tokens=False):
        return None
    return tokenizer.get_vocab().get(GPT1_NEWLINE)


def start_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id to prepend to a text, so that its first token is predicted too.

    It is bos, else eos, else the newline of GPT-1's tokenizer, which has neither (``line_end_id``).

    Raises:
        ValueError: The tokenizer has none of them.
    """
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id, line_end_id(tokenizer)):
        if token_id is not None:
            return int(token_id)
    raise ValueError(
        f"tokenizer {tokenizer.name_or_path!r} has neither a bos nor an eos token, so nothing can stand "
        "before the first token; set one of them, or give another tokenizer with --tokenizer_name"
    )


def encode_lines(tokenizer: PreTrainedTokenizerBase, lines: Sequence[str], workers: int | None = None) -> Tensor:
    """Encode lines as one stream of token ids.

    Every line is followed by its newline, so line ends are predicted like any other token.

    Args:
        tokenizer: Tokenizer of transformers. No special tokens are added between lines.
        lines: Lines without their newline.
        workers: Processes that encode; the ids do not depend on their number. Default: this one alone.

    Returns:
        Token ids, int64, shape (1 + tokens,): a start token, which is never predicted, then the text.

    Raises:
        ValueError: The tokenizer has no start token.
    """
    ids, encoder = array("q", [start_token_id(tokenizer)]), _Encoder(tokenizer)
    pieces = _with_progress(encoder.pieces(lines), lines, "tokens")
    if workers is None or workers < 2:
        for piece in pieces:
            ids.extend(encoder(piece))
    else:  # new processes: a forked one may hang in the threads of torch or of the tokenizer
        with multiprocessing.get_context("spawn").Pool(workers, _start_worker, (encoder,)) as pool:
            for encoded in pool.imap(_encode_in_worker, pieces):
                ids.extend(encoded)
    return torch.frombuffer(ids, dtype=torch.long)


def encode_stream(tokenizer: PreTrainedTokenizerBase, lines: Iterable[str]) -> Iterator[list[int]]:
    """Yield the ids of ``encode_lines`` piece by piece, the start token first."""
    encoder = _Encoder(tokenizer)
    yield [start_token_id(tokenizer)]
    yield from map(encoder, encoder.pieces(lines))


class _Encoder:
    """Encoder of lines, piece by piece; a newline that the tokenizer drops is a piece of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.line_end = tokenizer, line_end_id(tokenizer)

    def pieces(self, lines: Iterable[str]) -> Iterator[str]:
        if self.line_end is None:
            return _chunks(lines)
        return (piece for line in lines for piece in [*_pieces(line), "\n"])

    def __call__(self, piece: str) -> list[int]:
        if self.line_end is not None and piece == "\n":
            return [self.line_end]
        return self.tokenizer.encode(piece, add_special_tokens=False, verbose=False)


_worker_encoder: list[_Encoder] = []
"""Of a worker process, which gets it once and not with every piece."""


def _start_worker(encoder: _Encoder) -> None:
    _worker_encoder.append(encoder)


def _encode_in_worker(piece: str) -> list[int]:
    return _worker_encoder[0](piece)


class TokenWindows(Dataset[dict[str, Tensor]]):
    """Data set of windows over a token stream; each id after the first is a target in exactly one window.

    Window k is ``stream[k * (block_size - 1) : k * (block_size - 1) + block_size]``. Neighbours share one id, since a
    causal model of transformers shifts its labels and never predicts the first id of a window.

    An item has ``input_ids``, ``attention_mask`` (all ones) and ``labels``, each int64 of shape (block_size,). Labels
    are the ids, but the first one is -100. That changes no model's loss, and it corrects Trainer's count of predicted
    tokens, which otherwise includes the first label for some models such as GPT-2 and scales their loss by
    (block_size - 1) / block_size.

    Args:
        stream: Token ids, shape (1 + tokens,), start token first; see ``encode_lines``.
        block_size: Ids per window, >= 2.
        drop_last: Leave out a shorter last window. Default True; exact evaluation needs False.
        name: Name of the stream in error messages.

    Raises:
        ValueError: ``block_size`` is below 2, or the stream does not fill one window (with ``drop_last``) or has no
            target.
    """

    def __init__(self, stream: Tensor, block_size: int, *, drop_last: bool = True, name: str = "text") -> None:
        if block_size < 2:
            raise ValueError(f"block_size is {block_size}; it must be at least 2, one id to see and one to predict")
        targets = len(stream) - 1
        needed = block_size - 1 if drop_last else 1
        if targets < needed:
            raise ValueError(
                f"the {name} is too short: {targets} tokens where one block needs {needed}; "
                f"give more text, or a smaller --block_size (now {block_size})"
            )
        self.stream = stream
        self.block_size = block_size
        stride = block_size - 1
        self.count = targets // stride if drop_last else -(-targets // stride)

    def __len__(self) -> int:
        """Number of windows."""
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Window at ``index``; negative indices count from the end.

        Raises:
            IndexError: There is no such window.
        """
        if not -self.count <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        start = (index % self.count) * (self.block_size - 1)
        return window(self.stream[start : start + self.block_size])


class StreamedWindows(IterableDataset[dict[str, Tensor]]):
    """The windows of ``TokenWindows`` over a text that is encoded as it is read, in its order.

    Workers of a data loader read all of the text, and take turns with its windows.

    Args:
        tokenizer: Of the model.
        lines: Read anew in every pass.
        block_size: Ids per window, >= 2.
        name: Name of the text in error messages.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, lines: Iterable[str], block_size: int, name: str) -> None:
        self.tokenizer, self.lines, self.block_size, self.name = tokenizer, lines, block_size, name

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield the windows of this worker.

        Raises:
            ValueError: The text does not fill one window.
        """
        worker, ids, count = get_worker_info(), [], 0
        for encoded in encode_stream(self.tokenizer, self.lines):
            ids += encoded
            start = 0
            while len(ids) - start >= self.block_size:
                if worker is None or count % worker.num_workers == worker.id:
                    yield window(torch.tensor(ids[start : start + self.block_size]))
                start, count = start + self.block_size - 1, count + 1
            ids = ids[start:]
        if not count:
            raise ValueError(
                f"the {self.name} is too short: {len(ids) - 1} tokens where one block needs {self.block_size - 1}; "
                f"give more text, or a smaller --block_size (now {self.block_size})"
            )


def window(ids: Tensor) -> dict[str, Tensor]:
    """Example of ``TokenWindows`` with these ids, int64, shape (tokens,)."""
    labels = ids.clone()
    labels[0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
