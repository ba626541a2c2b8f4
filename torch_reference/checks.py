"""What the original does not check, and would read out of bounds for or answer wrongly."""

import operator

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _fail(name: str, expected: str, got: object, fix: str):
    raise ValueError(f"{name}: expected {expected}, got {got}; {fix}")


def size(name: str, value: int, low: int = 0) -> int:
    """The value as an int of at least `low`, or a ValueError."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low:
        _fail(name, f"an int of at least {low}", repr(value), "pass a number of tokens or steps")
    return number


def metric(kind: str):
    """Raises ValueError unless the metric is known."""
    if kind not in ("euclidean", "ip"):
        _fail("metric", "'euclidean' or 'ip'", repr(kind), "name one of these")


def _tensor(name: str, value: object, layout: str, dtypes: tuple[torch.dtype, ...]):
    rank = layout.count(",") + 1
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if not isinstance(value, torch.Tensor):
        _fail(name, f"a {names} tensor {layout}", type(value).__name__, "pass a torch.Tensor")
    if value.dim() != rank:
        _fail(name, layout, f"shape {list(value.shape)}", f"reshape it to {rank} axes")
    if value.dtype not in dtypes:
        dtype = str(value.dtype).removeprefix("torch.")
        _fail(name, names, dtype, f"cast with .to({dtypes[0]})")


def _shape(name: str, value: torch.Tensor, layout: str, expected: tuple[int, ...], fix: str):
    if tuple(value.shape) != expected:
        _fail(name, f"{layout} = {list(expected)}", f"{list(value.shape)}", fix)


def _heads(h: int, h_kv: int):
    if h_kv == 0 or h == 0 or h % h_kv:
        _fail("query", f"a multiple of the keys' {h_kv} heads", f"{h} heads", "check the head axes")


def _device(first: torch.Tensor, **others: torch.Tensor | None):
    for name, value in others.items():
        if value is not None and value.device != first.device:
            _fail(name, f"a tensor on {first.device}", value.device, "move it there")


def keys(value: torch.Tensor, n_subvec: int):
    """Raises ValueError unless the keys are float [b, h_kv, sk, d] with `n_subvec` dividing d."""
    _tensor("keys", value, "[b, h_kv, sk, d]", FLOATS)
    if value.shape[0] == 0 or value.shape[1] == 0:
        fix = "pass a batch row and a head"
        _fail("keys", "b and h_kv of at least 1", list(value.shape), fix)
    if value.shape[-1] == 0 or value.shape[-1] % n_subvec:
        fix = f"choose a divisor of d={value.shape[-1]}"
        _fail("pq_group_factor", "subspaces that divide d", n_subvec, fix)


def step(query, all_keys, pq_centroids, pq_codebook, ip2l2_phi, init_offset: int, kind: str):
    """Raises ValueError unless the tensors of a decode step fit together; reads no values."""
    _tensor("query", query, "[b, h, sq, d]", FLOATS)
    _tensor("keys", all_keys, "[b, h_kv, sk, d]", FLOATS)
    _tensor("pq_centroids", pq_centroids, "[b, h_kv, n_subvec, cent_cnt, subvec_d]", FLOATS)
    _tensor("pq_codebook", pq_codebook, "[b, h_kv, n_quantized, n_subvec]", (torch.int64,))
    b, h, sq, d = query.shape
    h_kv, sk = all_keys.shape[1:3]
    n_subvec, cent_cnt = pq_centroids.shape[2:4]
    if b == 0 or sq == 0:
        fix = "pass a batch row and a query token"
        _fail("query", "b and sq of at least 1", list(query.shape), fix)
    _heads(h, h_kv)
    _shape("keys", all_keys, "[b, h_kv, sk, d]", (b, h_kv, sk, d), "match the query's b and d")
    if n_subvec == 0 or cent_cnt == 0 or d == 0 or d % n_subvec:
        fix = f"choose subspaces that divide d={d}"
        _fail("pq_centroids", "n_subvec that divides d", list(pq_centroids.shape), fix)
    metric(kind)
    subvec_d = d // n_subvec + (kind == "ip")
    _shape(
        "pq_centroids",
        pq_centroids,
        "[b, h_kv, n_subvec, cent_cnt, subvec_d]",
        (b, h_kv, n_subvec, cent_cnt, subvec_d),
        "match query and keys; 'ip' has one more dimension, the augmented one",
    )
    n_quantized = pq_codebook.shape[2]
    _shape(
        "pq_codebook",
        pq_codebook,
        "[b, h_kv, n_quantized, n_subvec]",
        (b, h_kv, n_quantized, n_subvec),
        "match keys and pq_centroids",
    )
    if n_quantized > max(sk - init_offset, 0):
        fix = "pass all keys up to now, the new ones included"
        wanted = f"codes of at most {max(sk - init_offset, 0)} tokens (sk - init_offset)"
        _fail("pq_codebook", wanted, n_quantized, fix)
    if kind == "ip":
        _tensor("ip2l2_phi", ip2l2_phi, "[b, h_kv, n_subvec]", (torch.float32,))
        _shape(
            "ip2l2_phi",
            ip2l2_phi,
            "[b, h_kv, n_subvec]",
            (b, h_kv, n_subvec),
            "pass what indexer_first returned",
        )
    elif ip2l2_phi is not None:
        _fail("ip2l2_phi", "None for metric='euclidean'", "a tensor", "pass metric='ip'")
    for name, value in (
        ("query", query),
        ("pq_centroids", pq_centroids),
        ("pq_codebook", pq_codebook),
    ):
        if not value.is_contiguous():
            _fail(name, "a contiguous tensor", f"strides {value.stride()}", "call .contiguous()")
    _device(
        query,
        keys=all_keys,
        pq_centroids=pq_centroids,
        pq_codebook=pq_codebook,
        ip2l2_phi=ip2l2_phi,
    )


def kernel_device(query: torch.Tensor, interpreted: bool):
    """Raises ValueError unless Triton kernels can run where the tensors are."""
    if interpreted:
        return
    if not query.is_cuda:
        _fail("query", "a CUDA tensor", query.device, "move the arguments, or use 'eager'")
    if query.device.index != torch.cuda.current_device():
        current = f"a tensor on the current device, cuda:{torch.cuda.current_device()}"
        _fail("query", current, query.device, "call torch.cuda.set_device")


def codes(pq_codebook: torch.Tensor, cent_cnt: int):
    """Raises ValueError unless every code names a centroid; waits for the device."""
    if pq_codebook.numel() == 0:
        return
    low, high = (int(code) for code in torch.aminmax(pq_codebook))
    if low < 0 or high >= cent_cnt:
        fix = "were they made with these centroids?"
        _fail("pq_codebook", f"codes in [0, {cent_cnt})", f"codes in [{low}, {high}]", fix)


def full_float32_matmul(device: torch.device):
    """Raises ValueError when the process asked for float32 products in fewer bits (TF32).

    PyTorch's default is full float32. Setting it here would change it for other threads, so a
    process that chose otherwise is told.
    """
    backends = torch.backends
    library = backends.cuda if device.type == "cuda" else backends.mkldnn
    if library.matmul.fp32_precision not in ("none", "ieee"):
        fix = "call torch.set_float32_matmul_precision('highest')"
        _fail("float32 matmul precision", "full float32", library.matmul.fp32_precision, fix)


def attention(query, all_keys, values, sparse_list, sparse_len):
    """Raises ValueError unless the arguments of sparse_attention fit together."""
    integers = (torch.int64, torch.int32)
    _tensor("query", query, "[b, h, sq, d]", FLOATS)
    _tensor("keys", all_keys, "[b, h_kv, sk, d]", FLOATS)
    _tensor("values", values, "[b, h_kv, sk, d_v]", FLOATS)
    _tensor("sparse_list", sparse_list, "[b, h, sparse_len_max]", integers)
    _tensor("sparse_len", sparse_len, "[b, h]", integers)
    b, h, _, d = query.shape
    h_kv, sk = all_keys.shape[1:3]
    _heads(h, h_kv)
    _shape("keys", all_keys, "[b, h_kv, sk, d]", (b, h_kv, sk, d), "match the query's b and d")
    d_v, listed = values.shape[-1], sparse_list.shape[-1]
    _shape("values", values, "[b, h_kv, sk, d_v]", (b, h_kv, sk, d_v), "match the keys")
    _shape("sparse_list", sparse_list, "[b, h, P]", (b, h, listed), "match the query")
    _shape("sparse_len", sparse_len, "[b, h]", (b, h), "match the query")
    _device(query, keys=all_keys, values=values, sparse_list=sparse_list, sparse_len=sparse_len)
