"""The GPU check, rehearsed without one: parts, limits, the record, the exit code."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_cuda import pretended_cuda

from bench import gpu_check, graph_timing, random_models
from bench import kernels as bench_kernels
from bench.arms import ARMS, EAGER
from bench.gpu_check import Part, Setting
from bench.workloads import WORKLOADS, libraries

ROOT = Path(__file__).resolve().parents[2]
BORROWED = {libraries.LIGER, libraries.QUACK, libraries.TORCHRL_LOOP, libraries.TORCHRL_VECTORIZED}


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting("cpu", 60.0, tmp_path)


def test_a_part_that_crashes_is_recorded_and_the_next_one_runs(setting: Setting, tmp_path: Path) -> None:
    def crashes(_: Setting) -> Part:
        raise RuntimeError("an illegal memory access was encountered")

    out = tmp_path / "record.json"
    parts = {"tests": crashes, "kernels": lambda _: Part("passed", "3 rows", result={"rows": [1, 2, 3]})}
    done = gpu_check.check(["tests", "kernels"], setting, out, parts)
    record = json.loads(out.read_text(encoding="utf-8"))
    assert record["parts"]["tests"]["status"] == "failed"
    assert "illegal memory access" in record["parts"]["tests"]["summary"]
    assert record["parts"]["kernels"]["result"] == {"rows": [1, 2, 3]}
    assert record["machine"]["versions"]["python"]
    assert [part.is_failure for part in done.values()] == [True, False]
    lines = gpu_check.table(done).splitlines()
    assert lines[1].split()[:2] == ["tests", "failed"]
    assert lines[2].endswith("3 rows")


def test_record_is_kept_when_a_later_part_kills_the_process(setting: Setting, tmp_path: Path) -> None:
    out = tmp_path / "record.json"

    def interrupted(_: Setting) -> Part:
        raise KeyboardInterrupt

    parts = {"kernels": lambda _: Part("passed", "ran"), "tests": interrupted}
    with pytest.raises(KeyboardInterrupt):
        gpu_check.check(["kernels", "tests"], setting, out, parts)
    assert list(json.loads(out.read_text(encoding="utf-8"))["parts"]) == ["kernels"]


def test_the_gpu_tests_are_all_named_and_import_without_what_a_gpu_machine_lacks() -> None:
    files = gpu_check.gpu_tests()
    marked = {
        f"tests/{path.name}"
        for path in (ROOT / "tests").glob("test_*.py")
        if "mark.gpu\n" in path.read_text()
    }
    assert set(files) == marked
    benches = ["bench.kernels", "bench.profile", "bench.tune", "bench.gpu_arms"]
    modules = ["conftest", *(Path(file).stem for file in files), *benches]
    script = (
        "import importlib, sys\n"
        "sys.modules |= dict.fromkeys(['diffusers', 'transformers', 'peft', 'tyro', 'nvtx'])\n"
        f"for name in {modules}: importlib.import_module(name)"
    )
    code, output = gpu_check.run([sys.executable, "-c", script], 60.0, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    assert code == 0, output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "least"),
    [
        pytest.param(
            ["--source-tree", "-k", "gae or normalized or effective or systematic"],
            40,
            id="a source tree",
        ),
        pytest.param([], 200, id="all"),
        # Compilation of every variant takes minutes; these have each op, and an update.
        pytest.param(["--launches", "-k", "float64 or size_that_is_found"], 60, id="launched"),
    ],
)
def test_the_gpu_tests_pass_on_a_pretended_device(options: list[str], least: int) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, so none is pretended")
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "pretended_gpu", *options]
    paths = f"{ROOT}:{ROOT / 'tests'}"
    code, output = gpu_check.run([*command, *gpu_check.gpu_tests()], 600.0, PYTHONPATH=paths)
    assert code == 0, output
    passed = int(gpu_check.test_counts(output).split()[0])
    assert passed > least


def test_the_sanitizers_see_every_tensor_and_stop_at_the_first_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    def run(arguments: list[str], seconds: float, **variables: str) -> tuple[int, str]:
        seen.append((arguments, variables))
        return (86 if "racecheck" in arguments else 0), "71 passed, 1 skipped in 4.00s"

    monkeypatch.setattr(gpu_check, "run", run)
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/usr/local/cuda/bin/{name}")
    part = gpu_check.tests(Setting("cuda", 300.0, tmp_path))
    (_, plain), *sanitized = seen
    assert plain == {}
    tools = [arguments[arguments.index("--tool") + 1] for arguments, _ in sanitized]
    assert tools == ["memcheck", "racecheck"]
    for arguments, variables in sanitized:
        assert arguments[arguments.index("--error-exitcode") + 1] == "86"
        # Under the caching allocator a tensor's end is not that of its memory.
        assert variables == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert part.status == "failed"
    assert part.result["memcheck"] == "71 passed, 1 skipped in 4.00s"
    assert part.summary.endswith("racecheck: exit code 86")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a part starts as a process runs in this one, whose device is pretended."""

    def here(arguments: list[str], seconds: float) -> tuple[int | None, str]:
        assert arguments[:2] == [sys.executable, "-m"]
        name = arguments[2]
        module = importlib.import_module(f"{name}.__main__" if name == "bench.learning" else name)
        return module.main(arguments[3:]) or 0, ""

    monkeypatch.setattr(gpu_check, "run", here)


def passed_on_a_pretended_device(name: str, folder: Path) -> list[dict[str, Any]]:
    """The rows of a part that runs in full."""
    part = gpu_check.PARTS[name](Setting("cuda", 400.0, folder, learning=folder / "learning", tiny=True))
    assert part.status == "passed", part.output
    assert part.result.get("missing", {}) in ({}, [])
    rows = part.result.get("rows", [])
    # Other projects' functions need not be installed.
    failed = [row for row in rows if "error" in row and row.get("provider") not in BORROWED]
    assert [row["error"] for row in failed] == []
    return rows


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process", "cuda")
@pytest.mark.parametrize("name", ["sampling", "update", "iteration", "learning", "profile"])
def test_a_part_runs_on_a_pretended_device(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The UNet's arms take a minute more, and are rehearsed on a CPU.
    tiny = partial(random_models.tiny_subjects, families=("dit",))
    monkeypatch.setattr(random_models, "tiny_subjects", tiny)
    rows = passed_on_a_pretended_device(name, tmp_path)
    if name in ("sampling", "update"):
        assert {row["arm"] for row in rows} == set(ARMS)
    if name == "sampling":
        # Nothing is compiled here, so nothing may differ; an update moves the weights of all arms.
        assert {row["difference"] for row in rows if row["arm"] == "compile"} == {0.0}
    if name == "iteration":
        assert {row["contender"] for row in rows if "lacfast" in row["contender"]} == {
            "lacfast" if arm == EAGER else f"lacfast, {arm}" for arm in ARMS
        }


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_kernels_are_compiled_launched_and_captured_on_a_pretended_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles every kernel for the arguments of its launch; what computes are the CPU's."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device, so none is pretended")
    from recorded_launches import LaunchRecorder

    # The same lines for 200 calls in a graph take minutes.
    quick = partial(graph_timing.graph_seconds, calls=3, replays=1)
    monkeypatch.setattr(bench_kernels, "cold_and_hot", partial(graph_timing.cold_and_hot, seconds=quick))
    empty = partial(graph_timing.empty_node_seconds, calls=3, replays=1)
    monkeypatch.setattr(bench_kernels, "empty_node_seconds", empty)
    recorder = LaunchRecorder()
    with pretended_cuda(recorder):
        rows = passed_on_a_pretended_device("kernels", tmp_path)
    assert {row["op"] for row in rows} == set(WORKLOADS)
    launched = Counter(launch[4].name for launch in recorder.launches)
    # Warm-up and capture.
    assert launched["empty_kernel"] == 3 + 3
    assert {
        *("normal_noise_kernel", "gaussian_step_kernel", "step_log_prob_kernel"),
        *("step_log_prob_backward_kernel", "transition_sums_kernel", "totals_kernel"),
        *("transition_grad_kernel", "pool_kernel", "pool_tiles_kernel"),
    } <= set(launched)


def test_a_process_is_stopped_at_its_limit() -> None:
    script = "import time; print('half done', flush=True); time.sleep(60)"
    code, output = gpu_check.run([sys.executable, "-c", script], 1.5)
    assert code is None
    assert "half done" in output
    part = gpu_check.judged(code, output, 1.5, "2 rows", {"rows": [1, 2]})
    assert (part.status, part.result) == ("timed out", {"rows": [1, 2]})
    assert part.is_failure


def test_exit_code_decides_and_a_failure_keeps_its_output() -> None:
    code, output = gpu_check.run([sys.executable, "-c", "print('why'); raise SystemExit(3)"], 60)
    part = gpu_check.judged(code, output, 60, "", {})
    assert (part.status, part.output.strip()) == ("failed", "why")
    assert gpu_check.judged(0, "fine", 60, "", {}).output == ""


def test_processes_import_the_checkout() -> None:
    code, output = gpu_check.run([sys.executable, "-c", "import bench, cProfile; print(bench.__file__)"], 60)
    assert code == 0, output
    assert Path(output.strip()).parent == ROOT / "bench"


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("....\n31 passed, 2 skipped in 40.12s\n", "31 passed, 2 skipped in 40.12s"),
        ("===== 1 failed, 30 passed in 9.00s =====", "1 failed, 30 passed in 9.00s"),
        ("Segmentation fault", "pytest did not finish"),
    ],
)
def test_counts_are_read_from_pytest(output: str, counts: str) -> None:
    assert gpu_check.test_counts(output) == counts


def test_a_torn_record_of_a_part_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text('{"rows": [', encoding="utf-8")
    assert gpu_check.left_in(tmp_path / "torn.json") == {}
    assert gpu_check.left_in(tmp_path / "absent.json") == {}


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parser().parse_args(["--only", "everything"])
    assert "'kernels'" in capsys.readouterr().err
    assert gpu_check.parser().parse_args([]).only == list(gpu_check.DEFAULT_PARTS)


def test_tiny_sizes_are_refused_for_parts_that_have_none_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--tiny", "--only", "kernels,tune"]) == 2
    assert "--tiny would be ignored by tune on a GPU" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["sampling,update,iteration"], ["sampling", "update,", "iteration"]])
def test_parts_are_separated_by_commas_or_spaces(names: list[str]) -> None:
    assert gpu_check.parser().parse_args(["--only", *names]).only == ["sampling", "update", "iteration"]


def test_parts_with_models_are_skipped_without_diffusers(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    for name in ("sampling", "update", "iteration", "learning"):
        part = gpu_check.PARTS[name](setting)
        assert part.status == "skipped"
        assert "needs diffusers" in part.summary


@pytest.mark.slow
def test_models_are_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    options = ["--device", "cpu", "--only", "sampling,update,iteration", "--out", str(out)]
    assert gpu_check.main(options) == 0
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert {part["status"] for part in parts.values()} == {"passed"}
    for name in ("sampling", "update"):
        rows = parts[name]["result"]["rows"]
        assert {row["model"] for row in rows} == {"tiny dit", "tiny unet"}
        assert {row["arm"] for row in rows} == {"eager", "graph"}
        assert {row["values"] for row in rows if "values" in row} == {"none", "shared", "branch"}
    rows = parts["iteration"]["result"]["rows"]
    assert {row["phase"] for row in rows} == {"sampling", "reference", "update", "iteration"}


@pytest.mark.slow
def test_learning_is_rehearsed_on_a_cpu(tmp_path: Path) -> None:
    folder, out = tmp_path / "learning", tmp_path / "cpu.json"
    options = ["--device", "cpu", "--only", "learning", "--learning", str(folder), "--out", str(out)]
    assert gpu_check.main([*options, "--seconds", "240"]) == 0
    part = json.loads(out.read_text(encoding="utf-8"))["parts"]["learning"]
    arms = ("budget-alone", "checker-alone", "checker-and-budget", "checker-first")
    finished = [f"budget/dit/{arm}-seed0" for arm in arms]
    assert part["result"]["curves"] == finished
    assert part["result"]["missing"] == []
    assert part["status"] == "passed"
    assert part["summary"].endswith("all of them")
    assert "64x64" in (folder / "results-rehearsal.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_rehearsal_on_a_cpu_runs_as_a_script(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    script = str(ROOT / "bench" / "gpu_check.py")
    options = ["--device", "cpu", "--only", "tests", "kernels", "--out", str(out)]
    command = [sys.executable, script, *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "tests": "skipped",
        "kernels": "passed",
    }
    assert {row["op"] for row in parts["kernels"]["result"]["rows"]} >= {"gaussian_step", "ppo_loss", "gae"}
    assert "kernels   passed" in result.stdout
