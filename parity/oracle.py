"""The contract in numpy, one row at a time; it shares nothing with `jax_indexer` but the config.

Sections cited are those of `jax_indexer/CONTRACT.md`.
"""

import jax.numpy as jnp
import numpy as np


def exact_table(query, codebooks):
    """Look-up tables in float64: query [B,T,N,H], codebooks [B,K,M,C,D'] -> [B,T,N,M,C]."""
    B, T, N, H = query.shape
    K, M = codebooks.shape[1:3]
    subvectors = query.astype(np.float64).reshape(B, T, K, N // K, M, H // M)
    centroids = codebooks.astype(np.float64)[..., : H // M]
    with np.errstate(invalid="ignore"):
        table = np.einsum("btkgmd,bkmcd->btkgmc", subvectors, centroids)
    return table.reshape(B, T, N, M, -1)


def rounded(table, dtype):
    """The float32 table whose entries were rounded once to `dtype` (section 3, rule 3)."""
    with np.errstate(over="ignore"):
        return table.astype(np.float32).astype(jnp.dtype(dtype)).astype(np.float32)


def scores(table, codes, num_bits):
    """Rule 3 in the table's own dtype: [B,T,N,M,C], uint8 [B,K,M,S] -> [B,T,N,S]."""
    B, T, N, M, _ = table.shape
    group = N // codes.shape[1]
    total = np.empty((B, T, N, codes.shape[-1]), table.dtype)
    for b, t, n in np.ndindex(B, T, N):
        code = codes[b, n // group] & (2**num_bits - 1)
        row = table[b, t, n, 0, code[0]]
        for m in range(1, M):
            with np.errstate(invalid="ignore", over="ignore"):
                row = row + table[b, t, n, m, code[m]]
        total[b, t, n] = row
    return total


def visible(lengths, capacity, num_query_tokens, counts=None):
    """V of section 3: int [B] -> [B,T]; `counts` are tokens of the step that each row has taken."""
    if counts is None:
        counts = np.full(len(lengths), num_query_tokens)
    found = np.zeros((len(lengths), num_query_tokens), np.int64)
    for b, t in np.ndindex(*found.shape):
        length = min(max(int(lengths[b]), 0), capacity)
        count = min(max(int(counts[b]), 0), num_query_tokens)
        if t < count:
            found[b, t] = max(length - count + t + 1, 0)
    return found


def tokens(scores, visible, num_query_tokens, config):
    """The ascending positions that one row selects: rules 1, 2, 4 and 5."""
    short = config.heavy_size + config.first_trained + num_query_tokens + 2**config.num_bits
    position = np.arange(visible)
    if visible <= short:
        return position
    always = (position < config.sink_size) | (position >= visible - config.window_size)
    eligible = (position >= config.first_trained) & (position < visible - config.window_size)
    candidates = position[eligible & ~always]
    score = scores[candidates]
    nan = np.isnan(score)
    # The last key is the primary one: numbers before NaNs, higher first, then lower positions.
    order = np.lexsort((candidates, -np.where(nan, 0, score), nan))
    heavy = candidates[order[: config.heavy_size]]
    return np.sort(np.concatenate([position[always], heavy]))


def select(table, codes, lengths, config, counts=None):
    """Section 3: indices [B,T,N,P], counts [B,T,N] and 0/1 weights [B,T,N,S] for given tables."""
    B, T, N = table.shape[:3]
    S = codes.shape[-1]
    indices = np.full((B, T, N, config.max_selected(T)), -1, np.int32)
    num_listed = np.zeros((B, T, N), np.int32)
    weights = np.zeros((B, T, N, S), np.float32)
    score = scores(table, codes, config.num_bits)
    limit = visible(lengths, S, T, counts)
    for b, t, n in np.ndindex(B, T, N):
        chosen = tokens(score[b, t, n], limit[b, t], T, config)
        indices[b, t, n, : len(chosen)] = chosen
        num_listed[b, t, n] = len(chosen)
        weights[b, t, n, chosen] = 1
    return indices, num_listed, weights


def subvectors(key, num_subspaces, phi=None):
    """Float64 subvectors [B,K,M,t,D'] of a key [B,t,K,H]; phi [B,K,M] adds the extra coordinate."""
    B, t, K, _ = key.shape
    parts = key.astype(np.float64).reshape(B, t, K, num_subspaces, -1).transpose(0, 2, 3, 1, 4)
    if phi is None:
        return parts
    with np.errstate(invalid="ignore", over="ignore"):
        gap = phi.astype(np.float64)[..., None] - np.square(parts).sum(-1)
        return np.concatenate([parts, np.sqrt(np.maximum(gap, 0))[..., None]], axis=-1)


def encode(key, codebooks, phi=None):
    """Nearest centroids in float64 and how clear they are (section 4).

    Returns codes uint8 [B,K,M,t], and for each the squared distance by which the second-best
    centroid is farther: inf for a non-finite subvector, whose code is 0 by decree.
    """
    parts = subvectors(key, codebooks.shape[2], phi)
    finite = np.isfinite(parts).all(-1)
    parts = np.where(finite[..., None], parts, 0)
    centroids = codebooks.astype(np.float64)
    distance = np.square(parts[..., None, :] - centroids[:, :, :, None]).sum(-1)
    best = np.sort(distance, axis=-1)[..., :2]
    codes = np.where(finite, distance.argmin(-1), 0).astype(np.uint8)
    return codes, np.where(finite, best[..., 1] - best[..., 0], np.inf)


def attention(query, key, value, indices, *, scale=None, soft_cap=None, kv_layout="BSKH"):
    """Softmax attention over lists in float64 (section 4), one query at a time.

    query [B,T,N,H], key and value [B,S,K,H] or head-major, indices [B,T,N,P] of which what is no
    position is left out. Returns [B,T,N,H'], zeros for an empty list, and [B,T,N]: the log of the
    sum of the logits' exponentials.
    """
    if kv_layout == "BKSH":
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    B, T, N, H = query.shape
    S, group = key.shape[1], N // key.shape[2]
    scale = H**-0.5 if scale is None else scale
    out, lse = np.zeros((B, T, N, value.shape[3])), np.full((B, T, N), -np.inf)
    for b, t, n in np.ndindex(B, T, N):
        listed = indices[b, t, n][(indices[b, t, n] >= 0) & (indices[b, t, n] < S)]
        if not len(listed):
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            logits = key[b, listed, n // group] @ query[b, t, n] * scale
            if soft_cap is not None:
                logits = soft_cap * np.tanh(logits / soft_cap)
            weights = np.exp(logits - logits.max())
            out[b, t, n] = weights @ value[b, listed, n // group] / weights.sum()
            lse[b, t, n] = logits.max() + np.log(weights.sum())
    return out, lse


def value_sums(value, codes, lengths, config, kv_layout="BSKH"):
    """Sums of values by code in float64 and how many they are (section 4).

    value [B,S,K,H'] or head-major, codes [B,K,M,S]; returns [B,K,M',C',H'] and [B,K,M',C'].
    """
    if kv_layout == "BKSH":
        value = value.swapaxes(1, 2)
    B, S, K, size = value.shape
    by_code = config.estimate_rest == "codes"
    M, C = (config.num_subspaces, config.num_centroids) if by_code else (1, 1)
    sums, counts = np.zeros((B, K, M, C, size)), np.zeros((B, K, M, C), np.int64)
    for b, k, m in np.ndindex(B, K, M):
        last = min(max(int(lengths[b]), 0), S) - config.window_size - 15
        for position in range(config.first_candidate, last):
            one = value[b, position, k].astype(np.float64)
            code = codes[b, k, m, position] & (C - 1) if by_code else 0
            if np.isfinite(one).all():
                sums[b, k, m, code] += one
                counts[b, k, m, code] += 1
    return sums, counts


def decode_output(
    query, key, value, table, codes, lengths, counts, config,
    *, scale=None, soft_cap=None, kv_layout="BSKH",
):  # fmt: skip
    """What `decode_attention` returns, reranked and with the rest, in float64 (section 4).

    `table` is that of the queries, in the dtype that lists come from; lengths are those after the
    step, and counts what each row has taken, or None.
    """
    if kv_layout == "BKSH":
        key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    B, T, N, H = query.shape
    S, group = key.shape[1], N // key.shape[2]
    scale = H**-0.5 if scale is None else scale
    score = scores(table, codes, config.num_bits)
    limit = visible(lengths, S, T, counts)
    out = np.zeros((B, T, N, value.shape[3]))
    if config.estimate_rest:
        sums, numbers = value_sums(value, codes, lengths, config)

    def logits(products):
        products = products.astype(np.float64) * scale
        return products if soft_cap is None else soft_cap * np.tanh(products / soft_cap)

    for b, t, n in np.ndindex(B, T, N):
        V, k = limit[b, t], n // group
        if not V:
            continue
        keys, values = (x[b, :V, k].astype(np.float64) for x in (key, value))
        with np.errstate(invalid="ignore", over="ignore"):
            products = keys @ query[b, t, n].astype(np.float64)
            true, by_pq = logits(products), logits(score[b, t, n, :V])
        position = np.arange(V)
        is_candidate = (position >= config.first_candidate) & (position < V - config.window_size)
        is_candidate &= config.short_context(T) < V
        always = (position < config.sink_size) | (position >= V - config.window_size)
        always |= config.short_context(T) >= V
        pool = tokens(score[b, t, n], V, T, config.pool)
        pool = pool[is_candidate[pool]]
        nan = np.isnan(products[pool])
        order = np.lexsort((pool, -np.where(nan, 0, products[pool]), nan))
        attended = np.concatenate([position[always], pool[order[: config.heavy_size]]])
        losers = pool[order[config.heavy_size :]]
        weighed = [(x, true[x]) for x in (attended, losers)]
        of_tokens = values
        if config.estimate_rest:
            mean_of = sums[b, k] / np.maximum(numbers[b, k], 1)[..., None]
            of_all = sums[b, k, 0].sum(0) / max(numbers[b, k, 0].sum(), 1)
            mean_of = np.where((numbers[b, k] == 0)[..., None], of_all, mean_of)
            M, C = mean_of.shape[:2]
            estimate = (1 - M) * of_all + sum(
                mean_of[m][codes[b, k, m, :V] & (C - 1)] for m in range(M)
            )
            rest = np.setdiff1d(position[is_candidate], pool)
            with np.errstate(all="ignore"):
                by_pq = np.where(by_pq < np.inf, by_pq, -np.inf)
                most = [x.max(initial=-np.inf) for x in (true[pool], by_pq[pool])]
                masses = [
                    np.log(np.exp(x[pool] - m).sum())
                    for x, m in zip((true, by_pq), most, strict=True)
                ]
                log = most[0] - most[1] + masses[0] - masses[1]
            log = np.clip(log, -np.log(4), np.log(4)) if np.isfinite(log) else 0
            weighed += [(rest, by_pq[rest] + log)]
            losers_of = losers[true[losers] < np.inf]
            weighed[1] = losers_of, true[losers_of]
            if not numbers[b, k].any():
                weighed = weighed[:1]
        else:
            weighed = weighed[:1]
        largest = max(x.max(initial=-np.inf) for _, x in weighed)
        total, sum_of = 0.0, np.zeros(value.shape[3])
        for i, (which, logit) in enumerate(weighed):
            if not len(which) or largest == -np.inf:
                continue
            weight = np.exp(logit - largest)
            total += weight.sum()
            sum_of += weight @ (of_tokens if i == 0 else estimate)[which]
        if total:
            out[b, t, n] = sum_of / total
    return out
