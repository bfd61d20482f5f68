"""A linear layer fitted to what it should put out, by damped least squares.

    min_{W, b} Σ_n ‖y_n − W z_n − b‖² + λ N ‖W − W₀‖²,     λ = damping · mean E[(z − E z)²]

With Z and Y centred, (ZᵀZ + λN I) Wᵀ = ZᵀY + λN W₀ᵀ and b = E y − W E z; solved in float64.
"""

from __future__ import annotations

import torch
from torch import nn


class LeastSquares:
    """Sums over rows z [N, K] and y [N, C], batch by batch."""

    def __init__(self, columns: int, outputs: int, device: torch.device) -> None:
        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(*size, dtype=torch.float64, device=device)

        self.count = 0.0
        self.z, self.y, self.yy = zeros(columns), zeros(outputs), zeros(outputs)
        self.zz, self.zy = zeros(columns, columns), zeros(columns, outputs)

    def add(self, z: torch.Tensor, y: torch.Tensor) -> None:
        self.count += len(z)
        self.z += z.sum(0)
        self.y += y.sum(0)
        self.yy += y.square().sum(0)
        self.zz += z.t() @ z
        self.zy += z.t() @ y

    def solve_into(self, linear: nn.Linear, damping: float) -> float:
        """Give ``linear`` the weights that fit best, in new parameters; E‖y − W z − b‖² / E‖y‖²."""
        z, y = self.z / self.count, self.y / self.count
        zz = self.zz - self.count * torch.outer(z, z)  # [K, K]
        zy = self.zy - self.count * torch.outer(z, y)  # [K, C]
        start = linear.weight.detach().double().t()  # [K, C]
        if len(z):
            own = damping * zz.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
            damped = zz + own * torch.eye(len(z), dtype=zz.dtype, device=zz.device)
            weight = torch.cholesky_solve(zy + own * start, torch.linalg.cholesky(damped))
        else:
            weight = start
        left = (self.yy - self.count * y.square()).sum() - (weight * (2 * zy - zz @ weight)).sum()
        learning, dtype = linear.weight.requires_grad, linear.weight.dtype
        linear.weight = nn.Parameter(weight.t().to(dtype).contiguous(), learning)
        linear.bias = nn.Parameter((y - z @ weight).to(dtype), learning)
        return float(left.clamp(min=0) / self.yy.sum().clamp(min=torch.finfo(torch.float64).tiny))
