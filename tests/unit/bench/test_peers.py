"""Which peers are run, with which commands, and what their figures become."""

from pathlib import Path

import pytest

from bench.load_cases import parse_case
from bench.peer_commands import KNOWN_PEERS, ServedModel, find_peers
from bench.peers import GENERATE, OURS, Contest, Figures, prompt_tokens


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    (tmp_path / "m1").mkdir()
    return ServedModel.of(tmp_path / "m1", 2, tmp_path / "m1.gguf")


@pytest.fixture(autouse=True)
def empty_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is installed but what a test puts here."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def test_what_is_not_installed_is_skipped_by_name(model: ServedModel) -> None:
    commands, skipped = find_peers(model, {}, {})
    assert commands == {}
    assert set(skipped) == {"vllm", "llama.cpp"}
    assert "REMUDA_BENCH_VLLM" in skipped["vllm"] and "llama-server" in skipped["llama.cpp"]


def test_installed_programs_are_found(model: ServedModel, empty_path: Path) -> None:
    for program in ("vllm", "llama-server"):
        (empty_path / program).write_text("#!/bin/sh\n")
        (empty_path / program).chmod(0o755)
    commands, skipped = find_peers(model, {}, {})
    assert commands == {"vllm": KNOWN_PEERS["vllm"].command}
    assert "--gguf" in skipped["llama.cpp"]
    model.gguf.write_bytes(b"")
    assert set(find_peers(model, {}, {})[0]) == {"vllm", "llama.cpp"}


def test_an_argument_wins_over_the_environment(model: ServedModel) -> None:
    commands, skipped = find_peers(model, {"vllm": "mine", "other": "x {port}"}, {"REMUDA_BENCH_VLLM": "theirs"})
    assert commands == {"vllm": "mine", "other": "x {port}"}
    assert set(skipped) == {"llama.cpp"}
    assert find_peers(model, {}, {"REMUDA_BENCH_LLAMACPP": "start {name} {port}"})[0] == {
        "llama.cpp": "start {name} {port}"
    }


def test_commands_are_filled_in_and_split_once(model: ServedModel) -> None:
    command = model.command("sh -c 'start {name}' {model} -p {port} -t {threads}", 81)
    assert command == ["sh", "-c", "start m1", str(model.directory), "-p", "81", "-t", "2"]


def test_ratios_are_taken_round_by_round(model: ServedModel) -> None:
    contest = Contest(model, [parse_case("c1")], {}, [])
    contest.taken = {
        OURS: {"c1": [Figures(10, 0.1, 0.0, 0.0), Figures(30, 0.2, 0.0, 0.4)]},
        GENERATE: {"c1": [Figures(5, 0.2, 0.0, None), Figures(20, 0.1, 0.0, None)]},
    }
    output, first = contest.rows()
    assert (output.case, output.better, output.ratio.low, output.ratio.high) == ("c1", "higher", 1.5, 2.0)
    assert (first.unit, first.better, first.ratio.low, first.ratio.high) == ("ms", "lower", 0.5, 2.0)
    assert first.ours.low == 100
    assert contest.num_disturbed == 1


async def test_a_peer_that_does_not_start_is_left_out(model: ServedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    contest = Contest(model, [parse_case("c1")], {"broken": "/bin/sh -c 'echo why >&2; exit 3'"}, [], {GENERATE: "no"})
    serve = Contest._serve

    async def ours_is_given(self: Contest, name: str, number: int) -> dict[str, Figures]:
        return {"c1": Figures(1, 1, 1, 0.0)} if name == OURS else await serve(self, name, number)

    monkeypatch.setattr(Contest, "_serve", ours_is_given)
    said: list[str] = []

    class Said:
        def print(self, text: str) -> None:
            said.append(text)

    await contest.round(0, Said())  # type: ignore[arg-type]
    assert contest.commands == {} and set(contest.taken) == {OURS}
    assert "ended with status 3" in contest.skipped["broken"]
    assert "why" in "".join(said)


def test_prompts_are_made_of_what_the_checkpoint_names(tmp_path: Path) -> None:
    assert prompt_tokens(tmp_path)[0] == 300
    (tmp_path / "good_ids.json").write_text("[4, 5]")
    assert prompt_tokens(tmp_path) == [4, 5]
