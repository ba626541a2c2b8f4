"""What is read: Python's documentation and sources, and a passkey hidden in them."""

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from parity.real_keys import Failure, read_tokens

if TYPE_CHECKING:
    import tokenizers

TEXTS = ("documentation", "source")
# The standard library's modules whose sources, joined, are the text.
MODULES = ("argparse", "ast", "difflib", "doctest", "inspect", "tarfile", "typing")
PASSKEY = "71432"
NEEDLE = f"\nThe secret passkey is {PASSKEY}. Remember it.\n"
QUESTION = "\nThe secret passkey is"


def tokens_of(text: str, length: int, tokenizer: "tokenizers.Tokenizer") -> np.ndarray:
    """The first `length` tokens of one of TEXTS, int32."""
    if text == "documentation":  # always the same 8192 of SmolLM2's, whatever Python runs this
        tokens, _ = read_tokens(lambda text: tokenizer.encode(text).ids)
    else:
        sources = (inspect.getsource(__import__(name)) for name in MODULES)
        tokens = np.array(tokenizer.encode("\n".join(sources)).ids, np.int32)
    if len(tokens) < length:
        raise Failure(f"--length: expected at most {len(tokens)}, got {length}; {text} has no more")
    return tokens[:length]


class Haystack(NamedTuple):
    """A text with a passkey in it, and a question at its end.

    Attributes:
      depth: where the passkey is, as a share of the text.
      tokens: int32[length].
    """

    depth: float
    tokens: np.ndarray


def haystacks(
    filler: np.ndarray, depths: int, tokenizer: "tokenizers.Tokenizer"
) -> Iterator[Haystack]:
    """The text with the passkey at each of so many depths; as long as `filler`."""
    needle, question = (np.array(tokenizer.encode(x).ids, np.int32) for x in (NEEDLE, QUESTION))
    hay = filler[: len(filler) - len(needle) - len(question)]
    for i in range(depths):
        depth = (i + 0.5) / depths
        at = int(depth * len(hay))
        yield Haystack(depth, np.concatenate([hay[:at], needle, hay[at:], question]))
