"""Ranks placed by Ray: a bundle for each, and an actor in all but rank 0's, a host of one rank (`host_main`)."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from thalweg.config import env
from thalweg.config.engine import EngineConfig
from thalweg.engine.processes.host_link import cluster_key
from thalweg.errors import ConfigError, EngineDeadError, UnsupportedError

PLACE_SECONDS = 60.0  # that Ray may take to find room
_NAMES = {"GPU": "GPUs", "CPU": "CPUs"}


class RayHosts:
    """Room in a running Ray cluster for every rank, and the actors that run them.

    `config` is the engine's with the ranks' places; rank 0 is this process, whose host has to have room for it.
    Raises ConfigError if there is no cluster or no room in it, UnsupportedError without Ray.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._ray = ray = _imported()
        size, self._actors = config.tensor_parallel_size, []  # type: int, list[Any]
        self._group: Any = None
        self._closing = False
        self.key = secrets.token_hex(32) if env.read("THALWEG_CLUSTER_KEY") is None else cluster_key()
        self._own = not ray.is_initialized()
        if self._own:
            try:
                ray.init(address="auto", logging_level="warning")
            except (ConnectionError, RuntimeError) as e:
                reason = f"finds no Ray cluster on this host ({str(e).splitlines()[0][:200]})"
                raise ConfigError(f"--distributed-executor-backend ray {reason}; expected `ray start` here") from None
        try:
            total = ray.cluster_resources()
            kind = "GPU" if config.device != "cpu" and total.get("GPU", 0) else "CPU"
            if total.get(kind, 0) < size:
                have = f"Ray's cluster has {total.get(kind, 0):g} {_NAMES[kind]}"
                raise ConfigError(f"--tensor-parallel-size is {size}, and {have}; expected one for each rank")
            here = ray.get_runtime_context().get_node_id()
            [address] = [node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == here]
            self._reserve(kind, size, address)
            device = self._device_of_rank_0() if kind == "GPU" else "cpu"
            self.config = replace(
                config, distributed_executor_backend="mp", nnodes=size, master_addr=address, device=device
            )
            self._start(kind, replace(self.config, device="cuda" if kind == "GPU" else "cpu"))
        except BaseException:
            self.close()
            raise

    def watch(self, on_death: Callable[[EngineDeadError], object]) -> None:
        """`on_death(error)`, from a thread, when an actor ends before `close`."""
        threading.Thread(target=self._wait, args=(on_death,), name="thalweg-ray", daemon=True).start()

    def close(self) -> None:
        """End the actors and give the room back."""
        self._closing = True
        ray = self._ray
        with contextlib.suppress(Exception):  # a cluster that is gone has nothing to give back
            for actor in self._actors:
                ray.kill(actor)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        if self._own:
            ray.shutdown()

    def _reserve(self, kind: str, size: int, address: str) -> None:
        ray = self._ray
        here = {kind: 1.0, f"node:{address}": 0.001}
        group = self._group = ray.util.placement_group([here, *({kind: 1.0} for _ in range(size - 1))], strategy="PACK")
        try:
            ray.get(group.ready(), timeout=PLACE_SECONDS)
        except ray.exceptions.GetTimeoutError:
            free = ray.available_resources().get(kind, 0)
            raise ConfigError(
                f"Ray has found no room for {size} ranks within {PLACE_SECONDS:g} s: {free:g} {_NAMES[kind]} are free;"
                f" expected {size}, one of them on this host ({address})"
            ) from None
        places = ray.util.placement_group_table(group)["bundles_to_node_id"]
        # Neighbouring ranks on one host; bundle 0 is rank 0's.
        self._bundles = sorted(
            range(size), key=lambda bundle: (bundle != 0, places[bundle] != places[0], places[bundle])
        )

    def _actor(self, kind: str, rank: int) -> Any:
        strategy = self._ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=self._bundles[rank]
        )
        options = {"num_cpus": int(kind == "CPU"), "num_gpus": int(kind == "GPU"), "max_restarts": 0}
        actor = self._ray.remote(Launcher).options(scheduling_strategy=strategy, **options).remote()
        self._actors.append(actor)
        return actor

    def _device_of_rank_0(self) -> str:
        """Where it is among the devices that this process sees; an actor holds it meanwhile."""
        [gpu] = self._ray.get(self._actor("GPU", 0).gpus.remote())
        seen = env.read("CUDA_VISIBLE_DEVICES")
        try:
            return f"cuda:{int(gpu) if seen is None else seen.split(',').index(str(gpu))}"
        except ValueError:
            raise ConfigError(
                f"Ray gives rank 0 the GPU {gpu}, and CUDA_VISIBLE_DEVICES is {seen!r}; expected it among them"
            ) from None

    def _start(self, kind: str, config: EngineConfig) -> None:
        self._running = {
            self._actor(kind, rank).run.remote(replace(config, node_rank=rank).to_dict(), self.key): rank
            for rank in range(1, config.nnodes)
        }

    def _wait(self, on_death: Callable[[EngineDeadError], object]) -> None:
        ray = self._ray
        [ended], _ = ray.wait(list(self._running))
        reason = "it left"
        try:
            ray.get(ended)
        except ray.exceptions.RayActorError:
            reason = "its host or process is gone"
        except Exception as e:  # noqa: BLE001 -- whatever ended it, the engine has to hear of it
            cause = getattr(e, "cause", None) or e
            reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        if not self._closing:
            on_death(EngineDeadError(f"node {self._running[ended]}: its Ray actor ended: {reason}"))


class Launcher:
    """The actor in a rank's bundle. Ray has set CUDA_VISIBLE_DEVICES to its device."""

    def gpus(self) -> list[Any]:
        gpus: list[Any] = _imported().get_gpu_ids()
        return gpus

    def run(self, config: dict[str, Any], key: str) -> None:
        from thalweg.engine.processes.host_main import Host

        Host(EngineConfig(**config), key).run()


def _imported() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as e:
        raise UnsupportedError(
            f"--distributed-executor-backend ray needs Ray ({e}); pip install 'thalweg[ray]' on every host, or start"
            " the hosts with --nnodes"
        ) from None
    return ray
