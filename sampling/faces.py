"""Files of faces, which FaceID adapters read in place of a photograph.

Such a file is safetensors: `face`, `512` or `k 512` for k faces, is the embedding of a recognition network; `picture`, `h w 3` or
`k h w 3` in RGB of 8 bits, is the aligned crop of each face, which FaceID Plus reads too. docs/drawing.md shows how to make one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.features import Face
from model.image_encoder import ImageEncoder
from model.image_projection import FacePlus, Projection
from model.words import Fit


@dataclass(frozen=True)
class Faces:
    """The faces in a file: embeddings `k f` and, if there are any, the picture of each."""

    path: Path
    embeddings: Tensor
    pictures: tuple[Image.Image, ...] = ()

    def check(self, projection: Projection) -> Face:
        """Return the embedder of a FaceID adapter's projection. Raises ValueError if the adapter does not read these faces."""
        reads, actual = projection.reads, self.embeddings.shape[-1]
        if not isinstance(reads, Face):
            raise ValueError(f"{self.path}: holds faces, but this adapter reads {reads.name}: give it a picture, or use a FaceID adapter")
        expected = projection.face_dim if isinstance(projection, FacePlus) else projection.image_dim
        if actual != expected:
            raise ValueError(f"{self.path}: holds face embeddings of {actual} numbers, but this adapter reads {expected}")
        if reads.needs_encoder and not self.pictures:
            raise ValueError(f"{self.path}: holds no `picture` of the face, which FaceID Plus reads too (see docs/drawing.md)")
        return reads

    def features(self, projection: Projection, encoder: ImageEncoder | None, fit: Fit = "crop") -> Tensor:
        """Compute a FaceID adapter's features of the faces, `1 k m e`. Raises ValueError if `check` does, or the encoder is missing."""
        reads, like = self.check(projection), next(projection.parameters())
        pixels = None
        if reads.needs_encoder and encoder is not None:
            pixels = torch.stack([encoder.preprocess(picture, fit) for picture in self.pictures]).to(next(encoder.parameters()))
        return reads.read(self.embeddings.to(like.device), encoder, pixels).to(like)


def read_faces(path: Path) -> Faces | None:
    """Read a file of faces; None for a safetensors file without faces. Raises ValueError if the faces are damaged."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError):
        return None  # `load_embedding` says what is wrong with it
    if "face" not in tensors:
        return None
    faces, pictures = tensors["face"], tensors.get("picture")
    faces = faces[None] if faces.ndim == 1 else faces
    if faces.ndim != 2 or not faces.is_floating_point() or not faces.numel() or not faces.isfinite().all():
        raise ValueError(f"{path}: `face` must be finite numbers, 512 for each face, not {list(faces.shape)} of {faces.dtype}")
    if not faces.any(dim=-1).all():
        raise ValueError(f"{path}: a face embedding is all zeros: compute it again from a picture of a face")
    if pictures is None:
        return Faces(path, faces.float())
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[::3] != (len(faces), 3) or 0 in pictures.shape:
        raise ValueError(f"{path}: `picture` must be one picture for each of {len(faces)} faces, height x width x 3 in uint8")
    return Faces(path, faces.float(), tuple(Image.fromarray(picture.numpy()) for picture in pictures))
