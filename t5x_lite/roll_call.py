"""The processes of a job meet at the coordinator's address before JAX looks for any device.

JAX's own client aborts its process with a stack trace if the others do not come, a TPU's driver
waits for them for ever, and neither says who is missing. Here every process tells process 0 who it
is and what it was started with; process 0 compares, and all hear the same. Then JAX's coordinator
takes over the port.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from t5x_lite.errors import Failure, UsageError

_SECONDS_BETWEEN_TRIES = 0.5
# For one message, once a connection is there.
_SECONDS_A_MESSAGE = 5.0
# The coordinator of an earlier start may still be on its way out.
_SECONDS_FOR_THE_PORT = 10.0
_LONGEST_MESSAGE = 16 << 20
_MOST_NAMED = 8


class Member(NamedTuple):
    """What a process says of itself.

    Attributes:
      process_id: its number.
      num_processes: how many it believes there are.
      settings: what must be the same in all of them: name -> value, as text.
    """

    process_id: int
    num_processes: int
    settings: Mapping[str, str]


class _Verdict(NamedTuple):
    problem: str | None = None
    is_usage: bool = False


def meet(address: str, me: Member, *, timeout: float, hint: str) -> None:
    """Returns when all processes have come and were started alike.

    Args:
      address: HOST:PORT of process 0.
      me: this process.
      timeout: seconds to wait for the others.
      hint: how one starts a job of several processes here, for errors.

    Raises:
      UsageError: the processes differ in settings or in how many they are, or two have one number.
      Failure: the coordinator cannot be reached, or some processes have not come in time.
    """
    host, port = split_address(address)
    if me.process_id == 0:
        verdict = _gather(address, port, me, timeout, hint)
    else:
        verdict = _attend(address, host, port, me, timeout, hint)
    if verdict.problem is not None:
        raise (UsageError if verdict.is_usage else Failure)(verdict.problem)


def split_address(address: str) -> tuple[str, int]:
    """`"host:1234"` or `"[::1]:1234"` as host and port; UsageError if it is neither."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UsageError(
            f"--coordinator_address={address}: give HOST:PORT of process 0, like 10.0.0.2:8476"
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


# ---- process 0 -----------------------------------------------------------------------------------


def _gather(address: str, port: int, me: Member, timeout: float, hint: str) -> _Verdict:
    deadline = time.monotonic() + timeout
    members = {0: me}
    by_number: dict[int, socket.socket] = {}
    connections: list[socket.socket] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(_listen(port, me.num_processes, timeout))
        verdict = _Verdict()
        while verdict.problem is None:
            if len(members) == me.num_processes:
                gone = [number for number, c in by_number.items() if _is_closed(c)]
                if not gone:
                    break
                for number in gone:  # to be started again, or missing
                    del members[number], by_number[number]
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                verdict = _Verdict(_describe_missing(address, members, me, timeout, hint))
                break
            found = _receive(connection)
            if not _is_member(found):
                continue  # whoever looks at ports
            member = Member(**found)
            connections.append(connection)
            same = by_number.get(member.process_id)
            if same is not None and _is_closed(same):  # it was started again meanwhile
                del members[member.process_id]
            verdict = _check_numbers(address, member, members, me)
            members.setdefault(member.process_id, member)
            by_number[member.process_id] = connection
        if verdict.problem is None:
            verdict = _compare(members)
        for connection in connections:
            _send(connection, verdict._asdict())
        for connection in connections:
            _receive(connection)  # until it is closed there: so the port is free at once
    return verdict


def _listen(port: int, backlog: int, timeout: float) -> socket.socket:
    deadline = time.monotonic() + min(timeout, _SECONDS_FOR_THE_PORT)
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        try:
            return socket.create_server(
                ("", port), family=family, backlog=backlog, dualstack_ipv6=both
            )
        except OSError as e:
            if time.monotonic() > deadline:
                raise UsageError(
                    f"process 0 cannot listen on port {port} of --coordinator_address: "
                    f"{os.strerror(e.errno or 0)}; end what uses it, an earlier start perhaps, or "
                    "give another"
                ) from e
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _check_numbers(
    address: str, member: Member, members: Mapping[int, Member], me: Member
) -> _Verdict:
    number, count = member.process_id, member.num_processes
    if count != me.num_processes:
        return _Verdict(
            f"process {number} was started with --num_processes={count}, process 0 with "
            f"--num_processes={me.num_processes}",
            is_usage=True,
        )
    if number in members:
        return _Verdict(
            f"two processes came to {address} as process {number} of {count}: give each its own "
            "--process_id",
            is_usage=True,
        )
    return _Verdict()


def _compare(members: Mapping[int, Member]) -> _Verdict:
    """Names the first difference from process 0."""
    first = members[0].settings
    for number in sorted(members):
        other = members[number].settings
        for name in {**first, **other}:
            ours, theirs = first.get(name, "nothing"), other.get(name, "nothing")
            if ours != theirs:
                return _Verdict(
                    f"process {number} has {name} = {theirs}, process 0 {ours}: start the same "
                    "command, of the same installation, on every host",
                    is_usage=True,
                )
    return _Verdict()


def _describe_missing(
    address: str, members: Mapping[int, Member], me: Member, timeout: float, hint: str
) -> str:
    missing = [i for i in range(me.num_processes) if i not in members]
    named = ", ".join(map(str, missing[:_MOST_NAMED])) + (" ..." * (len(missing) > _MOST_NAMED))
    return (
        f"{len(members)} of {me.num_processes} processes came to {address} within {timeout:g} s, "
        f"missing: {named}. {hint}; --distributed_timeout=SECONDS waits longer"
    )


# ---- the others ----------------------------------------------------------------------------------


def _attend(address: str, host: str, port: int, me: Member, timeout: float, hint: str) -> _Verdict:
    deadline = time.monotonic() + timeout
    while True:
        try:
            left = max(0.01, deadline - time.monotonic())
            with socket.create_connection((host, port), timeout=left) as connection:
                if connection.getsockname() == connection.getpeername():
                    # On one machine a free port can be given to the one who asks for it.
                    raise ConnectionRefusedError("Connection refused")
                _send(connection, me._asdict())
                # Process 0 may have come a moment ago, and waits as long for the rest.
                found = _receive(connection, 2 * timeout)
            if isinstance(found, dict) and set(found) == set(_Verdict._fields):
                return _Verdict(**found)
            problem = "what answers there is not gathering processes; an earlier start perhaps"
        except OSError as e:
            problem = e.strerror or str(e)
        if time.monotonic() + _SECONDS_BETWEEN_TRIES >= deadline:
            return _Verdict(
                f"process {me.process_id} of {me.num_processes} found no coordinator at {address} "
                f"within {timeout:g} s ({problem}): process 0 must run on that host and the port "
                f"be open to this one. {hint}; --distributed_timeout=SECONDS waits longer"
            )
        time.sleep(_SECONDS_BETWEEN_TRIES)


# ---- messages: a line of JSON each ---------------------------------------------------------------


def _send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # who has gone meanwhile is missed by JAX
        connection.settimeout(_SECONDS_A_MESSAGE)
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket, timeout: float = _SECONDS_A_MESSAGE) -> Any:
    """The message; None if the connection ends, or something else comes."""
    connection.settimeout(timeout)
    data = b""
    try:
        while not data.endswith(b"\n") and len(data) < _LONGEST_MESSAGE:
            more = connection.recv(1 << 16)
            if not more:
                return None
            data += more
        return json.loads(data)
    except (OSError, ValueError):
        return None


def _is_member(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and set(found) == set(Member._fields)
        and isinstance(found["settings"], dict)
    )


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
