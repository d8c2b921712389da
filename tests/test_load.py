"""Loading: layouts give the same network, packings the one they stand for, defects one line."""

import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints as ck
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FIXTURES
from passes import draft, logits
from random_checkpoints import MISFITS, misfit_drafter, random_tensors, target_config

from mlx_mtp import inside
from mlx_mtp.cache import Cache
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.load import LoadedPair, load_drafter, load_pair, load_target
from mlx_mtp.memory_budget import PairSize
from mlx_mtp.rows import GREEDY, CheckpointError, MlxMtpError, PairingError, RequestError, Sampling
from mlx_mtp.tensors import Tensor
from mlx_mtp.weights import Source, parameters, stored_dtype

SHAPES = ("edge", "dense", "moe", "unified")
CPU = mx.default_device().type == mx.DeviceType.cpu
F32 = mx.float32


def refusal(kind: type[MlxMtpError], target: Path, drafter: Path | None = None) -> str:
    """The one line that loading fails with, before any weight was read."""
    stages = []
    with pytest.raises(kind) as caught:
        load_pair(str(target), str(drafter) if drafter else None, report=lambda *step: stages.append(step))
    assert "\n" not in str(caught.value) and stages == []
    return str(caught.value)


def write_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(values))


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """A copy of the edge target, to be changed."""
    return Path(shutil.copytree(FIXTURES / "edge" / "target", tmp_path / "target"))


# ---- layouts -------------------------------------------------------------------------------------

LAYOUTS = {
    "text only": ck.text_only,
    "no prefix": ck.unprefixed,
    "mlx-lm": ck.mlx_community,
    "mlx-vlm": lambda c: ck.mlx_community(c, vision=True),
    "mlx text": ck.mlx_text,
    "table of exceptions": ck.per_layer_config,
    "ignorable tensors": ck.with_ignorable,
    "float32": ck.as_float32,
    "scalars without a shape": lambda c: replace(
        c, tensors={k: v.reshape(()) if k.endswith("layer_scalar") else v for k, v in c.tensors.items()}
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_gives_the_logits_of_the_reference(shape: str, tmp_path: Path) -> None:
    source, goldens = ck.read(FIXTURES / shape / "target"), np.load(FIXTURES / shape / "goldens.npz")
    ids = goldens["long/ids"]
    plain = logits(load_target(str(FIXTURES / shape / "target"), dtype=F32), ids)
    assert np.abs(plain - goldens["long/logits"]).max() < 1e-3
    for name, layout in LAYOUTS.items():
        folder = ck.write(layout(source), tmp_path / "layout", shards=3)
        np.testing.assert_array_equal(logits(load_target(str(folder), dtype=F32), ids), plain, err_msg=name)


def test_shards_without_an_index_are_read_too(tmp_path: Path) -> None:
    ids = np.arange(2, 12)
    folder = ck.write(ck.read(FIXTURES / "moe" / "target"), tmp_path / "t", shards=3, index=False)
    whole = load_target(str(FIXTURES / "moe" / "target"))
    np.testing.assert_array_equal(logits(load_target(str(folder)), ids), logits(whole, ids))


def test_a_drafter_named_unified_or_converted_by_mlx_is_the_same_drafter(tmp_path: Path) -> None:
    ids = np.arange(2, 30)
    for shape, change in (("dense", ck.as_unified), ("edge", ck.mlx_drafter), ("edge", ck.with_ignorable)):
        target = load_target(str(FIXTURES / shape / "target"))
        drafter = load_drafter(str(FIXTURES / shape / "assistant"), target)
        folder = ck.write(change(ck.read(FIXTURES / shape / "assistant")), tmp_path / "d", shards=2)
        other = load_drafter(str(folder), target)
        np.testing.assert_array_equal(draft(target, drafter, ids), draft(target, other, ids))


def test_towers_are_not_read(target: Path) -> None:
    """A tower of 256 MB, all of it a hole, follows the other tensors in their file."""
    file, tower_bytes = target / "model.safetensors", 256 * 2**20
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    place = [len(data), len(data) + tower_bytes]
    header["model.vision_tower.w"] = {"dtype": "BF16", "shape": [tower_bytes // 2], "data_offsets": place}
    start = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(start)) + start + data)
        stream.truncate(8 + len(start) + place[1])
    mx.reset_peak_memory()
    others = mx.get_active_memory()  # models that tests before this one keep
    loaded = load_target(str(target))
    assert mx.get_peak_memory() - others < tower_bytes / 4
    assert loaded.weight_bytes == load_target(str(FIXTURES / "edge" / "target")).weight_bytes


# ---- dtype, progress, defaults -------------------------------------------------------------------


@pytest.mark.skipif(not CPU, reason="the default there is the checkpoint's dtype")
def test_on_the_cpu_everything_becomes_float32_unless_asked_otherwise(tmp_path: Path) -> None:
    source = ck.mlx_community(random_tensors(target_config("edge")))
    folder = str(ck.write(ck.quantised(source, ck.Quant(4, 64)), tmp_path / "q"))
    for asked, expected in ((None, F32), (mx.bfloat16, mx.bfloat16), (mx.float16, mx.float16)):
        loaded = load_target(folder, dtype=asked)
        assert loaded.dtype == expected
        assert {v.dtype for v in parameters(loaded.model).values()} == {expected, mx.uint32}
        assert loaded.model.embed(mx.array([[3]])).dtype == expected
    with pytest.raises(RequestError, match="dtype is mlx.core.int8"):
        load_target(folder, dtype=mx.int8)
    with pytest.raises(RequestError, match="experts"):
        load_target(str(FIXTURES / "moe" / "target"), dtype=mx.bfloat16)


def test_the_stored_dtype_is_that_of_most_values_and_not_of_most_tensors() -> None:
    few = {str(i): Source(Tensor(Path("x"), str(i), "F32", (2,))) for i in range(3)}
    for dtype, expected in (("BF16", mx.bfloat16), ("F16", mx.float16), ("U32", F32)):
        assert stored_dtype(few | {"w": Source(Tensor(Path("x"), "w", dtype, (9, 9)))}) == expected


def test_a_drafter_takes_its_targets_dtype_and_its_ordering_becomes_int32() -> None:
    target, drafter = str(FIXTURES / "edge" / "target"), str(FIXTURES / "edge" / "assistant")
    model = load_pair(target, drafter, dtype=mx.bfloat16).drafter.model
    assert model.pre_projection.weight.dtype == mx.bfloat16
    assert model.masked_embedding.token_ordering.dtype == mx.int32


def test_progress_ends_with_all_bytes_of_each_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_mtp.weights.EVAL_BYTES", 2**16)
    seen = []
    target, drafter = str(FIXTURES / "edge" / "target"), str(FIXTURES / "edge" / "assistant")
    pair = load_pair(target, drafter, report=lambda *step: seen.append(step))
    first = [step for step in seen if step[0] == f"reading {target}"]
    assert len(first) > 5 and first[-1][1:] == (pair.target.weight_bytes,) * 2
    assert [done for _, done, _ in first] == sorted(done for _, done, _ in first)
    assert seen[-1] == (f"reading {drafter}", pair.drafter.weight_bytes, pair.drafter.weight_bytes)


@pytest.mark.skipif(not CPU, reason="only the CPU backend calls a compiler")
def test_without_a_compiler_the_networks_still_run(tmp_path: Path) -> None:
    """MLX keeps what it compiled in TMPDIR, so an empty one; without g++ it runs operation by operation."""
    target = str(FIXTURES / "edge" / "target")
    code = "import mlx.core as mx; from mlx_mtp.load import load_target; from mlx_mtp.cache import Cache\n"
    code += f"t = load_target({target!r}); c = Cache(t.model.specs, 7, t.dtype); c.join(64)\n"
    code += "mx.eval(t.model.forward(mx.array([[2, 3]]), c.open(slice(0, 1), 2)))"
    paths = {"PATH": "/nowhere", "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_defaults_come_from_the_generation_config(target: Path) -> None:
    loaded = load_target(str(target))
    assert loaded.sampling == Sampling(1.0, 64, 0.95) and loaded.eos == {1, 50, 106}
    file = target / "generation_config.json"
    write_json(file, do_sample=True, eos_token_id=7)
    assert load_target(str(target)).sampling == Sampling(1.0, 50, 1.0)
    assert load_target(str(target)).eos == {1, 7}
    write_json(file, do_sample=False, temperature=0.7)
    assert load_target(str(target)).sampling == GREEDY
    write_json(file, do_sample=True, repetition_penalty=1.1)
    assert load_target(str(target)).sampling == Sampling(1.0, 50, 1.0, repetition_penalty=1.1)
    write_json(file, repetition_penalty=1.1)
    assert load_target(str(target)).sampling == Sampling(0.0, repetition_penalty=1.1)
    file.unlink()
    assert load_target(str(target)).sampling == GREEDY and load_target(str(target)).eos == {1}


def test_a_default_that_cannot_be_honoured_is_noted(target: Path) -> None:
    write_json(target / "generation_config.json", typical_p=0.9, num_beams=1)
    notes = load_pair(str(target), None).notes
    assert len(notes) == 1 and "typical_p 0.9 is not supported" in notes[0]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"do_sample": True, "temperature": -1}, "temperature is -1"),
        ({"do_sample": True, "top_k": 2.5}, "top_k is 2.5"),
        ({"do_sample": True, "top_p": 7}, "top_p is 7"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"do_sample": "perhaps"}, "do_sample is 'perhaps'"),
        ({"eos_token_id": ["end"]}, "eos_token_id is"),
        ({"eos_token_id": -1}, "eos_token_id is -1"),
    ],
)
def test_absurd_defaults_are_refused(target: Path, values: dict, complaint: str) -> None:
    write_json(target / "generation_config.json", **values)
    assert complaint in refusal(CheckpointError, target)


# ---- pairs ---------------------------------------------------------------------------------------


def test_auto_takes_the_drafter_beside_its_target_and_checks_it(tmp_path: Path) -> None:
    target = Path(shutil.copytree(FIXTURES / "edge" / "target", tmp_path / "target"))
    pair = load_pair(str(target))
    assert pair.drafter is None and "no drafter is known for" in pair.notes[0]
    shutil.copytree(FIXTURES / "edge" / "assistant", tmp_path / "drafter")
    assert load_pair(str(target)).drafter.path == (tmp_path / "drafter").resolve()
    misfit_drafter(target, tmp_path / "drafter", "hidden")
    with pytest.raises(PairingError, match="hidden size"):
        load_pair(str(target))
    assert load_pair(str(target), None).drafter is None


def drafts_of(pair: LoadedPair) -> np.ndarray:
    tokens, scores = inside.draft(pair, mx.array([[2, 7, 11, 13, 5, 9]]), 3)
    return np.concatenate([np.array(tokens, dtype=np.float32).ravel(), np.array(scores).ravel()])


def test_a_drafter_merged_into_its_targets_tensors_is_the_one_that_stands_alone(tmp_path: Path) -> None:
    target, drafter = (ck.read(FIXTURES / "edge" / name) for name in ("target", "assistant"))
    folder = ck.write(ck.merged(ck.mlx_community(target), drafter), tmp_path / "merged", shards=2)
    pair = load_pair(str(folder), dtype=F32)
    apart = load_pair(str(FIXTURES / "edge" / "target"), str(FIXTURES / "edge" / "assistant"), dtype=F32)
    assert pair.notes == () and pair.drafter is not None
    assert pair.drafter.weight_bytes == apart.drafter.weight_bytes
    assert pair.target.weight_bytes == apart.target.weight_bytes
    np.testing.assert_array_equal(drafts_of(pair), drafts_of(apart))


def test_a_merged_target_that_lost_its_drafter_takes_the_one_beside_it(tmp_path: Path) -> None:
    target, drafter = (ck.read(FIXTURES / "edge" / name) for name in ("target", "assistant"))
    lost = replace(ck.merged(target, drafter), tensors=target.tensors)
    folder = ck.write(lost, tmp_path / "target")
    assert "its files hold none" in load_pair(str(folder)).notes[0]
    shutil.copytree(FIXTURES / "edge" / "assistant", tmp_path / "target-assistant")
    assert load_pair(str(folder)).drafter.path == (tmp_path / "target-assistant").resolve()


@pytest.mark.parametrize("name", ["assistant", "drafter", "mtp"])
def test_a_drafter_in_its_targets_folder_is_found(name: str, target: Path) -> None:
    shutil.copytree(FIXTURES / "edge" / "assistant", target / name)
    pair = load_pair(str(target))
    assert pair.drafter is not None and pair.drafter.path == (target / name)


@pytest.mark.parametrize("what", MISFITS)
def test_a_drafter_of_another_model_is_refused_before_weights_are_looked_at(
    what: str, target: Path, tmp_path: Path
) -> None:
    drafter = misfit_drafter(target, tmp_path / "d", what)
    assert "the drafter" in refusal(PairingError, target, drafter)
    for folder in (target, drafter):
        (folder / "model.safetensors").unlink()
    assert "drafter" in refusal(PairingError, target, drafter)
    loaded = load_target(str(FIXTURES / "edge" / "target"))
    with pytest.raises(PairingError):
        load_drafter(str(drafter), loaded)


def test_a_base_model_is_known_by_its_missing_template_and_warned_of(tmp_path: Path) -> None:
    folder = ck.write(ck.base_target(ck.read(FIXTURES / "edge" / "target")), tmp_path / "t")
    loaded, drafter = load_target(str(folder)), str(FIXTURES / "edge" / "assistant")
    assert loaded.base_model and not load_target(str(FIXTURES / "edge" / "target")).base_model
    for notes in (load_pair(str(folder), drafter).notes, load_drafter(drafter, loaded).notes):
        assert len(notes) == 1 and "base model" in notes[0]
    assert load_pair(str(folder), None).notes == ()


def test_a_drafter_is_not_taken_for_a_target() -> None:
    assert "a drafter" in refusal(CheckpointError, FIXTURES / "edge" / "assistant")


# ---- what it takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("quantize", [None, 4])
def test_a_pair_takes_what_its_headers_say_before_weights_are_read(
    shape: str, dtype: mx.Dtype, packed: bool, quantize: int | None, tmp_path: Path
) -> None:
    if CPU and shape == "moe" and not packed and dtype != F32:
        pytest.skip("MLX's CPU multiplies experts in float32 alone")
    source, folder = FIXTURES / shape / "target", tmp_path / "t"
    if packed:
        mixed = {"*.mlp.*": ck.Quant(8, 64)} if shape != "moe" else ck.MIXED_4_8
        ck.write(ck.quantised(ck.mlx_community(ck.read(source)), ck.Quant(4, 32), mixed), folder)
    else:
        shutil.copytree(source, folder)
    sizes = []
    pair = load_pair(
        str(folder), str(FIXTURES / shape / "assistant"), dtype=dtype, quantize=quantize, admit=sizes.append
    )
    (size,) = sizes
    assert (size.target_bytes, size.drafter_bytes) == (pair.target.weight_bytes, pair.drafter.weight_bytes)
    cache = Cache(pair.target.model.specs, MAX_WIDTH, dtype)
    drafter = pair.new_drafter(cache)
    for tokens in (1, 100, 4096):
        assert size.seq_bytes(tokens) == cache.row_bytes(tokens) + drafter.row_bytes(tokens)


def test_a_drafter_that_can_be_packed_says_what_that_saves() -> None:
    paths = (str(FIXTURES / "edge" / "target"), str(FIXTURES / "edge" / "assistant"))
    plain, packed = (load_pair(*paths, dtype=mx.bfloat16, quantize=bits).size for bits in (None, 4))
    assert plain.drafter_saves == plain.drafter_bytes - packed.drafter_bytes > 0
    assert packed.drafter_saves == 0


def test_what_is_not_admitted_is_not_read() -> None:
    def refuse(size: PairSize) -> None:
        raise RequestError(f"too large: {size.target_bytes}")

    stages = []
    with pytest.raises(RequestError, match="too large"):
        load_pair(str(FIXTURES / "edge" / "target"), None, admit=refuse, report=lambda *step: stages.append(step))
    assert stages == []


def test_a_stale_index_beside_a_whole_file_is_ignored_with_a_warning(target: Path) -> None:
    write_json(
        target / "model.safetensors.index.json",
        weight_map={"model.language_model.norm.weight": "model-00001-of-00002.safetensors"},
    )
    pair = load_pair(str(target), None)
    assert len(pair.notes) == 1 and "names none of the files there and is ignored" in pair.notes[0]
    assert load_target(str(target)).notes == pair.notes


# ---- bad input -----------------------------------------------------------------------------------

COMPLAINTS = {
    "missing_config": "config.json: no such file",
    "bad_json_config": "not readable as JSON",
    "config_not_an_object": "expected a JSON object",
    "unknown_model_type": "model_type is 'gemma9'",
    "no_model_type": "model_type is None",
    "missing_config_key": "hidden_size is None",
    "no_weights": "no *.safetensors file",
    "missing_shard": "model-00002-of-00003.safetensors, which is missing",
    "truncated_weights": "truncated",
    "bad_weights_header": "no safetensors file",
    "empty_weights": "(0 bytes)",
    "bad_json_index": "index.json: not readable as JSON",
    "index_names_wrong_file": "which does not hold it",
    "index_names_absent_tensor": "places phantom in",
    "missing_tensor": "tensors are missing, the first is",
    "unexpected_tensor": "1 tensors have no place",
    "wrong_shape": "has shape",
    "wrong_rank": "has shape",
    "integer_weight": "is I32; expected F32 or F16 or BF16",
    "packed_without_scales": "is U32; expected",
}


@pytest.mark.parametrize("defect", COMPLAINTS)
@pytest.mark.parametrize("part", ["target", "assistant"])
def test_a_broken_folder_is_refused_in_one_line(defect: str, part: str, tmp_path: Path) -> None:
    assert set(COMPLAINTS) == set(ck.DEFECTS) - set(ck.TOKENIZER_DEFECTS)
    broken = ck.break_folder(defect, FIXTURES / "edge" / part, tmp_path / "b")
    pair = (broken, None) if part == "target" else (FIXTURES / "edge" / "target", broken)
    assert COMPLAINTS[defect] in refusal(CheckpointError, *pair)


def with_tensor(folder: Path, name: str, value: mx.array | None) -> Path:
    """Replace, add or remove (None) one stored tensor, named by its end."""
    source = ck.read(folder)
    names = [k for k in source.tensors if k.endswith(name)] or [name]
    kept = {k: v for k, v in source.tensors.items() if k not in names}
    return ck.write(replace(source, tensors=kept | ({} if value is None else dict.fromkeys(names, value))), folder)


def packed_edge(folder: Path) -> Path:
    return ck.write(ck.quantised(ck.mlx_community(random_tensors(target_config("edge"))), ck.Quant(4, 64)), folder)


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("layers.0.mlp.up_proj.biases", None, "1 of"),
        ("layers.0.mlp.up_proj.weight", None, "has scales but no weight"),
        ("layers.0.mlp.up_proj.scales", mx.ones((256, 3)), "no MLX quantisation of 128 inputs"),
        ("layers.0.mlp.up_proj.scales", mx.ones((256, 1), mx.uint8), "no MLX quantisation"),
        ("layers.0.mlp.up_proj.scales", mx.ones((128, 2)), "has shape [128, 2]"),
        ("layers.0.mlp.up_proj.weight", mx.ones((256, 7), mx.uint32), "no MLX quantisation"),
        ("layers.0.mlp.up_proj.weight", mx.ones((256, 128)), "no MLX quantisation"),
        ("layers.0.mlp.up_proj.global_scale", mx.ones(()), "no place"),
        ("language_model.model.norm.scales", mx.ones((128,)), "no place"),
        ("language_model.model.layers.0.mlp.up_proj.weight_scale", mx.ones((1,)), "no place"),
    ],
)
def test_a_packing_that_is_not_mlxs_is_refused(name: str, value: mx.array, complaint: str, tmp_path: Path) -> None:
    assert complaint in refusal(CheckpointError, with_tensor(packed_edge(tmp_path / "t"), name, value))


def test_two_names_for_one_parameter_are_refused(target: Path) -> None:
    source = ck.read(target)
    ck.write(replace(source, tensors=source.tensors | {"norm.weight": mx.ones((64,))}), target)
    assert "are both norm.weight" in refusal(CheckpointError, target)


def test_fused_experts_of_another_width_are_refused_with_their_own_shape(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "moe" / "target", tmp_path / "t"))
    with_tensor(folder, "layers.0.experts.gate_up_proj", mx.zeros((12, 63, 64)))
    assert "has shape [12, 63, 64]; config.json asks for [12, 64, 64]" in refusal(CheckpointError, folder)


def test_an_ordering_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FIXTURES / "edge" / "assistant", tmp_path / "d"))
    with_tensor(folder, "token_ordering", mx.zeros((768,), mx.int64))
    with pytest.raises(CheckpointError, match="token_ordering is no ordering of 768 tokens"):
        load_pair(str(FIXTURES / "edge" / "target"), str(folder))


@pytest.mark.parametrize(
    ("file", "complaint"),
    [("model.gguf", "GGUF"), ("pytorch_model.bin", ".bin files; expected safetensors"), ("x.npz", ".npz")],
)
def test_other_formats_are_refused_by_name(file: str, complaint: str, target: Path) -> None:
    (target / "model.safetensors").rename(target / file)
    assert complaint in refusal(CheckpointError, target)
    (target / "config.json").unlink()
    assert complaint in refusal(CheckpointError, target)


def test_a_pointer_of_git_lfs_is_known(target: Path) -> None:
    (target / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(CheckpointError, target)


def test_quantisations_of_others_are_refused_by_config(target: Path) -> None:
    ck.edit_config(target, lambda c: c.update(quantization_config={"quant_method": "gemma"}))
    (target / "model.safetensors").unlink()
    assert "quantised by 'gemma'" in refusal(CheckpointError, target)


@pytest.mark.parametrize("entry", [{}, {"dtype": "BF16", "shape": [-1], "data_offsets": [0, 2]}, 3, None])
def test_a_broken_header_entry_is_named(entry: object, target: Path) -> None:
    header = json.dumps({"some.weight": entry}).encode()
    (target / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "header entry of some.weight is broken" in refusal(CheckpointError, target)


def test_a_header_that_does_not_match_its_data_is_refused(target: Path) -> None:
    file = target / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content + b"xx")
    assert "longer than its header says" in refusal(CheckpointError, target)
    file.write_bytes(content.replace(b'"shape":[64]', b'"shape":[63]', 1))
    assert "cannot take 128 bytes" in refusal(CheckpointError, target)
    file.write_bytes(content[:8] + b"[" + content[9:])
    assert "header is not JSON" in refusal(CheckpointError, target)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size"])
def test_sizes_beyond_reason_are_refused_in_one_line(key: str, target: Path) -> None:
    ck.edit_config(target, lambda c: ck.text_of(c).update({key: 2**40}))
    assert "config.json" in refusal(CheckpointError, target)
    ck.edit_config(target, lambda c: ck.text_of(c).update(num_hidden_layers=5000, layer_types=None))
    assert "num_hidden_layers is 5000" in refusal(CheckpointError, target)
