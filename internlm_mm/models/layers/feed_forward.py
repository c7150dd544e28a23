"""Feed-forward layers."""

from torch import Tensor, nn

from internlm_mm.ops import swiglu
from internlm_mm.ops.projections import Project, project


class SwiGLU(nn.Module):
    """Gated feed-forward layer, https://arxiv.org/abs/2002.05202.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Inner width.
    """

    project: Project

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)
        self.project = project  # the seam: products may be fused

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself. x, result: [rows, seq, hidden]."""
        gate, up = self.project(x, (self.gate_proj, self.up_proj))
        return self.down_proj(swiglu(gate, up))
