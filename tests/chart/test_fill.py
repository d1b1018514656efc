"""The script that copies a checkpoint to a node's disk, run as it is rendered."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helm_python
import pytest

from tests.chart.rendering import CHART, NAMESPACE, RELEASE, Values, all_pods, at, merged, only, preset, render


def _named(model: str) -> Values:
    """The preset's model in a directory of that name."""
    return {"model": {"path": model}, "sizing": {"model": {"path": model}}}


DISK = merged(
    preset("405b-bf16"),
    {"weights": {"source": "disk"}, "engine": {"nodeSelector": {"nvme": "yes"}}},
    _named("llama"),
)


def _script() -> str:
    (container,) = only(render(DISK), "Job")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["sh", "-c"]
    return str(container["args"][0])


def _fill(source: Path, disk: Path) -> "subprocess.CompletedProcess[str]":
    environment = os.environ | {"FROM": str(source), "TO": str(disk)}
    return subprocess.run(
        ["sh", "-c", _script()], env=environment, capture_output=True, text=True, timeout=30, check=False
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """As the hub's cache has them: some files are links."""
    source = tmp_path / "claim" / "llama"
    (source / "original").mkdir(parents=True)
    (source / "blob").write_bytes(os.urandom(100_000))
    (source / "model with space.safetensors").symlink_to(source / "blob")
    (source / "original" / "params.json").write_text("{}")
    return source


def _content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".filling")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_everything_arrives_and_is_not_copied_again(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "llama"
    first = _fill(source, disk)
    assert first.returncode == 0 and len(first.stdout.splitlines()) == 3
    assert _content(disk) == _content(source) and not any(path.is_symlink() for path in disk.rglob("*"))
    second = _fill(source, disk)
    assert (second.returncode, second.stdout) == (0, "")


def test_what_was_cut_off_or_changed_is_copied_again(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "llama"
    assert _fill(source, disk).returncode == 0
    (disk / "blob").rename(disk / "blob.part")
    (source / "original" / "params.json").write_text('{"new": 1}')
    os.utime(source / "original" / "params.json", (4e9, 4e9))
    again = _fill(source, disk)
    assert sorted(again.stdout.splitlines()) == ["./blob", "./original/params.json"]
    assert _content(disk) == _content(source)


def test_another_file_of_the_same_name_is_copied_however_old(source: Path, tmp_path: Path) -> None:
    """A checkpoint that was downloaded long before the one whose place it takes; once it is of the same size, too."""
    disk = tmp_path / "disk" / "llama"
    assert _fill(source, disk).returncode == 0
    file = source / "original" / "params.json"
    for text, time_s in (('{"old": 1}', 1e9), ('{"old": 2}', 1.1e9)):
        file.write_text(text)
        os.utime(file, (time_s, time_s))
        assert _fill(source, disk).stdout.splitlines() == ["./original/params.json"]
        assert _content(disk) == _content(source)
    assert _fill(source, disk).stdout == ""


def test_files_that_cannot_be_listed_fail_the_container(source: Path, tmp_path: Path) -> None:
    (source / "circle").symlink_to(source)
    assert _fill(source, tmp_path / "disk").returncode != 0
    nothing = tmp_path / "empty"
    nothing.mkdir()
    failed = _fill(nothing, tmp_path / "disk")
    assert failed.returncode != 0 and f"{nothing} holds no files" in failed.stderr


def test_a_failed_copy_fails_the_container_and_leaves_no_half_file(source: Path, tmp_path: Path) -> None:
    """The file is where the disk's directory should be made."""
    disk = tmp_path / "disk" / "llama"
    disk.mkdir(parents=True)
    (disk / "original").write_text("in the way")
    failed = _fill(source, disk)
    assert failed.returncode != 0 and not (disk / "original" / "params.json").exists()


def test_two_pods_of_a_node_take_turns(source: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk" / "llama"
    disk.mkdir(parents=True)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
    lock = disk / ".filling"
    first = subprocess.Popen(
        [sys.executable, "-c", holder, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdin is not None and first.stdout is not None and first.stdout.readline() == "held\n"
    environment = os.environ | {"FROM": str(source), "TO": str(disk)}
    second = subprocess.Popen(["sh", "-c", _script()], env=environment, stdout=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    assert _content(disk) == {}
    first.communicate("\n", timeout=10)
    assert second.wait(10) == 0 and _content(disk) == _content(source)


def test_job_and_engine_pods_fill_and_front_ends_mount_the_claim() -> None:
    documents = render(DISK)
    fillers = [pod["spec"]["initContainers"][0] for pod in all_pods(documents) if "initContainers" in pod["spec"]]
    job = only(documents, "Job")
    assert fillers == [job["spec"]["template"]["spec"]["containers"][0]] * 2
    assert job["spec"]["completions"] == 2
    volumes = only(documents, "Deployment", "frontend")["spec"]["template"]["spec"]["volumes"]
    (weights,) = [volume for volume in volumes if volume["name"] == "weights"]
    assert weights["persistentVolumeClaim"] == {"claimName": "models", "readOnly": True}
    other = only(render(merged(DISK, _named("other"))), "Job")
    assert other["metadata"]["name"] != job["metadata"]["name"]
    assert only(render(merged(DISK, at("frontend.replicas", 5))), "Job") == job
    filled = render(merged(DISK, at("weights.existingClaim", "")))
    assert not [one for one in filled if one["kind"] == "Job"] and all(
        "initContainers" not in pod["spec"] for pod in all_pods(filled)
    )


def test_a_job_of_other_pods_has_another_name(tmp_path: Path) -> None:
    """Kubernetes refuses to change the pods of a Job that is there."""
    copy = tmp_path / "remuda"
    shutil.copytree(CHART, copy)
    text = (copy / "Chart.yaml").read_text()
    (copy / "Chart.yaml").write_text(re.sub(r"(?m)^appVersion: .*$", 'appVersion: "99.0.0"', text))
    newer = helm_python.Chart.load(copy).render(DISK, name=RELEASE, namespace=NAMESPACE)
    names = re.findall(r"(?m)^  name: (\S+)$", newer["remuda/templates/weights-job.yaml"])
    for change in ({}, {"serviceAccount": {"engineName": "other"}}, {"image": {"pullSecrets": ["pull"]}}):
        names.append(only(render(merged(DISK, change)), "Job")["metadata"]["name"])
    assert len(names) == len(set(names)) == 4
