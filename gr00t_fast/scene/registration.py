"""Where a picture lies upon another one of the same scene: OpenCV's ECC registration, begun from SIFT's matches, blind to light and to what is new.

All pictures are SIZE. A place is a homography (3, 3) float32 from the pixels of the recorded picture to those of the live one. OpenCV is imported in
the functions, because it changes the environment. Axis alphabet: H, W height and width of SIZE, N blocks of the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SIZE = (320, 240)  # width, height: half of what most cameras are recorded with
BLOCK = 20  # pixels a side
MARGIN = 14  # at the border the local mean leans on pixels that are not there
LEAST_BLOCKS = 12  # with texture; fewer show nothing to compare
LEAST_MATCHES = 8  # of SIFT that agree on one affine map
DARKEST, BRIGHTEST = 3, 250  # of 255: beyond these a channel says nothing
_FINE, _COARSE = 1.2, 8.0  # pixels: noise is smoothed away below, light above
_FLOOR = 0.02  # of log brightness: what is flatter is noise
_TEXTURE = 0.05  # least variance of a block
AGREES = 0.9  # of the median correlation; a block below it shows something else, at least in part
_CURVED = 2.0  # pixels from which on a homography is fitted: its two further numbers are noise where nothing was moved
_HALVED = np.array([[1, 1, 0.5], [1, 1, 0.5], [2, 2, 1]], np.float32)  # by element: a place as one between pictures of half the size
AFFINE, HOMOGRAPHY = 2, 3  # OpenCV's MOTION_AFFINE, MOTION_HOMOGRAPHY
IDENTITY = np.eye(3, dtype=np.float32)
CENTRES = np.stack(np.meshgrid(np.arange(BLOCK / 2, SIZE[0], BLOCK), np.arange(BLOCK / 2, SIZE[1], BLOCK)), -1).reshape(-1, 2) - 0.5  # (N, 2)


def shrunk(picture: np.ndarray, size: tuple[int, int] = SIZE) -> np.ndarray:
    """(height, width, ...) of any size as (H, W, ...)."""
    import cv2

    return cv2.resize(np.ascontiguousarray(picture), size, interpolation=cv2.INTER_AREA)


def blurred(values: np.ndarray, pixels: float) -> np.ndarray:
    """By a Gaussian, float32 (H, W, ...)."""
    import cv2

    return cv2.GaussianBlur(values.astype(np.float32), (0, 0), pixels)


def warped(live: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The live picture, or another array (H, W, ...), as it lies upon the recorded one; bool: without values in between."""
    import cv2

    how = cv2.INTER_NEAREST if live.dtype == bool else cv2.INTER_LINEAR
    found = cv2.warpPerspective(live.astype(np.uint8) if live.dtype == bool else live, place, SIZE, flags=cv2.WARP_INVERSE_MAP | how)
    return found > 0 if live.dtype == bool else found


@dataclass(frozen=True)
class View:
    """A picture uint8 RGB (H, W, 3), and where of it there is anything to compare, bool (H, W)."""

    picture: np.ndarray
    usable: np.ndarray

    @classmethod
    def of(cls, picture: np.ndarray) -> View:
        """A camera's view: everything but the border and what is black or white in all colours."""
        usable = np.zeros(SIZE[::-1], bool)
        usable[MARGIN:-MARGIN, MARGIN:-MARGIN] = True
        return cls(picture, usable & ((picture > DARKEST) & (picture < BRIGHTEST)).any(-1))

    def mirrored(self) -> View:
        return View(np.ascontiguousarray(self.picture[:, ::-1]), np.ascontiguousarray(self.usable[:, ::-1]))

    @cached_property
    def structure(self) -> np.ndarray:
        """float32 (H, W): logarithm of brightness by its local mean and deviation, of the colours that are neither black nor white. The same in
        another light, in another colour of light, and under a vignette."""
        weight = 1.01 - (blurred((self.picture <= DARKEST) | (self.picture >= BRIGHTEST), 0.5) > 0.1)
        seen = blurred(np.log(self.picture.astype(np.float32) + 8), _FINE)
        detail = seen - blurred(seen, _COARSE)
        strength = np.sqrt(blurred(detail * detail, 1.5 * _COARSE) + _FLOOR**2)
        found: np.ndarray = ((detail / strength * weight).sum(-1) / weight.sum(-1)).astype(np.float32)
        return found

    @cached_property
    def half(self) -> np.ndarray:
        return shrunk(self.structure, (SIZE[0] // 2, SIZE[1] // 2))

    @cached_property
    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """SIFT's points (F, 2) and descriptors (F, 128)."""
        import cv2

        grey = cv2.createCLAHE(3, (8, 8)).apply(cv2.cvtColor(self.picture, cv2.COLOR_RGB2GRAY))
        points, descriptors = cv2.SIFT_create(500, contrastThreshold=0.02).detectAndCompute(grey, None)  # type: ignore[attr-defined]
        return np.array([point.pt for point in points], np.float32).reshape(-1, 2), np.empty((0, 128)) if descriptors is None else descriptors


def _sums(values: np.ndarray) -> np.ndarray:
    """(H, W) to (N,)."""
    return values.reshape(SIZE[1] // BLOCK, BLOCK, SIZE[0] // BLOCK, BLOCK).sum((1, 3)).reshape(-1)


def agreement(trained: View, live: View, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of each block (N,), and which blocks can tell, bool (N,). A new object, a hand or a shadow spoil their own blocks alone."""
    both = (trained.usable & warped(live.usable, place)).astype(np.float32)
    one, other, count = trained.structure, warped(live.structure, place), _sums(both) + 1e-6
    mean_one, mean_other = _sums(one * both) / count, _sums(other * both) / count
    varied = _sums(one * one * both) / count - mean_one**2
    product = varied * (_sums(other * other * both) / count - mean_other**2)
    correlation = (_sums(one * other * both) / count - mean_one * mean_other) / np.sqrt(np.maximum(product, 1e-6))
    return correlation, (count > 0.4 * BLOCK**2) & (varied > _TEXTURE)


def agreeing(trained: View, live: View, place: np.ndarray) -> np.ndarray:
    """Blocks that show the same, bool (N,)."""
    correlation, tells = agreement(trained, live, place)
    return tells & (correlation > AGREES * np.median(correlation[tells])) if tells.any() else tells


def score(trained: View, live: View, place: np.ndarray) -> float:
    """Median of the blocks' correlation; 0 where there is too little to compare."""
    correlation, tells = agreement(trained, live, place)
    return float(np.median(correlation[tells])) if tells.sum() >= LEAST_BLOCKS else 0.0


def candidates(trained: View, live: View) -> Iterator[np.ndarray]:
    """Places to begin from: as it is, where SIFT's matches say (which finds what was moved or turned far), upside down."""
    import cv2

    yield IDENTITY
    (points, descriptors), (live_points, live_descriptors) = trained.features, live.features
    if min(len(points), len(live_points)) >= LEAST_MATCHES:
        pairs = [pair for pair in cv2.BFMatcher().knnMatch(descriptors, live_descriptors, k=2) if pair[0].distance < 0.85 * pair[-1].distance]
        if len(pairs) >= LEAST_MATCHES:
            ends = points[[pair[0].queryIdx for pair in pairs]], live_points[[pair[0].trainIdx for pair in pairs]]
            found, inside = cv2.estimateAffine2D(*ends, ransacReprojThreshold=4)
            if found is not None and inside.sum() >= LEAST_MATCHES:
                yield np.vstack([found, [0, 0, 1]]).astype(np.float32)
    yield np.array([[-1, 0, SIZE[0] - 1], [0, -1, SIZE[1] - 1], [0, 0, 1]], np.float32)


def _ecc(trained: np.ndarray, live: np.ndarray, begun: np.ndarray, both: np.ndarray, steps: int, kind: int = AFFINE) -> np.ndarray:
    """`begun` where it does not converge, or where nothing is left to compare."""
    import cv2

    start = (begun if kind == HOMOGRAPHY else begun[:2] / begun[2, 2]).astype(np.float32)  # type: ignore[var-annotated]
    try:
        found = cv2.findTransformECC(trained, live, start, kind, (3, steps, 1e-4), both.astype(np.uint8), 1)[1]  # 3: by steps and by change
    except cv2.error:
        return begun
    found = found if kind == HOMOGRAPHY else np.vstack([found, [0, 0, 1]])
    return (found / found[2, 2]).astype(np.float32)


def roughly(trained: View, live: View, begun: np.ndarray) -> tuple[float, np.ndarray]:
    """Score and place after one round on pictures of half the size; those of `begun` where that does not better it."""
    both = trained.usable & warped(live.usable, begun)
    place = _ecc(trained.half, live.half, begun * _HALVED, both[::2, ::2], 20) / _HALVED
    scores = score(trained, live, begun), score(trained, live, place)
    return (scores[1], place) if scores[1] > scores[0] else (scores[0], begun)


def _refined(trained: View, live: View, place: np.ndarray, rounds: int, kind: int = AFFINE) -> np.ndarray:
    """ECC from `place`, each time over the blocks that agree there: what is new in the picture has no say."""
    for _ in range(rounds):
        both, good = trained.usable & warped(live.usable, place), agreeing(trained, live, place)
        if good.sum() >= LEAST_BLOCKS:
            both &= np.kron(good.reshape(SIZE[1] // BLOCK, -1), np.ones((BLOCK, BLOCK), bool))
        place = _ecc(trained.structure, live.structure, place, both, 40, kind)
    return place


def register(trained: View, live: View, begun: np.ndarray) -> np.ndarray:
    """The place to a fraction of a pixel: affine, which noise moves least; a homography where the camera was moved by more than that can follow."""
    place = _refined(trained, live, begun, 4)
    if shift_of(at(place, CENTRES), np.ones(len(CENTRES), bool))[0] <= _CURVED:
        return place
    best = max((begun, place), key=lambda each: score(trained, live, each))
    curved = _refined(trained, live, best, 2, HOMOGRAPHY)
    return curved if score(trained, live, curved) > score(trained, live, best) - 0.02 else best


def at(place: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 2) of the recorded picture in the live one."""
    moved = np.c_[points, np.ones(len(points))] @ place.T.astype(np.float64)
    return moved[:, :2] / moved[:, 2:]


def shift_of(points: np.ndarray, where: np.ndarray) -> tuple[float, dict[str, float]]:
    """By how many pixels of SIZE the picture has moved whose CENTRES are at points (N, 2), as root mean square of the blocks `where`, bool (N,). And
    its parts: right and down at the middle in pixels, `roll` clockwise in degrees, `zoom` as a share."""
    where = where if where.sum() >= 3 else np.ones(len(where), bool)
    middle = (np.array(SIZE) - 1) / 2
    one, other = CENTRES[where] - middle, points[where] - middle
    (a, b), (c, d), (right, down) = np.linalg.lstsq(np.c_[one, np.ones(len(one))], other, rcond=None)[0]  # other = one @ [[a, b], [c, d]] + ...
    parts = {"right": right, "down": down, "roll": np.rad2deg(np.arctan2(b - c, a + d)), "zoom": np.hypot(a + d, b - c) / 2 - 1}
    return float(np.sqrt(((other - one) ** 2).sum(1).mean())), {name: float(value) for name, value in parts.items()}
