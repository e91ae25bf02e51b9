"""The indices of a layer's adapters: held as in the file, and plain for computing."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_ird._registration import BufferDict
from peft_ird.layers.merging import Merging, is_low_precision
from peft_ird.sparse.coding import is_blank, pack, packed_size, unpack
from peft_ird.sparse.delta import check_indices, index_dtype
from peft_ird.sparse.fingerprint import differs, fingerprint
from peft_ird.sparse.support import Support

__all__ = ["Codes", "Holding", "Values", "device_of"]

_CHECKING = threading.RLock()  # one thread decodes what was loaded, the others wait


class Values(nn.ParameterDict):
    """The values of an adapter, by parameter. Shape ``[k]`` each.

    Called, it returns them where they are computed with: it is when a module is called
    that accelerate brings its tensors to a device, and FSDP its shards together.
    """

    __call__ = nn.Module.__call__  # which other dictionaries of parameters refuse

    def forward(self) -> dict[str, Tensor]:
        """Return the values, by parameter."""
        return {  # FSDP takes its views of a shared buffer away after the call
            name: values if isinstance(values, nn.Parameter) else values.clone()
            for name, values in self.items()
        }

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and len(self):  # by which PEFT tells FSDP what is trained
            name = next(iter(self))
        return super().__getattr__(name)


class Codes(BufferDict):  # type: ignore[misc]
    """The codes of adapters that have not been read yet.

    A state dict has the codes of all adapters, and `torch.distributed.checkpoint` looks
    each of its keys up in the module.
    """

    def __init__(self) -> None:
        super().__init__(persistent=True)
        self._read: set[str] = set()  # adapters whose codes are made when saved

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_read", ()):
            return torch.empty(0, dtype=torch.uint8)
        return super().__getattr__(name)


class Holding(Merging):
    """The part of a layer that holds indices and checks those from outside.

    The coded form is what is saved and loaded, by whichever library, and has the size
    that the configuration tells. The plain form is made of it when it is first used;
    from then on the code is there only while it is saved or loaded.
    """

    irdelta_coded: Codes  # adapter -> code of all its indices, uint8; until it is read
    irdelta_indices: Any  # the same as [k] per parameter; read it by `_indices`
    path: str  # the module's name, of the first adapter that reached it
    _unchecked: set[str]
    _fingerprints: dict[str, Mapping[str, str]]
    _numels: dict[str, dict[str, int]]  # entries of each parameter, for the code
    _supports: dict[str, dict[str, Support]]  # of matrices

    def _hold(
        self,
        adapter: str,
        indices: Mapping[str, Tensor] | None,
        counts: Mapping[str, int],
        numels: Mapping[str, int] | None = None,
    ) -> None:
        """Hold indices, or make room for such as are still to be loaded."""
        weights = {name: self._base_parameter(name) for name in counts}
        numels = numels or {name: weight.numel() for name, weight in weights.items()}
        plain = BufferDict(persistent=False)
        for name, count in counts.items():
            room = torch.full((count,), -1, dtype=index_dtype(weights[name].numel()))
            found = room if indices is None else indices[name].to(room.dtype, copy=True)
            plain[name] = found.to(device_of(weights[name]))
        self.irdelta_indices[adapter] = plain
        if indices is None:
            self._make_room(adapter, packed_size(counts, numels))
        else:
            self._settle(adapter, {name: numels[name] for name in counts})

    def _make_room(self, adapter: str, size: int) -> None:
        """Await a code of so many bytes."""
        weights = map(self._base_parameter, self.entry_counts(adapter))
        device = next((device_of(weight) for weight in weights), None)
        blank = torch.full((size,), 255, dtype=torch.uint8, device=device)
        self.irdelta_coded._read.discard(adapter)
        self.irdelta_coded[adapter] = blank
        self._unchecked.add(adapter)

    def _settle(self, adapter: str, numels: dict[str, int]) -> None:
        """Note that the plain indices are those of the adapter."""
        self._numels[adapter] = numels
        self._find_supports(adapter)
        if adapter in self.irdelta_coded:
            del self.irdelta_coded[adapter]
        self.irdelta_coded._read.add(adapter)
        self._unchecked.discard(adapter)  # last: other threads may go on now

    def _forget(self, adapter: str) -> None:
        """Drop what is known of an adapter that is no longer held."""
        self._unchecked.discard(adapter)
        self.irdelta_coded._read.discard(adapter)
        for known in (self._supports, self._fingerprints, self._numels):
            known.pop(adapter, None)

    def _codes(self) -> dict[str, Tensor]:
        """Return the codes of the adapters whose indices are plain."""
        return {
            adapter: self._code(dict(plain.items()), self._numels[adapter])
            for adapter, plain in self.irdelta_indices.items()
            if adapter not in self.irdelta_coded
        }

    def _code(self, plain: Mapping[str, Tensor], numels: Mapping[str, int]) -> Tensor:
        """Return indices as one code; on the meta device, its size is all there is."""
        if any(indices.is_meta for indices in plain.values()):
            size = packed_size({name: len(at) for name, at in plain.items()}, numels)
            return torch.empty(size, dtype=torch.uint8, device="meta")
        return pack(plain, numels)

    def _indices(self, adapter: str) -> dict[str, Tensor]:
        """Return an adapter's sorted flat positions per parameter. Shape ``[k]``."""
        held = self.irdelta_indices
        if adapter not in held:
            return {}
        if adapter in self._unchecked:
            with _CHECKING:
                self._check(adapter)
        return dict(held[adapter].items())

    def entry_counts(self, adapter_name: str) -> dict[str, int]:
        """Return an adapter's number of entries per parameter of this layer."""
        if adapter_name not in self.irdelta_values:
            return {}
        values = self.irdelta_values[adapter_name]
        return {name: tensor.numel() for name, tensor in values.items()}

    def numels(self, adapter_name: str) -> dict[str, int]:
        """Return the sizes of the parameters that an adapter's entries are for."""
        return self._numels.get(adapter_name, {})

    def is_unloaded(self, adapter_name: str) -> bool:
        """Return whether an adapter's entries in this layer are still to be loaded."""
        known = adapter_name in self.irdelta_coded
        return known and is_blank(self.irdelta_coded[adapter_name])

    def await_load(self, adapter_name: str) -> None:
        """Make room for indices that are about to be loaded, and checked by then.

        Args:
            adapter_name: The adapter.
        """
        self._fingerprints.pop(adapter_name, None)
        if adapter_name in self.irdelta_coded._read:
            counts = self.entry_counts(adapter_name)
            size = packed_size(counts, self._numels[adapter_name])
            self._make_room(adapter_name, size)

    def fingerprint(
        self, adapter_name: str, indices: Mapping[str, Tensor] | None = None
    ) -> dict[str, str] | None:
        """Hash the base weights at an adapter's entries, merged or not.

        Args:
            adapter_name: The adapter.
            indices: Flat positions per parameter. Default: the adapter's own.

        Returns:
            One hash per floating-point type; None where the weights are quantised,
            sharded or offloaded.
        """
        if indices is None:
            indices = self._indices(adapter_name)
        weights = {name: self._base_parameter(name) for name in indices}
        for name, weight in weights.items():
            if weight.is_meta or type(weight) not in _PLAIN:
                return None
            if indices[name].numel() and int(indices[name][-1]) >= weight.numel():
                return None  # only a shard of it is here
        found = {
            name: self._original_entries(name, at.to(weights[name].device))
            for name, at in indices.items()
        }
        return fingerprint(found)

    @torch.inference_mode(mode=False)  # else no backward pass could use the indices
    def _check(self, adapter: str) -> None:
        """Decode and check indices that came from outside, before they are used."""
        if adapter not in self._unchecked:
            return
        values = self.irdelta_values[adapter].values()
        code = self.irdelta_coded._buffers.get(adapter)
        if code is None or any(tensor.is_meta for tensor in (code, *values)):
            self._check_plain(adapter)
            return
        if self.is_unloaded(adapter):
            raise ValueError(
                f"Adapter '{adapter}' was set up from a saved configuration, but its "
                "weights were never loaded. Load them with `load_adapter` or "
                "`PeftModel.from_pretrained`; to select anew, set the configuration's "
                "`nnz_pattern` to None. If a library other than PEFT loaded a file of "
                "an early version of peft_ird, load that with PEFT and save it again."
            )
        counts = self.entry_counts(adapter)
        decoded = unpack(code, counts, self.path)
        found = {name: indices for name, (indices, _) in decoded.items()}
        numels = {name: numel for name, (_, numel) in decoded.items()}
        weights = {name: self._base_parameter(name) for name in found}
        for name, weight in weights.items():
            check_indices(found[name], weight.numel(), f"{self.path}.{name}")
        expected = self._fingerprints.get(adapter)
        if expected and differs(self.fingerprint(adapter, found), expected):
            raise ValueError(
                f"Adapter '{adapter}' was made for other base weights than those of "
                f"'{self.path}': at its entries of "
                f"{', '.join(counts)} the fingerprint should be {dict(expected)}. Load "
                "the base model that adapter_config.json names, or load inside `with "
                "peft_ird.ignoring_base_mismatch():` all the same."
            )
        plain = self.irdelta_indices[adapter]
        for name, weight in weights.items():
            # The file may have been made for a smaller one.
            dtype = index_dtype(weight.numel())
            plain[name] = found[name].to(device_of(weight), dtype)
        self._fingerprints.pop(adapter, None)
        self._settle(adapter, numels)

    def _check_plain(self, adapter: str) -> None:
        """Check indices that were moved, as `to_empty` leaves none; meta has none."""
        for name, indices in self.irdelta_indices[adapter].items():
            if not indices.is_meta:
                size = self._base_parameter(name).numel()
                check_indices(indices, size, f"{self.path}.{name}")
        self._find_supports(adapter)
        self._unchecked.discard(adapter)

    def _support(self, adapter: str, name: str, device: torch.device) -> Support | None:
        """Return the support of a matrix that serves where its indices are.

        FSDP and accelerate move buffers one by one, of which nobody is told.
        """
        support = self._supports.get(adapter, {}).get(name)
        if support is not None and not support.is_for(device):
            self._find_supports(adapter)
            support = self._supports[adapter][name]
        return support

    def _find_supports(self, adapter: str) -> None:
        found = {}
        with torch.inference_mode(False):  # else no backward pass could use them
            for name, indices in self.irdelta_indices[adapter].items():
                weight = self._base_parameter(name)
                dtype = weight.dtype if is_low_precision(weight) else torch.float32
                if weight.ndim == 2:
                    found[name] = Support.of(indices, weight.shape, dtype)
        self._supports[adapter] = found


_PLAIN = (Tensor, nn.Parameter)


def device_of(weight: Tensor) -> torch.device:
    """Return where an adapter of a weight belongs; an offloaded weight is on meta."""
    return torch.device("cpu") if weight.is_meta else weight.device
