"""Keys and values of the tokens so far, for attention that generates token by token."""

import torch
from torch import Tensor, nn

from ..capabilities import transforms_active
from ..errors import InvalidInput
from ..functional.arguments import check_factory, check_strided, is_size, shown
from ..reference.sizes import holds_values, readable


class KVCache(nn.Module):
    """Keys and values of B sequences, each with room for ``max_length`` tokens and filled to a length of its own.

        keys[b, :, lengths[b] + m] = key[b, :, m],   values alike,   lengths[b] += M

    ``update`` does this in place, with static shapes and without waiting for the device, so that a step of generation
    is one CUDA graph and one compile. For inference only: nothing is written while autograd would have to follow.

    Args:
        batch_size, num_heads, max_length: B, H_kv and N.
        head_dim: D.
        value_head_dim: DV; D by default.
        device, dtype: of keys and values, a floating-point dtype; torch's defaults if None.

    The buffers ``keys`` [B, H_kv, N, D], ``values`` [B, H_kv, N, DV] and ``lengths`` [B] int64 move with ``.to()`` and
    are copied by ``copy.deepcopy``, but are not in the ``state_dict``: a checkpoint of a model fits it with any cache.

    A sequence that has no room left never answers from the wrong keys. An eager ``update`` raises before it writes
    anything; on a GPU it counts what eager calls appended and reads ``lengths`` only when that might not fit. Where
    Python does not run (a compiled step, the replay of a graph), and after such steps, the sequence's last M slots
    become NaN, and so do the answers of all queries that see one of them; ``reset`` clears them.
    """

    keys: Tensor
    values: Tensor
    lengths: Tensor

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        value_head_dim: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_head_dim = head_dim if value_head_dim is None else value_head_dim
        sizes = (batch_size, num_heads, max_length, head_dim, value_head_dim)
        if not all(map(is_size, sizes)):
            raise InvalidInput(f"KVCache: every size must be a positive integer, got {sizes}")
        check_factory("KVCache", device, dtype)
        self.max_length = max_length
        # Zeros, for a weight of 0 times whatever an empty slot held must be 0.
        for name, width in (("keys", head_dim), ("values", value_head_dim)):
            empty = torch.zeros(batch_size, num_heads, max_length, width, device=device, dtype=dtype)
            self.register_buffer(name, empty, persistent=False)
        self.register_buffer("lengths", torch.zeros(batch_size, dtype=torch.int64, device=device), persistent=False)
        # No sequence is longer, as far as eager calls know; spares them reading `lengths` from a GPU.
        self._longest = 0

    def update(self, key: Tensor, value: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Append M tokens to each sequence and return what attention takes: keys, values and ``key_lengths``.

        The returned tensors are the buffers themselves, which the next call changes. Attend with
        ``attention(query, keys, values, key_lengths=key_lengths, query_lengths=lengths, causal="lower_right")``.

        Args:
            key: [B, H_kv, M, D], M <= max_length, in the cache's dtype.
            value: [B, H_kv, M, DV].
            lengths: [B] int32 or int64, 0 … M: how many of the M tokens, from the first, each sequence really has, in a
                prefill of ragged prompts. Others are not written. One that is out of range counts as no room.

        Raises:
            InvalidInput: for wrong ranks, sizes, dtypes or devices; if a sequence has no room, or a length is out of
                range, and that is known (see above); if autograd is to follow key or value, which nothing here could.
        """
        self._check_tokens(key, value)
        M = key.shape[2]
        counts = M if lengths is None else self._check_vector("lengths", lengths, (len(self.lengths),), 0, M)
        self._check_room(M, counts)
        self._write(key, value, counts)
        return self.keys, self.values, self.lengths

    def _write(self, key: Tensor, value: Tensor, counts: Tensor | int) -> None:
        (B, H, N, _), M, device = self.keys.shape, key.shape[2], key.device
        kept = None
        lost = self.lengths + counts > N  # [B]
        if isinstance(counts, Tensor):
            lost = lost | (counts < 0) | (counts > M)
            counts = torch.where(lost, M, counts)
            kept = (torch.arange(M, device=device) < counts[:, None])[:, None, :, None]  # [B, 1, M, 1]
        # A sequence without room takes its last slots, which its queries see through any window.
        first = self.lengths.clamp(max=N - counts)
        # What is not kept goes round to slots of its own, where it leaves what it finds: no two writes meet.
        slots = (first[:, None] + torch.arange(M, device=device)) % N  # [B, M]
        place = (torch.arange(B, device=device)[:, None, None], torch.arange(H, device=device)[:, None], slots[:, None])
        made = []
        for buffer, new in ((self.keys, key), (self.values, value)):
            new = new.masked_fill(lost[:, None, None, None], float("nan"))
            made.append(new if kept is None else torch.where(kept, new, buffer[place]))
        lengths = first + counts
        # Nothing is written before all that there is no memory for would have been missed.
        for buffer, new in zip((self.keys, self.values), made, strict=True):
            buffer[place] = new
        self.lengths.copy_(lengths)

    def reset(self, index: int | Tensor | None = None) -> None:
        """Empty every sequence, or those in ``index``: an int, or [K] int32 or int64.

        Raises:
            InvalidInput: for an index of another kind, or out of range as far as that is known without waiting.
        """
        if isinstance(index, Tensor):
            self._check_vector("index", index, (index.numel(),), 0, len(self.lengths) - 1)
        elif index is not None and not (is_size(index, least=0) and index < len(self.lengths)):
            raise InvalidInput(
                f"KVCache: index must be None, a Tensor, or an int in 0 … {len(self.lengths) - 1}, got {shown(index)}"
            )
        # A filling takes no memory: a sequence is emptied as a whole, or not at all.
        index = index.long() if isinstance(index, Tensor) else index
        for buffer in (self.keys, self.values, self.lengths):
            if isinstance(index, Tensor):
                buffer.index_fill_(0, index.flatten(), 0)
            else:
                buffer[slice(None) if index is None else index].zero_()
        if index is None and not torch.compiler.is_compiling():
            self._longest = 0

    def reorder(self, index: Tensor) -> None:
        """Put in each place b what sequence index[b] holds, as a beam search does; ``index`` is [B] int32 or int64.

        Raises:
            InvalidInput: for an index of another kind, or out of range as far as that is known without waiting.
        """
        self._check_vector("index", index, (len(self.lengths),), 0, len(self.lengths) - 1)
        buffers = (self.keys, self.values, self.lengths)
        # All or nothing, should there be no memory for one of the copies.
        for buffer, copy in zip(buffers, [buffer[index] for buffer in buffers], strict=True):
            buffer.copy_(copy)

    def truncate(self, lengths: int | Tensor) -> None:
        """Forget tokens from the end, such as rejected guesses: no sequence is longer than ``lengths``, an int or [B].

        Raises:
            InvalidInput: for lengths of another kind, or negative as far as that is known without waiting.
        """
        if isinstance(lengths, Tensor):
            lengths = self._check_vector("lengths", lengths, (len(self.lengths),), 0, None).clamp(min=0)
        elif not is_size(lengths, least=0):
            raise InvalidInput(
                f"KVCache: lengths must be a Tensor or an int that is not negative, got {shown(lengths)}; at most "
                "2^31 - 1"
            )
        self.lengths.clamp_(max=lengths)

    def _take_back(self, count: int) -> None:
        """Undo the last ``update``, which appended ``count`` tokens to every sequence."""
        self.lengths -= count
        self._longest -= count

    def _check_tokens(self, key: Tensor, value: Tensor) -> None:
        for name, tensor, buffer in (("key", key, self.keys), ("value", value, self.values)):
            if not isinstance(tensor, Tensor):
                raise InvalidInput(f"KVCache: {name} must be a Tensor, got {type(tensor).__name__}")
            check_strided("KVCache", name, tensor)
            B, H, N, D = buffer.shape
            if tensor.dim() != 4 or (*tensor.shape[:2], tensor.shape[3]) != (B, H, D) or tensor.shape[2] > N:
                raise InvalidInput(f"KVCache: {name} must be [{B}, {H}, M <= {N}, {D}], got {list(tensor.shape)}")
            if tensor.dtype != buffer.dtype or tensor.device != buffer.device:
                raise InvalidInput(
                    f"KVCache: {name} must be {buffer.dtype} on {buffer.device} like the cache, got {tensor.dtype} on "
                    f"{tensor.device}; make the cache with that dtype and device, or move it with .to()"
                )
            if tensor.requires_grad and torch.is_grad_enabled():
                raise InvalidInput(
                    f"KVCache: {name} must not require grad, for the cache keeps no graph, got one that does; generate "
                    "under torch.no_grad(), or pass it detached"
                )
        if key.shape[2] != value.shape[2]:
            raise InvalidInput(
                f"KVCache: key and value need the same number of tokens, got {key.shape[2]} and {value.shape[2]}"
            )

    def _check_vector(self, name: str, vector: Tensor, shape: tuple[int, ...], least: int, most: int | None) -> Tensor:
        """The vector, of the right kind and, where that can be seen, within ``least`` … ``most``."""
        integers, device = (torch.int32, torch.int64), self.lengths.device
        if not isinstance(vector, Tensor):
            raise InvalidInput(f"KVCache: {name} must be a Tensor of integers, got {type(vector).__name__}")
        check_strided("KVCache", name, vector)
        if vector.shape != shape or vector.dtype not in integers or vector.device != device:
            raise InvalidInput(
                f"KVCache: {name} must be {list(shape)} of int32 or int64 on {device}, got {list(vector.shape)} "
                f"{vector.dtype} on {vector.device}"
            )
        if readable(vector) and vector.numel():
            low, high = int(vector.min()), int(vector.max())
            if low < least or (most is not None and high > most):
                allowed = f"be at least {least}" if most is None else f"lie in {least} … {most}"
                raise InvalidInput(f"KVCache: {name} must {allowed}, got {low} … {high}")
        return vector

    def _check_room(self, M: int, counts: Tensor | int) -> None:
        if not _eager(self.lengths):
            return
        longest = self._longest + M
        if longest > self.max_length or readable(self.lengths):
            longest = int((self.lengths + counts).max())
        if longest > self.max_length:
            raise InvalidInput(
                f"KVCache: a sequence has room for {self.max_length} tokens, got {longest} with the {M} new ones; make "
                "the cache with a larger max_length, or truncate or reset it"
            )
        self._longest = longest

    def extra_repr(self) -> str:
        (B, H, N, D), DV = self.keys.shape, self.values.shape[3]
        return f"{B}, {H}, max_length={N}, head_dim={D}, value_head_dim={DV}, dtype={self.keys.dtype}"


def _eager(tensor: Tensor) -> bool:
    """Whether Python runs for every step, and could read ``tensor`` at the price of waiting."""
    if torch.compiler.is_compiling() or transforms_active() or not holds_values(tensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
