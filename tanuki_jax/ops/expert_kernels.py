"""Pallas TPU kernels of the SwiGLU experts: three grouped products forward, six backward, with the activations fused in.

Rows are sorted by expert and each expert's rows begin at a whole tile, so a tile has one expert and needs no mask; its last
tile is filled up with zeros.  An expert without rows has one empty tile, so that its gradient is written too.
A weight block stays in fast memory while the tiles of its expert pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeAlias, TypedDict

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tanuki_jax.ops.device import mxu_columns, on_tpu, vmem_bytes

TILE = 256  # rows of a tile
HALF_TILE = 128  # rows that are computed of a tile with no more than these in use
SUBLANES, LANES = 8, 128
F32 = jnp.float32


class Ref(Protocol):
    """A block of an array in fast memory, as a kernel reads and writes it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: object) -> jax.Array: ...

    def __setitem__(self, index: object, value: jax.Array) -> None: ...


# Which block of an array a kernel gets, for grid indices n (block of columns) and t (tile), and e, f, b of Tiles.
BlockIndex: TypeAlias = tuple[Ref | jax.Array | int, ...]


class Tiles(NamedTuple):
    """The tiles of a group-aligned layout; int32 [M], M = rows / TILE."""

    expert: jax.Array  # the expert of its rows; tiles past the last repeat the last one's
    filled: jax.Array  # rows in use
    block: jax.Array  # the tile itself; tiles past the last point to the last, so that they move no data


def count_tiles(assignments: int, experts: int) -> int:
    """Tiles that hold any distribution of the assignments over the experts."""
    return assignments // TILE + experts


def layout(sizes_E: jax.Array, assignments: int) -> tuple[Tiles, jax.Array]:
    """The tiles for experts with these numbers of rows, and the row at which each expert begins [E]."""
    E, M = sizes_E.shape[0], count_tiles(assignments, sizes_E.shape[0])
    tiles_E = jnp.maximum(1, -(-sizes_E // TILE))
    ends_E = jnp.cumsum(tiles_E)
    block_M = jnp.minimum(jnp.arange(M), ends_E[-1] - 1)
    expert_M = jnp.minimum(jnp.searchsorted(ends_E, block_M, side="right"), E - 1)
    before_M = (block_M - (ends_E - tiles_E)[expert_M]) * TILE
    filled_M = jnp.where(jnp.arange(M) < ends_E[-1], jnp.clip(sizes_E[expert_M] - before_M, 0, TILE), 0)
    tiles = Tiles(*(a.astype(jnp.int32) for a in (expert_M, filled_M, block_M)))
    return tiles, ((ends_E - tiles_E) * TILE).astype(jnp.int32)


# --- the layer's three products and their gradients -----------------------------------------------------------------


Residuals: TypeAlias = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, Tiles
]  # x_RD, weight_R, gate and up products g_RF and u_RF, gate_EDF, up_EDF, down_EFD, tiles


@jax.custom_vjp
def swiglu(
    x_RD: jax.Array, weight_R: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, tiles: Tiles
) -> jax.Array:
    """Row r of expert e: weight[r] * down[e](silu(gate[e] x) * up[e] x), [R, D]; unused rows are undefined.

    Products accumulate in float32, the activation between them is float32, and results have the dtype of x.  Unused
    rows must have weight 0 and finite x.  For the backward pass x and the products "gate" and "up" are saved.
    """
    return _forward(x_RD, weight_R, gate_EDF, up_EDF, down_EFD, tiles)[0]


def _forward(
    x_RD: jax.Array, weight_R: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array, tiles: Tiles
) -> tuple[jax.Array, Residuals]:
    g_RF, u_RF, h_RF = _gate_up(x_RD, weight_R, gate_EDF, up_EDF, tiles)
    g_RF, u_RF = checkpoint_name(g_RF, "gate"), checkpoint_name(u_RF, "up")
    y_RD = _product(h_RF, down_EFD, tiles, transposed=False)
    return y_RD, (x_RD, weight_R, g_RF, u_RF, gate_EDF, up_EDF, down_EFD, tiles)


def _backward(residuals: Residuals, dy_RD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, None]:
    x_RD, weight_R, g_RF, u_RF, gate_EDF, up_EDF, down_EFD, tiles = residuals
    dg_RF, du_RF, h_RF, dweight_R = _gate_up_grad(dy_RD, weight_R, g_RF, u_RF, down_EFD, tiles)
    E = gate_EDF.shape[0]
    dgate, dup = _weight_grad(x_RD, dg_RF, E, tiles), _weight_grad(x_RD, du_RF, E, tiles)
    ddown = _weight_grad(h_RF, dy_RD, E, tiles)
    dx_RD = _product(dg_RF, gate_EDF, tiles, transposed=True)
    dx_RD = _product(du_RF, up_EDF, tiles, transposed=True, plus_RB=dx_RD)
    return dx_RD, dweight_R, dgate, dup, ddown, None


swiglu.defvjp(_forward, _backward)


def _gate_up(x_RD: jax.Array, weight_R: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, tiles: Tiles) -> list[jax.Array]:
    """Gate product, up product, and weight * silu(gate) * up."""
    (R, D), (_, _, F) = x_RD.shape, gate_EDF.shape
    dtype, bytes_ = x_RD.dtype, x_RD.dtype.itemsize
    width = _width(F, 4 * D * bytes_ + 3 * TILE * (2 * bytes_ + 4), 2 * TILE * D * bytes_)

    # Nine arguments: one reference for each input and output.
    def body(rows: slice, chunk: int, x: Ref, weight: Ref, gate: Ref, up: Ref, g_out: Ref, u_out: Ref, h_out: Ref) -> None:
        def compute(columns: pl.Slice) -> None:
            g, u = _dot(x[rows], gate[0, :, columns]), _dot(x[rows], up[0, :, columns])
            g_out[rows, columns], u_out[rows, columns] = g.astype(dtype), u.astype(dtype)
            h_out[rows, columns] = (weight[rows] * (g * jax.nn.sigmoid(g)) * u).astype(dtype)

        _in_chunks(width, chunk, compute)

    tile_cols = pl.BlockSpec((TILE, width), lambda n, t, e, f, b: (b[t], n))
    matrix = pl.BlockSpec((1, D, width), lambda n, t, e, f, b: (e[t], 0, n))
    return _call(
        "expert_gate_up",
        body,
        tiles,
        grid=(F // width, R // TILE),
        inputs=[(x_RD, _rows(D)), (weight_R[:, None], _rows(1)), (gate_EDF, matrix), (up_EDF, matrix)],
        outputs=[(jax.ShapeDtypeStruct((R, F), dtype), tile_cols)] * 3,
        cost=(4 * D * F, x_RD.nbytes * (F // width) + 2 * gate_EDF.nbytes + 3 * R * F * bytes_),
    )


def _gate_up_grad(
    dy_RD: jax.Array, weight_R: jax.Array, g_RF: jax.Array, u_RF: jax.Array, down_EFD: jax.Array, tiles: Tiles
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of the gate and up products, the down product's input once more, and the gradient of the weights."""
    (R, D), F = dy_RD.shape, g_RF.shape[1]
    dtype, bytes_ = dy_RD.dtype, dy_RD.dtype.itemsize
    width = _width(F, 2 * D * bytes_ + TILE * (10 * bytes_ + 24), 2 * TILE * D * bytes_ + 4 * TILE * LANES * 4)

    # Eleven arguments: one reference for each input and output.
    def body(
        rows: slice,
        chunk: int,
        dy: Ref,
        weight: Ref,
        g_in: Ref,
        u_in: Ref,
        down: Ref,
        dg_out: Ref,
        du_out: Ref,
        h_out: Ref,
        dweight_out: Ref,
    ) -> None:
        def compute(columns: pl.Slice) -> None:
            dh = _dot_transposed(dy[rows], down[0, columns])
            g, u, w = g_in[rows, columns].astype(F32), u_in[rows, columns].astype(F32), weight[rows]
            sigmoid = jax.nn.sigmoid(g)
            silu = g * sigmoid
            # Rows along lanes, by a product: one column would take as much memory as 128.
            ones = jnp.ones((SUBLANES, g.shape[1]), F32)
            dweight_out[0, :, rows] += _dot_transposed(ones, dh * silu * u, precision=jax.lax.Precision.HIGHEST)
            dh *= w
            h_out[rows, columns] = (w * silu * u).astype(dtype)
            du_out[rows, columns] = (dh * silu).astype(dtype)
            dg_out[rows, columns] = (dh * u * (sigmoid + silu * (1 - sigmoid))).astype(dtype)

        dweight_out[0, :, rows] = jnp.zeros_like(dweight_out[0, :, rows])
        _in_chunks(width, chunk, compute)

    tile_cols = pl.BlockSpec((TILE, width), lambda n, t, e, f, b: (b[t], n))
    matrix = pl.BlockSpec((1, width, D), lambda n, t, e, f, b: (e[t], n, 0))
    sums = pl.BlockSpec((1, SUBLANES, TILE), lambda n, t, e, f, b: (n, 0, b[t]))
    blocks = F // width
    dg_RF, du_RF, h_RF, dweight_n8R = _call(
        "expert_gate_up_gradient",
        body,
        tiles,
        grid=(blocks, R // TILE),
        inputs=[
            (dy_RD, _rows(D)),
            (weight_R[:, None], _rows(1)),
            (g_RF, tile_cols),
            (u_RF, tile_cols),
            (down_EFD, matrix),
        ],
        outputs=[(jax.ShapeDtypeStruct((R, F), dtype), tile_cols)] * 3
        + [(jax.ShapeDtypeStruct((blocks, SUBLANES, R), F32), sums)],
        cost=(2 * D * F, dy_RD.nbytes * blocks + down_EFD.nbytes + 5 * R * F * bytes_),
        aliases={2: 0, 3: 1},
    )
    return dg_RF, du_RF, h_RF, dweight_n8R[:, 0].sum(axis=0)


def _product(x_RA: jax.Array, w: jax.Array, tiles: Tiles, transposed: bool, plus_RB: jax.Array | None = None) -> jax.Array:
    """Rows times their expert's matrix, [E, A, B] or, transposed, [E, B, A], plus `plus`; [R, B]."""
    R, A = x_RA.shape
    B = w.shape[1] if transposed else w.shape[2]
    bytes_ = x_RA.dtype.itemsize
    width = _width(B, 2 * A * bytes_ + TILE * (4 * bytes_ + 4), 2 * TILE * A * bytes_)
    matrix_block = (1, width, A) if transposed else (1, A, width)

    def body(rows: slice, chunk: int, x: Ref, matrix: Ref, *plus_and_out: Ref) -> None:
        *plus, out = plus_and_out

        def compute(columns: pl.Slice) -> None:
            y = _dot_transposed(x[rows], matrix[0, columns]) if transposed else _dot(x[rows], matrix[0, :, columns])
            out[rows, columns] = (y + plus[0][rows, columns].astype(F32) if plus else y).astype(x_RA.dtype)

        _in_chunks(width, chunk, compute)

    def matrix_index(n: jax.Array, t: jax.Array, e: Ref, f: Ref, b: Ref) -> BlockIndex:
        return (e[t], n, 0) if transposed else (e[t], 0, n)

    tile_cols = pl.BlockSpec((TILE, width), lambda n, t, e, f, b: (b[t], n))
    addends = [] if plus_RB is None else [(plus_RB, tile_cols)]
    [y_RB] = _call(
        "expert_product",
        body,
        tiles,
        grid=(B // width, R // TILE),
        inputs=[(x_RA, _rows(A)), (w, pl.BlockSpec(matrix_block, matrix_index)), *addends],
        outputs=[(jax.ShapeDtypeStruct((R, B), x_RA.dtype), tile_cols)],
        cost=(2 * A * B, x_RA.nbytes * (B // width) + w.nbytes + (1 + len(addends)) * R * B * bytes_),
        aliases={2: 0} if addends else None,
    )
    return y_RB


def _weight_grad(x_RA: jax.Array, y_RB: jax.Array, experts: int, tiles: Tiles) -> jax.Array:
    """Sum over each expert's rows of the outer product of x and y, [E, A, B]."""
    (R, A), B = x_RA.shape, y_RB.shape[1]
    dtype, bytes_ = x_RA.dtype, x_RA.dtype.itemsize
    block_rows = _width(A, 2 * TILE * bytes_, 0, limit=2048)
    block_cols = _width(B, block_rows * (2 * bytes_ + 4) + 2 * TILE * bytes_, 2 * TILE * block_rows * bytes_, limit=2048)
    M, chunk = R // TILE, _chunk()

    # Seven arguments: the tiles, and one reference for each input, output and accumulator.
    def kernel(expert: Ref, filled: Ref, block: Ref, x: Ref, y: Ref, out: Ref, total: Ref) -> None:
        t = pl.program_id(2)
        first = (t == 0) | (expert[jnp.maximum(t - 1, 0)] != expert[t])
        last = (t == M - 1) | (expert[jnp.minimum(t + 1, M - 1)] != expert[t])

        def clear(part: pl.Slice) -> None:
            total[part] = jnp.zeros((part.size, block_cols), F32)

        def add(rows: slice, part: pl.Slice) -> None:
            product = jax.lax.dot_general(x[rows, part], y[rows], (((0,), (0,)), ((), ())), preferred_element_type=F32)
            total[part] = jnp.where(first, product, total[part] + product)

        def add_all(rows: int) -> None:
            _in_chunks(block_rows, chunk, functools.partial(add, slice(0, rows)))

        def write(part: pl.Slice) -> None:
            out[0, part] = total[part].astype(dtype)

        pl.when(first & (filled[t] == 0))(lambda: _in_chunks(block_rows, chunk, clear))
        _for_rows(filled[t], add_all)
        pl.when(last)(lambda: _in_chunks(block_rows, chunk, write))

    return pl.pallas_call(
        kernel,
        name="expert_outer",
        out_shape=jax.ShapeDtypeStruct((experts, A, B), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(A // block_rows, B // block_cols, M),
            in_specs=[
                pl.BlockSpec((TILE, block_rows), lambda a, b, t, e, f, o: (o[t], a)),
                pl.BlockSpec((TILE, block_cols), lambda a, b, t, e, f, o: (o[t], b)),
            ],
            out_specs=pl.BlockSpec((1, block_rows, block_cols), lambda a, b, t, e, f, o: (e[t], a, b)),
            scratch_shapes=[pltpu.VMEM((block_rows, block_cols), F32)],
        ),
        cost_estimate=_cost(
            *(M, experts, 2 * A * B),
            bytes_accessed=x_RA.nbytes * (B // block_cols) + y_RB.nbytes * (A // block_rows) + experts * A * B * bytes_,
        ),
        **_options(("parallel", "parallel", "arbitrary")),
    )(*tiles, x_RA, y_RB)


# --- how a kernel is called -----------------------------------------------------------------------------------------


# Eight arguments: what the kernels differ in.
def _call(
    name: str,
    body: Callable[..., None],
    tiles: Tiles,
    grid: tuple[int, int],
    inputs: Sequence[tuple[jax.Array, pl.BlockSpec]],
    outputs: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    cost: tuple[int, int],
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Runs body(rows, columns at once, *references) over a grid (column blocks, tiles) for the rows in use; others give 0.

    cost: FLOPs per row and bytes accessed in all.
    aliases: inputs whose memory becomes that of an output; their blocks must be the same.
    """

    chunk = _chunk()

    def kernel(expert: Ref, filled: Ref, block: Ref, *references: Ref) -> None:
        def compute(rows: int) -> None:
            body(slice(0, rows), chunk * rows // TILE, *references)  # the rare half of a tile in a shorter program
            for reference in references[len(inputs) :] if rows < TILE else ():
                unused = (0, slice(None), slice(rows, TILE)) if len(reference.shape) == 3 else slice(rows, TILE)
                reference[unused] = jnp.zeros_like(reference[unused])

        _for_rows(filled[pl.program_id(1)], compute)

    experts = next(array.shape[0] for array, _ in inputs if array.ndim == 3)
    flops_per_row, bytes_accessed = cost
    return pl.pallas_call(
        kernel,
        name=name,
        out_shape=[shape for shape, _ in outputs],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=grid, in_specs=[s for _, s in inputs], out_specs=[s for _, s in outputs]
        ),
        cost_estimate=_cost(grid[1], experts, flops_per_row, bytes_accessed),
        input_output_aliases={len(tiles) + i: o for i, o in (aliases or {}).items()},
        **_options(("parallel", "arbitrary")),
    )(*tiles, *(array for array, _ in inputs))


def _for_rows(filled: jax.Array, compute: Callable[[int], None]) -> None:
    """Computes half of a tile that has no more rows in use, all of any other tile, and nothing of an empty one."""
    pl.when(filled > HALF_TILE)(lambda: compute(TILE))
    pl.when((filled > 0) & (filled <= HALF_TILE))(lambda: compute(HALF_TILE))


def _chunk() -> int:
    """Columns of a block that are computed at once: enough to keep the matrix units busy, in a program that stays short."""
    return 4 * mxu_columns()


def _in_chunks(length: int, limit: int, body: Callable[[pl.Slice], None]) -> None:
    """Runs body(part) for all equal parts of a block's side, `limit` at most; a length that 128 does not divide is one part."""
    chunk = max((c for c in range(LANES, limit + 1, LANES) if length % c == 0), default=length)
    if chunk == length:
        body(pl.Slice(0, length))
    else:
        jax.lax.fori_loop(0, length // chunk, lambda i, _: body(pl.Slice(pl.multiple_of(i * chunk, chunk), chunk)), None)


def _cost(tiles: int, experts: int, flops_per_row: int, bytes_accessed: int) -> pl.CostEstimate:
    """The cost for the compiler: rows in use, and the unused ones computed with them on average; data as often as it moves."""
    rows = (tiles - experts) * TILE + experts * HALF_TILE // 2
    return pl.CostEstimate(flops=rows * flops_per_row, bytes_accessed=int(bytes_accessed), transcendentals=0)


class _CallOptions(TypedDict, total=False):
    interpret: bool
    compiler_params: pltpu.CompilerParams


def _options(semantics: tuple[Literal["parallel", "arbitrary"], ...]) -> _CallOptions:
    if not on_tpu():
        return {"interpret": True}
    # The compiler needs some memory for itself, how much depends on its version.
    parameters = pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=vmem_bytes() * 7 // 6)
    return {"compiler_params": parameters}


def _rows(columns: int) -> pl.BlockSpec:
    return pl.BlockSpec((TILE, columns), lambda n, t, e, f, b: (b[t], 0))


def _width(length: int, bytes_per_column: int, fixed: int, limit: int = 4096) -> int:
    """The widest block of columns that divides and fits in fast memory; a length that 128 does not divide stays whole."""
    if length % LANES:
        return length
    fitting = max(LANES, (vmem_bytes() - fixed) // bytes_per_column)
    return max(w for w in range(LANES, length + 1, LANES) if length % w == 0 and w <= max(LANES, min(fitting, limit)))


_dot = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=F32)
_dot_transposed = functools.partial(jax.lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=F32)
