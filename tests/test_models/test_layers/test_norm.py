"""The norm layer against torch's."""

import torch

from internlm_mm.models.layers import RMSNorm


def test_same_as_torch():
    ours, theirs = RMSNorm(16, 1e-3), torch.nn.RMSNorm(16, 1e-3)
    theirs.weight.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x), theirs(x))
