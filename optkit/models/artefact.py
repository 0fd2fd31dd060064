"""Saves a subject and opens it again: safetensors, the model's own configuration, and ``optkit.json`` with structure and digests."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from optkit.core import files
from optkit.core.device import CPU
from optkit.core.errors import ArtefactError
from optkit.core.mesh import Mesh
from optkit.core.subject import Execution, Kind, Step, Subject
from optkit.engines.offloading import dispatch, on_disk
from optkit.engines.offloading import placement as places
from optkit.engines.parallel.cut import Cut, cut, fill, twins_of
from optkit.engines.parallel.part import Part
from optkit.kernels import LAYERS
from optkit.models.architectures import is_public
from optkit.models.architectures import kind_of as kind_of
from optkit.models.interchange.bits import quantization_config
from optkit.models.sizes import resize, sizes_of
from optkit.models.skeleton import as_described, describe, is_pretrained, members_of, skeleton, tie_dense

MANIFEST = "optkit.json"
_SCHEMA = 1
_SHARD = "5GB"
# Under the usual name, plain transformers would open packed weights with a warning, and random numbers in their place.
_PLAIN_NAME, _PACKED_NAME = "model{suffix}.safetensors", "packed{suffix}.safetensors"


class _Layer(BaseModel, strict=True):
    layer: str
    layout: dict[str, int | float | bool | str | None]
    tied_to: str | None


class _Sizes(BaseModel, strict=True):
    numbers: dict[str, int | list[int]]
    shapes: dict[str, list[Annotated[int, Field(ge=0)]]]


class _Mesh(BaseModel, strict=True):
    data: Annotated[int, Field(ge=1)]
    pipeline: Annotated[int, Field(ge=1)]
    tensor: Annotated[int, Field(ge=1)]


class _Step(BaseModel, strict=True):
    name: str
    settings: dict[str, Any]
    execution: Execution
    opens_in: Literal["transformers", "optkit"]


class _Structure(BaseModel, strict=True, extra="allow"):
    """What ``optkit.json`` must hold."""

    source: str
    kind: Kind
    class_: str = Field(alias="class")
    pretrained: bool
    trained: bool
    replicas: Annotated[int, Field(ge=1)] = 1
    mesh: _Mesh | None = None
    history: list[_Step]
    layers: dict[str, _Layer]
    lists: dict[str, Annotated[int, Field(ge=0)]] = {}
    members: list[str] = []
    network: dict[str, Any] | None = None
    sizes: dict[str, _Sizes] = {}


def save(model: nn.Module | Subject, folder: str | Path) -> None:
    """Save a model so that ``load`` opens it in another process with equal outputs.

    Args:
        model: a subject, or a bare module. A model of one of transformers' own classes is saved with its configuration; any other
            module by its weights alone, and ``load`` then needs a fresh module of the same class.
        folder: must not exist yet, or be empty.

    Raises:
        ArtefactError: the folder holds something already, or weights are not in memory.
        ResourceError: the disk is full.
        PlaceError: it cannot be written.
    """
    subject = model if isinstance(model, Subject) else Subject(module=model, source=type(model).__name__, kind=kind_of(model))
    if any(tensor.is_meta for tensor in subject.module.parameters()):
        raise ArtefactError("some of the model's weights are not in memory, but on disk or nowhere; copy the artefact that they are in")
    with files.build_folder(Path(folder), MANIFEST) as aside:
        module = subject.module
        if is_public(module):
            module.config.architectures = [type(module).__name__]  # type: ignore[union-attr]
        describe(module, aside)
        if subject.tokenizer is not None:
            subject.tokenizer.save_pretrained(aside)
        structure = _structure(subject)
        foreign = _declare(module, aside) if subject.opens_in == "transformers" and structure["layers"] else False
        save_tensors(distinct_tensors(module), aside, _PACKED_NAME if structure["layers"] and not foreign else _PLAIN_NAME)
        files.write_json(aside / MANIFEST, structure)


def load(
    folder: str | Path, into: nn.Module | None = None, part: Part | None = None, device: torch.device = CPU, whole: bool = False
) -> Subject:
    """Open what ``save`` wrote, after comparing every file with its digest.

    Weights are read into host memory; those of a model that was offloaded go to their places, as far as these are on ``device``.

    Args:
        folder: the artefact.
        into: for an artefact of a class that is not transformers' own: a fresh module of that class, which is used up.
        part: what this process is to hold of a model that several processes hold together; no more than that is kept in memory.
        device: where an offloaded model computes.
        whole: read an offloaded model into memory all the same, to change it.

    Raises:
        ArtefactError: the artefact is incomplete, changed or of a newer version.
        ModelError: it needs ``into``.
        TransformError: it cannot be shared so.
    """
    folder = Path(folder)
    structure = _read_structure(files.verify(folder, MANIFEST), folder)
    module = _insert_layers(skeleton(folder, structure, into), structure["layers"])
    tie_dense(module)
    resize(module, structure.get("sizes", {}))
    limits = next((step["settings"] for step in structure["history"] if step["name"] == "offload" and not whole), None)
    placed = places(module, limits["host_memory"], limits["device_memory"], device) if limits is not None else {}
    left = _assign(module, folder, part, on_disk(dict(module.state_dict(keep_vars=True)), placed) if placed else set())
    if placed:
        module = dispatch(module, placed, left, device)
    return _subject(folder, module.eval(), structure, _tokenizer(folder))


def outline(folder: str | Path) -> Subject:
    """Open an artefact's shapes on the meta device; no weight is read."""
    folder = Path(folder)
    structure = _read_structure(files.read_json(folder / MANIFEST), folder)
    with torch.device("meta"):
        module = _insert_layers(skeleton(folder, structure, None), structure["layers"])
        tie_dense(module)
        resize(module, structure.get("sizes", {}))
    return _subject(folder, module.eval(), structure, None)


def opens_alone(folder: str | Path) -> bool:
    """Say whether ``load`` can make the module of an artefact itself, without ``into``."""
    folder = Path(folder)
    return bool(_read_structure(files.read_json(folder / MANIFEST), folder)["pretrained"])


def placement(folder: str | Path) -> tuple[Mesh, tuple[Step, ...]]:
    """Return by how many processes an artefact is to be served, in which roles, and the history that tells more of it."""
    folder = Path(folder)
    structure = _read_structure(files.read_json(folder / MANIFEST), folder)
    return _mesh(structure), tuple(Step(**step) for step in structure["history"])


def _mesh(structure: dict[str, Any]) -> Mesh:
    mesh = structure.get("mesh")
    return Mesh(**mesh) if mesh is not None else Mesh(data=structure.get("replicas", 1))  # as it was written before there was a mesh


def distinct_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the module's state without tensors that are another's twin (tied weights keep their first name)."""
    seen: set[tuple[int, torch.Size, tuple[int, ...]]] = set()
    kept = {}
    aliases = tuple(f"{name}." for name in _aliases(module))
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name.startswith(aliases):
            continue
        # On the meta device every address is zero, and only the objects tell the tensors apart.
        key = (id(tensor) if tensor.is_meta else tensor.data_ptr(), tensor.shape, tensor.stride())
        if not tensor.numel() or key not in seen:
            seen.add(key)
            kept[name] = tensor.detach()
    return kept


def _aliases(module: nn.Module) -> dict[str, str]:
    """Return the further names of layers that stand in several places, with their first names."""
    first = {id(layer): name for name, layer in module.named_modules()}
    return {name: first[id(layer)] for name, layer in module.named_modules(remove_duplicate=False) if first[id(layer)] != name}


def _structure(subject: Subject) -> dict[str, Any]:
    described = as_described(subject.module, subject.network)
    layers: dict[str, Any] = {}
    closed: set[str] = set()
    names = {id(layer): name for name, layer in subject.module.named_modules()}
    words = {kind: word for word in LAYERS for kind in [LAYERS[word]]}
    for name, layer in subject.module.named_modules():
        if type(layer) in words and name.rpartition(".")[0] not in closed:  # what a packed layer is made of comes with it
            if not getattr(layer, "open_inside", False):
                closed.add(name)
            partner = getattr(layer, "tied", None)
            layers[name] = {
                "layer": words[type(layer)],
                "layout": layer.layout(),
                "tied_to": names[id(partner)] if partner is not None else None,
            }
    for name, first in _aliases(subject.module).items():
        if first in layers:
            layers[name] = layers[first] | {"tied_to": first}
    return {
        "schema": _SCHEMA,
        "source": subject.source,
        "kind": subject.kind,
        "class": type(subject.module).__name__,
        "pretrained": described is not None,
        "network": subject.network,
        "members": members_of(subject.module),
        "trained": subject.trained,
        "mesh": asdict(subject.mesh),
        "opens_in": subject.opens_in,
        "execution": subject.execution,
        "history": [asdict(step) for step in subject.history],
        "layers": layers,
        "sizes": sizes_of(subject.module, described),
        "lists": {name: len(layer) for name, layer in subject.module.named_modules() if isinstance(layer, nn.ModuleList)},
    }


def _declare(module: nn.Module, folder: Path) -> bool:
    """Tell plain transformers in config.json how the layers are stored; return False where it has no word for them."""
    declared = quantization_config(module)
    if declared is None or not is_pretrained(module):
        return False
    files.write_json(folder / "config.json", files.read_json(folder / "config.json") | {"quantization_config": declared})
    return True


def _read_structure(content: Any, folder: Path) -> dict[str, Any]:
    if not isinstance(content, dict) or "schema" not in content:
        raise ArtefactError(f"{folder / MANIFEST} does not describe an artefact")
    if content["schema"] != _SCHEMA:
        raise ArtefactError(f"{folder} was written in schema {content['schema']}, this version reads {_SCHEMA}; install a newer optkit")
    try:
        _Structure.model_validate(content)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_url=False)[:3])
        raise ArtefactError(f"{folder / MANIFEST} does not describe an artefact: {told}") from None
    return content


def _insert_layers(module: nn.Module, layers: dict[str, Any]) -> nn.Module:
    for name, entry in sorted(layers.items(), key=lambda item: item[1]["tied_to"] is not None):
        try:
            module = _insert(module, name, entry)
        except (TypeError, KeyError, AttributeError, ValueError, RuntimeError) as error:
            raise ArtefactError(f"{MANIFEST} does not describe this model: layer {name!r} cannot be made: {error}") from None
    return module


def _insert(module: nn.Module, name: str, entry: dict[str, Any]) -> nn.Module:
    kind: Any = LAYERS[entry["layer"]]
    owner = module.get_submodule(entry["tied_to"]) if entry["tied_to"] is not None else None
    if owner is None:
        layer: nn.Module = kind.empty(**entry["layout"])
    elif type(owner) is kind:
        layer = owner  # one layer in several places
    else:
        layer = kind.tied_to(owner, torch.empty(entry["layout"]["out_features"]) if entry["layout"]["bias"] else None)
    if not name:
        return layer
    parent, _, attribute = name.rpartition(".")
    module.get_submodule(parent).register_module(attribute, layer)
    return module


def _assign(module: nn.Module, folder: Path, part: Part | None, waiting: Container[str] = ()) -> dict[str, tuple[Path, str]]:
    """Put the saved tensors into the module; return the file, and the name in it, of those that stay on disk."""
    whole = set(distinct_tensors(module))
    known = set(module.state_dict(keep_vars=True))
    found = cut(module, part) if part is not None else Cut()
    twins = twins_of(module)
    tensors: dict[str, Tensor] = {}
    left: dict[str, tuple[Path, str]] = {}
    names: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    names.add(name)
                    left |= {twin: (path, name) for twin in (name, *(t for t in twins if twins[t] == name)) if twin in waiting}
                    if name in waiting:
                        continue
                    new = found.renamed(name) if name in known else None
                    if new is not None:
                        # Copied out of the file mapping: an arm must not be timed on another kind of memory than its rival.
                        tensors[new] = found.of(new, file.get_tensor(name))
        except (SafetensorError, OSError) as error:
            raise ArtefactError(f"{path} is damaged: {error}") from None
    missing, unexpected = sorted(whole - names), sorted(names - known)
    if missing or unexpected:
        raise ArtefactError(f"{folder} does not fit its own structure: missing {missing[:3]}, unexpected {unexpected[:3]}")
    state = module.state_dict()
    wrong = [name for name, tensor in tensors.items() if tensor.shape != state[name].shape]
    if wrong:
        shapes = tuple(tensors[wrong[0]].shape), tuple(state[wrong[0]].shape)
        raise ArtefactError(f"{folder} does not fit its own structure: {wrong[0]} is {shapes[0]}, not {shapes[1]}")
    fill(module, tensors)
    return left


def _subject(folder: Path, module: nn.Module, structure: dict[str, Any], tokenizer: Any) -> Subject:
    return Subject(
        module=module,
        source=structure["source"],
        kind=structure["kind"],
        tokenizer=tokenizer,
        trained=structure["trained"],
        mesh=_mesh(structure),
        network=structure.get("network"),
        history=tuple(Step(**step) for step in structure["history"]),
    )


def _tokenizer(folder: Path) -> Any:
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def save_tensors(tensors: dict[str, Tensor], folder: Path, pattern: str = _PLAIN_NAME) -> None:
    """Write tensors as safetensors, in shards with an index where they are many."""
    from huggingface_hub import split_torch_state_dict_into_shards

    plan = split_torch_state_dict_into_shards(tensors, filename_pattern=pattern, max_shard_size=_SHARD)
    for name, keys in plan.filename_to_tensors.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / name, metadata={"format": "pt"})
    if plan.is_sharded:
        files.write_json(
            folder / f"{pattern.format(suffix='')}.index.json", {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        )
