"""Checkpoints that are whole or absent, verified when they are read, and from which a run goes on exactly.

    OUT/checkpoints/step-000050/
        model.safetensors       parameters and buffers
        optimizer.safetensors   PARAMETER/KEY: what AdamW keeps for each parameter
        random.safetensors      states of PyTorch's generators
        carried.safetensors     states of linear layers, where a run takes them on from step to step
        state.json              format, step, last losses, seconds, skipped steps, and the settings of the run
        manifest.json           size and SHA-256 of each file above

The crops of a batch depend on its number alone, so the step is also the position in the data. Of several processes the
first reads and writes, whole tensors also where each has a shard: a run goes on in any number of them.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from regla.runtime.distributed import ALONE, Processes, local, whole
from regla.runtime.files import remove_unfinished, sync_folder, unfinished_name, write_synced
from regla.runtime.progress import CALMER, WINDOW, Progress

FOLDER = "checkpoints"
_KEEP = 2
FORMAT = 2
"""1 had the optimiser's state by number of parameter, in the order of groups that let norm gains decay."""
_PREFIX = "step-"
_MODEL, _OPTIMIZER, _RANDOM, _STATE = "model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"
_CARRIED = "carried.safetensors"
_FILES = (_MODEL, _OPTIMIZER, _RANDOM, _STATE)
_MANIFEST = "manifest.json"


class Checkpoints:
    """The checkpoints of the run in folder `out`.

    settings: what the weights depend on, by the name of its option; JSON types. A checkpoint of other settings is
    refused. resume: None (a new run), "latest", or "previous" to the newest. completed: whether the run that has made
    its last step leaves a checkpoint, too, for another that follows; a run that was too short for any other leaves one
    anyway. free: settings that may differ from those of the checkpoint. processes: those of the run; each of them calls
    the same methods.

    Raises ValueError where the checkpoint to resume from is of other settings or of an older version of regla, corrupt
    or, for "previous", absent.
    """

    def __init__(
        self,
        out: str | Path,
        settings: Mapping[str, Any],
        *,
        resume: str | None = None,
        completed: bool = False,
        free: Collection[str] = (),
        processes: Processes = ALONE,
    ) -> None:
        self._completed = completed
        self._processes = processes
        self.folder = Path(out) / FOLDER
        self.settings = json.loads(json.dumps(settings))
        self._resumed: Path | None = None
        self._files: dict[str, bytes] = {}
        self.carried: dict[str, Tensor] = {}
        if resume is not None:
            with processes.together():
                if processes.is_first:
                    self._read(resume, free)
            self._resumed = processes.value_of_first(self._resumed)

    @property
    def resumed(self) -> Path | None:
        """The checkpoint that `restore` goes on from."""
        return self._resumed

    @property
    def completed(self) -> bool:
        """Whether the last step of the run is to be saved, too."""
        return self._completed or not self._processes.value_of_first(found_in(self.folder))

    @property
    def step(self) -> int:
        """The step that `restore` goes on from."""
        return 0 if self._resumed is None else _step(self._resumed)

    @property
    def kept(self) -> str:
        """A sentence for messages: what there is to go on from."""
        found = found_in(self.folder)
        return f"--resume goes on from the last checkpoint, {found[-1]}." if found else "There is no checkpoint yet."

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, progress: Progress) -> None:
        """Put the resumed checkpoint, if there is one, into `model`, `optimizer`, `progress` and the generators; what
        `save` was given besides is in `carried` then.

        Checkpoints behind it and unfinished ones are removed: the run writes them anew.
        """
        first = self._processes.is_first
        if first:
            remove_unfinished(self.folder)
        if self._resumed is None:
            return
        for later in found_in(self.folder) if first else ():
            if _step(later) > _step(self._resumed):
                _remove(later)
        weights, kept, generators = (
            safetensors.torch.load(self._files[name]) if first else {} for name in (_MODEL, _OPTIMIZER, _RANDOM)
        )
        for name, tensor in _weights(model).items():
            self._processes.fill(tensor, weights.get(name))
        numbers = {name: number for number, name in enumerate(_trained(model, optimizer))}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = self._processes.value_of_first({key: (x.shape, x.dtype) for key, x in kept.items()})
        for key, (shape, dtype) in entries.items():
            parameter = parameters[numbers[key.rpartition("/")[0]]]
            # On the CPU what is no number for every weight, as AdamW has it itself.
            like = shape == parameter.shape
            target = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(shape, dtype=dtype, device="cpu")
            self._processes.fill(target, kept.get(key))
            kept[key] = target
        optimizer.load_state_dict(
            {"state": _unflatten(kept, numbers), "param_groups": optimizer.state_dict()["param_groups"]}
        )
        carried = safetensors.torch.load(self._files[_CARRIED]) if _CARRIED in self._files else {}
        generators, state, self.carried = self._processes.value_of_first(
            (generators, json.loads(self._files[_STATE]) if first else {}, carried)
        )
        torch.set_rng_state(generators["cpu"])
        if "cuda" in generators and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators["cuda"])
        progress.steps = state["step"]
        progress.losses = state["losses"]
        progress.seconds_before = state["seconds"]
        progress.skipped = state.get("skipped", 0)
        progress.skipped_lately = state.get("skipped_lately", [])
        progress.spikes = state.get("spikes", 0)
        self._files = {}

    def save(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        progress: Progress,
        carried: Mapping[str, Tensor] | None = None,
    ) -> Path:
        """Write the checkpoint of `progress.steps`, then remove all but the last two. carried: whole tensors, besides.

        It is written beside its place, synced to the disk and renamed into it. Raises OSError where it
        cannot be written; nothing of it stays then, and those before it are untouched. FloatingPointError where the
        model or the optimiser's state is not finite, before anything is written.
        """
        check_finite(model, optimizer, progress.steps, self._processes)
        weights = whole_weights(model, self._processes)
        kept = _whole(_flatten(optimizer.state_dict()["state"], _trained(model, optimizer)), self._processes)
        target = self.folder / f"{_PREFIX}{progress.steps:06d}"
        with self._processes.together():
            if self._processes.is_first:
                self._write(target, weights, kept, progress, carried or {})
        return target

    def _read(self, resume: str, free: Collection[str]) -> None:
        """The files of the checkpoint to go on from, verified."""
        self._resumed = _choose(self.folder, resume)
        if self._resumed is not None:
            self._files = _verified(self._resumed)
            self._check_state(json.loads(self._files[_STATE]), free)

    def _write(
        self,
        target: Path,
        weights: dict[str, Tensor],
        kept: dict[str, Tensor],
        progress: Progress,
        carried: Mapping[str, Tensor],
    ) -> None:
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        state = {
            "format": FORMAT,
            "step": progress.steps,
            "losses": progress.losses[-WINDOW:],
            "seconds": progress.total_seconds,
            "skipped": progress.skipped,
            "skipped_lately": progress.skipped_lately,
            "spikes": progress.spikes,
            "settings": self.settings,
        }
        temporary = unfinished_name(target)
        try:
            temporary.mkdir(parents=True)
            manifest = {}
            for name, tensors in (
                (_MODEL, weights),
                (_OPTIMIZER, kept),
                (_RANDOM, generators),
                *([(_CARRIED, dict(carried))] if carried else []),
            ):
                manifest[name] = _write(temporary / name, safetensors.torch.save(tensors))
            manifest[_STATE] = _write(temporary / _STATE, _json(state))
            _write(temporary / _MANIFEST, _json({"files": manifest}))
            sync_folder(temporary)
            temporary.rename(target)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {progress.steps} cannot be written to {self.folder} "
                f"({error.strerror or error})."
            ) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in found_in(self.folder)[:-_KEEP]:
            _remove(old)

    def _check_state(self, state: Mapping[str, Any], free: Collection[str]) -> None:
        if state.get("format") != FORMAT:
            raise ValueError(
                f"{self._resumed} was written by another version of regla (format {state.get('format', 1)}, this one "
                f"reads {FORMAT}); go on with that version, or give --out a new folder."
            )
        saved = state["settings"]
        for key in {**saved, **self.settings}:
            ours, theirs = self.settings.get(key), saved.get(key)
            is_new = key not in saved and not ours  # an option that there was not then, without effect
            if ours != theirs and key not in free and not is_new:
                raise ValueError(
                    f"{self._resumed} is of a run with {key} {theirs}, but this one has {key} {ours}; "
                    "repeat the options of that run, or give --out a new folder."
                )


def found_in(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    named = [path for path in folder.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit()]
    return sorted(named, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def _choose(folder: Path, resume: str) -> Path | None:
    found = found_in(folder)
    if resume == "latest":
        return found[-1] if found else None
    if len(found) < 2:
        raise ValueError(f"{folder} holds no checkpoint before the newest; use --resume alone, or start anew.")
    return found[-2]


def _verified(checkpoint: Path) -> dict[str, bytes]:
    """The files of a checkpoint, each of the size and hash that its manifest says."""
    earlier = [path for path in found_in(checkpoint.parent) if _step(path) < _step(checkpoint)]
    advice = f"--resume previous goes on from {earlier[-1]}" if earlier else "no earlier one is left, start anew"
    contents = {}
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_bytes())["files"]
        sizes = {
            name: (operator.index(manifest[name]["size"]), manifest[name]["sha256"]) for name in (*_FILES, *manifest)
        }
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{checkpoint / _MANIFEST} is missing or damaged; {advice}.") from error
    for name, (size, digest) in sizes.items():
        file = checkpoint / name
        try:
            content = file.read_bytes()
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror}); {advice}.") from error
        if len(content) != size:
            raise ValueError(f"{file} is corrupt: it has {len(content):,} bytes, expected {size:,}; {advice}.")
        if hashlib.sha256(content).hexdigest() != digest:
            raise ValueError(f"{file} is corrupt: its content does not have the recorded SHA-256; {advice}.")
        contents[name] = content
    return contents


def whole_weights(model: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once, on the CPU; in processes but the first, which only help to put
    shards together, none."""
    return _whole(_weights(model), processes)


def _whole(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        together = whole(tensor.detach())
        if processes.is_first:
            found[name] = together.cpu().contiguous()
    return found


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once; they share the model's memory."""
    weights: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            weights[name] = tensor.detach()
    return weights


def check_finite(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, processes: Processes = ALONE) -> None:
    """Raise FloatingPointError unless all parameters and all that the optimiser keeps are finite, in all processes."""
    kept = (tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor))
    if not processes.all(is_finite(model) and _all_finite(kept)):
        broken = (name for name, weight in model.named_parameters() if not torch.isfinite(local(weight)).all())
        named = "".join(f", first {name}" for name in itertools.islice(broken, 1))
        raise FloatingPointError(f"The weights are no longer finite (by step {step}){named}; {CALMER}.")


def is_finite(model: nn.Module) -> bool:
    """Whether all parameters are finite, or this process's shards of them."""
    return _all_finite(model.parameters())


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Of this process's shards; waits for each device once."""
    finite: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        part = local(tensor)
        finite.setdefault(part.device, []).append(torch.isfinite(part).all())
    return all(bool(torch.stack(found).all()) for found in finite.values())


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimiser's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _flatten(state: Mapping[int, Mapping[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    return {f"{names[number]}/{key}": tensor for number, entry in state.items() for key, tensor in entry.items()}


def _unflatten(tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> dict[int, dict[str, Tensor]]:
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, entry = key.rpartition("/")
        state.setdefault(numbers[name], {})[entry] = tensor
    return state


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _write(path: Path, content: bytes) -> dict[str, Any]:
    """Write and sync one file; its entry in the manifest."""
    write_synced(path, content)
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; interrupted at any moment it leaves a whole one or an unfinished one."""
    doomed = unfinished_name(checkpoint)
    checkpoint.rename(doomed)
    shutil.rmtree(doomed)
