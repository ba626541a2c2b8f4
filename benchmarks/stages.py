"""The kernels of a call, by what they are for."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.clock import Kernel

# The first pattern that is found in a kernel's name counts. PyTorch's gather and scatter share a
# kernel, and differ in what it is instantiated with.
PATTERNS = {
    "torch": (
        ("top-k", r"top_?k|radixfind|devicescan|blockwise"),
        ("index generation", r"sparse_ind|scatter_fill|scatter_gather_internal_kernel<true"),
        ("score", r"score_kernel|gemm|gemv|cutlass|gather"),
        ("sort", r"sort"),
    ),
    "jax": (
        ("append, look-up table", r"append_kernel|lookup_table_kernel"),
        ("cells", r"always_attended_kernel|seal_kernel"),
        ("cells select", r"cells_select_kernel"),
        ("group maxima", r"group_maxima_kernel"),
        ("threshold select", r"threshold_select_kernel"),
        ("scores", r"score_kernel"),
        ("sparse index", r"count_kernel|verify_cut_kernel|sparse_index_kernel"),
        ("k-means", r"centroid_sums_kernel|add_parts_kernel"),
        ("top-k", r"sort|top_?k|radix|raft|select_k"),
    ),
}


def short_name(name: str) -> str:
    """A kernel's name without return type, template arguments, parameters and numbering."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.split(r"[<(]", name, maxsplit=1)[0].strip()
    return re.sub(r"(_\d+)+$", "", name) or name


def groups_of(kernels: Sequence[Kernel], framework: str) -> list[str]:
    """What each kernel of a call is for: the stages of the original, or of our pipelines.

    A sort right after a top-k is part of it: torch.topk sorts what it found.
    """
    groups: list[str] = []
    for kernel in kernels:
        found = (
            group
            for group, pattern in PATTERNS[framework]
            if re.search(pattern, kernel.name, re.IGNORECASE)
        )
        group = next(found, "other")
        if group == "sort" and groups and groups[-1] == "top-k":
            group = "top-k"
        groups.append(group)
    return groups


def breakdown(calls: Sequence[Sequence[Kernel]], framework: str) -> list[dict[str, Any]]:
    """Median time a call of each kernel, the longest first."""
    times: dict[tuple[str, str], list[float]] = {}
    launches: dict[tuple[str, str], int] = {}
    for number, kernels in enumerate(calls):
        for kernel, group in zip(kernels, groups_of(kernels, framework), strict=True):
            key = (group, short_name(kernel.name))
            times.setdefault(key, [0.0] * len(calls))[number] += kernel.duration
            launches[key] = launches.get(key, 0) + 1
    parts = [
        {
            "group": group,
            "kernel": name,
            "launches": launches[group, name] / len(calls),
            "us": float(np.median(samples)),
        }
        for (group, name), samples in times.items()
    ]
    return sorted(parts, key=lambda part: -part["us"])
