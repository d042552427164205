"""Precision and recall (Kynkaanniemi et al. 2019) as ADM's evaluator has them; density and coverage.

A set of features is covered by balls: around each item one that reaches its k-th nearest neighbour in the
set. Precision is the share of fakes inside any ball of the real set, recall the share of reals inside any
ball of the fake set. Density is the number of real balls a fake is in, over k; coverage the share of real
balls with a fake inside (Naeem et al. 2020). N real, M fake, d features; Euclidean distances in float64. In
order: squared_distances, radii, share_covered, checked, precision_recall, density_coverage. Needs torch only.
"""
import torch

def squared_distances(a, b):
    """(n,d), (m,d) float64 -> (n,m), by the Gram matrix; 1e-12 of the squared norms is rounding, so 0."""
    aa, bb = a.square().sum(1)[:, None], b.square().sum(1)[None]
    squared = torch.addmm(aa + bb, a, b.mT, alpha=-2)
    return torch.where(squared < 1e-12 * (aa + bb), 0, squared)

def radii(x, k, block):
    """Squared distance of each row of (n,d) to its k-th nearest neighbour, itself not counted: (n,)."""
    return torch.cat([squared_distances(rows, x).kthvalue(k + 1, dim=1).values for rows in x.split(block)])

def share_covered(x, centres, radius, block):
    """Share of the rows of x that lie in any ball around `centres`."""
    radius = radius * (1 + 1e-12)
    inside = [(squared_distances(rows, centres) <= radius).any(1) for rows in x.split(block)]
    return torch.cat(inside).double().mean().item()

def checked(real, fake, k, block, device):
    """Both sets in float64 around one centre. ValueError says what is wrong with them."""
    if k < 1 or block < 1:
        raise ValueError(f"k {k}, block {block}: expected at least 1 of each")
    real, fake = (torch.as_tensor(x, device=device).double() for x in (real, fake))
    for name, x in (("real", real), ("fake", fake)):
        if x.dim() != 2 or x.shape[1] != real.shape[1] or not x.shape[1]:
            raise ValueError(f"{name} features are {tuple(x.shape)}: expected (n,d), d as of the real ones")
        if len(x) <= k:
            raise ValueError(f"k = {k} needs at least {k + 1} {name} items, found {len(x)}")
        for i in (~x.isfinite().all(1)).nonzero():
            raise ValueError(f"{name} features of item {int(i)} are not finite")
    centre = real.mean(0)                                  # far from the origin the Gram form would cancel
    return real - centre, fake - centre

def precision_recall(real, fake, k=3, block=1024, device=None):
    """real (N,d), fake (M,d) features, tensors or arrays -> (precision, recall), both in 0..1.

    A distance equal to the radius is inside. `block` rows are compared with a whole set at a time: a few
    times block x max(N, M) x 8 bytes; the result is the same. Raises ValueError for k items or fewer, other
    shapes, and features that are not finite."""
    real, fake = checked(real, fake, k, block, device)
    return (share_covered(fake, real, radii(real, k, block), block),
            share_covered(real, fake, radii(fake, k, block), block))

def density_coverage(real, fake, k=5, block=1024, device=None):
    """real (N,d), fake (M,d) -> (density, about 1 for sets of one distribution, coverage in 0..1).

    As precision_recall, but k is the authors' 5 and, as in their code, a distance equal to the radius is
    outside: the density of a set against itself is then 1."""
    real, fake = checked(real, fake, k, block, device)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    radius = radii(real, k, block) * (1 - 1e-12)
    for rows in fake.split(block):
        hits = squared_distances(rows, real) < radius
        inside, covered = inside + hits.sum().item(), covered | hits.any(0)
    return inside / (k * len(fake)), covered.double().mean().item()
