"""Clusters of a vocabulary, built from the rows of an output head that came without, and kept in a file.

The rows of the published clustered heads (E2B, E4B) were clustered while they were trained; what is built here knows
nothing but the rows, so more drafts are lost. Only drafts: the text is the target's in any case. Owns the clustering
and its file. Plain numpy on rows; knows no network and no checkpoint.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mlx_mtp.kept import write_whole

VERSION = 1  # of what `build` computes: a file of another one is not read
PASSES = 4  # of k-means; of the tables at hand one gains nothing by them, the other most of it by these
POWER_STEPS = 8  # towards the direction in which rows differ most; only where a cut falls depends on it
CHOICES = 32  # clusters that a row applies to before the full ones are left out of its list
CHUNK_BYTES = 64 * 2**20  # of scores held at a time

Progress = Callable[[int, int], None]  # (done bytes, total bytes) of rows gone through


@dataclass(frozen=True)
class Clustering:
    """centroids [C, h] float32; cluster c owns the tokens ordering[c * V / C : (c + 1) * V / C] (int32)."""

    centroids: np.ndarray
    ordering: np.ndarray


def best_count(vocabulary: int, top: int) -> int:
    """How many equal clusters let a head that scores `top` of them read the fewest rows; at least `top`.

    262144 tokens: 2048 clusters at top 32, as in the published drafters.
    """
    counts = [c for c in range(top, vocabulary + 1) if vocabulary % c == 0]
    return min(counts, key=lambda c: (c + top * vocabulary // c, c))


# building -------------------------------------------------------------------------------------------------


def build(rows: np.ndarray, count: int, progress: Progress | None = None) -> Clustering:
    """Cluster rows [V, h] float32 into `count` equal parts: k-means over their directions, the same for the same rows.

    A centroid has the mean direction of its rows and the length of the longest: nearly the best score a row of it
    can have, which is what clusters are chosen by. Starts from halves of halves, cut where rows differ most.
    """
    size, tell = len(rows) // count, progress or (lambda done, total: None)
    directions = _normed(rows)
    ordering = _halved(directions, np.arange(len(rows)), count)
    for done in range(1, PASSES + 1):
        tell(done * rows.nbytes, (PASSES + 1) * rows.nbytes)
        ordering = _assigned(directions, _normed(_means(directions, ordering, count)), size)
    tell((PASSES + 1) * rows.nbytes, (PASSES + 1) * rows.nbytes)
    longest = np.linalg.norm(rows, axis=1)[ordering].reshape(count, size).max(axis=1)
    means = _normed(_means(directions, ordering, count))
    return Clustering(means * longest[:, None], ordering.astype(np.int32))


def _normed(x: np.ndarray) -> np.ndarray:
    """[n, h] with rows of length 1; a row of zeros stays one."""
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.float32(1e-12))


def _means(rows: np.ndarray, ordering: np.ndarray, count: int) -> np.ndarray:
    """The mean row of each cluster, [C, h]."""
    return np.stack([rows[members].mean(axis=0) for members in ordering.reshape(count, -1)])


def _halved(rows: np.ndarray, ids: np.ndarray, parts: int) -> np.ndarray:
    """ids ordered so that equal consecutive parts lie together: cut across the main direction, each side again."""
    if parts == 1:
        return ids
    mine = rows[ids]
    mean = mine.mean(axis=0)
    main = mine[np.argmax(np.linalg.norm(mine - mean, axis=1))] - mean
    for _ in range(POWER_STEPS):
        along = mine @ main - mean @ main
        main = along @ mine - along.sum() * mean
        main /= max(float(np.linalg.norm(main)), 1e-12)
    left = parts // 2
    order = ids[np.argsort(mine @ main, kind="stable")]
    cut = len(ids) // parts * left
    return np.concatenate([_halved(rows, order[:cut], left), _halved(rows, order[cut:], parts - left)])


def _assigned(rows: np.ndarray, centres: np.ndarray, size: int) -> np.ndarray:
    """Rows in `size` places of each centre, [V] ordered by centre: nobody and no centre would both rather be paired.

    Deferred acceptance (Gale and Shapley 1962): a row applies to its best centres in turn, a centre keeps the best
    `size` that have applied. Rows refused by all of their CHOICES apply to the centres with room left.
    """
    owner = np.full(len(rows), -1)
    while (waiting := np.flatnonzero(owner < 0)).size:
        room = size - np.bincount(owner[owner >= 0], minlength=len(centres))
        free = np.flatnonzero(room)
        choice, score = _best(rows, waiting, centres[free])
        accepted = _accepted(choice, score, room[free])
        taken = accepted >= 0
        owner[waiting[taken]] = free[accepted[taken]]
    return np.argsort(owner, kind="stable")


def _best(rows: np.ndarray, which: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best CHOICES centres of the rows named, falling: (index, score), [n, CHOICES] or fewer."""
    most, step = min(CHOICES, len(centres)), max(1, CHUNK_BYTES // (4 * len(centres)))
    indices, scores = [], []
    for first in range(0, len(which), step):
        score = rows[which[first : first + step]] @ centres.T
        best = np.argpartition(-score, most - 1, axis=1)[:, :most]
        best.sort(axis=1)  # equal scores: the lower index first
        order = np.argsort(-np.take_along_axis(score, best, axis=1), axis=1, kind="stable")
        indices.append(np.take_along_axis(best, order, axis=1))
        scores.append(np.take_along_axis(score, indices[-1], axis=1))
    return np.concatenate(indices), np.concatenate(scores)


def _accepted(choice: np.ndarray, score: np.ndarray, room: np.ndarray) -> np.ndarray:
    """The centre of each applicant [n], -1 where all that it applied to refused; choice and score [n, m]."""
    n, m = choice.shape
    turn, who = np.zeros(n, np.int64), np.arange(n)
    while True:
        alive = who[turn < m]
        at, value = choice[alive, turn[alive]], score[alive, turn[alive]]
        order = np.lexsort((alive, -value, at))
        begins = np.searchsorted(at[order], np.arange(len(room)))
        rank = np.arange(len(alive)) - begins[at[order]]
        refused = alive[order[rank >= room[at[order]]]]
        if not refused.size:
            found = np.full(n, -1)
            found[alive] = at
            return found
        turn[refused] += 1


# keeping --------------------------------------------------------------------------------------------------


def key_of(rows: np.ndarray, count: int) -> str:
    """What a file of clusters is named by: a digest of the rows, how many clusters, and VERSION."""
    digest = hashlib.sha256(f"{VERSION} {count} {rows.shape} {rows.dtype}".encode())
    digest.update(np.ascontiguousarray(rows).data)
    return digest.hexdigest()[:32]


def stored(places: Sequence[Path], key: str, shape: tuple[int, int, int]) -> Clustering | None:
    """The clusters kept under a key in the first place that has them whole; shape: (V, h, C)."""
    for place in places:
        try:
            with _file(place, key).open("rb") as stream, np.load(stream, allow_pickle=False) as held:
                found = Clustering(held["centroids"], held["ordering"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
        if _whole(found, shape):
            return found
    return None


def store(places: Sequence[Path], key: str, clustering: Clustering) -> Path | None:
    """Keep clusters in the first place that can be written to; None if none can."""

    def write(stream: BinaryIO) -> None:
        np.savez(stream, centroids=clustering.centroids, ordering=clustering.ordering)

    files = (_file(place, key) for place in places)
    return next((file for file in files if write_whole(file, write)), None)


def _file(place: Path, key: str) -> Path:
    # Not .safetensors: a checkpoint is every such file in its folder.
    return place / f"drafter-clusters-{key}.npz"


def _whole(found: Clustering, shape: tuple[int, int, int]) -> bool:
    vocabulary, hidden, count = shape
    centroids, ordering = found.centroids, found.ordering
    sizes = centroids.shape == (count, hidden) and ordering.shape == (vocabulary,)
    types = centroids.dtype == np.float32 and ordering.dtype == np.int32
    return (
        sizes and types and bool(np.isfinite(centroids).all()) and np.array_equal(np.sort(ordering), range(vocabulary))
    )
