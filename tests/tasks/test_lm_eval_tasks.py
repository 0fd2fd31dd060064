"""Tasks of lm-evaluation-harness, where it is installed: its questions, answered by an engine of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from optkit.core.errors import DataError, MissingError
from optkit.core.group import Group
from optkit.engines import engine_for
from optkit.models.sources import open_model
from optkit.tasks.few_shot import FewShot, HarnessTasks
from optkit.tasks.lm_eval_tasks import answers_right

try:
    import lm_eval  # noqa: F401

    HERE = True
except ImportError:
    HERE = False

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}, validation: {file}}}}}
output_type: {kind}
test_split: test
fewshot_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{right}}}}"
doc_to_choice: ["{{{{first}}}}", "{{{{second}}}}"]
target_delimiter: " "
metric_list: [{{metric: acc}}]
"""


@pytest.mark.skipif(HERE, reason="it is installed")
def test_without_the_package_it_is_said_what_to_install() -> None:
    with pytest.raises(MissingError, match=r"pip install 'optkit\[lm-eval\]'"):
        FewShot(corpus=HarnessTasks(lm_eval=("hellaswag",)), shots=(0,)).evaluate(None, None, Group(), None, None)  # type: ignore[arg-type]


@pytest.mark.skipif(not HERE, reason="lm-eval is not installed")
def test_its_questions_are_answered_by_likelihood_and_scored_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": "import", "first": "os", "second": "])", "right": 0},
        {"question": "x = [1, 2", "first": "def", "second": "]", "right": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    (tmp_path / "own.yaml").write_text(TASK.format(name="own", file=tmp_path / "rows.jsonl", kind="multiple_choice"))
    manager = TaskManager(include_path=str(tmp_path))
    subject: Any = open_model("reference")
    for shots in (0, 1):
        found = answers_right(subject, engine_for(subject), ("own",), shots, 6, manager)
        assert [place for place, _ in found] == [f"own {number}" for number in range(6)]
        assert sum(right for _, right in found) >= 3
    with pytest.raises(DataError, match="has no task 'unheard-of'"):
        answers_right(subject, engine_for(subject), ("unheard-of",), 0, 6, manager)
