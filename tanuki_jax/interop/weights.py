"""The safetensors files of a published model, read tensor by tensor."""

from __future__ import annotations

import functools
from collections.abc import Collection
from pathlib import Path
from typing import Protocol

import numpy as np

from tanuki_jax import files
from tanuki_jax.errors import UserError

INDEX = "model.safetensors.index.json"
DTYPES = {"BF16": "bfloat16", "F32": "float32"}
UNSUPPORTED = {"F16": "float16", "F64": "float64"}  # which are cast on request
CAST = "`tanuki import --param_dtype=float32` (or bfloat16) casts all weights on request"


class _TensorSlice(Protocol):
    """A tensor of an open file, of which a part can be read."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, part: tuple[int | slice, ...]) -> np.ndarray: ...


class _TensorFile(Protocol):
    """An open safetensors file."""

    def keys(self) -> Collection[str]: ...
    def get_slice(self, name: str) -> _TensorSlice: ...
    def get_tensor(self, name: str) -> np.ndarray: ...


class Weights:
    """The safetensors files of a directory; each tensor is read from the file that the index names."""

    def __init__(self, path: Path, cast: str = "") -> None:
        self.path, self._cast = path, cast
        self.model_dtype = ""  # once it is known
        self.dtypes: set[str] = set()  # of the matrices, as the files have them
        self._target_dtypes: dict[str, str] = {}  # by tensor: what a cast makes of it
        self._used: set[str] = set()
        if (path / INDEX).is_file():
            self._files = _read_index(path / INDEX)
        elif (path / "model.safetensors").is_file():
            self._files = dict.fromkeys(self._open("model.safetensors").keys(), "model.safetensors")
        else:
            pickled = any(path.glob("*.bin")) or any(path.glob("*.pth"))
            fix = "is the download whole?" + " transformers' save_pretrained makes them of .bin files" * pickled
            raise UserError(f"{path} has neither model.safetensors nor {INDEX}; {fix}")

    def has(self, name: str) -> bool:
        return name in self._files

    def expect(self, name: str, shape: tuple[int, ...], vector: bool = False) -> None:
        """An error unless there is such a tensor, of this shape and of a dtype that is read; a norm's may also be float32."""
        actual = list(self._locate(name).get_slice(name).get_shape())
        dtype, allowed = self.dtype(name), ("float32" if vector else "", self.model_dtype)
        if self.model_dtype and not self._cast and dtype not in allowed:
            raise UserError(
                f"{self.path}: {name} is {dtype}, the embedding {self.model_dtype}; weights of one dtype come as they are; "
                + CAST
            )
        if actual != list(shape):
            raise UserError(f"{self.path}: {name} has shape {actual}, where config.json asks for {list(shape)}")
        self._used.add(name)
        self._target_dtypes[name] = "float32" if vector else self._cast
        if not vector:  # those of norms become float32, which holds every value of all but float64
            self.dtypes.add(dtype)

    def dtype(self, name: str) -> str:
        """That of a tensor; an error if it is not supported, or only with a cast."""
        dtype = self._locate(name).get_slice(name).get_dtype()
        if dtype in UNSUPPORTED and not self._cast:
            raise UserError(f"{self.path}: {name} is {dtype}; bfloat16 and float32 are read as they are; {CAST}")
        if dtype not in DTYPES | UNSUPPORTED:
            raise UserError(f"{self.path}: {name} is {dtype}; bfloat16 and float32 are read")
        return (DTYPES | UNSUPPORTED)[dtype]

    def read(self, name: str, part: tuple[int | slice, ...] = ()) -> np.ndarray:
        """A tensor, or part of it, cast where a cast is asked for."""
        file = self._locate(name)
        array = file.get_slice(name)[part] if part else file.get_tensor(name)
        return cast(array, self._target_dtypes.get(name) or self._cast, f"{self.path}: {name}") if self._cast else array

    def check_all_used(self) -> None:
        """An error where a tensor has no place in our model: a bias, an adapter."""
        unused = sorted(n for n in self._files if n not in self._used and not n.endswith(".rotary_emb.inv_freq"))
        if unused:
            raise UserError(f"{self.path}: tensor {unused[0]} is not part of this architecture ({len(unused)} such tensors)")

    def _locate(self, name: str) -> _TensorFile:
        """The open file of a tensor."""
        if name not in self._files:
            raise UserError(f"{self.path} has no tensor {name}; the checkpoint is not whole or of another architecture")
        if name not in self._names(self._files[name]):
            raise UserError(f"{self.path / self._files[name]} has no tensor {name}, though the index names it")
        return self._open(self._files[name])

    @functools.cache  # noqa: B019  # as long-lived as the files
    def _names(self, file: str) -> set[str]:
        return set(self._open(file).keys())

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a mapped file counts as memory in use
    def _open(self, file: str) -> _TensorFile:
        import safetensors

        path = self.path / file
        if not path.is_file():
            raise UserError(f"{self.path} has no {file}, though the index names it; is the download whole?")
        try:
            opened: _TensorFile = safetensors.safe_open(str(path), framework="numpy")
            return opened
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} cannot be read: {error}; is the download whole?") from error


def _read_index(path: Path) -> dict[str, str]:
    """The file of every tensor; an error unless all lie beside the index."""
    index = files.read_json(path)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{path} has no weight_map; is the download whole?")
    if outside := next((file for file in weight_map.values() if file == ".." or Path(file).name != file), None):
        raise UserError(f"{path} names {outside!r}; weights must lie beside it")
    return weight_map


def cast(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """An array in another dtype; an error, that begins with `where`, about a number that is too large for it."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    if array.dtype.itemsize > 2 and (np.isinf(result) & np.isfinite(array)).any():
        largest = np.abs(array[np.isfinite(array)]).max()
        raise UserError(f"{where} has {largest:g}, which {dtype} cannot hold; cast to another --param_dtype")
    return result
