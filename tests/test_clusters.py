"""Clusters built for a drafter that has none: equal parts, kept on disk, and a head that changes no text."""

import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checkpoints import read, write

import mlx_mtp
from mlx_mtp import clusters
from mlx_mtp.cli import main
from mlx_mtp.clusters import Clustering
from mlx_mtp.load import load_pair
from mlx_mtp.rows import RequestError

MOE = Path(__file__).resolve().parent / "fixtures" / "tiny_moe"
PROMPTS = ["def add(self, other):\n    return", "import os\n\nclass Reader:\n"]


def rows_of(seed: int, count: int, hidden: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, hidden)).astype(np.float32)


@pytest.fixture
def pair(tmp_path, monkeypatch) -> Path:
    """A copy of the pair with a tied head, in a home of its own; the target's folder."""
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    shutil.copytree(MOE, tmp_path / "pair")
    return tmp_path / "pair" / "target"


def kept_files(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.rglob("*") if "clusters" in f.name)


# building ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocabulary", "top", "count"), [(262144, 32, 2048), (262144, 128, 4096), (2048, 8, 128)])
def test_the_number_of_clusters_reads_the_fewest_rows(vocabulary, top, count):
    assert clusters.best_count(vocabulary, top) == count
    assert clusters.best_count(7, 3) == 7, "a prime has no other equal parts"


@pytest.mark.parametrize(("count", "parts"), [(96, 8), (90, 6), (64, 64), (40, 1), (21, 7)])
def test_clusters_are_equal_parts_of_all_tokens_and_the_same_every_time(count, parts):
    rows = rows_of(count, count)
    made, again = clusters.build(rows, parts), clusters.build(rows, parts)
    assert made.centroids.shape == (parts, 8) and made.centroids.dtype == np.float32
    assert sorted(made.ordering) == list(range(count))
    assert np.array_equal(made.ordering, again.ordering) and np.array_equal(made.centroids, again.centroids)


def test_rows_that_point_the_same_way_come_together():
    ways = np.eye(8, dtype=np.float32)
    mine = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 16))
    rows = (ways[mine] + 0.05 * rows_of(1, 128)) * np.random.default_rng(2).uniform(0.5, 3, (128, 1)).astype(np.float32)
    made = clusters.build(rows, 8)
    parts = mine[made.ordering].reshape(8, 16)
    assert (parts == parts[:, :1]).all()
    for part, centroid in zip(made.ordering.reshape(8, 16), made.centroids, strict=True):
        assert np.argmax(centroid) == mine[part[0]]
        assert np.linalg.norm(centroid) == pytest.approx(np.linalg.norm(rows[part], axis=1).max(), rel=1e-5)


@pytest.mark.parametrize("choices", [3, 32])
def test_no_row_and_no_centre_would_both_rather_be_paired(choices, monkeypatch):
    monkeypatch.setattr(clusters, "CHOICES", choices)
    rows, centres, size = rows_of(3, 120), rows_of(4, 12), 10
    ordering = clusters._assigned(rows, centres, size)
    owner = np.empty(120, int)
    owner[ordering] = np.arange(120) // size
    score = rows @ centres.T
    worst = np.array([score[owner == c, c].min() for c in range(12)])
    envy = (score > score[np.arange(120), owner][:, None]) & (score > worst)
    if choices == 32:
        assert not envy.any()
    else:  # a row that used up its list no longer asks a full centre
        assert envy.sum() < 12 and sorted(ordering) == list(range(120))


def test_equal_rows_and_rows_of_zeros_are_clustered_too():
    made = clusters.build(np.zeros((32, 4), np.float32), 4)
    assert sorted(made.ordering) == list(range(32)) and not made.centroids.any()
    assert np.isfinite(clusters.build(np.ones((32, 4), np.float32), 8).centroids).all()


# keeping ----------------------------------------------------------------------------------------------------


def test_kept_clusters_come_back_and_no_other_file_is_left(tmp_path):
    rows = rows_of(5, 64)
    made, key = clusters.build(rows, 8), clusters.key_of(rows, 8)
    assert clusters.stored([tmp_path], key, (64, 8, 8)) is None
    file = clusters.store([tmp_path], key, made)
    assert file is not None and list(tmp_path.iterdir()) == [file]
    back = clusters.stored([tmp_path / "nowhere", tmp_path], key, (64, 8, 8))
    assert np.array_equal(back.ordering, made.ordering) and np.array_equal(back.centroids, made.centroids)


def test_a_place_that_cannot_be_written_to_is_passed_over(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    made = clusters.build(rows_of(5, 64), 8)
    assert clusters.store([blocked, tmp_path / "new" / "folder"], "k", made).parent == tmp_path / "new" / "folder"
    assert clusters.store([blocked], "k", made) is None


def test_other_rows_another_count_and_another_rule_have_other_keys(monkeypatch):
    rows = rows_of(6, 64)
    changed = rows.copy()
    changed[63, 7] += 1e-3
    keys = {clusters.key_of(rows, 8), clusters.key_of(changed, 8), clusters.key_of(rows, 4)}
    monkeypatch.setattr(clusters, "VERSION", clusters.VERSION + 1)
    assert len(keys | {clusters.key_of(rows, 8)}) == 4


BROKEN = {
    "twice the same token": lambda made: Clustering(made.centroids, np.zeros_like(made.ordering)),
    "another size": lambda made: Clustering(made.centroids[:-1], made.ordering),
    "another type": lambda made: Clustering(made.centroids.astype(np.float64), made.ordering),
    "not a number": lambda made: Clustering(made.centroids * np.nan, made.ordering),
}


@pytest.mark.parametrize("what", [*BROKEN, "half a file", "no file of this kind"])
def test_a_broken_file_is_not_used(what, tmp_path):
    made = clusters.build(rows_of(7, 64), 8)
    file = clusters.store([tmp_path], "k", BROKEN.get(what, lambda m: m)(made))
    if what == "half a file":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if what == "no file of this kind":
        file.write_text("clusters")
    assert clusters.stored([tmp_path], "k", (64, 8, 8)) is None


# loading ----------------------------------------------------------------------------------------------------


def test_a_drafter_gets_the_clusters_of_its_own_embedding(pair):
    model = load_pair(str(pair), clusters=8, dtype=mx.float32).drafter.model
    assert model.config.clusters == (128, 8)
    made = clusters.build(np.array(model.model.embed_tokens.weight), 128)
    assert np.array_equal(np.array(model.masked_embedding.token_ordering), made.ordering)
    assert np.array_equal(np.array(model.masked_embedding.centroids.weight), made.centroids)
    assert model.clusters.size == 16 and model.clusters.top == 8  # what the kernel takes


@pytest.mark.parametrize(
    ("quantize", "sampling"),
    [(None, mlx_mtp.GREEDY), (4, mlx_mtp.Sampling(temperature=0.8, top_p=0.95, seed=4))],
    ids=["greedy", "sampled, 4 bit"],
)
def test_the_text_is_the_same_with_built_clusters_and_fewer_drafts_are_kept(pair, quantize, sampling):
    def run(drafter_clusters, width):
        loaded = mlx_mtp.load(str(pair), drafter_clusters=drafter_clusters, quantize_drafter=quantize)
        done = loaded.generate(PROMPTS, sampling, width=width, max_tokens=16)
        return [d.tokens for d in done], sum(d.stats.kept for d in done)

    (text, few), (plain, _), (_, every) = run(2, 3), run(None, 0), run(None, 3)
    assert text == plain and 0 < few < every


def test_all_clusters_together_are_the_whole_vocabulary(pair, monkeypatch):
    monkeypatch.setattr(clusters, "PASSES", 0)
    # 2048 clusters of one token: what is scored is everything, in another order
    whole, every = mlx_mtp.load(str(pair)), mlx_mtp.load(str(pair), drafter_clusters=2048)
    prompt = whole.text.encode(PROMPTS[0])
    for got, wanted in zip(every.draft(prompt, 3), whole.draft(prompt, 3), strict=True):
        assert mx.allclose(got, wanted, atol=1e-4).item()


def test_clusters_are_built_once_and_again_when_the_embedding_changes(pair, tmp_path, monkeypatch):
    stages = []

    def builds() -> bool:
        stages.clear()
        assert load_pair(str(pair), clusters=8, report=lambda stage, *_: stages.append(stage)).notes == ()
        return any(stage.startswith("clustering") for stage in stages)

    assert builds()
    assert len(kept_files(tmp_path)) == 1 and len(kept_files(pair.parent / "drafter")) == 1
    assert not builds()
    drafter = read(pair.parent / "drafter")
    drafter.tensors["model.embed_tokens.weight"] = drafter.tensors["model.embed_tokens.weight"] * 2
    write(drafter, pair.parent / "drafter")
    assert builds()
    monkeypatch.setattr(clusters, "store", lambda places, key, made: None)
    monkeypatch.setattr(clusters, "stored", lambda places, key, shape: None)
    assert "neither" in load_pair(str(pair), clusters=8).notes[0]


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("moe", {"drafter_clusters": 0}, "clusters is 0; expected a number of clusters to score, 1 to 2048"),
        ("moe", {"drafter_clusters": 4096}, "clusters is 4096; expected"),
        ("moe", {"drafter_clusters": True}, "clusters is True; expected"),
        ("moe", {"drafter_clusters": 8, "drafter": None}, "there is no drafter to cluster"),
        ("tiny", {"drafter_clusters": 8}, "has 64 clusters of its own, of which it scores 8"),
    ],
)
def test_clusters_that_cannot_be_had_are_refused(target, options, said):
    with pytest.raises(RequestError, match=said):
        mlx_mtp.load("tiny" if target == "tiny" else str(MOE / "target"), **options)


def test_the_command_line_asks_for_clusters(pair, capsys):
    options = ["generate", "-m", str(pair), "--raw", "-n", "8", "--temperature", "0", PROMPTS[0]]
    assert main(options) == 0
    plain = capsys.readouterr().out
    assert main([*options, "--drafter-clusters", "8"]) == 0
    assert capsys.readouterr().out == plain and len(kept_files(pair.parent)) == 1
    assert main(["generate", "--drafter-clusters", "8", "x"]) == 2
    assert "clusters of its own" in capsys.readouterr().err
