"""Compilers that keep account of what they compile, and inputs whose sizes they are told to leave open."""

from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.decorators import mark_unbacked
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.fx import GraphModule

PREFIX = "seqcore."


def operators(graph: GraphModule) -> list[str]:
    """seqcore's operators in ``graph``, in order, by their names within seqcore."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [name.removeprefix(PREFIX).removesuffix(".default") for name in targets if name.startswith(PREFIX)]


class Capture:
    """A compiler that runs graphs as they are, or ``inductor``; it keeps the ``operators`` of every graph it gets."""

    def __init__(self, inductor: bool = False) -> None:
        self.forward: list[list[str]] = []
        self.backward: list[list[str]] = []
        self.inductor = inductor
        self._eager = aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if not self.inductor:
            return self._eager(graph, inputs)
        # What the caches hold would not be counted, and they do not know what our operators promise of their results.
        with torch._functorch.config.patch(enable_autograd_cache=False):
            patches = {"fx_graph_cache": False}
            return compile_fx(graph, inputs, inner_compile=self._inner, config_patches=patches)

    def _inner(self, graph: GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        (self.backward if options.get("is_backward") else self.forward).append(operators(graph))
        return compile_fx_inner(graph, inputs, **options)

    @staticmethod
    def _keep(graphs: list[list[str]]) -> Callable[..., Any]:
        def compiler(graph: GraphModule, _inputs: list[Any]) -> Callable[..., Any]:
            graphs.append(operators(graph))
            return make_boxed_func(graph.forward)

        return compiler


MARKS: dict[str, Callable[[Tensor, int, str], None]] = {
    "static": lambda tensor, dim, name: None,
    "dynamic": lambda tensor, dim, name: torch._dynamo.mark_dynamic(tensor, dim),
    "unbacked": lambda tensor, dim, name: mark_unbacked(tensor, dim, shape_id=name),
}


class Sizes:
    """Makes random tensors by their dimensions: those that are names have sizes, and are marked as ``MARKS`` says."""

    def __init__(self, mark: str = "static", **sizes: int) -> None:
        self.mark, self.sizes = MARKS[mark], sizes
        self.names: dict[int, dict[int, str]] = {}  # of the dimensions of each tensor, by its id

    def __call__(self, *dims: str | int) -> Tensor:
        """Floats of shape ``dims``, numbers or names, to be differentiated by."""
        return self._made(torch.randn(self._shape(dims), dtype=torch.float64).requires_grad_(), dims)

    def bools(self, *dims: str | int) -> Tensor:
        """A fifth of them True, none first in its row."""
        drawn = torch.rand(self._shape(dims)) < 0.2
        drawn[..., 0] = False
        return self._made(drawn, dims)

    def counts(self, most: str, *dims: str | int) -> Tensor:
        """Numbers from 0 to the size called ``most``."""
        return self._made(torch.randint(self.sizes[most] + 1, self._shape(dims)), dims)

    def marked(self, tensor: Tensor, *dims: str | int) -> Tensor:
        """A tensor made elsewhere."""
        return self._made(tensor, dims)

    def dynamic_shapes(self, inputs: Any) -> Any:
        """Of ``inputs`` made here, as ``torch.export`` is told to leave them open."""
        dims = {name: torch.export.Dim(name) for names in self.names.values() for name in names.values()}
        of = lambda t: {index: dims[name] for index, name in self.names.get(id(t), {}).items()} or None
        return torch.utils._pytree.tree_map(of, inputs)

    def _shape(self, dims: tuple[str | int, ...]) -> list[int]:
        return [self.sizes[dim] if isinstance(dim, str) else dim for dim in dims]

    def _made(self, tensor: Tensor, dims: tuple[str | int, ...]) -> Tensor:
        names = {index: dim for index, dim in enumerate(dims) if isinstance(dim, str)}
        for index, name in names.items():
            self.mark(tensor, index, name)
        self.names[id(tensor)] = names
        return tensor
