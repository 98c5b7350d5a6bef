"""Prompts come from files, folders and functions, in an order that seed and iteration decide alone."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from refusals import Refusal

import lacfast
from lacfast.prompts import PromptSet, load_prompts
from lacfast.runs.steer import prompts_to_steer

PROMPTS = PromptSet.create([f"prompt {index}" for index in range(7)])
GENEVAL = {
    "tag": "position",
    "include": [{"class": "bench", "count": 1}, {"class": "cup", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a cup left of a bench",
}


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_prompt_is_drawn_once_per_pass() -> None:
    drawn = [text for iteration in range(7) for text in PROMPTS.draw(3, seed=0, iteration=iteration).texts]
    for start in range(0, 21, 7):
        assert sorted(drawn[start : start + 7]) == PROMPTS.texts
    assert drawn[:7] != drawn[7:14]


def test_a_draw_depends_on_seed_and_iteration_only() -> None:
    assert PROMPTS.draw(5, seed=1, iteration=4) == PROMPTS.draw(5, seed=1, iteration=4)
    assert PROMPTS.draw(5, seed=1, iteration=4) != PROMPTS.draw(5, seed=2, iteration=4)


def test_repeats_stand_side_by_side() -> None:
    texts = PROMPTS.draw(2, seed=0, iteration=0, repeats=3).texts
    assert len(texts) == 6
    assert texts[0] == texts[1] == texts[2] != texts[3]


def test_metadata_travels_with_its_prompt() -> None:
    class Entry:
        text, metadata = "a", {"kind": "x"}

    assert PromptSet.create([Entry()]).draw(2, seed=0, iteration=0).metadata == [{"kind": "x"}] * 2


def test_no_prompt_is_refused() -> None:
    empty = Refusal(
        "there is no prompt to train on",
        cause="An empty list of prompts.",
        remedy="pass at least one",
    )
    with empty.raised():
        PromptSet.create([])


def test_a_text_file_holds_one_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  ein Kätzchen  \n".encode())
    assert lacfast.load_prompts(path).texts == ["a cat", "ein Kätzchen"]
    assert PromptSet.create(str(path)) == load_prompts(path)


def test_geneval_rows_are_whole_metadata(tmp_path: Path) -> None:
    path = written(tmp_path / "evaluation_metadata.jsonl", json.dumps(GENEVAL), "", '{"prompt": "a", "n": 2}')
    prompts = load_prompts(path)
    assert prompts.texts == [GENEVAL["prompt"], "a"]
    assert prompts.metadata == [GENEVAL, {"prompt": "a", "n": 2}]


@pytest.mark.parametrize(
    ("name", "lines", "refused"),
    [
        (
            "p.jsonl",
            ['{"prompt": "a"}', "{prompt: b}"],
            Refusal(
                "p.jsonl:2: not JSON", cause="A broken line of prompts.", remedy="write one object per line"
            ),
        ),
        (
            "p.jsonl",
            ["", '["a"]'],
            Refusal(
                'p.jsonl:2: ["a"] is no object',
                cause="A line of prompts that is JSON but no object.",
                remedy="write {'prompt': ..., ...}",
            ),
        ),
        (
            "p.jsonl",
            ['{"text": "a"}'],
            Refusal(
                "p.jsonl:1: 'prompt' is None, not a prompt",
                cause="Captions under another key than `prompt`.",
                remedy="its keys are ['text']; name the one that holds the caption with column=",
            ),
        ),
        (
            "p.jsonl",
            ['{"prompt": " "}'],
            Refusal(
                "p.jsonl:1: 'prompt' is ' ', not a prompt",
                cause="An empty caption.",
                remedy="name the one that holds the caption",
            ),
        ),
        (
            "p.jsonl",
            ['{"tag": "counting", "include": {}, "prompt": "a"}'],
            Refusal(
                "p.jsonl:1: 'include' is {}",
                cause="A GenEval row that its server could not read.",
                remedy="GenEval wants a list of {'class': str, 'count': int, ...}",
            ),
        ),
        (
            "p.jsonl",
            ['{"tag": "x", "include": [{"class": "cup", "count": "1"}], "prompt": "a"}'],
            Refusal(
                "'include' is [{'class': 'cup', 'count': '1'}]",
                cause="A GenEval clause whose count is no number.",
                remedy="'count': int",
            ),
        ),
        (
            "p.txt",
            ["", " "],
            Refusal("p.txt", cause="A file of blank lines.", remedy="pass at least one"),
        ),
        (
            "p.csv",
            ["a"],
            Refusal(
                "p.csv': its ending says no format",
                cause="Prompts in a format that is not read.",
                remedy="pass a .txt file (one prompt per line), a .jsonl file",
            ),
        ),
    ],
)
def test_a_bad_line_is_named_with_its_file(
    tmp_path: Path, name: str, lines: list[str], refused: Refusal
) -> None:
    with refused.raised():
        load_prompts(written(tmp_path / name, *lines))


def test_another_key_may_hold_the_caption(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", '{"text": "a", "other": "b"}')
    assert load_prompts(path, column="text").texts == ["a"]
    assert load_prompts(f"{path},column=other").texts == ["b"]
    assert load_prompts(f"{path},column=other", column="text").texts == ["b"]
    assert prompts_to_steer([f"{path},column=text"], 0).metadata == [{"text": "a", "other": "b"}]


def test_lines_of_text_have_no_column(tmp_path: Path) -> None:
    path = written(tmp_path / "p.txt", "a cat")
    with Refusal(
        "column=text would be ignored",
        cause="A column of a file with a prompt per line.",
        remedy="leave it out",
    ).raised():
        load_prompts(f"{path},column=text")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"caf\xe9\n")
    with Refusal(
        "is not UTF-8 text", cause="Prompts in another encoding.", remedy="convert it, say by iconv"
    ).raised():
        load_prompts(path)


def test_a_prompt_that_was_meant_is_not_read_as_letters() -> None:
    with pytest.raises(ValueError, match=r"there is no prompt file 'a red cat'.*or a list of prompts"):
        PromptSet.create("a red cat")


def test_a_function_gives_entries_of_every_kind() -> None:
    def animals() -> list[Any]:
        return ["a cat", {"prompt": "a dog", "legs": 4}]

    assert PromptSet.create(animals).metadata == [{}, {"prompt": "a dog", "legs": 4}]
    with pytest.raises(ValueError, match="entry 0: 3 is no prompt"):
        load_prompts(lambda: [3])  # type: ignore[list-item]

    def nothing() -> list[str]:
        return []

    with pytest.raises(ValueError, match="no prompt to train on in nothing"):
        load_prompts(nothing)


def fake_datasets(monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    module = ModuleType("datasets")
    module.load_from_disk = lambda path: loaded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


class Table(list[dict[str, Any]]):
    column_names = ("prompt", "style")


def test_rows_of_a_datasets_directory_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, Table([{"prompt": "a cat", "style": "oil"}]))
    assert load_prompts(tmp_path).metadata == [{"prompt": "a cat", "style": "oil"}]
    with pytest.raises(ValueError, match="no column 'caption'; its columns are"):
        load_prompts(tmp_path, column="caption")


def test_splits_of_a_datasets_directory_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_datasets(monkeypatch, {"train": Table(), "test": Table()})
    with pytest.raises(ValueError, match=r"holds the splits \['test', 'train'\]; pass one"):
        load_prompts(tmp_path)


def test_real_datasets_and_parquet_are_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b"], "number": [1, 2]})
    rows.save_to_disk(tmp_path / "saved")
    rows.to_parquet(tmp_path / "p.parquet")
    expected = [{"prompt": "a", "number": 1}, {"prompt": "b", "number": 2}]
    assert load_prompts(tmp_path / "saved").metadata == expected
    assert load_prompts(f"{tmp_path / 'p.parquet'},column=prompt").texts == ["a", "b"]
    assert load_prompts(tmp_path / "p.parquet").metadata == expected


def test_a_data_set_without_a_name_is_refused() -> None:
    with Refusal(
        "hub:,split=test names no data set",
        cause="A data set of the hub without its name.",
        remedy="write hub:OWNER/NAME",
    ).raised():
        load_prompts("hub:,split=test")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as a data set's repository has it, two splits and a column that is no "prompt"."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "repository"
    path.mkdir()
    for split, prompts in {"train": ["a cat", "a dog"], "test": ["a <b>tree</b>"]}.items():
        lines = [json.dumps({"Prompt": prompt, "seed": 7}) for prompt in prompts]
        (path / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path


def test_a_data_set_goes_by_its_name_split_and_column(repository: Path) -> None:
    train = load_prompts(f"hub:{repository},column=Prompt")
    assert train.texts == ["a cat", "a dog"]
    assert train.metadata[0] == {"Prompt": "a cat", "seed": 7}
    assert load_prompts(f"hub:{repository},split=test", column="Prompt").texts == ["a <b>tree</b>"]
    assert load_prompts(f"hub:{repository},split=train[:1],column=Prompt").texts == ["a cat"]


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        (
            ",column=Promt",
            Refusal(
                "has no column 'Promt'; its columns are ['Prompt', 'seed']",
                cause="A data set's caption under another name.",
                remedy="name the one that holds the caption with column=",
            ),
        ),
        (
            ",splt=test",
            Refusal(
                "unknown setting of hub:",
                cause="A setting of a data set that there is none of.",
                remedy="did you mean 'split'?",
            ),
        ),
        (
            ",split=validation,column=Prompt",
            Refusal(
                "cannot be loaded, ValueError: Unknown split",
                cause="A data set of the hub that is not there, has no such split, or no network.",
                remedy="check name, split and network",
            ),
        ),
        (
            "-nowhere",
            Refusal("cannot be loaded", cause="The same.", remedy="check name, split and network"),
        ),
    ],
    ids=["column", "setting", "split", "name"],
)
def test_a_data_set_that_cannot_be_read_says_why(repository: Path, settings: str, refused: Refusal) -> None:
    with refused.raised():
        load_prompts(f"hub:{repository}{settings}")


@pytest.mark.parametrize(
    ("package", "name", "command"),
    [("datasets", "folder", "pip install 'lacfast"), ("pyarrow", "p.parquet", "pip install pyarrow")],
)
def test_a_missing_package_gives_its_install_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, command: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.touch()
    with pytest.raises(ImportError, match=command):
        load_prompts(path)


@pytest.mark.parametrize("count", [1, 7, 20, 33, 41])
def test_a_cycle_takes_each_prompt_equally_often_up_to_one_and_no_run_of_a_sorted_file(count: int) -> None:
    prompts = PromptSet.create([f"prompt {number:02d}" for number in range(20)])
    taken = prompts.cycle(count).texts
    assert taken == prompts.cycle(count).texts
    counts = Counter(dict.fromkeys(prompts.texts, 0))
    counts.update(taken)
    assert sum(counts.values()) == count
    assert max(counts.values()) - min(counts.values()) <= 1
    whole, rest = divmod(count, 20)
    assert taken[: 20 * whole] == prompts.texts * whole
    assert taken[20 * whole :] == sorted(taken[20 * whole :])
    if 1 < rest < 19:
        assert taken[20 * whole :] != prompts.texts[:rest]
