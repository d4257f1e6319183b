"""Results as data: what is read, told, drawn and compared, and that the README says what the data say."""

import csv
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import attention, embedding, figures, floors, plots, publish, results, summaries
from benchmarks.cli import main
from benchmarks.errors import BenchmarkError
from benchmarks.results import Cell, Device, Fault, Run
from benchmarks.timing import Failure, Samples

README = Path(__file__).parent.parent / "README.md"
DEVICES = results.read_devices(results.FOLDER)
CPU = next(device for device in DEVICES if device.name == "amd-epyc-zen5-2cores")
CASE = {"N": 4, "causal": True}


def run_of(ours: float, floor: float = 1.0, spread: float = 0.01, peer: float = 2.0, **changed: object) -> Run:
    """Three competitors in one case."""

    def cell(name: str, role: results.Role, seconds: float) -> Cell:
        return Cell(CASE, name, role, "forward", "seconds", seconds, seconds - spread, seconds + spread)

    environment = {"date": "2026-01-01", "device_name": "x", "cpu_capability": "y", "threads": 1, **changed}
    cells = [cell("floor", "floor", floor), cell("mine", "ours", ours), cell("theirs", "peer", peer)]
    return Run("attention", environment, {}, cells)


class TestReadme:
    def test_tables_and_sentences_are_those_of_the_data(self) -> None:
        text = README.read_text(encoding="utf-8")
        assert publish.filled(text, DEVICES) == text, "python -m benchmarks report --readme README.md"
        assert len(publish.MARKER.findall(text)) == text.count("<!-- results:") == text.count("<!-- /results") >= 8

    def test_plot_is_that_of_the_data(self) -> None:
        from PIL import Image

        with Image.open(CPU.folder / publish.HEADLINE) as image:
            drawn = image.info["Description"]
        assert drawn == plots.described(figures.main_job(CPU.run("main")).panels), "report --readme draws it"
        assert f"({(CPU.folder / publish.HEADLINE).relative_to(README.parent)})" in README.read_text(encoding="utf-8")

    def test_prose(self) -> None:
        text = " ".join(README.read_text(encoding="utf-8").split())
        for sentence, holds in claims():
            assert sentence in text
            assert holds, sentence


def claims() -> list[tuple[str, bool]]:
    """What the README says between its tables, and whether the data agree."""
    main_run, kernels = CPU.run("main"), CPU.run("attention", cpu_capability="AVX512")
    shared = CPU.run("shared-prompt").cells[0].case
    grid = {tuple(cell.case[name] for name in "BNMDP") for cell in kernels.cells if cell.case["N"] != 1}

    def ratios(model: str, *methods: str, direction: str = "forward+backward") -> list[float]:
        cells = [c for c in main_run.select(direction=direction) if str(c.case["model"]).startswith(model)]
        return [main_run.times_floor(c) or math.nan for c in cells if c.competitor.startswith(methods)]

    prefixes = [
        ratio
        for model in ("encoder", "decoder")
        for direction in summaries.DIRECTIONS
        for ratio in ratios(model, "prefix tuning", "APT", direction=direction)
    ]
    numbers = {1: "one", 2: "two", 4: "four"}
    facts = {name: ".".join(str(main_run.environment[name]).split(".")[:2]) for name in ("torch", "peft")}
    return [
        (
            f"on {numbers[main_run.environment['threads']]} cores of an {main_run.environment['device_name']} (Zen 5), "
            f"float32, PyTorch {facts['torch']}, PEFT {facts['peft']}.",
            all("float32" in description for description in main_run.settings["models"].values()),
        ),
        *(
            (f"{model} (", "4 layers of 256" in description and "8 x 128 tokens" in description)
            for model, description in (
                (title.split(",")[0].capitalize(), description)
                for title, description in main_run.settings["models"].items()
            )
        ),
        ("A prefix costs less than the noise of the measurement", max(prefixes) < 1.05),
        ("On a decoder a soft prompt costs a tenth of a step", max(ratios("decoder", "PT", "DePT", "ADePT")) < 1.15),
        ("running it in every row doubles the step", 1.85 < ratios("decoder", "PEFT prompt")[0] < 2.15),
        ("On an encoder prompt tokens see the input", min(ratios("encoder", "PT", "DePT", "ADePT")) > 1.15),
        ("geometric means over five shapes", len(grid) == 5),
        (f"Llama shape, {shared['layers']} layers of {shared['width']}, {shared['rows']} x {shared['length']}", True),
    ]


class TestFilesAndCells:
    def test_what_is_written_is_read(self, tmp_path: Path) -> None:
        timed = Cell.timed(CASE, "timed", "ours", "forward", Samples([0.3, 0.1, 0.2]))
        fault = Fault(CASE, "broken", Failure("forward", "RuntimeError: no", "Traceback"))
        whole = replace(run_of(1.0), cells=[*run_of(1.0).cells, timed], faults=[fault])
        path = results.write(whole, tmp_path)
        assert path == tmp_path / "attention.json"
        assert results.read(path) == whole
        assert timed.p50 == 0.2
        assert timed.samples == [0.3, 0.1, 0.2]

    @pytest.mark.parametrize("content", ["{", "{}", "[]", '{"suite": "else", "environment": {}}'])
    def test_other_files_are_refused(self, content: str, tmp_path: Path) -> None:
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(BenchmarkError, match=r"other\.json"):
            results.read(tmp_path / "other.json")

    def test_other_files_beside_results_are_left_out(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        results.write(run_of(1.0), tmp_path)
        (tmp_path / "raw.json").write_text("{}")
        (device,) = results.read_devices(tmp_path)
        assert [run.suite for run in device.runs] == ["attention"]
        assert "left out: " in capsys.readouterr().err

    def test_a_backward_pass_is_compared_with_a_floor_that_only_goes_forward(self) -> None:
        run = run_of(1.0, floor=0.5)
        both = replace(run.cells[1], direction="forward+backward")
        assert run.times_floor(both) == 2.0

    def test_every_committed_figure_has_a_role_and_a_floor(self) -> None:
        for run in CPU.runs:
            ours = set() if run.suite == "adapterhub" else {"ours"}  # in an environment that does not take ours
            assert {cell.role for cell in run.cells} == {"floor", "peer"} | ours
            assert all(run.times_floor(cell) for cell in run.cells if cell.quantity in ("seconds", "bytes"))


class TestFloors:
    @pytest.mark.parametrize("causal", [False, True])
    def test_attention(self, causal: bool) -> None:
        shape = attention.Shape(2, 4, 2, 5, 7, 8, 3)
        inputs = attention.Inputs(shape, torch.float32, causal, torch.device("cpu"))
        case = {**vars(shape), "dtype": "float32", "causal": causal}
        fused, tokens = (
            floors.attention(Cell(case, "", role, "forward", "seconds", 1.0)) for role in ("ours", "floor")
        )
        visible = int(inputs.mask.sum()) if inputs.mask is not None else shape.N * (shape.M + shape.P)
        assert fused.flops == 4 * shape.B * shape.Hq * shape.D * visible
        assert tokens.flops == 4 * shape.B * shape.Hq * shape.D * (visible - shape.N * shape.P)
        moved = [*inputs.peers()["fused"].leaves, inputs.concat()]
        assert fused.bytes == sum(tensor.nbytes for tensor in moved)
        both = floors.attention(Cell(case, "", "ours", "forward+backward", "seconds", 1.0))
        assert (both.flops, both.bytes) == (3.5 * fused.flops, 2 * fused.bytes)

    @torch.no_grad()
    def test_flex_attention_is_concatenation(self) -> None:
        inputs = attention.Inputs(attention.Shape(2, 4, 2, 5, 7, 16, 3), torch.float32, True, torch.device("cpu"))
        for name, peer in inputs.peers(flex=True).items():
            if name != "tokens":
                torch.testing.assert_close(peer.call(), inputs.concat())

    @pytest.mark.parametrize("method", ["dept", "adept"])
    def test_embedding_products(self, method: str) -> None:
        setting = embedding.Setting(64, 8, 1, 6, 2, 3, "text")
        inputs = embedding.Inputs(setting, torch.float32, torch.device("cpu"))
        inputs.ids = torch.arange(6).view(1, 6)  # no token twice: eager PyTorch does no product that is not needed
        case = inputs.case(setting, "float32")
        peer = inputs.peers()[f"{method}_eager"]
        for direction in summaries.DIRECTIONS:
            with FlopCounterMode(display=False) as counter:
                output = peer.call()
                if "backward" in direction:
                    torch.autograd.grad(output, peer.leaves, inputs.grad)
            floor = floors.embedding(Cell(case, method, "ours", direction, "seconds", 1.0))
            additions = floor.flops - counter.get_total_flops()
            assert 0 < additions <= 6 * inputs.grad.numel()
            assert floor.bytes >= inputs.grad.nbytes

    def test_seconds_are_those_of_the_slower(self) -> None:
        rates = {"float32": 100.0, floors.COPY: 10.0}
        assert floors.Floor(100, 5).seconds(rates, "float32") == 1.0
        assert floors.Floor(100, 50).seconds(rates, "float32") == 5.0
        assert floors.Floor(100, 50).seconds({}, "float32") is None


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the report of one file is."""
    source, out = tmp_path_factory.mktemp("device"), tmp_path_factory.mktemp("report")
    (source / "shared_prompt.json").write_bytes((CPU.folder / "shared_prompt.json").read_bytes())
    assert main(["report", "--results", str(source), "--out", str(out)]) == 0
    return out


class TestReport:
    def test_the_page_needs_nothing_else(self, out: Path) -> None:
        page = (out / "index.html").read_text(encoding="utf-8")
        assert not re.search(r"https?://|<script|url\(|@import", page)
        assert set(re.findall(r'(?:src|href|srcset)="(\w+:)', page)) == {"data:"}
        assert "prefers-color-scheme: dark" in page
        assert 'name="viewport"' in page
        for table in (summaries.shared_prompt(CPU.run("shared-prompt"), S) for S in (60, 100)):
            assert all(f"<td>{cell}</td>" in page for row in table.rows for cell in row)

    def test_the_table_has_every_cell(self, out: Path) -> None:
        with (out / "results.csv").open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        cells = CPU.run("shared-prompt").cells
        assert [float(row["p50"]) for row in rows] == [cell.p50 for cell in cells]
        assert {row["suite"] for row in rows} == {"shared-prompt"}

    def test_a_readme_is_filled(self, tmp_path: Path) -> None:
        text = "before\n<!-- results: here/attention-avx2 -->\nold\n<!-- /results -->\nafter\n"
        here = [Device(tmp_path / "here", CPU.runs)]
        assert publish.filled(text, here).splitlines()[2].startswith("With AVX2 alone")
        with pytest.raises(BenchmarkError, match="here/nothing"):
            publish.filled(text.replace("attention-avx2", "nothing"), here)


class TestCompare:
    def _status(self, tmp_path: Path, old: Run, new: Run) -> int:
        results.write(old, tmp_path / "old")
        return main(["compare", str(results.write(new, tmp_path / "new")), "--against", str(tmp_path / "old")])

    @pytest.mark.parametrize(
        ("new", "status", "said"),
        [
            (run_of(1.0), 0, "0 moved"),
            (run_of(2.0, floor=2.0, peer=4.0), 0, "0 moved"),  # all is slower: the machine
            (run_of(1.3), 1, "+30% | regression"),
            (run_of(0.7), 0, "-30% | better"),
            (run_of(1.3, spread=0.3), 0, "0 moved"),  # within the noise
            (run_of(1.03, spread=0.0), 0, "0 moved"),  # within the tolerance
            (run_of(1.0, peer=3.0), 0, "+50% | a peer"),
            (replace(run_of(1.0), faults=[Fault(CASE, "mine", Failure("forward", "Oh: no", ""))]), 1, "Oh: no"),
            (replace(run_of(1.0), faults=[Fault(CASE, "theirs", Failure("forward", "Oh: no", ""))]), 0, "Oh: no"),
        ],
    )
    def test_ratios(self, new: Run, status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self._status(tmp_path, run_of(1.0), new) == status
        assert said in capsys.readouterr().out

    @pytest.mark.parametrize(("load", "busy"), [(0.3, False), (1.5, True), (None, False)])
    def test_a_busy_machine_is_said(
        self, load: float | None, busy: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self._status(tmp_path, run_of(1.0), run_of(1.0, load_average=load, cpu_count=2)) == 0
        assert ("the machine was busy" in capsys.readouterr().out) == busy

    def test_another_device_is_no_comparison(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self._status(tmp_path, run_of(1.0), run_of(1.0, threads=3)) == 2
        assert "0 results of attention" in capsys.readouterr().err

    def test_other_cases_are_no_comparison(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        other = [replace(cell, case={"N": 5}) for cell in run_of(1.0).cells]
        assert self._status(tmp_path, run_of(1.0), replace(run_of(1.0), cells=other)) == 2
        assert "no case in common" in capsys.readouterr().err

    def test_committed_results_against_themselves(self, capsys: pytest.CaptureFixture[str]) -> None:
        for path in sorted(CPU.folder.glob("*.json")):
            assert main(["compare", str(path)]) == 0
        assert json.dumps(capsys.readouterr().out).count("; 0 moved") == len(CPU.runs)
