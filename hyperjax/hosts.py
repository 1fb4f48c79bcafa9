"""Processes, on one host or many, that run one experiment together.

No other module names processes: with one of them every function here does nothing, and
returns what it was given. With several, all run the same program on the same data, each
on devices of its own, and `jax.distributed` joins these. Process 0 owns the files.
What does not follow from the config and the round is agreed on, in the same order by
all: values (`gathered`), those of process 0 (`of_first`, `arrays_of_first`), and that
there is nothing to agree on (`check_same`).

They talk over a connection of each process to process 0, beside JAX's own: it says
what is agreed on before there are devices and after they have failed, and its end is
the end of the process that held it. An error of one is so told to all, and a process
that was killed ends the others within seconds; JAX would notice it after 100.
"""

import contextlib
import json
import os
import queue
import secrets
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from hyperjax.errors import check_at_least
from hyperjax.types import PyTree

LOST = 3  # exit code of whoever is left when a process has ended
_FAILED = 2  # that of an error, as of launchers
_GRACE = 3.0  # seconds in which a process may leave in order when another has failed
_PATIENCE = 30  # seconds without a sign of life of a host that lost power or network
_WHERE = "hyperjax/process_0"
_FRAME = struct.Struct("!cQ")  # kind, length
_VALUE, _ARRAY, _ERROR, _BYE = b"v", b"a", b"e", b"b"


class _Ended(KeyboardInterrupt):
    """Another process has failed or ended, which has been said."""


class _Line:
    """One end of a connection between two processes."""

    def __init__(self, connection: socket.socket):
        self._socket, self._lock = connection, threading.Lock()
        self.arrived: queue.SimpleQueue[tuple[bytes, bytes]] = queue.SimpleQueue()

    def send(self, kind: bytes, content: bytes) -> None:
        """Sends; nothing if the other end is gone, which its reader says."""
        try:
            with self._lock:
                self._socket.sendall(_FRAME.pack(kind, len(content)))
                self._socket.sendall(content)
        except OSError:
            pass

    def receive(self) -> tuple[bytes, bytes] | None:
        """Waits for a message; None at the end of the connection."""
        try:
            header = self._read(_FRAME.size)
            kind, length = _FRAME.unpack(header)
            return kind, self._read(length)
        except (OSError, EOFError):
            return None

    def _read(self, length: int) -> bytes:
        content = bytearray(length)
        view, done = memoryview(content), 0
        while done < length:
            count = self._socket.recv_into(view[done:])
            if not count:
                raise EOFError
            done += count
        return bytes(content)


class _Group:
    """This process among others."""

    def __init__(self, index: int, lines: dict[int, _Line]):
        self.index, self.count = index, max(lines) + 1 if index == 0 else 0
        self.lines = lines  # of process 0: by process; of others: that to process 0
        self.code: int | None = None  # once somebody has failed
        self._told, self._lock = threading.Event(), threading.Lock()
        self._leaving = False  # the main thread knows already
        self._readers = [
            threading.Thread(target=self._listen, args=(i, line), daemon=True)
            for i, line in lines.items()
        ]
        for reader in self._readers:
            reader.start()

    def _listen(self, process: int, line: _Line) -> None:
        while (message := line.receive()) is not None:
            kind, content = message
            if kind == _BYE:
                return
            if kind == _ERROR:
                self._end(**json.loads(content))
                return
            line.arrived.put(message)
        text = f"process {process} has ended; its log may say why. The same command "
        self._end(f"{text}continues the run.", LOST, self.index == 0)

    def _end(self, text: str, code: int, in_order: bool = True) -> None:
        """Says, in a reader's thread, that somebody has failed, and ends."""
        self._say(text, code)
        if self._leaving:  # the main thread sees to the rest
            return
        if in_order:
            main = threading.main_thread()
            signal.pthread_kill(main.ident or 0, signal.SIGTERM)
            main.join(_GRACE)
        self.exit(code)

    def _say(self, text: str, code: int) -> None:
        with self._lock:
            if self.code is None:
                self.code = code
                if self.index == 0:
                    content = json.dumps(dict(text=text, code=code)).encode()
                    for line in self.lines.values():
                        line.send(_ERROR, content)
                print(f"error: {text}", file=sys.stderr, flush=True)
        self._told.set()

    def fail(self, text: str, code: int) -> NoReturn:
        """Tells all that this process has failed, and ends; in the main thread."""
        self._leaving = True
        if self.index and self.code is None:
            # Whoever fails first speaks for all.
            content = json.dumps(dict(text=text, code=code)).encode()
            self.lines[0].send(_ERROR, content)
            self._told.wait(_GRACE)
        self._say(text, code)
        self.exit(self.code or code)

    def exit(self, code: int) -> NoReturn:
        """Ends without waiting for the others, as JAX's own end does."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        if self.index == 0:  # while it lives, JAX does not end the others
            for reader in self._readers:
                if reader is not threading.current_thread():
                    reader.join(_GRACE / len(self._readers))
        os._exit(code)

    def values(self, value: bytes) -> list[bytes]:
        """What every process gives, by process."""
        if self.index:
            self.lines[0].send(_VALUE, value)
            return [v.encode() for v in json.loads(self.next(0))]
        found = [value, *(self.next(i) for i in sorted(self.lines))]
        content = json.dumps([v.decode() for v in found]).encode()
        for line in self.lines.values():
            line.send(_VALUE, content)
        return found

    def next(self, process: int) -> bytes:
        """The next message of a process; a signal interrupts it."""
        return self.lines[process].arrived.get()[1]

    def leave(self) -> None:
        """Says that the end of the connections is no accident."""
        self._leaving = True
        for line in self.lines.values():
            line.send(_BYE, b"")


_group: _Group | None = None
_asked: list[int] = []  # signals that ask the run to stop


def check_flags(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    """Refuses what names no process of a group.

    Raises:
      ValueError: some of the three are given and some are not, or there is no such
        process.
    """
    given = dict(
        coordinator=coordinator, num_processes=num_processes, process_id=process_id
    )
    absent = [name for name, value in given.items() if value is None]
    if len(absent) == len(given):
        return
    if absent:
        raise ValueError(
            f"--{' and --'.join(absent)} must be given, too: --coordinator, "
            "--num_processes and --process_id go together"
        )
    host, _, port = str(coordinator).rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"--coordinator={coordinator!r} must be HOST:PORT, of process 0"
        )
    check_at_least(1, num_processes=num_processes)
    if not 0 <= int(process_id or 0) < int(num_processes or 0):
        raise ValueError(
            f"--process_id={process_id} must be 0..{int(num_processes or 0) - 1}, one "
            f"of --num_processes={num_processes}"
        )


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    trace: bool = False,
) -> Iterator[None]:
    """Makes this process one of a group; must come before JAX looks for devices.

    Inside SIGTERM and SIGINT ask all processes to stop, see `stop_is_asked`. At the end
    they wait for each other. What is raised inside by one ends all, with its message
    and one exit code.

    Args:
      coordinator: HOST:PORT of process 0, by which the others reach it; None: JAX
        finds out all three from SLURM, Open MPI, Kubernetes or a TPU's metadata.
      num_processes: how many there are; one needs nothing of this.
      process_id: which of them this is.
      trace: whether stack traces are shown.

    Raises:
      ValueError: see `check_flags`.
      RuntimeError: JAX has been used already, or finds no such group.
    """
    check_flags(coordinator, num_processes, process_id)
    if num_processes == 1:
        hear()
    else:
        _connect(coordinator, num_processes, process_id)
    if _group is None:
        yield
        return
    with _ended_together(_group, trace):
        yield
        meet()
    _group.leave()
    jax.distributed.shutdown()


@contextlib.contextmanager
def _ended_together(group: _Group, trace: bool = False) -> Iterator[None]:
    """Whatever is raised inside ends all processes."""
    try:
        yield
    except KeyboardInterrupt:
        group.fail("interrupted", 130)
    except Exception as error:
        if trace:
            traceback.print_exc()
        group.fail(str(error) or type(error).__name__, _FAILED)


def _connect(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
    global _group
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _ask)
    hear()
    # It would take SIGTERM for itself.
    jax.config.update("jax_enable_preemption_service", False)
    _call(
        jax.distributed.initialize,
        coordinator,
        num_processes,
        process_id,
        cluster_detection_method="deactivate" if coordinator else None,
        heartbeat_timeout_seconds=_PATIENCE,
        shutdown_timeout_seconds=_PATIENCE,
    )
    # What JAX has no public name for: its store of keys, and what it found out.
    from jax._src import distributed

    state: Any = distributed.global_state
    if state.num_processes > 1:
        if state.process_id == 0:
            lines = _accepted(state.client, state.num_processes)
        else:
            lines = {0: _called(state.client, state.process_id, _host(state))}
        _group = _Group(state.process_id, lines)
        _group.count = state.num_processes


def _call(fn: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Calls what waits for the others; a signal ends it if they do not come soon."""
    with futures.ThreadPoolExecutor(1) as pool:
        waiting, patience = pool.submit(fn, *args, **options), float(_PATIENCE)
        while not waiting.done() and patience > 0:
            futures.wait([waiting], 0.1)
            patience -= 0.1 * bool(_asked)
        if not waiting.done():
            print("Stopped before all processes had come.", flush=True)
            os._exit(0)
        waiting.result()


def hear() -> None:
    """Lets signals come that were held back while JAX was being loaded."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _host(state: Any) -> str:
    """The name by which processes reach process 0."""
    return state.coordinator_address.rpartition(":")[0].strip("[]")


def _accepted(client: Any, count: int) -> dict[int, _Line]:
    """Connections to process 0, by process."""
    secret = secrets.token_bytes(16)
    found: dict[int, _Line] = {}
    with socket.create_server(("", 0), backlog=count) as server:
        server.settimeout(10 * _PATIENCE)
        where = dict(port=server.getsockname()[1], secret=secret.hex())
        client.key_value_set(_WHERE, json.dumps(where))
        while len(found) < count - 1:
            connection, _ = server.accept()
            connection.settimeout(_PATIENCE)
            line = _Line(connection)
            _, content = line.receive() or (b"", b"")
            if content[:16] == secret:
                _made_ready(connection)
                found[int(content[16:])] = line
    return found


def _called(client: Any, index: int, host: str) -> _Line:
    """The connection to process 0."""
    text = client.blocking_key_value_get(_WHERE, 10_000 * _PATIENCE)
    where = json.loads(text)
    connection = socket.create_connection((host, where["port"]), _PATIENCE)
    _made_ready(connection)
    line = _Line(connection)
    line.send(_VALUE, bytes.fromhex(where["secret"]) + str(index).encode())
    return line


def _made_ready(connection: socket.socket) -> None:
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def _ask(number: int, frame: Any) -> None:
    if _group is not None and _group.code is not None:
        raise _Ended
    if _asked and number == signal.SIGINT:
        raise KeyboardInterrupt
    _asked.append(number)


# What is agreed on -------------------------------------------------------------------


def several() -> bool:
    """Returns whether there is more than one process."""
    return _group is not None


def count() -> int:
    """Returns how many processes there are."""
    return 1 if _group is None else _group.count


def is_first() -> bool:
    """Returns whether this is process 0, which owns the files."""
    return _group is None or _group.index == 0


def gathered(value: Any) -> list[Any]:
    """Returns what every process gives, JSON, by process."""
    if _group is None:
        return [value]
    return [json.loads(v) for v in _group.values(json.dumps(value).encode())]


def meet() -> None:
    """Waits for all: what comes next begins everywhere within moments."""
    gathered(None)


def of_first(value: Any) -> Any:
    """Returns what process 0 gives, JSON."""
    return gathered(value if is_first() else None)[0]


def arrays_of_first(arrays: PyTree | None, template: PyTree) -> PyTree:
    """Returns a tree of NumPy arrays that process 0 gives, to the bit.

    Args:
      arrays: of process 0; others may give None.
      template: its structure, shapes and dtypes.
    """
    if _group is None:
        return arrays
    leaves, structure = jax.tree.flatten(template)
    if is_first():
        for leaf in map(np.ascontiguousarray, jax.tree.leaves(arrays)):
            for line in _group.lines.values():
                line.send(_ARRAY, leaf.tobytes())
        return arrays
    return jax.tree.unflatten(
        structure,
        [np.frombuffer(_group.next(0), s.dtype).reshape(s.shape) for s in leaves],
    )


def parts(num: int) -> list[range]:
    """Returns which of so many clients each process has: equal parts, rounded up."""
    each = -(-num // count())
    return [range(min(i * each, num), min((i + 1) * each, num)) for i in range(count())]


def part(num: int) -> range:
    """Returns those of this process."""
    return parts(num)[0 if _group is None else _group.index]


def fetched(process: int, make: Callable[[], bytes]) -> bytes:
    """Returns on process 0 what a process makes, when 0 asks; b"" on all others."""
    if _group is None or process == 0:
        return make() if is_first() else b""
    if is_first():
        _group.lines[process].send(_ARRAY, b"")
        return _group.next(process)
    if _group.index == process:
        _group.next(0)
        _group.lines[0].send(_ARRAY, make())
    return b""


def handed(process: int, content: bytes) -> bytes:
    """Returns on a process what 0 has for it, when that asks; b"" on all others."""
    if _group is None or process == 0:
        return content if is_first() else b""
    if is_first():
        _group.next(process)
        _group.lines[process].send(_ARRAY, content)
    elif _group.index == process:
        _group.lines[0].send(_ARRAY, b"")
        return _group.next(0)
    return b""


def check_same(values: Mapping[str, Any]) -> None:
    """Refuses processes of which one has other values, JSON.

    Raises:
      ValueError: everywhere, naming the process and what differs.
    """
    first, *others = gathered(dict(values))
    for process, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"process {process} has {name}={other.get(name)!r} and process 0 "
                    f"{first.get(name)!r}; all of a run's processes must have the same"
                )


def stop_is_asked() -> bool:
    """Returns whether any process has been sent SIGTERM or SIGINT; all must ask."""
    return any(gathered(bool(_asked)))


# Devices -----------------------------------------------------------------------------


def share(devices: int) -> int:
    """Returns how many of so many devices are this process's.

    Raises:
      ValueError: processes cannot have equally many.
    """
    if devices % count():
        raise ValueError(
            f"engine.devices={devices} counts devices over all processes, of which "
            f"there are {count()}; accepted: a multiple of that, or 0"
        )
    return devices // count()


def devices(most: int = 0) -> list[jax.Device]:
    """Returns the devices of a run, equally many of each process; 0: all.

    Raises:
      ValueError: processes cannot have, or do not have, equally many.
    """
    if _group is None:
        return jax.local_devices()[: most or None]
    by_process: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        by_process.setdefault(device.process_index, []).append(device)
    there = [len(each) for _, each in sorted(by_process.items())]
    wanted = share(most) or max(there)
    if min(there) < wanted:
        raise ValueError(
            f"processes have {', '.join(map(str, there))} devices and must have "
            f"equally many, {wanted} each; engine.devices={most} is the number in all"
        )
    return [d for _, each in sorted(by_process.items()) for d in each[:wanted]]


def put_mine(a: PyTree, sharding: Sharding, devices: int) -> PyTree:
    """Returns a tree of what each process has, leaves [D, ...], one row a device.

    One device of a process has its array, and the others have zeros, so that the sum
    over devices is that over processes.

    Args:
      a: NumPy leaves [...], of this process.
      sharding: that has one row on each device.
      devices: D, of all processes.
    """

    def one(x):
        rows = [x[None]]  # for whichever device comes first

        def row(index):
            return rows.pop() if rows else np.zeros_like(x[None])

        return jax.make_array_from_callback((devices, *x.shape), sharding, row)

    return jax.tree.map(one, a)


def whole(x: Any) -> np.ndarray:
    """Returns an array, parts of which other processes may have, as a NumPy array."""
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    if not here and not x.is_fully_replicated:
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
    return np.asarray(x)


def put(a: PyTree, sharding: Sharding) -> PyTree:
    """Puts a tree, which every process holds, on devices of several processes."""
    if _group is None:
        return jax.device_put(a, sharding)

    def one(x):
        if isinstance(x, jax.Array):
            if not x.is_fully_addressable:
                return jax.device_put(x, sharding)
            if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
                data = one(jax.random.key_data(x))
                return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        x = np.asarray(x)
        # device_put would compare the values of all processes, each time.
        return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

    return jax.tree.map(one, a)
