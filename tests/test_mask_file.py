"""Mask files: every stored form gives the same mask, and whatever is wrong is an error."""

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from slimfx.errors import RecipeError
from slimfx.mask_file import Masks, check_mask, check_names, mask_for, read_masks
from slimfx.methods.masks import NofM, Pattern, Unstructured, keep

TWO_FOUR = NofM(2, 4)


def made(N: int, K: int, pattern: Pattern = TWO_FOUR) -> Tensor:
    """A random mask of a pattern."""
    return keep(torch.rand(N, K), pattern)


def npz(folder: Path, **arrays: np.ndarray) -> Path:
    path = folder / "masks.npz"
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


FORMS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "bool": lambda m: m,
    "uint8": lambda m: m.astype(np.uint8),
    "int64": lambda m: m.astype(np.int64),
    "float32": lambda m: m.astype(np.float32),
    "float16, columns first": lambda m: np.asfortranarray(m.astype(np.float16)),
    "packed rows": lambda m: np.packbits(m, axis=1),
    "packed flat": lambda m: np.packbits(m),
}


@pytest.mark.parametrize("shape", [(6, 32), (5, 12), (3, 4), (1, 8)])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_npz_gives_the_mask(
    tmp_path: Path, form: str, shape: tuple[int, int]
) -> None:
    mask = made(*shape)
    path = npz(tmp_path, layer=FORMS[form](mask.numpy()))
    found = mask_for("layer", read_masks(path), shape, TWO_FOUR)
    assert found.dtype == torch.bool
    assert torch.equal(found, mask)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float32])
def test_safetensors_give_the_mask(tmp_path: Path, dtype: torch.dtype) -> None:
    mask, path = made(4, 16), tmp_path / "masks.safetensors"
    packed = torch.from_numpy(np.packbits(mask.numpy()))
    save_file({"a.weight.mask": mask.to(dtype), "b": packed}, path)
    masks = read_masks(str(path))
    assert torch.equal(mask_for("a", masks, (4, 16), TWO_FOUR), mask)
    assert torch.equal(mask_for("b", masks, (4, 16), TWO_FOUR), mask)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_packing_is_undone_for_any_shape(seed: int, N: int, K: int, flat: bool) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(N, K) < 0.5
    bits = torch.from_numpy(np.packbits(mask.numpy(), axis=None if flat else 1))
    masks = Masks("file", {"x": bits}, {"x": "x"})
    pattern = Unstructured(1 - mask.sum().item() / (N * K), "layer")
    if (N, K) == tuple(bits.shape) and bits.max() > 1:  # one input: the shape says not packed
        with pytest.raises(RecipeError, match="0 and 1 alone"):
            mask_for("x", masks, (N, K), pattern)
    else:
        assert torch.equal(mask_for("x", masks, (N, K), pattern), mask)


@pytest.mark.parametrize("key", ["h.0.fc", "h.0.fc.weight", "h.0.fc.weight.mask", "h.0.fc.mask"])
def test_a_key_is_the_name_of_the_layer_or_of_its_weight(tmp_path: Path, key: str) -> None:
    mask = made(2, 8)
    masks = read_masks(npz(tmp_path, **{key: mask.numpy()}))
    assert torch.equal(mask_for("h.0.fc", masks, (2, 8), TWO_FOUR), mask)
    check_names(masks, ["h.0.fc", "h.1.fc"])


def test_a_layer_without_a_mask_is_an_error_that_names_a_close_key(tmp_path: Path) -> None:
    masks = read_masks(npz(tmp_path, **{"h.0.fc.weight": made(2, 8).numpy()}))
    with pytest.raises(RecipeError, match=r"masks\.npz: no mask for layer h\.0\.fd .*h\.0\.fc"):
        mask_for("h.0.fd", masks, (2, 8), TWO_FOUR)


def test_a_mask_without_a_layer_is_an_error(tmp_path: Path) -> None:
    masks = read_masks(npz(tmp_path, **{"a.weight": made(2, 8).numpy(), "b": made(2, 8).numpy()}))
    check_names(masks, ["b", "a"])
    with pytest.raises(RecipeError, match=r"a\.weight is the mask of no layer"):
        check_names(masks, ["b"])


def test_two_masks_of_one_layer_are_an_error(tmp_path: Path) -> None:
    path = npz(tmp_path, **{"a": made(2, 8).numpy(), "a.weight": made(2, 8).numpy()})
    with pytest.raises(RecipeError, match="both masks of layer a"):
        read_masks(path)


@pytest.mark.parametrize(
    "array",
    [
        np.ones((8, 4), bool),
        np.ones((4, 8, 1), bool),
        np.ones((4, 1), bool),  # packed bits are uint8
        np.ones(4, np.int64),
        np.ones(5, np.uint8),
        np.ones((), np.uint8),
    ],
    ids=lambda array: f"{array.shape} {array.dtype}",
)
def test_another_shape_is_an_error_that_says_which_would_do(
    tmp_path: Path, array: np.ndarray
) -> None:
    with pytest.raises(RecipeError, match=r"masks\.npz: fc\.weight: shape .* \[4, 8\] nor packed"):
        mask_for("fc", read_masks(npz(tmp_path, **{"fc.weight": array})), (4, 8), TWO_FOUR)


@pytest.mark.parametrize("value", [2, -1, 0.5, float("nan")])
def test_other_values_than_0_and_1_are_an_error(tmp_path: Path, value: float) -> None:
    array = made(4, 8).float().numpy()
    array[1, 3] = value
    with pytest.raises(RecipeError, match="0 and 1 alone"):
        mask_for("fc", read_masks(npz(tmp_path, fc=array)), (4, 8), TWO_FOUR)


def test_bits_behind_the_last_weight_are_an_error(tmp_path: Path) -> None:
    bits = np.packbits(made(3, 12).numpy(), axis=1)
    bits[2, 1] |= 1
    with pytest.raises(RecipeError, match="behind the 12"):
        mask_for("fc", read_masks(npz(tmp_path, fc=bits)), (3, 12), TWO_FOUR)


class Trap:
    """Unpickling one is noticed."""

    def __reduce__(self) -> tuple[Callable[..., None], tuple[()]]:
        return pytest.fail, ()


def broken(folder: Path, kind: str) -> Path:
    path = folder / ("masks.safetensors" if "safetensors" in kind else "masks.npz")
    if kind == "objects":
        np.savez(path, fc=np.array([Trap()], dtype=object))
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"fc": 1}))
    elif kind == "text":
        np.savez(path, fc=np.array(["mask"]))
    elif kind == "complex":
        np.savez(path, fc=np.ones((2, 4), complex))
    elif kind == "one array":
        with path.open("wb") as file:
            np.save(file, np.ones((2, 4), bool))
    elif kind == "cut short":
        whole = npz(folder, fc=made(40, 80).numpy()).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "member cut short":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("fc.npy", b"\x93NUMPY")
    elif kind == "folder":
        path.mkdir()
    elif "empty" in kind:
        path.write_bytes(b"")
    elif "garbage" in kind:
        path.write_bytes(bytes(range(256)) * 4)
    elif kind == "safetensors type":
        save_file({"fc": torch.ones(2, 4, dtype=torch.float8_e4m3fn)}, path)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        *("objects", "pickle", "text", "complex", "one array", "cut short", "member cut short"),
        *("folder", "missing", "empty", "garbage"),
        *("safetensors empty", "safetensors garbage", "safetensors missing", "safetensors type"),
    ],
)
def test_a_file_that_is_no_mask_file_is_an_error_with_its_path(tmp_path: Path, kind: str) -> None:
    with pytest.raises(RecipeError, match=r"masks\.(npz|safetensors): "):
        read_masks(broken(tmp_path, kind))


@pytest.mark.parametrize("name", ["masks.pt", "masks.pkl", "masks", "masks.npy"])
def test_files_of_other_kinds_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(RecipeError, match=r"\.safetensors or \.npz"):
        read_masks(tmp_path / name)


@pytest.mark.parametrize(
    "pattern",
    [NofM(2, 4), NofM(1, 2), NofM(4, 8), Unstructured(0.3), Unstructured(0.3, "layer")],
    ids=str,
)
def test_a_mask_of_the_pattern_passes_and_one_bit_more_or_less_does_not(pattern: Pattern) -> None:
    mask = made(5, 16, pattern)
    check_mask("fc", mask, (5, 16), pattern)
    for place in ((~mask).nonzero()[0], mask.nonzero()[-1]):
        flipped = mask.clone()
        flipped[tuple(place)] ^= True
        with pytest.raises(RecipeError, match="fc: 1 of "):
            check_mask("fc", flipped, (5, 16), pattern)


def test_the_right_number_in_the_wrong_place_is_an_error_where_the_pattern_says_so() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 1, 1, 0, 0]], dtype=torch.bool)
    check_mask("fc", mask, (2, 8), Unstructured(0.5))
    check_mask("fc", mask, (2, 8), NofM(4, 8))
    with pytest.raises(RecipeError, match=r"2 of 4 \(n:m group\) do not keep 2 of 4"):
        check_mask("fc", mask, (2, 8), TWO_FOUR)
    moved = mask.clone()
    moved[0, 0], moved[1, 2] = False, True
    check_mask("fc", moved, (2, 8), Unstructured(0.5, "layer"))
    with pytest.raises(RecipeError, match=r"2 of 2 \(row\) do not keep 4 of 8"):
        check_mask("fc", moved, (2, 8), Unstructured(0.5))


def test_another_shape_or_a_width_that_is_no_multiple_of_m_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"shape \[2, 8\] is not the layer's \[8, 2\]"):
        check_mask("fc", made(2, 8), (8, 2), Unstructured(0.5))
    with pytest.raises(RecipeError, match="10 inputs are no multiple of 4"):
        check_mask("fc", torch.ones(2, 10, dtype=torch.bool), (2, 10), TWO_FOUR)
