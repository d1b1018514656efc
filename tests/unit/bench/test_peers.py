"""Which peers are run, with which commands, and what their figures become."""

import asyncio
from pathlib import Path

import pytest

from bench.contest import GENERATE, OURS, Contest, Figures, prompt_tokens
from bench.load_cases import parse_case
from bench.loadgen import LoadFailed
from bench.output import make_console, print_rows
from bench.peer_commands import KNOWN_PEERS, ServedModel, find_peers
from bench.peer_record import StartedServer


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
    assert "vllm" in find_peers(model, {}, {})[1], "no interpreter beside it"
    (empty_path / "python").write_text("")
    commands, skipped = find_peers(model, {}, {})
    assert commands == {"vllm": KNOWN_PEERS["vllm"].command.replace("{python}", str(empty_path / "python"))}
    assert "-m vllm.entrypoints.openai.api_server --model {model}" in commands["vllm"]
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


def figures(rate: float, other_cores: float | None = 0.0) -> Figures:
    return Figures(rate, 0.1, 0.0, other_cores)


def test_ratios_are_taken_round_by_round(model: ServedModel) -> None:
    contest = Contest(model, [parse_case("c1")], {}, [])
    contest.taken = {
        OURS: {"c1": [Figures(10, 0.1, 0.0, 0.0), Figures(30, 0.2, 0.0, 0.1)]},
        GENERATE: {"c1": [Figures(5, 0.2, 0.0, 0.0), Figures(20, 0.1, 0.0, 0.0)]},
    }
    output, first = contest.rows()
    assert (output.case, output.better, output.ratio.low, output.ratio.high) == ("c1", "higher", 1.5, 2.0)
    assert (first.unit, first.better, first.ratio.low, first.ratio.high) == ("ms", "lower", 0.5, 2.0)
    assert (first.ours.low, first.clean_of_all) == (100, (2, 2))
    assert contest.num_disturbed == 0


def test_rounds_count_in_which_neither_side_was_disturbed(
    model: ServedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    contest = Contest(model, [parse_case("c1"), parse_case("c8"), parse_case("c32")], {}, [])
    contest.taken = {
        OURS: {
            "c1": [figures(10), figures(99, 0.4), figures(12), figures(14)],
            "c8": [figures(10, 0.4), figures(20)],
            "c32": [],
        },
        "other": {"c1": [figures(5), figures(1), figures(1, 0.9)], "c8": [figures(5), figures(5, None)], "c32": []},
    }
    c1, c8 = contest.rows()[:2]
    assert (c1.ours.median, c1.reference.median, c1.clean_of_all) == (10, 5, (1, 3))
    assert (c8.ratio.low, c8.ratio.high, c8.clean_of_all) == (2, 4, (0, 2))
    assert contest.num_disturbed == 4
    print_rows([c1, c8], make_console())
    shown = capsys.readouterr().out
    assert "1/3" in shown and "0/2, DISTURBED" in shown


def test_rows_name_both_precisions(model: ServedModel) -> None:
    contest = Contest(model, [parse_case("c1")], {}, [])
    contest.taken = {name: {"c1": [figures(10)]} for name in (OURS, "llama.cpp", "other")}
    contest.started = {
        OURS: StartedServer("remuda serve m1", {}, None, "int8"),
        "llama.cpp": StartedServer("llama-server -m m1.gguf", {}, "b1", "Q8_0"),
    }
    assert {each.benchmark for each in contest.rows() if each.unit == "tokens/s"} == {
        "m1: output, remuda (int8) against llama.cpp (Q8_0)",
        "m1: output, remuda (int8) against other (precision not known)",
    }


class Said:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def print(self, text: str, markup: bool = True) -> None:
        self.lines.append(text)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our own figures; what the peers do is real."""
    serve = Contest._serve

    async def ours_is_given(self: Contest, name: str, number: int) -> dict[str, Figures]:
        return {"c1": figures(1)} if name == OURS else await serve(self, name, number)

    monkeypatch.setattr(Contest, "_serve", ours_is_given)


@pytest.mark.usefixtures("given")
async def test_a_peer_that_does_not_start_is_left_out(model: ServedModel) -> None:
    contest = Contest(model, [parse_case("c1")], {"broken": "/bin/sh -c 'echo why >&2; exit 3'"}, [], {GENERATE: "no"})
    said = Said()
    await contest.round(0, said)  # type: ignore[arg-type]
    assert contest.commands == {} and set(contest.taken) == {OURS}
    assert "ended with status 3" in contest.skipped["broken"]
    assert "why" in "".join(said.lines)


@pytest.mark.usefixtures("given")
@pytest.mark.timeout(120)
async def test_a_model_that_transformers_cannot_load_costs_no_results(model: ServedModel) -> None:
    """transformers itself, on a directory without a checkpoint; what it gave before that stays."""
    contest = Contest(model, [parse_case("c1")], {}, [])
    contest.taken = {OURS: {"c1": [figures(3)]}, GENERATE: {"c1": [figures(2)]}}
    await contest.round(1, Said())  # type: ignore[arg-type]
    assert contest.skipped[GENERATE].startswith("in its round 2: the reference did not start")
    (output, _) = contest.rows()
    assert (output.ratio.median, output.clean_of_all) == (1.5, (1, 1))


async def test_a_contestant_that_takes_too_long_fails(model: ServedModel) -> None:
    contest = Contest(model, [], {}, [], case_limit_s=0.01)
    with pytest.raises(LoadFailed, match="c8 was not over in 0.01 s"):
        await contest._in_time("c8", asyncio.Event().wait())


def test_prompts_are_made_of_what_the_checkpoint_names(tmp_path: Path) -> None:
    assert prompt_tokens(tmp_path)[0] == 300
    (tmp_path / "good_ids.json").write_text("[4, 5]")
    assert prompt_tokens(tmp_path) == [4, 5]
