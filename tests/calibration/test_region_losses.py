# SPDX-License-Identifier: Apache-2.0
import torch
import torch.nn.functional as F

from qgraph.calibration.region_losses import Ports, final_loss, inside_loss, output_loss


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_output_loss_is_relative_to_the_energy_and_the_mean_over_ports():
    a, b = values(2, 3, 4), values(2, 3, 4, seed=1)
    one = (a - b).square().mean() / b.square().mean()
    torch.testing.assert_close(output_loss([a], [b]), one)
    torch.testing.assert_close(output_loss([a, b], [b, b]), one / 2)
    torch.testing.assert_close(output_loss([7 * a], [7 * b]), one)


def test_rows_that_a_mask_leaves_out_do_not_count():
    a, b = values(2, 3, 4), values(2, 3, 4, seed=1)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    spoilt = torch.where(mask.unsqueeze(-1), a, 1e6)
    torch.testing.assert_close(output_loss([spoilt], [b], mask), output_loss([a[mask]], [b[mask]]))


def test_values_inside_count_by_variance_and_probabilities_by_divergence():
    ports = Ports((), (), ("product",), ("softmax",))
    a, b = values(2, 5), values(2, 5, seed=1)
    p, q = a.softmax(-1), b.softmax(-1)
    want = (F.mse_loss(a, b) / b.var() + F.kl_div(p.log(), q, reduction="batchmean")) / 2
    torch.testing.assert_close(inside_loss(ports, [a, p], [b, q]), want)


def test_logits_are_compared_by_softened_divergence_features_by_error():
    a, b = values(3, 5), values(3, 5, seed=1)
    soft = F.kl_div((a / 4).log_softmax(-1), (b / 4).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(final_loss(a, b, 4.0), 16 * soft)
    torch.testing.assert_close(final_loss(a, b, None), F.mse_loss(a, b) / b.var())
    assert float(final_loss(b, b, 4.0)) == 0.0
