"""Rules about who executes a step: what DeepSpeed cannot do, what an optimizer needs, which packages are there."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

from megatron_vilg.config.deepspeed import Offload, offload_of, read_extension
from megatron_vilg.config.schema import RunConfig

OTHER_ENGINE = "or train.engine=native"
OTHER_OPTIMIZER = "Works: pip install 'megatron_vilg[lean]', or optim.name=adamw."
LEAN = {"adamw_8bit": 256, "adamw_4bit": 128}
"""Optimizers with quantised state, and how many values share one scale."""


def check_engine(run: RunConfig, world_size: int | None) -> Iterator[str]:
    """Broken rules of ``train.engine``, of the options that only one engine knows, and of ``optim.name``.

    Without a number of processes, rules that need one are left out.
    """
    if run.train.engine == "deepspeed":
        yield from _check_deepspeed(run, world_size)
    else:
        for name in ("offload_optimizer", "offload_weights"):
            if (value := getattr(run.parallel, name)) != "none":
                works = "none, parallel.cpu_offload=true, or train.engine=deepspeed"
                yield f"parallel.{name}={value}: is for train.engine=deepspeed. Works: {works}."
        if run.train.deepspeed_config:
            rule = "is for train.engine=deepspeed, which does not run here"
            yield f"train.deepspeed_config={run.train.deepspeed_config}: {rule}. Works: leave it out, or that engine."
        if run.parallel.cpu_offload and world_size == 1:
            rule = "is for sharded weights, and there is one process"
            yield f"parallel.cpu_offload=True: {rule}. Works: false, more processes, or train.engine=deepspeed."
        yield from _check_reduce(run)
    folder = run.parallel.offload_folder
    if folder and "nvme" not in (run.parallel.offload_optimizer, run.parallel.offload_weights):
        rule = "nothing is offloaded to nvme"
        works = "leave it out, or parallel.offload_optimizer=nvme or parallel.offload_weights=nvme"
        yield f"parallel.offload_folder={folder}: {rule}. Works: {works}."
    yield from _check_optimizer(run, world_size)


def _check_reduce(run: RunConfig) -> Iterator[str]:
    """Micro-batches are added up in float32 only where FSDP adds them up behind the message between ranks."""
    parallel = run.parallel
    if parallel.reduce_precision == "fp32" or parallel.num_microbatches == 1:
        return
    if parallel.zero == 1 or parallel.replica > 1:
        where = "parallel.zero=1" if parallel.zero == 1 else "parallel.replica above 1"
        rule = f"with {where}, parallel.num_microbatches={parallel.num_microbatches} would be added up in bf16"
        works = "fp32, parallel.num_microbatches=1, or parallel.replica=1 with parallel.zero=2 or 3"
        yield f"parallel.reduce_precision=bf16: {rule}. Works: {works}."


def _check_deepspeed(run: RunConfig, world_size: int | None) -> Iterator[str]:
    parallel = run.parallel
    reasons = {
        "pipeline": "DeepSpeed's own pipeline refuses ZeRO 2 and 3, so this engine has none",
        "tensor": "DeepSpeed's AutoTP gives wrong gradients to weights that all ranks hold, such as the norms of "
        "queries and keys, so this engine has none",
        "replica": "this engine shards over all processes",
    }
    broken = [name for name in reasons if getattr(parallel, name) != 1]
    for name in broken:
        yield f"parallel.{name}={getattr(parallel, name)}: {reasons[name]}. Works: 1, {OTHER_ENGINE}."
    yield from _check_offload(run, offload_of(run))
    if parallel.reduce_precision != "fp32":
        rule = "DeepSpeed's own key communication_data_type says this"
        works = f"fp32 with that key in train.deepspeed_config, {OTHER_ENGINE}"
        yield f"parallel.reduce_precision={parallel.reduce_precision}: {rule}. Works: {works}."
    if run.reconstructor.enabled:
        rule = "end-to-end training is the native engine's alone"
        yield f"reconstructor.enabled=True: {rule}. Works: false, {OTHER_ENGINE}."
    if run.ops.compile:
        rule = "blocks are compiled by the native engine alone"
        yield f"ops.compile=True: {rule}. Works: false, {OTHER_ENGINE}."
    if run.log.instruments_every:
        rule = "the instruments look into the native engine's passes"
        yield f"log.instruments_every={run.log.instruments_every}: {rule}. Works: 0, {OTHER_ENGINE}."
    if run.train.deepspeed_config and not broken and world_size is not None:
        yield from read_extension(run, world_size)[1]


def _check_offload(run: RunConfig, places: Offload) -> Iterator[str]:
    parallel = run.parallel
    if parallel.zero < 3:
        if places.weights != "none":
            rule = f"at parallel.zero={parallel.zero} weights are whole on every process"
            yield f"parallel.offload_weights={places.weights}: {rule}. Works: none, or parallel.zero=3."
        if places.optimizer == "nvme":
            rule = f"DeepSpeed has it for parallel.zero=3 only, and it is {parallel.zero}"
            yield f"parallel.offload_optimizer=nvme: {rule}. Works: none, cpu, or parallel.zero=3."
    if "nvme" in (places.weights, places.optimizer):
        folder = parallel.offload_folder
        if not folder or not Path(folder).is_dir():
            rule = "must be a folder on a local disk, because something is offloaded to nvme"
            yield f"parallel.offload_folder={folder}: {rule}. Works: an existing folder, or offload to cpu."


def _check_optimizer(run: RunConfig, world_size: int | None) -> Iterator[str]:
    name = run.optim.name
    if name in LEAN:
        if run.train.engine == "deepspeed":
            rule = "DeepSpeed cuts optimizer state where quantised blocks cannot be cut"
            yield f"optim.name={name}: {rule}. Works: adamw, apex_fused_adam, {OTHER_ENGINE}."
        width, block = run.model.width // run.parallel.tensor, LEAN[name]
        if width % block:
            rule = f"{block} neighbours in a row share a scale, and model.width / parallel.tensor is {width}"
            yield f"optim.name={name}: {rule}. Works: a multiple of {block}, or optim.name=adamw."
    if name == "muon" and run.train.engine == "deepspeed":
        rule = "DeepSpeed cuts matrices into flat pieces, and this optimizer needs whole ones"
        yield f"optim.name={name}: {rule}. Works: adamw, apex_fused_adam, {OTHER_ENGINE}."
    if name == "muon" and run.parallel.cpu_offload and run.train.engine == "native":
        rule = "matrices would be gathered and multiplied on the CPU"
        yield f"optim.name={name}: {rule} with parallel.cpu_offload=true. Works: false there, or optim.name=adamw."
    if name == "apex_fused_adam" and run.train.engine == "native" and (world_size or 1) > 1:
        rule = "NVIDIA's kernel cannot read the sharded tensors of several processes"
        yield f"optim.name={name}: {rule}. Works: adamw, one process, or train.engine=deepspeed."


def missing_packages(run: RunConfig) -> list[str]:
    """What must be installed for this run and is not; nothing is imported."""
    problems = []
    if run.train.engine == "deepspeed" and not _is_there("deepspeed"):
        problems.append(
            "train.engine=deepspeed: DeepSpeed is not installed. "
            f"Works: pip install 'megatron_vilg[deepspeed]', {OTHER_ENGINE}."
        )
    if run.optim.name in LEAN and not _is_there("torchao"):
        problems.append(f"optim.name={run.optim.name}: torchao is not installed. {OTHER_OPTIMIZER}")
    if run.optim.name == "apex_fused_adam" and (problem := apex_problem()):
        problems.append(problem)
    return problems


def apex_problem() -> str | None:
    """Why ``optim.name=apex_fused_adam`` cannot work with the packages here; None: NVIDIA's Apex is there."""
    advice = (
        "Works: NVIDIA's Apex, built from source (github.com/NVIDIA/apex) with its C++ and CUDA extensions against "
        "this torch, or optim.name=adamw, which is fused too."
    )
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return f"optim.name=apex_fused_adam: Apex is not installed; `pip install apex` gives something else. {advice}"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        return (
            f"optim.name=apex_fused_adam: the package apex in {folders[0] if folders else spec.origin} is not "
            f"NVIDIA's but the web toolkit that the package index has under this name. {advice}"
        )
    return None


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
