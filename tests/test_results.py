"""Files of results: written whole or not at all, and by one process."""

import json

import pytest
import torch

from support import processes, results


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "result.json"
    results.write_json(path, {"fid": 1.0})
    with pytest.raises(TypeError, match="not JSON serializable"):
        results.write_json(path, {"fid": torch.zeros(1)})
    assert json.loads(path.read_text()) == {"fid": 1.0}
    tensors = tmp_path / "checkpoint.pt"
    results.write_tensors(tensors, {"a": torch.ones(2)})
    with pytest.raises(AttributeError, match="pickle"):
        results.write_tensors(tensors, {"a": torch.zeros(2), "b": lambda: None})
    assert {file.name for file in tmp_path.iterdir()} == {"new", "checkpoint.pt"}
    assert torch.equal(torch.load(tensors, weights_only=True)["a"], torch.ones(2))


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "rank", lambda: 1)
    results.write_json(tmp_path / "result.json", {})
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(processes, "rank", lambda: 0)
    results.write_json(tmp_path / "result.json", {})
    assert results.read_rows(tmp_path.glob("*.json")) == [{}]


def test_a_table_has_its_columns_below_each_other():
    rows = [{"model": "gan", "fid": 10.0}, {"model": "factorgan", "fid": 9.125}]
    assert results.table(rows, {"model": "", "fid": ".2f"}).splitlines() == [
        "    model    fid",
        "      gan  10.00",
        "factorgan   9.12",
    ]


def test_a_row_says_what_it_depends_on():
    described = results.environment()
    assert described["torch"] == torch.__version__
    assert {"factordisc", "python", "machine", "threads", "command"} <= set(described)
