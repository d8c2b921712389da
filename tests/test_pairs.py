"""Which drafter belongs to which target, and what is said of one that does not fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from mlx_mtp.drafters.mtp import KIND
from mlx_mtp.models.config import AssistantConfig, LayerConfig, TextConfig
from mlx_mtp.pairs import KNOWN, NATIVE, check_pair, find_drafter, offers, poor_acceptance
from mlx_mtp.rows import PairingError

GB = 1e9
SLIDING = LayerConfig(512, 0, 8, 2, 256, False, 64, 1e4, 1.0, 128)
FULL = LayerConfig(None, 1, 8, 4, 512, True, 64, 1e6, 1.0, 64)
assert KIND.network is not None
MTP = KIND.network
NAMES = ("google/gemma-4-31B-it", "google/gemma-4-E2B-it-assistant")


def text(*layers: LayerConfig, hidden: int = 5376, vocab: int = 1024) -> TextConfig:
    return TextConfig(vocab, hidden, 1e-6, layers, 4096, None, 0, 0, None, (1,))


def assistant(*layers: LayerConfig, backbone: int = 5376, vocab: int = 1024) -> AssistantConfig:
    borrowing = tuple(replace(layer, owner=-1) for layer in layers)
    return AssistantConfig(text(*borrowing, hidden=64, vocab=vocab), backbone, None)


TARGET = text(SLIDING, FULL)


def misfit(drafter: AssistantConfig, target: TextConfig = TARGET, names: tuple[str, str] = NAMES) -> str:
    with pytest.raises(PairingError) as caught:
        check_pair(MTP, target, drafter, names)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_drafter_that_fits_passes_without_a_word() -> None:
    assert check_pair(MTP, TARGET, assistant(SLIDING, SLIDING, FULL), NAMES) == []


def test_a_base_model_is_a_warning_and_no_error() -> None:
    (note,) = check_pair(MTP, TARGET, assistant(SLIDING, FULL), NAMES, base_model=True)
    assert note.startswith("google/gemma-4-31B-it has no chat template")


def test_the_message_for_another_size_names_the_right_drafter() -> None:
    assert misfit(assistant(SLIDING, FULL, backbone=1536)) == (
        "drafter expects hidden size 1536, target has 5376; the drafter of gemma-4-31B-it is gemma-4-31B-it-assistant"
    )


def test_a_nameless_target_is_known_by_its_size_or_not_at_all() -> None:
    drafter = assistant(SLIDING, FULL, backbone=1)
    names = ("my-model", "my-drafter")
    assert "the drafter of gemma-4-31B-it is" in misfit(drafter, names=names)
    other = text(SLIDING, FULL, hidden=100)
    assert misfit(drafter, other, names).endswith("use the drafter that was trained for my-model")


@pytest.mark.parametrize(
    ("drafter", "complaint"),
    [
        (assistant(SLIDING, FULL, vocab=1000), "vocabulary 1000, target has 1024"),
        (assistant(replace(SLIDING, head_dim=128)), "layer 0 expects heads of size 128, target has 256"),
        (
            assistant(SLIDING, replace(FULL, head_dim=256)),
            "layer 1 expects heads of size 256, target has 512",
        ),
        (assistant(replace(SLIDING, kv_heads=4)), "key heads numbering 4, target has 2"),
        (assistant(replace(SLIDING, window=1024)), "sliding window of 1024, target has 512"),
        (assistant(replace(SLIDING, rope_theta=5.0)), "RoPE base of 5.0, target has 10000.0"),
        (assistant(replace(FULL, rotated=32)), "rotated frequencies numbering 32, target has 64"),
        (assistant(replace(FULL, rope_factor=8.0)), "RoPE factor of 8.0, target has 1.0"),
        (assistant(replace(FULL, heads=6)), "has 6 heads, expected a multiple of the target's 4"),
    ],
)
def test_every_size_that_must_agree_is_compared(drafter: AssistantConfig, complaint: str) -> None:
    assert complaint in misfit(drafter)


def test_a_drafter_reads_the_last_layers_that_own_their_keys() -> None:
    """Layer 2 borrows from layer 0, and what it says of key heads is of no concern."""
    shared = text(SLIDING, FULL, replace(SLIDING, owner=0, kv_heads=8), replace(FULL, kv_heads=8))
    assert check_pair(MTP, shared, assistant(SLIDING, FULL), NAMES) == []


@pytest.mark.parametrize(("layer", "kind"), [(FULL, "sliding"), (SLIDING, "full")])
def test_a_kind_of_layer_that_the_target_lacks_is_an_error(layer: LayerConfig, kind: str) -> None:
    target = text(replace(layer, owner=0))
    assert f"reads a {kind} layer, target has none" in misfit(assistant(SLIDING, FULL), target)


@pytest.mark.parametrize(
    ("target", "drafter"),
    [
        ("google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"),
        ("google/gemma-4-26B-A4B-it", "google/gemma-4-26B-A4B-it-assistant"),
        ("mlx-community/gemma-4-26b-a4b-it-4bit", "google/gemma-4-26B-A4B-it-assistant"),
        ("mlx-community/gemma-4-31B-it-OptiQ-4bit", "google/gemma-4-31B-it-assistant"),
        ("mlx-community/gemma-4-e4b-it-mxfp4", "google/gemma-4-E4B-it-assistant"),
        ("mlx-community/gemma-4-12B-it-qat-4bit", "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant"),
        (
            "google/gemma-4-E2B-it-qat-q4_0-unquantized",
            "google/gemma-4-E2B-it-qat-q4_0-unquantized-assistant",
        ),
        ("google/gemma-4-E2B", None),
        ("google/gemma-4-E2B-it-assistant", None),
        ("mlx-community/gemma-4-E2B-it-assistant-bf16", None),
        ("google/gemma-4-2B-it", None),
        ("google/gemma-4-E2B-italian", None),
        ("google/gemma-3-12b-it", None),
        ("gemma-4-E2B-it", None),
        ("/models/gemma-4-E2B-it", None),
    ],
)
def test_a_hub_target_is_known_by_its_name(target: str, drafter: str | None) -> None:
    assert find_drafter(target) == drafter


@pytest.mark.parametrize(
    ("folder", "place"),
    [
        ("gemma-4-E2B-it", "gemma-4-E2B-it-assistant"),
        ("my-model-4bit", "my-model-4bit-assistant"),
        ("my-model-4bit", "my-model-assistant"),
        ("my-model-mxfp4", "my-model-assistant-bf16"),
        ("target", "drafter"),
        ("target", "assistant"),
        ("target", "target/assistant"),
    ],
)
def test_a_folders_drafter_is_looked_for_beside_and_inside_it(tmp_path: Path, folder: str, place: str) -> None:
    (tmp_path / folder).mkdir()
    assert find_drafter(str(tmp_path / folder)) is None
    (tmp_path / place).mkdir()
    assert find_drafter(str(tmp_path / folder)) is None, "an empty folder is no drafter"
    (tmp_path / place / "config.json").write_text("{}")
    assert find_drafter(str(tmp_path / folder)) == str((tmp_path / place).resolve())


def test_a_drafter_named_after_its_target_comes_before_one_that_is_merely_near(tmp_path: Path) -> None:
    for name in ("target", "target-assistant", "drafter"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert find_drafter(str(tmp_path / "target")) == str((tmp_path / "target-assistant").resolve())


def test_sizes_follow_from_parameters_and_bits() -> None:
    e2b, moe = KNOWN[0], KNOWN[3]
    assert e2b.target == "google/gemma-4-E2B-it" and e2b.drafter == "google/gemma-4-E2B-it-assistant"
    assert moe.copies[0].id == "mlx-community/gemma-4-26b-a4b-it-4bit"
    assert e2b.target_bytes(16) == pytest.approx(2 * 4.63 * GB)


def test_every_known_target_finds_its_own_drafter() -> None:
    for pair in KNOWN:
        assert find_drafter(pair.target) == find_drafter(pair.copies[0].id) == pair.drafter


def test_a_copy_is_as_large_as_its_feed_forward_layers_make_it() -> None:
    """The towers, which both copies have alike, are in the files and not in memory."""
    for pair in KNOWN:
        uniform, wider = pair.copies
        assert uniform.uniform and not wider.uniform and wider.mlp_bits == 8
        larger = pair.target_bytes(4, 8) - pair.target_bytes(4)
        assert larger == pytest.approx((wider.file_gb - uniform.file_gb) * GB, abs=0.02 * GB)
        assert pair.target_bytes(4) < uniform.file_gb * GB


def test_a_copy_that_is_larger_than_its_name_says_is_no_uniform_one() -> None:
    sizes = {o.target: o for o in offers() if o.kind == "mtp" and o.size == "12B"}
    true, wider = sizes["mlx-community/gemma-4-12B-it-4bit"], sizes["mlx-community/gemma-4-12B-it-qat-4bit"]
    assert true.uniform and true.target_bytes == pytest.approx(6.70 * GB, rel=0.001)
    assert not wider.uniform and wider.target_bytes == pytest.approx(10.95 * GB, rel=0.001)
    assert wider.drafter == "google/gemma-4-12B-it-qat-q4_0-unquantized-assistant"


def test_a_target_that_brings_its_drafter_along_is_one_repository_and_lends_it_to_its_small_copy() -> None:
    for pair in NATIVE:
        whole, small = (o for o in offers() if o.kind == "qwen_mtp" and o.drafter == pair.drafter)
        assert whole.target == whole.drafter == f"Qwen/{pair.size}"
        assert (small.target, small.bits) == (f"mlx-community/{pair.size}-4bit", 4)
        assert whole.weight_bytes == pytest.approx(2 * (pair.params + pair.drafter_params), abs=1)


def test_the_largest_target_is_offered_with_every_kind() -> None:
    kinds = {o.kind: o for o in offers() if o.target == KNOWN[-1].target}
    assert list(kinds) == ["mtp", "dflash", "draft_model"]
    assert kinds["draft_model"].weight_bytes == pytest.approx(2 * (30.7 + 4.63) * GB)


@pytest.mark.parametrize(
    ("kept", "judged", "doubted"), [(0, 10, False), (0, 11, True), (3, 11, False), (50, 200, True), (75, 200, False)]
)
def test_a_drafter_is_doubted_once_too_few_of_its_first_tokens_were_kept(kept: int, judged: int, doubted: bool) -> None:
    said = poor_acceptance(kept, judged, TARGET, NAMES)
    assert (said is not None) == doubted
    if said:
        assert f"keeps {kept / judged:.0%} of what" in said and f"({kept} of {judged})" in said
        assert "the drafter of gemma-4-31B-it is gemma-4-31B-it-assistant" in said and "--drafter none" in said


def test_no_drafter_is_doubted_before_it_has_drafted() -> None:
    assert poor_acceptance(0, 0, TARGET, NAMES) is None
