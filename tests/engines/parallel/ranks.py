"""One process of several that serve saved models together: python ranks.py RANK SIZE MEETING JOBS, and its answers as JSON.

JOBS is a JSON list of [folder, mesh, kwargs]; every job generates greedily, in these roles, by all processes.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from optkit.core.group import Group
from optkit.core.mesh import Mesh
from optkit.engines import engine_for, told
from optkit.engines.parallel.connect import part_for
from optkit.models import artefact


def main(rank: int, size: int, meeting: str, jobs: list[tuple[str, list[int], dict[str, int]]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=60))
    answers = []
    for folder, sizes, wanted in jobs:
        mesh = Mesh(*sizes)
        group = Group(rank, size, mesh)
        part = part_for(group, mesh, artefact.placement(folder)[1])
        if part is not None:
            part.micro_batches = wanted.get("micro_batches", 2)
        subject = artefact.load(folder, part=part)
        engine = engine_for(subject, part)
        prompts = (torch.arange(wanted["batch"] * wanted["prompt"]) * 7919 % wanted["vocabulary"]).reshape(wanted["batch"], -1)
        rows = prompts[group.rows(len(prompts))]
        tokens = [engine.first(rows)]
        tokens += [found.clone() for found in engine.further(tokens[0], wanted["tokens"] - 1)]
        logits = engine.prefill(rows)
        engine.reset()
        answers.append(
            {
                "tokens": group.join(torch.stack(tokens, 1).tolist()),
                "logits": group.join(logits.float().tolist()),
                "scores": group.join(engine.score(rows)[:, -1].float().tolist()),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in subject.module.state_dict().values()),
                "engine": told(engine),
            }
        )
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))
