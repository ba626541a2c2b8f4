"""Block sizes and warps, chosen by measurement; benchmarks/NOTES.md has the alternatives tried."""

import dataclasses
from typing import NamedTuple


class ScoreTuning(NamedTuple):
    """How a pass over the codes is cut up, for quantizers of up to so many subspaces.

    Attributes:
      most_subspaces: that this is for.
      runs: threads' runs of tokens in a block.
      run: tokens of a run.
      warps: of a program.
      programs: about so many; 264 are two on each of an H100's 132 multiprocessors.
    """

    most_subspaces: float
    runs: int
    run: int
    warps: int
    programs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """All of it, for an H100. Blocks are powers of two.

    Attributes:
      codebook_tile: elements of a codebook that a program holds; more do not fit into registers.
      codebook_warps: of programs that hold one.
      tokens_per_encoder: tokens that a program encodes where there are many to encode.
      lookup_bytes: bytes that one look-up loads at the most; queries that share codes share it.
      scores: passes over the codes.
      smallest_group, largest_group: tokens of a group of the threshold selector; more leave too
        many tokens to score again, fewer too many groups.
      many_groups: with more groups than this even so, coarser ones are looked at first, about so
        many.
      group_run: neighbouring groups that a thread takes at once.
      threshold_warps: of the threshold selector, where not by the number of groups.
      cells_warps: of the cells selector, where not by the number of cells.
      most_of_a_warp: budgets up to it are looked for by each warp, others by several together.
      most_paired: budgets above it are put in order by a bit for every position instead of by
        comparing all pairs.
      words_at_once: words of such bits.
      index_block, index_run, index_warps: tokens that a program of the sparse index looks at, those
        of a thread, and warps.
      weights_block: positions whose weights a program writes.
      starts_at_once, filled_at_once, moved_at_once: starts of cells that are added up at once,
        tokens that are put into lists, entries of a block that a program moves.
      attended_tile, always_tile, before_pool_tile, most_attended: elements of the keys or values
        that a program attends to, for one query head and for those that share them, the latter also
        where a pool follows, whose end hides that there are more parts; and the most tokens. The
        bits of an output depend on them.
      attended_at_once: tokens that a program attends to behind its own search, at the most.
      attended_warps, merged_warps: of programs that attend to a block of a list, that merge more
        parts than are read at once; fewer take one warp.
      ranked_bytes: keys of a pool that a program ranks.
      ranked_warps: of such a program, and of those beside it that weigh all candidates.
      pooled_tile: elements that sums by code of a pool take at once.
      lists_at_once, others_at_once: lists of cells whose entries in a pool are added up by code at
        once, and entries from none; a power of two together.
      pooled_warps, summed_warps, searched_warps: of programs that attend to a pool; of those that
        sum by code; and of those that search before.
      weighed_tile, weighed_tokens: of the rest: elements that a program holds, and tokens that it
        takes. The bits of an output depend on them.
      tokens_per_part, sums_block: k-means: tokens that one program sums, and sums that one adds
        up. The bits of a codebook depend on the first, and memory: C / 4096 floats for each
        dimension of a key.
    """

    codebook_tile: int = 8192
    codebook_warps: int = 4
    tokens_per_encoder: int = 64
    lookup_bytes: int = 16
    scores: tuple[ScoreTuning, ...] = (
        ScoreTuning(2, 128, 16, 4, 1056),
        ScoreTuning(8, 512, 16, 16, 264),
        ScoreTuning(float("inf"), 512, 8, 16, 264),
    )
    smallest_group: int = 4
    largest_group: int = 64
    many_groups: int = 4096
    group_run: int = 8
    threshold_warps: int | None = None
    cells_warps: int | None = None
    most_paired: int = 256
    most_of_a_warp: int = 1024
    words_at_once: int = 4096
    index_block: int = 1024
    index_run: int = 4
    index_warps: int = 8
    weights_block: int = 4096
    starts_at_once: int = 1024
    filled_at_once: int = 512
    moved_at_once: int = 256
    attended_tile: int = 16384
    always_tile: int = 8192
    before_pool_tile: int = 4096
    most_attended: int = 128
    attended_at_once: int = 256
    attended_warps: int = 8
    merged_warps: int = 4
    ranked_bytes: int = 32768
    ranked_warps: int = 8
    pooled_tile: int = 32768
    lists_at_once: int = 48
    others_at_once: int = 16
    pooled_warps: int = 4
    summed_warps: int = 8
    searched_warps: int = 16
    weighed_tile: int = 4096
    weighed_tokens: int = 256
    tokens_per_part: int = 4096
    sums_block: int = 1024
    kept_tile: int = 8192
    kept_warps: int = 4
    written_warps: int = 1
    copied_tile: int = 8192
    copied_warps: int = 4

    def of_scores(self, num_subspaces: int) -> ScoreTuning:
        """For a pass over the codes of so many subspaces."""
        return next(x for x in self.scores if num_subspaces <= x.most_subspaces)

    def warps_for_cells(self, num_cells: int, budget: int) -> int:
        """A thread takes 16 cells, where that is enough threads."""
        # More for winners that have a bit set, one atomic addition after the other.
        least = 16 if budget > self.most_paired else 4
        return self.cells_warps or min(max(num_cells // (16 * 32), least), 32)

    def threads_for_few(self, budget: int) -> int:
        """Those of a warp, so that it waits for no other, where what may win is few."""
        return 32 if budget <= self.most_of_a_warp else 128

    def warps_for_rest(self, num_cells: int, by_code: bool) -> int:
        """More than for a search alone where much follows: it is less code to fetch for each."""
        warps = self.warps_for_cells(num_cells, 1)
        return max(self.searched_warps, warps) if by_code else warps

    def warps_for_groups(self, num_groups: int, programs: int) -> int:
        """Warps of the threshold selector, for lists of this many groups."""
        if self.threshold_warps:
            return self.threshold_warps
        if num_groups <= 1024:
            return 4
        return 8 if num_groups <= 2048 or programs > 264 else 16

    def for_training(self, num_centroids: int, dimensions: int) -> tuple[int, int]:
        """Tokens that the k-means kernel takes at a time, and its warps."""
        return 64 if num_centroids <= 64 else 32, 4 if num_centroids * dimensions <= 4096 else 8


H100 = Tuning()
