"""The launcher: several processes under torchrun end with their own exit code and sentence."""

from __future__ import annotations


def test_a_refusal_in_several_processes(start, tmp_path):
    process = start("sh", "train_scripts/codebook.sh", "--options", f"model.pretrained={tmp_path}/no.pth",
                    f"run.output_dir={tmp_path}/c", CONFIG="lavis/projects/nano/pretrain_codebook.yaml",
                    NPROC_PER_NODE="2")
    out, error = process.communicate(timeout=150)
    assert process.returncode == 2, error
    assert "no.pth: there is no such stage-1 checkpoint" in error and "Traceback" not in out + error


def test_a_wrong_configuration_is_refused_before_processes_start(capsys, monkeypatch):
    import launch

    monkeypatch.setenv("NPROC_PER_NODE", "2")
    arguments = ["--config", "lavis/projects/nano/pretrain_qformer.yaml", "--port", "18273", "--options"]
    assert launch.main([*arguments, "model.nonsense=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("launch.py: ") and "model: unknown key 'nonsense'" in error and error.count("\n") == 1


def test_numbers_of_processes_are_checked(capsys, monkeypatch):
    import launch

    arguments = ["--config", "x.yaml", "--port", "18273"]
    monkeypatch.setenv("NNODES", "two")
    assert launch.main(arguments) == 2 and "NNODES must be a positive number" in capsys.readouterr().err
    monkeypatch.setenv("NNODES", "2")
    assert launch.main(arguments) == 2 and "first one's address" in capsys.readouterr().err


def test_a_single_process_needs_no_torchrun(capsys, monkeypatch, tmp_path):
    """The released configuration without its data: exit code 2 and one sentence that says what to set."""
    import launch

    monkeypatch.setenv("NPROC_PER_NODE", "1")
    monkeypatch.chdir(tmp_path)
    assert launch.main(["--config", "lavis/projects/blip2/train/pretrain_codebook.yaml", "--port", "18272"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "data/cc3m/cc3m.json" in error
    assert "datasets.conceptual_caption_3m.build_info" in error and not list(tmp_path.iterdir())
