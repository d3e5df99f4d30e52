"""Digests of tensors, taken while their bytes pass, and the fingerprint that is made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsekit.checkpoint.safetensors_file import TYPE_NAMES, TensorPlace, is_finite
from sparsekit.files import CHUNK, sha256_json


class TensorDigest:
    """The sha256 of one tensor's bytes, which come in pieces.

    Args:
        dtype: Of the tensor.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._sha256 = hashlib.sha256()
        self.finite = True
        """Whether no value so far is NaN or Inf."""

    @classmethod
    def of(cls, tensor: Tensor) -> TensorDigest:
        """The digest of a whole tensor."""
        digest = cls(tensor.dtype)
        for piece in bytes_of(tensor).split(CHUNK):
            digest.add(piece)
        return digest

    def add(self, piece: Tensor) -> None:
        """Take in further bytes, of whole values."""
        self._sha256.update(piece.numpy())
        self.finite = self.finite and is_finite(piece.view(self._dtype))

    @property
    def hex(self) -> str:
        """The sha256 of what was taken in."""
        return self._sha256.hexdigest()


def bytes_of(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as one dimension of uint8, without a copy where that can be."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def fingerprint_of(tensors: Mapping[str, TensorPlace], digests: Mapping[str, str]) -> str:
    """The sha256 over name, dtype as in the file, shape and digest of every tensor, by name."""
    return sha256_json(
        [
            [name, TYPE_NAMES[place.dtype], list(place.shape), digests[name]]
            for name, place in sorted(tensors.items())
        ]
    )
