"""Calls of the recurrences as hypothesis draws them: sizes, forms, options and layouts."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import seqcore.nn
from seqcore import functional
from seqcore.cells import BUILT_IN

from .comparisons import Results, cotangents
from .recurrence_twins import CELLS, tensors
from .routes import by_the_operators

KINDS = {name: getattr(seqcore.nn, kind.__name__) for name, (kind, _) in CELLS.items()}
HALF = (torch.float16, torch.bfloat16)


def _negated(t: Tensor) -> Tensor:
    """A view that stands in memory with the other sign, which torch remembers beside it."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


# What a user would define, the built-in cells once more.
OWN = {
    cell.name: seqcore.Cell(
        f"drawn_{cell.name}", cell.gates, cell.states, cell.step, cell.step_backward, cell.reference,
        cell.reference_backward, cell.apart, cell.saves_output,
    )
    for cell in BUILT_IN
}  # fmt: skip

# Tensors of one shape and the same values, that lie in memory in every way torch has. The last two repeat values.
LAYOUTS = {
    "dense": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "wider rows": lambda t: torch.cat([t, t + 1], -1)[..., : t.shape[-1]],
    "every second": lambda t: torch.stack([t + 1, t], -1).flatten(-2)[..., 1::2],
    "flipped": lambda t: t.flip(0).flip(0),
    "odd offset": lambda t: torch.cat([t.new_ones(1), t.flatten()])[1:].view(t.shape),
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded": lambda t: t[..., :1].expand(t.shape),
}
# What the operators resolve before they run; torch makes none in 16 bits.
LAYOUTS_IN_FULL = LAYOUTS | {"negated": _negated}


# Under these, some of everything that may stay unread is.
MASKED = {
    "T": 4, "B": 5, "I": 3, "H": 4, "lengths": (2, 4, 0, 1, 3), "bidirectional": True, "reset_hx": True,
    "reset": tuple(map(bool, (1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1))),
}  # fmt: skip


@dataclass(frozen=True)
class Call:
    """One call, without its numbers, which come from ``seed``."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    form: str = "padded"  # or "batch first", "unbatched", "packed", "packed in order"
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    blocks: int = 1
    state: bool = True
    lengths: tuple[int, ...] | None = None
    lengths_as: Any = torch.int64
    reset: tuple[bool, ...] | None = None
    reset_hx: bool = False
    layouts: dict[str, str] = field(default_factory=dict)  # of x, states, weights, biases
    by: str = "module"  # or "function", "recurrence", "own cell"
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    seed: int = 0

    @property
    def outputs(self) -> int:
        return (self.H + 1) // 2 if self.cell == "lstm_proj" else self.H

    @property
    def plain(self) -> bool:
        """Whether torch's own modules can do it."""
        ours = {"grad_clip", "recompute", "return_cells", "zoneout"}
        masked = self.lengths is not None and not self.form.startswith("packed")
        beyond = masked or self.reset is not None or self.blocks > 1 or self.by == "own cell"
        return not (beyond or ours & self.options.keys())


@st.composite
def calls(draw, most: int = 5, dtypes=(torch.float64, torch.float64, torch.float32), empty: bool = True) -> Call:
    """A call of at most ``most`` steps and sequences; without sequences, too, unless ``empty`` is False."""
    T, B = draw(st.integers(1, most)), draw(st.integers(0 if empty else 1, most))
    cell = draw(st.sampled_from(list(CELLS)))
    dtype = draw(st.sampled_from(dtypes))
    form = draw(st.sampled_from(["padded", "padded", "batch first", "unbatched", "packed", "packed in order"]))
    B = 1 if form == "unbatched" else max(B, form.startswith("packed"))
    padded = form in ("padded", "batch first")
    blocks = 1 if cell == "lstm_proj" else draw(st.sampled_from([1, 1, 1, 2, 3]))
    H = draw(st.integers(2, most)) if cell == "lstm_proj" else blocks * draw(st.integers(1, most))
    lengths = draw(st.lists(st.integers(0 if padded else 1, T), min_size=B, max_size=B))
    if form == "packed in order":
        lengths.sort(reverse=True)
    masked = (padded and draw(st.booleans())) or form.startswith("packed")
    reset = draw(st.lists(st.booleans(), min_size=T * B, max_size=T * B)) if padded and draw(st.booleans()) else None
    names = list(LAYOUTS if dtype in HALF else LAYOUTS_IN_FULL)
    options = {
        "grad_clip": draw(st.sampled_from([None, None, None if dtype in HALF else 0.02])),
        "recompute": draw(st.sampled_from([False, False, True])),
        "locked": draw(st.booleans()),
        "dropout": draw(st.sampled_from([0.0, 0.0, 1.0])),
        "training": draw(st.booleans()),
    }
    if cell.startswith("lstm"):
        options["return_cells"] = draw(st.booleans())
    if cell != "lstm_proj":
        p = st.sampled_from([0.0, 0.3, 1.0])
        options["zoneout"] = draw(st.just(0.0) | (st.tuples(p, p) if cell == "lstm" else p))
    own = cell != "lstm_proj" and not options.get("zoneout")
    ways = ["module", "function", "recurrence", *(["own cell"] if own else [])]
    return Call(
        cell, T, B, draw(st.integers(1, 2 * most)), H, form,
        layers=draw(st.sampled_from([1, 1, 2])), bidirectional=draw(st.booleans()), bias=draw(st.booleans()),
        blocks=blocks, state=draw(st.booleans()), lengths=tuple(lengths) if masked else None,
        lengths_as=draw(st.sampled_from([torch.int64, torch.int32, torch.int8, torch.uint8, list])),
        reset=None if reset is None else tuple(reset), reset_hx=reset is not None and draw(st.booleans()),
        layouts={part: draw(st.sampled_from(names)) for part in ("x", "states", "weights", "biases")},
        by=draw(st.sampled_from(ways)), options={name: value for name, value in options.items() if value},
        dtype=dtype, seed=draw(st.integers(0, 2**32)),
    )  # fmt: skip


class Problem:
    """The numbers of a call: ``leaves`` by name, whose gradients are asked for, and what goes with them."""

    def __init__(self, call: Call, device: torch.device | str = "cpu") -> None:
        torch.manual_seed(call.seed)
        self.call, self.device = call, device
        twin = self.module(None, None)
        self.names = [name for names in twin._all_weights for name in names]
        lead = {"unbatched": (call.T,), "batch first": (call.B, call.T)}.get(call.form, (call.T, call.B))
        batch = () if call.form == "unbatched" else (call.B,)
        stack = call.layers * (1 + call.bidirectional)
        shapes = {"x": (*lead, call.I)}
        for which, wanted in (("", call.state), ("reset_", call.reset_hx)):
            if wanted:
                shapes[f"{which}h"] = (stack, *batch, call.outputs)
                if call.cell.startswith("lstm"):
                    shapes[f"{which}c"] = (stack, *batch, call.H)
        numbers = {name: torch.randn(shape) for name, shape in shapes.items()}
        numbers |= {name: getattr(twin, name).detach() for name in self.names}
        if call.cell == "rnn_relu" and call.dtype in HALF:
            self._keep_off_the_kink(numbers)
        self.leaves = {name: self._laid_out(name, t.to(device, call.dtype)) for name, t in numbers.items()}
        self.reset = None
        if call.reset is not None:
            self.reset = torch.tensor(call.reset, dtype=torch.bool, device=device).view(call.T, call.B)
            self.reset = LAYOUTS["transposed"](self.reset) if call.seed % 2 else self.reset

    def _keep_off_the_kink(self, numbers: Results) -> None:
        """As ``recurrence_twins.keep_off_the_kink``: in 16 bits the gradient would jump there."""
        for name, t in numbers.items():
            t.abs_()
            if name in self.names:
                t[1::2].neg_()

    def _laid_out(self, name: str, t: Tensor) -> Tensor:
        part = "x" if name == "x" else "biases" if name.startswith("bias") else "weights"
        part = part if name == "x" or name in self.names else "states"
        layout = self.call.layouts.get(part, "dense")
        # Without a sequence there is nothing to repeat.
        return LAYOUTS_IN_FULL[layout](t) if t.numel() else t

    def module(self, backend: str | None, leaves: Results | None) -> nn.Module:
        """A module of seqcore.nn that does what the call asks for, with the weights among ``leaves``."""
        call, options = self.call, dict(self.call.options)
        training = options.pop("training", False)
        options.pop("return_cells", None)
        if call.cell.startswith("rnn"):
            options["nonlinearity"] = call.cell[4:]
        if call.cell == "lstm_proj":
            options["proj_size"] = call.outputs
        if options.get("dropout") and call.layers == 1:
            del options["dropout"]  # of which torch's constructor warns
        module = KINDS[call.cell](
            call.I, call.H, num_layers=call.layers, bias=call.bias, batch_first=call.form == "batch first",
            bidirectional=call.bidirectional, blocks=call.blocks, backend=backend, **options,
        ).train(training)  # fmt: skip
        for name in [] if leaves is None else self.names:
            setattr(module, name, nn.Parameter(leaves[name]))
        return module

    def keywords(self, leaves: Results) -> dict[str, Any]:
        """Masks, and the states that go with them."""
        keywords: dict[str, Any] = {}
        call = self.call
        if call.lengths is not None and not call.form.startswith("packed"):
            keywords["lengths"] = list(call.lengths) if call.lengths_as is list else torch.tensor(
                call.lengths, dtype=call.lengths_as
            )  # fmt: skip
        if self.reset is not None:
            keywords["reset"] = self.reset.T if call.form == "batch first" else self.reset
        if call.reset_hx:
            keywords["reset_hx"] = self.state(leaves, "reset_")
        if call.options.get("return_cells"):
            keywords["return_cells"] = True
        return keywords

    def state(self, leaves: Results, which: str = "") -> Tensor | tuple[Tensor, Tensor] | None:
        if f"{which}h" not in leaves:
            return None
        return leaves[f"{which}h"] if f"{which}c" not in leaves else (leaves[f"{which}h"], leaves[f"{which}c"])

    def input(self, leaves: Results) -> Tensor | PackedSequence:
        x, call = leaves["x"], self.call
        if not call.form.startswith("packed"):
            return x
        return pack_padded_sequence(x, list(call.lengths), enforce_sorted=call.form == "packed in order")

    def outputs(self, leaves: Results, backend: str | None) -> list[Tensor]:
        """What comes out, by the module or by a function."""
        call, keywords = self.call, self.keywords(leaves)
        torch.manual_seed(call.seed)
        with by_the_operators() if backend == "operators" else contextlib.nullcontext():
            backend = None if backend == "operators" else backend
            if call.by == "module":
                module = self.module(backend, None)
                given = {name: leaves[name] for name in self.names}
                arguments = self.input(leaves), self.state(leaves)
                return tensors(torch.func.functional_call(module, given, arguments, keywords))
            name = call.cell.removesuffix("_proj")
            function = getattr(functional, name.partition("_")[0])
            if call.by != "function":
                function, keywords["cell"] = functional.recurrence, OWN[name] if call.by == "own cell" else name
            elif call.cell.startswith("rnn"):
                keywords["nonlinearity"] = call.cell[4:]
            return tensors(
                function(
                    self.input(leaves), self.state(leaves), [leaves[name] for name in self.names],
                    num_layers=call.layers, bias=call.bias, batch_first=call.form == "batch first",
                    bidirectional=call.bidirectional, backend=backend, **keywords,
                    **{name: value for name, value in call.options.items() if name != "return_cells"},
                )
            )  # fmt: skip

    def results(
        self, backend: str | None, dtype: torch.dtype | None = None, past_the_end: float | None = None
    ) -> Results:
        """Every output, and every gradient of a fixed weighing of them, by name.

        ``past_the_end`` is what arrives as the gradient of y and of every step's c where no sequence is.
        """
        leaves = {name: t.to(dtype or t.dtype).detach().requires_grad_() for name, t in self.leaves.items()}
        outputs = self.outputs(leaves, backend)
        weights = cotangents(outputs)
        if past_the_end is not None and not self.call.form.startswith("packed"):
            # Of y, and of every step's c, which is the last output.
            for index in (0, -1) if self.call.options.get("return_cells") else (0,):
                weights[index] = weights[index].masked_fill(unread(self)["x"].to(self.device), past_the_end)
        found = torch.autograd.grad(outputs, list(leaves.values()), weights, materialize_grads=True)
        return {f"output {index}": out.detach() for index, out in enumerate(outputs)} | {
            f"gradient of {name}": gradient for name, gradient in zip(leaves, found, strict=True)
        }

    def double(self) -> Results:
        """The truth."""
        return self.results("reference", torch.float64)


def rows_of(call: Call, t: Tensor) -> Tensor:
    """[T, B, …] of something laid out as x is."""
    return t.transpose(0, 1) if call.form == "batch first" else t[:, None] if call.form == "unbatched" else t


def as_x(call: Call, rows: Tensor) -> Tensor:
    """[T, B, …] laid out as x is."""
    return rows.transpose(0, 1) if call.form == "batch first" else rows[:, 0] if call.form == "unbatched" else rows


def unread(problem: Problem) -> dict[str, Tensor]:
    """Of each leaf the elements, as a mask, that no step of any sequence reads."""
    call = problem.call
    t = torch.arange(call.T)[:, None]
    lengths = torch.tensor(call.lengths if call.lengths is not None else [call.T] * call.B, dtype=torch.int64)
    valid, cut = t < lengths, torch.zeros(call.T, call.B, dtype=torch.bool)
    if problem.reset is not None:
        cut = problem.reset.cpu() & valid
    # In the order of directions; nothing cuts the step that a sequence starts with in the reverse one.
    own = [valid[0] & ~cut[0], valid[0]][: 1 + call.bidirectional]
    put_in = [cut.any(0), cut[1:].any(0)][: 1 + call.bidirectional]
    masks = {"x": as_x(call, ~valid[:, :, None])}
    for name in problem.leaves:
        if name.removeprefix("reset_") in ("h", "c"):
            read = torch.stack((put_in if name.startswith("reset_") else own) * call.layers)
            shape = problem.leaves[name].shape
            masks[name] = (~read[:, :, None].expand(*read.shape, shape[-1])).reshape(shape)
    return masks
