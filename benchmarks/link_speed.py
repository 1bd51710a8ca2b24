"""Bandwidth and round trip between two addresses, with plain sockets.

Run as a file, it is either end: `link_speed.py receive ADDRESS` prints one line of JSON, `link_speed.py send ADDRESS
SECONDS` feeds it.
"""

from __future__ import annotations

import json
import socket
import sys
import time

PORT = 29400
ROUND_TRIPS = 20
_CHUNK = bytes(256 * 1024)


def receive(address: str) -> dict[str, float]:
    """Wait for one sender; {"bytes_per_s", "round_trip_s"} as seen from here. The smallest round trip counts."""
    with socket.create_server((address, PORT)) as server:
        connection, _ = server.accept()
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        round_trips = []
        for _ in range(ROUND_TRIPS):
            started = time.perf_counter()
            connection.sendall(b"?")
            connection.recv(1)
            round_trips.append(time.perf_counter() - started)
        buffer = bytearray(len(_CHUNK))
        # The first bytes may come at once from a full token bucket: the clock starts behind them.
        skipped = 0
        while skipped < 2 * len(_CHUNK):
            skipped += connection.recv_into(buffer)
        started, received = time.perf_counter(), 0
        while size := connection.recv_into(buffer):
            received += size
        return {"bytes_per_s": received / (time.perf_counter() - started), "round_trip_s": min(round_trips)}


def send(address: str, seconds: float) -> None:
    """Answer the receiver's round trips, then send as fast as it goes for `seconds`."""
    deadline = time.monotonic() + 10
    while True:
        try:
            connection = socket.create_connection((address, PORT), timeout=10)
            break
        except OSError:  # the receiver is not up yet
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    with connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # What lies in the send buffer at the end is received all the same; a small one keeps the run short.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * len(_CHUNK))
        for _ in range(ROUND_TRIPS):
            connection.recv(1)
            connection.sendall(b"!")
        finish = time.monotonic() + seconds
        sent = 0
        while time.monotonic() < finish or sent < 4 * len(_CHUNK):
            connection.sendall(_CHUNK)
            sent += len(_CHUNK)


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        print(json.dumps(receive(sys.argv[2])))
    else:
        send(sys.argv[2], float(sys.argv[3]))
