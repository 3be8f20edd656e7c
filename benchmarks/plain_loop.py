"""The peer anyone writes in 40 lines: a dense causal transformer over one joint vocabulary, trained and decoded."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainBlock(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Tensor | None, start: int) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            cache[0, :, :, start : start + x.shape[1]], cache[1, :, :, start : start + x.shape[1]] = k, v
            k, v = cache[:, :, :, : start + x.shape[1]]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PlainModel(nn.Module):
    def __init__(self, vocab_size: int, length: int, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab_size, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(PlainBlock(width, num_heads) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab_size, bias=False)

    def forward(self, ids: Tensor, cache: Tensor | None = None, start: int = 0) -> Tensor:
        x = self.token(ids) + self.position.weight[start : start + ids.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], start)
        return self.head(self.norm(x if cache is None else x[:, -1:]))


def train_step(model: PlainModel, optimizer: torch.optim.Optimizer, ids: Tensor, bf16: bool) -> None:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=bf16):
        logits = model(ids[:, :-1])
    F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def generate(model: PlainModel, ids: Tensor, cache: Tensor, count: int) -> Tensor:
    start = 0  # cache: [layers, 2, rows, heads, length, head size]
    for _ in range(count):
        logits = model(ids[:, start:], cache, start)[:, -1]
        start = ids.shape[1]
        ids = torch.cat([ids, torch.multinomial(logits.float().softmax(-1), 1)], dim=1)
    return ids
