"""A real server whose model writes what a test wants. Dialects, template, queue, engine and parsing are the server's.

One method is overridden: each engine request gets a constraint that allows one token at every position. The engine
computes prompts and outputs as usual and drafts the forced tokens, as with a grammar. The weights are random, because
no token depends on them. They are tiny, because agents send tens of thousands of tokens to a CPU.

with scripted(tmp_path) as server:
    server.says(lambda prompt: answer(prompt, "Hello."))
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from checkpoints import FULL, SLIDING
from random_checkpoints import drafter_config, random_checkpoint, target_config
from servers import TINY, Live, running, until

from mlx_mtp.rows import Follower, Request
from mlx_mtp.server.asking import GenerationRequest
from mlx_mtp.server.decoding import OutputDecoder
from mlx_mtp.server.metrics import Metrics
from mlx_mtp.server.nouns import Settings
from mlx_mtp.server.service import Admission
from mlx_mtp.server.worker import EngineThread, GenerationStream
from mlx_mtp.text import Text

TEMPLATE = Path(__file__).resolve().parent.parent / "fixtures" / "templates" / "gemma4_v5.jinja"
CONTEXT_TOK = 131_072
RESULT = re.compile(r"<\|tool_response>(.*?)<tool_response\|>", re.DOTALL)
Says = Callable[[str], str]  # the rendered prompt -> what the model writes, its end token included


class _ScriptState:
    """Where an output stands in its script."""

    failed = False

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self._remaining, self._vocabulary = list(tokens), vocabulary

    def forced(self, most: int) -> list[int]:
        return self._remaining[:most]

    def masks(self, draft: Sequence[int]) -> np.ndarray:
        words = (self._vocabulary + 31) // 32
        masks = np.full((len(draft) + 1, words), 0xFFFFFFFF, np.uint32)
        for j, token in enumerate(self._remaining[: len(draft) + 1]):
            if list(draft[:j]) != self._remaining[:j]:
                break
            masks[j] = 0
            masks[j, token // 32] = 1 << (token % 32)
        return masks

    def advance(self, tokens: Sequence[int]) -> None:
        assert list(tokens) == self._remaining[: len(tokens)], "the engine has left the script"
        del self._remaining[: len(tokens)]


@dataclass(frozen=True)
class _Script:
    """An output as a request's constraint."""

    tokens: tuple[int, ...]
    vocabulary: int

    def begin(self) -> Follower:
        return _ScriptState(self.tokens, self.vocabulary)


@dataclass(frozen=True)
class Turn:
    """An output of the server: the rendered prompt, its length in tokens, and what the model wrote."""

    prompt: str
    prompt_tok: int
    reply: str

    @property
    def results(self) -> list[str]:
        """The tool results in the prompt, oldest first."""
        return RESULT.findall(self.prompt)


@dataclass
class Record:
    """What the server saw: requests (route, status) as they ended, and outputs as they were requested.

    cached: a prompt's length -> its tokens that came from the cache, for outputs that have ended.
    """

    requests: list[tuple[str, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)


class _Metrics(Metrics):
    """Metrics that also fill a record."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def request(self, path: str, status: int) -> None:
        super().request(path, status)
        self._record.requests.append((path, status))

    def generation(self, generation: GenerationStream) -> None:
        super().generation(generation)
        usage = generation.usage
        self._record.cached[usage.prompt_tok] = usage.cached_tok


class _ScriptedAdmission(Admission):
    """Admission that fixes each output before it starts."""

    def __init__(self, settings: Settings, engine_thread: EngineThread) -> None:
        self.record = Record()
        super().__init__(settings, engine_thread, _Metrics(self.record))
        self.says: Says = _nothing

    async def prepare(self, request: GenerationRequest) -> list[tuple[Request, OutputDecoder]]:
        return [(self._scripted(one), output) for one, output in await super().prepare(request)]

    def _scripted(self, request: Request) -> Request:
        text, prompt = self.pair.text, written(self.pair.text, request.prompt)
        reply = self.says(prompt)
        self.record.turns.append(Turn(prompt, len(request.prompt), reply))
        assert request.constraint is None, "the client sent a schema, which the script would replace"
        tokens = tuple(text.encode_rest(reply))
        assert tokens[-1] in self.pair.eos, f"a reply must end with an end token: {reply!r}"
        return replace(request, constraint=_Script(tokens, self.pair.vocab_size))


def _nothing(prompt: str) -> str:
    raise AssertionError("the test has no script")


@dataclass
class Scripted:
    """A server with a script. url: without a path."""

    live: Live
    admission: _ScriptedAdmission

    @property
    def url(self) -> str:
        return self.live.url

    @property
    def record(self) -> Record:
        return self.admission.record

    def says(self, says: Says) -> None:
        """Set what the model writes from now on, and empty the record."""
        self.admission.says = says
        self.record.requests.clear()
        self.record.turns.clear()
        self.record.cached.clear()

    def settle(self) -> None:
        """Wait until every answer has been sent and recorded."""
        assert self.live.settled(), "something is left in the engine"
        until(lambda: {turn.prompt_tok for turn in self.record.turns} == set(self.record.cached))


def written(text: Text, tokens: Sequence[int]) -> str:
    """The text of token ids, special tokens by their names."""
    return b"".join(map(text.spell, tokens)).decode("utf-8", "replace")


def answer(prompt: str, text: str) -> str:
    """An answer. It first ends the thought that the prompt may have begun."""
    return ("That is all.<channel|>" if prompt.endswith("<|channel>thought\n") else "") + text + "<turn|>"


def call(tool: str, **arguments: str | bool | list[str]) -> str:
    """A thought and a call of a tool, as Gemma 4 writes them."""
    pairs = ",".join(f"{name}:{_value(value)}" for name, value in sorted(arguments.items()))
    return f"<|channel>thought\nI look.<channel|><|tool_call>call:{tool}{{{pairs}}}<tool_call|><|tool_response>"


def _value(value: str | bool | list[str]) -> str:
    if isinstance(value, list):
        return "[" + ",".join(map(_value, value)) + "]"
    return f'<|"|>{value}<|"|>' if isinstance(value, str) else str(value).lower()


@contextlib.contextmanager
def scripted(folder: Path) -> Iterator[Scripted]:
    """A server on an unused port; its checkpoint is written to the folder."""
    config = target_config(
        vocab_size=2048,
        hidden_size=32,
        intermediate_size=32,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_global_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        sliding_window=64,
        layer_types=[SLIDING, FULL],
        max_position_embeddings=CONTEXT_TOK,
    )
    target = random_checkpoint(folder / "target", config, seed=1, tokenizer=Path(TINY[0]))
    small = drafter_config(config, clusters=64, hidden_size=32, intermediate_size=32)
    drafter = random_checkpoint(folder / "drafter", small, seed=2)
    (target / "chat_template.jinja").write_bytes(TEMPLATE.read_bytes())
    made: list[_ScriptedAdmission] = []

    def make_admission(settings: Settings, engine_thread: EngineThread) -> Admission:
        made.append(_ScriptedAdmission(settings, engine_thread))
        return made[0]

    pair = (str(target), str(drafter))
    with running(pair, make_admission=make_admission, name="gemma", keepalive_s=2.0) as live:
        yield Scripted(live, made[0])
