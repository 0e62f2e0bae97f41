"""One recurrent layer on the kernels: the large products before and after, and the launches over time between.

The twin of ``reference/bptt.py``, with the same buffers. The products of ``x`` run over all steps at once, before; in
backward those of ``dx`` and the weights afterwards. Only what cannot be parallel is in the kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cells import Cell
from ..devices import describe
from ..errors import UnsupportedInput
from ..kernels.tuning import INTERPRETER, Device
from ..reference.bptt import Gradients, Kept, weight_gradient
from . import projection
from .layer import Layer
from .layout import Map
from .precision import library_precision


def _check_resident(plan, device: Device) -> None:
    """Refuse a launch whose programs would wait for others that cannot run meanwhile, wherever its plan came from.

    Raises:
        UnsupportedInput: if it would.
    """
    from ..kernels import grid

    if plan.slices == 1 or (device.arch == INTERPRETER and grid.interleaved):
        return
    if device.arch == INTERPRETER:
        raise UnsupportedInput(
            f"interpreted programs run one after another, and {plan.slices} slices would wait for each other forever; "
            "launch them within seqcore.testing.explore(seed), or leave plan.overriding(units=…) out"
        )
    if plan.slices * plan.teams > device.multiprocessors:
        raise UnsupportedInput(
            f"{plan.slices * plan.teams} programs would wait for each other, and the {device.multiprocessors} "
            f"multiprocessors of {device.arch} run one of them each: leave plan.overriding(…) out, have it ask for "
            "fewer groups or more units a slice, or take another backend"
        )


def _launch(kernel, plan, device: torch.device, arguments: Sequence, map_: Map, **constants) -> None:
    """``kernel`` over all groups of sequences, in as many launches as it takes.

    Raises:
        UnsupportedInput: before anything runs, if programs that wait for each other cannot all run at once.
    """
    from triton.runtime import OutOfResources

    from ..kernels import grid

    described = describe(device)
    _check_resident(plan, described)
    waiting = {}
    if plan.slices > 1:
        # What another process holds of the device nobody can know: then the launch fails, and does not hang.
        waiting = {"launch_cooperative_grid": described.arch != INTERPRETER} | grid.LAUNCH_OPTIONS
    groups = -(-map_.batch // plan.rows)
    steps = map_.steps_of_groups(plan.rows) if map_.mapped else None
    teams_of_group = plan.teams // plan.groups
    # Where there is no tensor, any pointer will do: the kernel is compiled not to use it.
    pointers = [arguments[0] if a is None else a for a in (*arguments, *map_.tensors(), steps)]
    stride = grid.COUNTER_STRIDE.value
    for first in range(0, groups, plan.groups):
        count = min(plan.groups, groups - first)
        teams = count * teams_of_group
        # Each launch's own, cleared on its stream: launches in flight count apart, and every replay of a graph anew.
        counters = torch.zeros(teams * stride if plan.slices > 1 else 0, dtype=torch.int32, device=device)
        try:
            kernel[(teams * plan.slices,)](
                *pointers, counters,
                T=map_.steps, B=map_.batch, R=map_.rows, first_group=first, groups=count,
                NATIVE=described.arch.startswith("sm_"), MAPPED=map_.mapped, SLICES=plan.slices,
                HOLD=plan.hold, SWAP=plan.swap, FOLD=plan.fold, STAGE=plan.stage, CHAINS=plan.chains,
                BLOCK_B=plan.rows, BLOCK_H=plan.units, BLOCK_K=plan.tile, num_warps=plan.num_warps, num_stages=1,
                **constants, **waiting,
            )  # fmt: skip
        except OutOfResources as error:
            # Known once the kernel is compiled: what a program really takes of a multiprocessor that has nothing else.
            raise UnsupportedInput(
                f"{plan}: compiled for {described.arch}, a program takes more than a multiprocessor has ({error}); "
                "leave plan.overriding(…) or the row of the tuned table out, or take another backend"
            ) from error


def _project_input(layer: Layer, width: int) -> Tensor:
    """[D, R, width * H], whose first G * H columns hold x W_ih^T + b_ih and what a projected h0 adds to it; behind them
    what else a step takes."""
    gates = layer.cell.gates * layer.hidden
    buffer = layer.x.new_empty(layer.directions, layer.x.shape[0], width * layer.hidden)
    for d, w in enumerate(layer.weights):
        x_gates = buffer[d, :, :gates]
        if w.b_ih is None:
            torch.mm(layer.x, w.w_ih.T, out=x_gates)
        else:
            torch.addmm(w.b_ih, layer.x, w.w_ih.T, out=x_gates)
        if layer.projected:
            projection.add_initial(layer, d, x_gates)
    if layer.extra is not None:
        buffer[:, :, gates : gates + layer.extra.shape[2]] = layer.extra
    return buffer


def forward(layer: Layer, save_gates: bool, save_cells: bool) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """y [R, D*P], h_n, c_n (no elements without c) and what backward needs; see ``reference.bptt.forward``."""
    from ..kernels.recurrence import forward as kernels
    from ..kernels.recurrence import plan as plans

    cell, x, hidden, directions = layer.cell, layer.x, layer.hidden, layer.directions
    rows, batch, has_c = x.shape[0], layer.map.batch, cell.has_c
    save_gates, save_cells = save_gates and not cell.saves_output, save_cells and has_c
    with library_precision(layer.precision):
        buffer = _project_input(layer, _row_tiles(cell) if save_gates else cell.gates + cell.extra)
        saved = _place_saved(layer, buffer) if save_gates else x.new_empty(directions, 0, cell.saved * hidden)
        states = x.new_empty(rows, directions * hidden)
        cells = x.new_empty(rows if save_cells else 0, directions * hidden)
        # Sequences of no steps keep the state they came with.
        empty = layer.map.mapped and layer.map.sizes is None
        h_init, c_init = layer.travelling_h0(), layer.c0.contiguous() if has_c else None
        h_n, c_n = _final(h_init, batch, empty), _final(c_init, batch, empty) if has_c else x.new_empty(0)
        b_hh = None if layer.weights[0].b_hh is None else torch.stack([w.b_hh for w in layer.weights])
        if batch:
            plan = layer.plan(backward=False)
            first, rest = plans.split(cell.gates, plan.padded)
            _launch(
                kernels.recurrence_forward_kernel, plan, x.device,
                (buffer, layer.recurrent_weights(), b_hh, h_init, c_init, states, cells, saved, h_n, c_n), layer.map,
                initial_rows=h_init.shape[1], x_width=buffer.shape[2] // hidden, saved_width=saved.shape[2] // hidden,
                y_width=directions,
                STEP=cell.device_functions()[0], GATES=cell.gates, EXTRA=cell.extra, SAVED=cell.saved, HAS_C=has_c,
                BIAS=b_hh is not None, SAVE=save_gates, SAVE_CELLS=save_cells, BLOCKS=layer.blocks,
                UNITS=layer.units, MAIN=first, REST=rest, PRECISION=layer.precision,
            )  # fmt: skip
        if not layer.projected:
            return states, h_n, c_n, Kept(saved, cells, x.new_empty(0, directions * hidden))
        y, h_n = projection.project_output(layer, states)
    return y, h_n, c_n, Kept(saved, cells, states if save_cells else x.new_empty(0, directions * hidden))


def _row_tiles(cell: Cell) -> int:
    """How many tiles a row of the projected input has room for: those a step saves as well, if there are more."""
    return max(cell.gates + cell.extra, cell.saved)


def _place_saved(layer: Layer, buffer: Tensor) -> Tensor:
    """Where steps save: over their projected input, which only this call has seen, unless that would waste room."""
    if layer.cell.saved >= layer.cell.gates + layer.cell.extra:
        return buffer
    return buffer.new_empty(*buffer.shape[:2], layer.cell.saved * layer.hidden)


def _final(initial: Tensor, batch: int, empty: bool) -> Tensor:
    own = initial[:, :batch]
    return own.clone() if empty else own.new_empty(own.shape)


def is_step(layer: Layer) -> bool:
    """Whether this is a single step that the kernel of both products takes: a Cell's, or a decoder's."""
    alone = layer.map.steps == 1 and not layer.map.mapped and layer.directions == 1
    return alone and not layer.projected and layer.extra is None


def step(layer: Layer, save_gates: bool, save_cells: bool) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """As ``forward``, for a sequence of one step, in one launch."""
    from ..kernels.recurrence import plan as plans
    from ..kernels.recurrence import step as kernels

    cell, x, hidden, w, has_c = layer.cell, layer.x, layer.hidden, layer.weights[0], layer.cell.has_c
    batch = layer.map.batch
    save_gates, save_cells = save_gates and not cell.saves_output, save_cells and has_c
    x, h = _dense_rows(x), _dense_rows(layer.h0[0])
    c = _dense_rows(layer.c0[0]) if has_c else h
    y = x.new_empty(batch, hidden)
    h_n, c_n = x.new_empty(1, batch, hidden), x.new_empty((1, batch, hidden) if has_c else 0)
    kept = Kept(
        x.new_empty(1, batch if save_gates else 0, cell.saved * hidden),
        x.new_empty(batch if save_cells else 0, hidden),
        x.new_empty(0, hidden),
    )
    if batch:
        plan = plans.make_step(layer.shape(backward=False), describe(x.device))
        first, rest = plans.split(cell.gates, plan.padded)
        bias = w.b_ih is not None
        kernels.recurrence_step_kernel[(plan.groups * layer.blocks * plan.slices,)](
            x, w.w_ih.contiguous(), w.b_ih.contiguous() if bias else x,
            w.w_hh.contiguous(), w.b_hh.contiguous() if bias else x, h, c,
            y, h_n, c_n, kept.cells, kept.saved, batch, x.stride(0), h.stride(0), c.stride(0),
            STEP=cell.device_functions()[0], GATES=cell.gates, SAVED=cell.saved, HAS_C=has_c, BIAS=bias,
            SAVE=save_gates, SAVE_CELLS=save_cells, INPUTS=x.shape[1], BLOCKS=layer.blocks, UNITS=layer.units,
            SLICES=plan.slices, MAIN=first, REST=rest, SWAP=plan.swap, STAGE=plan.stage, PRECISION=layer.precision,
            BLOCK_B=plan.rows, BLOCK_H=plan.units, BLOCK_K=plan.tile, num_warps=plan.num_warps,
        )  # fmt: skip
    return y, h_n, c_n, kept


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def backward(
    layer: Layer, y: Tensor, kept: Kept, gradients: Gradients, grad_clip: float | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """dx (no elements unless needed), dh0, dc0 (none without c0) and the weights'; see ``reference.bptt.backward``."""
    from ..kernels.recurrence import backward as kernels

    cell, x, hidden, directions = layer.cell, layer.x, layer.hidden, layer.directions
    rows, batch, has_c = x.shape[0], layer.map.batch, cell.has_c
    with library_precision(layer.precision):
        states = kept.hidden if layer.projected else y
        h_init, c_init = layer.travelling_h0(), layer.c0.contiguous() if has_c else None
        weights = layer.recurrent_weights()
        saved = _saved(layer, states, kept, h_init, c_init, weights)
        d_projected = projection.all_outputs(layer, gradients) if layer.projected else None
        d_out = projection.before_projection(layer, d_projected, gradients) if layer.projected else gradients
        dh_init = _handed_on(layer.map, h_init, d_out.h_n)
        dc_init = _handed_on(layer.map, c_init, d_out.c_n) if has_c else x.new_empty(0)
        dh_gates = x.new_empty(directions, rows, cell.gates * hidden)
        dx_gates = torch.empty_like(dh_gates) if cell.apart else dh_gates
        if batch:
            # Rows of y and of its gradient have one stride.
            dy, dcells = (None if g is None else g.contiguous() for g in (d_out.y, d_out.cells))
            dh_n, dc_n = (None if g is None else g.contiguous() for g in (d_out.h_n, d_out.c_n))
            _launch(
                kernels.recurrence_backward_kernel, layer.plan(backward=True), x.device,
                (saved, weights, states, kept.cells, h_init, c_init, dy, dcells, dh_n, dc_n,
                 dx_gates, dh_gates, dh_init, dc_init), layer.map,
                clip=grad_clip or 0.0, initial_rows=h_init.shape[1],
                saved_width=saved.stride(1) // hidden, saved_direction=saved.stride(0) // hidden, y_width=directions,
                STEP_BACKWARD=cell.device_functions()[1], GATES=cell.gates, SAVED=cell.saved, APART=cell.apart,
                HAS_C=has_c, HAS_DY=dy is not None, HAS_DCELLS=dcells is not None, HAS_DH_N=dh_n is not None,
                HAS_DC_N=dc_n is not None, CLIP=grad_clip is not None, BLOCKS=layer.blocks, UNITS=layer.units,
                RESETS=layer.map.resets, PRECISION=layer.precision,
            )  # fmt: skip
        return _afterwards(
            layer, states, h_init, dx_gates, dh_gates, dh_init, dc_init, d_projected, gradients.h_n, need_dx
        )


def _handed_on(map_: Map, initial: Tensor, gradient: Tensor | None) -> Tensor:
    """Where the gradient of the initial state goes; what the kernel does not write is already there.

    Sequences of no steps hand the gradient of their final state on; those cut at their first step have none.
    """
    if not map_.mapped or map_.sizes is not None:
        return torch.empty_like(initial)
    if gradient is None:
        return torch.zeros_like(initial)
    own = gradient.masked_fill((map_.last >= 0)[:, :, None], 0)
    return torch.cat([own, torch.zeros_like(own)], 1) if map_.resets else own.contiguous()


def _saved(
    layer: Layer, states: Tensor, kept: Kept, h_init: Tensor, c_init: Tensor | None, weights: Tensor
) -> Tensor:
    """What the steps saved, [D, R, S*H]: kept by forward, y itself, or made again by one product over all steps."""
    cell, hidden = layer.cell, layer.hidden
    if cell.saves_output:
        return states.view(-1, layer.directions, hidden).transpose(0, 1)
    if kept.saved.shape[1] or not states.shape[0]:
        return kept.saved
    from ..kernels import tuning
    from ..kernels.recurrence import pointwise

    rows, gates = states.shape[0], cell.gates * hidden
    buffer = _project_input(layer, _row_tiles(cell))
    saved = _place_saved(layer, buffer)
    weights = weights.view(layer.directions, cell.gates, layer.blocks, layer.units, layer.units)
    tiles = tuning.pointwise_tiles(rows, hidden)
    for d, w in enumerate(layer.weights):
        h = layer.map.entering(d, states[:, layer.part(d, hidden)], h_init[d])
        c = layer.map.entering(d, kept.cells[:, layer.part(d, hidden)], c_init[d]) if cell.has_c else None
        # [N, R, H/N] by [N, H/N, G * H/N]
        by_block = h.view(rows, layer.blocks, -1).transpose(0, 1) @ weights[d].permute(1, 3, 0, 2).flatten(2)
        h_gates = by_block.unflatten(-1, (cell.gates, -1)).permute(1, 2, 0, 3).reshape(rows, gates)
        # Of one gate in blocks of one unit that was a view, and the kernel knows no strides of it.
        h_gates = h_gates.contiguous()
        if w.b_hh is not None:
            h_gates += w.b_hh
        pointwise.pointwise_kernel[(-(-rows // tiles.rows) * -(-hidden // tiles.columns),)](
            buffer[d], h_gates, h, h if c is None else c, saved[d], rows, hidden, buffer.stride(1), saved.stride(1),
            STEP=cell.device_functions()[0], GATES=cell.gates, EXTRA=cell.extra, SAVED=cell.saved, HAS_C=cell.has_c,
            BLOCK_B=tiles.rows, BLOCK_H=tiles.columns, num_warps=tiles.num_warps,
        )  # fmt: skip
    return saved


def _afterwards(
    layer, states, h_init, dx_gates, dh_gates, dh_init, dc_init, d_projected, dh_n, need_dx
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The products over all steps at once, out of the gates' gradients."""
    x, hidden, valid = layer.x, layer.hidden, layer.map.valid()
    # What stands past a sequence's end may be NaN, and 0 * NaN is NaN.
    clean_x = x if valid is None else x.masked_fill(~valid, 0)
    dx = x.new_empty(0)
    dh0 = torch.empty_like(layer.h0, memory_format=torch.contiguous_format) if layer.projected else dh_init
    dweights: list[Tensor] = []
    for d, w in enumerate(layer.weights):
        if need_dx:
            dx = dx_gates[d] @ w.w_ih if d == 0 else torch.addmm(dx, dx_gates[d], w.w_ih)
        dw_hh = _recurrent_gradient(layer, d, states[:, layer.part(d, hidden)], h_init[d], dh_gates[d])
        dw_hr = None
        if layer.projected:
            dw_hh, dw_hr = projection.unfold(layer, d, states, dw_hh, dh_gates[d], d_projected, dh_n, dh0[d])
        dweights += [dx_gates[d].T @ clean_x, dw_hh]
        if w.b_ih is not None:
            dx_sum = dx_gates[d].sum(0)
            dweights += [dx_sum, dh_gates[d].sum(0) if layer.cell.apart else dx_sum.clone()]
        if dw_hr is not None:
            dweights.append(dw_hr)
    return dx, dh0, dc_init, dweights


def _recurrent_gradient(layer: Layer, d: int, states: Tensor, initial: Tensor, dh_gates: Tensor) -> Tensor:
    """The gradient of what the travelling state was multiplied with, from every step's entering state."""
    map_, w_hh = layer.map, layer.weights[d].w_hh
    if map_.mapped or layer.blocks > 1 or not map_.batch:
        return weight_gradient(dh_gates, map_.entering(d, states, initial), w_hh)
    # Without a copy of the states: those entering all steps but the first are y, moved by one step.
    batch = map_.batch
    first, others = (dh_gates[:batch], dh_gates[batch:]) if d == 0 else (dh_gates[-batch:], dh_gates[:-batch])
    return torch.addmm(first.T @ initial, others.T, states[:-batch] if d == 0 else states[batch:])
