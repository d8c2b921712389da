"""Run as a program, with torch, in a process of its own: what transformers computes, from one .npz to another.

    python transformers_side.py target FOLDER in.npz out.npz     ids -> logits, hidden, the keys and values to be shared
    python transformers_side.py drafter FOLDER in.npz out.npz    these, embedded tokens -> logits of every draft step

float32 throughout. transformers 5.22: 5.23 cannot build the drafter.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

KINDS = ("sliding_attention", "full_attention")


def load(folder: str, kind: str) -> torch.nn.Module:
    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval()


@torch.no_grad()
def target(folder: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ids [P] -> logits [V] and hidden [H] of the last position; keys and values [heads, P, D] of both kinds."""
    model = load(folder, "Gemma4ForConditionalGeneration")
    ids = torch.from_numpy(given["ids"])[None]
    wanted = {"output_hidden_states": True, "return_shared_kv_states": True, "use_cache": False, "logits_to_keep": 1}
    out = model(input_ids=ids, **wanted)
    found = {"logits": out.logits[0, -1], "hidden": out.hidden_states[-1][0, -1]}
    for kind, (keys, values) in out.shared_kv_states.items():
        found |= {f"{kind}_keys": keys[0], f"{kind}_values": values[0]}
    return {name: value.numpy() for name, value in found.items()}


@torch.no_grad()
def drafter(folder: str, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """embedded [steps, H], hidden [H], position [1], keys and values -> logits [steps, V].

    Every step after the first takes its own hidden state on, and the token that the other side has drafted.
    """
    unified = "unified" in (Path(folder) / "config.json").read_text()
    model = load(folder, "Gemma4UnifiedAssistantForCausalLM" if unified else "Gemma4AssistantForCausalLM")
    seen = {k: tuple(torch.from_numpy(given[f"{k}_{part}"])[None] for part in ("keys", "values")) for k in KINDS}
    hidden, logits = torch.from_numpy(given["hidden"])[None, None], []
    for embedded in torch.from_numpy(given["embedded"]):
        step = model(
            inputs_embeds=torch.cat([embedded[None, None], hidden], dim=-1),
            position_ids=torch.from_numpy(given["position"])[None],
            shared_kv_states=seen,
            attention_mask=None,
            use_cache=False,
        )
        hidden = step.last_hidden_state
        logits.append(step.logits[0, 0])
    return {"logits": torch.stack(logits).numpy()}


if __name__ == "__main__":
    what, folder, source, result = sys.argv[1:]
    with np.load(source) as file:
        given = dict(file)
    np.savez(result, **{"target": target, "drafter": drafter}[what](folder, given))
