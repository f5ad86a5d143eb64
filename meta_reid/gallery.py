"""A searchable index of a gallery: cosine search in torch, or in FAISS when it is installed and asked for."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.functional import normalize

from shared.records import write_tensors
from shared.runtime import UserError

QUERIES = 256
"""Queries that are compared with the gallery at a time."""


@dataclass(frozen=True)
class Index:
    """Embeddings of a gallery and the files they belong to."""

    features: Tensor
    """(N, D), length 1."""
    paths: list[str]
    model: str
    """Where the weights were from that made them."""
    maker: str
    """`fingerprint` of those weights and how they were joined."""

    @classmethod
    def of(cls, embeddings: Tensor, paths: list[str], model: str, maker: str) -> "Index":
        """Index of embeddings (N, D) of any length."""
        return cls(normalize(embeddings.float()), paths, model, maker)

    def save(self, path: Path) -> None:
        """Write one safetensors file; its folder is made."""
        metadata = {"model": self.model, "maker": self.maker, "paths": json.dumps(self.paths)}
        write_tensors(path, {"features": self.features}, metadata)

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Read an index. Raises UserError on a missing, damaged or foreign file."""
        if not path.is_file():
            raise UserError(f"{path}: no such index; build one with --gallery")
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata() or {}
                features = file.get_tensor("features")
            paths, model, maker = json.loads(facts["paths"]), facts["model"], facts["maker"]
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: damaged or not a gallery index ({error})") from None
        if len(paths) != len(features):
            raise UserError(f"{path}: damaged, {len(paths)} paths for {len(features)} embeddings")
        return cls(features, paths, model, maker)

    def search(self, queries: Tensor, top: int = 10, faiss: bool = False) -> tuple[Tensor, Tensor]:
        """Nearest gallery items by cosine, queries (Q, D) -> similarity and index, (Q, min(top, N)) each.

        Raises UserError when the queries' length differs from the index's, or FAISS is asked for and absent.
        """
        if queries.shape[1] != self.features.shape[1]:
            raise UserError(
                f"the index holds embeddings of {self.features.shape[1]} numbers, the network gives "
                f"{queries.shape[1]}: build the index with the same weights"
            )
        queries, top = normalize(queries.float()), min(top, len(self.features))
        if faiss:
            index = faiss_module().IndexFlatIP(self.features.shape[1])
            index.add(self.features.numpy())
            return tuple(torch.from_numpy(part) for part in index.search(queries.numpy(), top))
        found = [(part @ self.features.T).topk(top) for part in queries.split(QUERIES)]
        return tuple(torch.cat(which) for which in zip(*found, strict=True))


def fingerprint(model: nn.Module, joining: str) -> str:
    """Digest of a network's weights, and how it joins them: two that differ give embeddings that cannot be
    compared, whatever their files are called."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return f"{digest.hexdigest()} {joining}"


def faiss_module() -> ModuleType:
    """The FAISS package. Raises UserError when it is not installed."""
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError(
            "--faiss: FAISS is not installed (pip install faiss-cpu); the search without it is exact too"
        ) from None
    return faiss
