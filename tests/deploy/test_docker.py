"""The Dockerfile, checked as linters do, and its steps run outside of Docker. No image is built."""

import json
import re
import shutil
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.deploy.alerts import DEPLOY

ROOT = DEPLOY.parent
DOCKERFILE = DEPLOY / "docker" / "Dockerfile"


class Step(NamedTuple):
    """``stage``: the name of the stage that it is in, empty before the first."""

    stage: str
    name: str
    text: str


def steps(text: str) -> list[Step]:
    """Instructions in order, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    found, stage = [], ""
    for line in filter(str.strip, joined.splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.split()[-1]
        found.append(Step(stage, name, " ".join(rest.split())))
    return found


STEPS = steps(DOCKERFILE.read_text())


def _of(name: str) -> list[Step]:
    return [step for step in STEPS if step.name == name]


def complaints(found: list[Step]) -> list[str]:
    """What hadolint and its like would say."""
    complaints, stages, arguments = [], set(), set()
    for step in found:
        text = step.text
        if step.name == "FROM":
            base = text.split()[0]
            if base not in stages | {"${BASE}", "scratch"}:
                complaints.append(f"FROM {base}: bases come by digest, in BASE")
            stages.add(text.split()[-1])
        if step.name == "ARG":
            arguments.add(text.partition("=")[0])
        if step.name == "COPY" and (match := re.search(r"--from=(\S+)", text)) and match[1] not in stages:
            complaints.append(f"COPY from {match[1]}, which is no earlier stage")
        if step.name in ("ADD", "MAINTAINER", "ONBUILD"):
            complaints.append(f"{step.name} {text}")
        if step.name in ("ENTRYPOINT", "CMD") and not text.startswith("["):
            complaints.append(f"{step.name} through a shell: signals would not arrive")
        if step.name in ("ENV", "ARG") and re.search(r"(?i)token|password|secret|key", text):
            complaints.append(f"{step.name} {text}: no secrets in layers")
        if "apt-get install" in text and (
            "--no-install-recommends" not in text or "rm -rf /var/lib/apt/lists" not in text
        ):
            complaints.append(f"apt-get leaves more than is needed: {text}")
        if step.name == "RUN" and re.search(r"\bsudo\b|curl .*\| *(ba)?sh|:latest", text):
            complaints.append(f"RUN {text}")
        if step.name == "WORKDIR" and not text.startswith("/"):
            complaints.append(f"WORKDIR {text} is relative")
    unknown = {name for step in found for name in re.findall(r"\$\{(\w+)\}", step.text)} - arguments
    return [*complaints, *(f"${{{name}}} is no argument" for name in sorted(unknown))]


def test_linters_would_be_silent() -> None:
    assert complaints(STEPS) == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("FROM python:3.11", "by digest"),
        ("COPY --from=nowhere /a /b", "no earlier stage"),
        ("ADD https://a/b /c", "ADD"),
        ("CMD remuda serve", "through a shell"),
        ("ENV API_KEY=1", "no secrets"),
        ("RUN apt-get update && apt-get install -y curl", "apt-get"),
        ("RUN curl https://a | sh", "RUN"),
        ("WORKDIR src", "relative"),
        ("USER ${NOBODY}", "no argument"),
    ],
)
def test_the_check_sees(line: str, words: str) -> None:
    assert any(words in text for text in complaints([*STEPS, *steps(line)]))


def test_what_runs_is_a_numbered_user_and_the_last_word() -> None:
    for target in ("cpu", "cuda"):
        (*_, last) = [step for step in STEPS if step.stage == target]
        assert (last.name, last.text) == ("USER", "10001:10001"), "as the chart's pods"
    assert {"build", "bill", "sbom", "runtime", "cpu", "cuda"} == {step.stage for step in STEPS} - {""}


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [path for step in _of("COPY") if "--from" not in step.text for path in step.text.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert all(any(path == one or path.startswith(one + "/") for one in allowed) for path in copied)
    assert set(allowed) == {path if "/" not in path else "deploy/docker" for path in copied}


def test_every_step_of_the_script_is_used() -> None:
    named = set(re.findall(r"^(\w+)\)$", (DEPLOY / "docker" / "install.sh").read_text(), re.MULTILINE))
    used = {match[1] for step in _of("RUN") if (match := re.search(r"install\.sh (\w+)", step.text))}
    assert named == used
    unknown = subprocess.run(
        ["sh", str(DEPLOY / "docker" / "install.sh"), "fly", "x"], capture_output=True, text=True, check=False
    )
    assert (unknown.returncode, unknown.stderr) == (2, "no step fly\n")


def test_the_builder_that_reads_the_file_is_one_release() -> None:
    first = DOCKERFILE.read_text().splitlines()[0]
    assert re.fullmatch(r"# syntax=docker/dockerfile:\d+\.\d+\.\d+", first), "a tag like 1 moves"


def test_pythons_of_the_base_are_ours() -> None:
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=3.11,<3.13" and "Python 3.11 or 3.12" in DOCKERFILE.read_text()


def _context(directory: Path) -> None:
    """What COPY takes, and nothing else."""
    for step in _of("COPY"):
        if "--from" in step.text:
            continue
        *paths, target = step.text.split()
        for path in paths:
            to = directory / (Path(target) / path if target == "./" else Path(target))
            to.parent.mkdir(parents=True, exist_ok=True)
            ignore = shutil.ignore_patterns("__pycache__", "*.so")
            if (ROOT / path).is_dir():
                shutil.copytree(ROOT / path, to, ignore=ignore)
            else:
                shutil.copy(ROOT / path, to)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_remuda_is_built_from_what_is_copied(tmp_path: Path) -> None:
    """The build stage's steps and that of the bill of materials, in a clean directory, into a new environment."""
    source, venv = tmp_path / "src", tmp_path / "venv"
    _context(source)

    def run(*step: str | Path) -> str:
        command = ["sh", "deploy/docker/install.sh", *step]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("dependencies", venv)
    (packages,) = (venv / "lib").glob("python*/site-packages")
    assert not (packages / "engine").exists() and not (packages / "pytest").exists()
    assert run("remuda", venv).splitlines()[-1].startswith("remuda ")
    assert (packages / "engine" / "kernels" / "libremuda_native.so").exists()
    assert (packages / "engine" / "assets" / "remuda-tiny" / "config.json").exists()

    run("bill", venv, tmp_path / "sbom.json")
    bill = json.loads((tmp_path / "sbom.json").read_text())
    assert bill["bomFormat"] == "CycloneDX"
    listed = {one["name"]: one["version"] for one in bill["components"]}
    assert {name: listed.get(name) for name in ("remuda", "torch", "ray")} == {
        name: version(name) for name in ("remuda", "torch", "ray")
    }
    assert not (tmp_path / "venv-bill").exists(), "the image holds nothing of the tool"
