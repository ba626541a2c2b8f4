"""Block sizes and warps, chosen by measurement; benchmarks/NOTES.md has the alternatives tried."""

# A program's tile of a codebook, in elements: more of it does not fit into registers.
CODEBOOK_TILE = 8192
CODEBOOK_WARPS = 4

# Tokens that one program of the append kernel encodes when there are many to encode.
TOKENS_PER_ENCODER = 64

# k-means: tokens that one program sums, and sums that one adds up. The bits of a codebook depend on
# the first, and memory: C / 4096 floats for each dimension of a key.
TOKENS_PER_PART = 4096
SUMS_BLOCK = 1024

# Bytes that one look-up loads at the most: queries that share codes share it.
LOOKUP_BYTES = 16

# Tokens of a cache from which on the cells selector is faster than the threshold selector, and
# cells up to which it is.
CELLS_FROM = 32768
FEW_CELLS = 4096

# The cells selector: budgets above it are put in order by a bit for every position instead of
# comparing all pairs.
MOST_PAIRED = 256

# Sparse index: tokens a program looks at, and those of a thread.
INDEX_BLOCK = 1024
INDEX_RUN = 4
INDEX_WARPS = 8


def score_tuning(num_subspaces: int) -> tuple[int, int, int, int]:
    """Threads' runs of tokens in a block, tokens of a run, warps, and programs, about."""
    # 264 programs: two on each of an H100's 132 multiprocessors.
    if num_subspaces <= 2:
        return 128, 16, 4, 1056
    if num_subspaces <= 8:
        return 512, 16, 16, 264
    return 512, 8, 16, 264


def centroid_sums_tuning(num_centroids: int, dimensions: int) -> tuple[int, int]:
    """Tokens that the k-means kernel takes at a time, and its warps."""
    return 64 if num_centroids <= 64 else 32, 4 if num_centroids * dimensions <= 4096 else 8


def cells_warps(num_cells: int, budget: int) -> int:
    """Warps of the cells-select kernel: a thread takes 16 cells, where that is enough threads."""
    # More for winners that have a bit set, one atomic addition after the other.
    return min(max(num_cells // (16 * 32), 16 if budget > MOST_PAIRED else 4), 32)


def select_warps(num_groups: int, programs: int) -> int:
    """Warps of the threshold-select kernel, for lists of this many groups."""
    if num_groups <= 1024:
        return 4
    return 8 if num_groups <= 2048 or programs > 264 else 16
