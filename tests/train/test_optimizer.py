"""The paged optimizer that waits once an update moves weights as the one that it is made of."""

import torch

from petool_lite.train.optimizer import unhurried


def moved(kind, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.nn.Parameter(torch.randn(40, 60, generator=generator)) for _ in range(3)]
    frozen = torch.nn.Parameter(torch.ones(2))
    optimizer = kind([{"params": [*weights[:2], frozen]}, {"params": weights[2:], "weight_decay": 0.0}], **options)
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.randn(40, 60, generator=generator)
        optimizer.step()
    assert torch.equal(frozen.detach(), torch.ones(2))
    return [weight.detach() for weight in weights]


def test_it_moves_weights_as_bitsandbytes_own() -> None:
    from bitsandbytes.optim import AdamW

    options = {"lr": 1e-2, "weight_decay": 0.1, "optim_bits": 32, "is_paged": False}
    ours, theirs = moved(unhurried(AdamW), **options), moved(AdamW, **options)
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], moved(AdamW, **options | {"lr": 1e-3})[0])


def test_others_are_left_alone() -> None:
    assert unhurried(torch.optim.AdamW) is torch.optim.AdamW
