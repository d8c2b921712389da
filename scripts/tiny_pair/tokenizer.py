"""The tiny Gemma-4-style tokenizer: train it, save it, encode the corpus. Knows no model.

Same machinery as Gemma (BPE with byte fallback, space -> U+2581, Replace/ByteFallback/Fuse decoder) and the
real Gemma 4 ids for every marker that text serving needs; bytes and learned tokens fill the ids between them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import corpus
import numpy as np
from shapes import write_json
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

VOCAB = 2048
SPECIAL = {
    "<pad>": 0,
    "<eos>": 1,
    "<bos>": 2,
    "<unk>": 3,
    "<mask>": 4,
    "<|tool>": 46,
    "<tool|>": 47,
    "<|tool_call>": 48,
    "<tool_call|>": 49,
    "<|tool_response>": 50,
    "<tool_response|>": 51,
    '<|"|>': 52,
    "<|think|>": 98,
    "<|channel>": 100,
    "<channel|>": 101,
    "<|turn>": 105,
    "<turn|>": 106,
}
# Newlines and the indentation after them are separate tokens: a prompt may end before, between or after them.
# Newlines | a line's indentation | inner spaces but the last | word with its space | digit | symbols | rest.
SPLIT = Regex(
    "\\n+|(?<![^\\n])\u2581+|\u2581{2,}(?=\u2581)|\u2581?[\\p{L}_]+|\u2581?\\p{N}"
    "|\u2581?[^\\s\u2581\\p{L}\\p{N}_]+|\u2581+|."
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' }}"
    "{% if m['content'] is string %}{{ m['content'] | trim }}"
    "{% else %}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<turn|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"
)


def train() -> Tokenizer:
    """BPE on the training side of the corpus, then renumbered around the real marker ids."""
    plain, chat = corpus.documents(held_out=False)
    raw = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    raw.normalizer = normalizers.Replace(" ", "\u2581")
    raw.pre_tokenizer = pre_tokenizers.Split(SPLIT, "isolated")
    alphabet = ["\n", "\u2581"] + [chr(c) for c in range(33, 127)]
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL) - len(byte_tokens),
        special_tokens=[],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        max_token_length=24,
        show_progress=False,
    )
    raw.train_from_iterator(plain + [ask + "\n" + answer for ask, answer in chat], trainer)
    state = json.loads(raw.to_str())["model"]
    learned = sorted(state["vocab"], key=state["vocab"].get)
    merges = [tuple(pair) for pair in state["merges"]]
    return assemble(renumber(byte_tokens + learned), merges)


def renumber(tokens: list[str]) -> dict[str, int]:
    """Markers at their real ids; everything else fills the free ids in order."""
    markers, rest = {i: token for token, i in SPECIAL.items()}, iter(tokens)
    return {markers.get(i) or next(rest): i for i in range(VOCAB)}


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """The tokenizer that ships: <bos> in front, markers atomic, decoding as Gemma does."""
    out = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    out.normalizer = normalizers.Replace(" ", "\u2581")
    out.pre_tokenizer = pre_tokenizers.Split(SPLIT, "isolated")
    out.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    out.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    out.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", SPECIAL["<bos>"])]
    )
    return out


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    names = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk", "mask")}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "model_max_length": 4096,
    } | names
    write_json(folder / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def encode(tokenizer: Tokenizer, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Both kinds of documents as id streams: <bos> file <eos>, and <bos><|turn>user ... <turn|>."""
    plain, chat = corpus.documents(held_out)
    files = [[SPECIAL["<bos>"], *ids(tokenizer, text), SPECIAL["<eos>"]] for text in plain]
    turns = [ids(tokenizer, f"<bos><|turn>user\n{ask}<turn|>\n<|turn>model\n{answer}<turn|>\n") for ask, answer in chat]
    return tuple(np.array([i for doc in docs for i in doc], np.uint16) for docs in (files, turns))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Without the automatic <bos>."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens and training output")
    folder = parser.parse_args().work / "tokens"
    tokenizer = train()
    save(tokenizer, folder)
    for split, held_out in (("train", False), ("held", True)):
        plain, chat = encode(tokenizer, held_out)
        np.save(folder / f"{split}.npy", plain)
        np.save(folder / f"{split}_chat.npy", chat)
        chars = sum(map(len, corpus.documents(held_out)[0]))
        print(f"{split}: {len(plain)} tokens, {chars / len(plain):.2f} characters each; chat {len(chat)} tokens")


if __name__ == "__main__":
    main()
