"""Which regime a recurrence runs in, and with which tiles: arithmetic on what the device can hold.

    "one program"   all weights of a team on one multiprocessor: no barrier
    "spread"        a team's weights spread over several programs, which meet at a barrier every step
    "streaming"     the same, but each program reads its weights again at every step: they fit on no chip

A *team* is a group of sequences in one block of the weights in one direction; each has its own programs. Every rule
below follows from capacities except where it says that it is a guess; ``tuned/<arch>.json`` overrides what was
measured.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..tuning import INTERPRETER, Device, power_of_two, table

# Beyond these a program's accumulators and staged tiles no longer fit its registers.
MOST_ROWS, MOST_UNITS = 128, 128
# Units times gates of a program that has all of a team's.
MOST_ALONE = 512
# Bytes of registers, per thread, that tiles on their way to shared memory may take.
STAGED_BYTES = 384


@dataclass(frozen=True)
class Shape:
    """One launch's problem: what the choice depends on. ``units`` is H / blocks; ``batch`` the longest step's rows."""

    gates: int
    units: int
    blocks: int
    batch: int
    directions: int
    itemsize: int
    backward: bool
    parts: int = 1  # 2 where float32 products are made of TF32 ones: operands are kept as a value and its remainder

    @property
    def contraction(self) -> int:
        """How long each output's dot product is."""
        return self.units * (self.gates if self.backward else 1)

    @property
    def columns(self) -> int:
        """How many outputs a unit has."""
        return 1 if self.backward else self.gates


@dataclass(frozen=True)
class Plan:
    """How to launch one. In the kernels rows are BLOCK_B, units BLOCK_H, tile BLOCK_K; fold, stage, chains as here."""

    rows: int
    units: int
    tile: int
    fold: int
    stage: int
    chains: int
    hold: bool
    swap: bool
    padded: bool  # gates padded to a power of two, for one product instead of two
    num_warps: int
    slices: int
    teams: int  # of one launch: directions x blocks x groups
    groups: int  # of sequences in one launch
    launches: int
    shared_memory: int  # bytes a program takes, estimated

    @property
    def regime(self) -> str:
        if not self.hold:
            return "streaming"
        return "spread" if self.slices > 1 else "one program"

    def __str__(self) -> str:
        return (
            f"{self.regime}: {self.slices} slice{'s' * (self.slices > 1)} of {self.units} units x {self.teams} "
            f"team{'s' * (self.teams > 1)} of {self.rows} rows = {self.slices * self.teams} programs of "
            f"{self.num_warps} warps and {self.shared_memory / 1024:.0f} KiB shared memory"
            + (f", in {self.launches} launches" if self.launches > 1 else "")
        )


class NoPlan(ValueError):
    """Nothing fits the device; the message says why."""


def split(gates: int, padded: bool) -> tuple[int, int]:
    """How many gates the first and the second product of a step have, each a power of two or none."""
    first = power_of_two(gates, least=1)
    if padded or first == gates:
        return first, 0
    first //= 2
    return first, power_of_two(gates - first, least=1)


# Of forward (False) and of backward (True).
_overrides: dict[bool, dict[str, Any]] = {False: {}, True: {}}


@contextlib.contextmanager
def overriding(backward: bool | None = None, **fields: Any) -> Iterator[None]:
    """Plans made within the block have these fields, whatever was chosen: for tests and for tuning.

    Those of forward or backward alone if ``backward`` says which. In all threads, since autograd runs backward in one
    of its own.

    ``units`` smaller than a block's makes several slices. Interpreted programs run one after another, so there
    that is an error, except under ``seqcore.testing.explorer``.
    """
    before = {side: dict(chosen) for side, chosen in _overrides.items()}
    for side in (False, True) if backward is None else (backward,):
        _overrides[side].update(fields)
    try:
        yield
    finally:
        _overrides.update(before)


def make(shape: Shape, device: Device) -> Plan:
    """The plan for ``shape`` on ``device``.

    Raises:
        NoPlan: if even streamed weights leave more programs than can be resident, or what ``overriding`` asks for does
            not fit the device.
    """
    if device.arch == INTERPRETER:
        chosen = _interpreted(shape)
    else:
        chosen = _tuned(shape, device) or _best(shape, device)
    fields = _overrides[shape.backward]
    return _forced(shape, device, chosen, fields) if fields else chosen


def _forced(shape: Shape, device: Device, chosen: Plan, fields: dict[str, Any]) -> Plan:
    asked = ", ".join(f"{name}={value}" for name, value in fields.items())
    try:
        plan = _completed(shape, device, replace(chosen, **fields))
    except NoPlan as error:
        raise NoPlan(f"{error}; plan.overriding({asked}) asks for it: more units a slice make fewer slices") from None
    if plan.shared_memory > device.shared_memory:
        raise NoPlan(
            f"plan.overriding({asked}) asks for programs of {plan.shared_memory >> 10} KiB shared memory, and "
            f"{device.arch} has {device.shared_memory >> 10}: ask for fewer units or rows, or leave it out"
        )
    return plan


def make_step(shape: Shape, device: Device) -> Plan:
    """Tiles for the kernel of a single step, whose programs wait for no other: many small ones share the reading."""
    narrow = 32 if device.arch == INTERPRETER or shape.itemsize == 4 else 64
    plan = _blank(
        rows=min(64, power_of_two(shape.batch)), units=16, tile=narrow, stage=3, hold=False, padded=True, num_warps=4
    )
    plan = replace(plan, **_overrides[False])
    slices, groups = _ceil(shape.units, plan.units), _ceil(shape.batch, plan.rows)
    teams = groups * shape.directions * shape.blocks
    return replace(
        plan, slices=slices, groups=groups, teams=teams, launches=1, shared_memory=shared_memory(shape, plan)
    )


def _ceil(count: int, size: int) -> int:
    return -(-count // size)


def shared_memory(shape: Shape, plan: Plan) -> int:
    """Bytes of shared memory one program takes: its weights, if held, and the rows staged beside them."""
    first, rest = split(shape.columns, plan.padded)
    outputs = (first + rest) * plan.units
    tiles = _ceil(shape.contraction, plan.fold * plan.tile)
    width = plan.fold * plan.tile * shape.itemsize * shape.parts
    if plan.hold:
        return tiles * outputs * width + min(plan.stage, tiles) * plan.rows * width
    return plan.stage * (outputs + plan.rows) * width


def _completed(shape: Shape, device: Device, plan: Plan) -> Plan:
    """``plan`` with everything that follows from its tiles."""
    slices = _ceil(shape.units, plan.units)
    tiles = _ceil(shape.contraction, plan.fold * plan.tile)
    # A chain of one product would be merged with the next by the compiler.
    chains = max(1, min(plan.chains, tiles // 2))
    stage = max(1, min(plan.stage, tiles))
    if not plan.hold and shape.units * shape.itemsize % 16:
        # Pipelined copies of fewer than 16 bytes go through the first-level cache, where a sector that was read for its
        # first half may lack what another multiprocessor has since written into its second.
        stage = 1
    plan = replace(plan, slices=slices, stage=stage, chains=chains)
    plan = replace(plan, shared_memory=shared_memory(shape, plan))
    # One program a multiprocessor: two would share what each was planned to fill.
    groups, resident = _ceil(shape.batch, plan.rows), device.multiprocessors
    if device.arch == INTERPRETER:
        resident = 1 << 30
    at_once = min(groups, resident // (slices * shape.directions * shape.blocks)) if slices > 1 else groups
    if at_once < 1:
        raise NoPlan(
            f"{shape.directions} direction(s) x {shape.blocks} block(s) x {slices} slices of {plan.units} units need "
            f"as many programs at once, and {device.arch} runs {resident}"
        )
    return replace(
        plan, groups=at_once, teams=at_once * shape.directions * shape.blocks, launches=_ceil(groups, at_once)
    )


def _blank(**fields: Any) -> Plan:
    derived = {"slices": 1, "teams": 1, "groups": 1, "launches": 1, "shared_memory": 0}
    return Plan(**(derived | {"fold": 1, "chains": 1, "swap": False, "padded": False, "hold": True} | fields))


def _interpreted(shape: Shape) -> Plan:
    # Small tiles, so that small test shapes still cross their borders; one slice, since programs run in turn.
    plan = _blank(
        rows=16, units=power_of_two(shape.units), tile=32, stage=2, chains=2, num_warps=1,
        fold=2 if shape.backward or shape.units > 64 else 1,
    )  # fmt: skip
    return _completed(shape, Device(INTERPRETER), plan)


def _tuned(shape: Shape, device: Device) -> Plan | None:
    """The measured plan for exactly this shape, if the table of this device has one that fits this device, too."""
    for row in table(device.arch).get("recurrence", ()):
        if all(getattr(shape, name) == value for name, value in row["shape"].items()):
            # The same architecture is sold with fewer multiprocessors than the one measured.
            with contextlib.suppress(NoPlan):
                plan = _completed(shape, device, _blank(**row["plan"]))
                return plan if plan.shared_memory <= device.shared_memory else None
    return None


@functools.lru_cache(maxsize=4096)
def _best(shape: Shape, device: Device) -> Plan:
    """The first that fits: all in one program, held on chip in more and more rows a program, streaming."""
    for units in _unit_blocks(shape):
        plan = _held(shape, device, units)
        if plan is not None:
            return plan
    return _streaming(shape, device)


def _unit_blocks(shape: Shape) -> list[int]:
    """Slice widths in the order they are tried."""
    whole = power_of_two(shape.units)
    # 16 units keep a program's share of the product small and leave multiprocessors for several teams: a guess.
    spread = [units for units in (16, 32, 64) if units < whole]
    alone = whole * power_of_two(shape.gates, least=1) <= MOST_ALONE
    return [whole, *spread] if alone else [*spread, 8]


def _held(shape: Shape, device: Device, units: int) -> Plan | None:
    """Weights on chip in slices of ``units``, with as few rows a program as the multiprocessors allow."""
    slices = _ceil(shape.units, units)
    programs = slices * shape.directions * shape.blocks
    if slices > 1 and programs > device.multiprocessors:
        return None
    groups = max(1, device.multiprocessors // programs)
    least = power_of_two(_ceil(shape.batch, groups))
    # Tensor memory, where there is some, holds no more of such unrolled products.
    most = MOST_ROWS if not device.arch.startswith(("sm_10", "sm_12")) else 64 // shape.parts
    for rows in (16, 32, 64, MOST_ROWS):
        if not min(least, most) <= rows <= most:
            continue
        # One product for all gates is better, but three gates in the room of four may be too much.
        for padded in (True, False):
            for stage in (_most_staged(shape, rows), 4, 2, 1):
                plan = replace(_tiles(shape, rows, units, stage), padded=padded)
                if shared_memory(shape, plan) <= device.shared_memory:
                    return _completed(shape, device, plan)
    return None


def _most_staged(shape: Shape, rows: int) -> int:
    plan = _tiles(shape, rows, 16, 1)
    tile = rows * plan.fold * plan.tile * shape.itemsize
    return max(1, STAGED_BYTES * 32 * plan.num_warps // tile)


def _tiles(shape: Shape, rows: int, units: int, stage: int) -> Plan:
    """A held plan's tiles. At small batches each warp takes a part of the contraction, of which backward's is long."""
    inside = not shape.backward and units >= shape.units
    folded = rows <= 32 and units <= 32 and not inside
    fold = (8 if shape.backward else 4) if folded else 1
    # As many warps as keep the accumulators and the tiles on their way within the registers, found by compiling.
    many = rows >= 128 or units >= 64 or (folded and shape.backward)
    return _blank(
        rows=rows,
        units=units,
        tile=units if inside else _tile(shape.contraction, fold, shape.itemsize),
        fold=fold,
        stage=stage,
        # A warp has few products at a time that do not wait for each other if there are few rows.
        chains={16: 3, 32: 2}.get(rows, 1),
        padded=True,
        num_warps=8 if many else 4,
    )


def _tile(contraction: int, fold: int, itemsize: int) -> int:
    """The widest tile of the contraction, up to 256 bytes, that pads it by no more than a twelfth."""
    for tile in (128, 64, 32, 16):
        if tile * itemsize <= 256 and _ceil(contraction, fold * tile) * fold * tile <= contraction * 13 / 12:
            return tile
    return 16


def _streaming(shape: Shape, device: Device) -> Plan:
    """The narrowest slices of which all can run at once, so that the most programs share the reading."""
    rows = min(MOST_ROWS, power_of_two(shape.batch))
    for units in (16, 32, 64, MOST_UNITS):
        for stage in (3, 2, 1):
            plan = replace(_tiles(shape, rows, units, stage), hold=False, fold=1, tile=64 if shape.itemsize < 4 else 32)
            programs = _ceil(shape.units, units) * shape.directions * shape.blocks
            if shared_memory(shape, plan) <= device.shared_memory and programs <= device.multiprocessors:
                return _completed(shape, device, plan)
    raise NoPlan(
        f"{shape.directions} direction(s) x {shape.blocks} block(s) of {shape.units} units leave more programs, each "
        f"of {MOST_UNITS} units at most, than the {device.multiprocessors} multiprocessors of {device.arch} run at once"
    )
