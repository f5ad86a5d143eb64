"""Swapping faces in photos and videos: detect, align, swap, blend back. Everything in batches."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from faceswapper import fusion
from faceswapper.align import Face, Framing, Steady, crop_matrix, crop_side, cut, paste, to_arrays, to_tensor
from faceswapper.blocks import fold
from faceswapper.detect import (
    Detector,
    FinderDetector,
    Landmarker,
    Parser,
    finder_labels,
    finder_points,
    finder_reading,
)
from faceswapper.drawing import LandmarkValues, draw_landmarks, face_mask
from faceswapper.losses import Batch
from faceswapper.model import Generator
from faceswapper.photo import Photo
from faceswapper.video import VideoReader, in_batches
from shared.ranges import Share, Within
from shared.runtime import UserError

Choice = Literal["largest", "surest"] | int
Region = Literal["brows", "eyes", "nose", "mouth"]
REGIONS: dict[str, tuple[int, ...]] = {"brows": (2, 3), "eyes": (4, 5), "nose": (10,), "mouth": (11, 12, 13)}
"""BiSeNet labels of what can be left as it is in the target."""
KEPT_BY_MALLOC = 2**25
"""Bytes. A larger tensor goes back to the system when it is freed (glibc's largest M_MMAP_THRESHOLD), and the
next one is paged in anew. One picture of full size keeps all cores busy."""
PROFILE = 0.15
"""A nose tip nearer to one eye than this share of their distance, along their line, is a profile."""


class Crops(NamedTuple):
    """What the generator needs of aligned crops."""

    picture: Tensor
    """(B, 3, S, S) in [-1, 1]."""
    points: Tensor
    """98 points (B, 98, 2) in pixels of the crop."""
    landmarks: Tensor
    """Landmark picture (B, 3, S, S)."""
    labels: Tensor
    """BiSeNet labels (B, S, S) uint8."""
    mask: Tensor
    """(B, 1, S, S), 1 = background."""


class Source(NamedTuple):
    """Whose face is put in."""

    code: Tensor
    """(1, id_dim)."""
    forehead: Tensor
    """(1, 1, S, S), see `fusion.forehead`; of the first photo when there are several."""
    picture: Tensor
    """(1, 3, S, S) in [-1, 1], of the first photo."""


class Swapped(NamedTuple):
    """A target and what became of it."""

    photo: np.ndarray
    """(H, W, 3) uint8; the target itself where nothing was swapped."""
    face: Face | None
    """The face that was replaced."""
    remark: str | None
    """Why not, or what makes the result doubtful."""


@dataclass(frozen=True)
class Blending:
    """How a swap goes back into its photo."""

    colour: bool = False
    """Give the swap the target's mean colour and contrast inside the face."""
    restore: bool = True
    """The official rule: the target's forehead stays where the source's is covered by hair or a hat."""
    hats: bool = False
    """Let a hat stay like hair."""
    keep: tuple[Region, ...] = ()
    """Parts that stay the target's."""
    keep_share: Share = 1.0
    """How far they stay: 1 wholly, 0 not at all, between both faces show through."""
    feather: Annotated[float, Within(0, 0.5)] = 1 / 24
    """Width of the soft rim relative to the crop."""


class Swapper:
    """A generator with everything around it. All networks in evaluation mode, on the generator's device.

    least: side of a crop in photo pixels below which a face is too small to be swapped. restrict: what the
    generator of an ablation sees of a target (`trials.Trial.restrict`).
    """

    def __init__(
        self,
        generator: Generator,
        detector: Detector,
        landmarker: Landmarker,
        parser: Parser,
        framing: Framing = Framing(),  # noqa: B008 - frozen
        blending: Blending = Blending(),  # noqa: B008 - frozen
        landmark_values: LandmarkValues = "unit",
        least: int = 48,
        restrict: Callable[[Batch], Batch] | None = None,
    ):
        self.restrict = restrict or (lambda batch: batch)
        self.generator = fold(generator.eval()).to(memory_format=torch.channels_last)
        self.device = next(generator.parameters()).device
        self.at_once = self._at_once()
        self.detector, self.landmarker, self.parser = detector, landmarker, parser
        self.framing, self.blending, self.least = framing, blending, least
        self.landmark_values = landmark_values

    @property
    def size(self) -> int:
        """Side of a crop."""
        return self.generator.size.img_size

    def _at_once(self) -> int | None:
        """How many pictures the generator gets at a time; None: all of a batch."""
        if self.device.type != "cpu":
            return None
        size = self.generator.size
        largest = 4 * size.channels(size.img_size) * size.img_size**2  # bytes of a level of one picture
        return max(1, KEPT_BY_MALLOC // (2 * largest))  # two: both shares of the landmarks are one tensor

    # --- faces and crops

    def choose(self, faces: Sequence[Face], choice: Choice, option: str = "--face") -> Face | None:
        """The largest or surest face, or number `choice` from the left, from 0; None when there is none.

        UserError, which names the option, when a number is asked for that does not exist.
        """
        if not faces:
            return None
        if choice == "largest":
            return max(faces, key=lambda face: face.size)
        if choice == "surest":
            return max(faces, key=lambda face: face.score)
        ordered = sorted(faces, key=lambda face: face.box[0])
        if not 0 <= choice < len(ordered):
            raise UserError(f"{option} {choice}: {counted(len(ordered))}")
        return ordered[choice]

    def describe(self, crops: Tensor) -> Crops:
        """Crops (B, 3, S, S) in [0, 1] with landmark picture and mask."""
        if self.landmarker is finder_points and self.parser is finder_labels:
            points, labels = finder_reading(crops)
        else:
            points, labels = self.landmarker(crops), self.parser(crops)
        drawn = draw_landmarks(points, crops.shape[-1], self.landmark_values)
        mask = (~face_mask(labels)).to(crops.dtype)[:, None]
        return Crops(crops * 2 - 1, points, drawn, labels, mask)

    def aligned(self, photo: np.ndarray, face: Face) -> tuple[np.ndarray, np.ndarray]:
        """Crop (S, S, 3) uint8 and the matrix that cut it."""
        matrix = crop_matrix(face, self.size, self.framing)
        return cut(photo, matrix, self.size), matrix

    @torch.inference_mode()
    def source(
        self, photos: Sequence[Photo], choice: Choice = "largest", mix: Sequence[float] | None = None
    ) -> Source:
        """The identity of a photo, or the weighted mean of several photos' codes (one person's or many's).

        Raises UserError when a photo shows no face, one that is too small, or the weights do not fit.
        """
        mix = [1.0] * len(photos) if mix is None else mix
        if len(mix) != len(photos) or min(mix) < 0 or not 0 < sum(mix) < math.inf:
            raise UserError(f"--mix: give {len(photos)} weights of at least 0, one for each source")
        found = self.detector([photo.seen for photo in photos], [photo.name for photo in photos])
        crops = []
        for photo, faces in zip(photos, found, strict=True):
            face = self.choose(faces, choice, f"{photo.name}: --source-face")
            reason = self._unusable(face)
            if reason:
                raise UserError(f"{photo.name}: the source {reason}")
            crops.append(self.aligned(photo.seen, face)[0])
        described = self.describe(to_tensor(crops, self.device))
        share = torch.tensor(mix, device=self.device).view(-1, 1) / sum(mix)
        code = (self._code(described) * share).sum(0, keepdim=True)
        covered = fusion.forehead(described.points, described.mask)
        return Source(code, covered[:1], described.picture[:1])

    def _unusable(self, face: Face | None) -> str | None:
        if face is None:
            return "shows no face that the detector knows; give its place with --detector FILE.csv"
        side = crop_side(crop_matrix(face, self.size, self.framing), self.size)
        if side < self.least:
            return f"shows a face of {side:.0f} pixels with its surroundings, smaller than {self.least}"
        return None

    # --- swaps

    def swap(self, crops: Crops, source: Source, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """Crops -> swapped pictures (B, 3, S, S) in [0, 1] and how much of each is used (B, 1, S, S).

        strength: 0 keeps the target's own identity, 1 takes the source's, between mixes the codes.
        """
        code = source.code
        if strength != 1:
            code = torch.lerp(self._code(crops), code, strength)
        seen = self._seen(crops)
        given = (*seen, code.expand(len(seen.picture), -1))
        parts = zip(*(x.split(self.at_once or len(x)) for x in given), strict=True)
        with self._autocast():
            swap = torch.cat([self.generator.swap(part[0], *part) for part in parts])
        weight = self._weight(crops, source)
        return self._finished(swap, crops, weight), weight

    def _seen(self, crops: Crops) -> Batch:
        """What the generator sees of targets."""
        return self.restrict(Batch(crops.picture, crops.landmarks, crops.mask))

    def _code(self, crops: Crops) -> Tensor:
        """Identity codes (B, id_dim)."""
        seen = self._seen(crops)
        with self._autocast():
            return self.generator.code(seen.picture, seen.mask).float()

    def _autocast(self) -> torch.autocast:
        """The generator's precision: bf16 on a GPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def _finished(self, swaps: Tensor, crops: Crops, weight: Tensor) -> Tensor:
        """The generator's pictures in [0, 1], with the target's colours if that is asked for."""
        swaps = (swaps.float() / 2 + 0.5).clamp(0, 1)
        if not self.blending.colour:
            return swaps
        return fusion.colour_transfer(swaps, crops.picture / 2 + 0.5, weight).clamp(0, 1)

    def _weight(self, crops: Crops, source: Source) -> Tensor:
        blending = self.blending
        mask = crops.mask
        kept = [label for region in blending.keep for label in REGIONS[region]]
        if kept:
            stay = torch.isin(crops.labels, torch.tensor(kept, device=self.device, dtype=torch.uint8))
            mask = torch.maximum(mask, blending.keep_share * stay[:, None].to(mask.dtype))
        if blending.restore:
            own = fusion.forehead(crops.points, crops.mask)
            hair = (fusion.HAIR, fusion.HAT) if blending.hats else (fusion.HAIR,)
            mask = torch.maximum(mask, 1 - fusion.keep_map(crops.labels, source.forehead, own, hair))
        return fusion.feather(mask, blending.feather)

    @torch.inference_mode()
    def progressive(self, crops: Crops, source: Source, steps: int) -> Tensor:
        """One target (B = 1) with `steps` identities from its own to the source's, in one pass: (steps, 3, S,
        S) in [0, 1]."""
        g, seen = self.generator, self._seen(crops)
        attributes, own, cache = g.encode(seen.picture, seen.mask)
        codes = torch.lerp(own, source.code, torch.linspace(0, 1, steps, device=self.device).view(-1, 1))
        guides = g.org_decoder.guides(seen.landmarks, seen.mask)
        swaps = g.org_decoder.decode(attributes, codes, guides, cache, features=False).picture
        weight = self._weight(crops, source)
        return torch.lerp(crops.picture / 2 + 0.5, self._finished(swaps, crops, weight), weight)

    @torch.inference_mode()
    def levels(self, crops: Crops, source: Source) -> list[Tensor]:
        """The swap of one target (B = 1) as the decoder's side heads draw it on the way up, and at last the
        generator's own picture: (3, r, r) in [0, 1] for each resolution r."""
        g, seen = self.generator, self._seen(crops)
        attributes, cache = g.attr_encoder.encode(seen.picture)
        guides = g.org_decoder.guides(seen.landmarks, seen.mask)
        made = g.org_decoder.decode(attributes, source.code, guides, cache, features=False, side=True)
        return [(x[0].float() / 2 + 0.5).clamp(0, 1) for x in (*made.side, made.picture)]

    @torch.inference_mode()
    def photos(
        self, photos: Sequence[Photo], faces: Sequence[Face | None], source: Source, strength: float = 1.0
    ) -> list[Swapped]:
        """Targets of any sizes and the face to replace in each -> results, in one batch.

        A photo without face, or with too small a one, comes back as it is, with a remark. A grey one stays
        grey; what lies under transparency stays where nothing is swapped.
        """
        reasons = [self._unusable(face) for face in faces]
        usable = [n for n, reason in enumerate(reasons) if reason is None]
        results = [Swapped(p.rgb, None, reason) for p, reason in zip(photos, reasons, strict=True)]
        if not usable:
            return results
        cuts = [self.aligned(photos[n].seen, faces[n]) for n in usable]
        crops = self.describe(to_tensor([crop for crop, _ in cuts], self.device))
        swaps, weights = self.swap(crops, source, strength)
        swaps, weights = to_arrays(swaps), weights[:, 0].float().cpu().numpy()
        turned = profile(crops.points).tolist()
        for n, (_, matrix), swap, weight, side in zip(usable, cuts, swaps, weights, turned, strict=True):
            if photos[n].grey:
                swap = cv2.cvtColor(cv2.cvtColor(swap, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            remark = "a profile: the result is doubtful" if side else None
            results[n] = Swapped(paste(photos[n].rgb, swap, weight, matrix), faces[n], remark)
        return results

    def video(
        self,
        reader: VideoReader,
        source: Source,
        choice: Choice = "largest",
        batch_size: int = 16,
        strength: float = 1.0,
        smooth: bool = True,
    ) -> Iterator[Swapped]:
        """Every frame of a video, in batches: the person chosen in the first frame with a face is followed.

        The source's code is computed once for the whole video. smooth: steady the crop over time.
        """
        steady, last, name = Steady() if smooth else None, None, reader.path.name
        for frames in in_batches(iter(reader), batch_size):
            faces = self._follow(frames, name, last, choice)
            last = next((face for face in reversed(faces) if face is not None), last)
            faces = [steady(face) for face in faces] if steady else faces
            yield from self.photos([Photo(name, frame) for frame in frames], faces, source, strength)

    def _follow(
        self, frames: list[np.ndarray], name: str, last: Face | None, choice: Choice
    ) -> list[Face | None]:
        """The person's face in each frame. The finder looks at whole frames until it finds the person, and
        then near the last place first."""
        if last is None and isinstance(self.detector, FinderDetector):
            for n, frame in enumerate(frames):
                last = self._first(self.detector([frame], [name])[0], choice)
                if last is not None:
                    return [None] * n + [last, *self._follow(frames[n + 1 :], name, last, choice)]
            return [None] * len(frames)
        faces: list[Face | None] = [None] * len(frames)
        if frames and isinstance(self.detector, FinderDetector):
            faces = self.detector.near(frames, last)
        missing = [n for n, face in enumerate(faces) if face is None]
        found = self.detector([frames[n] for n in missing], [name] * len(missing)) if missing else []
        rest = dict(zip(missing, found, strict=True))
        for n in range(len(frames)):
            if n in rest:
                faces[n] = nearest(rest[n], last) if last is not None else self._first(rest[n], choice)
            last = faces[n] or last
        return faces

    def _first(self, faces: Sequence[Face], choice: Choice) -> Face | None:
        # A later frame may show all the faces that a number counts.
        if isinstance(choice, int) and choice >= len(faces):
            return None
        return self.choose(faces, choice)


def counted(faces: int) -> str:
    """How many faces a picture shows and how they are numbered, for messages."""
    return f"there {'is 1 face' if faces == 1 else f'are {faces} faces'}, numbered from 0 from the left"


def nearest(faces: Sequence[Face], last: Face) -> Face | None:
    """The face closest to where the last one was, at most 1.5 of its sizes away."""

    def distance(face: Face) -> float:
        dx = face.box[0] + face.box[2] - last.box[0] - last.box[2]
        dy = face.box[1] + face.box[3] - last.box[1] - last.box[3]
        return math.hypot(dx, dy) / 2

    best = min(faces, key=distance, default=None)
    return best if best is not None and distance(best) <= 1.5 * last.size else None


def profile(points: Tensor) -> Tensor:
    """98 points (B, 98, 2) -> (B,) bool: the nose tip lies beside one eye, or beyond it."""
    left, right, nose = points[:, 60:68].mean(1), points[:, 68:76].mean(1), points[:, 54]
    along = right - left
    share = ((nose - left) * along).sum(-1) / along.square().sum(-1).clamp_min(1e-6)
    return (share - 0.5).abs() > 0.5 - PROFILE
