import torch

from internlm_mm.ops import document_scores


def test_by_hand() -> None:
    hidden = torch.arange(24.0).view(2, 6, 2)
    weight = torch.tensor([[2.0, -1.0]])
    bounds = torch.tensor([[0, 2, 6, 6], [0, 6, 6, 6]], dtype=torch.int32)
    found = document_scores(hidden, weight, bounds)
    # Tokens 1 and 5 of the first row are (2, 3) and (10, 11); token 5 of the other is (22, 23).
    assert found.shape == (2, 3)
    assert found[0, :2].tolist() == [1.0, 9.0] and found[1, 0].item() == 21.0


def test_half_precision_is_summed_in_single() -> None:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(1, 4, 512, generator=draw).bfloat16()
    weight = torch.randn(1, 512, generator=draw).bfloat16()
    found = document_scores(hidden, weight, torch.tensor([[0, 4]]))
    wanted = hidden[0, 3].double() @ weight[0].double()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0, 0].double(), wanted, rtol=1e-5, atol=1e-5)
