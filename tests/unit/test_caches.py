"""The cache gives back what it was given, or nothing: never something else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flux2_lora.caches import TensorCache


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


def test_fetch_makes_an_entry_once(cache: TensorCache) -> None:
    made: list[int] = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return entry()

    first, second = cache.fetch(["a"], make), cache.fetch(["a"], make)
    assert_equal(first, entry())
    assert_equal(second, entry())
    assert len(made) == 1


def test_fetch_makes_a_damaged_entry_again(cache: TensorCache) -> None:
    key, path = stored(cache)
    path.write_bytes(path.read_bytes()[:-1])
    assert_equal(cache.fetch(["a"], entry), entry())
    assert_equal(cache.load(key), entry())
    assert cache.healed == 1


def test_fetch_keeps_no_gradient(cache: TensorCache) -> None:
    found = cache.fetch(["a"], lambda: {"x": torch.ones(2, requires_grad=True) * 2})
    assert not found["x"].requires_grad


def test_an_unreadable_disk_is_not_taken_for_damage(cache: TensorCache, monkeypatch: pytest.MonkeyPatch) -> None:
    key, path = stored(cache)

    def broken(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("flux2_lora.caches.safe_open", broken)
    with pytest.raises(OSError, match="Input/output"):
        cache.load(key)
    assert path.exists()
