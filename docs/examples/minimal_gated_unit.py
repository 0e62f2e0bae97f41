"""A cell that torch does not have, at full speed: the minimal gated unit.

    f = s(W_f x + U_f h),   n = tanh(W_n x + f (U_n h)),   h' = (1 - f) h + f n

Zhou et al., "Minimal Gated Unit for Recurrent Neural Networks" (2016), with the gate applied after the product, as
torch's GRU does. On a GPU: ``python docs/examples/minimal_gated_unit.py``. Without one, put TRITON_INTERPRET=1 before.
"""

import torch
import triton
import triton.language as tl  # noqa: F401  (Triton's interpreter looks for it here)

import seqcore
from seqcore.kernels.activations import sigmoid, tanh
from seqcore.testing import check_cell


@triton.jit
def step(x_gates, h_gates, state):
    f = sigmoid(x_gates[0] + h_gates[0])
    n = tanh(x_gates[1] + f * h_gates[1])
    return (state[0] + f * (n - state[0]),), (f, n, h_gates[1])


@triton.jit
def step_backward(saved, state, new_state, dstate):
    f, n, h_n = saved
    dn = dstate[0] * f * (1.0 - n * n)
    df = (dstate[0] * (n - state[0]) + dn * h_n) * f * (1.0 - f)
    return (df, dn), (df, dn * f), (dstate[0] * (1.0 - f),)


def reference(x_gates, h_gates, state):
    f = torch.sigmoid(x_gates[0] + h_gates[0])
    n = torch.tanh(x_gates[1] + f * h_gates[1])
    return (state[0] + f * (n - state[0]),), (f, n, h_gates[1])


MGU = seqcore.Cell("mgu", gates=2, states=("h",), step=step, step_backward=step_backward, reference=reference)


def main(hidden: int = 40) -> None:
    check_cell(MGU, hidden=hidden)
    print("kernels equal the reference, forward and backward")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = [torch.randn(2 * hidden, width, device=device) * hidden**-0.5 for width in (8, hidden)]
    x = torch.randn(10, 3, 8, device=device, requires_grad=True)
    y, h_n = seqcore.functional.recurrence(
        x, None, weights, cell=MGU, bias=False, lengths=torch.tensor([10, 4, 7]), backend="triton"
    )
    y.sum().backward()
    print(f"y {list(y.shape)}, h_n {list(h_n.shape)}, gradient of x {list(x.grad.shape)}")


if __name__ == "__main__":
    main()
