"""From the values that a running cohort holds to plain JSON and named tensors, and back, bit for bit.

Only what is listed can be stored: plain values, arrays, tensors and the records and enumerations that a `Vocabulary`
names. Reading builds nothing else, so a file can hold no code.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from esper.leyline.errors import IntegrityError
from esper.leyline.keys import hex_digest
from esper.tolaria.runtime import CPU

Json = Any
"""A JSON value. A mapping in it always carries the key `$`, which says what it stands for."""

RecordType = TypeVar("RecordType")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The dataclasses and enumerations that may be stored, by name."""

    records: Mapping[str, type]
    enums: Mapping[str, type[Enum]]

    @classmethod
    def of(cls, records: Sequence[type], enums: Sequence[type[Enum]]) -> Vocabulary:
        """Return the vocabulary of these classes."""
        return cls({kind.__name__: kind for kind in records}, {kind.__name__: kind for kind in enums})

    @property
    def layout(self) -> str:
        """A digest of every record's fields: files of another layout cannot be read."""
        return hex_digest({name: [f.name for f in dataclasses.fields(kind)] for name, kind in self.records.items()}, 16)


class Packer:
    """Turns values into JSON and collects their tensors; a tensor that several values share is stored once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._vocabulary = vocabulary
        self._names: dict[int, str] = {}
        self._alive: list[Tensor] = []

    def pack(self, value: Any) -> Json:
        """Return a value as JSON.

        Raises:
            TypeError: It holds something that the vocabulary does not name.
        """
        if isinstance(value, Enum):
            return {"$": "enum", "type": self._named(type(value), self._vocabulary.enums), "value": value.value}
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"$": "float", "value": repr(float(value))}
        if isinstance(value, list):
            return [self.pack(item) for item in value]
        if isinstance(value, tuple):
            return {"$": "tuple", "items": [self.pack(item) for item in value]}
        if isinstance(value, Mapping):
            return {"$": "dict", "items": [[self.pack(key), self.pack(item)] for key, item in value.items()]}
        if isinstance(value, np.generic):
            return self.pack(value.item())
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "U":
                return {"$": "strings", "items": value.tolist(), "dtype": value.dtype.str}
            return {"$": "array", "name": self._store(torch.from_numpy(np.array(value, order="C")))}
        if isinstance(value, Tensor):
            moved = {} if value.device.type == "cpu" else {"on_slot": True}
            return {"$": "tensor", "name": self._store(value), "strides": list(value.stride()), **moved}
        fields = {f.name: self.pack(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"$": "record", "type": self._named(type(value), self._vocabulary.records), "fields": fields}

    def pack_module(self, module: nn.Module) -> Json:
        """Return the weights and buffers of a module; which module it is must be known to who reads it."""
        weights = [
            [name, self.pack(weight.detach()), weight.requires_grad] for name, weight in module.named_parameters()
        ]
        return {"weights": weights, "buffers": [[name, self.pack(buffer)] for name, buffer in module.named_buffers()]}

    def pack_optimiser(self, optimiser: torch.optim.Optimizer, names: Mapping[int, str]) -> Json:
        """Return groups in order, with their options, and the state by name of the weight.

        Args:
            optimiser: The optimiser.
            names: Of every weight in it, by `id`.
        """
        groups = [
            {
                "weights": [names[id(weight)] for weight in group["params"]],
                "options": self.pack({key: value for key, value in group.items() if key != "params"}),
            }
            for group in optimiser.param_groups
        ]
        state = [[names[id(weight)], self.pack(dict(entries))] for weight, entries in optimiser.state.items()]
        return {"groups": groups, "state": state}

    def _store(self, tensor: Tensor) -> str:
        name = self._names.get(id(tensor))
        if name is None:
            name = self._names[id(tensor)] = f"t{len(self.tensors)}"
            self._alive.append(tensor)  # an id is unique only as long as its object lives
            self.tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
        return name

    def _named(self, kind: type, known: Mapping[str, type]) -> str:
        if known.get(kind.__name__) is not kind:
            raise TypeError(f"{kind.__qualname__} is not among what a checkpoint stores\n  name it in its vocabulary")
        return kind.__name__


class Unpacker:
    """Turns the JSON of a `Packer` and its tensors into values again.

    What lay on a GPU comes back to the GPU of the process that reads it, whichever that is.
    """

    def __init__(self, vocabulary: Vocabulary, tensors: Mapping[str, Tensor], device: torch.device = CPU) -> None:
        self._device = device
        self._vocabulary = vocabulary
        self._tensors = tensors
        self._made: dict[str, Tensor] = {}

    def unpack(self, value: Json) -> Any:
        """Return the value."""
        if isinstance(value, list):
            return [self.unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        kind = value["$"]
        if kind == "dict":
            return {self.unpack(key): self.unpack(item) for key, item in value["items"]}
        if kind == "tuple":
            return tuple(self.unpack(item) for item in value["items"])
        if kind == "float":
            return float(value["value"])
        if kind == "enum":
            return self._vocabulary.enums[value["type"]](value["value"])
        if kind == "strings":
            return np.array(value["items"], dtype=value["dtype"])
        if kind == "array":
            return self._tensors[value["name"]].numpy().copy()
        if kind == "tensor":
            return self._tensor(value)
        record = self._vocabulary.records[value["type"]]
        return record(**{name: self.unpack(item) for name, item in value["fields"].items()})

    def _tensor(self, value: Json) -> Tensor:
        """The tensor with its own strides; one object per name, as it was when it was stored."""
        made = self._made.get(value["name"])
        if made is None:
            stored = self._tensors[value["name"]]
            device = self._device if value.get("on_slot") else CPU
            made = torch.empty_strided(stored.shape, value["strides"], dtype=stored.dtype, device=device).copy_(stored)
            self._made[value["name"]] = made
        return made

    @torch.no_grad()
    def load_module(self, module: nn.Module, stored: Json) -> None:
        """Set the weights and buffers of a freshly built module.

        Raises:
            IntegrityError: They are not those of this module.
        """
        weights, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        names = [name for name, *_ in stored["weights"]], [name for name, *_ in stored["buffers"]]
        if names != (list(weights), list(buffers)):
            raise IntegrityError(f"the checkpoint holds other weights than a {type(module).__name__} has: {names[0]}")
        for name, value, requires_grad in stored["weights"]:
            weights[name].data = self._shaped(weights[name], value, name)
            weights[name].requires_grad_(requires_grad)
        for name, value in stored["buffers"]:
            buffers[name].data = self._shaped(buffers[name], value, name)

    def _shaped(self, expected: Tensor, value: Json, name: str) -> Tensor:
        tensor = self._tensor(value)
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise IntegrityError(
                f"weight {name} in the checkpoint is {tensor.dtype} {list(tensor.shape)}\n"
                f"  expected: {expected.dtype} {list(expected.shape)}"
            )
        return tensor

    def load_optimiser(self, optimiser: torch.optim.Optimizer, stored: Json, weights: Mapping[str, Tensor]) -> None:
        """Give a new optimiser the stored groups, in their order, and its state.

        Args:
            optimiser: Its groups are replaced.
            stored: What `pack_optimiser` returned.
            weights: Every weight in it, by name.
        """
        optimiser.param_groups.clear()
        for group in stored["groups"]:
            optimiser.add_param_group(
                {"params": [weights[name] for name in group["weights"]], **self.unpack(group["options"])}
            )
        optimiser.state.clear()
        for name, entries in stored["state"]:
            optimiser.state[weights[name]] = self.unpack(entries)
