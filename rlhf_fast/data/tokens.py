"""From one string to token ids: special tokens added once, ids that the model has, where a completion begins."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_fast.errors import UserError, refusing
from rlhf_fast.models.loading import check_files, hub_id


def load_tokenizer(folder: str, *, needs_eos: bool = True, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id; UserError when there is none, or needs_eos and it has no EOS token."""
    place, revision = hub_id(folder)
    with refusing(f"no tokenizer in {folder}"):
        check_files(Path(place))
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=trust_remote_code, **revision)
        ids = tokenizer("a b", verbose=False)["input_ids"]  # some of what is wrong shows in use only
        tokenizer.decode([*ids, *filter(None, tokenizer.all_special_ids)])
    if needs_eos and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no EOS token, so completions could never end")
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None) -> int:
    """A token id to pad with that is not EOS and that the model has (masks come from lengths: any other id will do).

    vocab_size: rows of the model's embeddings; None: all ids of the tokenizer.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, 0, 1)
    size = len(tokenizer) if vocab_size is None else vocab_size
    return next(i for i in candidates if i is not None and i != tokenizer.eos_token_id and 0 <= i < size)


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many items two sequences have in common from their start."""
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


@dataclass(frozen=True)
class Tokens:
    """Token ids of one tokenizer, for a model whose embeddings have vocab_size rows (None: not checked)."""

    tokenizer: PreTrainedTokenizerBase
    vocab_size: int | None = None

    @cached_property
    def around(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and behind a text of its own accord."""
        bare = self.tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
        dressed = self.tokenizer("a", add_special_tokens=True, verbose=False)["input_ids"]
        places = range(len(dressed) - len(bare) + 1)
        start = next((i for i in places if dressed[i : i + len(bare)] == bare), 0)
        return dressed[:start], dressed[start + len(bare) :]

    def ids(self, where: str, text: str) -> list[int]:
        """The ids of `text` as it is. UserError names the place of what no tokenizer or this model cannot read."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{where}: character {error.start} of the text is half of a pair (U+{ord(text[error.start]):04X}), "
                "which is no character: repair the data"
            ) from None
        # The limits are ours to report: verbose=False keeps the tokenizer from warning about its own.
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self.check(where, ids)
        return ids

    def check(self, where: str, ids: Sequence[int]) -> None:
        """UserError for an id that the model's embeddings lack."""
        if self.vocab_size is not None and ids and max(ids) >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"{where}: the tokenizer has {token!r} as id {max(ids)}, but the model has embeddings for "
                f"{self.vocab_size} ids only"
            )

    def boundary(self, where: str, text: str, ids: Sequence[int], place: int) -> tuple[int, bool]:
        """(index, cut): the first token of `ids` that has anything of text[place:], and whether text[:place] alone
        would be other tokens than those before it.

        A token that has characters on both sides belongs to what follows. A tokenizer that knows no offsets says only
        how many tokens text[:place] alone has in common with the whole.
        """
        alone = self.ids(where, text[:place])
        if list(ids[: len(alone)]) == alone:
            return len(alone), False
        if not self.tokenizer.is_fast:
            return common_prefix(alone, ids), True
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = encoded["offset_mapping"]
        return next((i for i, (start, end) in enumerate(spans) if end > place or start >= place), len(ids)), True
