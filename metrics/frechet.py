"""The Frechet distance between two sets of features: FID, sFID, FID_CLIP, P-FID, by whose features they are.

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^{1/2}                        (Heusel et al. 2017, Eq. 6)

of the means mu (d,) and covariances S (d,d), ddof 1, of features (n,d); everything in float64. Needs torch only.
"""
import torch


class Moments:
    """Mean and covariance of features that come in batches; two of them merge into that of both.

    Keeps the number n of rows, their mean (d,) and scatter (d,d) = sum of outer products of deviations from the mean, in
    float64 on `device`. Batches are joined by the pairwise update of Chan, Golub & LeVeque (1979), which does not cancel."""

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, x):
        """Adds features (b,d) of any floating type. Raises ValueError for another width and for values that are not finite."""
        x = torch.as_tensor(x, device=self.mean.device).detach()
        if x.dim() != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"features {tuple(x.shape)}: expected (b,{len(self.mean)})")
        x = x.double()
        if not x.isfinite().all():
            row = int((~x.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"features of item {self.n + row} are not finite")
        other = Moments.__new__(Moments)
        other.n, other.mean = len(x), x.mean(0)
        other.scatter = (x - other.mean).mT @ (x - other.mean)
        return self.merge(other) if other.n else self

    def merge(self, other):
        """Adds what another has seen. Raises ValueError for another width."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"moments of width {len(other.mean)}: expected width {len(self.mean)}")
        n = self.n + other.n
        if other.n:
            delta = other.mean.to(self.mean.device) - self.mean
            self.mean = self.mean + delta * (other.n / n)
            self.scatter = self.scatter + other.scatter.to(self.mean.device) + torch.outer(delta, delta) * (self.n * other.n / n)
        self.n = n
        return self

    def to(self, device):
        self.mean, self.scatter = self.mean.to(device), self.scatter.to(device)
        return self

    @property
    def cov(self):
        """Covariance (d,d) with ddof 1, as np.cov. Raises ValueError for fewer than two rows."""
        if self.n < 2:
            raise ValueError(f"a covariance needs at least 2 items, found {self.n}")
        return self.scatter / (self.n - 1)


def sqrt_trace(S1, S2):
    """tr (S1 S2)^{1/2} of two symmetric positive semi-definite matrices (d,d), a float.

    S1 S2 has the eigenvalues of the symmetric R S2 R^T for any R with R^T R = S1: the Cholesky factor, or where S1 is
    singular that of its eigenvectors. In float64; negative eigenvalues are rounding and count as 0. Exact for
    rank-deficient matrices, where sqrtm(S1 S2) is not."""
    S1, S2 = (torch.as_tensor(S).double() for S in (S1, S2))
    if S1.dim() != 2 or S1.shape[0] != S1.shape[1] or S1.shape != S2.shape:
        raise ValueError(f"covariances {tuple(S1.shape)}, {tuple(S2.shape)}: expected (d,d) twice")
    L, singular = torch.linalg.cholesky_ex(S1)                         # a tenth of the cost of eigenvectors
    R = L.mT
    if singular:
        values, vectors = torch.linalg.eigh(S1)
        keep = values > values[-1] * len(S1) * torch.finfo(torch.float64).eps  # the others are rounding of a zero
        R = values[keep].sqrt()[:, None] * vectors[:, keep].mT
    return torch.linalg.eigvalsh(R @ S2 @ R.mT).clamp_min(0).sqrt().sum().item()


def frechet_distance(mu1, S1, mu2, S2):
    """Squared Frechet (2-Wasserstein) distance of N(mu1, S1) and N(mu2, S2), the number that is called FID.

    mu (d,), S (d,d), tensors or arrays, any floating type -> float >= 0 (what rounding makes negative is 0). Nothing is ever
    added to a diagonal. Raises ValueError for shapes that do not fit and values that are not finite."""
    mu1, S1, mu2, S2 = (torch.as_tensor(x).double().cpu() for x in (mu1, S1, mu2, S2))
    d = len(mu1) if mu1.dim() == 1 else 0
    if d == 0 or mu2.shape != (d,) or S1.shape != (d, d) or S2.shape != (d, d):
        raise ValueError(f"means {tuple(mu1.shape)}, {tuple(mu2.shape)} and covariances {tuple(S1.shape)}, {tuple(S2.shape)}: "
                         f"expected (d,), (d,), (d,d), (d,d)")
    if not all(x.isfinite().all() for x in (mu1, S1, mu2, S2)):
        raise ValueError("means or covariances that are not finite have no Frechet distance")
    squared = (mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * sqrt_trace(S1, S2)
    return max(0.0, squared.item())
