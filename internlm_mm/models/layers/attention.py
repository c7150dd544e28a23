"""Self-attention layers."""

from __future__ import annotations

from torch import Tensor, nn

from internlm_mm.models.layers.norm import RMSNorm
from internlm_mm.ops import Documents, LayerCache, apply_rope, cached_attention
from internlm_mm.ops.attention import Attend, sdpa_attention
from internlm_mm.ops.projections import Project, project


class SelfAttention(nn.Module):
    """Causal self-attention with rotary positions; groups of query heads may share a key head.

    Heads are counted from the projections' outputs, never from the arguments, so the same lines
    run on a rank that holds only its share of the heads.

    Args:
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key/value heads; must divide `num_heads`.
        head_dim: Width of one head; even.
        bias: Whether the projections to queries, keys and values have biases.
        output_bias: Whether the projection of the result has one; as `bias` if None.
        norm_eps: If given, each query head and each key head is normalised before it is rotated,
            by a norm over `head_dim` that its heads share, and this is added to the mean square.

    Raises:
        ValueError: If `num_kv_heads` does not divide `num_heads` or `head_dim` is odd.

    Source: grouped heads, https://arxiv.org/abs/2305.13245, section 2.2; normalised heads,
    https://arxiv.org/abs/2302.05442, section 2.
    """

    attend: Attend
    project: Project

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
        output_bias: bool | None = None,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        if num_heads % num_kv_heads:
            raise ValueError(f'num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}')
        if head_dim % 2:
            raise ValueError(f'head_dim={head_dim} is odd; rotary positions turn channels in pairs')
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=bias)
        output_bias = bias if output_bias is None else output_bias
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=output_bias)
        self.q_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.k_norm = None if norm_eps is None else RMSNorm(head_dim, norm_eps)
        self.attend = sdpa_attention  # the seam: kernels and context parallelism replace it
        self.project = project  # the seam: products may be fused

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        documents: Documents | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Mix each token with those before it in its document.

        Args:
            x: Normalised residual stream, [rows, seq, hidden].
            rope: Cosines and sines, [2, rows, seq, head_dim // 2].
            documents: Boundaries inside the rows; None when each row is one document.
            cache: Keys and values of earlier tokens, when generating.

        Returns:
            What to add to the residual stream, [rows, seq, hidden].
        """
        q, k, v = (  # each [rows, seq, heads, head_dim]
            projected.unflatten(-1, (-1, self.head_dim))
            for projected in self.project(x, (self.q_proj, self.k_proj, self.v_proj))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if cache is None:
            out = self.attend(q, k, v, documents)
        else:
            out = cached_attention(q, *cache.write(k, v), cache.mask)
        return self.o_proj(out.flatten(-2))
