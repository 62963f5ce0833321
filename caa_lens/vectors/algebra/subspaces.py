"""The geometry under vector arithmetic: lengths, angles, subspaces and rotations of rows `[..., d_model]`.

Plain functions of float64 tensors on the CPU; every leading dimension is independent. `precision` is the relative size
below which a difference is rounding: the epsilon of the coarsest dtype that the rows came from.
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

Rows = Float[Tensor, "*batch d_model"]
Numbers = Float[Tensor, "*batch 1"]


def length(rows: Rows) -> Numbers:
    """Euclidean norm, without overflow or underflow on the way."""
    peak = rows.abs().amax(-1, keepdim=True)
    return peak * torch.linalg.vector_norm(rows / peak.where(peak > 0, 1.0), dim=-1, keepdim=True)


def unit(rows: Rows) -> Rows:
    """The same directions with norm 1; zero stays zero."""
    peak = rows.abs().amax(-1, keepdim=True)
    scaled = rows / peak.where(peak > 0, 1.0)
    size = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    return scaled / size.where(size > 0, 1.0)


def dot(rows: Rows, others: Rows) -> Numbers:
    """v . w"""
    return (rows * others).sum(-1, keepdim=True)


def angle(rows: Rows, others: Rows) -> Numbers:
    """Angle in radians, 0 to pi: 2 atan2(|u - w|, |u + w|) of unit vectors, exact also where the cosine is near 1."""
    u, w = unit(rows), unit(others)
    return 2 * torch.atan2((u - w).norm(dim=-1, keepdim=True), (u + w).norm(dim=-1, keepdim=True))


def orthonormal_basis(
    vectors: Float[Tensor, "*batch several d_model"], precision: float
) -> Float[Tensor, "*batch rank d_model"]:
    """An orthonormal basis of what several vectors span, from a singular value decomposition.

    Vectors count by direction, not by size. Where they are linearly dependent up to `precision`, the rows of the basis
    that nothing spans are zero.
    """
    _, sizes, basis = torch.linalg.svd(unit(vectors), full_matrices=False)
    return basis * (sizes > vectors.shape[-2] * precision).unsqueeze(-1)


def project(rows: Rows, basis: Float[Tensor, "*batch rank d_model"]) -> Rows:
    """sum_i (v . q_i) q_i over an orthonormal basis q."""
    return einsum(rows, basis, basis, "... d, ... rank d, ... rank d_model -> ... d_model")


def remove(rows: Rows, basis: Float[Tensor, "*batch rank d_model"], precision: float) -> Rows:
    """v - sum_i (v . q_i) q_i; a remainder that is rounding against v is zero."""
    rest = rows - project(rows, basis)
    rest = rest - project(rest, basis)  # once more: the first pass left rounding errors as large as those of v
    return rest.where(length(rest) > precision * length(rows), 0.0)


def rotate(rows: Rows, toward: Rows, by: Numbers) -> Rows:
    """||v|| (cos(by) u + sin(by) p): v turned in its plane with `toward`; in it, p is normal to u = v/||v||.

    Where v and `toward` are parallel p is 0: callers refuse that, unless `by` is 0.
    """
    u, w = unit(rows), unit(toward)
    p = w - dot(w, u) * u
    p = unit(p - dot(p, u) * u)
    return length(rows) * (torch.cos(by) * u + torch.sin(by) * p)


def largest_components(rows: Rows, k: int) -> Rows:
    """Only the k components of largest absolute value, the others 0; of equals, the first."""
    kept = rows.abs().argsort(dim=-1, descending=True, stable=True)[..., :k]
    return torch.zeros_like(rows).scatter(-1, kept, rows.gather(-1, kept))


def principal_components(points: Float[Tensor, "point *batch d_model"], k: int) -> Float[Tensor, "*batch k d_model"]:
    """The k orthonormal directions along which centred points vary most.

    Raises:
        ValueError: if the points vary along fewer than k directions.
    """
    _, sizes, basis = torch.linalg.svd((points - points.mean(0)).movedim(0, -2), full_matrices=False)
    noise = max(points.shape) * torch.finfo(points.dtype).eps * points.norm()
    rank = int((sizes > noise).sum(-1).min())
    if k > rank:
        raise ValueError(
            f"{len(points)} points vary along {rank} directions, got k={k}: give more points or a smaller k"
        )
    return basis[..., :k, :]
