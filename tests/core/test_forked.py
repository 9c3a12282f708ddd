"""Forked programs are to a test what fresh ones are: status, output, folder, environment; several as torchrun's."""

from __future__ import annotations

import pytest
from tiny_experiment import environment

from tests import forked

PROGRAM = """
import json, os, signal, sys, time
import torch.distributed as dist
rank = int(os.environ.get("RANK", 0))
print("said", file=sys.stderr)
if sys.argv[1] == "sum":
    import torch
    dist.init_process_group("gloo")
    value = torch.tensor(rank + 1.0)
    dist.all_reduce(value)
    open(f"sum{rank}", "w").write(json.dumps([value.item(), dist.get_world_size()]))
elif sys.argv[1] == "fail":
    if rank == 0:
        time.sleep(600)
    raise ValueError("rank one")
elif sys.argv[1] == "exit":
    sys.exit("a reason")
else:
    open("told", "w").write(json.dumps([sys.argv, os.environ["TOLD"], os.getcwd(), "PATH" in os.environ, __name__]))
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.processes
def test_forked_programs_behave_like_fresh_ones(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    told = forked.run([str(script), "3"], tmp_path, {"TOLD": "yes"})
    assert told.returncode == 3 and told.stderr == "said\n"
    assert (tmp_path / "told").read_text() == f'[["{script}", "3"], "yes", "{tmp_path}", false, "__main__"]'
    reason = forked.run([str(script), "exit"], tmp_path, environment())
    assert reason.returncode == 1 and reason.stderr.splitlines() == ["said", "a reason"]
    summed = forked.run([str(script), "sum"], tmp_path, environment(), 2)
    assert summed.returncode == 0, summed.stderr
    assert [(tmp_path / f"sum{rank}").read_text() for rank in (0, 1)] == ["[3.0, 2]"] * 2
    failed = forked.run([str(script), "fail"], tmp_path, environment(), 2)
    assert failed.returncode == 1 and "ValueError: rank one" in failed.stderr
