"""Numbers of the model that decoding depends on."""

import torch

from ztok_fast.codec.segment_model import root_mean_square


def test_root_mean_square_does_not_depend_on_order_or_threads():
    """A float mean does, which would change the last bits of what exact documents are decoded by."""
    torch.manual_seed(0)
    weight = torch.randn(300, 257) * torch.logspace(-3, 2, 300)[:, None]
    found = root_mean_square(weight)
    assert abs(found / weight.double().square().mean().sqrt().item() - 1) < 1e-8
    orders = [weight.flatten()[torch.randperm(weight.numel())] for _ in range(20)]
    assert {root_mean_square(order) for order in orders} == {found}
    # What a float mean does with one thread, two, three, ...
    shares = {sum(part.square().sum() for part in weight.flatten().chunk(n)).item() for n in range(1, 20)}
    assert len(shares) > 1, "the sample should show the difference"
    assert root_mean_square(torch.zeros(3, 2)) == 0
