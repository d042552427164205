"""Distances of two sets of features: Frechet's, as in FID, sFID, FID_CLIP, FDD, P-FID, and KID's.

    d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^{1/2}                  (Heusel et al. 2017, Eq. 6)

of the means mu (d,) and covariances S (d,d), ddof 1, of features (n,d); everything in float64. In order:
Moments, which gathers mean and covariance; sqrt_trace, the last term; frechet_distance; kid. Needs torch.
"""
import torch

class Moments:
    """Mean and covariance of features that come in batches; two of them merge into that of both.

    Keeps the number n of rows, their mean (d,) and scatter (d,d), the sum of outer products of deviations
    from it. Batches are joined by the update of Chan, Golub & LeVeque (1979), which does not cancel."""

    def __init__(self, dim, device="cpu"):
        self.n = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, x):
        """Adds features (b,d) of any floating type. ValueError for another width or values not finite."""
        x = torch.as_tensor(x, device=self.mean.device).detach()
        if x.dim() != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"features {tuple(x.shape)}: expected (b,{len(self.mean)})")
        x = x.double()
        for i in (~x.isfinite().all(1)).nonzero():
            raise ValueError(f"features of item {self.n + int(i)} are not finite")
        other = Moments(x.shape[1], x.device)
        other.n, other.mean = len(x), x.mean(0)
        other.scatter = (x - other.mean).mT @ (x - other.mean)
        return self.merge(other)

    def merge(self, other):
        """Adds what another has seen."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"moments of width {len(other.mean)}: expected width {len(self.mean)}")
        if other.n:
            n, device = self.n + other.n, self.mean.device
            delta = other.mean.to(device) - self.mean
            between = torch.outer(delta, delta) * (self.n * other.n / n)
            self.mean = self.mean + delta * (other.n / n)
            self.scatter = self.scatter + other.scatter.to(device) + between
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

    S1 S2 has the eigenvalues of the symmetric R S2 R^T for any R with R^T R = S1: the Cholesky factor or, if
    S1 is singular, that of its eigenvectors. In float64; negative eigenvalues are rounding and count as 0.
    Exact for rank-deficient matrices, where sqrtm(S1 S2) is not."""
    S1, S2 = (torch.as_tensor(S).double() for S in (S1, S2))
    square = S1.dim() == 2 and S1.shape[0] == S1.shape[1] > 0 and S1.shape == S2.shape
    if not square or not (S1 + S2).isfinite().all():
        raise ValueError(f"covariances {tuple(S1.shape)}, {tuple(S2.shape)}: expected finite (d,d) twice")
    L, singular = torch.linalg.cholesky_ex(S1)                         # a tenth of the cost of eigenvectors
    R = L.mT
    if singular:
        values, vectors = torch.linalg.eigh(S1)
        keep = values > values[-1] * len(S1) * torch.finfo(torch.float64).eps          # others: rounding of 0
        R = values[keep].sqrt()[:, None] * vectors[:, keep].mT
    return torch.linalg.eigvalsh(R @ S2 @ R.mT).clamp_min(0).sqrt().sum().item()

def frechet_distance(mu1, S1, mu2, S2):
    """Squared Frechet (2-Wasserstein) distance of N(mu1, S1) and N(mu2, S2), the number that is called FID.

    mu (d,), S (d,d), tensors or arrays, any floating type -> float >= 0 (what rounding makes negative is 0).
    Nothing is added to a diagonal. ValueError for shapes that do not fit and values that are not finite."""
    given = mu1, S1, mu2, S2 = [torch.as_tensor(x).double().cpu() for x in (mu1, S1, mu2, S2)]
    d, shapes = mu1.numel(), [tuple(x.shape) for x in given]
    if d == 0 or shapes != [(d,), (d, d), (d,), (d, d)] or not all(x.isfinite().all() for x in given):
        raise ValueError(f"means and covariances {shapes}: expected finite (d,), (d,d), (d,), (d,d)")
    squared = (mu1 - mu2).square().sum() + S1.trace() + S2.trace() - 2 * sqrt_trace(S1, S2)
    return max(0.0, squared.item())

def kid(real, fake, subsets=100, size=1000, seed=0, device=None):
    """Kernel Inception Distance (Binkowski et al. 2018) x 1e3: (mean, standard deviation, ddof 0) of subsets.

    real (N,d), fake (M,d), tensors or arrays. Each subset takes `size` of either set, or as many as the
    smaller set has, in an order that the seed decides, and gives the unbiased MMD^2 of the kernel
    (x.y / d + 1)^3. Raises ValueError for fewer than 2 items, other shapes, and features not finite."""
    real, fake = sets = [torch.as_tensor(x, device=device) for x in (real, fake)]
    fit = real.dim() == fake.dim() == 2 <= min(map(len, sets)) and real.shape[1] == fake.shape[1] > 0
    if not fit or not all(x.isfinite().all() for x in sets):
        shapes = tuple(real.shape), tuple(fake.shape)
        raise ValueError(f"KID of features {shapes}: expected finite (n,d) twice, n at least 2")
    n, found, order = min(size, *map(len, sets)), [], torch.Generator().manual_seed(seed)
    for _ in range(subsets):
        x, y = (s[torch.randperm(len(s), generator=order)[:n].to(s.device)].double() for s in sets)
        xx, yy, xy = ((a @ b.mT / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        own = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (n * (n - 1))
        found.append(1e3 * (own - 2 * xy.mean()))
    found = torch.stack(found)
    return found.mean().item(), found.std(correction=0).item()
