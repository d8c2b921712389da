"""Acceptance of a trained pair on the held-out prompts, by transformers' own assisted generation in fp32."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import shapes
import torch
from lean import Lean
from torch import Tensor, nn
from training import Stream, tensors
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation import candidate_generator

WIDTHS = (3, 4, 5)
NEW_TOKENS, BEFORE_LOOPS = 64, 24  # greedy text of a small model repeats itself after a while, which flatters


class RoundLog:
    """Listens to transformers' drafter: (proposed, accepted) for every round, in `rounds`."""

    def __init__(self):
        self.rounds: list[tuple[int, int]] = []
        generator, log = candidate_generator.SinglePositionMultiTokenCandidateGenerator, self
        propose = generator.get_candidates

        def get_candidates(self, input_ids, *args, **kwargs):
            ids, logits = propose(self, input_ids, *args, **kwargs)
            self.proposed = ids.shape[1] - input_ids.shape[1]
            return ids, logits

        def update_candidate_strategy(self, input_ids, scores, num_matches):
            log.rounds.append((self.proposed, int(num_matches)))

        generator.get_candidates = get_candidates
        generator.update_candidate_strategy = update_candidate_strategy

    def summary(self, width: int) -> dict:
        """Over the full-width rounds: rounds cut short by the length limit would count as rejections."""
        kept = [accepted for proposed, accepted in self.rounds if proposed == width]
        share = [sum(k > i for k in kept) / len(kept) for i in range(width)]
        return {
            "rounds": len(kept),
            "accepted": round(sum(share), 2),
            "by_position": [round(x, 2) for x in share],
        }


def generate(target: nn.Module, ids: Tensor, new: int, drafter: nn.Module | None = None) -> Tensor:
    """Greedy continuation [1, T] of ids."""
    mask = torch.ones_like(ids)
    return target.generate(
        ids, attention_mask=mask, assistant_model=drafter, max_new_tokens=new, do_sample=False, pad_token_id=0
    )


def acceptance(target: nn.Module, drafter: nn.Module, prompts: list[Tensor], new: int) -> dict:
    """Per width: accepted drafts per round, in all and by position, and how often the text is plain's."""
    log, table = RoundLog(), {}
    plain = [generate(target, ids, new) for ids in prompts]
    for width in WIDTHS:
        log.rounds.clear()
        drafter.generation_config.num_assistant_tokens = width
        same = sum(
            torch.equal(generate(target, ids, new, drafter), want) for ids, want in zip(prompts, plain, strict=True)
        )
        table[width] = log.summary(width) | {"identical": f"{same}/{len(prompts)}"}
    return table


@torch.no_grad()
def training_forward_gap(kind: str, target: nn.Module, work: Path) -> float:
    """Relative difference of the final hidden state: bf16 training forward against transformers in fp32."""
    ids = Stream(work, seed=5).batch(2, 200)[:, :-1]
    hidden, _ = Lean(shapes.TARGETS[kind], tensors(target), 200)(ids)
    want = target(ids, use_cache=False, output_hidden_states=True).hidden_states[-1]
    return round((hidden - want).abs().max().item() / want.abs().max().item(), 4)


def evaluate(kind: str, work: Path) -> dict:
    load = AutoModelForCausalLM.from_pretrained
    target, drafter = (load(work / kind / part, dtype=torch.float32).eval() for part in ("target", "drafter"))
    tokenizer = AutoTokenizer.from_pretrained(work / kind / "target")
    prompts = json.loads((work / "prompts.json").read_text())
    code = [tokenizer(text, return_tensors="pt").input_ids for text in prompts["code"]]
    asks = [[{"role": "user", "content": text}] for text in prompts["chat"]]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    chat = [tokenizer.apply_chat_template(ask, **options).input_ids for ask in asks]
    answers = [generate(target, ids, 128) for ids in chat]
    ended = sum(answer[0, -1].item() == tokenizer.convert_tokens_to_ids("<turn|>") for answer in answers)
    report = {"training_forward_gap": training_forward_gap(kind, target, work)}
    report |= {"chat_ended": f"{ended}/{len(chat)}"}
    for model in (target, drafter):  # measure full lengths on files, whatever the model thinks of ending them
        model.generation_config.eos_token_id = None
    report |= {"code": acceptance(target, drafter, code, NEW_TOKENS)}
    return report | {"code_before_loops": acceptance(target, drafter, code, BEFORE_LOOPS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=shapes.TARGETS)
    parser.add_argument("--work", type=Path, required=True, help="folder that holds the trained pair")
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = evaluate(args.kind, args.work)
    shapes.write_json(args.work / args.kind / "evaluation.json", report)
    for name, value in report.items():
        print(name, value)


if __name__ == "__main__":
    main()
