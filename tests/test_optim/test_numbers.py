import pytest
import torch

from internlm_mm.optim.numbers import check_numbers


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'lr': -1}, r'^optim_wrapper\.optimizer\.lr=-1 must not be negative$'),
        ({'lr': float('nan')}, r'^optim_wrapper\.optimizer\.lr=nan must not be negative$'),
        ({'matrix_lr': -0.5}, r'^optim_wrapper\.optimizer\.matrix_lr=-0\.5 must not'),
        ({'eps': -1e-8}, r'^optim_wrapper\.optimizer\.eps=-1e-08 must not'),
        ({'weight_decay': -0.1}, r'^optim_wrapper\.optimizer\.weight_decay=-0\.1 must not'),
        (
            {'betas': [0.9, 2]},
            r'^optim_wrapper\.optimizer\.betas=\(0\.9, 2\): each must lie in \[0, 1\)$',
        ),
        ({'betas': (1.0, 0.9)}, r'^optim_wrapper\.optimizer\.betas=\(1\.0, 0\.9\): each'),
    ],
)
def test_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_numbers(options)


def test_in_range_or_not_plain_numbers() -> None:
    check_numbers({})
    check_numbers(dict(lr=0, matrix_lr=None, eps=0.0, weight_decay=0, betas=(0, 0.999)))
    check_numbers(dict(lr=torch.tensor(0.1), eps=(None, 1e-3), betas=0.9))  # as others take them
