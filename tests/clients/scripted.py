"""A real server whose model says what a test wants: dialects, template, queue, engine and parsing are the server's.

The seam is one method: before jobs go to the engine, each gets a constraint that leaves one token in every place. The
engine computes prompts and texts as ever, and drafts what the constraint forces as it does with a grammar; only its
choice is not free. The weights are random, since no choice depends on them, and tiny, since agents send tens of
thousands of tokens to a CPU.

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

from mlx_mtp.rows import Follower
from mlx_mtp.server.metrics import Metrics
from mlx_mtp.server.nouns import Job, Settings
from mlx_mtp.server.service import Service
from mlx_mtp.server.worker import Generation, Worker
from mlx_mtp.text import Text

TEMPLATE = Path(__file__).resolve().parent.parent / "fixtures" / "templates" / "gemma4_v5.jinja"
CONTEXT_TOK = 131_072
RESULT = re.compile(r"<\|tool_response>(.*?)<tool_response\|>", re.DOTALL)
Says = Callable[[str], str]  # the rendered prompt -> what the model writes, its end token included


class _Line:
    """Where a text stands that is settled beforehand."""

    failed = False

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self._rest, self._vocabulary = list(tokens), vocabulary

    def forced(self, most: int) -> list[int]:
        return self._rest[:most]

    def masks(self, draft: Sequence[int]) -> np.ndarray:
        words = (self._vocabulary + 31) // 32
        masks = np.full((len(draft) + 1, words), 0xFFFFFFFF, np.uint32)
        for j, token in enumerate(self._rest[: len(draft) + 1]):
            if list(draft[:j]) != self._rest[:j]:
                break
            masks[j] = 0
            masks[j, token // 32] = 1 << (token % 32)
        return masks

    def advance(self, tokens: Sequence[int]) -> None:
        assert list(tokens) == self._rest[: len(tokens)], "the engine has left the script"
        del self._rest[: len(tokens)]


@dataclass(frozen=True)
class _Script:
    """A text as a request's constraint."""

    tokens: tuple[int, ...]
    vocabulary: int

    def begin(self) -> Follower:
        return _Line(self.tokens, self.vocabulary)


@dataclass(frozen=True)
class Turn:
    """A text the server was asked for: the prompt as rendered and its length, and what the model was made to say."""

    prompt: str
    prompt_tok: int
    reply: str

    @property
    def results(self) -> list[str]:
        """The tool results in the prompt, oldest first."""
        return RESULT.findall(self.prompt)


@dataclass
class Record:
    """What the server saw: requests (route, status) as they ended, and texts as they were asked for.

    cached: a prompt's length -> how many of its tokens were not computed again; of the texts that have ended.
    """

    requests: list[tuple[str, int]] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    cached: dict[int, int] = field(default_factory=dict)


class _Metrics(Metrics):
    """The server's metrics, noted down as well."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def request(self, path: str, status: int) -> None:
        super().request(path, status)
        self._record.requests.append((path, status))

    def generation(self, generation: Generation) -> None:
        super().generation(generation)
        usage = generation.usage
        self._record.cached[usage.prompt_tok] = usage.cached_tok


class _Service(Service):
    """The server's service, but what a text will be is settled when it is opened."""

    def __init__(self, settings: Settings, worker: Worker) -> None:
        self.record = Record()
        super().__init__(settings, worker, _Metrics(self.record))
        self.says: Says = _nothing

    def open(self, jobs: Sequence[Job]) -> Generation:
        return super().open([self._scripted(job) for job in jobs])

    def _scripted(self, job: Job) -> Job:
        text, prompt = self.model.text, written(self.model.text, job.prompt)
        reply = self.says(prompt)
        self.record.turns.append(Turn(prompt, len(job.prompt), reply))
        assert job.constraint is None, "the client asks for a schema, which a script would overrule"
        tokens = tuple(text.encode_rest(reply))
        assert tokens[-1] in self.model.eos, f"a reply must end with an end token: {reply!r}"
        return replace(job, constraint=_Script(tokens, self.model.vocab_size))


def _nothing(prompt: str) -> str:
    raise AssertionError("the test has not said what the model says")


@dataclass
class Scripted:
    """A server with a script. url: without a path."""

    live: Live
    service: _Service

    @property
    def url(self) -> str:
        return self.live.url

    @property
    def record(self) -> Record:
        return self.service.record

    def says(self, says: Says) -> None:
        """Begin anew: what the model says from now on, and an empty record."""
        self.service.says = says
        self.record.requests.clear()
        self.record.turns.clear()
        self.record.cached.clear()

    def settle(self) -> None:
        """Wait until every answer has gone out and been noted."""
        assert self.live.settled(), "something is left in the engine"
        until(lambda: {turn.prompt_tok for turn in self.record.turns} == set(self.record.cached))


def written(text: Text, tokens: Sequence[int]) -> str:
    """The text of token ids, special tokens by their names."""
    return b"".join(map(text.spell, tokens)).decode("utf-8", "replace")


def answer(prompt: str, text: str) -> str:
    """An answer; the thought that a prompt may have begun is ended first."""
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
    """A server on a free port; its checkpoint is written to the folder."""
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
    services: list[_Service] = []

    def service(settings: Settings, worker: Worker) -> Service:
        services.append(_Service(settings, worker))
        return services[0]

    pair = (str(target), str(drafter))
    with running(pair, service=service, name="gemma", keepalive_s=2.0) as live:
        yield Scripted(live, services[0])
