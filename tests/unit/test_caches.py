"""The cache gives back what it was given, or nothing: never something else."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux2_lora.caches import Held, TensorCache, prune


def entry() -> dict[str, Tensor]:
    return {
        "latents": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
        "half": torch.linspace(-1, 1, 8, dtype=torch.bfloat16),
        "ids": torch.tensor([[1, 2], [3, 4]]),
        "scale": torch.tensor(0.5),
    }


@pytest.fixture
def cache(tmp_path: Path) -> TensorCache:
    return TensorCache(tmp_path, "latents")


def stored(cache: TensorCache, part: str = "a") -> tuple[str, Path]:
    key = cache.key(part)
    cache.store(key, entry())
    return key, cache.folder / key[:2] / f"{key}.safetensors"


def assert_equal(found: dict[str, Tensor] | None, wanted: dict[str, Tensor]) -> None:
    assert found is not None
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_an_entry_comes_back_bit_for_bit(cache: TensorCache) -> None:
    key, _ = stored(cache)
    assert_equal(cache.load(key), entry())


def test_an_absent_entry_is_none_and_not_counted_as_healed(cache: TensorCache) -> None:
    assert cache.load(cache.key("nothing")) is None
    assert cache.healed == 0


def test_entries_lie_in_folders_of_two_digits(cache: TensorCache, tmp_path: Path) -> None:
    _, path = stored(cache)
    assert path.is_file()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [path]


def test_keys_differ_by_any_part_and_by_their_division() -> None:
    cache = TensorCache(Path("x"), "latents")
    assert len({cache.key("a", "b"), cache.key("ab"), cache.key("a", "c"), cache.key("b", "a")}) == 4


def test_keys_differ_by_kind() -> None:
    assert TensorCache(Path("x"), "latents").key("a") != TensorCache(Path("x"), "text").key("a")


def test_a_flipped_bit_anywhere_never_changes_what_is_loaded(cache: TensorCache) -> None:
    key, path = stored(cache)
    whole = path.read_bytes()
    rng = random.Random(0)
    healed = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        found = cache.load(key)
        healed += found is None
        if found is not None:  # a flip in the header's padding changes nothing that is read
            assert_equal(found, entry())
        assert (path.exists(), cache.healed) == (found is not None, healed)
    assert healed > 150


def test_every_flipped_bit_of_a_tensor_is_found(cache: TensorCache) -> None:
    key, path = stored(cache)
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for position in range(start, len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        assert cache.load(key) is None


def test_every_truncation_is_found_and_deleted(cache: TensorCache) -> None:
    key, path = stored(cache)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert cache.load(key) is None
        assert not path.exists()


def test_a_foreign_safetensors_file_is_deleted(cache: TensorCache) -> None:
    key, path = stored(cache)
    save_file({"latents": torch.ones(3)}, path)
    assert cache.load(key) is None
    assert (path.exists(), cache.healed) == (False, 1)


def test_a_file_of_another_format_is_deleted(cache: TensorCache) -> None:
    key, path = stored(cache)
    path.write_text("<html>not found</html>")
    assert cache.load(key) is None
    assert (path.exists(), cache.healed) == (False, 1)


def test_an_entry_renamed_to_another_key_is_deleted(cache: TensorCache) -> None:
    _, path = stored(cache, "a")
    key, other = stored(cache, "b")
    path.replace(other)
    assert cache.load(key) is None
    assert cache.healed == 1


def test_an_entry_is_found_by_its_header(cache: TensorCache) -> None:
    key, path = stored(cache)
    assert cache.has(key)
    assert not cache.has(cache.key("another"))
    path.write_bytes(path.read_bytes()[:-1])
    assert not cache.has(key)
    assert (path.exists(), cache.healed) == (False, 1)


def test_an_entry_of_another_key_is_found_by_its_header(cache: TensorCache) -> None:
    _, path = stored(cache, "a")
    key, other = stored(cache, "b")
    path.replace(other)
    assert not cache.has(key)


# --- pruning


def aged(cache: TensorCache, part: str, hours: float) -> Path:
    """An entry last used so many hours ago."""
    path = stored(cache, part)[1]
    before = time.time() - 3600 * hours
    os.utime(path, (before, before))
    return path


def left(cache: TensorCache, **limits: Any) -> set[Path]:
    prune(cache.folder.parent, **{"max_bytes": None, "max_age_s": None, **limits})
    return {path for path in cache.folder.rglob("*") if path.is_file()}


def test_entries_unused_for_too_long_go(cache: TensorCache) -> None:
    aged(cache, "a", 50)
    young = aged(cache, "b", 10)
    assert left(cache, max_age_s=24 * 3600) == {young}


def test_the_longest_unused_go_first_and_no_more_than_must(cache: TensorCache) -> None:
    paths = [aged(cache, str(hours), hours) for hours in (4, 3, 2, 5)]
    size = paths[0].stat().st_size
    assert left(cache, max_bytes=2.5 * size) == {paths[1], paths[2]}


def test_what_is_kept_or_was_used_within_the_hour_stays(cache: TensorCache) -> None:
    kept, used = aged(cache, "kept", 90), aged(cache, "used", 0.5)
    aged(cache, "gone", 2)
    assert left(cache, max_bytes=0, keep={kept}) == {kept, used}


def test_using_an_entry_makes_it_young(cache: TensorCache) -> None:
    path = aged(cache, "a", 90)
    assert cache.has(cache.key("a"))
    assert left(cache, max_age_s=3600) == {path}


def test_what_a_killed_process_left_half_written_goes(cache: TensorCache) -> None:
    path = aged(cache, "a", 2)
    half = path.with_name(f".{path.name}.x1y2")
    half.write_bytes(b"half")
    os.utime(half, (0, 0))
    assert left(cache) == {path}


def test_files_that_are_no_entries_stay(cache: TensorCache) -> None:
    foreign = cache.folder.parent / "pictures.json"
    foreign.parent.mkdir(exist_ok=True)
    foreign.write_text("{}")
    os.utime(foreign, (0, 0))
    left(cache, max_bytes=0, max_age_s=0)
    assert foreign.exists()


def test_an_unreadable_disk_is_not_taken_for_damage(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    key, path = stored(cache)

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("flux2_lora.caches.load", broken)
    with pytest.raises(OSError, match="Input/output"):
        cache.load(key)
    assert path.exists()


def test_what_is_held_is_what_was_used_last_within_its_bytes() -> None:
    held = Held(3 * 400)
    for number in range(3):
        held.put(str(number), {"x": torch.full((100,), float(number))})
    assert held.get("0") is not None
    held.put("3", {"x": torch.zeros(100)})
    assert held.get("1") is None
    assert [held.get(key) is not None for key in ("0", "2", "3")] == [True, True, True]
    assert held.size == 1200
    held.put("large", {"x": torch.zeros(10_000)})
    assert held.size == 0
