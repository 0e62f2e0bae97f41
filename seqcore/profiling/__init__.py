"""Where the time of an operation goes: a Chrome trace, its kernels with their work, and a step's parts.

``seqcore profile`` on the command line; the same from Python:

    profile(Recurrence("lstm", T=1024, B=16, H=768, dtype="bfloat16", backend="triton"), out=Path("profile-lstm"))
"""

from .problems import Attention, Recurrence
from .session import profile, run

__all__ = ["Attention", "Recurrence", "profile", "run"]
