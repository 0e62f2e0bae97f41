"""What TorchScript is told that asks for a module of ours."""

from typing import NoReturn

from ..errors import UnsupportedInput


class NotScriptable:
    """A module that TorchScript cannot compile, and that says so; torch's own error would point at a line of ours."""

    def __prepare_scriptable__(self) -> NoReturn:
        name = type(self).__name__
        raise UnsupportedInput(
            f"torch.jit.script cannot compile seqcore.nn.{name}, whose backends are chosen in Python; "
            f"seqcore.restore(model) makes it torch.nn.{name} again, which it can; torch.compile and torch.export "
            "take the model as it is"
        )
