"""Qwen 3.5: numbers are transformers', texts do not depend on drafts, and its own head drafts as others describe it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import graph
import mlx.core as mx
import numpy as np
import pytest
from checkpoints import FIXTURES, Checkpoint, Quant, quantised, read, write
from engines import QWEN, Job, Models, engine_of, prompts, qwen, random_widths, request, run, solo, texts
from mlx.utils import tree_map
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from servers import running

import mlx_mtp
from mlx_mtp.accept import verdict
from mlx_mtp.cache import Cache, LayerSpec
from mlx_mtp.draft_length import MAX_WIDTH
from mlx_mtp.drafters.qwen_mtp import QwenMtpDrafter
from mlx_mtp.kernels.delta import Span, reference
from mlx_mtp.load import load_drafter, load_pair, load_target
from mlx_mtp.models.qwen3_5 import read_qwen
from mlx_mtp.models.qwen3_5_mtp import QwenMtp
from mlx_mtp.prefixes import shared
from mlx_mtp.rows import GREEDY, CheckpointError, Draft, Forward, PairingError, Sampling
from mlx_mtp.sampling import RowSampler, Sampler
from mlx_mtp.scheduler import Limits
from mlx_mtp.states import StateSpec
from mlx_mtp.text import Text

STEP = 2.0**-14  # the goldens are int32 multiples of it
ONE = slice(0, 1)
GREEDY_ROW = Sampler([RowSampler.of(GREEDY)])
SEEDED = Sampling(temperature=0.8, top_k=40, seed=7)
SMALL_CHUNKS = Limits(alone_tok=11, chunk_tok=11, first_chunk_tok=5)
THOUGHT_TOK = 6  # of the empty thought that its template begins an answer with, and leaves out afterwards
KEEPING = Limits(alone_tok=24, chunk_tok=24, first_chunk_tok=24, prefix_bytes=2**30)


def goldens() -> dict[str, np.ndarray]:
    with np.load(QWEN / "goldens.npz") as file:
        return dict(file)


def raw() -> dict:
    return json.loads((QWEN / "config.json").read_text())


# the target's numbers ---------------------------------------------------------------------------------------


def passes(models: Models, text: np.ndarray, widths: list[int]) -> np.ndarray:
    """Logits [L, V] of a text by passes of these widths, again and again."""
    rows, out, at = Cache(models.target.specs, MAX_WIDTH, mx.float32), [], 0
    rows.join(1)
    while at < len(text):
        count = min(widths[len(out) % len(widths)], len(text) - at)
        hidden, _ = models.target.forward(mx.array(text[at : at + count])[None], rows.open(ONE, count))
        rows.commit(ONE, mx.array([count]), count)
        out.append(np.array(models.target.logits(hidden)[0]))
        at += count
    return np.concatenate(out)


@pytest.mark.parametrize("widths", [[64], [1], [5, 1, 3, 2], [20, 7]])
def test_logits_are_those_of_transformers_however_a_text_is_fed(widths):
    g = goldens()
    got = passes(qwen(), g["text"], widths)
    np.testing.assert_allclose(got, g["logits"] * STEP, rtol=0, atol=3e-4)
    np.testing.assert_allclose(got[:8], g["step_logits"] * STEP, rtol=0, atol=3e-4)


def test_hidden_states_are_those_of_transformers():
    g, models = goldens(), qwen()
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    rows.join(1)
    hidden, _ = models.target.forward(mx.array(g["text"])[None], rows.open(ONE, len(g["text"])))
    np.testing.assert_allclose(np.array(hidden[0]), g["hidden"] * STEP, rtol=0, atol=3e-4)


def test_the_greedy_text_is_that_of_transformers():
    text, start = goldens()["text"].tolist(), int(goldens()["prompt_tok"])
    assert solo(qwen(), request(text[:start], len(text) - start)) == text[start:]


def with_rejections(models: Models, text: np.ndarray, wrong: list[int]) -> np.ndarray:
    """As `passes`, but every pass has wrong columns behind the true ones."""
    rows, out, at = Cache(models.target.specs, MAX_WIDTH, mx.float32), [], 0
    rows.join(1)
    for count in (5, 1, 2, 3, 4, 1, 2, 3):
        ids = [*text[at : at + count].tolist(), *wrong]
        hidden, _ = models.target.forward(mx.array([ids]), rows.open(ONE, len(ids)))
        rows.commit(ONE, mx.array([count]), len(ids))
        rows.settle(0, len(wrong))
        out.append(np.array(models.target.logits(hidden)[0, :count]))
        at += count
    return np.concatenate(out)


def test_rejected_columns_leave_no_trace_in_any_bit_of_the_recurrence():
    text = goldens()["text"]
    got = with_rejections(qwen(), text, [7, 7, 7])
    np.testing.assert_array_equal(got, with_rejections(qwen(), text, [3, 90, 41]))
    np.testing.assert_allclose(got, passes(qwen(), text, [1])[: len(got)], rtol=0, atol=3e-4)


# layouts ----------------------------------------------------------------------------------------------------


def mlx_layout(ckpt: Checkpoint, head: bool) -> Checkpoint:
    """As mlx-lm converts it: its own prefixes, whole norms, filters [C, taps, 1], no tower, no head unless asked."""
    tensors = {}
    for stored, value in ckpt.tensors.items():
        name = stored.replace("model.language_model.", "language_model.model.").replace("mtp.", "language_model.mtp.")
        if "visual" in name or ("mtp." in name and not head):
            continue
        if name.endswith("norm.weight") or "pre_fc_norm" in name:
            value = value if "linear_attn" in name else value.astype(mx.float32) + 1
        tensors[name] = value.moveaxis(1, 2) if name.endswith("conv1d.weight") else value
    return replace(ckpt, tensors=tensors)


def untied(ckpt: Checkpoint) -> Checkpoint:
    """With an output head of its own, which is the embedding."""
    table = ckpt.tensors["model.language_model.embed_tokens.weight"]
    config = ckpt.config | {"tie_word_embeddings": False}
    config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    return replace(ckpt, tensors=ckpt.tensors | {"lm_head.weight": table}, config=config)


@pytest.mark.parametrize(
    "layout", [lambda c: mlx_layout(c, head=True), untied, lambda c: replace(c, config=c.config["text_config"])]
)
def test_every_layout_gives_the_same_target_and_head(layout, tmp_path: Path):
    folder, g = write(layout(read(QWEN)), tmp_path / "other", shards=2), goldens()
    other = qwen("other layout", folder)
    np.testing.assert_array_equal(passes(other, g["text"], [64]), passes(qwen(), g["text"], [64]))
    np.testing.assert_array_equal(drafts(other, g, 64)[0], drafts(qwen(), g, 64)[0])


def test_a_copy_without_the_head_decodes_plainly_and_says_why(tmp_path: Path):
    folder = write(mlx_layout(read(QWEN), head=False), tmp_path / "mlx")
    pair = load_pair(str(folder), dtype=mx.float32)
    assert pair.drafter is None and "its files hold none" in pair.notes[0]
    assert pair.notes[0].endswith("decoding plainly (name a copy that has it with --drafter)")
    small = load_pair(str(shutil.copytree(folder, tmp_path / "Qwen3.5-4B-4bit")), dtype=mx.float32)
    assert small.notes[0].endswith("(name a copy that has it with --drafter, such as Qwen/Qwen3.5-4B)")
    named = load_pair(str(folder), str(QWEN), dtype=mx.float32)
    assert named.drafter is not None and named.drafter.kind.name == "qwen_mtp"


def test_decay_rates_stay_in_float32_whatever_the_rest_is_in():
    model = load_target(str(QWEN), dtype=mx.bfloat16).model
    delta = model.layers[0].linear_attn
    assert delta.A_log.dtype == mx.float32 and delta.dt_bias.dtype == mx.bfloat16


def test_a_packed_target_runs_with_its_packed_head(tmp_path: Path):
    source = mlx_layout(read(QWEN), head=True)
    folder = write(quantised(source, Quant(4, 32)), tmp_path / "packed")
    models = qwen("packed", folder)
    assert type(models.head.mtp.fc).__name__.endswith("QuantizedLinear")
    wanted = [request(p, 12, s) for p, s in zip(prompts(models, (9, 20)), (GREEDY, SEEDED), strict=True)]
    assert texts(run(engine_of(models, "head", 3), wanted)) == [solo(models, r) for r in wanted]


# configs ----------------------------------------------------------------------------------------------------

MISTAKES = {
    "num_attention_heads": (3, "multiple of num_key_value_heads"),
    "linear_num_value_heads": (3, "multiple of linear_num_key_heads"),
    "layer_types": (["sliding_attention"] * 4, "4 entries"),
    "hidden_act": ("gelu", "'silu'"),
    "attention_bias": (True, "False"),
    "attn_output_gate": (False, "True"),
    "output_gate_type": ("sigmoid", "'swish'"),
    "rope_parameters": ({"rope_type": "yarn"}, "'default'"),
    "hidden_size": (None, "an integer"),
}


@pytest.mark.parametrize("key", MISTAKES)
def test_a_config_that_cannot_run_is_refused_with_the_key(key):
    config, (value, expected) = raw(), MISTAKES[key]
    config["text_config"][key] = value
    with pytest.raises(CheckpointError, match=f"^here: .*{expected}") as caught:
        read_qwen(config, "here")
    assert "\n" not in str(caught.value)


def test_what_is_not_said_is_as_transformers_has_it():
    config = raw()
    text = config["text_config"]
    for key in ("layer_types", "rms_norm_eps", "hidden_act", "mtp_num_hidden_layers"):
        del text[key]
    assert replace(read_qwen(config, "here"), mtp_layers=1) == read_qwen(raw(), "here")


@pytest.mark.parametrize("kind, line", [("qwen3_5_moe", "mixture of experts"), ("llama", "supported targets: gemma4")])
def test_other_architectures_are_refused_in_one_line(kind, line, tmp_path: Path):
    folder = Path(shutil.copytree(QWEN, tmp_path / "t"))
    (folder / "config.json").write_text(json.dumps(raw() | {"model_type": kind}))
    with pytest.raises(CheckpointError, match=line) as caught:
        load_target(str(folder))
    assert "\n" not in str(caught.value)


def test_drafters_of_other_families_and_sizes_are_refused():
    gemma = FIXTURES / "edge"
    with pytest.raises(PairingError, match="Gemma 4 target"):
        load_pair(str(QWEN), str(gemma / "assistant"))
    with pytest.raises(PairingError, match="vocabulary"):
        load_pair(str(QWEN), str(gemma / "target"))
    with pytest.raises(PairingError, match="head of a Qwen 3.5 model, and the target is none"):
        load_pair(str(gemma / "target"), str(QWEN))


def test_a_head_of_another_size_is_refused(tmp_path: Path):
    config = raw()
    config["text_config"]["num_hidden_layers"], config["text_config"]["layer_types"] = 8, None
    folder = Path(shutil.copytree(QWEN, tmp_path / "larger"))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PairingError, match="layers numbering 8, target has 4"):
        load_pair(str(QWEN), str(folder))


# texts ------------------------------------------------------------------------------------------------------


EVERY_KIND = [(kind, rows) for kind in ("lookup", "head", "head+lookup") for rows in (1, 4, 8)]
QUICK = [case for case in EVERY_KIND if case[1] == 1] + [("head+lookup", 4), ("head", 8)]


@pytest.mark.parametrize(
    "kind, rows", [case if case in QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY_KIND]
)
def test_rows_have_the_texts_of_plain_decoding_at_changing_widths(kind, rows):
    """Greedy and seeded rows that join one after another, of texts that repeat themselves."""
    models = qwen()
    wanted = [request(p * 2, 10, (GREEDY, SEEDED)[i % 2]) for i, p in enumerate(prompts(models, (3, 6, 9, 4) * 2))]
    jobs = [Job(r, i) for i, r in enumerate(wanted[:rows])]
    engine = engine_of(models, kind, random_widths(rows), SMALL_CHUNKS)
    assert texts(run(engine, jobs)) == [solo(models, r) for r in wanted[:rows]]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 15])
@pytest.mark.parametrize("kind", ["plain", "lookup", "head", "head+lookup"])
def test_four_rows_have_the_texts_of_plain_decoding_at_every_width(kind, width):
    models = qwen()
    settings_ = (GREEDY, SEEDED, GREEDY, Sampling(temperature=1.1, top_p=0.9, seed=2**63))
    wanted = [request(p, 24, s) for p, s in zip(prompts(models, (5, 17, 41, 130)), settings_, strict=True)]
    for limits in (None, SMALL_CHUNKS):
        jobs = [Job(r, at) for r, at in zip(wanted, (0, 0, 3, 5), strict=True)]
        assert texts(run(engine_of(models, kind, width, limits), jobs)) == [solo(models, r) for r in wanted]


@pytest.mark.parametrize("lengths", [(30, 28, 27, 26), (9, 8, 9, 8), (24, 24, 24, 24)])
def test_prompts_that_go_together_are_each_taken_in_as_if_alone(lengths):
    """Of passes wider than a round states keep everything, so that no shorter prompt may be padded to its neighbour."""
    models = qwen()
    wanted = [request(p, 6) for p in prompts(models, lengths)]
    assert texts(run(engine_of(models, "head", 2), wanted)) == [solo(models, r) for r in wanted]


def test_rows_that_end_are_cancelled_and_leave_room_do_not_disturb_the_others():
    models = qwen()
    first, *rest = (request(p, n) for p, n in zip(prompts(models, (30, 4, 7, 12)), (14, 5, 9, 20), strict=True))
    ends = replace(first, eos=frozenset({solo(models, first)[6]}))
    jobs = [ends, Job(rest[0], 1), Job(rest[1], 2, cancel=4), Job(rest[2], 3)]
    got = texts(run(engine_of(models, "head", 4, Limits(max_rows=3, alone_tok=9, chunk_tok=9)), jobs))
    assert got[0] == solo(models, first)[: solo(models, first).index(next(iter(ends.eos))) + 1]
    assert [got[1], got[3]] == [solo(models, rest[0]), solo(models, rest[2])]


# prefixes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["plain", "head", pytest.param("lookup", marks=pytest.mark.slow)])
def test_what_a_turn_has_computed_is_not_computed_again(kind):
    """Two conversations at once, so that rows run on behind their ends; then both go on."""
    models, engine = qwen(), engine_of(qwen(), kind, 3, KEEPING)
    first = [request(p, n) for p, n in zip(prompts(models, (33, 20)), (9, 17), strict=True)]
    first[0] = replace(first[0], eos=frozenset({solo(models, first[0])[5]}))
    said = texts(run(engine, first))
    again = [request((*r.prompt, *t, 8, 9), 12) for r, t in zip(first, said, strict=True)]
    outcomes = run(engine, again)
    assert texts(outcomes) == [solo(models, r) for r in again]
    assert [o.stats.cached_tokens for o in outcomes] == [
        len(r.prompt) + len(t) - 1 for r, t in zip(first, said, strict=True)
    ]


def test_a_turn_of_a_chat_computes_only_what_the_turn_before_had_not():
    """Though the template drops from what has been said the thought that the turn before was made to begin with."""
    models, engine, text = qwen(), engine_of(qwen(), "head", 3, replace(KEEPING, alone_tok=128)), Text.from_dir(QWEN)
    chats: list[list[dict]] = [[], []]
    before: list[tuple[int, ...]] = [(), ()]
    for turn in range(3):
        for number, chat in enumerate(chats):
            chat.append({"role": "user", "content": f"Question {turn}, of {'wider ' * (3 + 4 * number)}rings?"})
        wanted = [request(text.encode(text.render(chat)), 9) for chat in chats]
        outcomes = run(engine, wanted)
        assert texts(outcomes) == [solo(models, r) for r in wanted]
        for chat, old, r, o in zip(chats, before, wanted, outcomes, strict=True):
            same = shared(np.array(old), np.array(r.prompt))
            assert o.stats.cached_tokens == same == max(0, len(old) - THOUGHT_TOK)
            chat.append({"role": "assistant", "content": f"Answer {turn}."})
        before = [r.prompt for r in wanted]


def test_prompts_that_begin_alike_share_what_is_computed_of_it():
    models = qwen()
    (shared,) = prompts(models, (300,))
    wanted = [request((*shared, *tail), 8) for tail in prompts(models, (5, 9), seed=1)]
    engine = engine_of(models, "head", 2, replace(KEEPING, alone_tok=64))
    outcomes = run(engine, [wanted[0], Job(wanted[1], 1)])
    assert texts(outcomes) == [solo(models, r) for r in wanted]
    assert outcomes[1].stats.cached_tokens == 300


# the head ---------------------------------------------------------------------------------------------------


def drafts(
    models: Models, g: dict[str, np.ndarray], chunk: int, drafter: type[QwenMtpDrafter] = QwenMtpDrafter
) -> tuple[np.ndarray, np.ndarray]:
    """Logits [places, K, V] and tokens [places, K] of drafts at the goldens' places, a prompt fed in such chunks."""
    logits, tokens, width = [], [], g["draft_tokens"].shape[1]
    for known in g["known"].tolist():
        rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
        rows.join(1)
        one = drafter(models.target, models.head, rows)
        one.begin(0, 0, None)
        for at in range(0, known, chunk):
            count = min(chunk, known - at)
            ids, newest = mx.array(g["text"][None, at : at + count]), mx.array(g["text"][at + count, None])
            hidden, taps = models.target.forward(ids, rows.open(ONE, count), one.taps)
            rows.commit(ONE, mx.array([count]), count)
            one.observe(Forward(ONE, ids, hidden, taps, 0, newest=newest), mx.array([count]))
        draft = one.propose(ONE, newest, Sampler([RowSampler.of(GREEDY)], keep_logits=True), width)
        logits.append(np.array(draft.source.logits[0]))
        tokens.append(np.array(draft.tokens[0]))
    return np.stack(logits), np.stack(tokens)


@pytest.mark.parametrize("chunk", [64, 3])
def test_drafts_are_those_of_transformers_layers_put_together_as_in_vllm(chunk):
    g = goldens()
    logits, tokens = drafts(qwen(), g, chunk)
    np.testing.assert_array_equal(tokens, g["draft_tokens"])
    np.testing.assert_allclose(logits, g["draft_logits"] * STEP, rtol=0, atol=3e-4)


def test_a_head_fed_a_position_too_early_or_before_the_final_norm_does_not_pass_for_the_reference():
    g = goldens()

    class Early(QwenMtpDrafter):
        def _step(self, rows, feature, position, ahead):
            return super()._step(rows, feature, position + 1, ahead)

    class Late(QwenMtpDrafter):
        def observe(self, fwd, kept):
            super().observe(replace(fwd, tokens=mx.roll(fwd.tokens, 1, axis=1)), kept)

    class BeforeNorm(QwenMtpDrafter):
        def observe(self, fwd, kept):
            super().observe(replace(fwd, hidden=fwd.taps[self.taps[0]][None]), kept)

    for wrong in (Early, Late, BeforeNorm):
        logits, _ = drafts(qwen(), g, 64, wrong)
        assert np.abs(logits - g["draft_logits"] * STEP).max() > 0.05


def test_drafts_of_rows_that_reject_and_run_beside_others_are_those_of_a_row_alone():
    """As many rounds, with as many tokens each, whoever runs beside a row."""
    models = qwen()
    text = goldens()["text"].tolist()
    wanted = [request(text[: 5 + 7 * i], 24) for i in range(4)]
    alone = [run(engine_of(models, "head", 3), [r])[0] for r in wanted]
    beside = run(engine_of(models, "head", 3), [Job(r, i // 2) for i, r in enumerate(wanted)])
    for one, other in zip(alone, beside, strict=True):
        assert [len(e.tokens) for e in other.events] == [len(e.tokens) for e in one.events]


def test_the_fitted_head_is_right_much_more_often_than_a_random_one():
    models, text = qwen(), goldens()["text"].tolist()
    wanted = [request(text[:n], 30) for n in (8, 14, 20)]

    def share(head: QwenMtp) -> float:
        outcomes = run(engine_of(replace(models, head=head), "head", 3), wanted)
        return sum(o.stats.kept for o in outcomes) / sum(o.stats.drafted for o in outcomes)

    other = QwenMtp(models.head.config)
    mx.eval(other.parameters())
    assert share(models.head) > 0.3 > 5 * share(other)


def test_auto_takes_the_head_in_the_targets_own_files():
    pair = load_pair(str(QWEN), "auto+lookup", dtype=mx.float32)
    assert pair.drafter_name == f"{QWEN}+lookup" and pair.drafter.kind.name == "qwen_mtp" and not pair.notes
    assert load_drafter(str(QWEN), pair.target).kind.name == "qwen_mtp"


# the whole of it --------------------------------------------------------------------------------------------


def test_the_public_interface_generates_chats_and_shows_drafts():
    pair, g = mlx_mtp.load(str(QWEN)), goldens()
    text, known = g["text"].tolist(), int(g["known"][2])
    assert pair.family == "qwen3_5" and pair.eos == {256, 258} and pair.context_tok == 1024
    start = int(g["prompt_tok"])
    assert pair.generate(text[:start], max_tokens=20)[0].tokens == text[start : start + 20]
    tokens, logits = pair.draft(text[:known], 4)
    np.testing.assert_array_equal(np.array(tokens[0]), g["draft_tokens"][2])
    np.testing.assert_allclose(np.array(logits[0]), g["draft_logits"][2] * STEP, rtol=0, atol=3e-4)
    rendered = pair.text.render([{"role": "user", "content": "Hé"}])
    assert rendered.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert pair.text.decode(pair.text.encode(rendered)).count("Hé") == 1
    (chatted,) = pair.generate([{"role": "user", "content": "Hé"}], max_tokens=6)
    assert chatted.tokens == solo(qwen(), request(pair.text.encode(rendered), 6, eos=pair.eos))


def test_the_memory_of_states_is_part_of_what_a_row_is_admitted_for():
    specs, small = qwen().target.specs, Limits(kv_bytes=2**21)
    states = sum(4 * np.prod(s.shape) for s in specs if isinstance(s, StateSpec))
    rows = Cache(specs, MAX_WIDTH, mx.float32)
    without = Cache(tuple(s for s in specs if isinstance(s, LayerSpec)), MAX_WIDTH, mx.float32)
    assert rows.row_bytes(1) - without.row_bytes(1) > states
    engine, ids = engine_of(qwen(), "head", 2, small), goldens()["text"].tolist()
    most = small.kv_bytes // (rows.row_bytes(40) + engine.drafter.row_bytes(40))
    for _ in range(most + 3):
        engine.submit(request(ids[:20], 20))
    engine.step()
    assert len(engine.scheduler.rows) == min(most, small.max_rows) < most + 3


def test_a_server_leaves_text_whole_and_refuses_what_it_could_not_read():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    with running((str(QWEN), "auto"), name="qwen") as live:
        refused = live.chat("hello", tools=[tool], max_tokens=4)
        assert refused.status_code == 400
        assert "tool calls are supported for Gemma 4 only" in refused.json()["error"]["message"]
        answer = live.chat("hello", max_tokens=12, temperature=0).json()["choices"][0]["message"]
        rendered = live.pair.text.render([{"role": "user", "content": "hello"}], options={"enable_thinking": False})
        told = solo(qwen(), request(live.pair.text.encode(rendered), 12, eos=live.pair.eos))
        assert answer["content"] == live.pair.text.decode(told) and not answer.get("tool_calls")
        both = live.chat("hello", response_format=schema, chat_template_kwargs={"enable_thinking": True}, max_tokens=4)
        assert both.status_code == 400 and "cannot be combined with thinking" in both.json()["error"]["message"]
        shown = live.client.post("/api/show", json={"model": "qwen"}).json()
        assert shown["details"]["family"] == "qwen3_5" and shown["capabilities"] == ["completion"]
        assert live.settled()


# what a step costs --------------------------------------------------------------------------------------------------


def plain_step(models: Models) -> graph.Count:
    """Operations of a step of one column on Metal, without our kernels, from its token to the next."""
    rows = Cache(models.target.specs, MAX_WIDTH, mx.float32)
    rows.join(64)
    states = tree_map(lambda x: x + 0, rows.state())
    mx.eval(states)
    rows.restore(states)
    token = mx.array([[5]])
    mx.eval(token)
    with graph.as_on_metal():
        pass_ = rows.open(ONE, 1, frozenset())
        hidden, _ = models.target.forward(token, pass_)
        judged = verdict(Draft(token[:, :0]), models.target.logits(hidden), pass_.start, GREEDY_ROW, hidden)
        rows.commit(ONE, judged.kept, 1)
        return graph.count(judged.tokens, judged.kept, rows.state())


def test_a_plain_step_has_no_more_operations_than_mlx_lms():
    theirs, _ = load_model(QWEN, strict=False)
    theirs.set_dtype(mx.float32)
    cache, token = make_prompt_cache(theirs), mx.array([[5]])
    for _ in range(2):
        mx.eval(theirs(token, cache=cache), [c.state for c in cache])
    with graph.as_on_metal():
        logits = theirs(token, cache=cache)[:, -1]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        other = graph.count(mx.argmax(logprobs, axis=-1), logprobs, [c.state for c in cache])
    ours = plain_step(qwen("to be counted"))
    assert ours.primitives <= other.primitives and ours.kernels <= other.kernels, (ours, other)


def test_a_prompt_s_recurrence_is_mlx_s_own_update_and_a_round_s_is_column_by_column(monkeypatch):
    net = next(block.linear_attn for block in qwen().target.layers if block.linear)
    d, calls, update = net.config, [], mx.fast.gated_delta_update
    monkeypatch.setattr(mx.fast, "gated_delta_update", lambda *given: calls.append(given[0].shape) or update(*given))
    state, every = mx.random.normal((2, d.value_heads, d.value_dim, d.key_dim)), Span(None, 0, 0, None, True)
    for columns, span in ((5, every), (40, every), (40, replace(every, own=mx.array([3, 40], mx.int32)))):
        given = net._given(mx.random.normal((2, d.taps - 1 + columns, net.spec.inputs)))
        for got, wanted in zip(net.run(state, given, span), reference(state, given, span), strict=True):
            assert mx.allclose(got, wanted, atol=1e-5)
    assert calls == [(2, 40, d.key_heads, d.key_dim)], "only where all columns count"
