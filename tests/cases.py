# SPDX-License-Identifier: Apache-2.0
"""The table of attention problems (cases.tsv) and the tensors that a row stands for.

Tests and benchmarks build the same problems from it:

    for case in load_cases("bench", "speed"):
        problem = build(case, "float32", seed=0)
        out = flash_sparse_attention.attention(**problem.arguments())
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("cases.tsv")
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
TILE_ROWS = 64


def tile_keys(head_dim: int) -> int:
    """Keys of a skip tile."""
    return 128 if head_dim <= 128 else 64


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Lengths of the sequences of a problem: what the tensors hold and, where given, what is in use."""

    held: tuple[int, ...]
    used: tuple[int, ...] | None = None

    def of(self, sequence: int) -> int:
        return self.held[sequence] if self.used is None else self.used[sequence]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table, parsed. cases.tsv documents the columns."""

    name: str = "case"
    tags: tuple[str, ...] = ()
    form: str = "batched"
    batch: int = 1
    seqlen_q: int = 1
    seqlen_k: int = 1
    num_heads: int = 1
    num_kv_heads: int = 1
    head_dim: int = 64
    head_dim_v: int = 64
    dtypes: tuple[str, ...] = ("float32",)
    causal: bool = False
    window_size: tuple[int, int] | None = None
    window_sizes: tuple[tuple[int, ...], ...] | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    alibi: str | None = None
    sink: bool = False
    threshold: float | None = None
    gate: str | None = None
    adaptive_gate: bool = True
    gate_layout: str = "bsh"
    gate_threshold: float | None = None
    inputs: str = "normal"
    gate_inputs: str = "random"
    lengths_q: Lengths | None = None
    lengths_k: Lengths | None = None
    page_size: int | None = None
    top_k: int | None = None
    block_mask: tuple[int, int, str, float | None] | None = None
    segment: int = 256  # keys per topic; not a column

    @property
    def decode(self) -> bool:
        return self.form.startswith("decode")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5 if self.softmax_scale is None else self.softmax_scale

    @property
    def skips(self) -> bool:
        """Whether tiles can be skipped."""
        gate_on = self.gate is not None and (self.gate_threshold is None or self.gate_threshold > 0)
        return gate_on or (self.threshold is not None and self.threshold > 0)

    def replace(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)


def packing(form: str) -> tuple[bool, bool]:
    """Whether queries and keys are packed."""
    return form in ("packed", "packed_paged"), "packed" in form and form != "packed_paged"


def _lengths(text: str, packed: bool, maximum: int) -> Lengths:
    pairs = [entry.split(":") for entry in text.split(",")]
    first = tuple(int(p[0]) for p in pairs)
    if not packed:
        return Lengths((maximum,) * len(first), first)
    if any(len(p) > 1 for p in pairs):
        return Lengths(first, tuple(int(p[-1]) for p in pairs))
    return Lengths(first)


def _block_mask(text: str) -> tuple[int, int, str, float | None]:
    rows, keys, scope, density = (text.split(",") + ["", ""])[:4]
    return int(rows), int(keys), scope, float(density) if density else None


def _parse(row: dict[str, str]) -> Case:
    def given(column: str, convert: Any, default: Any) -> Any:
        return default if row[column] == "-" else convert(row[column])

    def ints(text: str) -> tuple[int, ...]:
        return tuple(int(entry) for entry in text.split(","))

    form = row["form"]
    packed_q, packed_k = packing(form)
    seqlen_q, seqlen_k, head_dim = int(row["seqlen_q"]), int(row["seqlen_k"]), int(row["head_dim"])
    return Case(
        name=row["name"],
        tags=tuple(row["tags"].split(",")),
        form=form,
        batch=int(row["batch"]),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_heads=int(row["num_heads"]),
        num_kv_heads=int(row["num_kv_heads"]),
        head_dim=head_dim,
        head_dim_v=given("head_dim_v", int, head_dim),
        dtypes=tuple(row["dtypes"].split(",")),
        causal=row["causal"] == "1",
        window_size=given("window_size", ints, None),
        window_sizes=given("window_sizes", lambda text: tuple(ints(g) for g in text.split(";")), None),
        softmax_scale=given("softmax_scale", float, None),
        softcap=given("softcap", float, 0.0),
        alibi=given("alibi", str, None),
        sink=row["sink"] == "1",
        threshold=given("threshold", float, None),
        gate=given("gate", str, None),
        adaptive_gate=row["adaptive_gate"] != "0",
        gate_layout=given("gate_layout", str, "bsh"),
        gate_threshold=given("gate_threshold", float, None),
        inputs=given("inputs", str, "normal"),
        gate_inputs=given("gate_inputs", str, "random"),
        lengths_q=given("lengths_q", lambda text: _lengths(text, packed_q, seqlen_q), None),
        lengths_k=given("lengths_k", lambda text: _lengths(text, packed_k, seqlen_k), None),
        page_size=given("page_size", int, None),
        top_k=given("top_k", int, None),
        block_mask=given("block_mask", _block_mask, None),
    )


def load_cases(*tags: str, without: tuple[str, ...] = ()) -> list[Case]:
    """Rows that carry every one of `tags` and none of `without`, in the order of the table."""
    lines = [line for line in TABLE.read_text().splitlines() if line and not line.startswith("#")]
    columns = lines[0].split("\t")
    cases = [_parse(dict(zip(columns, line.split("\t"), strict=True))) for line in lines[1:]]
    return [c for c in cases if set(tags) <= set(c.tags) and not set(without) & set(c.tags)]


def case_named(name: str) -> Case:
    """The row with this name. Raises KeyError when there is none."""
    for case in load_cases():
        if case.name == name:
            return case
    raise KeyError(name)


@dataclasses.dataclass
class Problem:
    """Tensors and options of one call, under the names of the parameters of attention()."""

    case: Case
    tensors: dict[str, torch.Tensor]
    options: dict[str, Any]

    @property
    def decode(self) -> bool:
        return self.case.decode

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors["query"].dtype

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of attention()."""
        if self.decode:
            raise ValueError(f"{self.case.form}: decode goes through decode_call()")
        return {**self.tensors, **self.options}

    def decode_call(self) -> tuple[str, dict[str, Any]]:
        """Name and keyword arguments of the decode function."""
        if not self.decode:
            raise ValueError(f"{self.case.form} goes through arguments()")
        names = ("query", "key", "value", "alpha", "delta", "window_sizes", "cu_seqlens_k", "seqused_k")
        names += ("page_table", "gather_kv_indices")
        arguments: dict[str, Any] = {n: self.tensors[n] for n in names if n in self.tensors}
        options = self.options
        arguments["softmax_scale"] = options.get("softmax_scale")
        if "window_size" in options:
            arguments["window_size"] = options["window_size"]
        kind = "dense"
        if "alpha" in self.tensors or options.get("threshold") is not None:
            kind = "sparse"
            arguments["softmax_threshold"] = options.get("threshold") or 0.0
        if "alpha" in self.tensors:
            kind = "gated"
            arguments["gate_threshold"] = options.get("gate_threshold")
            arguments["is_logsigmoid_gate"] = options.get("log_sigmoid_gate", True)
            arguments["gate_layout"] = options.get("gate_layout", "bsh")
        packed = "cu_seqlens_k" in self.tensors
        if packed:
            arguments["max_seqlen_k"] = self.case.seqlen_k
        return f"flash_{kind}_attn_{'varlen_' if packed else ''}with_kvcache_func", arguments


def _topics(case: Case, lengths: list[tuple[int, int]], generator: torch.Generator) -> list[torch.Tensor]:
    """Topic of every key position, per sequence: [num_kv_heads, segments * segment]."""
    topics = []
    for seqlen_q, seqlen_k in lengths:
        segments = max(seqlen_q, seqlen_k) // case.segment + 2
        drawn = torch.randint(0, 10, (case.num_kv_heads, segments), generator=generator)
        topics.append(drawn.repeat_interleave(case.segment, dim=1))
    return topics


def _states(case: Case, lengths: list[tuple[int, int]], g: torch.Generator) -> tuple[list, list, list]:
    """Per sequence: query [seqlen_q, num_heads, head_dim], key and value, float32."""
    group = case.num_heads // case.num_kv_heads
    queries, keys, values = [], [], []
    if case.inputs == "topics":
        directions = torch.randn(10, case.head_dim, generator=g)
        directions /= directions.norm(dim=1, keepdim=True)
        size = math.sqrt(14.0 / case.scale)
        all_topics = _topics(case, lengths, g)
    for index, (seqlen_q, seqlen_k) in enumerate(lengths):
        query = torch.randn(seqlen_q, case.num_heads, case.head_dim, generator=g)
        key = torch.randn(seqlen_k, case.num_kv_heads, case.head_dim, generator=g)
        values.append(torch.randn(seqlen_k, case.num_kv_heads, case.head_dim_v, generator=g))
        if case.inputs == "topics":
            topics = all_topics[index]
            first = max(seqlen_k - seqlen_q, 0)
            key = size * directions[topics[:, :seqlen_k].T] + 0.3 * key
            rows = topics[:, first : first + seqlen_q].T.repeat_interleave(group, dim=1)
            query = size * directions[rows] + 0.3 * query
        elif case.inputs == "large":
            query, key = 3 * query, 3 * key
        elif case.inputs == "softcap":
            query = query * (case.softcap / 4)
        elif case.inputs != "normal":
            raise ValueError(f"inputs: {case.inputs}")
        queries.append(query)
        keys.append(key)
    return queries, keys, values


def _gates(case: Case, lengths: list[tuple[int, int]], g: torch.Generator) -> tuple[list, list]:
    """Per sequence: alpha [seqlen_q, num_heads] and delta [seqlen_k, num_kv_heads], float32."""
    kind, _, share = case.gate_inputs.partition(":")
    alphas, deltas = [], []
    for seqlen_q, seqlen_k in lengths:
        if kind == "tiles":
            tile = tile_keys(case.head_dim)
            open_tiles = torch.rand(seqlen_k // tile + 1, case.num_kv_heads, generator=g) < float(share)
            is_open = open_tiles.repeat_interleave(tile, dim=0)[:seqlen_k]
            alpha = 0.5 + torch.rand(seqlen_q, case.num_heads, generator=g)
            height = torch.rand(seqlen_k, case.num_kv_heads, generator=g)
            delta = torch.where(is_open, 0.5 + height, -(60.0 + 20.0 * height) / case.scale)
        elif kind in ("random", "large"):
            size = 6.0 if kind == "large" else 1.0
            alpha = size * torch.randn(seqlen_q, case.num_heads, generator=g)
            delta = size * torch.randn(seqlen_k, case.num_kv_heads, generator=g)
        else:
            raise ValueError(f"gate_inputs: {case.gate_inputs}")
        alphas.append(alpha)
        deltas.append(delta)
    return alphas, deltas


def _place(parts: list[torch.Tensor], held: list[int], packed: bool) -> torch.Tensor:
    """Sequences into one tensor; what they do not fill is NaN."""
    padded = []
    for part, extent in zip(parts, held, strict=True):
        tensor = part.new_full((extent, *part.shape[1:]), math.nan)
        tensor[: part.shape[0]] = part
        padded.append(tensor)
    return torch.cat(padded) if packed else torch.stack(padded)


def _page(
    parts: list[torch.Tensor], page_table: torch.Tensor, num_pages: int, page_size: int
) -> torch.Tensor:
    pages = parts[0].new_full((num_pages, page_size, *parts[0].shape[1:]), math.nan)
    for sequence, part in enumerate(parts):
        for page in range(math.ceil(part.shape[0] / page_size)):
            rows = part[page * page_size : (page + 1) * page_size]
            pages[page_table[sequence, page], : rows.shape[0]] = rows
    return pages


def draw_block_mask(case: Case, g: torch.Generator) -> Any:
    """A block mask of hidden, full and partial blocks, a third each; some tiles of partial ones show nothing. The
    lists are in random order, with nonsense behind their counts. With a density, full blocks alone."""
    from flash_sparse_attention import BlockMask

    rows, keys, scope, density = case.block_mask
    batch, heads = case.batch if "b" in scope else 1, case.num_heads if "h" in scope else 1
    row_blocks, key_blocks = math.ceil(case.seqlen_q / rows), math.ceil(case.seqlen_k / keys)
    if density is not None:
        chosen = torch.rand(batch, heads, row_blocks, key_blocks, generator=g) < density
        return BlockMask.from_dense(chosen, (rows, keys))
    kind = torch.randint(0, 3, (batch, heads, row_blocks, key_blocks), generator=g)
    order = torch.rand(kind.shape, generator=g)
    lists = []
    for wanted in (1, 2):
        chosen = kind == wanted
        first = torch.where(chosen, order, 2.0).argsort(-1).int()
        counts = chosen.sum(-1, dtype=torch.int32)
        junk = torch.arange(key_blocks) >= counts[..., None]
        lists += [counts, torch.where(junk, -(2**31), first)]
    partial = lists[0].flatten()
    words = keys // 32
    bits = torch.randint(-(2**31), 2**31, (int(partial.sum()), rows, words), generator=g).int()
    tile = min(tile_keys(case.head_dim), keys) // 32
    empty = torch.rand(bits.shape[0], rows // TILE_ROWS, words // tile, generator=g) < 0.3
    bits[empty.repeat_interleave(TILE_ROWS, 1).repeat_interleave(tile, 2)] = 0
    begin = (partial.cumsum(0) - partial).int().view(lists[0].shape)
    return BlockMask(*lists, begin, bits, (rows, keys))


def _int32(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def build(case: Case, dtype: str | torch.dtype = "float32", seed: int = 0, gate_dtype: Any = None) -> Problem:
    """The problem of a row. Everything beyond the used lengths is NaN.

    dtype: of query, key and value. gate_dtype: of alpha, delta and sink; default as dtype. ALiBi slopes are
    float32, float64 for float64.
    """
    dtype = DTYPES[dtype] if isinstance(dtype, str) else dtype
    gate_dtype = dtype if gate_dtype is None else gate_dtype
    g = torch.Generator().manual_seed(seed)
    full_q = Lengths((case.seqlen_q,) * case.batch)
    full_k = Lengths((case.seqlen_k,) * case.batch)
    lengths_q, lengths_k = case.lengths_q or full_q, case.lengths_k or full_k
    lengths = [(lengths_q.of(b), lengths_k.of(b)) for b in range(case.batch)]
    packed_q, packed_k = packing(case.form)
    paged = "paged" in case.form
    tensors: dict[str, torch.Tensor] = {}
    options: dict[str, Any] = {}

    queries, keys, values = _states(case, lengths, g)
    sides: dict[str, list[torch.Tensor]] = {"query": queries, "key": keys, "value": values}
    if case.gate is not None:
        sides["alpha"], sides["delta"] = _gates(case, lengths, g)
    if paged:
        assert case.page_size is not None
        columns = math.ceil(case.seqlen_k / case.page_size)
        num_pages = case.batch * columns + 3
        page_table = torch.randperm(num_pages, generator=g)[: case.batch * columns].reshape(
            case.batch, columns
        )
    for name, parts in sides.items():
        on_rows = name in ("query", "alpha")
        if not parts:  # an empty batch
            width = (case.num_heads, case.head_dim) if on_rows else (case.num_kv_heads, case.head_dim)
            width = (case.num_kv_heads, case.head_dim_v) if name == "value" else width
            extent = case.seqlen_q if on_rows else case.seqlen_k
            tensor = torch.zeros(0, extent, *width)
        elif paged and not on_rows:
            tensor = _page(parts, page_table, num_pages, case.page_size)
        elif on_rows:
            tensor = _place(parts, list(lengths_q.held), packed_q)
        else:
            tensor = _place(parts, list(lengths_k.held), packed_k)
        if case.decode and on_rows:
            tensor = tensor.squeeze(1)
        elif name in ("alpha", "delta") and case.gate_layout == "bhs":
            tensor = tensor.transpose(-1, -2).contiguous()
        tensors[name] = tensor.to(gate_dtype if name in ("alpha", "delta") else dtype)

    if packed_q:
        tensors["cu_seqlens_q"] = _int32([sum(lengths_q.held[:b]) for b in range(case.batch + 1)])
    if packed_k:
        tensors["cu_seqlens_k"] = _int32([sum(lengths_k.held[:b]) for b in range(case.batch + 1)])
    if not case.decode and lengths_q.used is not None:
        tensors["seqused_q"] = _int32(lengths_q.used)
    if lengths_k.used is not None or paged:
        tensors["seqused_k"] = _int32([lengths_k.of(b) for b in range(case.batch)])
    if paged:
        used_pages = [math.ceil(lengths_k.of(b) / case.page_size) for b in range(case.batch)]
        table = page_table.to(torch.int32)
        for sequence, used in enumerate(used_pages):
            table[sequence, used:] = -(2**31) + sequence  # never read
        tensors["page_table"] = table
    if "gathered" in case.form:
        tensors["gather_kv_indices"] = torch.full((case.batch, case.top_k), -1, dtype=torch.int32)
        for sequence, (_, seqlen_k) in enumerate(lengths):
            # In order, as a top-k over a sequence of topics is; every seventh entry is "none".
            indices = torch.randperm(seqlen_k, generator=g)[: case.top_k].sort().values.to(torch.int32)
            indices[3::7] = -1
            tensors["gather_kv_indices"][sequence, : indices.shape[0]] = indices
    if case.window_sizes is not None:
        tensors["window_sizes"] = _int32(case.window_sizes)
    if case.alibi is not None:
        shape = (case.batch, case.num_heads) if case.alibi == "batch" else (case.num_heads,)
        slopes = 0.01 + 0.3 * torch.rand(shape, generator=g)
        tensors["alibi_slopes"] = slopes.to(torch.float64 if dtype == torch.float64 else torch.float32)
    if case.sink:
        tensors["sink"] = torch.randn(case.num_heads, generator=g).to(gate_dtype)

    options["causal"] = case.causal
    if case.window_size is not None:
        options["window_size"] = case.window_size
    if case.softmax_scale is not None:
        options["softmax_scale"] = case.softmax_scale
    if case.softcap:
        options["softcap"] = case.softcap
    if case.threshold is not None:
        options["threshold"] = case.threshold
    if case.gate is not None:
        options["log_sigmoid_gate"] = case.gate == "log_sigmoid"
        options["adaptive_gate"] = case.adaptive_gate
        options["gate_layout"] = case.gate_layout
        if case.gate_threshold is not None:
            options["gate_threshold"] = case.gate_threshold
    if case.block_mask is not None:
        options["block_mask"] = draw_block_mask(case, g)
    return Problem(case, tensors, options)
