"""A decoder-only Transformer that generates token by token, its keys and values cached.

Prompts of different lengths stand in one batch. A first pass over them fills the cache (prefill); each further token
then costs attention over the cache for one query a sequence, and nothing of what came before is computed again. On a
GPU the step is captured in a CUDA graph. ``python docs/examples/cached_generation.py`` runs anywhere, in seconds.
"""

import torch
from torch import Tensor, nn

from seqcore.functional import attention
from seqcore.nn import KVCache, RotaryPositions


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); ``heads_kv`` heads of keys, shared by groups of query heads."""

    def __init__(self, dim: int, heads: int, heads_kv: int) -> None:
        super().__init__()
        self.sizes = heads, heads_kv, heads_kv
        self.head_dim = dim // heads
        self.norm, self.mlp_norm = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, sum(self.sizes) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.rotate = RotaryPositions(self.head_dim)

    def forward(self, x: Tensor, cache: KVCache | None, lengths: Tensor | None) -> Tensor:
        heads = self.qkv(self.norm(x)).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        q, k, v = heads.split(self.sizes, 1)
        start = 0 if cache is None else cache.lengths
        q, k, key_lengths = self.rotate(q, start), self.rotate(k, start), lengths
        if cache is not None:
            k, v, key_lengths = cache.update(k, v, lengths)
        out = attention(q, k, v, causal="lower_right", query_lengths=lengths, key_lengths=key_lengths, enable_gqa=True)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    def __init__(
        self, vocabulary: int = 101, dim: int = 64, layers: int = 2, heads: int = 4, heads_kv: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, heads_kv) for _ in range(layers))
        self.norm, self.head = nn.RMSNorm(dim), nn.Linear(dim, vocabulary, bias=False)
        self.heads_kv, self.head_dim = heads_kv, dim // heads

    def caches(self, batch_size: int, max_length: int) -> list[KVCache]:
        like = {"device": self.embedding.weight.device, "dtype": self.embedding.weight.dtype}
        return [KVCache(batch_size, self.heads_kv, max_length, self.head_dim, **like) for _ in self.blocks]

    def forward(self, tokens: Tensor, caches: list[KVCache] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Logits [B, T, vocabulary] of tokens [B, T], of which each sequence has the first ``lengths`` [B]."""
        x = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], lengths)
        return self.head(self.norm(x))


@torch.no_grad()
def generate(model: Decoder, prompts: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The ``count`` likeliest next tokens [B, count] of prompts [B, T], each as long as ``lengths`` [B] says."""
    B, T = prompts.shape
    caches = model.caches(B, T + count)
    last = model(prompts, caches, lengths)[torch.arange(B, device=lengths.device), lengths - 1]
    token = last.argmax(-1, keepdim=True)  # [B, 1]

    def step() -> None:
        token.copy_(model(token, caches)[:, -1].argmax(-1, keepdim=True))

    if prompts.is_cuda:
        step = captured(step, token, caches)
    generated = [token.clone()]
    for _ in range(count - 1):
        step()
        generated.append(token.clone())
    return torch.cat(generated, 1)


def captured(step, token: Tensor, caches: list[KVCache]):
    """``step`` as a CUDA graph; the step that warms up is taken back."""
    state = [token, *(cache.lengths for cache in caches)]
    before = [tensor.clone() for tensor in state]
    step()
    for tensor, value in zip(state, before, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def generate_without_cache(model: Decoder, prompt: Tensor, count: int) -> Tensor:
    """The same for one prompt [T], everything computed again for each token."""
    tokens = prompt[None]
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens[0, len(prompt) :]


def main(count: int = 24) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Decoder().to(device)
    prompts, lengths = torch.randint(101, (3, 9)).to(device), torch.tensor([9, 2, 5], device=device)
    generated = generate(model, prompts, lengths, count)
    for prompt, length, tokens in zip(prompts, lengths.tolist(), generated, strict=True):
        print(f"{prompt[:length].tolist()} -> {tokens.tolist()}")
        assert torch.equal(tokens, generate_without_cache(model, prompt[:length], count))
    print("the tokens equal those computed again without a cache")


if __name__ == "__main__":
    main()
