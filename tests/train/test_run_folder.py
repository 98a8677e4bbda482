import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from train.checkpoint import newest_checkpoint
from train.config import PRESETS
from train.run_folder import RunFolder, provenance, read_lines

CONFIG = PRESETS["tiny"]


def test_claim_records_what_a_rerun_needs(tmp_path):
    RunFolder(tmp_path / "run").claim(CONFIG, 2)
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["seed"] == CONFIG.seed
    (start,) = record["starts"]
    assert start["world_size"] == 2
    assert start["command"]
    assert start["commit"]
    assert start["versions"]["torch"] == provenance()["versions"]["torch"]


def test_same_run_may_go_on_elsewhere(tmp_path):
    run = RunFolder(tmp_path)
    assert run.claim(CONFIG, 1) == []
    run.append_metrics({"step": 1, "loss": 1.0})
    assert run.claim(replace(CONFIG, max_steps=9, epochs=5, eval_every=2), 1) == []
    assert run.claim(CONFIG, 4) == ["number of processes: 1 before, 4 now"]
    assert len(json.loads((tmp_path / "config.json").read_text())["starts"]) == 3


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        pytest.param({"seed": 1}, "seed was 0, is 1", id="seed"),
        pytest.param({"optim": replace(CONFIG.optim, lr=1.0)}, "optim.lr was 0.02, is 1.0", id="lr"),
        pytest.param({"model": replace(CONFIG.model, dcn=None)}, "model.dcn was v2, is None", id="model"),
    ],
)
def test_other_run_is_refused(tmp_path, change, flag):
    RunFolder(tmp_path).claim(CONFIG, 1)
    RunFolder(tmp_path).append_metrics({"step": 1, "loss": 1.0})
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(ValueError, match="another run") as caught:
        RunFolder(tmp_path).claim(replace(CONFIG, **change), 1)
    assert flag in str(caught.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_start_that_failed_claims_nothing(tmp_path):
    RunFolder(tmp_path).claim(replace(CONFIG, seed=5), 1)
    (tmp_path / "error-rank0.txt").touch()
    assert RunFolder(tmp_path).claim(CONFIG, 1) == []
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == CONFIG.seed
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").touch()
    with pytest.raises(ValueError, match="seed was 0, is 5"):
        RunFolder(tmp_path).claim(replace(CONFIG, seed=5), 1)


def test_field_younger_than_the_run_has_its_default(tmp_path):
    RunFolder(tmp_path).claim(CONFIG, 1)
    RunFolder(tmp_path).append_metrics({"step": 1, "loss": 1.0})
    record = json.loads((tmp_path / "config.json").read_text())
    del record["precision"], record["model"]["mask"]
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="precision was float32, is bf16"):
        RunFolder(tmp_path).claim(replace(CONFIG, precision="bf16"), 1)
    assert RunFolder(tmp_path).claim(CONFIG, 1) == []


@pytest.mark.parametrize("weights", ["imagenet", "none"])
def test_run_of_an_earlier_version_had_no_word_for_no_weights(tmp_path, weights):
    config = replace(CONFIG, weights=weights)
    RunFolder(tmp_path).claim(config, 1)
    RunFolder(tmp_path).append_metrics({"step": 1, "loss": 1.0})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").touch()
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, "weights": None}))
    with pytest.raises(ValueError, match=r"weights was None, is w\.pt"):
        RunFolder(tmp_path).claim(replace(CONFIG, weights=Path("w.pt")), 1)
    for _ in range(2):
        assert RunFolder(tmp_path).claim(config, 1) == []
        assert json.loads((tmp_path / "config.json").read_text())["weights"] is None


def test_weights_belong_to_a_run(tmp_path):
    RunFolder(tmp_path).claim(replace(CONFIG, weights="imagenet"), 1)
    RunFolder(tmp_path).append_metrics({"step": 1, "loss": 1.0})
    with pytest.raises(ValueError, match="weights was imagenet, is none"):
        RunFolder(tmp_path).claim(replace(CONFIG, weights="none"), 1)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"optim": replace(CONFIG.optim, schedule="cosine")}, id="cosine"),
        pytest.param({"data": replace(CONFIG.data, half_size=0.5)}, id="half size"),
    ],
)
def test_length_belongs_to_what_depends_on_it(tmp_path, change):
    config = replace(CONFIG, **change)
    RunFolder(tmp_path).claim(config, 1)
    RunFolder(tmp_path).append_metrics({"step": 1, "loss": 1.0})
    with pytest.raises(ValueError, match="epochs was 1, is 2"):
        RunFolder(tmp_path).claim(replace(config, epochs=2), 1)


def test_other_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        RunFolder(tmp_path).claim(CONFIG, 1)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write into --out"):
        RunFolder(tmp_path / "file" / "run").claim(CONFIG, 1)


def test_rewind_drops_what_will_be_written_again(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(1, 5):
        run.append_metrics({"step": step, "loss": 1.0})
    run.append_metrics({"step": 4, "AP": 0.5})
    run.append_metrics({"weights": "x.pt", "AP": 0.1})
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "lo')
    assert [line["AP"] for line in run.evaluations()] == [0.5]
    run.drop_metrics_after(3)
    assert [line.get("step") for line in read_lines(run.metrics)] == [1, 2, 3, None]
    assert run.metrics.read_text().endswith("}\n")
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def start_run(path):
    """Let a run take its first step; return its config.json."""
    run = RunFolder(path)
    run.claim(CONFIG, 1)
    run.append_metrics({"step": 1, "loss": 1.0})
    return path / "config.json"


@pytest.mark.parametrize(
    ("content", "got"),
    [
        pytest.param(b"", "got no JSON", id="empty"),
        pytest.param(b'{"seed": 0, "sta', "got no JSON", id="cut"),
        pytest.param(b"\0" * 500, "got no JSON", id="nul"),
        pytest.param(b'{"seed": "\xff"}', "got no JSON", id="utf-8"),
        pytest.param(b"[" * 100_000, "got no JSON", id="nested"),
        pytest.param(b"[1]", "got [1]", id="list"),
        pytest.param(b"null", "got None", id="null"),
        pytest.param(b"{}", "got None as its 'starts'", id="no-starts"),
        pytest.param(b'{"starts": "x"}', "got 'x' as its 'starts'", id="text"),
        pytest.param(b'{"starts": []}', "got [] as its 'starts'", id="empty-starts"),
        pytest.param(b'{"starts": [1]}', "got [1] as its 'starts'", id="number"),
        pytest.param(b'{"starts": [{"world_size": "2"}]}', "'world_size': '2'", id="world-size"),
        pytest.param(b'{"starts": {"world_size": 1}}', "as its 'starts'", id="object"),
    ],
)
def test_a_configuration_of_another_shape_is_named(tmp_path, content, got):
    path = start_run(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match="expected what a run writes there") as caught:
        RunFolder(tmp_path).claim(CONFIG, 1)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert got in text
    assert "\n" not in text
    assert path.read_bytes() == content

    (tmp_path / "metrics.jsonl").unlink()  # without progress it is written anew
    assert RunFolder(tmp_path).claim(CONFIG, 1) == []
    assert len(json.loads(path.read_text())["starts"]) == 1


@pytest.mark.parametrize("section", [5, [], "x", None, {"batch_size": {"a": 1}}])
def test_a_section_of_another_shape_is_another_run(tmp_path, section):
    path = start_run(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"optim": section}))
    with pytest.raises(ValueError, match="got that of another run: optim.lr was"):
        RunFolder(tmp_path).claim(replace(CONFIG, optim=replace(CONFIG.optim, lr=1.0)), 1)


@pytest.mark.parametrize("name", ["checkpoints", "pictures"])
@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_folder_that_became_something_else_is_named(tmp_path, name, kind):
    start_run(tmp_path)
    if kind == "file":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"{tmp_path / name}: expected a folder, got something else under its name"):
        RunFolder(tmp_path).claim(CONFIG, 1)


def test_a_configuration_that_cannot_be_read_or_written_is_named(tmp_path, monkeypatch):
    path = start_run(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(OSError, match=str(path)):
        RunFolder(tmp_path).claim(CONFIG, 1)

    def fill(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fill)
    with pytest.raises(OSError, match="No space left on device; [0-9,]+ bytes needed, [0-9,]+ bytes free") as caught:
        RunFolder(tmp_path / "new").claim(CONFIG, 1)
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'new' / 'config.json'}: ")
    assert os.listdir(tmp_path / "new") == []


def read_all(run):
    run.claim(CONFIG, 1)
    run.evaluations()
    newest_checkpoint(run.checkpoints, print)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "checkpoints/step-00000008-0123456789abcdef.pt"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path, name):
    run = RunFolder(tmp_path)
    run.claim(CONFIG, 1)
    run.checkpoints.mkdir()
    read_all(run)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(OSError, match=rf"{path}: expected a regular file, got a pipe or a device"):
        read_all(run)


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        pytest.param([{"warmup": 3}], 3, id="recorded"),
        pytest.param([{"warmup": 3}, {"warmup": 2}], 2, id="newest"),
        pytest.param([{}], CONFIG.optim.warmup, id="of-an-earlier-version"),
        pytest.param([{"warmup": 3}, {}], CONFIG.optim.warmup, id="earlier-version-in-between"),
    ],
)
def test_warm_up_of_the_run_is_known(tmp_path, starts, expected):
    run = RunFolder(tmp_path)
    run.claim(CONFIG, 1, warmup=1)
    run.append_metrics({"step": 1, "loss": 1.0})
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["starts"][0].pop("warmup") == 1
    record["starts"] = [{**record["starts"][0], **start} for start in starts]
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert run.recorded_choices().warmup == expected
