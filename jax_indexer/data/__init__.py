"""The real queries, keys and values that ship with the library; README.md says where from."""

from importlib import resources
from typing import NamedTuple

import numpy as np
from jaxtyping import Float16


class Sample(NamedTuple):
    """One kv head of one layer of a language model, with the query heads that share it.

    Attributes:
      query: float16[128, 3, 64], the last 128 positions, after rotary embedding.
      key: float16[8192, 1, 64], all positions, after rotary embedding.
      value: float16[8192, 1, 64], all positions.
    """

    query: Float16[np.ndarray, "128 3 64"]
    key: Float16[np.ndarray, "8192 1 64"]
    value: Float16[np.ndarray, "8192 1 64"]


def load_sample() -> Sample:
    """Loads the sample: SmolLM2-135M-Instruct, layer 15, kv head 1, on 8192 tokens of text.

    Returns:
      A Sample of numpy arrays.

    Source: README.md beside this file.
    """
    path = resources.files(__name__) / "smollm2_sample.npz"
    with path.open("rb") as file, np.load(file) as arrays:
        return Sample(arrays["query"], arrays["key"], arrays["value"])
