"""One rank: sums the gradients of a small network in several ways and prints a digest of each."""

from __future__ import annotations

import hashlib
import json
import sys

import torch

from latentwire.elastic import schedule
from latentwire.errors import WorkloadError
from latentwire.train.precision import make_repeatable
from latentwire.train.ranks import Ranks
from latentwire.train.reduction import Reduction
from latentwire.train.watch import Standing

WIDTH, SMALL_BUCKETS, STEPS = 24, 2048, 2


class Network(torch.nn.Module):
    """Layers in several buckets, a parameter that nothing reaches, and one that takes no gradient."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.unreached = torch.nn.Parameter(torch.ones(5))
        self.frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(4))).to(dtype)

    def losses(self, micro_batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Two, which reach all layers."""
        generator = torch.Generator().manual_seed(micro_batch)
        inputs = torch.randn(3, WIDTH, generator=generator).to(self.layers[0].weight.dtype)
        outputs = self.layers(inputs)
        return outputs.square().mean(), self.layers(inputs).mean()


def gradient_of(reduction: Reduction, network: Network, mine: range, calls: int) -> None:
    """A step's gradient; all losses in one backward pass or one in each."""
    network.zero_grad()
    for index in mine:
        reduction.begin(index)
        one, two = network.losses(index)
        if calls == 1:
            reduction.backward(one + two)
        elif calls == 0:  # the second pass adds to what the first has finished, and does so by itself
            reduction.backward(one)
            two.backward()
        else:
            reduction.backward(one * 0.5 + two)
            reduction.backward(network.losses(index)[0])
        reduction.end()
    reduction.finish()


def digest_of(network: Network) -> str:
    digest = hashlib.sha256()
    assert network.frozen.grad is None
    for parameter in network.parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        digest.update(parameter.grad.float().numpy().tobytes())
    return digest.hexdigest()


def is_refused(ranks: Ranks) -> bool:
    """A backward pass more than in the micro-batches before, when sums may be on their way."""
    network = Network(torch.float32)
    reduction = Reduction(network.parameters(), ranks, 4, bucket_bytes=SMALL_BUCKETS)
    mine = schedule.micro_batches_of(ranks.rank, ranks.world_size, 4)
    for index in mine:
        reduction.begin(index)
        reduction.backward(network.losses(index)[0])
        if index != mine[-1]:
            reduction.end()
    try:
        reduction.backward(network.losses(mine[-1])[0])
    except WorkloadError:
        return True
    return False


def main() -> None:
    make_repeatable(1, deterministic=True)
    ranks = Ranks.connect(torch.device("cpu"), 120, Standing())
    digests = {}
    for num in map(int, sys.argv[1:]):
        mine = schedule.micro_batches_of(ranks.rank, ranks.world_size, num)
        for case, dtype, calls, exact in (
            ("float32", torch.float32, 1, True),
            ("bfloat16", torch.bfloat16, 1, True),
            ("two calls", torch.float32, 2, True),
            ("a pass of its own", torch.float32, 0, True),
            ("plain", torch.float32, 1, False),
        ):
            network = Network(dtype)
            reduction = Reduction(network.parameters(), ranks, num, exact, bucket_bytes=SMALL_BUCKETS)
            for _ in range(STEPS):  # from the second on sums travel beside the backward pass
                gradient_of(reduction, network, mine, calls)
                digests[f"{case}, {num}"] = digest_of(network)
    print(json.dumps({"digests": digests, "refused": is_refused(ranks)}))
    ranks.disconnect()


if __name__ == "__main__":
    main()
