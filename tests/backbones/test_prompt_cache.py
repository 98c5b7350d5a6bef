"""Embeddings of prompts: encoded once for all runs, in bounded memory, and never those of a damaged file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import cached_assets_path
from tiny_pipelines import FAMILIES, PROMPTS, SETTINGS, backbone_of, tiny_pipeline

from lacfast import load_backbone
from lacfast.backbones import prompt_files
from lacfast.backbones.latent import LatentBackbone
from lacfast.backbones.parts import Embeddings
from lacfast.backbones.pipelines import PipelineEncoder
from lacfast.backbones.prompt_cache import ENCODE_BATCH, PromptCache
from lacfast.backbones.prompt_files import PromptFiles


@pytest.fixture(autouse=True)
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of this test alone."""
    own = partial(cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr(prompt_files, "cached_assets_path", own)
    return tmp_path / "assets"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that encoders are given, in their order; "" is the unconditional one."""
    texts: list[str] = []
    encode, unconditional = PipelineEncoder.encode, PipelineEncoder.encode_unconditional

    def counted(self: PipelineEncoder, prompts: Any) -> Embeddings:
        texts.extend(dict.fromkeys(prompts))
        return encode(self, prompts)

    def counted_unconditional(self: PipelineEncoder) -> Embeddings:
        texts.append("")
        return unconditional(self)

    monkeypatch.setattr(PipelineEncoder, "encode", counted)
    monkeypatch.setattr(PipelineEncoder, "encode_unconditional", counted_unconditional)
    return texts


def freed(family: str = "sd3", *, places: int = 0, **arguments: Any) -> LatentBackbone:
    """A backbone whose encoders are set aside, with room for so many prompts in memory; 0: for all."""
    backbone = backbone_of(tiny_pipeline(family), **arguments)
    backbone.free_text_encoders()
    if places:
        backbone.prompts.capacity = places * backbone.prompts.entry_bytes
    return backbone


@cache
def of_the_pipeline(family: str) -> Embeddings:
    """Embeddings of all PROMPTS, by the pipeline's own call."""
    encoder = backbone_of(tiny_pipeline(family)).prompt_encoder
    assert isinstance(encoder, PipelineEncoder)
    with torch.no_grad():
        return encoder.family.encode(encoder.pipeline, PROMPTS, SETTINGS)


def assert_embeddings(backbone: LatentBackbone, prompts: list[str], family: str = "sd3") -> None:
    """Bit for bit those of the pipeline."""
    rows = [PROMPTS.index(prompt) for prompt in prompts]
    found, expected = backbone.prompts.fetch(prompts), of_the_pipeline(family)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name][rows]) for name in found)


def files(assets: Path) -> list[Path]:
    return sorted(path for path in assets.rglob("*") if path.is_file())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_run_encodes_nothing_and_gets_the_same_bits(family: str, encoded: list[str]) -> None:
    first = freed(family)
    first.encode_prompts(PROMPTS)
    assert sorted(encoded) == sorted(["", *PROMPTS])
    encoded.clear()
    second = freed(family)
    second.expect_prompts([PROMPTS])
    assert second.prompts.fetch(PROMPTS)
    second.encode_unconditional(2)
    assert encoded == []
    assert_embeddings(second, PROMPTS, family)


def test_blocks_are_of_whole_draws_as_many_as_their_share_of_the_memory_holds(
    encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = freed(places=10)
    for name in ("bring_back", "set_aside"):
        monkeypatch.setattr(PipelineEncoder, name, lambda self, name=name: encoded.append(name))
    backbone.expect_prompts([PROMPTS[start : start + 2] for start in range(0, 8, 2)])
    for start in range(0, 8, 2):
        backbone.encode_prompts(PROMPTS[start : start + 2])
    # Half of ten places are for what is expected: two draws and not a part of the third.
    blocks = (PROMPTS[:4], PROMPTS[4:])
    assert encoded == ["", *(text for block in blocks for text in ("bring_back", *block, "set_aside"))]


def test_only_prompts_that_are_drawn_are_encoded(encoded: list[str]) -> None:
    backbone = freed()
    backbone.expect_prompts([PROMPTS[:2], PROMPTS[3:4]])
    backbone.encode_prompts(PROMPTS[:2])
    assert encoded == ["", PROMPTS[0], PROMPTS[1], PROMPTS[3]]


def test_a_draw_that_is_too_large_for_the_memory_is_encoded_in_blocks_too(encoded: list[str]) -> None:
    backbone = freed(places=6)
    backbone.expect_prompts([PROMPTS])
    backbone.encode_prompts(PROMPTS[:1])
    assert encoded == ["", *PROMPTS[:3]]
    backbone.encode_prompts(PROMPTS[1:4])
    assert encoded == ["", *PROMPTS[:6]]


@pytest.mark.parametrize("places", [2, 5, 8])
def test_memory_is_bounded_and_every_embedding_right(places: int) -> None:
    freed().encode_prompts(PROMPTS)
    backbone = freed(places=places)
    cache = backbone.prompts
    for _ in range(2):
        backbone.expect_prompts([PROMPTS[start : start + 2] for start in range(0, 8, 2)])
        for start in range(0, 8, 2):
            assert_embeddings(backbone, PROMPTS[start : start + 2])
            held = [read.result() for read in cache._window.values()]
            entries = [*cache.entries.values(), *(embeddings for embeddings in held if embeddings)]
            assert sum(each.nbytes for entry in entries for each in entry.values()) <= cache.capacity


def test_files_are_read_ahead_in_the_order_of_the_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    freed().encode_prompts(PROMPTS)
    reads: list[tuple[str | None, bool]] = []
    read = PromptFiles.read

    def seen(self: PromptFiles, prompt: str | None) -> Any:
        reads.append((prompt, threading.current_thread() is threading.main_thread()))
        return read(self, prompt)

    monkeypatch.setattr(PromptFiles, "read", seen)
    backbone = freed(places=8)
    reads.clear()
    order = PROMPTS[::-1]
    backbone.expect_prompts([order[:3], order[2:5], order[5:]])
    for start in range(0, 8, 2):
        backbone.encode_prompts(order[start : start + 2])
    assert reads == [(prompt, False) for prompt in order]


def test_what_is_expected_anew_takes_the_place_of_what_was(encoded: list[str]) -> None:
    backbone = freed()
    backbone.expect_prompts([PROMPTS[:3]])
    backbone.expect_prompts([PROMPTS[2:4]])
    backbone.encode_prompts(PROMPTS[3:4])
    assert encoded == ["", PROMPTS[3], PROMPTS[2]]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def with_a_wrong_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(bytes(content))


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_off, with_a_wrong_bit, emptied])
def test_a_damaged_file_is_encoded_again_with_a_warning(
    damage: Callable[[Path], None], encoded: list[str]
) -> None:
    first = freed()
    first.encode_prompts(PROMPTS)
    assert first.prompts.files is not None
    damage(first.prompts.files.path(PROMPTS[2]))
    encoded.clear()
    backbone = freed()
    with pytest.warns(RuntimeWarning, match="its prompt is encoded again, and the file replaced"):
        found = backbone.prompts.fetch(PROMPTS)
    assert encoded == [PROMPTS[2]]
    encoded.clear()
    again = freed().prompts.fetch(PROMPTS)
    assert encoded == []
    assert all(torch.equal(found[name], again[name]) for name in found)


def test_the_file_of_another_prompt_is_not_used(encoded: list[str]) -> None:
    first = freed()
    first.encode_prompts(PROMPTS)
    kept = first.prompts.files
    assert kept is not None
    kept.path(PROMPTS[1]).write_bytes(kept.path(PROMPTS[2]).read_bytes())
    encoded.clear()
    with pytest.warns(RuntimeWarning, match="is not what was written"):
        assert_embeddings(freed(), PROMPTS[1:2])
    assert encoded == PROMPTS[1:2]


def test_whatever_may_change_a_bit_has_files_of_its_own() -> None:
    def settings(**changes: Any) -> Any:
        return replace(SETTINGS, **changes)

    nudged, renamed, half = (tiny_pipeline("sd3") for _ in range(3))
    with torch.no_grad():
        weight = nudged.text_encoder_2.text_model.embeddings.token_embedding.weight
        weight[3, 2] = torch.nextafter(weight[3, 2], torch.tensor(9.0))
    renamed.tokenizer_3.add_tokens(["vermilion"])
    half.text_encoder.bfloat16()
    others = [
        load_backbone(nudged, settings=settings()),
        load_backbone(renamed, settings=settings()),
        load_backbone(half, settings=settings()),
        load_backbone(tiny_pipeline("sd3", seed=1), settings=settings()),
        load_backbone(tiny_pipeline("sd3"), settings=settings(max_sequence_length=8)),
        load_backbone(tiny_pipeline("sd3"), settings=settings(negative_prompt="blue")),
    ]
    same = load_backbone(tiny_pipeline("sd3"), settings=settings(vae_tiling=True))
    same.encode_prompts(PROMPTS[:1])
    identity = backbone_of(tiny_pipeline("sd3")).prompt_encoder.identity()
    assert same.prompt_encoder.identity() == identity
    assert len({identity, *(other.prompt_encoder.identity() for other in others)}) == 1 + len(others)


def test_runs_that_write_at_once_leave_whole_files_and_nothing_else(assets: Path) -> None:
    source = freed().prompts
    made = {prompt: source.fetch([prompt]) for prompt in PROMPTS}
    kept = PromptFiles(assets / "race", "identity")

    def run(_: int) -> list[bool]:
        seen = []
        for prompt, embeddings in made.items():
            kept.write(prompt, embeddings)
            found = kept.read(prompt)
            is_same = found is not None and all(torch.equal(found[name], embeddings[name]) for name in found)
            seen.append(is_same)
        return seen

    with ThreadPoolExecutor(4) as pool:
        assert all(all(seen) for seen in pool.map(run, range(8)))
    assert [path.suffix for path in files(assets / "race")] == [".safetensors"] * len(PROMPTS)


def test_without_a_place_to_write_prompts_are_encoded_again(assets: Path, encoded: list[str]) -> None:
    assets.write_text("no directory", encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="set HF_ASSETS_CACHE to a directory that you may write to"):
        backbone = freed(places=4)
    backbone.expect_prompts([PROMPTS])
    for start in (0, 4, 0):
        assert_embeddings(backbone, PROMPTS[start : start + 4])
    assert len(backbone.prompts.entries) <= 4


def test_a_full_disk_warns_once_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = freed()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_files, "save_file", full)
    with pytest.warns(RuntimeWarning, match="No space left on device") as caught:
        assert_embeddings(backbone, PROMPTS)
    assert len(caught) == 1


def test_encoders_that_do_not_fit_beside_the_run_encode_on_the_cpu(
    assets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = freed()
    before = files(assets)

    def too_large(self: PipelineEncoder) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PipelineEncoder, "bring_back", too_large)
    with pytest.warns(RuntimeWarning, match="out of memory for the text encoders.*Set a smaller rollout_b"):
        assert_embeddings(backbone, PROMPTS[:2])
    # What another device rounds is nobody else's.
    assert files(assets) == before


@pytest.mark.usefixtures("cuda")
def test_encoders_leave_the_device_and_come_back_for_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = backbone_of(tiny_pipeline("sd3"), device="cuda")
    encoder, places = backbone.prompt_encoder, list[str]()
    assert isinstance(encoder, PipelineEncoder)
    encode = encoder.encode

    def watched(prompts: Any) -> Embeddings:
        places.extend(next(part.parameters()).device.type for part in encoder._encoders().values())
        return encode(prompts)

    monkeypatch.setattr(encoder, "encode", watched)
    backbone.free_text_encoders()
    conditioning = backbone.encode_prompts(PROMPTS[:3])
    assert places == ["cuda"] * 3
    assert {next(part.parameters()).device.type for part in encoder._encoders().values()} == {"cpu"}
    assert {tensor.device.type for tensor in conditioning.tensors.values()} == {"cuda"}


def test_encoders_that_stay_leave_no_file_and_keep_to_the_memory(assets: Path, encoded: list[str]) -> None:
    backbone = backbone_of(tiny_pipeline("sd3"))
    backbone.prompts.fetch(PROMPTS[:1])
    backbone.prompts.capacity = 3 * backbone.prompts.entry_bytes
    backbone.expect_prompts([PROMPTS])
    for prompt in PROMPTS:
        backbone.encode_prompts([prompt])
        assert len(backbone.prompts.entries) <= 3
    backbone.encode_prompts(PROMPTS[-1:])
    assert encoded == PROMPTS
    assert files(assets) == []


def test_the_encoder_sees_batches_of_one_height() -> None:
    heights: list[int] = []

    class Encoder:
        def encode(self, prompts: Any) -> Embeddings:
            heights.append(len(prompts))
            return {"tokens": torch.ones(len(prompts), 2, 3)}

        def encode_unconditional(self) -> Embeddings:
            return {"tokens": torch.zeros(1, 2, 3)}

        def identity(self) -> None:
            """Not worth a file."""

        def set_aside(self) -> None:
            """Nothing."""

        def bring_back(self) -> None:
            """Nothing."""

    cache = PromptCache(Encoder())
    cache.fetch([str(number) for number in range(11)])
    cache.set_aside()
    assert cache.fetch(["11"])["tokens"].shape == (1, 2, 3)
    assert heights == [ENCODE_BATCH] * 3
