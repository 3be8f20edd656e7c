"""Cut a model over the axis ``tp`` for decoding: weights as the plan table says, hidden states whole on every rank.

Training also cuts the positions of a row (``parallel/tensor.py``); a decoding step has one position, which all ranks
compute. Shares are plain tensors: a step is a few hundred small operations, for which DTensor's bookkeeping would take
longer than the arithmetic, and weights are packed and steps recorded as they are on one device. A step exchanges one
sum behind each attention and each feed-forward, the width behind the embedding, and the vocabulary behind the head.

Every rank gets all logits from the same products, so that equal random numbers give equal tokens on all ranks even
where a sum over ranks is not the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from megatron_vilg.models.vilg import StreamEmbed, ViLG
from megatron_vilg.parallel.plan import RULES, Cut, Rule, rule_of
from megatron_vilg.sequence import Direction


def cut_for_decoding(model: ViLG, tp: DeviceMesh, rules: Sequence[Rule] = RULES) -> None:
    """Leave this rank its share of a model on the meta device, and set the exchanges between ranks.

    Names stay what they are. Heads and hidden features must divide by the ranks of ``tp``; a vocabulary need not, the
    last shares then hold rows that no token has.

    Raises:
        PlanError: a parameter without a rule or with several.
    """
    ranks, group = tp.size(), tp.get_group()
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            shape = list(parameter.shape)
            cut = rule_of(f"{name}.{key}", rules).cut
            if cut.dim is not None:
                shape[cut.dim] = -(-shape[cut.dim] // ranks)
            module.register_parameter(key, nn.Parameter(parameter.new_empty(shape), requires_grad=False))
            if cut is Cut.ROW:
                _replace(model, name, SummedLinear(cast(nn.Linear, module), group))
            elif cut is Cut.VOCABULARY:
                _replace(model, name, GatheredHead(cast(nn.Linear, module), group, len(parameter)))
    assert model.embed is not None
    model.embed.__class__ = GatheredEmbed
    cast(GatheredEmbed, model.embed).group = group


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def gathered(share: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Shares [..., n] of the last dimension, in the order of ranks: [..., ranks * n]."""
    shares = [torch.empty_like(share, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(shares, share.contiguous(), group=group)
    return torch.cat(shares, dim=-1)


class SharedLinear(nn.Linear):
    """A layer of which this rank has a share; ``exchange`` makes the result out of the products of all shares."""

    def __init__(self, share: nn.Linear, group: dist.ProcessGroup) -> None:
        outputs, inputs = share.weight.shape
        super().__init__(inputs, outputs, bias=share.bias is not None, device=share.weight.device)
        self.weight, self.bias = share.weight, share.bias
        self.group = group

    def exchange(self, product: Tensor) -> Tensor:
        """This rank's product, which is used up, to the layer's result."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """What the whole layer gives, on every rank."""
        return self.exchange(F.linear(x, self.weight))


class SummedLinear(SharedLinear):
    """Each rank has some of the input features, and everybody's products are added up; the bias comes once, behind."""

    def exchange(self, product: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        dist.all_reduce(product, group=self.group)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class GatheredHead(SharedLinear):
    """Each rank has some of the ``vocabulary``, and gets the logits of all of it."""

    def __init__(self, share: nn.Linear, group: dist.ProcessGroup, vocabulary: int) -> None:
        super().__init__(share, group)
        self.vocabulary = vocabulary

    def exchange(self, product: Tensor) -> Tensor:
        """[..., rows of the share] to [..., V]."""
        return gathered(product, self.group)[..., : self.vocabulary]


class GatheredEmbed(StreamEmbed):
    """Each rank looks up its share of the width of every vector."""

    group: dist.ProcessGroup

    def _finish(self, x: Tensor, direction: Direction, *, is_target: bool) -> Tensor:
        """[B, n, D / ranks] to [B, n, D]."""
        return gathered(super()._finish(x, direction, is_target=is_target), self.group)
