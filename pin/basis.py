"""Eigenfaces: the fixed basis in which PIN chooses its subspace, and three ways to compute it from a
stream."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import scipy.linalg
import torch
from torch import Tensor, nn

from shared.records import write_tensors
from shared.runtime import UserError, own_type
from shared.weights import load_torch


class Basis(nn.Module):
    """Mean face m (D), eigenfaces U (D, K) with orthonormal columns by falling eigenvalue, eigenvalues (K).

    All images are grey (B, 1, H, W) in [-1, 1], D = H * W, flattened row by row. Raises UserError when there
    are fewer vectors than `components` asks for, when the mean has another size than they, or when they are
    not of unit length or the mean not finite.
    """

    def __init__(
        self, mean: Tensor, vectors: Tensor, values: Tensor | None = None, components: int | None = None
    ):
        super().__init__()
        components = components or vectors.shape[1]
        if vectors.shape[1] < components:
            raise UserError(
                f"the basis holds {vectors.shape[1]} eigenfaces and {components} are asked for: compute "
                f"it from "
                f"more images (at least {components + 1}) or ask for fewer components"
            )
        if mean.shape != vectors.shape[:1]:
            raise UserError(
                f"mean face of {tuple(mean.shape)} does not fit eigenfaces of {tuple(vectors.shape)}"
            )
        values = torch.full((components,), torch.nan) if values is None else values[:components]
        self.register_buffer("avg_face", mean.float().contiguous())
        self.register_buffer("eig_vec", vectors[:, :components].float().contiguous())
        self.register_buffer("eig_val", values.float().contiguous())
        norms = self.eig_vec.norm(dim=0)
        if not ((norms - 1).abs().max() <= 1e-2 and self.avg_face.isfinite().all()):  # nan is in no range
            raise UserError("the columns of the basis are not of unit length: is it a file of eigenfaces?")

    @property
    def size(self) -> tuple[int, int]:
        """(D, K): pixels and eigenfaces."""
        return tuple(self.eig_vec.shape)

    def fingerprint(self) -> str:
        """Hash of mean and eigenfaces. An ESN is tied to the order of its eigenfaces, so it carries this."""
        digest = hashlib.sha256()
        for part in (self.avg_face, self.eig_vec):
            digest.update(part.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, fingerprint: str, what: str) -> None:
        """Raise UserError when `what` was trained with another basis than this one."""
        if fingerprint != self.fingerprint():
            raise UserError(
                f"{what} was trained with another basis (hash {fingerprint}, this basis "
                f"{self.fingerprint()}): "
                f"eigenface k means something else there, so load the basis that came with it"
            )

    def require_orthonormal(self) -> None:
        """UserError when U^T U is not the identity, which the cost of a mask (`losses.py`) rests on; judged
        by four random vectors."""
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.size[1], 4, generator=generator).to(self.eig_vec.device)
        error = (self.eig_vec.T @ (self.eig_vec @ probe) - probe).norm(dim=0) / probe.norm(dim=0)
        if error.max() > 1e-2:
            raise UserError(
                "the eigenfaces of --basis are not orthonormal, so no network can be trained on them: "
                "compute them here, from the images of --basis-root"
            )

    def require_fit(self, x: Tensor) -> None:
        """UserError when images (B, 1, H, W) are of another size."""
        if x[0].numel() != self.avg_face.numel():
            side = round(self.avg_face.numel() ** 0.5)
            raise UserError(
                f"images of {tuple(x.shape[1:])} do not fit eigenfaces of {side} x {side} pixels; resize them"
            )

    def center(self, x: Tensor) -> Tensor:
        """(B, 1, H, W) -> x - m as (B, D), in float32."""
        self.require_fit(x)
        return x.flatten(1).float() - self.avg_face

    def coefficients(self, x: Tensor) -> Tensor:
        """c = U^T (x - m): (B, 1, H, W) -> (B, K). In float32 whatever autocast says: the first ones are
        large."""
        with own_type(x):
            return self.center(x) @ self.eig_vec

    def reconstruct(self, coefficients: Tensor, shape: torch.Size) -> Tensor:
        """m + U c: (B, K) -> (B, 1, H, W)."""
        with own_type(coefficients):
            return (self.avg_face + coefficients.float() @ self.eig_vec.T).view(shape)

    def save(self, path: Path) -> None:
        """Write a safetensors file, with the fingerprint in its metadata."""
        write_tensors(path, self.state_dict(), {"fingerprint": self.fingerprint()})


def load_basis(path: Path, components: int | None = None, size: int | None = None) -> Basis:
    """Read our `.safetensors` or the official `lfw_eig.pth` (`eig_vec` D x C, `avg_face` D).

    Raises UserError when the file is absent, foreign, holds fewer than `components` vectors, others than real
    ones, or is not of images of `size` x `size` pixels.
    """
    state = load_torch(path)
    if not isinstance(state, dict):
        raise UserError(f"{path}: no eigenfaces but a {type(state).__name__}")
    missing = {"eig_vec", "avg_face"} - state.keys()
    if missing:
        raise UserError(f"{path}: no eigenfaces, {sorted(missing)} missing among {sorted(state)[:8]}")
    vectors, mean = state["eig_vec"], state["avg_face"]
    tensors = isinstance(vectors, Tensor) and isinstance(mean, Tensor)
    if not tensors or vectors.ndim != 2 or vectors.is_complex() or mean.is_complex():
        raise UserError(f"{path}: eig_vec must be a real matrix (pixels, eigenfaces) and avg_face real too")
    basis = Basis(mean.flatten(), vectors, state.get("eig_val"), components)
    if size is not None and basis.size[0] != size**2:
        raise UserError(
            f"{path}: eigenfaces of {basis.size[0]} pixels, and the networks take {size} x {size} = {size**2}"
        )
    return basis


class _Moments:
    """Number and sum of the images seen; what every solver below needs for the mean."""

    passes = 1

    def __init__(self, dim: int, components: int, device: torch.device | str = "cpu"):
        self.dim, self.components, self.device = dim, components, device
        self.tensors = {"sum": torch.zeros(dim, dtype=torch.float64, device=device)}
        self.count = 0

    @property
    def mean(self) -> Tensor:
        return self.tensors["sum"] / self.count

    def state_dict(self) -> dict:
        """Everything a resumed pass needs."""
        return {"count": self.count, "tensors": self.tensors}

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.count = state["count"]
        self.tensors = {name: tensor.to(self.device) for name, tensor in state["tensors"].items()}

    def add(self, x: Tensor, pass_index: int = 0) -> None:
        """Take a batch of images (B, 1, H, W) in pass `pass_index`."""
        rows = x.flatten(1).to(self.device).float()
        if pass_index == 0:
            self.count += len(rows)
            self.tensors["sum"] += rows.sum(0, dtype=torch.float64)
        self._add(rows, pass_index)


class CovarianceSolver(_Moments):
    """D x D covariance in float32, filled block by block; the leading eigenvectors in float64.

    Memory at 112 x 112: 0.63 GB while images stream in, 2 to 3 GB in the solver. For N > D images.
    """

    def __init__(self, dim: int, components: int, device: torch.device | str = "cpu"):
        super().__init__(dim, components, device)
        self.tensors["products"] = torch.zeros(dim, dim, device=device)

    def _add(self, rows: Tensor, pass_index: int) -> None:
        self.tensors["products"].addmm_(rows.T, rows)

    def solve(self) -> Basis:
        """Eigenfaces of the covariance (divided by N)."""
        mean = self.mean
        covariance = self.tensors.pop("products").div_(self.count)
        covariance.addr_(mean.float(), mean.float(), alpha=-1)
        values, vectors = _leading_eigenpairs(covariance.double(), self.components)
        return Basis(mean.float(), vectors, values)


class GramSolver(_Moments):
    """N x N inner products instead of D x D: the cheaper side when there are fewer images than pixels.

    Memory: the N images, and three to four times N x N numbers in the solver; 3.2 GB at most at 112 x 112.
    """

    def __init__(self, dim: int, components: int, device: torch.device | str = "cpu", *, images: int):
        super().__init__(dim, components, device)
        self.tensors["rows"] = torch.zeros(images, dim, device=device)

    def _add(self, rows: Tensor, pass_index: int) -> None:
        self.tensors["rows"][self.count - len(rows) : self.count] = rows

    def solve(self) -> Basis:
        """u_k = X^T v_k / sqrt(N l_k) from the eigenvectors v_k of X X^T / N."""
        rows = self.tensors.pop("rows").sub_(self.mean.float())
        values, vectors = _leading_eigenpairs((rows @ rows.T).div_(self.count).double(), self.components)
        eigenfaces = rows.T @ vectors  # (D, K)
        del rows, vectors
        # Rounding leaves columns of tiny eigenvalues slightly skew; one QR restores U^T U = I.
        eigenfaces = torch.linalg.qr(eigenfaces / eigenfaces.norm(dim=0).clamp_min(1e-12)).Q
        return Basis(self.mean.float(), eigenfaces, values)


class RandomizedSolver(_Moments):
    """Randomised subspace iteration: three passes over the stream, D x (K + extra) numbers of memory.

    Pass 0 sketches the range with random directions, pass 1 is one power iteration, pass 2 solves the small
    problem inside the subspace found (Halko, Martinsson and Tropp 2011).
    """

    passes = 3
    extra = 64

    def __init__(self, dim: int, components: int, device: torch.device | str = "cpu"):
        super().__init__(dim, components, device)
        width = min(dim, components + self.extra)
        generator = torch.Generator().manual_seed(0)
        self.tensors["probe"] = torch.randn(dim, width, generator=generator).to(device)
        self.tensors["image"] = torch.zeros(dim, width, device=device)
        self.tensors["small"] = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.pass_index = 0

    def state_dict(self) -> dict:
        return super().state_dict() | {"pass_index": self.pass_index}

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.pass_index = state["pass_index"]

    def _add(self, rows: Tensor, pass_index: int) -> None:
        if pass_index != self.pass_index:
            self._next_pass()
        if pass_index == 0:  # the mean is not known yet: it is taken out at the end of the pass
            self.tensors["image"].addmm_(rows.T, rows @ self.tensors["probe"])
            return
        rows = rows - self.mean.float()
        inside = rows @ self.tensors["probe"]  # (B, width)
        if pass_index == 1:
            self.tensors["image"].addmm_(rows.T, inside)
        else:
            self.tensors["small"] += (inside.T @ inside).double()

    def _next_pass(self) -> None:
        image, mean = self.tensors["image"], self.mean.float()
        if self.pass_index == 0:
            image -= torch.outer(mean, mean @ self.tensors["probe"]) * self.count
        self.tensors["probe"] = torch.linalg.qr(image).Q
        self.tensors["image"] = torch.zeros_like(image)
        self.pass_index += 1

    def solve(self) -> Basis:
        """Eigenfaces inside the subspace of the last pass."""
        values, inside = _leading_eigenpairs(self.tensors["small"] / self.count, self.components)
        return Basis(self.mean.float(), self.tensors["probe"] @ inside, values)


def pick_solver(
    name: str, images: int, dim: int, components: int, device: torch.device | str = "cpu"
) -> _Moments:
    """`covariance`, `gram`, `randomized` or `auto` (gram when images < pixels, covariance otherwise).

    Raises UserError when `images` cannot span `components` directions around their mean.
    """
    if components > min(images - 1, dim):
        raise UserError(
            f"{components} eigenfaces cannot be had from {images} images of {dim} pixels: at most "
            f"{min(images - 1, dim)}; give more images or ask for fewer with --components"
        )
    if name == "auto":
        name = "gram" if images < dim else "covariance"
    if name == "gram":
        return GramSolver(dim, components, device, images=images)
    return {"covariance": CovarianceSolver, "randomized": RandomizedSolver}[name](dim, components, device)


def fit_basis(
    batches: Iterable[Tensor], images: int, dim: int, components: int, solver: str = "auto"
) -> Basis:
    """Eigenfaces of re-iterable `batches` of (B, 1, H, W), `images` in all. The loop of the `basis` stage."""
    moments = pick_solver(solver, images, dim, components)
    for pass_index in range(moments.passes):
        for x in batches:
            moments.add(x, pass_index)
    return moments.solve()


def _leading_eigenpairs(matrix: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues (falling) in float64 and eigenvectors in float32 of a symmetric float64 matrix,
    which is worked on in place."""
    if matrix.is_cuda:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values[-components:], vectors[:, -components:]
    else:
        n = len(matrix)
        # A transposed view is already in LAPACK's order, so that it can do without a copy.
        values, vectors = scipy.linalg.eigh(
            matrix.numpy().T,
            subset_by_index=[n - components, n - 1],
            driver="evr",
            overwrite_a=True,
            check_finite=False,
        )
        del matrix  # the largest of all that is held
        values, vectors = torch.from_numpy(values), torch.from_numpy(vectors)
    vectors = vectors.float()
    return values.flip(0), vectors.flip(1)
