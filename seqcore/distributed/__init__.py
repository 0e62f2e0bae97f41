"""Recurrence and attention on several devices, over ``torch.distributed``.

Data parallelism needs nothing from here: ``DistributedDataParallel`` and ``fully_shard`` take seqcore's modules as they
take torch's. Importing this package tells ``DTensor`` how seqcore's operators divide, by batch and by heads; and it
holds what divides one long sequence: :func:`ring_attention` and :func:`ulysses_attention` its rows, and
:class:`TimePipeline` the recurrent layers that it passes through.
"""

from ..ops import sharding as _sharding  # noqa: F401  (tells DTensor)
from .layout import gather_sequence, shard_sequence
from .pipeline import PipelineResult, TimePipeline
from .ring import ring_attention
from .ulysses import ulysses_attention

__all__ = [
    "PipelineResult",
    "TimePipeline",
    "gather_sequence",
    "ring_attention",
    "shard_sequence",
    "ulysses_attention",
]
